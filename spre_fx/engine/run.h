// The C interface, for whichever vectors and element types were included before.
#pragma once

#include <algorithm>
#include <type_traits>

#include "dense_conv.h"
#include "planar_conv.h"
#include "pointwise.h"
#include "sparse_conv.h"
#include "tiling.h"
#include "window.h"
#include "winograd_conv.h"

namespace spre {

template <class P>
P* at(void* const* buffers, int64_t buffer, int64_t offset) {
  return buffer < 0 ? nullptr : reinterpret_cast<P*>(static_cast<char*>(buffers[buffer]) + offset);
}

template <class Sparse, class Halved, class Quartered, class Wide, class Dense>
struct Runner {
  using X = typename Sparse::Element;

  // `then(traits)`, those that read the weights of a sparse conv.
  template <class Then>
  static auto with_traits(const Step& s, Then then) {
    if (s.channel_group != Sparse::kGroup) return then(Wide());
    if (s.parts == 4) return then(Quartered());
    return s.parts == 2 ? then(Halved()) : then(Sparse());
  }

  static int64_t scratch(const Step& step, int64_t threads) {
    const Step s = with_tile(step, threads);
    switch (s.kind) {
      case kSparseConv:
        if (s.planar) return PlanarConv(s).scratch_bytes();
        return with_traits(
            s, [&](auto traits) { return SparseConv<decltype(traits)>(s).scratch_bytes(); });
      case kDenseConv:
        return DenseConv<Dense>(s).scratch_bytes();
      case kWinogradConv:
        return s.winograd == 2 ? WinogradConv<2>(s).scratch_bytes()
                               : WinogradConv<4>(s).scratch_bytes();
      default:
        return 0;
    }
  }

  static void run(const Step& step, void* const* buffers, const Worker& worker) {
    const Step s = with_tile(step, worker.planned);
    const X* x = at<const X>(buffers, s.x, s.x_offset);
    X* y = at<X>(buffers, s.y, s.y_offset);
    const Epilogue<X> epilogue = {y,
                                  s.y_stride,
                                  at<const X>(buffers, s.residual, s.residual_offset),
                                  s.residual_stride,
                                  at<const float>(buffers, s.bias, s.bias_offset),
                                  s.activation,
                                  s.out_channels};
    const char* bytes = at<const char>(buffers, s.weight, s.weight_offset);
    const X* weight = reinterpret_cast<const X*>(bytes);
    switch (s.kind) {
      case kSparseConv:
        if constexpr (std::is_same_v<X, float>)
          if (s.planar) return PlanarConv(s).run(x, bytes, epilogue, worker);
        return with_traits(s, [&](auto traits) {
          SparseConv<decltype(traits)>(s).run(x, bytes, epilogue, worker);
        });
      case kDenseConv:
        return DenseConv<Dense>(s).run(x, weight, epilogue, worker);
      case kWinogradConv:
        if constexpr (std::is_same_v<X, float>) {
          if (s.winograd == 2) return WinogradConv<2>(s).run(x, weight, epilogue, worker);
          return WinogradConv<4>(s).run(x, weight, epilogue, worker);
        }
        return;
      case kDepthwiseConv:
        return WindowStep<DepthwiseWindow, X>(s).run(x, weight, epilogue, worker);
      case kMaxPool:
        return WindowStep<MaxWindow, X>(s).run(x, weight, epilogue, worker);
      case kAveragePool:
        return WindowStep<AverageWindow, X>(s).run(x, weight, epilogue, worker);
      case kAffine:
        return run_affine<X>(s, x, reinterpret_cast<const float*>(bytes), epilogue, worker);
      case kCopy:
        return run_copy<X>(s, x, y, worker);
      default:
        return;
    }
  }
};

using Float32Runner = Runner<Float32Traits, HalvedFloat32Traits, QuarteredFloat32Traits,
                             WideFloat32Traits, Float32Numbers>;
#ifdef SPRE_HAS_BFLOAT16
using BFloat16Runner =
    Runner<BFloat16Traits, BFloat16Traits, BFloat16Traits, BFloat16Traits, BFloat16Numbers>;
#endif

inline void run_step(const Step& s, void* const* buffers, const Worker& worker) {
#ifdef SPRE_HAS_BFLOAT16
  if (s.type == kBFloat16) return BFloat16Runner::run(s, buffers, worker);
#endif
  Float32Runner::run(s, buffers, worker);
}

inline int64_t step_scratch(const Step& s, int64_t threads) {
#ifdef SPRE_HAS_BFLOAT16
  if (s.type == kBFloat16) return BFloat16Runner::scratch(s, threads);
#endif
  return Float32Runner::scratch(s, threads);
}

// What one thread needs for any of the steps: a whole number of cache lines.
inline int64_t thread_scratch(const Step* steps, int64_t count, int64_t threads) {
  int64_t most = 0;
  for (int64_t i = 0; i < count; ++i) most = std::max(most, step_scratch(steps[i], threads));
  return round_up(most, kCacheLine) + kCacheLine;
}

struct Job {
  const Step* steps;
  int64_t count;
  void* const* buffers;
  char* scratch;
  int64_t thread_scratch;
  int64_t planned;
  Barrier* barrier;
};

inline void work(const Job& job, int64_t thread, int64_t threads) {
  const Worker worker{thread, threads, job.planned, job.scratch + thread * job.thread_scratch};
  for (int64_t i = 0; i < job.count; ++i) {
    run_step(job.steps[i], job.buffers, worker);
    if (i + 1 < job.count) job.barrier->wait(threads);
  }
}

}  // namespace spre

