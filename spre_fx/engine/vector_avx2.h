// 16 float lanes in two AVX2 registers.
#pragma once

#include <immintrin.h>

#include <initializer_list>

#include "types.h"

namespace spre {

inline constexpr const char* kIsa = "avx2";

struct Floats {
  __m256 low, high;
};

SPRE_INLINE Floats zeros() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
SPRE_INLINE Floats broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
SPRE_INLINE Floats add(Floats a, Floats b) {
  return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
}
SPRE_INLINE Floats sub(Floats a, Floats b) {
  return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)};
}
SPRE_INLINE Floats mul(Floats a, Floats b) {
  return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
}
SPRE_INLINE Floats div(Floats a, Floats b) {
  return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)};
}
// The larger (smaller) of the two, b where either is NaN: max(bound, x) lets a NaN of x through.
SPRE_INLINE Floats max(Floats a, Floats b) {
  return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)};
}
SPRE_INLINE Floats min(Floats a, Floats b) {
  return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)};
}
// The larger of the two, NaN where either is.
SPRE_INLINE __m256 max_or_nan(__m256 a, __m256 b) {
  return _mm256_blendv_ps(_mm256_max_ps(a, b), a, _mm256_cmp_ps(a, a, _CMP_UNORD_Q));
}
SPRE_INLINE Floats max_or_nan(Floats a, Floats b) {
  return {max_or_nan(a.low, b.low), max_or_nan(a.high, b.high)};
}
// a * b + c
SPRE_INLINE Floats fma(Floats a, Floats b, Floats c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}

// The lanes of a register below `count`, which may be negative or more than there are.
SPRE_INLINE __m256i first(int count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
SPRE_INLINE Floats load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
SPRE_INLINE Floats load(const float* p, int count) {
  return {_mm256_maskload_ps(p, first(count)), _mm256_maskload_ps(p + 8, first(count - 8))};
}
SPRE_INLINE void store(float* p, Floats a) {
  _mm256_storeu_ps(p, a.low);
  _mm256_storeu_ps(p + 8, a.high);
}
SPRE_INLINE void store(float* p, Floats a, int count) {
  _mm256_maskstore_ps(p, first(count), a.low);
  _mm256_maskstore_ps(p + 8, first(count - 8), a.high);
}

// e^x, to 2 units in the last place, for x in [-87, 89]; infinite from 88.4 on.
SPRE_INLINE __m256 exponential(__m256 x) {
  const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)),
                                   _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
  r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
  __m256 p = _mm256_set1_ps(1.f / 5040);
  for (float c : {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, .5f, 1.f, 1.f})
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(c));
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}
SPRE_INLINE Floats exponential(Floats x) { return {exponential(x.low), exponential(x.high)}; }

// How the sparse kernel reads a group of channels, and what a pair of weights and indices does with
// them. `Weights` are 16 values, `Index` 16 lane numbers, of which a permute looks at the last 3
// bits. These read a group of which a slot needs only 8 channels: one permute for 8 outputs.
struct HalvedFloat32Traits {
  using Element = float;
  using Input = __m256;
  using Weights = Floats;
  struct Index {
    __m256i low, high;
  };
  static constexpr int kGroup = 16;
  static constexpr int kSections = 2;
  static constexpr int kUnrolledSlots = 2;  // kernels for 1 and for 2 of a section
  SPRE_INLINE Input input(const float* p) { return _mm256_loadu_ps(p); }
  SPRE_INLINE Weights weights(const char* p) { return load(reinterpret_cast<const float*>(p)); }
  SPRE_INLINE Index index(const char* p) {
    const __m256i* from = reinterpret_cast<const __m256i*>(p + kCacheLine);
    return {_mm256_load_si256(from), _mm256_load_si256(from + 1)};
  }
  SPRE_INLINE Floats dot(Floats a, Input x, Index i, Weights w) {
    return {_mm256_fmadd_ps(_mm256_permutevar8x32_ps(x, i.low), w.low, a.low),
            _mm256_fmadd_ps(_mm256_permutevar8x32_ps(x, i.high), w.high, a.high)};
  }
};

