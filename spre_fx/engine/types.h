// Words that every file of the engine uses.
#pragma once

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

}  // namespace spre