SPRE_EXPORT int64_t spre_version() { return 10; }

SPRE_EXPORT const char* spre_isa() { return spre::kIsa; }

SPRE_EXPORT int64_t spre_supports(const char* isa) {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (std::strcmp(isa, "avx512") == 0) return avx512;
  if (std::strcmp(isa, "avx512_bf16") == 0) return avx512 && __builtin_cpu_supports("avx512bf16");
  if (std::strcmp(isa, "avx2") == 0)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return std::strcmp(isa, "portable") == 0;
}

SPRE_EXPORT int64_t spre_takes(const spre::Step* step) {
  const spre::Step& s = *step;
#ifdef SPRE_HAS_BFLOAT16
  const bool bfloat16 = s.type == spre::kBFloat16;
#else
  const bool bfloat16 = false;
#endif
  if (s.type != spre::kFloat32 && !bfloat16) return 0;
  if (s.kind < spre::kSparseConv || s.kind > spre::kWinogradConv) return 0;
  const bool planes = s.x_planes || s.y_planes || s.residual_planes;
  if (planes && (s.kind != spre::kSparseConv || !s.planar)) return 0;
  if (s.y_planes && s.residual >= 0 && !s.residual_planes) return 0;
  if (s.y_planes && s.activation > spre::kRelu6) return 0;
  if (s.kind == spre::kDenseConv) return s.groups == 1 && s.dilation_w == 1 && s.dilation_h == 1;
  if (s.kind == spre::kWinogradConv) return !bfloat16 && spre::winograd_takes(s);
  if (s.kind != spre::kSparseConv) return 1;
  if (s.parts != 1 && s.parts != 2 && s.parts != 4) return 0;
  if (s.channel_group != 16 && s.channel_group != 32) return 0;
  if (s.direct && !spre::may_be_direct(s)) return 0;
  if (s.planar) return !bfloat16 && s.parts == 1;
  if (bfloat16) return s.channel_group == 32 && s.parts == 1;
  return s.parts == 1 || (s.channel_group == 16 && s.slots % s.parts == 0);
}

SPRE_EXPORT int64_t spre_scratch(const spre::Step* steps, int64_t count, int64_t threads) {
  return threads * spre::thread_scratch(steps, count, threads);
}

SPRE_EXPORT void spre_run(const spre::Step* steps, int64_t count, void* const* buffers,
                          void* scratch, int64_t threads, const spre::OpenMP* openmp) {
  spre::Barrier barrier;
  spre::Job job{steps,
                count,
                buffers,
                static_cast<char*>(scratch),
                spre::thread_scratch(steps, count, threads),
                threads,
                &barrier};
  spre::in_parallel(openmp, threads,
                    [&job](int64_t thread, int64_t threads) { spre::work(job, thread, threads); });
}