// A group of which a slot needs only 4 channels: they stand twice in a register, and a shuffle of
// bytes within the halves of a register takes half the time of a permute.
struct QuarteredFloat32Traits : HalvedFloat32Traits {
  static constexpr int kSections = 4;
  SPRE_INLINE Input input(const float* p) {
    return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(p));
  }
  SPRE_INLINE __m256 shuffle(Input x, __m256i i) {
    return _mm256_castsi256_ps(_mm256_shuffle_epi8(_mm256_castps_si256(x), i));
  }
  SPRE_INLINE Floats dot(Floats a, Input x, Index i, Weights w) {
    return {_mm256_fmadd_ps(shuffle(x, i.low), w.low, a.low),
            _mm256_fmadd_ps(shuffle(x, i.high), w.high, a.high)};
  }
};

struct NarrowQuarteredFloat32Traits : QuarteredFloat32Traits {
  SPRE_INLINE Floats dot(Floats a, Input x, Index i, Weights w) {
    return {_mm256_fmadd_ps(shuffle(x, i.low), w.low, a.low), a.high};
  }
};
template <>
struct NarrowTraits<QuarteredFloat32Traits> {
  using Type = NarrowQuarteredFloat32Traits;
};

// 16 channels: a permute of each half and a choice between them, by bit 3 of the lane number.
struct Float32Traits : HalvedFloat32Traits {
  using Input = Floats;
  static constexpr int kSections = 1;
  static constexpr int kUnrolledSlots = 0;
  SPRE_INLINE Input input(const float* p) { return load(p); }
  SPRE_INLINE __m256 choose(Input x, __m256i i) {
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(x.low, i), _mm256_permutevar8x32_ps(x.high, i),
                            _mm256_castsi256_ps(_mm256_slli_epi32(i, 28)));
  }
  SPRE_INLINE Floats dot(Floats a, Input x, Index i, Weights w) {
    return {_mm256_fmadd_ps(choose(x, i.low), w.low, a.low),
            _mm256_fmadd_ps(choose(x, i.high), w.high, a.high)};
  }
};

// 32 channels: the same of both halves, and a choice by bit 4.
struct WideFloat32Traits : HalvedFloat32Traits {
  struct Input {
    Floats low, high;
  };
  static constexpr int kGroup = 32;
  static constexpr int kSections = 1;
  static constexpr int kUnrolledSlots = 0;
  SPRE_INLINE Input input(const float* p) { return {load(p), load(p + 16)}; }
  SPRE_INLINE __m256 choose(Input x, __m256i i) {
    return _mm256_blendv_ps(Float32Traits::choose(x.low, i), Float32Traits::choose(x.high, i),
                            _mm256_castsi256_ps(_mm256_slli_epi32(i, 27)));
  }
  SPRE_INLINE Floats dot(Floats a, Input x, Index i, Weights w) {
    return {_mm256_fmadd_ps(choose(x, i.low), w.low, a.low),
            _mm256_fmadd_ps(choose(x, i.high), w.high, a.high)};
  }
};

inline constexpr int kMostSections = 4;  // parts of a channel group that a kernel reads one by one
inline constexpr int kRegisters = 8;     // of 16 lanes
// See vector_avx512.h.
inline constexpr int kMaxSums = 6;
inline constexpr int kMaxBlocks = 1;  // the permutes read x from memory: more blocks share nothing
inline constexpr int kMaxPixels = 6;
inline constexpr int kReadOnceSums = 5;          // what leaves registers for a shuffle
inline constexpr int64_t kPassBytes = 24 << 10;  // they stay in the first-level cache
inline constexpr int kScannedPixels = 4;

}  // namespace spre
