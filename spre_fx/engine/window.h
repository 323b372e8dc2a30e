// What slides a window over each channel by itself: depthwise convolution and pooling. 16 channels
// stand in a register, so nothing is packed.
#pragma once

#include <algorithm>
#include <utility>

#include "epilogue.h"
#include "team.h"

namespace spre {

struct DepthwiseWindow {
  static constexpr bool kWeights = true, kScaled = false;
  SPRE_INLINE Floats start() { return zeros(); }
  SPRE_INLINE Floats take(Floats sum, Floats x, Floats weight) { return fma(x, weight, sum); }
};

struct MaxWindow {
  static constexpr bool kWeights = false, kScaled = false;
  SPRE_INLINE Floats start() { return broadcast(-kInfinity); }
  SPRE_INLINE Floats take(Floats best, Floats x, Floats) { return max_or_nan(best, x); }
};

struct AverageWindow {
  static constexpr bool kWeights = false, kScaled = true;
  SPRE_INLINE Floats start() { return zeros(); }
  SPRE_INLINE Floats take(Floats sum, Floats x, Floats) { return add(sum, x); }
};

// Neighbouring outputs of a row, 16 channels of each, and the taps of theirs inside of the image.
template <class X>
struct WindowTile {
  const X* x;  // what the first tap of the first output reads
  int64_t pixel_step, tap_step, row_step;
  int64_t taps_h, taps_w;
  const X* weight;
  int64_t weight_step, weight_row;  // from tap to tap and from row to row
  float scale;                      // of an average
  Epilogue<X> epilogue;
};

template <class X>
using WindowKernel = void (*)(const WindowTile<X>&);

// `Taps`: how many of a row there are, 0 for any number. `Whole`: all 16 channels are there.
template <class Window, class X, int Pixels, int Taps, bool Whole>
SPRE_NOINLINE void window_kernel(const WindowTile<X>& tile) {
  Floats sums[1][Pixels];
  UNROLLED_FOR (int p = 0; p < Pixels; ++p) sums[0][p] = Window::start();
  const int64_t pixel_step = tile.pixel_step, tap_step = tile.tap_step;
  const int lanes = Whole ? kLanes : tile.epilogue.last_lanes(1);
  const X* row = tile.x;
  const X* weight_row = tile.weight;
  const auto tap = [&](const X* x, const X* weight) {
    Floats weights = zeros();
    if constexpr (Window::kWeights) weights = load(weight);
    UNROLLED_FOR (int p = 0; p < Pixels; ++p) {
      const X* from = x + p * pixel_step;
      sums[0][p] = Window::take(sums[0][p], Whole ? load(from) : load(from, lanes), weights);
    }
  };
  ROLLED_FOR (int64_t u = 0; u < tile.taps_h; ++u) {
    if constexpr (Taps > 0) {
      UNROLLED_FOR (int v = 0; v < Taps; ++v)
        tap(row + v * tap_step, weight_row + v * tile.weight_step);
    } else {
      ROLLED_FOR (int64_t v = 0; v < tile.taps_w; ++v)
        tap(row + v * tap_step, weight_row + v * tile.weight_step);
    }
    row += tile.row_step;
    weight_row += tile.weight_row;
  }
  if constexpr (Window::kScaled)
    UNROLLED_FOR (int p = 0; p < Pixels; ++p) sums[0][p] = mul(sums[0][p], broadcast(tile.scale));
  finish(sums, tile.epilogue, lanes);
}

// A stretch of a row of outputs of a depthwise conv whose windows are 3 wide and 1 apart.
template <class X>
struct Stretch {
  const X* x;  // what the first tap of the first output reads, were there no edge
  int64_t pixel_step, row_step;
  int64_t taps_h;
  const X* weight;
  int64_t weight_step, weight_row;
  int64_t outputs;         // `Pixels` or more
  bool at_left, at_right;  // the first tap of the first output (the last of the last) is outside
  Epilogue<X> epilogue;
};

// All 16 channels. Each number of x is read once, for all of up to 3 outputs that take it in. The
// last outputs are perhaps computed twice, so that each tile is whole.
template <class X, int Pixels>
SPRE_NOINLINE void scan_kernel(const Stretch<X>& s) {
  constexpr int kTaps = 3, kColumns = Pixels + kTaps - 1;
  for (int64_t end = 0; end < s.outputs;) {
    end = std::min(end + Pixels, s.outputs);
    const int64_t begin = end - Pixels;
    const bool first = begin > 0 || !s.at_left, last = end < s.outputs || !s.at_right;
    Floats sums[1][Pixels];
    UNROLLED_FOR (int p = 0; p < Pixels; ++p) sums[0][p] = zeros();
    const X* row = s.x + begin * s.pixel_step;
    const X* weight = s.weight;
    ROLLED_FOR (int64_t u = 0; u < s.taps_h; ++u, row += s.row_step, weight += s.weight_row) {
      Floats weights[kTaps];
      UNROLLED_FOR (int v = 0; v < kTaps; ++v) weights[v] = load(weight + v * s.weight_step);
      UNROLLED_FOR (int column = 0; column < kColumns; ++column) {
        if ((column == 0 && !first) || (column == kColumns - 1 && !last)) continue;
        const Floats x = load(row + column * s.pixel_step);
        UNROLLED_FOR (int v = 0; v < kTaps; ++v) {
          const int p = column - v;
          if (p >= 0 && p < Pixels) sums[0][p] = fma(x, weights[v], sums[0][p]);
        }
      }
    }
    finish(sums, s.epilogue.at(begin, 0), kLanes);
  }
}

template <class Window, class X>
struct WindowStep {
  static constexpr int kPixels = kRegisters >= 32 ? 8 : kRegisters >= 8 ? 6 : 4;
  static constexpr int64_t kStretch = 16;  // outputs of which all channels come before the next

