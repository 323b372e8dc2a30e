// The C interface of what training asks of a CPU: masks of weights, weights that are masked, and
// convs that compute with what their masks keep.
//
// A mask holds a byte for each weight, 0 or 1, in the same place. Nothing keeps state, and nothing
// but the rounding of a conv's weight gradient depends on the number of threads.
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

// A conv whose weights are masked: W `(filters, channels/groups, kernel_h, kernel_w)` with a mask
// beside it. All three passes compute with the weights that the mask keeps, and with no others.
struct MaskedConv {
  int64_t bytes;  // of a number: 4 or 8
  int64_t images, channels, height, width;
  int64_t filters, out_height, out_width;
  int64_t kernel_h, kernel_w, stride_h, stride_w;
  int64_t padding_h, padding_w, dilation_h, dilation_w;
  int64_t groups;
  int64_t channels_last, weight_channels_last;
};

enum MaskedConvPass : int64_t { kForward = 0, kInputGradient = 1, kWeightGradient = 2 };

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

// y = weight * mask, of `count` numbers of 4 or 8 bytes; y may be the weight.
void spre_mask_weight(const void* weight, const uint8_t* mask, void* y, int64_t bytes,
                      int64_t count, int64_t threads, const spre::OpenMP* openmp);

// y = gradient + decay * (1 - mask) * weight, where the mask is 1 the very gradient; each product
// and sum is rounded; y may be the gradient.
void spre_decay_gradient(const void* gradient, const void* weight, const uint8_t* mask, void* y,
                         int64_t bytes, int64_t count, double decay, int64_t threads,
                         const spre::OpenMP* openmp);

// The gradients of y = weight * mask, the mask being of numbers too: that of y times the mask, and
// times the weight where the mask is not 0, 0 elsewhere.
void spre_product_gradients(const void* gradient, const void* weight, const void* mask,
                            void* of_weight, void* of_mask, int64_t bytes, int64_t count,
                            int64_t threads, const spre::OpenMP* openmp);

// How many images the passes of a conv take at a time, where a number has so many bytes. A last
// group that is smaller takes as long as a full one.
int64_t spre_images_together(int64_t bytes);

// The bytes of scratch, aligned to 64, of a pass over as many weights as the mask keeps.
int64_t spre_masked_conv_scratch(const spre::MaskedConv* conv, int64_t pass, int64_t kept,
                                 int64_t threads);

// The number of set bytes of a mask.
int64_t spre_count_kept(const uint8_t* mask, int64_t count);

// Forward: x, weight, bias (or null) to y. Input gradient: gradient of y, weight to that of x.
// Weight gradient: x, gradient of y to that of the weight, 0 where the mask is 0.
void spre_masked_conv(const spre::MaskedConv* conv, int64_t pass, const void* x,
                      const void* y_gradient, const void* weight, const uint8_t* mask,
                      const void* bias, void* result, int64_t kept, void* scratch, int64_t threads,
                      const spre::OpenMP* openmp);
}
