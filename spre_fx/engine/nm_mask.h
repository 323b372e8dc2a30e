// The N:M mask: of every M consecutive channels at one tap, the N largest magnitudes.
#pragma once

#include <type_traits>

#include "magnitude.h"
#include "team.h"
#include "training.h"
#include "types.h"

namespace spre {

inline constexpr int64_t kLargestM = 64;

// Groups in a tile: row j, `stride` behind the one before, holds member j of each group at each
// tap, a lane for each, so that comparisons between members run along rows. What follows decides
// which members are kept. It is not inlined: there the compiler would not know that no rows
// overlap.
struct Rows {
  int64_t members, lanes, stride;
};

// As many numbers as stay in the first-level cache. Rows do not lie a power of two apart, where
// they would share lines of it.
inline constexpr int64_t kTileNumbers = 2048;
template <class Bits>
inline constexpr int64_t kRowGap = 2 * kCacheLine / sizeof(Bits);

// The longest rows of m members.
inline constexpr int64_t most_lanes(int64_t m) { return kTileNumbers / m; }

// `largest` and `missing` are rows to work in.
template <class Bits>
SPRE_NOINLINE void keep_first_largest(const Bits* __restrict magnitudes, uint8_t* __restrict kept,
                                      Bits* __restrict largest, Bits* __restrict missing,
                                      Rows rows) {
  std::copy(magnitudes, magnitudes + rows.lanes, largest);
  std::fill(missing, missing + rows.lanes, 1);
  for (int64_t j = 1; j < rows.members; ++j)
    for (int64_t l = 0; l < rows.lanes; ++l)
      largest[l] = std::max(largest[l], magnitudes[j * rows.stride + l]);
  for (int64_t j = 0; j < rows.members; ++j)
    for (int64_t l = 0; l < rows.lanes; ++l) {
      const Bits first = magnitudes[j * rows.stride + l] == largest[l] ? missing[l] : 0;
      missing[l] -= first;
      kept[j * rows.stride + l] = static_cast<uint8_t>(first);
    }
}

// Where taps lie side by side and N is 1, groups are read where they are: a span of taps at a time,
// the last one ending with the last tap. Of each tap only one byte of the mask is not 0.
inline constexpr int64_t kSpan = 8;

// A number at each tap of a span. Compilers keep such a vector in registers.
template <class Bits>
struct Span {
  typedef Bits Numbers __attribute__((vector_size(kSpan * sizeof(Bits))));

  static void read_magnitudes(const Bits* from, Numbers& to) {
    std::memcpy(&to, from, sizeof(to));
    to &= std::numeric_limits<Bits>::max();
  }
};

template <class Bits>
SPRE_NOINLINE void keep_first_largest(const Bits* __restrict weight, uint8_t* __restrict mask,
                                      int64_t groups, int64_t members, int64_t taps) {
  const int64_t size = members * taps;
  std::memset(mask, 0, groups * size);
  for (int64_t g = 0; g < groups; ++g, weight += size, mask += size)
    for (int64_t done = 0; done < taps; done += kSpan) {
      const int64_t tap = std::min(done, taps - kSpan);
      typename Span<Bits>::Numbers largest, other, member = {}, j = {};
      Span<Bits>::read_magnitudes(weight + tap, largest);
      for (int64_t place = taps + tap; place < size; place += taps) {
        Span<Bits>::read_magnitudes(weight + place, other);
        j += 1;
        const auto larger = other > largest;
        largest = larger ? other : largest;
        member = larger ? j : member;
      }
      for (int64_t l = done - tap; l < kSpan; ++l) mask[member[l] * taps + tap + l] = 1;
    }
}

// The rank of a member is the number of those that come before it. At first those are all later
// ones and none of the earlier ones; then each pair is compared.
template <int M, class Bits>
SPRE_NOINLINE void rank(const Bits* __restrict magnitudes, Bits* __restrict ranks, int64_t lanes) {
  constexpr int64_t kStride = most_lanes(M) + kRowGap<Bits>;
  for (int64_t l = 0; l < lanes; ++l) {
    Bits member[M], rank[M];
    UNROLLED_FOR (int j = 0; j < M; ++j) {
      member[j] = magnitudes[j * kStride + l];
      rank[j] = M - 1 - j;
    }
    UNROLLED_FOR (int j = 1; j < M; ++j)
      UNROLLED_FOR (int i = 0; i < j; ++i) {
        const Bits first = member[i] >= member[j] ? 1 : 0;
        rank[j] += first;
        rank[i] -= first;
      }
    UNROLLED_FOR (int j = 0; j < M; ++j) ranks[j * kStride + l] = rank[j];
  }
}

template <class Bits>
SPRE_NOINLINE void compare(const Bits* __restrict earlier, const Bits* __restrict later,
                           Bits* __restrict earlier_rank, Bits* __restrict later_rank,
                           int64_t lanes) {
  for (int64_t l = 0; l < lanes; ++l) {
    const Bits first = earlier[l] >= later[l] ? 1 : 0;
    later_rank[l] += first;
    earlier_rank[l] -= first;
  }
}

// The same for any number of members.
template <class Bits>
void rank(const Bits* magnitudes, Bits* ranks, Rows rows) {
  for (int64_t j = 0; j < rows.members; ++j)
    std::fill_n(ranks + j * rows.stride, rows.lanes, static_cast<Bits>(rows.members - 1 - j));
  for (int64_t j = 1; j < rows.members; ++j)
    for (int64_t i = 0; i < j; ++i)
      compare(magnitudes + i * rows.stride, magnitudes + j * rows.stride, ranks + i * rows.stride,
              ranks + j * rows.stride, rows.lanes);
}

template <class Bits>
SPRE_NOINLINE void keep_below(const Bits* __restrict ranks, uint8_t* __restrict kept, Bits n,
                              Rows rows) {
  for (int64_t j = 0; j < rows.members; ++j)
    for (int64_t l = 0; l < rows.lanes; ++l)
      kept[j * rows.stride + l] = ranks[j * rows.stride + l] < n ? 1 : 0;
}

// A number that the compiler knows, where it is worth loops of their own.
template <int64_t N>
using Constant = std::integral_constant<int64_t, N>;

template <class Bits>
class GroupTile {
 public:
  GroupTile(int64_t n, int64_t m) : n_(static_cast<Bits>(n)), m_(m) {}