  explicit WindowStep(const Step& step)
      : s(step),
        padded(round_up(step.channels, kLanes)),
        blocks(ceil_div(step.channels, kLanes)),
        rows(step, 1) {
    // Few rows (a global pool has one) are shared out by channels as well.
    parts = std::max<int64_t>(1, std::min(blocks, ceil_div(16, std::max<int64_t>(1, rows.size()))));
  }

  void run(const X* x, const X* weight, const Epilogue<X>& epilogue, const Worker& worker) const {
    WindowTile<X> t;
    t.pixel_step = s.stride_w * s.x_stride;
    t.tap_step = s.dilation_w * s.x_stride;
    t.row_step = s.dilation_h * s.width * s.x_stride;
    t.weight_step = padded;
    t.weight_row = s.kernel_w * padded;
    const int64_t tasks = rows.size() * parts;
    for (int64_t task = worker.first(tasks); task < worker.last(tasks); ++task) {
      const int64_t part = task % parts;
      const auto [image, row, one] = rows[task / parts];
      const X* from = x + image * s.height * s.width * s.x_stride;
      const Channels channels = {blocks * part / parts * kLanes,
                                 std::min(blocks * (part + 1) / parts * kLanes, s.channels)};
      run_row(t, channels, row, from, weight,
              epilogue.at((image * s.out_height + row) * s.out_width, 0));
    }
  }

 private:
  // The taps of a window from `start` on that lie inside of an image side.
  struct Taps {
    int64_t first, count;
  };
  static Taps inside(int64_t start, int64_t taps, int64_t dilation, int64_t side) {
    const int64_t first = start < 0 ? ceil_div(-start, dilation) : 0;
    const int64_t end = start >= side ? 0 : std::min(taps, ceil_div(side - start, dilation));
    return first < end ? Taps{first, end - first} : Taps{0, 0};
  }

  struct Channels {
    int64_t first, end;
  };

