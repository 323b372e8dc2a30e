// How many of the largest magnitudes of a weight there are at each tap.
#pragma once

#include <algorithm>
#include <cstring>

#include "magnitude.h"
#include "team.h"
#include "training.h"

namespace spre {

// A histogram of the highest bits tells in which bin the smallest magnitude lies that is kept. Then
// what lies above it is counted, and what lies in it, a few numbers of a hundred, copied; among
// those the next bits decide, and in the end the order.
template <class Bits>
class CountLargest {
 public:
  CountLargest(const Weight& weight, int64_t kept, void* scratch, int64_t threads)
      : w_(weight), kept_(kept), threads_(threads), parts_(static_cast<Part*>(scratch)) {
    char* behind = static_cast<char*>(scratch) + threads * sizeof(Part);
    sums_ = reinterpret_cast<int32_t*>(behind);
    candidates_ = reinterpret_cast<Candidate*>(behind + sums_bytes(weight, threads));
    std::memset(scratch, 0, threads * sizeof(Part) + sums_bytes(weight, threads));
  }

  static int64_t scratch_bytes(const Weight& w, int64_t threads) {
    const int64_t most_candidates = w.filters * w.channels * w.taps;
    return threads * sizeof(Part) + sums_bytes(w, threads) + most_candidates * sizeof(Candidate);
  }

  // One thread's share: what is certain after the first digit is counted, the rest copied.
  void run(const Worker& worker, Barrier& barrier) {
    Part& own = parts_[worker.thread];
    const int64_t first = worker.first(w_.filters) * w_.channels * w_.taps;
    const int64_t last = worker.last(w_.filters) * w_.channels * w_.taps;
    fill_bins(first, last, own.bins);
    barrier.wait(worker.threads);
    own.cut = top_cut();
    own.candidates = own.end = candidates_ + first;
    int32_t* sums = sums_ + worker.thread * row();
    const int64_t size = w_.channels_last ? w_.channels : row();
    for (int64_t from = first; from < last; from += size) {
      const int64_t to = std::min(last, from + size);
      count_above(from, to, own.cut.bin, sums);
      own.end = collect(from, to, own.cut.bin, own.end);
    }
  }

  // After all shares, on one thread.
  void finish(int64_t* per_tap) {
    std::fill(per_tap, per_tap + w_.taps, 0);
    for (int64_t i = 0; i < threads_ * row(); ++i) per_tap[i % row() % w_.taps] += sums_[i];
    Candidate* end = candidates_;
    for (int64_t i = 0; i < threads_; ++i)
      end = std::copy(parts_[i].candidates, parts_[i].end, end);
    Cut cut = parts_[0].cut;
    for (int shift = kShift; shift > 0; shift = std::max(0, shift - kDigit))
      end = next_digit(end, shift, cut, per_tap);
    if (end - candidates_ > cut.kept)
      std::nth_element(candidates_, candidates_ + cut.kept, end,
                       [&](Candidate a, Candidate b) { return order(a) < order(b); });
    for (int64_t i = 0; i < cut.kept; ++i) ++per_tap[tap(candidates_[i])];
  }

 private:
  static constexpr int kDigit = 12, kBins = 1 << kDigit;
  static constexpr int kShift = 8 * sizeof(Bits) - 1 - kDigit;  // of the first digit
  static constexpr int kCopies = 4;  // of a histogram: adding to a place waits for the last time

  struct Candidate {
    Bits magnitude;
    int32_t index;  // in memory
  };

  // The bin of the smallest magnitude that is kept, and how many of those in it are.
  struct Cut {
    int64_t bin, kept;
  };

  struct alignas(kCacheLine) Part {
    uint32_t bins[kCopies][kBins];
    Cut cut;
    Candidate *candidates, *end;
  };

  // The length of a row of sums: whole kernels, and enough of them for long loops.
  static int64_t row(const Weight& w) {
    return w.channels_last ? w.taps : w.taps * round_up(ceil_div(128, w.taps), 16);
  }
  int64_t row() const { return row(w_); }
  static int64_t sums_bytes(const Weight& w, int64_t threads) {
    return round_up(threads * row(w) * sizeof(int32_t), kCacheLine);
  }

