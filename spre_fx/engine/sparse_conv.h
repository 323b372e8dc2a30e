// N:M sparse convolution. 16 channels of one pixel stand in one register; a permute picks for each
// of 16 outputs the channel that its non-zero multiplies, and one multiply-add takes it in. So a
// group of channels costs `slots` permutes and multiply-adds for 16 outputs: 16 * N / M of them.
#pragma once

#include <algorithm>
#include <utility>

#include "epilogue.h"
#include "input_tile.h"
#include "team.h"

namespace spre {

// What a kernel needs to compute `Blocks` x 16 outputs at `Pixels` pixels.
template <class X>
struct SparseTile {
  const X* x;            // first pixel, first channel group, first tap
  int64_t pixel_stride;  // of x, where it is not packed
  int64_t group_stride;  // from channel group to channel group
  int64_t channel_groups;
  const int64_t* tap_offsets;
  int64_t taps;
  int64_t slots;
  const char* weight;
  int64_t block_stride;  // bytes from one block of 16 outputs to the next
  const char* ahead;     // weights to fetch into the cache meanwhile, a line per slot
  Epilogue<X> epilogue;
};

template <class Traits>
using SparseKernel = void (*)(const SparseTile<typename Traits::Element>&);

// `Direct`: x is read where it lies. `Ahead`: the next weights are fetched meanwhile.
template <class Traits, int Blocks, int Pixels, bool Direct, bool Ahead>
__attribute__((noinline)) void sparse_kernel(const SparseTile<typename Traits::Element>& tile) {
  using X = typename Traits::Element;
  constexpr int64_t kPair = 2 * kCacheLine;  // a vector of weights and one of indices
  // Where weights and indices of all blocks fit in registers beside the sums, x is read once.
  // Parts of a channel group are read again for each slot: kept, they would take their room.
  constexpr bool kReadOnce =
      Traits::kSections == 1 && Blocks * Pixels + 2 * Blocks + 2 <= kRegisters;
  Floats sums[Blocks][Pixels];
  UNROLLED_FOR (int b = 0; b < Blocks; ++b)
    UNROLLED_FOR (int p = 0; p < Pixels; ++p) sums[b][p] = zeros();

  const int64_t pixel = Direct ? tile.pixel_stride : Traits::kGroup;
  const int64_t taps = Direct ? 1 : tile.taps, slots = tile.slots;
  const char* weight = tile.weight;
  [[maybe_unused]] const char* ahead = tile.ahead;
  const X* group = tile.x;
  for (int64_t g = 0; g < tile.channel_groups; ++g, group += tile.group_stride) {
    ROLLED_FOR (int64_t t = 0; t < taps; ++t) {
      const X* x = Direct ? group : group + tile.tap_offsets[t];
      ROLLED_FOR (int64_t s = 0; s < slots; ++s, weight += kPair) {
        if constexpr (Ahead) {
          __builtin_prefetch(ahead, 0, 2);
          ahead += kCacheLine;
        }
        if constexpr (kReadOnce) {
          typename Traits::Weights weights[Blocks];
          typename Traits::Index index[Blocks];
          UNROLLED_FOR (int b = 0; b < Blocks; ++b) {
            weights[b] = Traits::weights(weight + b * tile.block_stride);
            index[b] = Traits::index(weight + b * tile.block_stride);
          }
          UNROLLED_FOR (int p = 0; p < Pixels; ++p) {
            const auto input = Traits::input(x + p * pixel);
            UNROLLED_FOR (int b = 0; b < Blocks; ++b)
              sums[b][p] = Traits::dot(sums[b][p], input, index[b], weights[b]);
          }
        } else {
          UNROLLED_FOR (int b = 0; b < Blocks; ++b) {
            auto weights = Traits::weights(weight + b * tile.block_stride);
            auto index = Traits::index(weight + b * tile.block_stride);
            UNROLLED_FOR (int p = 0; p < Pixels; ++p)
              sums[b][p] = Traits::dot(sums[b][p], Traits::input(x + p * pixel), index, weights);
            asm volatile("" ::: "memory");  // read x again for the next block: no register is free
          }
        }
      }
    }
  }
  finish(sums, tile.epilogue);
}

// The kernels of one element type by blocks and pixels. More sums than these spill.
template <class Traits>
struct SparseKernels {
  static constexpr bool exists(int64_t blocks, int64_t pixels) {
    return blocks >= 1 && pixels >= 1 && blocks <= kMaxBlocks && pixels <= kMaxPixels &&
           blocks * pixels <= kMaxSums && blocks != 3;
  }

