// What becomes of a sum before it is stored: bias, residual, activation.
#pragma once

#include <limits>

#include "types.h"

namespace spre {

inline constexpr float kInfinity = std::numeric_limits<float>::infinity();

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

// Stores `Pixels` x `Blocks` sums. `lanes` is how many outputs of the last block there are.
template <class X, int Blocks, int Pixels>
SPRE_INLINE void finish(Floats (&sums)[Blocks][Pixels], X* y, int64_t y_stride, const X* residual,
                        int64_t residual_stride, const float* bias, int64_t activation, int lanes) {
  if (bias != nullptr) {
    UNROLLED_FOR (int b = 0; b < Blocks; ++b) {
      const Floats add_to_all = load(bias + b * kLanes);
      UNROLLED_FOR (int p = 0; p < Pixels; ++p) sums[b][p] = add(sums[b][p], add_to_all);
    }
  }
  if (residual != nullptr) {
    UNROLLED_FOR (int p = 0; p < Pixels; ++p) {
      const X* from = residual + p * residual_stride;
      UNROLLED_FOR (int b = 0; b < Blocks; ++b) {
        const bool whole = b < Blocks - 1 || lanes == kLanes;
        const Floats more = whole ? load(from + b * kLanes) : load(from + b * kLanes, lanes);
        sums[b][p] = add(sums[b][p], more);
      }
    }
  }
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
    X* to = y + p * y_stride;
    UNROLLED_FOR (int b = 0; b < Blocks; ++b) {
      if (b < Blocks - 1 || lanes == kLanes) {
        store(to + b * kLanes, sums[b][p]);
      } else {
        store(to + b * kLanes, sums[b][p], lanes);
      }
    }
  }
}

}  // namespace spre
