// How many of the largest magnitudes of a weight there are at each tap.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

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
    for (int64_t i = 0; i < threads_ * row(); ++i) per_tap[i % row() % w_.taps] += sums_[i];
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
  static constexpr int kDigit = 12;                               // bits, of candidates
  static constexpr int64_t kLine = kCacheLine / sizeof(Bits), kSampledLines = 2048;

  struct Candidate {
    Bits magnitude;  // above the lower bound
    int32_t index;   // in memory
  };

  // The first and the last bin of those that may hold the smallest magnitude that is kept.
  struct Bounds {
    int64_t low, high;

    Bits lowest() const { return static_cast<Bits>(low << kShift); }
    Bits highest() const {
      return static_cast<Bits>(high << kShift | ((int64_t{1} << kShift) - 1));
    }
  };

  // The digit of the smallest magnitude that is kept, and how many of those that have it are.
  struct Cut {
    int64_t digit, kept;
  };

  struct alignas(kCacheLine) Part {
    uint32_t bins[kBins];
    Bounds bounds;
    Candidate *candidates, *end;
    int64_t above;
  };

  static int64_t count(const Weight& w) { return w.filters * w.channels * w.taps; }

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

  // Whether the smallest magnitude that is kept lies within the bounds that one cache line of every
  // `stride` suggests; with all of them it does.
  bool split(int64_t first, int64_t last, int64_t stride, const Worker& worker, Barrier& barrier) {
    Part& own = parts_[worker.thread];
    std::fill(own.bins, own.bins + kBins, 0);
    for (int64_t line = first; line < last; line += stride * kLine)
      for (int64_t i = line; i < std::min(line + kLine, last); ++i)
        ++own.bins[magnitude(numbers()[i]) >> kShift];
    barrier.wait(worker.threads);
    own.bounds = bounds(stride);
    own.candidates = own.end = candidates_ + first;
    int32_t* sums = sums_ + worker.thread * row();
    std::fill(sums, sums + row(), 0);
    const int64_t size = w_.channels_last ? w_.channels : row();
    for (int64_t from = first; from < last; from += size) {
      const int64_t to = std::min(last, from + size);
      count_above(from, to, own.bounds.highest(), sums);
      own.end = collect(from, to, own.bounds, own.end);
    }
    own.above = std::accumulate(sums, sums + row(), int64_t{0});
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

  // What a sample says of the number of those that are kept is some standard deviations off, of
  // which half the root of its size is the largest there is.
  Bounds bounds(int64_t stride) const {
    const auto size_of = [&](int64_t bin) {
      return sum_of([&](const Part& part) { return part.bins[bin]; });
    };
    int64_t kept = kept_, margin = 0;
    if (stride > 1) {
      int64_t sample = 0;
      for (int64_t bin = 0; bin < kBins; ++bin) sample += size_of(bin);
      kept = static_cast<int64_t>(static_cast<double>(kept_) / count(w_) * sample);
      margin = static_cast<int64_t>(2 * std::sqrt(sample));
    }
    int64_t high = kBins - 1, above = size_of(high);
    while (high > 0 && above < kept - margin) above += size_of(--high);
    int64_t low = high;
    while (low > 0 && above < kept + margin) above += size_of(--low);
    return {low, high};
  }

  // How many bits a candidate has.
  static int width(Bounds bounds) {
    int bits = kShift;
    while (int64_t{1} << (bits - kShift) < bounds.high - bounds.low + 1) ++bits;
    return bits;
  }

  void count_above(int64_t first, int64_t last, Bits most, int32_t* __restrict sums) const {
    const Bits* __restrict from = numbers() + first;
    if (w_.channels_last) {
      int32_t sum = 0;
      for (int64_t i = 0; i < last - first; ++i) sum += magnitude(from[i]) > most ? 1 : 0;
      sums[first / w_.channels % w_.taps] += sum;
    } else {
      for (int64_t i = 0; i < last - first; ++i) sums[i] += magnitude(from[i]) > most ? 1 : 0;
    }
  }

  // Copies what lies within the bounds: a few numbers of each block, or none.
  Candidate* collect(int64_t first, int64_t last, Bounds bounds, Candidate* to) const {
    constexpr int64_t kBlock = 64;
    const Bits* __restrict numbers = this->numbers();
    const Bits lowest = bounds.lowest(), highest = bounds.highest();
    const auto is_within = [&](int64_t i) {
      const Bits m = magnitude(numbers[i]);
      return static_cast<uint8_t>((m >= lowest ? 1 : 0) & (m <= highest ? 1 : 0));
    };
    for (; first < last; first += kBlock) {
      uint8_t within[kBlock] = {};
      if (last - first >= kBlock) {  // the compiler makes most of a size it knows
        for (int64_t i = 0; i < kBlock; ++i) within[i] = is_within(first + i);
      } else {
        for (int64_t i = 0; i < last - first; ++i) within[i] = is_within(first + i);
      }
      for (uint64_t left = bits_of(within); left != 0; left &= left - 1) {
        const int64_t i = first + __builtin_ctzll(left);
        *to++ = {static_cast<Bits>(magnitude(numbers[i]) - lowest), static_cast<int32_t>(i)};
      }
    }
    return to;
  }

  // Bit i is byte i of 64, each 0 or 1. The product moves the eight bytes of a number into its
  // highest byte.
  static uint64_t bits_of(const uint8_t (&bytes)[64]) {
    uint64_t bits = 0;
    for (int i = 0; i < 8; ++i) {
      uint64_t eight = 0;
      for (int j = 0; j < 8; ++j) eight |= static_cast<uint64_t>(bytes[8 * i + j]) << (8 * j);
      bits |= (eight * 0x0102040810204080u >> 56) << (8 * i);
    }
    return bits;
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
