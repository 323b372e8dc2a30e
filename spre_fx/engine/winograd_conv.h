// Dense 3x3 convolution by Winograd's minimal filtering (Lavin and Gray, 1509.09308): a square tile
// of outputs is A^T [(G w G^T) * (B^T x B)] A, with (side + 2)^2 multiplications for side^2 outputs
// of a channel instead of 9 each. Zeros of a pattern do not survive the transform, so this is what
// an N:M conv competes with where it keeps many weights.
//
// A and B interpolate at 0, 1 and -1 for tiles of 2x2; for 4x4 at 0, +-sqrt(1/2) and +-sqrt(2),
// which doubles the rounding error of direct sums where the usual +-1 and +-2 make it fourfold.
#pragma once

#include <algorithm>

#include "dense_conv.h"
#include "epilogue.h"
#include "team.h"
#include "tiling.h"

namespace spre {

// One dimension of the transforms for tiles of a side.
template <int kSide>
struct Winograd;

template <>
struct Winograd<2> {
  SPRE_INLINE void input(const Floats (&x)[4], Floats (&to)[4]) {
    to[0] = sub(x[0], x[2]);
    to[1] = add(x[1], x[2]);
    to[2] = sub(x[2], x[1]);
    to[3] = sub(x[3], x[1]);
  }
  SPRE_INLINE void output(const Floats (&m)[4], Floats (&y)[2]) {
    y[0] = add(m[0], add(m[1], m[2]));
    y[1] = add(m[3], sub(m[1], m[2]));
  }
};

template <>
struct Winograd<4> {
  static constexpr float kSmall = 0.70710678f, kLarge = 1.41421356f;  // sqrt(1/2), sqrt(2)

  SPRE_INLINE void input(const Floats (&x)[6], Floats (&to)[6]) {
    const Floats half = broadcast(-.5f), two = broadcast(-2.f), both = broadcast(-2.5f);
    to[0] = fma(both, x[2], add(x[0], x[4]));
    to[5] = fma(both, x[3], add(x[1], x[5]));
    const Floats even_small = fma(two, x[2], x[4]), even_large = fma(half, x[2], x[4]);
    const Floats odd_small = mul(broadcast(kSmall), fma(two, x[1], x[3]));
    const Floats odd_large = mul(broadcast(kLarge), fma(half, x[1], x[3]));
    to[1] = add(even_small, odd_small);
    to[2] = sub(even_small, odd_small);
    to[3] = add(even_large, odd_large);
    to[4] = sub(even_large, odd_large);
  }
  SPRE_INLINE void output(const Floats (&m)[6], Floats (&y)[4]) {
    const Floats small = add(m[1], m[2]), large = add(m[3], m[4]);
    const Floats odd_small = mul(broadcast(kSmall), sub(m[1], m[2]));
    const Floats odd_large = mul(broadcast(kLarge), sub(m[3], m[4]));
    y[0] = add(m[0], add(small, large));
    y[1] = add(odd_small, odd_large);
    y[2] = fma(broadcast(2.f), large, mul(broadcast(.5f), small));
    y[3] = add(m[5], fma(broadcast(2.f), odd_large, mul(broadcast(.5f), odd_small)));
  }
};

template <int kSide>
struct WinogradConv {
  using Kernels = DenseKernels<Float32Numbers>;
  using Transform = Winograd<kSide>;
  static constexpr int kPoints = kSide + 2;  // of a dimension
  static constexpr int64_t kProducts = kPoints * kPoints;

  explicit WinogradConv(const Step& step)
      : s(step),
        down(ceil_div(step.out_height, kSide)),
        across(ceil_div(step.out_width, kSide)),
        tiles(winograd_tiles(step)),
        blocks(ceil_div(step.out_channels, kLanes)),
        padded(round_up(step.channels, kLanes)) {
    split = std::max<int64_t>(1, std::min(step.split, ceil_div(blocks, Kernels::kMostBlocks)));
    stretches = ceil_div(tiles, std::max<int64_t>(1, step.tile_pixels));
    unit = ceil_div(tiles, std::max<int64_t>(1, stretches));
  }

  int64_t scratch_bytes() const {
    const int64_t numbers = kProducts * unit * (padded + kWidth) + padded;
    return numbers * static_cast<int64_t>(sizeof(float));
  }

  void run(const float* x, const float* weight, const Epilogue<float>& epilogue,
           const Worker& worker) const {
    float* transformed = reinterpret_cast<float*>(worker.scratch);
    float* products = transformed + kProducts * unit * padded;
    float* zero_pixel = products + kProducts * unit * kWidth;
    std::fill(zero_pixel, zero_pixel + padded, 0.f);
    const int64_t block_groups = ceil_div(blocks, Kernels::kMostBlocks);
    int64_t transformed_stretch = -1;
    for (int64_t task = worker.first(stretches * split); task < worker.last(stretches * split);
         ++task) {
      const int64_t stretch = task % stretches, part = task / stretches;
      const int64_t first = tiles * stretch / stretches;
      const int64_t count = tiles * (stretch + 1) / stretches - first;
      if (stretch != transformed_stretch) {
        for (int64_t i = 0; i < count; ++i)
          transform_input(x, first + i, zero_pixel, transformed + i * padded);
        transformed_stretch = stretch;
      }
      const int64_t last = block_groups * (part + 1) / split;
      for (int64_t group = block_groups * part / split; group < last; ++group) {
        const int64_t block = group * Kernels::kMostBlocks;
        const int64_t now = std::min(Kernels::kMostBlocks, blocks - block);
        multiply(transformed, count, block, now, weight, products);
        for (int64_t i = 0; i < count; ++i)
          for (int64_t b = 0; b < now; ++b)
            transform_output(products + i * kWidth + b * kLanes, first + i,
                             epilogue.at(0, (block + b) * kLanes));
      }
    }
  }

