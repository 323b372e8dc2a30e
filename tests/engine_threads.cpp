// Runs programs of every kind of step, and what training asks for, on threads of its own, two at
// once, for ThreadSanitizer: a data race, or a result that depends on the number of threads, is an
// error.
//
// Compiled with -DENGINE="<one of the engine's .cpp files>".
#include ENGINE

#include <cstdio>
#include <cstdlib>
#include <thread>

namespace {

using spre::Step;

thread_local int thread_number = 0;
thread_local int thread_count = 1;

// What OpenMP does, in a way that ThreadSanitizer understands.
void parallel(void (*run)(void*), void* data, unsigned threads, unsigned) {
  std::vector<std::thread> all;
  for (unsigned i = 0; i < threads; ++i)
    all.emplace_back([=] {
      thread_number = static_cast<int>(i);
      thread_count = static_cast<int>(threads);
      run(data);
    });
  for (std::thread& each : all) each.join();
}
int number() { return thread_number; }
int count() { return thread_count; }

constexpr int64_t kChannels = 80, kSide = 11, kSlots = 4, kTaps = 9;
constexpr int64_t kProducts = 36;  // of a tile of Winograd's filtering
constexpr int64_t kNumbers = kChannels * kSide * kSide;

Step step(int64_t kind, int64_t x, int64_t y, int64_t weight) {
  Step s = {};
  s.kind = kind;
  s.x = x;
  s.y = y;
  s.residual = s.bias = -1;
  s.weight = weight;
  s.x_stride = s.y_stride = s.residual_stride = s.channels = s.out_channels = kChannels;
  s.batch = s.groups = 1;
  s.height = s.width = s.out_height = s.out_width = kSide;
  s.kernel_h = s.kernel_w = 3;
  s.stride_h = s.stride_w = s.padding_h = s.padding_w = s.dilation_h = s.dilation_w = 1;
  s.slots = kSlots;
  s.parts = 1;
  s.channel_group = 16;
  return s;
}

// One run of a program of all kinds: buffers 0 and 1 are activations, 2 to 4 weights.
std::vector<float> run(int64_t threads, unsigned seed) {
  using Line = struct alignas(64) {
    float numbers[16];
  };
  const auto lines = [](int64_t numbers) { return std::vector<Line>(numbers / 16 + 1); };
  std::vector<std::vector<Line>> memory = {
      lines(kNumbers), lines(kNumbers), lines(kChannels * kChannels / 16 * kTaps * kSlots * 2),
      lines(kProducts * kChannels * kChannels), lines(kTaps * kChannels)};
  std::vector<void*> buffers;
  for (auto& each : memory) {
    for (Line& line : each)
      for (float& x : line.numbers)
        x = static_cast<float>((seed = seed * 1664525u + 1013904223u) >> 8) / (1 << 26) - .1f;
    buffers.push_back(each.data());
  }
  // Every other line of sparse weights holds channels.
  for (size_t i = 1; i < memory[2].size(); i += 2)
    for (float& x : memory[2][i].numbers) {
      const int32_t channel = static_cast<int32_t>((seed = seed * 1664525u + 1013904223u) >> 28);
      std::memcpy(&x, &channel, sizeof(x));
    }
  std::vector<Step> steps = {
      step(spre::kSparseConv, 0, 1, 2),   step(spre::kDepthwiseConv, 1, 0, 4),
      step(spre::kMaxPool, 0, 1, -1),     step(spre::kDenseConv, 1, 0, 3),
      step(spre::kAveragePool, 0, 1, -1), step(spre::kAffine, 1, 0, -1),
      step(spre::kSparseConv, 0, 1, 2),   step(spre::kCopy, 1, 0, -1),
      step(spre::kWinogradConv, 0, 1, 3), step(spre::kWinogradConv, 1, 0, 3),
  };
  steps[8].winograd = 4;
  steps[9].winograd = 2;
  for (size_t i : {5u, 7u})
    steps[i].kernel_h = steps[i].kernel_w = 1, steps[i].padding_h = steps[i].padding_w = 0;
  steps[6].residual = 1;  // in place
  const auto size = static_cast<int64_t>(steps.size());
  for (const Step& s : steps)
    if (!spre_takes(&s)) std::abort();
  std::vector<Line> scratch(spre_scratch(steps.data(), size, threads) / 64 + 1);
  const spre::OpenMP openmp = {parallel, number, count};
  spre_run(steps.data(), size, buffers.data(), scratch.data(), threads, &openmp);
  const float* y = memory[0][0].numbers;
  return std::vector<float>(y, y + kNumbers);
}

// The masks of a weight, which are made of few magnitudes so that there are ties, then the weight
// masked and gradients, all behind one another.
std::vector<float> train(int64_t threads, unsigned seed) {
  constexpr int64_t kFilters = 37, kWeights = kFilters * kChannels * kTaps;
  std::vector<float> weight(kWeights), all(4 * kWeights);
  for (float& x : weight)
    x = static_cast<float>(static_cast<int32_t>((seed = seed * 1664525u + 1013904223u)) >> 24) / 64;
  std::vector<uint8_t> mask(kWeights);
  std::vector<int64_t> per_tap(kTaps);
  const spre::OpenMP openmp = {parallel, number, count};
  spre::Weight w = {weight.data(), sizeof(float), kFilters, kChannels, kTaps, 0};
  for (int64_t channels_last : {0, 1}) {
    w.channels_last = channels_last;
    struct alignas(64) Line {
      char bytes[64];
    };
    std::vector<Line> scratch(spre_count_scratch(&w, threads) / 64 + 1);
    spre_count_largest(&w, kWeights / 3, per_tap.data(), scratch.data(), threads, &openmp);
    all.insert(all.end(), per_tap.begin(), per_tap.end());
    for (int64_t n : {1, 2}) {
      spre_nm_mask(&w, n, 4, mask.data(), threads, &openmp);
      all.insert(all.end(), mask.begin(), mask.end());
    }
  }
  spre_mask_weight(weight.data(), mask.data(), all.data(), sizeof(float), kWeights, threads,
                   &openmp);
  spre_decay_gradient(all.data(), weight.data(), mask.data(), all.data() + kWeights, sizeof(float),
                      kWeights, .5, threads, &openmp);
  spre_product_gradients(weight.data(), all.data() + kWeights, all.data(),
                         all.data() + 2 * kWeights, all.data() + 3 * kWeights, sizeof(float),
                         kWeights, threads, &openmp);
  return all;
}

// The passes of convs with masked weights, in both memory formats, with a stride and without.
// Numbers are small integers, so that every sum is exact, however it is divided among threads.
std::vector<float> convolve(int64_t threads, unsigned seed) {
  constexpr int64_t kImages = 21, kInputs = 12, kFilters = 10, kWidth = 7, kHeight = 9;
  constexpr int64_t kWeights = kFilters * kInputs / 2 * kTaps;
  const auto draw = [&](int64_t count) {
    std::vector<float> numbers(count);
    for (float& x : numbers)
      x = static_cast<float>(static_cast<int32_t>(seed = seed * 1664525u + 1013904223u) >> 29);
    return numbers;
  };
  std::vector<uint8_t> mask;
  for (float x : draw(kWeights)) mask.push_back(x > 1);
  const std::vector<float> weight = draw(kWeights), bias = draw(kFilters);
  const int64_t kept = spre_count_kept(mask.data(), kWeights);
  const spre::OpenMP openmp = {parallel, number, count};
  std::vector<float> all;
  for (int64_t channels_last : {0, 1})
    for (int64_t stride : {1, 2}) {
      const int64_t height = (kHeight - 1) / stride + 1, width = (kWidth - 1) / stride + 1;
      const spre::MaskedConv conv = {sizeof(float),
                                     kImages,
                                     kInputs,
                                     kHeight,
                                     kWidth,
                                     kFilters,
                                     height,
                                     width,
                                     3,
                                     3,
                                     stride,
                                     stride,
                                     1,
                                     1,
                                     1,
                                     1,
                                     2,
                                     channels_last,
                                     channels_last};
      const std::vector<float> x = draw(kImages * kInputs * kHeight * kWidth);
      const std::vector<float> dy = draw(kImages * kFilters * height * width);
      const size_t sizes[] = {dy.size(), x.size(), weight.size()};
      for (int64_t pass : {spre::kForward, spre::kInputGradient, spre::kWeightGradient}) {
        struct alignas(64) Line {
          char bytes[64];
        };
        std::vector<Line> scratch(spre_masked_conv_scratch(&conv, pass, kept, threads) / 64 + 1);
        std::vector<float> result(sizes[pass]);
        spre_masked_conv(&conv, pass, x.data(), dy.data(), weight.data(), mask.data(),
                         pass == spre::kForward ? bias.data() : nullptr, result.data(), kept,
                         scratch.data(), threads, &openmp);
        all.insert(all.end(), result.begin(), result.end());
      }
    }
  return all;
}

// Whether a function gives the same on any number of threads, with another run of it beside.
template <class Run>
bool same_on_all_threads(Run run) {
  const std::vector<float> expected[] = {run(1, 1), run(1, 2)};
  bool same = expected[0] != expected[1];
  for (int64_t threads : {2, 3, 5}) {
    std::vector<float> found[2];
    std::thread other([&] { found[0] = run(threads, 1); });
    found[1] = run(threads, 2);
    other.join();
    for (int i = 0; i < 2; ++i)
      same = same && found[i].size() == expected[i].size() &&
             std::memcmp(found[i].data(), expected[i].data(), found[i].size() * 4) == 0;
  }
  return same;
}

}  // namespace

int main() {
  const bool same =
      same_on_all_threads(run) && same_on_all_threads(train) && same_on_all_threads(convolve);
  if (!same) std::fprintf(stderr, "results depend on the number of threads\n");
  return same ? 0 : 1;
}
