// Images side by side in vectors: what the convs of training compute on.
//
// A group of as many images as a vector has lanes lies in memory as [rows][channels][columns], a
// vector for each, padding included. So all that a weight does is multiply vectors by one number,
// wherever it stands: no shuffles, no matter how irregular a mask is.
#pragma once

#include <utility>

#include "training.h"
#include "types.h"

namespace spre {

#if defined(__AVX512F__)
inline constexpr int64_t kVectorBytes = 64;
#elif defined(__AVX2__)
inline constexpr int64_t kVectorBytes = 32;
#else
inline constexpr int64_t kVectorBytes = 16;
#endif

template <class Number>
struct Lanes {
  typedef Number Vector __attribute__((vector_size(kVectorBytes)));
  static constexpr int64_t kCount = kVectorBytes / sizeof(Number);
};

// Of every `section` numbers of two vectors of `count` the first halves, or the second ones, `unit`
// numbers of either in turn: which of both becomes number `to`.
template <int section, int unit, bool second, int count>
constexpr int turn(int to) {
  const int half = to / section * section + (second ? section / 2 : 0);
  return half + to % section / (2 * unit) * unit + to % unit + to / unit % 2 * count;
}
template <class Number, int section, int unit, bool second, class Index, int... to>
SPRE_INLINE typename Lanes<Number>::Vector take_turns(typename Lanes<Number>::Vector a,
                                                      typename Lanes<Number>::Vector b,
                                                      std::integer_sequence<int, to...>) {
  constexpr int kCount = Lanes<Number>::kCount;
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, turn<section, unit, second, kCount>(to)...);
#else
  typedef Index Indices __attribute__((vector_size(kVectorBytes)));
  return __builtin_shuffle(a, b, Indices{turn<section, unit, second, kCount>(to)...});
#endif
}
template <class Number, int section, int unit, bool second>
SPRE_INLINE typename Lanes<Number>::Vector take_turns(typename Lanes<Number>::Vector a,
                                                      typename Lanes<Number>::Vector b) {
  using Index = std::conditional_t<sizeof(Number) == 4, int32_t, int64_t>;
  return take_turns<Number, section, unit, second, Index>(
      a, b, std::make_integer_sequence<int, Lanes<Number>::kCount>());
}

// In each section, every `stride`-th row from row `first` on: rows of units become columns.
template <class Number, int section, int unit>
SPRE_INLINE void transpose_sections(typename Lanes<Number>::Vector (&rows)[Lanes<Number>::kCount],
                                    int first, int stride) {
  constexpr int kRows = section / unit;
  UNROLLED_FOR (int step = 1; step < kRows; step *= 2) {
    typename Lanes<Number>::Vector next[kRows];
    UNROLLED_FOR (int i = 0; i < kRows / 2; ++i) {
      const auto a = rows[first + i * stride], b = rows[first + (i + kRows / 2) * stride];
      next[2 * i] = take_turns<Number, section, unit, false>(a, b);
      next[2 * i + 1] = take_turns<Number, section, unit, true>(a, b);
    }
    UNROLLED_FOR (int i = 0; i < kRows; ++i) rows[first + i * stride] = next[i];
  }
}

// Rows become columns. First within the 16 bytes that most shuffles do not look beyond, then those
// as a whole: half as many instructions as number by number.
template <class Number>
SPRE_INLINE void transpose(typename Lanes<Number>::Vector (&rows)[Lanes<Number>::kCount]) {
  constexpr int kCount = Lanes<Number>::kCount, kShort = 16 / sizeof(Number);
  UNROLLED_FOR (int first = 0; first < kCount; first += kShort)
    transpose_sections<Number, kShort, 1>(rows, first, 1);
  UNROLLED_FOR (int first = 0; first < kShort; ++first)
    transpose_sections<Number, kCount, kShort>(rows, first, kShort);
}

// The sum of each row, in the lane of its number.
template <class Number>
SPRE_INLINE typename Lanes<Number>::Vector sums_of_rows(
    typename Lanes<Number>::Vector (&rows)[Lanes<Number>::kCount]) {
  UNROLLED_FOR (int half = Lanes<Number>::kCount / 2; half > 0; half /= 2)
    UNROLLED_FOR (int i = 0; i < half; ++i)
      rows[i] = take_turns<Number, Lanes<Number>::kCount, 1, false>(rows[i], rows[i + half]) +
                take_turns<Number, Lanes<Number>::kCount, 1, true>(rows[i], rows[i + half]);
  return rows[0];
}

template <class Number>
SPRE_INLINE typename Lanes<Number>::Vector load_unaligned(const Number* from) {
  typename Lanes<Number>::Vector vector;
  std::memcpy(&vector, from, sizeof(vector));
  return vector;
}