  static SparseKernel<Traits> pick(int64_t blocks, int64_t pixels, bool direct, bool ahead) {
    if (direct)
      return ahead ? pick_blocks<true, true>(blocks, pixels)
                   : pick_blocks<true, false>(blocks, pixels);
    return ahead ? pick_blocks<false, true>(blocks, pixels)
                 : pick_blocks<false, false>(blocks, pixels);
  }

 private:
  template <bool Direct, bool Ahead>
  static SparseKernel<Traits> pick_blocks(int64_t blocks, int64_t pixels) {
    switch (blocks) {
      case 1:
        return pick_pixels<Direct, Ahead, 1>(pixels, std::make_integer_sequence<int, kMaxPixels>());
      case 2:
        return pick_pixels<Direct, Ahead, 2>(pixels, std::make_integer_sequence<int, kMaxPixels>());
      default:
        return pick_pixels<Direct, Ahead, 4>(pixels, std::make_integer_sequence<int, kMaxPixels>());
    }
  }

  template <bool Direct, bool Ahead, int Blocks, int... PixelsLessOne>
  static SparseKernel<Traits> pick_pixels(int64_t pixels,
                                          std::integer_sequence<int, PixelsLessOne...>) {
    static constexpr SparseKernel<Traits> kTable[] = {
        entry<Direct, Ahead, Blocks, PixelsLessOne + 1>()...};
    return kTable[pixels - 1];
  }

  template <bool Direct, bool Ahead, int Blocks, int Pixels>
  static constexpr SparseKernel<Traits> entry() {
    if constexpr (exists(Blocks, Pixels)) {
      return sparse_kernel<Traits, Blocks, Pixels, Direct, Ahead>;
    } else {
      return nullptr;
    }
  }
};

// The plan of one sparse conv: how its pixels are cut into tiles.
template <class Traits>
struct SparseConv {
  using X = typename Traits::Element;

  explicit SparseConv(const Step& step)
      : s(step),
        input(step, Traits::kGroup, Traits::kSections),
        flat(is_flat(step)),
        group_outputs(step.out_channels / step.groups),
        blocks(ceil_div(group_outputs, kLanes)),
        channel_groups(ceil_div(step.channels / step.groups, Traits::kGroup)),
        block_bytes(channel_groups * step.kernel_h * step.kernel_w * step.slots * 2 * kCacheLine),
        rows(step, step.tile_rows) {
    tile_blocks = std::max<int64_t>(1, std::min(step.tile_blocks, blocks));
    tile_pixels = std::max<int64_t>(1, step.tile_pixels);
    split = std::max<int64_t>(1, std::min(step.split, ceil_div(blocks, tile_blocks)));
    if (flat) {  // a 1x1 conv knows no rows: tiles are stretches of all pixels of the batch
      pixels = s.batch * s.out_height * s.out_width;
      unit = round_up(std::max<int64_t>(1, step.tile_rows) * s.out_width, tile_pixels);
      unit = std::max<int64_t>(1, std::min(unit, pixels));
      tiles = ceil_div(pixels, unit);
      input.set_flat(unit);
    } else {
      tiles = rows.size();
      input.set_rows(rows.unit());
    }
  }

  int64_t scratch_bytes() const { return s.direct ? 0 : input.bytes(sizeof(X)); }

  void run(const X* x, const char* weight, const Epilogue<X>& epilogue,
           const Worker& worker) const {
    int64_t packed = -1;
    const int64_t tasks = tiles * split;
    for (int64_t task = worker.first(tasks); task < worker.last(tasks); ++task) {
      const int64_t tile = task % tiles, part = task / tiles;
      X* scratch = reinterpret_cast<X*>(worker.scratch);
      if (!s.direct && tile != packed) {
        pack(x, tile, scratch);
        packed = tile;
      }
      for (int64_t g = 0; g < s.groups; ++g)
        run_group(g, tile, part, x, scratch, weight + g * blocks * block_bytes,
                  epilogue.of_group(g, group_outputs));
    }
  }

