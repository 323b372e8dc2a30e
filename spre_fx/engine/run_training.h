// The C interface of training.h.
#pragma once

#include "count_largest.h"
#include "masked_conv.h"
#include "masked_weight.h"
#include "nm_mask.h"
#include "team.h"
#include "training.h"

namespace spre {

// `then` of an integer of so many bytes.
template <class Then>
auto with_bits(int64_t bytes, Then then) {
  if (bytes == 2) return then(int16_t{});
  if (bytes == 4) return then(int32_t{});
  return then(int64_t{});
}

// `then` of a floating-point number of so many bytes.
template <class Then>
void with_number(int64_t bytes, Then then) {
  bytes == sizeof(float) ? then(float{}) : then(double{});
}

// `then(first, size)` on each thread's share of so many numbers.
template <class Then>
void in_parts(const OpenMP* openmp, int64_t threads, int64_t count, Then then) {
  in_parallel(openmp, threads, [&](int64_t thread, int64_t of) {
    const Worker worker{thread, of, threads, nullptr};
    then(worker.first(count), worker.last(count) - worker.first(count));
  });
}

}  // namespace spre

SPRE_EXPORT int64_t spre_largest_m() { return spre::kLargestM; }

SPRE_EXPORT void spre_nm_mask(const spre::Weight* weight, int64_t n, int64_t m, uint8_t* mask,
                              int64_t threads, const spre::OpenMP* openmp) {
  spre::with_bits(weight->bytes, [&](auto bits) {
    spre::in_parallel(openmp, threads, [&](int64_t thread, int64_t of) {
      const spre::Worker worker{thread, of, threads, nullptr};
      spre::run_nm_mask<decltype(bits)>(*weight, n, m, mask, worker);
    });
  });
}

SPRE_EXPORT int64_t spre_count_scratch(const spre::Weight* weight, int64_t threads) {
  return spre::with_bits(weight->bytes, [&](auto bits) {
    return spre::CountLargest<decltype(bits)>::scratch_bytes(*weight, threads);
  });
}

SPRE_EXPORT void spre_count_largest(const spre::Weight* weight, int64_t kept, int64_t* per_tap,
                                    void* scratch, int64_t threads, const spre::OpenMP* openmp) {
  spre::with_bits(weight->bytes, [&](auto bits) {
    spre::CountLargest<decltype(bits)> count(*weight, kept, scratch, threads);
    spre::Barrier barrier;
    spre::in_parallel(openmp, threads, [&](int64_t thread, int64_t of) {
      count.run(spre::Worker{thread, of, threads, nullptr}, barrier);
    });
    count.finish(per_tap);
  });
}

SPRE_EXPORT void spre_mask_weight(const void* weight, const uint8_t* mask, void* y, int64_t bytes,
                                  int64_t count, int64_t threads, const spre::OpenMP* openmp) {
  spre::with_number(bytes, [&](auto number) {
    const auto* from = static_cast<const decltype(number)*>(weight);
    auto* to = static_cast<decltype(number)*>(y);
    spre::in_parts(openmp, threads, count, [&](int64_t first, int64_t size) {
      spre::mask_weight(from + first, mask + first, to + first, size);
    });
  });
}

SPRE_EXPORT void spre_decay_gradient(const void* gradient, const void* weight, const uint8_t* mask,
                                     void* y, int64_t bytes, int64_t count, double decay,
                                     int64_t threads, const spre::OpenMP* openmp) {
  spre::with_number(bytes, [&](auto number) {
    const auto* of_y = static_cast<const decltype(number)*>(gradient);
    const auto* from = static_cast<const decltype(number)*>(weight);
    auto* to = static_cast<decltype(number)*>(y);
    spre::in_parts(openmp, threads, count, [&](int64_t first, int64_t size) {
      spre::decay_gradient(of_y + first, from + first, mask + first, to + first, size,
                           static_cast<decltype(number)>(decay));
    });
  });
}

SPRE_EXPORT void spre_product_gradients(const void* gradient, const void* weight, const void* mask,
                                        void* of_weight, void* of_mask, int64_t bytes,
                                        int64_t count, int64_t threads,
                                        const spre::OpenMP* openmp) {
  spre::with_number(bytes, [&](auto number) {
    using Number = decltype(number);
    spre::in_parts(openmp, threads, count, [&](int64_t first, int64_t size) {
      spre::product_gradients(
          static_cast<const Number*>(gradient) + first, static_cast<const Number*>(weight) + first,
          static_cast<const Number*>(mask) + first, static_cast<Number*>(of_weight) + first,
          static_cast<Number*>(of_mask) + first, size);
    });
  });
}

SPRE_EXPORT int64_t spre_images_together(int64_t bytes) { return spre::kVectorBytes / bytes; }

SPRE_EXPORT int64_t spre_count_kept(const uint8_t* mask, int64_t count) {
  return spre::count_kept(mask, count);
}

SPRE_EXPORT int64_t spre_masked_conv_scratch(const spre::MaskedConv* conv, int64_t pass,
                                             int64_t kept, int64_t threads) {
  int64_t bytes = 0;
  spre::with_number(conv->bytes, [&](auto number) {
    bytes = spre::MaskedConvRun<decltype(number)>(*conv, pass).scratch_bytes(kept, threads);
  });
  return bytes;
}

SPRE_EXPORT void spre_masked_conv(const spre::MaskedConv* conv, int64_t pass, const void* x,
                                  const void* y_gradient, const void* weight, const uint8_t* mask,
                                  const void* bias, void* result, int64_t kept, void* scratch,
                                  int64_t threads, const spre::OpenMP* openmp) {
  spre::with_number(conv->bytes, [&](auto number) {
    using Number = decltype(number);
    spre::MaskedConvRun<Number>(*conv, pass)
        .run(static_cast<const Number*>(x), static_cast<const Number*>(y_gradient),
             static_cast<const Number*>(weight), mask, static_cast<const Number*>(bias),
             static_cast<Number*>(result), kept, static_cast<char*>(scratch), threads, openmp);
  });
}