// Copies `count` numbers of each of some images, side by side in memory, to lanes: `to(i)` is where
// the vector of the i-th goes. Lanes without an image become 0.
template <class Number, class To>
void gather_lanes(const Number* from, int64_t of_image, int64_t images, int64_t count, To to) {
  using Vector = typename Lanes<Number>::Vector;
  constexpr int64_t kCount = Lanes<Number>::kCount;
  int64_t i = 0;
  if (images == kCount)
    for (; i + kCount <= count; i += kCount) {
      Vector rows[kCount];
      UNROLLED_FOR (int64_t image = 0; image < kCount; ++image)
        rows[image] = load_unaligned(from + image * of_image + i);
      transpose<Number>(rows);
      UNROLLED_FOR (int64_t j = 0; j < kCount; ++j) *reinterpret_cast<Vector*>(to(i + j)) = rows[j];
    }
  for (; i < count; ++i) {
    Number* vector = to(i);
    for (int64_t image = 0; image < images; ++image) vector[image] = from[image * of_image + i];
    std::fill(vector + images, vector + kCount, Number(0));
  }
}

// The way back, from vectors `of_vector` numbers apart.
template <class Number>
void scatter_lanes(const Number* from, int64_t of_vector, int64_t images, int64_t count, Number* to,
                   int64_t of_image) {
  using Vector = typename Lanes<Number>::Vector;
  constexpr int64_t kCount = Lanes<Number>::kCount;
  int64_t i = 0;
  if (images == kCount)
    for (; i + kCount <= count; i += kCount) {
      Vector rows[kCount];
      UNROLLED_FOR (int64_t j = 0; j < kCount; ++j)
        rows[j] = *reinterpret_cast<const Vector*>(from + (i + j) * of_vector);
      transpose<Number>(rows);
      UNROLLED_FOR (int64_t image = 0; image < kCount; ++image)
        std::memcpy(to + image * of_image + i, &rows[image], sizeof(Vector));
    }
  for (int64_t image = 0; image < images; ++image)
    for (int64_t j = i; j < count; ++j) to[image * of_image + j] = from[j * of_vector + image];
}

// Where the numbers of an activation lie in memory, and how many there are.
struct Activation4d {
  int64_t images, channels, height, width;
  int64_t of_image, of_channel, of_row, of_column;  // strides

  Activation4d(int64_t images, int64_t channels, int64_t height, int64_t width, bool channels_last)
      : images(images),
        channels(channels),
        height(height),
        width(width),
        of_image(channels * height * width),
        of_channel(channels_last ? 1 : height * width),
        of_row(channels_last ? width * channels : width),
        of_column(channels_last ? channels : 1) {}
};

// A row of an activation in lanes: which of its columns lies where. Columns `phases` apart lie side
// by side, so that a conv of that stride reads neighbours.
struct LaneRow {
  int64_t before;   // columns of padding
  int64_t phases;   // the stride
  int64_t columns;  // of one phase
  int64_t channels;
  int64_t of_channel;  // vectors

  LaneRow(int64_t before, int64_t phases, int64_t least_columns, int64_t channels)
      : before(before),
        phases(phases),
        columns(ceil_div(least_columns, phases)),
        channels(channels),
        of_channel(phases * columns) {
    // An odd number of cache lines: neighbours do not share lines of the cache.
    while (of_channel * kVectorBytes % (2 * kCacheLine) != kCacheLine) ++of_channel;
  }

  int64_t vectors() const { return channels * of_channel; }
  // Of a column of the padded row.
  int64_t place(int64_t column) const {
    return phases == 1 ? column : column % phases * columns + column / phases;
  }
};

// Copies rows of a group of images to lanes, of whose columns those of the padding become 0.
template <class Number>
void to_lanes(const Number* from, const Activation4d& shape, int64_t images, int64_t rows,
              const LaneRow& row, Number* to) {
  constexpr int64_t kCount = Lanes<Number>::kCount;
  const int64_t of_row = row.vectors() * kCount, of_channel = row.of_channel * kCount;
  const int64_t width = std::min(shape.width, row.phases * row.columns - row.before);
  if (row.before > 0 || width < row.phases * row.columns)
    std::memset(to, 0, rows * row.vectors() * kVectorBytes);
  if (shape.of_column == 1 && width == shape.width) {  // rows side by side, channel by channel
    for (int64_t c = 0; c < shape.channels; ++c) {
      Number* channel = to + c * of_channel;
      int64_t column = 0;
      gather_lanes(from + c * shape.of_channel, shape.of_image, images, rows * width, [&](int64_t) {
        Number* vector = channel + row.place(row.before + column) * kCount;
        if (++column == width) {
          column = 0;
          channel += of_row;
        }
        return vector;
      });
    }
    return;
  }
  const bool channels_first = shape.of_column == 1;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < (channels_first ? shape.channels : width); ++i) {
      const Number* numbers =
          from + r * shape.of_row + i * (channels_first ? shape.of_channel : shape.of_column);
      gather_lanes(numbers, shape.of_image, images, channels_first ? width : shape.channels,
                   [&](int64_t j) {
                     const int64_t column = row.before + (channels_first ? j : i);
                     return to + r * of_row + (channels_first ? i : j) * of_channel +
                            row.place(column) * kCount;
                   });
    }
}

}  // namespace spre