 private:
  void pack(const X* x, int64_t tile, X* scratch) const {
    if (flat) {
      const int64_t from = tile * unit;
      input.pack_pixels(x + from * s.x_stride, std::min(unit, pixels - from), scratch);
    } else {
      const auto [image, row, count] = rows[tile];
      input.pack_rows(x + image * s.height * s.width * s.x_stride, row, count, scratch);
    }
  }

  // One group of channels at one tile: all of `part` of the outputs.
  void run_group(int64_t g, int64_t tile, int64_t part, const X* x, const X* scratch,
                 const char* weight, const Epilogue<X>& group) const {
    const int64_t block_tiles = ceil_div(blocks, tile_blocks);
    const int64_t first = block_tiles * part / split, last = block_tiles * (part + 1) / split;
    SparseTile<X> t;
    t.pixel_stride = s.x_stride * s.stride_w;
    t.slots = s.slots / Traits::kSections;
    if (s.direct) {
      t.group_stride = Traits::kGroup / Traits::kSections;
      t.channel_groups = s.channels / s.groups / t.group_stride;
      t.tap_offsets = nullptr;
      t.taps = 1;
    } else {
      t.group_stride = input.group_stride();
      t.channel_groups = channel_groups;
      t.tap_offsets = input.tap_offsets();
      t.taps = s.kernel_h * s.kernel_w * Traits::kSections;
    }
    t.block_stride = block_bytes;
    const X* base = s.direct ? x + g * (s.channels / s.groups)
                             : scratch + g * channel_groups * input.group_stride();
    for (int64_t bt = first; bt < last; ++bt) {
      const int64_t block = bt * tile_blocks;
      const int64_t count = std::min(tile_blocks, blocks - block);
      // What is left of an odd number of blocks goes through the smaller kernels.
      for (int64_t done = 0; done < count;) {
        const int64_t left = std::min<int64_t>(count - done, kMaxBlocks);
        const int64_t now = left >= 4 ? 4 : left >= 2 ? 2 : 1;
        const int64_t here = block + done;
        t.weight = weight + here * block_bytes;
        t.ahead = t.weight + now * block_bytes;
        run_blocks(now, t, tile, base, group.at(0, here * kLanes));
        done += now;
      }
    }
  }

  void run_blocks(int64_t count, SparseTile<X>& t, int64_t tile, const X* base,
                  const Epilogue<X>& of_blocks) const {
    if (flat) {
      const int64_t from = tile * unit, length = std::min(unit, pixels - from);
      const X* x = s.direct ? base + from * s.x_stride : base;
      run_stretch(count, t, x, s.direct ? s.x_stride : Traits::kGroup, length,
                  of_blocks.at(from, 0));
      return;
    }
    const auto [image, row, many] = rows[tile];
    for (int64_t r = 0; r < many; ++r) {
      const X* x = s.direct
                       ? base + ((image * s.height + (row + r) * s.stride_h) * s.width) * s.x_stride
                       : base + r * s.stride_h * input.row_stride();
      const int64_t from = (image * s.out_height + row + r) * s.out_width;
      run_stretch(count, t, x, s.direct ? s.x_stride * s.stride_w : Traits::kGroup, s.out_width,
                  of_blocks.at(from, 0));
    }
  }

  // Consecutive output pixels, in tiles of nearly equal size.
  void run_stretch(int64_t count, SparseTile<X>& t, const X* x, int64_t x_step, int64_t length,
                   const Epilogue<X>& stretch) const {
    const int64_t most = std::min({tile_pixels, int64_t{kMaxPixels}, kMaxSums / count});
    const int64_t parts = ceil_div(length, most);
    for (int64_t i = 0; i < parts; ++i) {
      const int64_t begin = length * i / parts, width = length * (i + 1) / parts - begin;
      t.x = x + begin * x_step;
      t.epilogue = stretch.at(begin, 0);
      // The next blocks' weights come in while these are used: they may lie beyond L2.
      const char* end = t.weight + 2 * count * block_bytes;
      SparseKernels<Traits>::pick(count, width, s.direct, t.ahead < end)(t);
      t.ahead += block_bytes / 2;
    }
  }

  const Step& s;
  InputTile<X> input;
  bool flat;
  int64_t group_outputs, blocks, channel_groups, block_bytes;
  int64_t tile_blocks, tile_pixels, split;
  RowTiles rows;
  int64_t pixels = 0, unit = 0;  // of a flat conv
  int64_t tiles;
};

}  // namespace spre