  // The masks of some groups at `taps` of `inner` taps. Several groups lie behind one another, with
  // all of their taps. `members` may be fewer than M.
  void run(const Bits* weight, uint8_t* mask, int64_t groups, int64_t members, int64_t taps,
           int64_t inner) {
    const Constant<1> one;
    const Constant<9> nine;
    if (inner == 9) return run_known(weight, mask, groups, members, nine, nine);
    if (inner != 1) return run_known(weight, mask, groups, members, taps, inner);
    if (members == 4) return run_known(weight, mask, groups, Constant<4>(), one, one);
    if (members == 8) return run_known(weight, mask, groups, Constant<8>(), one, one);
    if (members == 16) return run_known(weight, mask, groups, Constant<16>(), one, one);
    run_known(weight, mask, groups, members, one, one);
  }

 private:
  static constexpr int64_t kSize = kTileNumbers + kLargestM * kRowGap<Bits>;

  template <class Members, class Taps, class Inner>
  void run_known(const Bits* __restrict weight, uint8_t* __restrict mask, int64_t groups,
                 Members members, Taps taps, Inner inner) {
    const int64_t stride = most_lanes(m_) + kRowGap<Bits>;
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t j = 0; j < members; ++j)
        for (int64_t t = 0; t < taps; ++t)
          magnitudes_[j * stride + g * taps + t] = magnitude(weight[(g * members + j) * inner + t]);
    select({members, groups * taps, stride});
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t j = 0; j < members; ++j)
        for (int64_t t = 0; t < taps; ++t)
          mask[(g * members + j) * inner + t] = kept_[j * stride + g * taps + t];
  }

  void select(Rows rows) {
    if (n_ == 1) return keep_first_largest(magnitudes_, kept_, ranks_, ranks_ + rows.stride, rows);
    const int64_t known = rows.members == m_ ? m_ : 0;
    if (known == 4) {
      rank<4>(magnitudes_, ranks_, rows.lanes);
    } else if (known == 8) {
      rank<8>(magnitudes_, ranks_, rows.lanes);
    } else if (known == 16) {
      rank<16>(magnitudes_, ranks_, rows.lanes);
    } else {
      rank(magnitudes_, ranks_, rows);
    }
    keep_below(ranks_, kept_, n_, rows);
  }

  const Bits n_;
  const int64_t m_;
  alignas(kCacheLine) Bits magnitudes_[kSize];
  alignas(kCacheLine) Bits ranks_[kSize];
  alignas(kCacheLine) uint8_t kept_[kSize];
};

// One thread's share of the groups of a weight.
template <class Bits>
void run_nm_mask(const Weight& weight, int64_t n, int64_t m, uint8_t* mask, const Worker& worker) {
  const int64_t inner = weight.channels_last ? 1 : weight.taps;
  int64_t rows = weight.filters * weight.taps / inner, channels = weight.channels;
  if (channels % m == 0) {  // then groups lie behind one another through all rows
    channels *= rows;
    rows = 1;
  }
  GroupTile<Bits> tile(n, m);
  const int64_t lanes = most_lanes(m);
  const Bits* numbers = static_cast<const Bits*>(weight.numbers);
  const int64_t groups_of_row = ceil_div(channels, m), last = worker.last(rows * groups_of_row);
  for (int64_t group = worker.first(rows * groups_of_row); group < last;) {
    const int64_t row = group / groups_of_row, channel = group % groups_of_row * m;
    const int64_t whole = std::min((channels - channel) / m, last - group);
    const int64_t groups = std::clamp<int64_t>(lanes / inner, 1, std::max<int64_t>(whole, 1));
    const int64_t members = std::min(m, channels - channel);
    const int64_t start = (row * channels + channel) * inner;
    group += groups;
    if (n == 1 && inner >= kSpan) {
      keep_first_largest(numbers + start, mask + start, groups, members, inner);
      continue;
    }
    for (int64_t tap = 0; tap < inner; tap += lanes) {
      const int64_t taps = std::min(lanes, inner - tap);
      tile.run(numbers + start + tap, mask + start + tap, groups, members, taps, inner);
    }
  }
}

}  // namespace spre
