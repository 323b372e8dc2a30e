// How the work of a step is cut, where the caller did not say.
#pragma once

#include <algorithm>

#include "types.h"

namespace spre {

// What a thread packs at once must stay in its L2 cache beside the weights that go over it.
inline constexpr int64_t kPackedBytes = 256 << 10;

// Registers of pixels that a planar conv computes at once: what its sums leave of 16 is for one
// weight, and of 32 more would make windows larger than the cache.
inline constexpr int64_t kPlanarRegisters = 12;
inline constexpr int64_t kPlanarPixels = 96;  // that are worth a tile of their own

inline constexpr int64_t kLeastWinogradTiles = 12;  // that weights are worth being read for

// How many threads the rows of one image are for.
inline int64_t sharers_of_image(const Step& s, int64_t threads) {
  return ceil_div(threads, std::max<int64_t>(1, s.batch));
}

// Whether a sparse conv can read x where it lies: registers that reached beyond the last channel
// are not needed. Where they hold a part of a channel group, its last parts may be missing.
inline bool may_be_direct(const Step& s) {
  const int64_t held = s.channel_group / std::min<int64_t>(s.parts, kMostSections);
  return !s.planar && one_tap(s) && s.channels / s.groups % held == 0;
}

// The tiles of outputs that a Winograd conv cuts the images of a batch into.
inline int64_t winograd_tiles(const Step& s) {
  return s.batch * ceil_div(s.out_height, s.winograd) * ceil_div(s.out_width, s.winograd);
}

// Threads share the tiles or, where there are too few of them, the outputs.
inline Step with_winograd_tile(Step s, int64_t threads) {
  const int64_t tiles = std::max<int64_t>(1, winograd_tiles(s)), points = s.winograd + 2;
  const int64_t a_tile = points * points * round_up(std::max<int64_t>(1, s.channels), kLanes) * 4;
  const int64_t stretches = ceil_div(tiles, std::max(kLeastWinogradTiles, kPackedBytes / a_tile));
  const bool few = tiles < threads * kLeastWinogradTiles;
  s.tile_pixels = ceil_div(tiles, few ? stretches : round_up(stretches, threads));
  s.split = few ? threads : 1;
  return s;
}

// Sparse convs. A 1x1 conv reads each input once for each block of outputs: many blocks at few
// pixels, read where they lie. A larger kernel reads each packed input once a tap, so more pixels
// share a pass over the weights.
inline Step with_tile(const Step& step, int64_t threads) {
  Step s = step;
  if (s.kind == kWinogradConv && s.tile_pixels == 0) return with_winograd_tile(s, threads);
  if (s.kind == kDenseConv && s.tile_rows == 0) {
    const int64_t fitting = std::max<int64_t>(1, ceil_div(s.out_height, 8));
    const int64_t tiles = round_up(fitting, sharers_of_image(s, threads));
    s.tile_rows = std::max<int64_t>(1, ceil_div(s.out_height, tiles));
  }
  if (s.kind != kSparseConv || s.tile_pixels != 0) return s;
  const int64_t blocks = ceil_div(s.out_channels / s.groups, kLanes);
  const int64_t widest = one_tap(s) ? 4 : 2;
  s.tile_blocks = std::min(blocks, std::min<int64_t>(widest, kMaxBlocks));
  const bool flat = is_flat(s);
  if (!flat && s.out_width % 7 == 0 && s.out_width < 14)
    s.tile_blocks = std::min<int64_t>(2, s.tile_blocks);
  const int64_t most = std::min<int64_t>(kMaxPixels, kReadOnceSums / s.tile_blocks);
  s.tile_pixels =
      flat ? most : ceil_div(s.out_width, std::max<int64_t>(1, ceil_div(s.out_width, most)));
  if (s.planar) s.tile_pixels = kPlanarRegisters;
  s.direct = may_be_direct(s);

  // Equal tiles, as many for each thread; threads that can't be given equal rows are given outputs.
  const int64_t rows = flat ? s.batch * s.out_height : s.out_height;
  const int64_t element = s.type == kFloat32 ? 4 : 2;
  const int64_t row =
      std::max<int64_t>(1, s.width * round_up(s.channels, 16) * s.stride_h * element);
  const int64_t fitting = std::max<int64_t>(1, kPackedBytes / row);
  const int64_t sharers = flat ? threads : sharers_of_image(s, threads);
  int64_t tiles = round_up(std::max<int64_t>(1, ceil_div(rows, fitting)), sharers);
  if (s.planar) {  // fewer, which fill registers: only a few of their channels are read at a time
    const int64_t least = ceil_div(kPlanarPixels, std::max<int64_t>(1, s.out_width));
    tiles = std::min(tiles, std::max<int64_t>(1, rows / least));
  }
  s.tile_rows = std::max<int64_t>(1, ceil_div(rows, tiles));
  const int64_t busiest = s.tile_rows * ceil_div(ceil_div(rows, s.tile_rows), sharers) * sharers;
  s.split = threads > 1 && busiest * 10 > rows * 11 ? threads : 1;
  return s;
}

}  // namespace spre
