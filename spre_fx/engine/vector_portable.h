// 16 float lanes in the compiler's own vector types, for any CPU: four vectors of 16 bytes, the
// size that nearly all have registers for.
#pragma once

#include <initializer_list>

#include "types.h"

namespace spre {

inline constexpr const char* kIsa = "portable";

typedef float Quad __attribute__((vector_size(16)));
typedef int32_t QuadInts __attribute__((vector_size(16)));
typedef uint32_t QuadBits __attribute__((vector_size(16)));
inline constexpr int kQuads = kLanes / 4;

struct Floats {
  Quad v[kQuads];
};

// `of(i)`, the i-th quad, for each of them.
template <class F>
SPRE_INLINE Floats quads(F of) {
  Floats all;
  UNROLLED_FOR (int i = 0; i < kQuads; ++i) all.v[i] = of(i);
  return all;
}
SPRE_INLINE Quad quad(float x) { return Quad{x, x, x, x}; }

SPRE_INLINE Floats broadcast(float x) {
  return quads([&](int) { return quad(x); });
}
SPRE_INLINE Floats zeros() { return broadcast(0.f); }
SPRE_INLINE Floats add(Floats a, Floats b) {
  return quads([&](int i) { return a.v[i] + b.v[i]; });
}
SPRE_INLINE Floats sub(Floats a, Floats b) {
  return quads([&](int i) { return a.v[i] - b.v[i]; });
}
SPRE_INLINE Floats mul(Floats a, Floats b) {
  return quads([&](int i) { return a.v[i] * b.v[i]; });
}
SPRE_INLINE Floats div(Floats a, Floats b) {
  return quads([&](int i) { return a.v[i] / b.v[i]; });
}
// The larger (smaller) of the two, b where either is NaN: max(bound, x) lets a NaN of x through.
SPRE_INLINE Floats max(Floats a, Floats b) {
  return quads([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
SPRE_INLINE Floats min(Floats a, Floats b) {
  return quads([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
// The larger of the two, NaN where either is.
SPRE_INLINE Floats max_or_nan(Floats a, Floats b) {
  const Floats larger = max(a, b);
  return quads([&](int i) { return a.v[i] == a.v[i] ? larger.v[i] : a.v[i]; });
}
// a * b + c, rounded once or twice: a call of std::fma would be slow where there is no instruction.
SPRE_INLINE Floats fma(Floats a, Floats b, Floats c) {
  return quads([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}

SPRE_INLINE Floats load(const float* p) {
  Floats a;
  std::memcpy(&a, p, sizeof(a));
  return a;
}
SPRE_INLINE Floats load(const float* p, int count) {
  Floats a = zeros();
  std::memcpy(&a, p, count * sizeof(float));
  return a;
}
SPRE_INLINE void store(float* p, Floats a) { std::memcpy(p, &a, sizeof(a)); }
SPRE_INLINE void store(float* p, Floats a, int count) { std::memcpy(p, &a, count * sizeof(float)); }

// e^x, to 4 units in the last place, for x in [-87, 89]; infinite from 88.4 on.
SPRE_INLINE Quad exponential(Quad x) {
  const Quad round = quad(12582912.f);  // 1.5 * 2^23: a sum with it has no fraction
  const Quad n = (x * quad(1.44269504f) + round) - round;
  Quad r = x - n * quad(0.693359375f);
  r = r + n * quad(2.12194440e-4f);
  Quad p = quad(1.f / 5040);
  for (float c : {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, .5f, 1.f, 1.f}) p = p * r + quad(c);
  const QuadBits exponent = (QuadBits) __builtin_convertvector(n, QuadInts) + 127u;
  return p * (Quad)(exponent << 23);
}
SPRE_INLINE Floats exponential(Floats x) {
  return quads([&](int i) { return exponential(x.v[i]); });
}

// How the sparse kernel reads a group of channels, and what a pair of weights and indices does with
// them. Without a permute of 16 lanes each is best read from where it lies.
template <int Group, bool Bytes = false>
struct GatherTraits {
  using Element = float;
  using Input = const float*;
  using Weights = Floats;
  using Index = const int32_t*;
  static constexpr int kGroup = Group;
  static constexpr int kSections = 1;
  static constexpr int kUnrolledSlots = 0;
  SPRE_INLINE Input input(const float* p) { return p; }
  SPRE_INLINE Weights weights(const char* p) { return load(reinterpret_cast<const float*>(p)); }
  SPRE_INLINE Index index(const char* p) {
    return reinterpret_cast<const int32_t*>(p + kCacheLine);
  }
  SPRE_INLINE Floats dot(Floats a, Input x, Index i, Weights w) {
    return quads([&](int q) {
      const auto at = [&](int lane) { return x[Bytes ? (i[lane] & 0xff) / 4 : i[lane]]; };
      return Quad{at(4 * q), at(4 * q + 1), at(4 * q + 2), at(4 * q + 3)} * w.v[q] + a.v[q];
    });
  }
};

using Float32Traits = GatherTraits<16>;
using HalvedFloat32Traits = Float32Traits;
using QuarteredFloat32Traits = GatherTraits<16, true>;
using WideFloat32Traits = GatherTraits<32>;

inline constexpr int kMostSections = 1;  // see vector_avx2.h
inline constexpr int kRegisters = 4;
// See vector_avx512.h.
inline constexpr int kMaxSums = 4;
inline constexpr int kMaxBlocks = 1;
inline constexpr int kMaxPixels = 4;
inline constexpr int kReadOnceSums = 4;
inline constexpr int64_t kPassBytes = 0;
inline constexpr int kScannedPixels = 0;

}  // namespace spre
