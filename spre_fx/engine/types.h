// Words that every file of the engine uses.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "engine.h"

#define SPRE_EXPORT extern "C" __attribute__((visibility("default")))
#define SPRE_INLINE static inline __attribute__((always_inline))
#define SPRE_NOINLINE __attribute__((noinline))
// Loops over registers, which exist only in the unrolled code, and loops that must stay loops.
#ifdef __clang__
#define UNROLLED_FOR _Pragma("clang loop unroll(full)") for
#define ROLLED_FOR _Pragma("clang loop unroll(disable)") for
#else
#define UNROLLED_FOR _Pragma("GCC unroll 32") for
#define ROLLED_FOR _Pragma("GCC unroll 1") for
#endif

namespace spre {

inline constexpr int kLanes = 16;          // outputs of one block
inline constexpr int64_t kCacheLine = 64;  // bytes; also of one vector of weights or indices

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

inline bool one_tap(const Step& s) {
  return s.kernel_h * s.kernel_w == 1 && s.padding_h == 0 && s.padding_w == 0;
}

// Whether each output pixel reads the input pixel of its own place, so that rows do not matter.
inline bool is_flat(const Step& s) { return one_tap(s) && s.stride_h == 1 && s.stride_w == 1; }

inline bool winograd_takes(const Step& s) {
  const bool plain = s.groups == 1 && s.stride_h * s.stride_w * s.dilation_h * s.dilation_w == 1;
  return plain && s.kernel_h == 3 && s.kernel_w == 3 && (s.winograd == 2 || s.winograd == 4);
}

// The traits of kernels for at most half of a block of outputs, where these have some of their own.
template <class Traits>
struct NarrowTraits {
  using Type = Traits;
};

// The output rows of a step, cut into tiles of at most `unit` rows of one image.
class RowTiles {
 public:
  RowTiles(const Step& s, int64_t unit)
      : height_(s.out_height),
        unit_(std::max<int64_t>(1, std::min(unit, height_))),
        tiles_(ceil_div(height_, unit_)),
        size_(s.batch * tiles_) {}

  struct Tile {
    int64_t image, row, count;
  };

  int64_t unit() const { return unit_; }
  int64_t size() const { return size_; }

  Tile operator[](int64_t tile) const {
    const int64_t row = tile % tiles_ * unit_;
    return {tile / tiles_, row, std::min(unit_, height_ - row)};
  }

 private:
  int64_t height_, unit_, tiles_, size_;
};

}  // namespace spre
