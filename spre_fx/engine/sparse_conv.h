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

// What a kernel needs to compute `Blocks` x 16 outputs at `Pixels` pixels, in as many tiles as
// there are of these side by side.
template <class X>
struct SparseTiles {
  int64_t count;
  const X* x;            // first pixel, first channel group, first tap
  int64_t pixel_stride;  // of x
  int64_t group_stride;  // from channel group to channel group
  int64_t channel_groups;
  const int64_t* tap_offsets;
  int64_t taps;
  int64_t slots;
  const char* weight;
  int64_t block_stride;  // bytes from one block of 16 outputs to the next
  int64_t pass_bytes;    // of a block, for these channel groups
  const char* ahead;     // weights to fetch into the cache meanwhile, a line per slot of a tile
  float* sums;           // of the passes before, and then with this one
  bool first, last;      // of the passes: the epilogue follows the last
  Epilogue<X> epilogue;
};

template <class Traits>
using SparseKernel = void (*)(const SparseTiles<typename Traits::Element>&);

// What one slot of a channel group at a tap adds to the sums of a tile. `Ahead`: a line of the next
// weights is fetched meanwhile.
template <class Traits, bool Ahead, int Blocks, int Pixels>
SPRE_INLINE void add_slot(Floats (&sums)[Blocks][Pixels], const typename Traits::Element* x,
                          int64_t pixel, const char* weight, int64_t block_stride,
                          [[maybe_unused]] const char* ahead) {
  if constexpr (Ahead) __builtin_prefetch(ahead, 0, 2);
  // Where weights and indices of all blocks fit in registers beside the sums, x is read once.
  // Parts of a channel group are read again for each slot: kept, they would take their room.
  constexpr bool kReadOnce =
      Traits::kSections == 1 && Blocks * Pixels + 2 * Blocks + 2 <= kRegisters;
  if constexpr (kReadOnce) {
    typename Traits::Weights weights[Blocks];
    typename Traits::Index index[Blocks];
    UNROLLED_FOR (int b = 0; b < Blocks; ++b) {
      weights[b] = Traits::weights(weight + b * block_stride);
      index[b] = Traits::index(weight + b * block_stride);
    }
    UNROLLED_FOR (int p = 0; p < Pixels; ++p) {
      const auto input = Traits::input(x + p * pixel);
      UNROLLED_FOR (int b = 0; b < Blocks; ++b)
        sums[b][p] = Traits::dot(sums[b][p], input, index[b], weights[b]);
    }
  } else {
    UNROLLED_FOR (int b = 0; b < Blocks; ++b) {
      auto weights = Traits::weights(weight + b * block_stride);
      auto index = Traits::index(weight + b * block_stride);
      UNROLLED_FOR (int p = 0; p < Pixels; ++p)
        sums[b][p] = Traits::dot(sums[b][p], Traits::input(x + p * pixel), index, weights);
      asm volatile("" ::: "memory");  // read x again for the next block: no register is free
    }
  }
}

// `Slots`: how many there are, 0 for any number. `Direct`: x is read where it lies.
template <class Traits, int Blocks, int Pixels, int Slots, bool Direct, bool Ahead>
SPRE_NOINLINE void sparse_kernel(const SparseTiles<typename Traits::Element>& tiles) {
  using X = typename Traits::Element;
  constexpr int64_t kPair = 2 * kCacheLine;  // a vector of weights and one of indices
  const int64_t pixel = Direct ? tiles.pixel_stride : Traits::kGroup;
  const int64_t taps = Direct ? 1 : tiles.taps, slots = Slots > 0 ? Slots : tiles.slots;
  const int64_t channel_groups = tiles.channel_groups, group_stride = tiles.group_stride;
  const char* ahead = tiles.ahead;
  for (int64_t tile = 0; tile < tiles.count; ++tile) {
    [[maybe_unused]] float* memory = tiles.sums + tile * Pixels * Blocks * kLanes;
    Floats sums[Blocks][Pixels];
    UNROLLED_FOR (int b = 0; b < Blocks; ++b)
      UNROLLED_FOR (int p = 0; p < Pixels; ++p)
        sums[b][p] =
            kPassBytes == 0 || tiles.first ? zeros() : load(memory + (p * Blocks + b) * kLanes);
    const char* weight = tiles.weight;
    const X* group = tiles.x + tile * Pixels * pixel;
    ROLLED_FOR (int64_t g = 0; g < channel_groups; ++g, group += group_stride) {
      ROLLED_FOR (int64_t t = 0; t < taps; ++t) {
        const X* x = Direct ? group : group + tiles.tap_offsets[t];
        if constexpr (Slots > 0) {
          UNROLLED_FOR (int s = 0; s < Slots; ++s)
            add_slot<Traits, Ahead>(sums, x, pixel, weight + s * kPair, tiles.block_stride,
                                    ahead + s * kCacheLine);
        } else {
          ROLLED_FOR (int64_t s = 0; s < slots; ++s)
            add_slot<Traits, Ahead>(sums, x, pixel, weight + s * kPair, tiles.block_stride,
                                    ahead + s * kCacheLine);
        }
        weight += slots * kPair;
        ahead += slots * kCacheLine;
      }
    }
    if (kPassBytes == 0 || tiles.last) {
      finish(sums, tiles.epilogue.at(tile * Pixels, 0));
    } else {
      UNROLLED_FOR (int b = 0; b < Blocks; ++b)
        UNROLLED_FOR (int p = 0; p < Pixels; ++p)
          store(memory + (p * Blocks + b) * kLanes, sums[b][p]);
    }
  }
}

