// 16 float lanes in one AVX-512 register; bfloat16 where the CPU multiplies it.
#pragma once

#include <immintrin.h>

#include <initializer_list>

#include "types.h"

namespace spre {

#ifdef SPRE_HAS_BFLOAT16
inline constexpr const char* kIsa = "avx512_bf16";
#else
inline constexpr const char* kIsa = "avx512";
#endif

struct Floats {
  __m512 v;
};

SPRE_INLINE Floats zeros() { return {_mm512_setzero_ps()}; }
SPRE_INLINE Floats broadcast(float x) { return {_mm512_set1_ps(x)}; }
SPRE_INLINE Floats add(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
SPRE_INLINE Floats sub(Floats a, Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
SPRE_INLINE Floats mul(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
SPRE_INLINE Floats div(Floats a, Floats b) { return {_mm512_div_ps(a.v, b.v)}; }
// The larger (smaller) of the two, b where either is NaN: max(bound, x) lets a NaN of x through.
SPRE_INLINE Floats max(Floats a, Floats b) { return {_mm512_max_ps(a.v, b.v)}; }
SPRE_INLINE Floats min(Floats a, Floats b) { return {_mm512_min_ps(a.v, b.v)}; }
// The larger of the two, NaN where either is.
SPRE_INLINE Floats max_or_nan(Floats a, Floats b) {
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  return {_mm512_mask_mov_ps(_mm512_max_ps(a.v, b.v), nan, a.v)};
}
// a * b + c
SPRE_INLINE Floats fma(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
SPRE_INLINE __mmask16 first(int count) { return static_cast<__mmask16>((1u << count) - 1u); }

SPRE_INLINE Floats load(const float* p) { return {_mm512_loadu_ps(p)}; }
SPRE_INLINE Floats load(const float* p, int count) {
  return {_mm512_maskz_loadu_ps(first(count), p)};
}
SPRE_INLINE void store(float* p, Floats a) { _mm512_storeu_ps(p, a.v); }
SPRE_INLINE void store(float* p, Floats a, int count) {
  _mm512_mask_storeu_ps(p, first(count), a.v);
}

#ifdef SPRE_HAS_BFLOAT16
SPRE_INLINE Floats widen(__m256i x) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16))};
}
SPRE_INLINE __m256i narrow(Floats a) { return (__m256i)_mm512_cvtneps_pbh(a.v); }
SPRE_INLINE Floats load(const BFloat16* p) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
SPRE_INLINE Floats load(const BFloat16* p, int count) {
  return widen(_mm256_maskz_loadu_epi16(first(count), p));
}
SPRE_INLINE void store(BFloat16* p, Floats a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(a));
}
SPRE_INLINE void store(BFloat16* p, Floats a, int count) {
  _mm256_mask_storeu_epi16(p, first(count), narrow(a));
}
#endif

// e^x, to 2 units in the last place, for x in [-87, 89]; infinite from 88.8 on.
SPRE_INLINE Floats exponential(Floats x) {
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x.v, _mm512_set1_ps(1.44269504f)), 0);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x.v);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.f / 5040);
  for (float c : {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, .5f, 1.f, 1.f})
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
  return {_mm512_scalef_ps(p, n)};
}

// How the sparse kernel reads 16 (32) channels of a pixel, and what a pair of weights and indices
// does with them. `Weights` are 16 values, `Index` 16 lane numbers.
struct Float32Traits {
  using Element = float;
  using Input = __m512;
  using Weights = __m512;
  using Index = __m512i;
  static constexpr int kGroup = 16;
  static constexpr int kSections = 1;
  static constexpr int kUnrolledSlots = 0;
  SPRE_INLINE Input input(const float* p) { return _mm512_loadu_ps(p); }
  SPRE_INLINE Weights weights(const char* p) {
    return _mm512_load_ps(reinterpret_cast<const float*>(p));
  }
  SPRE_INLINE Index index(const char* p) { return _mm512_load_si512(p + 64); }
  SPRE_INLINE Floats dot(Floats a, Input x, Index i, Weights w) {
    return {_mm512_fmadd_ps(_mm512_permutexvar_ps(i, x), w, a.v)};
  }
};

using HalvedFloat32Traits = Float32Traits;

struct QuarteredFloat32Traits : Float32Traits {  // permutes look at the last 4 bits
  SPRE_INLINE Index index(const char* p) { return _mm512_srli_epi32(Float32Traits::index(p), 2); }
};

struct WideFloat32Traits : Float32Traits {
  struct Input {
    __m512 low, high;
  };
  static constexpr int kGroup = 32;
  SPRE_INLINE Input input(const float* p) { return {_mm512_loadu_ps(p), _mm512_loadu_ps(p + 16)}; }
  SPRE_INLINE Floats dot(Floats a, Input x, Index i, Weights w) {
    return {_mm512_fmadd_ps(_mm512_permutex2var_ps(x.low, i, x.high), w, a.v)};
  }
};

#ifdef SPRE_HAS_BFLOAT16
struct BFloat16Traits {
  using Element = BFloat16;
  using Input = __m512i;
  using Weights = __m512i;
  using Index = __m512i;
  static constexpr int kGroup = 32;
  static constexpr int kSections = 1;
  static constexpr int kUnrolledSlots = 0;
  SPRE_INLINE Input input(const BFloat16* p) { return _mm512_loadu_si512(p); }
  SPRE_INLINE Weights weights(const char* p) { return _mm512_load_si512(p); }
  SPRE_INLINE Index index(const char* p) { return _mm512_load_si512(p + 64); }
  SPRE_INLINE Floats dot(Floats a, Input x, Index i, Weights w) {
    return {_mm512_dpbf16_ps(a.v, (__m512bh)_mm512_permutexvar_epi16(i, x), (__m512bh)w)};
  }
};

// See dense_conv.h: two numbers at a time.
struct BFloat16Numbers {
  using Element = BFloat16;
  using Weights = __m512i;
  static constexpr int64_t kNumbers = 2;
  SPRE_INLINE Weights weights(const BFloat16* p) { return _mm512_loadu_si512(p); }
  SPRE_INLINE Floats dot(Floats sum, const BFloat16* x, Weights w) {
    int32_t pair;
    std::memcpy(&pair, x, sizeof(pair));
    return {_mm512_dpbf16_ps(sum.v, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)w)};
  }
  // The last of an odd row, with nothing behind it.
  SPRE_INLINE Floats dot_rest(Floats sum, const BFloat16* x, Weights w) {
    return {_mm512_dpbf16_ps(sum.v, (__m512bh)_mm512_set1_epi32(x->bits), (__m512bh)w)};
  }
};
#endif

inline constexpr int kMostSections = 1;  // see vector_avx2.h
inline constexpr int kRegisters = 32;
// Sums of a sparse kernel: at most so many, in at most so many blocks, at so many pixels; and how
// many leave registers for the weights, so that the input is read once.
inline constexpr int kMaxSums = 28;
inline constexpr int kMaxBlocks = 4;
inline constexpr int kMaxPixels = 14;
inline constexpr int kReadOnceSums = 22;
// Bytes of weights that go over all pixels of a tile before the next ones do; 0 for all of them.
inline constexpr int64_t kPassBytes = 0;
// Outputs of a tile of a depthwise conv that reads each number once; 0 for none.
inline constexpr int kScannedPixels = 0;

}  // namespace spre
