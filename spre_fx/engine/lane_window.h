// What a tile of outputs reads, brought close together.
#pragma once

#include <algorithm>

#include "image_lanes.h"
#include "tile_kernels.h"
#include "types.h"

namespace spre {

// What a tile reads of each channel, copied from lanes to memory of its own: rows of vectors that
// lie far apart there would push each other out of the cache.
//
// A window is a part of each row that is read; where the taps lie apart, a part for each tap.
class Window {
 public:
  struct Tap {
    int64_t row, column;  // in lanes, from where the first tap of the first output reads
  };

  // `reach` is the farthest tap, `step` goes from one row of outputs to the next.
  Window(TileShape tile, Tap reach, int64_t step, int64_t kernel_h, int64_t kernel_w, bool apart,
         const LaneRow& lanes)
      : tile_(tile),
        step_(step),
        apart_(apart),
        taps_(kernel_h * kernel_w),
        phases_(std::min(lanes.phases, reach.column + 1)),
        rows_((tile.rows - 1) * step + reach.row + 1),
        columns_(tile.columns + reach.column / lanes.phases),
        lanes_(lanes) {}

  // Vectors of a channel, and from one row of outputs to the next.
  int64_t of_channel() const {
    return apart_ ? taps_ * tile_.rows * tile_.columns : rows_ * phases_ * columns_;
  }
  int64_t of_row() const { return apart_ ? tile_.columns : step_ * phases_ * columns_; }

  // Where the first output of a tile reads for a tap, in vectors.
  int64_t place(int64_t tap, Tap at) const {
    if (apart_) return tap * tile_.rows * tile_.columns;
    return (at.row * phases_ + at.column % lanes_.phases) * columns_ + at.column / lanes_.phases;
  }

  // Copies the windows of some channels, of which there are `rows` rows in lanes from `from` on.
  // `tap(i)` is the i-th tap.
  template <class Number, class TapOf>
  void copy(const Number* from, int64_t rows, int64_t channels, TapOf tap, Number* to) const {
    constexpr int64_t kCount = Lanes<Number>::kCount;
    const auto piece = [&](int64_t row, int64_t place, int64_t count, Number* piece) {
      if (row >= rows) return;
      const Number* vectors = from + (row * lanes_.vectors() + place) * kCount;
      for (int64_t i = 0; i < count * kCount; ++i) piece[i] = vectors[i];
    };
    for (int64_t c = 0; c < channels; ++c, from += lanes_.of_channel * kCount) {
      if (apart_)
        for (int64_t i = 0; i < taps_; ++i)
          for (int64_t r = 0; r < tile_.rows; ++r, to += tile_.columns * kCount)
            piece(tap(i).row + r * step_, lanes_.place(tap(i).column), tile_.columns, to);
      else
        for (int64_t r = 0; r < rows_; ++r)
          for (int64_t phase = 0; phase < phases_; ++phase, to += columns_ * kCount)
            piece(r, phase * lanes_.columns, columns_, to);
    }
  }

 private:
  TileShape tile_;
  int64_t step_;
  bool apart_;
  int64_t taps_, phases_, rows_, columns_;
  LaneRow lanes_;
};

}  // namespace spre
