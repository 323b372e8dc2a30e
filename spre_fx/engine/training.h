// The C interface of what training asks of a CPU: masks of weights, and weights that are masked.
//
// A mask holds a byte for each weight, 0 or 1, in the same place. Nothing keeps state, and nothing
// depends on the number of threads.
#pragma once

#include <cstdint>

#include "engine.h"

namespace spre {

// A weight in memory: [filters][channels][taps], or [filters][taps][channels] where it is
// channels-last. Magnitudes are compared by their bits, so of a number only its size matters.
struct Weight {
  const void* numbers;
  int64_t bytes;  // of a number: 2, 4 or 8
  int64_t filters, channels, taps;
  int64_t channels_last;
};

}  // namespace spre

extern "C" {

// The largest M that there is an N:M mask for.
int64_t spre_largest_m();

// The N:M mask: of every M consecutive channels the N largest magnitudes, the lower channel first
// among equals. The last channels are a group too where M does not divide their number.
void spre_nm_mask(const spre::Weight* weight, int64_t n, int64_t m, uint8_t* mask, int64_t threads,
                  const spre::OpenMP* openmp);

// The bytes of scratch, aligned to 64, that counting needs on so many threads.
int64_t spre_count_scratch(const spre::Weight* weight, int64_t threads);

// Of the `kept` largest magnitudes of a weight, how many there are at each tap. Among equals the
// lower index in the order filter, channel, tap comes first. 1 <= kept <= all there are < 2^31.
void spre_count_largest(const spre::Weight* weight, int64_t kept, int64_t* per_tap, void* scratch,
                        int64_t threads, const spre::OpenMP* openmp);

// y = weight * mask, of `count` numbers of 4 or 8 bytes.
void spre_mask_weight(const void* weight, const uint8_t* mask, void* y, int64_t bytes,
                      int64_t count, int64_t threads, const spre::OpenMP* openmp);

// y = gradient + decay * (1 - mask) * weight, where the mask is 1 the very gradient; each product
// and sum is rounded.
void spre_decay_gradient(const void* gradient, const void* weight, const uint8_t* mask, void* y,
                         int64_t bytes, int64_t count, double decay, int64_t threads,
                         const spre::OpenMP* openmp);
}