// The kernels of one element type by blocks and pixels. More sums than these spill.
template <class Traits>
struct SparseKernels {
  static constexpr bool exists(int64_t blocks, int64_t pixels) {
    return blocks >= 1 && pixels >= 1 && blocks <= kMaxBlocks && pixels <= kMaxPixels &&
           blocks * pixels <= kMaxSums && blocks != 3;
  }

  static SparseKernel<Traits> pick(int64_t blocks, int64_t pixels, int64_t slots, bool direct,
                                   bool ahead) {
    if constexpr (Traits::kUnrolledSlots == 2) {
      if (slots == 1) return pick_way<1>(blocks, pixels, direct, ahead);
      if (slots == 2) return pick_way<2>(blocks, pixels, direct, ahead);
    }
    return pick_way<0>(blocks, pixels, direct, ahead);
  }

 private:
  template <int Slots>
  static SparseKernel<Traits> pick_way(int64_t blocks, int64_t pixels, bool direct, bool ahead) {
    if (direct)
      return ahead ? pick_blocks<Slots, true, true>(blocks, pixels)
                   : pick_blocks<Slots, true, false>(blocks, pixels);
    return ahead ? pick_blocks<Slots, false, true>(blocks, pixels)
                 : pick_blocks<Slots, false, false>(blocks, pixels);
  }

  template <int Slots, bool Direct, bool Ahead>
  static SparseKernel<Traits> pick_blocks(int64_t blocks, int64_t pixels) {
    const auto all = std::make_integer_sequence<int, kMaxPixels>();
    switch (blocks) {
      case 1:
        return pick_pixels<Slots, Direct, Ahead, 1>(pixels, all);
      case 2:
        return pick_pixels<Slots, Direct, Ahead, 2>(pixels, all);
      default:
        return pick_pixels<Slots, Direct, Ahead, 4>(pixels, all);
    }
  }

  template <int Slots, bool Direct, bool Ahead, int Blocks, int... PixelsLessOne>
  static SparseKernel<Traits> pick_pixels(int64_t pixels,
                                          std::integer_sequence<int, PixelsLessOne...>) {
    static constexpr SparseKernel<Traits> kTable[] = {
        entry<Slots, Direct, Ahead, Blocks, PixelsLessOne + 1>()...};
    return kTable[pixels - 1];
  }

  template <int Slots, bool Direct, bool Ahead, int Blocks, int Pixels>
  static constexpr SparseKernel<Traits> entry() {
    if constexpr (exists(Blocks, Pixels)) {
      return sparse_kernel<Traits, Blocks, Pixels, Slots, Direct, Ahead>;
    } else {
      return nullptr;
    }
  }
};

