// What looks at one number at a time: scale, bias, residual and activation by themselves, copies.
#pragma once

#include <algorithm>

#include "epilogue.h"
#include "team.h"

namespace spre {

template <class X>
void run_affine(const Step& s, const X* x, X* y, const X* residual, const float* scale,
                const float* bias, const Worker& worker) {
  const RowTiles rows(s, 1);
  const int64_t first = rows.first_row() * s.out_width;
  const int64_t pixels = rows.last_row() * s.out_width - first;
  for (int64_t p = first + worker.first(pixels); p < first + worker.last(pixels); ++p) {
    for (int64_t c = 0; c < s.channels; c += kLanes) {
      const int lanes = static_cast<int>(std::min<int64_t>(kLanes, s.channels - c));
      const X* from = x + p * s.x_stride + c;
      Floats sums[1][1] = {{lanes == kLanes ? load(from) : load(from, lanes)}};
      if (scale != nullptr) sums[0][0] = mul(sums[0][0], load(scale + c));
      finish<X, 1, 1>(sums, y + p * s.y_stride + c, s.y_stride,
                      residual == nullptr ? nullptr : residual + p * s.residual_stride + c,
                      s.residual_stride, bias == nullptr ? nullptr : bias + c, s.activation, lanes);
    }
  }
}

template <class X>
void run_copy(const Step& s, const X* x, X* y, const Worker& worker) {
  const RowTiles rows(s, 1);
  const int64_t first = rows.first_row() * s.out_width;
  const int64_t pixels = rows.last_row() * s.out_width - first;
  for (int64_t p = first + worker.first(pixels); p < first + worker.last(pixels); ++p)
    std::memcpy(y + p * s.y_stride, x + p * s.x_stride, s.channels * sizeof(X));
}

}  // namespace spre
