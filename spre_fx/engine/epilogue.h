// What becomes of a sum before it is stored: bias, residual, activation.
#pragma once

#include <algorithm>
#include <limits>

#include "types.h"

namespace spre {

inline constexpr float kInfinity = std::numeric_limits<float>::infinity();

// What becomes of the sums of a tile of outputs, and where they go. Kernels get that of their tile.
template <class X>
struct Epilogue {
  X* y;  // the first pixel and output, as are residual and bias
  int64_t y_stride;
  const X* residual;  // may be null, as may bias
  int64_t residual_stride;
  const float* bias;
  int64_t activation;
  int64_t outputs;  // there are from here on: no others are stored

  // The same for a tile so many pixels and outputs further on.
  Epilogue at(int64_t pixel, int64_t output) const {
    return {y + pixel * y_stride + output,
            y_stride,
            residual == nullptr ? nullptr : residual + pixel * residual_stride + output,
            residual_stride,
            bias == nullptr ? nullptr : bias + output,
            activation,
            outputs - output};
  }

  // That of one of the groups of channels, whose biases are padded by themselves.
  Epilogue of_group(int64_t group, int64_t outputs_of_group) const {
    Epilogue own = at(0, group * outputs_of_group);
    if (bias != nullptr) own.bias = bias + group * round_up(outputs_of_group, kLanes);
    own.outputs = outputs_of_group;
    return own;
  }

  // How many outputs the last of so many blocks has.
  int last_lanes(int64_t blocks) const {
    return static_cast<int>(std::min<int64_t>(kLanes, outputs - (blocks - 1) * kLanes));
  }
};

// Those that `finish` does not do in registers.
SPRE_INLINE Floats activate(Floats x, int64_t activation) {
  switch (activation) {
    case kSilu: {
      // e^89 is infinite: what is left of a large negative x is zero, and of -inf NaN, as in torch.
      const Floats bounded = min(broadcast(87.f), max(broadcast(-89.f), x));
      const Floats e = exponential(mul(bounded, broadcast(-1.f)));
      return div(x, add(broadcast(1.f), e));
    }
    case kHardswish: {
      const Floats gate = min(broadcast(6.f), max(zeros(), add(x, broadcast(3.f))));
      return mul(x, mul(gate, broadcast(1.f / 6)));
    }
    default:
      return x;
  }
}

// Stores the sums of `Pixels` pixels and `Blocks` x 16 outputs, of which the last block has
// `lanes`.
template <class X, int Blocks, int Pixels>
SPRE_INLINE void finish(Floats (&sums)[Blocks][Pixels], const Epilogue<X>& epilogue, int lanes) {
  if (epilogue.bias != nullptr) {
    UNROLLED_FOR (int b = 0; b < Blocks; ++b) {
      const Floats add_to_all = load(epilogue.bias + b * kLanes);
      UNROLLED_FOR (int p = 0; p < Pixels; ++p) sums[b][p] = add(sums[b][p], add_to_all);
    }
  }
  if (epilogue.residual != nullptr) {
    UNROLLED_FOR (int p = 0; p < Pixels; ++p) {
      const X* from = epilogue.residual + p * epilogue.residual_stride;
      UNROLLED_FOR (int b = 0; b < Blocks; ++b) {
        const bool whole = b < Blocks - 1 || lanes == kLanes;
        const Floats more = whole ? load(from + b * kLanes) : load(from + b * kLanes, lanes);
        sums[b][p] = add(sums[b][p], more);
      }
    }
  }
  const int64_t activation = epilogue.activation;
  if (activation == kRelu || activation == kRelu6) {
    const Floats most = broadcast(activation == kRelu ? kInfinity : 6.f);
    UNROLLED_FOR (int b = 0; b < Blocks; ++b)
      UNROLLED_FOR (int p = 0; p < Pixels; ++p) sums[b][p] = min(most, max(zeros(), sums[b][p]));
  } else if (activation != kIdentity) {
    Floats memory[Blocks * Pixels];  // indexed in a loop, which would keep `sums` from registers
    UNROLLED_FOR (int b = 0; b < Blocks; ++b)
      UNROLLED_FOR (int p = 0; p < Pixels; ++p) memory[b * Pixels + p] = sums[b][p];
    for (Floats& each : memory) each = activate(each, activation);
    UNROLLED_FOR (int b = 0; b < Blocks; ++b)
      UNROLLED_FOR (int p = 0; p < Pixels; ++p) sums[b][p] = memory[b * Pixels + p];
  }
  UNROLLED_FOR (int p = 0; p < Pixels; ++p) {
    X* to = epilogue.y + p * epilogue.y_stride;
    UNROLLED_FOR (int b = 0; b < Blocks; ++b) {
      if (b < Blocks - 1 || lanes == kLanes) {
        store(to + b * kLanes, sums[b][p]);
      } else {
        store(to + b * kLanes, sums[b][p], lanes);
      }
    }
  }
}

template <class X, int Blocks, int Pixels>
SPRE_INLINE void finish(Floats (&sums)[Blocks][Pixels], const Epilogue<X>& epilogue) {
  finish(sums, epilogue, epilogue.last_lanes(Blocks));
}

}  // namespace spre
