// The weights that a mask keeps, in the order in which a conv reads them.
#pragma once

#include "training.h"
#include "types.h"

namespace spre {

// Entries in buckets. Those of one bucket have the order of the weights in memory.
template <class Number>
struct Entries {
  int64_t buckets;
  int32_t* start;   // of each bucket and, behind the last, the end
  int32_t* offset;  // what a conv reads with this weight, from where it reads for its output
  int32_t* place;   // of the weight in memory
  Number* value;

  static int64_t bytes(int64_t buckets, int64_t count) {
    return round_up((buckets + 1) * sizeof(int32_t), kCacheLine) +
           2 * round_up(count * sizeof(int32_t), kCacheLine) +
           round_up(count * sizeof(Number), kCacheLine);
  }

  Entries(int64_t buckets, int64_t count, char* memory) : buckets(buckets) {
    const auto take = [&](int64_t size) {
      char* taken = memory;
      memory += round_up(size, kCacheLine);
      return taken;
    };
    start = reinterpret_cast<int32_t*>(take((buckets + 1) * sizeof(int32_t)));
    offset = reinterpret_cast<int32_t*>(take(count * sizeof(int32_t)));
    place = reinterpret_cast<int32_t*>(take(count * sizeof(int32_t)));
    value = reinterpret_cast<Number*>(take(count * sizeof(Number)));
  }
};

// Bucket and offset of a weight: the sums of what its filter and its place in the filter say.
struct EntryRule {
  struct Part {
    int32_t bucket, offset;
  };
  const Part* of_filter;
  const Part* of_place;  // [groups][numbers of a filter]
};

// The number of set bytes of a mask, whose bytes are 0 or 1.
inline int64_t count_kept(const uint8_t* mask, int64_t count) {
  int64_t kept = 0, i = 0;
  for (; i + 8 <= count; i += 8) {
    uint64_t word;
    std::memcpy(&word, mask + i, sizeof(word));
    kept += static_cast<int64_t>(word * 0x0101010101010101u >> 56);
  }
  for (; i < count; ++i) kept += mask[i];
  return kept;
}

// Sorts the weights that a mask keeps into buckets, by counting. Without weights, only the rest.
//
// `kept` takes a filter's places: as many as a filter has weights. No branch asks for a byte of the
// mask: which are set cannot be foretold.
template <class Number>
void fill_entries(const MaskedConv& conv, const Number* weight, const uint8_t* mask,
                  const EntryRule& rule, int32_t* kept, Entries<Number>* entries) {
  const int64_t size = conv.channels / conv.groups * conv.kernel_h * conv.kernel_w;
  const int64_t filters = conv.filters / conv.groups;
  const auto for_each_filter = [&](auto then) {
    for (int64_t o = 0; o < conv.filters; ++o) {
      int64_t count = 0;
      for (int64_t i = 0; i < size; ++i) {
        kept[count] = static_cast<int32_t>(i);
        count += mask[o * size + i];
      }
      then(o, rule.of_place + o / filters * size, count);
    }
  };
  std::fill_n(entries->start, entries->buckets + 1, 0);
  int32_t* next = entries->start + 1;  // of each bucket
  for_each_filter([&](int64_t o, const EntryRule::Part* parts, int64_t count) {
    int32_t* of_filter = next + rule.of_filter[o].bucket;
    for (int64_t i = 0; i < count; ++i) ++of_filter[parts[kept[i]].bucket];
  });
  for (int64_t bucket = 0, sum = 0; bucket < entries->buckets; ++bucket) {
    const int32_t count = next[bucket];
    next[bucket] = static_cast<int32_t>(sum);
    sum += count;
  }
  for_each_filter([&](int64_t o, const EntryRule::Part* parts, int64_t count) {
    int32_t* of_filter = next + rule.of_filter[o].bucket;
    const int32_t shift = rule.of_filter[o].offset;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t place = o * size + kept[i];
      const int32_t entry = of_filter[parts[kept[i]].bucket]++;
      entries->offset[entry] = parts[kept[i]].offset + shift;
      if (weight != nullptr)
        entries->value[entry] = weight[place];
      else
        entries->place[entry] = static_cast<int32_t>(place);
    }
  });
}

}  // namespace spre
