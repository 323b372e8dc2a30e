// Dense convolution, without groups and dilation: the stem of a network, which has too few channels
// for a pattern, and layers that are left dense. A row of the kernel is kernel_w * channels
// consecutive numbers of the image; each of them is broadcast and multiplied with the weights of 16
// outputs.
#pragma once

#include <algorithm>
#include <utility>

#include "epilogue.h"
#include "team.h"

namespace spre {

// One number at a time, whatever vectors there are.
struct Float32Numbers {
  using Element = float;
  using Weights = Floats;
  static constexpr int64_t kNumbers = 1;
  SPRE_INLINE Weights weights(const float* p) { return load(p); }
  SPRE_INLINE Floats dot(Floats sum, const float* x, Weights w) {
    return fma(broadcast(*x), w, sum);
  }
  SPRE_INLINE Floats dot_rest(Floats sum, const float*, Weights) { return sum; }
};

template <class X>
struct DenseTile {
  const X* x;          // packed: the first pixel
  int64_t pixel_step;  // stride_w * channels
  int64_t row_stride;
  int64_t rows, row_length;  // of the kernel: kernel_h and kernel_w * channels
  const X* weight;
  int64_t block_stride;
  Epilogue<X> epilogue;
};

template <class Numbers>
using DenseKernel = void (*)(const DenseTile<typename Numbers::Element>&);

template <class Numbers, int Blocks, int Pixels>
__attribute__((noinline)) void dense_kernel(const DenseTile<typename Numbers::Element>& tile) {
  using X = typename Numbers::Element;
  constexpr int64_t kOnce = Numbers::kNumbers;
  Floats sums[Blocks][Pixels];
  UNROLLED_FOR (int b = 0; b < Blocks; ++b)
    UNROLLED_FOR (int p = 0; p < Pixels; ++p) sums[b][p] = zeros();
  const X* weight = tile.weight;
  const int64_t step = tile.pixel_step;
  for (int64_t u = 0; u < tile.rows; ++u) {
    const X* x = tile.x + u * tile.row_stride;
    ROLLED_FOR (int64_t k = kOnce; k <= tile.row_length; k += kOnce) {
      typename Numbers::Weights weights[Blocks];
      UNROLLED_FOR (int b = 0; b < Blocks; ++b)
        weights[b] = Numbers::weights(weight + b * tile.block_stride);
      UNROLLED_FOR (int p = 0; p < Pixels; ++p)
        UNROLLED_FOR (int b = 0; b < Blocks; ++b)
          sums[b][p] = Numbers::dot(sums[b][p], x + p * step, weights[b]);
      x += kOnce;
      weight += kOnce * kLanes;
    }
    if (tile.row_length % kOnce != 0) {
      UNROLLED_FOR (int b = 0; b < Blocks; ++b) {
        const auto weights = Numbers::weights(weight + b * tile.block_stride);
        UNROLLED_FOR (int p = 0; p < Pixels; ++p)
          sums[b][p] = Numbers::dot_rest(sums[b][p], x + p * step, weights);
      }
      weight += kOnce * kLanes;
    }
  }
  finish(sums, tile.epilogue);
}

// The kernels there are: as many sums as stay in registers.
template <class Numbers>
struct DenseKernels {
  static constexpr int64_t kMostBlocks = kRegisters >= 32 ? 4 : 1;
  static constexpr int64_t kMostPixels = kRegisters >= 8 ? 6 : 4;

  // For one block of outputs, or the most.
  static DenseKernel<Numbers> pick(int64_t blocks, int64_t pixels) {
    const auto all = std::make_integer_sequence<int, kMostPixels>();
    return blocks == 1 ? pick_pixels<1>(pixels, all) : pick_pixels<kMostBlocks>(pixels, all);
  }

 private:
  template <int Blocks, int... PixelsLessOne>
  static DenseKernel<Numbers> pick_pixels(int64_t pixels,
                                          std::integer_sequence<int, PixelsLessOne...>) {
    static constexpr DenseKernel<Numbers> kTable[] = {
        dense_kernel<Numbers, Blocks, PixelsLessOne + 1>...};
    return kTable[pixels - 1];
  }
};

template <class Numbers>
struct DenseConv {
  using X = typename Numbers::Element;
  using Kernels = DenseKernels<Numbers>;

  explicit DenseConv(const Step& step)
      : s(step),
        blocks(ceil_div(step.out_channels, kLanes)),
        block_size(step.kernel_h * round_up(step.kernel_w * step.channels, Numbers::kNumbers) *
                   kLanes),
        columns((step.out_width - 1) * step.stride_w + step.kernel_w),
        rows(step, step.tile_rows),
        row_stride(columns * step.channels) {}

  int64_t scratch_bytes() const {
    const int64_t packed_rows = (rows.unit() - 1) * s.stride_h + s.kernel_h;
    return packed_rows * row_stride * static_cast<int64_t>(sizeof(X));
  }

  void run(const X* x, const X* weight, const Epilogue<X>& epilogue, const Worker& worker) const {
    X* packed = reinterpret_cast<X*>(worker.scratch);
    for (int64_t tile = worker.first(rows.size()); tile < worker.last(rows.size()); ++tile) {
      const auto [image, row, count] = rows[tile];
      pack(x + image * s.height * s.width * s.x_stride, row, count, packed);
      for (int64_t block = 0; block < blocks;) {
        const int64_t now = blocks - block >= Kernels::kMostBlocks ? Kernels::kMostBlocks : 1;
        for (int64_t r = 0; r < count; ++r) {
          const int64_t pixel = (image * s.out_height + row + r) * s.out_width;
          run_row(now, packed + r * s.stride_h * row_stride, weight + block * block_size,
                  epilogue.at(pixel, block * kLanes));
        }
        block += now;
      }
    }
  }

 private:
  void pack(const X* x, int64_t row, int64_t count, X* to) const {
    const int64_t many = (count - 1) * s.stride_h + s.kernel_h;
    for (int64_t i = 0; i < many; ++i, to += row_stride) {
      const int64_t from = row * s.stride_h - s.padding_h + i;
      if (from < 0 || from >= s.height) {
        std::memset(to, 0, row_stride * sizeof(X));
        continue;
      }
      const X* line = x + from * s.width * s.x_stride;
      for (int64_t j = 0; j < columns; ++j) {
        const int64_t column = j - s.padding_w;
        const bool inside = column >= 0 && column < s.width;
        for (int64_t c = 0; c < s.channels; ++c)
          to[j * s.channels + c] = inside ? line[column * s.x_stride + c] : X{};
      }
    }
  }

  // A row of the outputs of `count` blocks.
  void run_row(int64_t count, const X* x, const X* weight, const Epilogue<X>& row) const {
    DenseTile<X> t;
    t.pixel_step = s.stride_w * s.channels;
    t.row_stride = row_stride;
    t.rows = s.kernel_h;
    t.row_length = s.kernel_w * s.channels;
    t.weight = weight;
    t.block_stride = block_size;
    const int64_t parts = ceil_div(s.out_width, Kernels::kMostPixels);
    for (int64_t i = 0; i < parts; ++i) {
      const int64_t begin = s.out_width * i / parts, width = s.out_width * (i + 1) / parts - begin;
      t.x = x + begin * t.pixel_step;
      t.epilogue = row.at(begin, 0);
      Kernels::pick(count, width)(t);
    }
  }

  const Step& s;
  int64_t blocks, block_size, columns;
  RowTiles rows;
  int64_t row_stride;
};

}  // namespace spre
