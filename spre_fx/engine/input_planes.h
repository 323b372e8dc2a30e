// The input of a planar conv: turned into planes, or copied from those of the whole image.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "image_lanes.h"
#include "types.h"

namespace spre {

// Where rows and columns of the input under a tile of outputs lie in the planes of a channel. With
// strides, rows and columns are sorted by their remainders, a plane for each pair of those, so that
// neighbouring outputs read neighbours for every tap. Positions of a plane count on from row to
// row: outputs are computed at all of them, those between rows for nothing.
class Planes {
 public:
  Planes(const Step& step, bool flat) : s_(step), flat_(flat) {
    reach_h_ = (s_.kernel_h - 1) * s_.dilation_h;
    reach_w_ = (s_.kernel_w - 1) * s_.dilation_w;
    phases_h_ = std::min(s_.stride_h, reach_h_ + 1);
    phases_w_ = std::min(s_.stride_w, reach_w_ + 1);
  }

  // For tiles of at most so many rows of outputs, or pixels of a flat conv.
  void set_size(int64_t size) {
    columns_ = flat_ ? size : s_.out_width + reach_w_ / s_.stride_w;
    rows_ = flat_ ? 1 : size + reach_h_ / s_.stride_h;
    plane_ = rows_ * columns_;
    // Registers read over the end of a plane. An odd number of cache lines: channels do not share
    // sets of a cache.
    const int64_t line = kCacheLine / static_cast<int64_t>(sizeof(float));
    channel_ = (ceil_div(phases_h_ * phases_w_ * plane_ + kPlaneSlack, line) | 1) * line;
    if (in_place()) channel_ = s_.x_stride;
    taps_.clear();
    for (int64_t u = 0; u < s_.kernel_h; ++u)
      for (int64_t v = 0; v < s_.kernel_w; ++v) {
        const int64_t y = u * s_.dilation_h, x = v * s_.dilation_w;
        const int64_t plane = y % s_.stride_h * phases_w_ + x % s_.stride_w;
        taps_.push_back(plane * plane_ + y / s_.stride_h * columns_ + x / s_.stride_w);
      }
  }

  // Whether x is read where it lies.
  bool in_place() const { return flat_ && s_.x_planes; }
  int64_t columns() const { return columns_; }
  int64_t channel() const { return channel_; }
  int64_t bytes() const {
    return in_place() ? 0 : s_.channels * channel_ * static_cast<int64_t>(sizeof(float));
  }
  const std::vector<int64_t>& taps() const { return taps_; }
  // How much of a channel the outputs at so many positions read, about.
  int64_t window(int64_t positions) const {
    return phases_h_ * phases_w_ * (positions + reach_h_ / s_.stride_h * columns_);
  }

  // Fills the planes for `count` rows of outputs of the image at `x`, from row `row` on.
  void fill_rows(const float* x, int64_t row, int64_t count, float* to) const {
    for (int64_t a = 0; a < phases_h_; ++a)
      for (int64_t b = 0; b < phases_w_; ++b)
        for (int64_t i = 0; i < count + reach_h_ / s_.stride_h; ++i) {
          const int64_t from = (row + i) * s_.stride_h + a - s_.padding_h;
          const bool inside = from >= 0 && from < s_.height;
          fill_row(inside ? x + from * s_.width * s_.x_stride : nullptr, b - s_.padding_w,
                   to + (a * phases_w_ + b) * plane_ + i * columns_);
        }
  }

  void fill_pixels(const float* x, int64_t count, float* to) const {
    turn(x, s_.x_stride, count, to);
  }

  // As `fill_rows`, from an image in planes.
  void copy_rows(const float* x, int64_t row, int64_t count, float* to) const {
    for (int64_t a = 0; a < phases_h_; ++a)
      for (int64_t b = 0; b < phases_w_; ++b) {
        const int64_t top = row * s_.stride_h + a - s_.padding_h, left = b - s_.padding_w;
        const auto [begin, end] = columns_inside(left);
        for (int64_t c = 0; c < s_.channels; ++c) {
          const float* from = x + c * s_.x_stride + left;
          float* line = to + c * channel_ + (a * phases_w_ + b) * plane_;
          for (int64_t i = 0; i < count + reach_h_ / s_.stride_h; ++i, line += columns_) {
            const int64_t y = top + i * s_.stride_h;
            const bool inside = y >= 0 && y < s_.height;
            copy_row(from + y * s_.width, inside ? begin : columns_, inside ? end : columns_, line);
          }
        }
      }
  }

