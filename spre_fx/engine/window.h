// What slides a window over each channel by itself: depthwise convolution and pooling. 16 channels
// stand in a register, so nothing is packed.
#pragma once

#include <algorithm>
#include <utility>

#include "epilogue.h"
#include "team.h"

namespace spre {

struct DepthwiseWindow {
  static constexpr bool kWeights = true;
  SPRE_INLINE Floats start() { return zeros(); }
  SPRE_INLINE Floats take(Floats sum, Floats x, Floats weight) { return fma(x, weight, sum); }
};

struct MaxWindow {
  static constexpr bool kWeights = false;
  SPRE_INLINE Floats start() { return broadcast(-kInfinity); }
  SPRE_INLINE Floats take(Floats best, Floats x, Floats) { return max_or_nan(best, x); }
};

struct AverageWindow {
  static constexpr bool kWeights = false;
  SPRE_INLINE Floats start() { return zeros(); }
  SPRE_INLINE Floats take(Floats sum, Floats x, Floats) { return add(sum, x); }
};

template <class Window, class X>
struct WindowStep {
  static constexpr int kPixels = kRegisters >= 32 ? 8 : 4;

  explicit WindowStep(const Step& step)
      : s(step),
        padded(round_up(step.channels, kLanes)),
        blocks(ceil_div(step.channels, kLanes)),
        rows(step, 1) {
    // Few rows (a global pool has one) are shared out by channels as well.
    parts = std::max<int64_t>(1, std::min(blocks, ceil_div(16, std::max<int64_t>(1, rows.size()))));
  }

  void run(const X* x, X* y, const X* residual, const X* weight, const float* bias,
           const Worker& worker) const {
    const int64_t tasks = rows.size() * parts;
    for (int64_t task = worker.first(tasks); task < worker.last(tasks); ++task) {
      const int64_t part = task % parts;
      const auto [image, row, one] = rows[task / parts];
      const X* from = x + image * s.height * s.width * s.x_stride;
      for (int64_t block = blocks * part / parts; block < blocks * (part + 1) / parts; ++block)
        run_row(block * kLanes, image * s.out_height + row, row, from, y, residual, weight, bias);
    }
  }

 private:
  void run_row(int64_t channel, int64_t row, int64_t out_row, const X* x, X* y, const X* residual,
               const X* weight, const float* bias) const {
    const int64_t top = out_row * s.stride_h - s.padding_h;
    // The outputs whose windows lie inside of the image from left to right.
    const int64_t reach = (s.kernel_w - 1) * s.dilation_w;
    const int64_t inner = std::min(s.out_width, ceil_div(s.padding_w, s.stride_w));
    const int64_t room = s.width - 1 - reach + s.padding_w;
    const int64_t outer =
        room < 0 ? inner : std::max(inner, std::min(s.out_width, room / s.stride_w + 1));
    int64_t j = 0;
    const auto run = [&](auto kernel, int64_t width) {
      (this->*kernel)(channel, row, top, j, x, y, residual, weight, bias);
      j += width;
    };
    while (j < inner) run(&WindowStep::run_pixels<1, true>, 1);
    while (j < outer) {
      const int64_t width = std::min<int64_t>(kPixels, outer - j);
      run(pick(width, std::make_integer_sequence<int, kPixels>()), width);
    }
    while (j < s.out_width) run(&WindowStep::run_pixels<1, true>, 1);
  }

  using Kernel = void (WindowStep::*)(int64_t, int64_t, int64_t, int64_t, const X*, X*, const X*,
                                      const X*, const float*) const;

  template <int... PixelsLessOne>
  static Kernel pick(int64_t pixels, std::integer_sequence<int, PixelsLessOne...>) {
    static constexpr Kernel kTable[] = {&WindowStep::run_pixels<PixelsLessOne + 1, false>...};
    return kTable[pixels - 1];
  }

  // `Pixels` outputs of one row, 16 channels of each. `Border`: taps may lie beside the image.
  template <int Pixels, bool Border>
  void run_pixels(int64_t channel, int64_t row, int64_t top, int64_t column, const X* x, X* y,
                  const X* residual, const X* weight, const float* bias) const {
    const int lanes = static_cast<int>(std::min<int64_t>(kLanes, s.channels - channel));
    const int64_t left = column * s.stride_w - s.padding_w;
    const int64_t step = s.stride_w * s.x_stride;
    Floats sums[1][Pixels];
    UNROLLED_FOR (int p = 0; p < Pixels; ++p) sums[0][p] = Window::start();
    int64_t taps_h = 0, taps_w = 0;
    for (int64_t u = 0; u < s.kernel_h; ++u) {
      const int64_t i = top + u * s.dilation_h;
      if (i < 0 || i >= s.height) continue;
      ++taps_h;
      taps_w = 0;
      for (int64_t v = 0; v < s.kernel_w; ++v) {
        const int64_t j = left + v * s.dilation_w;
        if (Border && (j < 0 || j >= s.width)) continue;
        ++taps_w;
        const X* from = x + (i * s.width + j) * s.x_stride + channel;
        Floats weights = zeros();
        if constexpr (Window::kWeights)
          weights = load(weight + (u * s.kernel_w + v) * padded + channel);
        if (lanes == kLanes) {
          UNROLLED_FOR (int p = 0; p < Pixels; ++p)
            sums[0][p] = Window::take(sums[0][p], load(from + p * step), weights);
        } else {
          UNROLLED_FOR (int p = 0; p < Pixels; ++p)
            sums[0][p] = Window::take(sums[0][p], load(from + p * step, lanes), weights);
        }
      }
    }
    if (s.kind == kAveragePool) {
      const int64_t taps =
          s.count_inside ? std::max<int64_t>(1, taps_h * taps_w) : s.kernel_h * s.kernel_w;
      const Floats scale = broadcast(1.f / static_cast<float>(taps));
      UNROLLED_FOR (int p = 0; p < Pixels; ++p) sums[0][p] = mul(sums[0][p], scale);
    }
    const int64_t pixel = row * s.out_width + column;
    finish<X, 1, Pixels>(
        sums, y + pixel * s.y_stride + channel, s.y_stride,
        residual == nullptr ? nullptr : residual + pixel * s.residual_stride + channel,
        s.residual_stride, bias == nullptr ? nullptr : bias + channel, s.activation, lanes);
  }

  const Step& s;
  int64_t padded, blocks;
  RowTiles rows;
  int64_t parts;
};

}  // namespace spre
