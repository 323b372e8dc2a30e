// The threads that run a program together, and how they wait for one another.
#pragma once

#include <atomic>

#include "types.h"

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#define SPRE_PAUSE() _mm_pause()
#else
#define SPRE_PAUSE() ((void)0)
#endif
#include <sched.h>

namespace spre {

// Threads spin, since the next step is microseconds away, and give way where they wait for longer:
// with more threads than cores the one that is waited for may not be running.
class Barrier {
 public:
  void wait(int64_t threads) {
    if (threads == 1) return;
    const int64_t generation = generation_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      generation_.store(generation + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; generation_.load(std::memory_order_acquire) == generation; ++spins) {
      if (spins < 4096) {
        SPRE_PAUSE();
      } else {
        sched_yield();
      }
    }
  }

 private:
  alignas(kCacheLine) std::atomic<int64_t> arrived_{0};
  alignas(kCacheLine) std::atomic<int64_t> generation_{0};
};

// One thread's part of the work.
struct Worker {
  int64_t thread;
  int64_t threads;
  int64_t planned;  // threads that the work was cut for: those asked for, if OpenMP gave fewer
  char* scratch;    // its own

  // Its share [first, last) of so many equal tasks: the same one in every step, so that what a
  // thread wrote in one step it finds in its own cache in the next.
  int64_t first(int64_t tasks) const { return tasks * thread / threads; }
  int64_t last(int64_t tasks) const { return tasks * (thread + 1) / threads; }
};

// `work(thread, threads)` on so many threads, or fewer if OpenMP gives fewer.
template <class Work>
void in_parallel(const OpenMP* openmp, int64_t threads, const Work& work) {
  if (openmp == nullptr || threads == 1) return work(int64_t{0}, int64_t{1});
  struct Shared {
    const OpenMP* openmp;
    const Work* work;
  } shared = {openmp, &work};
  const auto run = [](void* data) {
    const Shared& s = *static_cast<const Shared*>(data);
    const int64_t thread = s.openmp->thread(), threads = s.openmp->threads();
    (*s.work)(thread, threads);
  };
  openmp->parallel(run, &shared, static_cast<unsigned>(threads), 0);
}

}  // namespace spre
