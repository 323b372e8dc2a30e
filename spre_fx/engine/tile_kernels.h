// What is computed of a tile of outputs while it stays in registers.
#pragma once

#include "image_lanes.h"
#include "types.h"

namespace spre {

// As many vectors as registers hold, beside a few to work with.
inline constexpr int64_t kMostTileColumns = 12;
inline constexpr int64_t kMostPairedColumns = 6;  // of a tile of two rows

// Neighbouring outputs that are computed together.
struct TileShape {
  int64_t rows, columns;

  TileShape(int64_t height, int64_t width)
      : columns(ceil_div(width, ceil_div(width, kMostTileColumns))) {
    rows = columns <= kMostPairedColumns && height > 1 ? 2 : 1;
  }
};

// A run of rows of entries, and what they read.
template <class Number>
struct EntryRows {
  const int32_t* start;
  const int32_t* offset;
  const Number* value;
  int64_t count;
};

// The outputs of a tile, in lanes, and the strides between them.
template <class Number>
struct Tile {
  Number* first;
  int64_t of_column, of_row, of_filter;
};

template <class Number, int kRows, int kColumns>
struct TileKernel {
  using Vector = typename Lanes<Number>::Vector;
  static constexpr int64_t kCount = Lanes<Number>::kCount;

  // y = bias, or y, plus the sums of entries times what they read at x.
  static void sum(const EntryRows<Number>& rows, const Number* x, int64_t x_row, Tile<Number> y,
                  bool first, const Number* bias) {
    const Number* from[kRows];
    UNROLLED_FOR (int r = 0; r < kRows; ++r) from[r] = x + r * x_row;
    for (int64_t o = 0; o < rows.count; ++o) {
      Number* tile = y.first + o * y.of_filter;
      Vector sums[kRows][kColumns];
      const Vector start = (first && bias != nullptr ? bias[o] : Number(0)) - Vector{};
      UNROLLED_FOR (int r = 0; r < kRows; ++r)
        UNROLLED_FOR (int c = 0; c < kColumns; ++c)
          sums[r][c] =
              first ? start
                    : *reinterpret_cast<const Vector*>(tile + r * y.of_row + c * y.of_column);
      ROLLED_FOR (int32_t e = rows.start[o]; e < rows.start[o + 1]; ++e) {
        const int64_t offset = rows.offset[e];
        const Vector value = rows.value[e] - Vector{};  // which rounds nothing: a broadcast
        UNROLLED_FOR (int r = 0; r < kRows; ++r)
          UNROLLED_FOR (int c = 0; c < kColumns; ++c)
            sums[r][c] += value * *reinterpret_cast<const Vector*>(from[r] + offset + c * kCount);
      }
      UNROLLED_FOR (int r = 0; r < kRows; ++r)
        UNROLLED_FOR (int c = 0; c < kColumns; ++c)
          *reinterpret_cast<Vector*>(tile + r * y.of_row + c * y.of_column) = sums[r][c];
    }
  }

  // Adds to the gradient of each entry the products of the gradient of y and what it reads at x.
  static void products(const EntryRows<Number>& rows, const Number* x, int64_t x_row,
                       Tile<const Number> dy, Number* gradient) {
    const Number* from[kRows];
    UNROLLED_FOR (int r = 0; r < kRows; ++r) from[r] = x + r * x_row;
    Vector pending[kCount];
    int64_t held = 0;
    for (int64_t o = 0; o < rows.count; ++o) {
      const Number* tile = dy.first + o * dy.of_filter;
      Vector of_y[kRows][kColumns];
      UNROLLED_FOR (int r = 0; r < kRows; ++r)
        UNROLLED_FOR (int c = 0; c < kColumns; ++c)
          of_y[r][c] = *reinterpret_cast<const Vector*>(tile + r * dy.of_row + c * dy.of_column);
      ROLLED_FOR (int32_t e = rows.start[o]; e < rows.start[o + 1]; ++e) {
        const int64_t offset = rows.offset[e];
        Vector sum = {};
        UNROLLED_FOR (int r = 0; r < kRows; ++r)
          UNROLLED_FOR (int c = 0; c < kColumns; ++c)
            sum += of_y[r][c] * *reinterpret_cast<const Vector*>(from[r] + offset + c * kCount);
        pending[held] = sum;
        if (++held == kCount) {
          add_sums(pending, gradient + e + 1 - kCount);
          held = 0;
        }
      }
    }
    const int32_t end = rows.start[rows.count];
    for (int64_t i = 0; i < held; ++i)
      for (int64_t lane = 0; lane < kCount; ++lane) gradient[end - held + i] += pending[i][lane];
  }

  SPRE_INLINE void add_sums(const Vector (&pending)[kCount], Number* to) {
    Vector sums[kCount];
    UNROLLED_FOR (int i = 0; i < kCount; ++i) sums[i] = pending[i];
    const Vector added = load_unaligned(to) + sums_of_rows<Number>(sums);
    std::memcpy(to, &added, sizeof(added));
  }
};

// The kernels for tiles of a shape.
template <class Number>
struct TileKernels {
  decltype(&TileKernel<Number, 1, 1>::sum) sum;
  decltype(&TileKernel<Number, 1, 1>::products) products;
};

template <class Number, int kRows = 1, int kColumns = 1>
TileKernels<Number> kernels_of(int64_t rows, int64_t columns) {
  constexpr int kMost = kRows == 1 ? kMostTileColumns : kMostPairedColumns;
  if constexpr (kRows == 1 && kColumns == 1)
    if (rows == 2) return kernels_of<Number, 2, 1>(rows, columns);
  if constexpr (kColumns < kMost)
    if (columns > kColumns) return kernels_of<Number, kRows, kColumns + 1>(rows, columns);
  using Kernel = TileKernel<Number, kRows, kColumns>;
  return {&Kernel::sum, &Kernel::products};
}

}  // namespace spre