// The plan of one sparse conv: how its pixels are cut into tiles.
template <class Traits>
struct SparseConv {
  using X = typename Traits::Element;
  using Narrow = typename NarrowTraits<Traits>::Type;

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
      unit = rows.unit() * s.out_width;
      tiles = rows.size();
      input.set_rows(rows.unit());
    }
    passes = 1;
    if constexpr (kPassBytes > 0)  // of a 1x1 conv each weight is read once a tile anyway
      if (!one_tap(s)) passes = std::min(channel_groups, ceil_div(block_bytes, kPassBytes));
  }

  int64_t scratch_bytes() const {
    const int64_t of_sums = unit * tile_blocks * kLanes * static_cast<int64_t>(sizeof(float));
    return packed_bytes() + (passes > 1 ? of_sums : 0);
  }

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
      float* sums = reinterpret_cast<float*>(worker.scratch + packed_bytes());
      for (int64_t g = 0; g < s.groups; ++g)
        run_group(g, tile, part, x, scratch, sums, weight + g * blocks * block_bytes,
                  epilogue.of_group(g, group_outputs));
    }
  }

 private:
  int64_t packed_bytes() const {
    return s.direct ? 0 : round_up(input.bytes(sizeof(X)), kCacheLine);
  }

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
  void run_group(int64_t g, int64_t tile, int64_t part, const X* x, const X* scratch, float* sums,
                 const char* weight, const Epilogue<X>& group) const {
    const int64_t block_tiles = ceil_div(blocks, tile_blocks);
    const int64_t first = block_tiles * part / split, last = block_tiles * (part + 1) / split;
    SparseTiles<X> t;
    t.pixel_stride = s.direct ? s.x_stride * s.stride_w : Traits::kGroup;
    t.group_stride = s.direct ? Traits::kGroup / Traits::kSections : input.group_stride();
    t.tap_offsets = s.direct ? nullptr : input.tap_offsets();
    t.taps = s.direct ? 1 : s.kernel_h * s.kernel_w * Traits::kSections;
    t.slots = s.slots / Traits::kSections;
    t.block_stride = block_bytes;
    const int64_t all_groups = s.direct ? s.channels / s.groups / t.group_stride : channel_groups;
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
        for (int64_t pass = 0; pass < passes; ++pass) {
          const int64_t from = all_groups * pass / passes;
          t.channel_groups = all_groups * (pass + 1) / passes - from;
          t.pass_bytes = t.channel_groups * block_bytes / all_groups;
          t.weight = weight + here * block_bytes + from * block_bytes / all_groups;
          t.ahead = t.weight + now * t.pass_bytes;
          t.sums = sums;
          t.first = pass == 0;
          t.last = pass == passes - 1;
          run_blocks(now, t, tile, base + from * t.group_stride, group.at(0, here * kLanes));
        }
        done += now;
      }
    }
  }

  void run_blocks(int64_t count, SparseTiles<X>& t, int64_t tile, const X* base,
                  const Epilogue<X>& of_blocks) const {
    if (flat) {
      const int64_t from = tile * unit, length = std::min(unit, pixels - from);
      const X* x = s.direct ? base + from * s.x_stride : base;
      return run_stretch(count, t, x, length, of_blocks.at(from, 0));
    }
    const auto [image, row, many] = rows[tile];
    for (int64_t r = 0; r < many; ++r) {
      const X* x = s.direct
                       ? base + ((image * s.height + (row + r) * s.stride_h) * s.width) * s.x_stride
                       : base + r * s.stride_h * input.row_stride();
      const int64_t from = (image * s.out_height + row + r) * s.out_width;
      run_stretch(count, t, x, s.out_width, of_blocks.at(from, 0));
    }
  }

  // Consecutive output pixels, in tiles of nearly equal size: first those that are one wider.
  void run_stretch(int64_t count, SparseTiles<X>& t, const X* x, int64_t length,
                   const Epilogue<X>& stretch) const {
    const int64_t most = std::min({tile_pixels, int64_t{kMaxPixels}, kMaxSums / count});
    const int64_t many = ceil_div(length, most), width = length / many, wider = length % many;
    t.x = x;
    t.epilogue = stretch;
    run_tiles(count, t, wider, width + 1);
    run_tiles(count, t, many - wider, width);
  }

  // So many tiles of a width. The weights of the next pass come in while these are used, until all
  // of them are fetched: they may lie beyond L2.
  void run_tiles(int64_t count, SparseTiles<X>& t, int64_t many, int64_t width) const {
    const int64_t of_tile = t.pass_bytes / 2, end = 2 * count * t.pass_bytes;
    const int64_t lacking = std::max<int64_t>(0, ceil_div(end - (t.ahead - t.weight), of_tile));
    const int64_t fetching = std::min(lacking, many);
    run_kernel(count, t, fetching, width, true);
    t.ahead += fetching * of_tile;
    run_kernel(count, t, many - fetching, width, false);
  }

  void run_kernel(int64_t count, SparseTiles<X>& t, int64_t many, int64_t width, bool ahead) const {
    if (many == 0) return;
    t.count = many;
    const bool narrow = count == 1 && t.epilogue.outputs <= kLanes / 2;
    const auto kernel = narrow
                            ? SparseKernels<Narrow>::pick(1, width, t.slots, s.direct, ahead)
                            : SparseKernels<Traits>::pick(count, width, t.slots, s.direct, ahead);
    kernel(t);
    t.x += many * width * t.pixel_stride;
    t.sums += many * width * count * kLanes;
    t.epilogue = t.epilogue.at(many * width, 0);
  }

  const Step& s;
  InputTile<X> input;
  bool flat;
  int64_t group_outputs, blocks, channel_groups, block_bytes;
  int64_t tile_blocks, tile_pixels, split;
  int64_t passes;  // over the pixels of a tile, each with the weights of some channel groups
  RowTiles rows;
  int64_t pixels = 0, unit = 0;  // of a flat conv
  int64_t tiles;
};

}  // namespace spre
