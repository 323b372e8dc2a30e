// The part of the input that a tile of outputs reads, packed as [channel group][row][column][lane].
//
// Padding, strides, dilation and left-over channels are dealt with while packing, so that each tap
// of the kernel is one constant offset and neighbouring outputs read neighbouring vectors: with a
// stride, the columns of a row are sorted by their remainder, and only those some tap reads are
// copied.
#pragma once

#include <algorithm>
#include <vector>

#include "types.h"

namespace spre {

template <class X>
class InputTile {
 public:
  InputTile(const Step& step, int64_t lanes)
      : s_(step), lanes_(lanes), groups_(ceil_div(step.channels / step.groups, lanes)) {}

  // A tile of `count` pixels in a row, of a 1x1 conv.
  void set_flat(int64_t count) {
    row_stride_ = count * lanes_;
    group_stride_ = apart(row_stride_);
    offsets_.assign(1, 0);
  }

  // A tile of `rows` output rows.
  void set_rows(int64_t rows) {
    rows_ = (rows - 1) * s_.stride_h + (s_.kernel_h - 1) * s_.dilation_h + 1;
    columns_ = (s_.out_width - 1) * s_.stride_w + (s_.kernel_w - 1) * s_.dilation_w + 1;
    phase_ = ceil_div(columns_, s_.stride_w);
    row_stride_ = phase_ * s_.stride_w * lanes_;
    group_stride_ = apart(rows_ * row_stride_);
    row_used_.assign(s_.stride_h, 0);
    column_used_.assign(s_.stride_w, 0);
    offsets_.clear();
    for (int64_t u = 0; u < s_.kernel_h; ++u) {
      row_used_[u * s_.dilation_h % s_.stride_h] = 1;
      for (int64_t v = 0; v < s_.kernel_w; ++v) {
        column_used_[v * s_.dilation_w % s_.stride_w] = 1;
        offsets_.push_back(u * s_.dilation_h * row_stride_ + place(v * s_.dilation_w));
      }
    }
  }

  int64_t bytes(int64_t element) const { return s_.groups * groups_ * group_stride_ * element; }
  int64_t row_stride() const { return row_stride_; }
  int64_t group_stride() const { return group_stride_; }
  const int64_t* tap_offsets() const { return offsets_.data(); }

  void pack_pixels(const X* x, int64_t count, X* to) const {
    for (int64_t p = 0; p < count; ++p) pack_pixel(x + p * s_.x_stride, to + p * lanes_);
  }

  // The input rows under output rows [row, row + count) of the image at `x`.
  void pack_rows(const X* x, int64_t row, int64_t count, X* to) const {
    const int64_t rows = (count - 1) * s_.stride_h + (s_.kernel_h - 1) * s_.dilation_h + 1;
    for (int64_t i = 0; i < rows; ++i) {
      if (!row_used_[i % s_.stride_h]) continue;
      const int64_t from = row * s_.stride_h - s_.padding_h + i;
      const bool inside = from >= 0 && from < s_.height;
      pack_row(inside ? x + from * s_.width * s_.x_stride : nullptr, to + i * row_stride_);
    }
  }

 private:
  // One row of the image, or zeros.
  void pack_row(const X* x, X* to) const {
    for (int64_t phase = 0; phase < s_.stride_w; ++phase) {
      if (!column_used_[phase]) continue;
      X* pixel = to + phase * phase_ * lanes_;
      for (int64_t j = phase; j < columns_; j += s_.stride_w, pixel += lanes_) {
        const int64_t from = j - s_.padding_w;
        if (x != nullptr && from >= 0 && from < s_.width) {
          pack_pixel(x + from * s_.x_stride, pixel);
        } else {
          for (int64_t g = 0; g < s_.groups * groups_; ++g)
            std::memset(pixel + g * group_stride_, 0, lanes_ * sizeof(X));
        }
      }
    }
  }

  void pack_pixel(const X* x, X* to) const {
    const int64_t channels = s_.channels / s_.groups;
    for (int64_t g = 0; g < s_.groups; ++g, x += channels) {
      int64_t c = 0;
      for (; c + lanes_ <= channels; c += lanes_, to += group_stride_) copy_group(to, x + c);
      if (c < channels) {
        std::memset(to, 0, lanes_ * sizeof(X));
        std::memcpy(to, x + c, (channels - c) * sizeof(X));
        to += group_stride_;
      }
    }
  }

  // One group of channels: 64 bytes, or twice as many.
  void copy_group(X* to, const X* from) const {
    struct Line {
      char bytes[kCacheLine];
    };
    std::memcpy(to, from, sizeof(Line));
    if (lanes_ * static_cast<int64_t>(sizeof(X)) > kCacheLine)
      std::memcpy(to + kCacheLine / sizeof(X), from + kCacheLine / sizeof(X), sizeof(Line));
  }

  int64_t place(int64_t column) const {
    return (column % s_.stride_w * phase_ + column / s_.stride_w) * lanes_;
  }

  // An odd number of cache lines, so that channel groups do not fall on the same sets of a cache.
  static int64_t apart(int64_t elements) {
    const int64_t line = kCacheLine / static_cast<int64_t>(sizeof(X));
    return (ceil_div(elements, line) | 1) * line;
  }

  const Step& s_;
  int64_t lanes_, groups_;
  int64_t rows_ = 0, columns_ = 0, phase_ = 0, row_stride_ = 0, group_stride_ = 0;
  std::vector<int64_t> offsets_;
  std::vector<char> row_used_, column_used_;
};

}  // namespace spre
