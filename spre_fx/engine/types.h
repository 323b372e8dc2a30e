// Words that every file of the engine uses.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "engine.h"

#define SPRE_INLINE static inline __attribute__((always_inline))
#define SPRE_UNROLL _Pragma("GCC unroll 32")
#define SPRE_NO_UNROLL _Pragma("GCC unroll 1")

namespace spre {

inline constexpr int kLanes = 16;           // outputs of one block
inline constexpr int64_t kCacheLine = 64;   // bytes; also of one vector of weights or indices

struct BFloat16 {
  uint16_t bits;
};

SPRE_INLINE float number(float x) { return x; }
SPRE_INLINE float number(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// The output rows of a step, cut into tiles of at most `unit` rows of one image.
class RowTiles {
 public:
  RowTiles(const Step& s, int64_t unit) : height_(s.out_height), first_(s.first_row) {
    last_ = s.row_count == 0 ? s.batch * s.out_height : s.first_row + s.row_count;
    rows_ = last_ > first_ ? std::min(height_, last_ - first_) : 0;  // of one image
    unit_ = std::max<int64_t>(1, std::min(unit, rows_));
    tiles_ = ceil_div(rows_, unit_);
  }

  struct Tile {
    int64_t image, row, count;
  };

  int64_t unit() const { return unit_; }
  int64_t first_row() const { return first_; }
  int64_t last_row() const { return last_; }
  int64_t size() const { return rows_ == 0 ? 0 : (last_ - first_) / rows_ * tiles_; }

  Tile operator[](int64_t tile) const {
    const int64_t begin = tile % tiles_ * unit_;
    const int64_t image = first_ / height_ + tile / tiles_;
    return {image, first_ % height_ + begin, std::min(unit_, rows_ - begin)};
  }

 private:
  int64_t height_, first_, last_, rows_, unit_, tiles_;
};

}  // namespace spre
