// What looks at one number at a time: scale, bias, residual and activation by themselves, copies.
#pragma once

#include <algorithm>

#include "epilogue.h"
#include "team.h"

namespace spre {

template <class X>
void run_affine(const Step& s, const X* x, const float* scale, const Epilogue<X>& epilogue,
                const Worker& worker) {
  const int64_t pixels = s.batch * s.out_height * s.out_width;
  for (int64_t p = worker.first(pixels); p < worker.last(pixels); ++p) {
    for (int64_t c = 0; c < s.channels; c += kLanes) {
      const Epilogue<X> here = epilogue.at(p, c);
      const int lanes = here.last_lanes(1);
      const X* from = x + p * s.x_stride + c;
      Floats sums[1][1] = {{lanes == kLanes ? load(from) : load(from, lanes)}};
      if (scale != nullptr)
        sums[0][0] = mul(sums[0][0], lanes == kLanes ? load(scale + c) : load(scale + c, lanes));
      finish(sums, here);
    }
  }
}

template <class X>
void run_copy(const Step& s, const X* x, X* y, const Worker& worker) {
  const int64_t pixels = s.batch * s.out_height * s.out_width;
  for (int64_t p = worker.first(pixels); p < worker.last(pixels); ++p)
    std::memcpy(y + p * s.y_stride, x + p * s.x_stride, s.channels * sizeof(X));
}

}  // namespace spre
