// A weight and its mask, in one pass each way.
#pragma once

#include <cstring>
#include <type_traits>

#include "types.h"

namespace spre {

// `y` may be the weight itself.
template <class Number>
void mask_weight(const Number* weight, const uint8_t* __restrict mask, Number* y, int64_t count) {
  for (int64_t i = 0; i < count; ++i) y[i] = weight[i] * static_cast<Number>(mask[i]);
}

// The gradients of a product of a weight and a mask of numbers: of the weight, and of the mask
// where that is not 0.
template <class Number>
void product_gradients(const Number* __restrict gradient, const Number* __restrict weight,
                       const Number* __restrict mask, Number* __restrict of_weight,
                       Number* __restrict of_mask, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    of_weight[i] = gradient[i] * mask[i];
    const Number product = gradient[i] * weight[i];
    of_mask[i] = mask[i] == 0 ? 0 : product;
  }
}

// Adds -0, which changes no number, where the mask is 1. Choosing by bits what is added keeps the
// compiler from rounding product and sum as one, which would not be what torch computes. `y` may be
// the gradient itself.
template <class Number>
void decay_gradient(const Number* gradient, const Number* __restrict weight,
                    const uint8_t* __restrict mask, Number* y, int64_t count, Number decay) {
  using Bits = std::conditional_t<sizeof(Number) == sizeof(uint32_t), uint32_t, uint64_t>;
  constexpr Bits kSign = ~(~Bits{0} >> 1);
  for (int64_t i = 0; i < count; ++i) {
    const Number product = decay * weight[i];
    const Bits kept = Bits{0} - mask[i];
    Bits bits;
    std::memcpy(&bits, &product, sizeof(bits));
    bits = (bits & ~kept) | (kSign & kept);
    Number added;
    std::memcpy(&added, &bits, sizeof(bits));
    y[i] = gradient[i] + added;
  }
}

}  // namespace spre