  const Bits* numbers() const { return static_cast<const Bits*>(w_.numbers); }
  int64_t tap(Candidate c) const {
    return (w_.channels_last ? c.index / w_.channels : c.index) % w_.taps;
  }
  // The index in the order filter, channel, tap.
  int64_t order(Candidate c) const {
    if (!w_.channels_last) return c.index;
    const int64_t filter = c.index / (w_.taps * w_.channels), channel = c.index % w_.channels;
    return (filter * w_.channels + channel) * w_.taps + tap(c);
  }

  void fill_bins(int64_t first, int64_t last, uint32_t (*bins)[kBins]) const {
    const Bits *from = numbers() + first, *const end = numbers() + last;
    for (; end - from >= kCopies; from += kCopies)
      UNROLLED_FOR (int i = 0; i < kCopies; ++i) ++bins[i][magnitude(from[i]) >> kShift];
    for (; from < end; ++from) ++bins[0][magnitude(*from) >> kShift];
  }

  Cut top_cut() const {
    const auto size_of = [&](int64_t bin) {
      int64_t size = 0;
      for (int64_t i = 0; i < threads_; ++i)
        for (const auto& bins : parts_[i].bins) size += bins[bin];
      return size;
    };
    return cut_at(kBins - 1, kept_, size_of);
  }

  template <class SizeOf>
  static Cut cut_at(int64_t bin, int64_t kept, SizeOf size_of) {
    int64_t size = size_of(bin);
    for (; size < kept; size = size_of(--bin)) kept -= size;
    return {bin, kept};
  }

  void count_above(int64_t first, int64_t last, int64_t bin, int32_t* __restrict sums) const {
    const Bits* __restrict from = numbers() + first;
    const Bits most = static_cast<Bits>(bin << kShift | ((int64_t{1} << kShift) - 1));
    if (w_.channels_last) {
      int32_t sum = 0;
      for (int64_t i = 0; i < last - first; ++i) sum += magnitude(from[i]) > most ? 1 : 0;
      sums[first / w_.channels % w_.taps] += sum;
    } else {
      for (int64_t i = 0; i < last - first; ++i) sums[i] += magnitude(from[i]) > most ? 1 : 0;
    }
  }

  // Copies what lies in the bin. In most runs of eight numbers there is nothing.
  Candidate* collect(int64_t first, int64_t last, int64_t bin, Candidate* to) const {
    constexpr int64_t kBlock = 64, kRun = 8;
    const Bits* __restrict numbers = this->numbers();
    const auto append = [&](int64_t i) {
      *to = {magnitude(numbers[i]), static_cast<int32_t>(i)};
      to += magnitude(numbers[i]) >> kShift == bin;
    };
    for (; last - first >= kBlock; first += kBlock) {
      uint8_t inside[kBlock];
      for (int64_t i = 0; i < kBlock; ++i)
        inside[i] = magnitude(numbers[first + i]) >> kShift == static_cast<Bits>(bin) ? 1 : 0;
      for (int64_t run = 0; run < kBlock; run += kRun) {
        uint64_t any;
        static_assert(sizeof(any) == kRun);
        std::memcpy(&any, inside + run, kRun);
        if (any == 0) continue;
        for (int64_t i = run; i < run + kRun; ++i) append(first + i);
      }
    }
    for (; first < last; ++first) append(first);
    return to;
  }

  // Counts the candidates that the digit below `shift` puts above the cut, and keeps those in it.
  Candidate* next_digit(Candidate* end, int shift, Cut& cut, int64_t* per_tap) const {
    const int next = std::max(0, shift - kDigit);
    const int64_t most = (int64_t{1} << (shift - next)) - 1;
    const auto digit = [&](Candidate c) { return c.magnitude >> next & most; };
    uint32_t bins[kBins] = {};
    for (const Candidate* c = candidates_; c < end; ++c) ++bins[digit(*c)];
    cut = cut_at(most, cut.kept, [&](int64_t bin) { return bins[bin]; });
    Candidate* to = candidates_;
    for (const Candidate* c = candidates_; c < end; ++c) {
      if (digit(*c) > cut.bin) ++per_tap[tap(*c)];
      if (digit(*c) == cut.bin) *to++ = *c;
    }
    return to;
  }

  const Weight& w_;
  const int64_t kept_, threads_;
  Part* parts_;
  int32_t* sums_;
  Candidate* candidates_;
};

}  // namespace spre