 private:
  // Of the columns `first`, `first + stride` and so on of a row, from which to which one there are.
  std::pair<int64_t, int64_t> columns_inside(int64_t first) const {
    const int64_t before = first < 0 ? ceil_div(-first, s_.stride_w) : 0;
    const int64_t begin = std::min(columns_, before);
    const int64_t left = s_.width - first;
    return {begin, std::clamp(left <= 0 ? 0 : ceil_div(left, s_.stride_w), begin, columns_)};
  }

  // Columns [begin, end) of a row of a plane, zeros around: by whole registers, for what they write
  // behind the row is written again with what comes next.
  void copy_row(const float* x, int64_t begin, int64_t end, float* to) const {
    using Vector = Lanes<float>::Vector;
    constexpr int64_t kCount = Lanes<float>::kCount;
    const auto put = [to](int64_t i, Vector some) { std::memcpy(to + i, &some, sizeof(some)); };
    for (int64_t i = 0; i < begin; i += kCount) put(i, Vector{});
    if (s_.stride_w == 1)
      for (int64_t i = begin; i < end; i += kCount) put(i, load_unaligned(x + i));
    else if (s_.stride_w == 2)
      for (int64_t i = begin; i < end; ++i) to[i] = x[2 * i];
    else
      for (int64_t i = begin; i < end; ++i) to[i] = x[i * s_.stride_w];
    for (int64_t i = end; i < columns_; i += kCount) put(i, Vector{});
  }

  // Those columns of a row of pixels, of all channels, or zeros.
  void fill_row(const float* x, int64_t first, float* to) const {
    const auto [inside, outside] = columns_inside(first);
    const int64_t begin = x == nullptr ? columns_ : inside;
    const int64_t end = std::max(begin, outside);
    for (int64_t c = 0; begin > 0 && c < s_.channels; ++c)
      std::fill_n(to + c * channel_, begin, 0.f);
    for (int64_t c = 0; end < columns_ && c < s_.channels; ++c)
      std::fill_n(to + c * channel_ + end, columns_ - end, 0.f);
    if (begin < end)
      turn(x + (first + begin * s_.stride_w) * s_.x_stride, s_.stride_w * s_.x_stride, end - begin,
           to + begin);
  }

  // All channels of `count` pixels, `step` apart, to the planes of the channels.
  void turn(const float* x, int64_t step, int64_t count, float* to) const {
    using Vector = Lanes<float>::Vector;
    constexpr int64_t kCount = Lanes<float>::kCount;
    int64_t i = 0;
    for (; i + kCount <= count; i += kCount) {
      int64_t c = 0;
      for (; c + kCount <= s_.channels; c += kCount) {
        Vector rows[kCount];
        UNROLLED_FOR (int64_t j = 0; j < kCount; ++j)
          rows[j] = load_unaligned(x + (i + j) * step + c);
        transpose<float>(rows);
        UNROLLED_FOR (int64_t j = 0; j < kCount; ++j)
          std::memcpy(to + (c + j) * channel_ + i, &rows[j], sizeof(Vector));
      }
      for (; c < s_.channels; ++c)
        for (int64_t j = 0; j < kCount; ++j) to[c * channel_ + i + j] = x[(i + j) * step + c];
    }
    for (; i < count; ++i)
      for (int64_t c = 0; c < s_.channels; ++c) to[c * channel_ + i] = x[i * step + c];
  }

  const Step& s_;
  bool flat_;
  int64_t reach_h_, reach_w_, phases_h_, phases_w_;
  int64_t rows_ = 0, columns_ = 0, plane_ = 0, channel_ = 0;
  std::vector<int64_t> taps_;
};

}  // namespace spre