  // All of some channels before the next outputs: so memory is read in the order in which it lies.
  void run_row(WindowTile<X>& t, Channels channels, int64_t out_row, const X* x, const X* weight,
               const Epilogue<X>& row) const {
    const int64_t top = out_row * s.stride_h - s.padding_h;
    const Taps down = inside(top, s.kernel_h, s.dilation_h, s.height);
    x += (top + down.first * s.dilation_h) * s.width * s.x_stride;
    if constexpr (Window::kWeights) weight += down.first * t.weight_row;
    t.taps_h = down.count;
    const int64_t left_over = scan(t, channels, x, weight, row);
    if (left_over >= channels.end) return;
    const auto run = [&](int64_t column, int64_t width) {
      const int64_t left = column * s.stride_w - s.padding_w;
      const Taps across = inside(left, s.kernel_w, s.dilation_w, s.width);
      const X* x_here = x + (left + across.first * s.dilation_w) * s.x_stride;
      t.taps_w = across.count;
      const int64_t divisor = s.count_inside ? std::max<int64_t>(1, down.count * across.count)
                                             : s.kernel_h * s.kernel_w;
      t.scale = 1.f / static_cast<float>(divisor);
      for (int64_t c = left_over; c < channels.end; c += kLanes) {
        t.x = x_here + c;
        if constexpr (Window::kWeights) t.weight = weight + across.first * t.weight_step + c;
        t.epilogue = row.at(column, c);
        pick(width, across.count, t.epilogue.last_lanes(1))(t);
      }
    };
    // The outputs whose windows lie inside of the image from left to right go together.
    const int64_t reach = (s.kernel_w - 1) * s.dilation_w;
    const int64_t inner = std::min(s.out_width, ceil_div(s.padding_w, s.stride_w));
    const int64_t room = s.width - 1 - reach + s.padding_w;
    const int64_t outer =
        room < 0 ? inner : std::max(inner, std::min(s.out_width, room / s.stride_w + 1));
    for (int64_t j = 0; j < inner; ++j) run(j, 1);
    const int64_t together = ceil_div(outer - inner, kPixels);
    for (int64_t i = 0; i < together; ++i) {
      const int64_t begin = (outer - inner) * i / together;
      run(inner + begin, (outer - inner) * (i + 1) / together - begin);
    }
    for (int64_t j = outer; j < s.out_width; ++j) run(j, 1);
  }

  // Computes the channels that `scan_kernel` takes, and returns the first of the others.
  int64_t scan(const WindowTile<X>& t, Channels channels, const X* x, const X* weight,
               const Epilogue<X>& row) const {
    if constexpr (Window::kWeights && kScannedPixels > 0) {
      // A sum that lies where its residual did must not be computed twice.
      const bool takes = row.residual == nullptr && s.kernel_w == 3 && s.stride_w == 1 &&
                         s.dilation_w == 1 && s.padding_w <= 1 && s.out_width >= kScannedPixels;
      if (takes) return scan_all(t, channels, x, weight, row);
    }
    return channels.first;
  }

  int64_t scan_all(const WindowTile<X>& t, Channels channels, const X* x, const X* weight,
                   const Epilogue<X>& row) const {
    const int64_t end = std::min(channels.end, s.channels / kLanes * kLanes);
    Stretch<X> some{};
    some.pixel_step = t.pixel_step;
    some.row_step = t.row_step;
    some.taps_h = t.taps_h;
    some.weight_step = t.weight_step;
    some.weight_row = t.weight_row;
    const int64_t stretches = std::max<int64_t>(1, s.out_width / kStretch);
    for (int64_t i = 0; i < stretches; ++i) {
      const int64_t begin = s.out_width * i / stretches, to = s.out_width * (i + 1) / stretches;
      some.outputs = to - begin;
      some.at_left = begin < s.padding_w;
      some.at_right = to + 2 - s.padding_w > s.width;
      for (int64_t c = channels.first; c < end; c += kLanes) {
        some.x = x + (begin - s.padding_w) * s.x_stride + c;
        some.weight = weight + c;
        some.epilogue = row.at(begin, c);
        scan_kernel<X, kScannedPixels>(some);
      }
    }
    return end;
  }

  static WindowKernel<X> pick(int64_t pixels, int64_t taps, int lanes) {
    const auto all = std::make_integer_sequence<int, kPixels>();
    if (lanes < kLanes) return pick_pixels<0, false>(pixels, all);
    return taps == 3 ? pick_pixels<3, true>(pixels, all) : pick_pixels<0, true>(pixels, all);
  }

  template <int Taps, bool Whole, int... PixelsLessOne>
  static WindowKernel<X> pick_pixels(int64_t pixels, std::integer_sequence<int, PixelsLessOne...>) {
    static constexpr WindowKernel<X> kTable[] = {
        window_kernel<Window, X, PixelsLessOne + 1, Taps, Whole>...};
    return kTable[pixels - 1];
  }

  const Step& s;
  int64_t padded, blocks;
  RowTiles rows;
  int64_t parts;
};

}  // namespace spre