 private:
  static constexpr int64_t kWidth = Kernels::kMostBlocks * kLanes;

  struct Corner {
    int64_t image, row, column;
  };

  // Where the outputs of a tile begin.
  Corner corner(int64_t tile) const {
    return {tile / (down * across), tile / across % down * kSide, tile % across * kSide};
  }

  // B^T x B of one tile, for 16 channels at a time.
  void transform_input(const float* x, int64_t tile, const float* zero_pixel, float* to) const {
    const auto [image, row, column] = corner(tile);
    const float* from[kPoints][kPoints];
    for (int i = 0; i < kPoints; ++i)
      for (int j = 0; j < kPoints; ++j) {
        const int64_t h = row - s.padding_h + i, w = column - s.padding_w + j;
        const bool inside = h >= 0 && h < s.height && w >= 0 && w < s.width;
        from[i][j] = inside ? x + ((image * s.height + h) * s.width + w) * s.x_stride : zero_pixel;
      }
    for (int64_t c = 0; c < s.channels; c += kLanes) {
      const int lanes = static_cast<int>(std::min<int64_t>(kLanes, s.channels - c));
      Floats half[kPoints][kPoints];
      ROLLED_FOR (int j = 0; j < kPoints; ++j) {
        Floats in[kPoints], out[kPoints];
        UNROLLED_FOR (int i = 0; i < kPoints; ++i)
          in[i] = lanes == kLanes ? load(from[i][j] + c) : load(from[i][j] + c, lanes);
        Transform::input(in, out);
        UNROLLED_FOR (int i = 0; i < kPoints; ++i) half[i][j] = out[i];
      }
      ROLLED_FOR (int i = 0; i < kPoints; ++i) {
        Floats in[kPoints], out[kPoints];
        UNROLLED_FOR (int j = 0; j < kPoints; ++j) in[j] = half[i][j];
        Transform::input(in, out);
        UNROLLED_FOR (int j = 0; j < kPoints; ++j)
          store(to + (i * kPoints + j) * unit * padded + c, out[j]);
      }
    }
  }

  // For each of the points a matrix product: of tiles and channels with channels and outputs.
  void multiply(const float* x, int64_t count, int64_t block, int64_t now, const float* weight,
                float* products) const {
    DenseTile<float> t = {};
    t.pixel_step = padded;
    t.rows = 1;
    t.row_length = s.channels;
    t.block_stride = kProducts * s.channels * kLanes;
    t.epilogue.y_stride = t.epilogue.outputs = kWidth;
    const int64_t parts = ceil_div(count, Kernels::kMostPixels);
    for (int64_t point = 0; point < kProducts; ++point)
      for (int64_t b = 0; b < now;) {
        const int64_t together = now - b == Kernels::kMostBlocks ? Kernels::kMostBlocks : 1;
        t.weight = weight + ((block + b) * kProducts + point) * s.channels * kLanes;
        for (int64_t i = 0; i < parts; ++i) {
          const int64_t begin = count * i / parts, width = count * (i + 1) / parts - begin;
          t.x = x + (point * unit + begin) * padded;
          t.epilogue.y = products + (point * unit + begin) * kWidth + b * kLanes;
          Kernels::pick(together, width)(t);
        }
        b += together;
      }
  }

  // A^T m A of one tile and 16 outputs, and what follows it.
  void transform_output(const float* m, int64_t tile, const Epilogue<float>& block) const {
    const auto [image, row, column] = corner(tile);
    Floats half[kSide][kPoints];
    ROLLED_FOR (int j = 0; j < kPoints; ++j) {
      Floats in[kPoints], out[kSide];
      UNROLLED_FOR (int i = 0; i < kPoints; ++i)
        in[i] = load(m + (i * kPoints + j) * unit * kWidth);
      Transform::output(in, out);
      UNROLLED_FOR (int i = 0; i < kSide; ++i) half[i][j] = out[i];
    }
    const int64_t height = std::min<int64_t>(kSide, s.out_height - row);
    const int64_t width = std::min<int64_t>(kSide, s.out_width - column);
    ROLLED_FOR (int64_t i = 0; i < height; ++i) {
      Floats in[kPoints], sums[1][kSide];
      UNROLLED_FOR (int j = 0; j < kPoints; ++j) in[j] = half[i][j];
      Transform::output(in, sums[0]);
      const int64_t pixel = (image * s.out_height + row + i) * s.out_width + column;
      if (width == kSide) {
        finish(sums, block.at(pixel, 0));
        continue;
      }
      for (int64_t j = 0; j < width; ++j) {
        Floats sum[1][1] = {{sums[0][j]}};
        finish(sum, block.at(pixel + j, 0));
      }
    }
  }

  const Step& s;
  int64_t down, across, tiles;     // of outputs
  int64_t blocks, padded;          // of outputs, channels
  int64_t stretches, unit, split;  // runs of tiles transformed at once, the longest, and see Step
};

}  // namespace spre
