// How many of the largest magnitudes of a weight there are at each tap.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <type_traits>

#include "magnitude.h"
#include "team.h"
#include "training.h"

namespace spre {

// A sample tells between which bounds the smallest magnitude that is kept must lie. What is above
// them is counted, and what lies within, a few numbers of a hundred, copied; among those digit
// after digit decides, and in the end the order. Where the sample misled, all numbers are taken as
// one.
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
    return threads * sizeof(Part) + sums_bytes(w, threads) + count(w) * sizeof(Candidate);
  }

  // One thread's share: what is certainly kept is counted, what may be is copied.
  void run(const Worker& worker, Barrier& barrier) {
    const int64_t filter = w_.channels * w_.taps;
    const int64_t first = worker.first(w_.filters) * filter;
    const int64_t last = worker.last(w_.filters) * filter;
    const int64_t lines = count(w_) / kLine;
    if (!split(first, last, lines / kSampledLines | 1, worker, barrier))
      split(first, last, 1, worker, barrier);
  }

  // After all shares, on one thread.
  void finish(int64_t* per_tap) {
    std::fill(per_tap, per_tap + w_.taps, 0);
    for (int64_t i = 0; i < threads_ * row(w_); ++i) per_tap[tap_of_sum(i % row(w_))] += sums_[i];
    Candidate* end = candidates_;
    for (int64_t i = 0; i < threads_; ++i)
      end = std::copy(parts_[i].candidates, parts_[i].end, end);
    Cut cut = {0, kept_ - sum_of([](const Part& part) { return part.above; })};
    for (int shift = width(parts_[0].bounds); shift > 0; shift = std::max(0, shift - kDigit))
      end = next_digit(end, shift, cut, per_tap);
    if (end - candidates_ > cut.kept)
      std::nth_element(candidates_, candidates_ + cut.kept, end,
                       [&](Candidate a, Candidate b) { return order(a) < order(b); });
    for (int64_t i = 0; i < cut.kept; ++i) ++per_tap[tap(candidates_[i])];
  }

 private:
  static constexpr int kTopBits = 14, kBins = 1 << kTopBits;
  static constexpr int kShift = 8 * sizeof(Bits) - 1 - kTopBits;  // to the bin of a magnitude
  static constexpr int64_t kPartsOfBin = kShift < 8 ? 1 : 16;     // short numbers have none
  static constexpr int kDigit = 12;                               // bits, of candidates
  static constexpr int64_t kLine = kCacheLine / sizeof(Bits), kSampledLines = 4096;
  static constexpr int64_t kLinesAhead = 16;  // of a sample, where no CPU foresees the next one
  static constexpr int64_t kBlock = 64;       // numbers that are compared together

  struct Candidate {
    Bits magnitude;  // above the lower bound
    int32_t index;   // in memory
  };

  // Between which magnitudes, these included, the smallest that is kept may lie.
  struct Bounds {
    Bits lowest, highest;
  };

  // The digit of the smallest magnitude that is kept, and how many of those that have it are.
  struct Cut {
    int64_t digit, kept;
  };

  struct alignas(kCacheLine) Part {
    uint32_t bins[kBins];
    Bounds bounds;
    Candidate *candidates, *end;
    int64_t sampled, above;
  };

  static int64_t count(const Weight& w) { return w.filters * w.channels * w.taps; }

  // One thread's sums: of whole kernels that fill whole blocks or, channels-last, of a block for
  // each tap.
  static int64_t row(const Weight& w) { return w.taps * kBlock; }
  int64_t tap_of_sum(int64_t place) const {
    return w_.channels_last ? place / kBlock : place % w_.taps;
  }
  static int64_t sums_bytes(const Weight& w, int64_t threads) {
    return round_up(threads * row(w) * sizeof(int32_t), kCacheLine);
  }

  const Bits* numbers() const { return static_cast<const Bits*>(w_.numbers); }
  int64_t tap_of(int64_t index) const {
    return (w_.channels_last ? index / w_.channels : index) % w_.taps;
  }
  int64_t tap(Candidate c) const { return tap_of(c.index); }
  // The index in the order filter, channel, tap.
  int64_t order(Candidate c) const {
    if (!w_.channels_last) return c.index;
    const int64_t filter = c.index / (w_.taps * w_.channels), channel = c.index % w_.channels;
    return (filter * w_.channels + channel) * w_.taps + tap(c);
  }

  // Whether the smallest magnitude that is kept lies within the bounds that one cache line of every
  // `stride` suggests; with all of them it does.
  bool split(int64_t first, int64_t last, int64_t stride, const Worker& worker, Barrier& barrier) {
    Part& own = parts_[worker.thread];
    std::fill(own.bins, own.bins + kBins, 0);
    own.sampled = 0;
    for (int64_t line = first; line < last; line += stride * kLine) {
      const int64_t end = std::min(line + kLine, last);
      __builtin_prefetch(numbers() + std::min(line + kLinesAhead * stride * kLine, last - 1));
      for (int64_t i = line; i < end; ++i) ++own.bins[magnitude(numbers()[i]) >> kShift];
      own.sampled += end - line;
    }
    barrier.wait(worker.threads);
    own.bounds = bounds(stride);
    own.candidates = own.end = candidates_ + first;
    int32_t* sums = sums_ + worker.thread * row(w_);
    std::fill(sums, sums + row(w_), 0);
    const int64_t size = w_.channels_last ? w_.channels : row(w_);
    for (int64_t from = first; from < last; from += size) {
      const int64_t to = std::min(last, from + size);
      if (w_.channels_last)
        own.end = split_row(from, to, own.bounds, sums + tap_of(from) * kBlock, 0, own.end);
      else
        own.end = split_row(from, to, own.bounds, sums, kBlock, own.end);
    }
    own.above = std::accumulate(sums, sums + row(w_), int64_t{0});
    barrier.wait(worker.threads);
    const int64_t above = sum_of([](const Part& part) { return part.above; });
    const int64_t within = sum_of([](const Part& part) { return part.end - part.candidates; });
    return above <= kept_ && kept_ <= above + within;
  }

  template <class Number>
  int64_t sum_of(Number number) const {
    int64_t sum = 0;
    for (int64_t i = 0; i < threads_; ++i) sum += number(parts_[i]);
    return sum;
  }

  // What a sample says of the number of those that are kept is some standard deviations off.
  Bounds bounds(int64_t stride) const {
    const int64_t sampled = sum_of([](const Part& part) { return part.sampled; });
    const double share = static_cast<double>(kept_) / count(w_);
    const double deviation = stride > 1 ? std::sqrt(share * (1 - share) * sampled) : 0;
    const int64_t rank = stride > 1 ? std::llround(share * sampled) : kept_;
    const int64_t margin = std::llround(4 * deviation);
    const int64_t parts = stride > 1 ? kPartsOfBin : 1;
    int64_t bin = kBins - 1, above = 0;
    const Bits highest = find(rank - margin, parts, bin, above).highest;
    return {find(rank + margin, parts, bin, above).lowest, highest};
  }

  // The part of a bin in which the number of this rank in the sample lies, 1 being the largest, if
  // the numbers of a bin lie evenly in it. The search begins with `bin`, `above` which so many lie.
  Bounds find(int64_t rank, int64_t parts, int64_t& bin, int64_t& above) const {
    const auto size_of = [&](int64_t bin) {
      return sum_of([&](const Part& part) { return part.bins[bin]; });
    };
    int64_t size = size_of(bin);
    for (; bin > 0 && above + size < rank; size = size_of(--bin)) above += size;
    const int64_t from_above = (rank - above) * parts / std::max<int64_t>(size, 1);
    const int64_t part = parts - 1 - std::clamp<int64_t>(from_above, 0, parts - 1);
    const int64_t width = (int64_t{1} << kShift) / parts, lowest = (bin << kShift) + part * width;
    return {static_cast<Bits>(lowest), static_cast<Bits>(lowest + width - 1)};
  }

  // How many bits a candidate has.
  static int width(Bounds bounds) {
    int bits = 1;
    while ((bounds.highest - bounds.lowest) >> bits != 0) ++bits;
    return bits;
  }

  // Counts what is above the bounds, each block in sums `step` behind those of the one before, and
  // copies what lies within.
  Candidate* split_row(int64_t first, int64_t last, Bounds bounds, int32_t* sums, int64_t step,
                       Candidate* to) const {
    const auto split_block = [&](auto size) {
      uint8_t within[kBlock];
      count_above(numbers() + first, size, bounds, sums);
      find_within(numbers() + first, size, bounds, within);
      to = collect(first, within, size, bounds, to);
    };
    for (; first + kBlock <= last; first += kBlock, sums += step)
      split_block(std::integral_constant<int64_t, kBlock>());  // compilers make most of it
    if (first < last) split_block(last - first);
    return to;
  }

  template <class Size>
  static void count_above(const Bits* __restrict numbers, Size size, Bounds bounds,
                          int32_t* __restrict sums) {
    for (int64_t i = 0; i < size; ++i) sums[i] += magnitude(numbers[i]) > bounds.highest ? 1 : 0;
  }

  // Not in the loop above: numbers of one size make faster loops.
  template <class Size>
  static void find_within(const Bits* __restrict numbers, Size size, Bounds bounds,
                          uint8_t* __restrict within) {
    for (int64_t i = 0; i < size; ++i) {
      const Bits m = magnitude(numbers[i]);
      within[i] =
          static_cast<uint8_t>((m >= bounds.lowest ? 1 : 0) & (m <= bounds.highest ? 1 : 0));
    }
  }

  // Most words of `within` are 0. In the others no branch asks which bytes are.
  template <class Size>
  Candidate* collect(int64_t first, const uint8_t* within, Size size, Bounds bounds,
                     Candidate* to) const {
    constexpr int64_t kWord = sizeof(uint64_t);
    for (int64_t i = 0; i < size; i += kWord) {
      uint64_t word = 0;
      std::memcpy(&word, within + i, std::min<int64_t>(kWord, size - i));
      if (word == 0) continue;
      for (int64_t j = i; j < std::min<int64_t>(i + kWord, size); ++j) {
        const Bits above_lowest =
            static_cast<Bits>(magnitude(numbers()[first + j]) - bounds.lowest);
        *to = {above_lowest, static_cast<int32_t>(first + j)};
        to += within[j];
      }
    }
    return to;
  }

  // Counts the candidates that the digit below `shift` puts above the cut, and keeps those in it.
  Candidate* next_digit(Candidate* end, int shift, Cut& cut, int64_t* per_tap) const {
    const int next = std::max(0, shift - kDigit);
    const int64_t most = (int64_t{1} << (shift - next)) - 1;
    const auto digit = [&](Candidate c) { return c.magnitude >> next & most; };
    uint32_t sizes[1 << kDigit] = {};
    for (const Candidate* c = candidates_; c < end; ++c) ++sizes[digit(*c)];
    for (cut.digit = most; sizes[cut.digit] < cut.kept; --cut.digit) cut.kept -= sizes[cut.digit];
    Candidate* to = candidates_;
    for (const Candidate* c = candidates_; c < end; ++c) {
      if (digit(*c) > cut.digit) ++per_tap[tap(*c)];
      if (digit(*c) == cut.digit) *to++ = *c;
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
