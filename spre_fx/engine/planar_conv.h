// N:M sparse convolution with neighbouring pixels side by side in registers. The input is turned
// into planes, so that a non-zero, wherever it stands, is one number times registers of pixels: no
// permutes, and each register of a plane is read by a multiply-add. Sums are turned back on their
// way to memory.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "epilogue.h"
#include "image_lanes.h"
#include "team.h"
#include "tiling.h"

namespace spre {

// Where rows and columns of the input under a tile of outputs lie in the planes of a channel. With
// strides, rows and columns are sorted by their remainders, a plane for each pair of those, so that
// neighbouring outputs read neighbours for every tap. Positions of a plane count on from row to
// row: outputs are computed at all of them, those between rows for nothing.
class Planes {
 public:
  Planes(const Step& step, bool flat) : s_(step), flat_(flat) {
    reach_h_ = (s_.kernel_h - 1) * s_.dilation_h;
    reach_w_ = (s_.kernel_w - 1) * s_.dilation_w;
    phases_h_ = std::min(s_.stride_h, reach_h_ + 1);
    phases_w_ = std::min(s_.stride_w, reach_w_ + 1);
  }

  // For tiles of at most so many rows of outputs, or pixels of a flat conv.
  void set_size(int64_t size) {
    columns_ = flat_ ? size : s_.out_width + reach_w_ / s_.stride_w;
    rows_ = flat_ ? 1 : size + reach_h_ / s_.stride_h;
    plane_ = rows_ * columns_;
    // Registers read over the end of a plane. An odd number of cache lines: channels do not share
    // sets of a cache.
    const int64_t line = kCacheLine / static_cast<int64_t>(sizeof(float));
    channel_ = (ceil_div(phases_h_ * phases_w_ * plane_ + kSlack, line) | 1) * line;
    taps_.clear();
    for (int64_t u = 0; u < s_.kernel_h; ++u)
      for (int64_t v = 0; v < s_.kernel_w; ++v) {
        const int64_t y = u * s_.dilation_h, x = v * s_.dilation_w;
        const int64_t plane = y % s_.stride_h * phases_w_ + x % s_.stride_w;
        taps_.push_back(plane * plane_ + y / s_.stride_h * columns_ + x / s_.stride_w);
      }
  }

  int64_t columns() const { return columns_; }
  int64_t channel() const { return channel_; }
  int64_t bytes() const { return s_.channels * channel_ * static_cast<int64_t>(sizeof(float)); }
  const std::vector<int64_t>& taps() const { return taps_; }
  // How much of a channel the outputs at so many positions read, about.
  int64_t window(int64_t positions) const {
    return phases_h_ * phases_w_ * (positions + reach_h_ / s_.stride_h * columns_);
  }

  // Fills the planes for `count` rows of outputs of the image at `x`, from row `row` on.
  void fill_rows(const float* x, int64_t row, int64_t count, float* to) const {
    for (int64_t a = 0; a < phases_h_; ++a)
      for (int64_t b = 0; b < phases_w_; ++b)
        for (int64_t i = 0; i < count + reach_h_ / s_.stride_h; ++i) {
          const int64_t from = (row + i) * s_.stride_h + a - s_.padding_h;
          const bool inside = from >= 0 && from < s_.height;
          fill_row(inside ? x + from * s_.width * s_.x_stride : nullptr, b - s_.padding_w,
                   to + (a * phases_w_ + b) * plane_ + i * columns_);
        }
  }

  void fill_pixels(const float* x, int64_t count, float* to) const {
    turn(x, s_.x_stride, count, to);
  }

 private:
  static constexpr int64_t kSlack = 16;  // the longest register

  // Columns `first`, `first + stride` and so on of a row of the image, or zeros.
  void fill_row(const float* x, int64_t first, float* to) const {
    const int64_t begin =
        x == nullptr ? columns_ : std::min(columns_, first < 0 ? ceil_div(-first, s_.stride_w) : 0);
    const int64_t left = s_.width - first;
    const int64_t end = std::clamp(left <= 0 ? 0 : ceil_div(left, s_.stride_w), begin, columns_);
    for (int64_t c = 0; begin > 0 && c < s_.channels; ++c)
      std::fill_n(to + c * channel_, begin, 0.f);
    for (int64_t c = 0; end < columns_ && c < s_.channels; ++c)
      std::fill_n(to + c * channel_ + end, columns_ - end, 0.f);
    if (begin < end)
      turn(x + (first + begin * s_.stride_w) * s_.x_stride, s_.stride_w * s_.x_stride, end - begin,
           to + begin);
  }

  // All channels of `count` pixels, `step` apart, to the planes of the channels.
  void turn(const float* x, int64_t step, int64_t count, float* to) const {
    using Vector = Lanes<float>::Vector;
    constexpr int64_t kCount = Lanes<float>::kCount;
    int64_t i = 0;
    for (; i + kCount <= count; i += kCount) {
      int64_t c = 0;
      for (; c + kCount <= s_.channels; c += kCount) {
        Vector rows[kCount];
        UNROLLED_FOR (int64_t j = 0; j < kCount; ++j)
          rows[j] = load_unaligned(x + (i + j) * step + c);
        transpose<float>(rows);
        UNROLLED_FOR (int64_t j = 0; j < kCount; ++j)
          std::memcpy(to + (c + j) * channel_ + i, &rows[j], sizeof(Vector));
      }
      for (; c < s_.channels; ++c)
        for (int64_t j = 0; j < kCount; ++j) to[c * channel_ + i + j] = x[(i + j) * step + c];
    }
    for (; i < count; ++i)
      for (int64_t c = 0; c < s_.channels; ++c) to[c * channel_ + i] = x[i * step + c];
  }

  const Step& s_;
  bool flat_;
  int64_t reach_h_, reach_w_, phases_h_, phases_w_;
  int64_t rows_ = 0, columns_ = 0, plane_ = 0, channel_ = 0;
  std::vector<int64_t> taps_;
};

struct PlanarEntry {
  float value;
  int32_t channel;  // of its channel group
};

// Sums of one output at `Vectors` registers of positions, over some channel groups.
struct PlanarSums {
  const PlanarEntry* entries;
  int64_t count;
  const float* x;        // the first of those channel groups, at the first position
  const int64_t* bases;  // of each entry: its channel group and its tap, from there
  int64_t channel;       // from channel to channel
  float* sums;
  bool begin;  // from zero
};

// One loop over channel groups, taps and slots: with one slot a tap, loops within loops would take
// longer than what they repeat.
template <int Vectors>
SPRE_NOINLINE void planar_sums(const PlanarSums& p) {
  using Vector = Lanes<float>::Vector;
  constexpr int64_t kCount = Lanes<float>::kCount;
  Vector sums[Vectors];
  Vector* memory = reinterpret_cast<Vector*>(p.sums);
  if (p.begin) {
    UNROLLED_FOR (int v = 0; v < Vectors; ++v) sums[v] = Vector{};
  } else {
    UNROLLED_FOR (int v = 0; v < Vectors; ++v) sums[v] = memory[v];
  }
  const PlanarEntry* entries = p.entries;
  const int64_t* bases = p.bases;
  const float* from = p.x;
  const int64_t channel = p.channel, count = p.count;
  ROLLED_FOR (int64_t i = 0; i < count; ++i) {
    const float* x = from + bases[i] + entries[i].channel * channel;
    asm("" : "+r"(x));  // one register is the address of all that follows
    const float weight = entries[i].value;
    UNROLLED_FOR (int v = 0; v < Vectors; ++v) sums[v] += load_unaligned(x + v * kCount) * weight;
  }
  UNROLLED_FOR (int v = 0; v < Vectors; ++v) memory[v] = sums[v];
}

class PlanarConv {
 public:
  explicit PlanarConv(const Step& step)
      : s_(step),
        flat_(is_flat(step)),
        planes_(step, flat_),
        outputs_(step.out_channels / step.groups),
        channels_(step.channels / step.groups),
        channel_groups_(ceil_div(channels_, step.channel_group)),
        per_group_(step.kernel_h * step.kernel_w * step.slots),
        rows_(step, step.tile_rows) {
    if (flat_) {  // a 1x1 conv knows no rows: tiles are stretches of all pixels of the batch
      pixels_ = s_.batch * s_.out_height * s_.out_width;
      unit_ = std::clamp<int64_t>(s_.tile_rows * s_.out_width, 1, std::max<int64_t>(1, pixels_));
      tiles_ = ceil_div(pixels_, unit_);
    } else {
      unit_ = rows_.unit();
      tiles_ = rows_.size();
    }
    planes_.set_size(unit_);
    split_ = std::clamp<int64_t>(s_.split, 1, std::max<int64_t>(1, ceil_div(outputs_, kLanes)));
    const int64_t vectors = ceil_div(flat_ ? unit_ : unit_ * planes_.columns(), kCount);
    const int64_t most = std::clamp<int64_t>(s_.tile_pixels, 1, kMostVectors);
    stretch_ = ceil_div(vectors, ceil_div(vectors, most));
    const int64_t of_channel = planes_.window(stretch_ * kCount) * sizeof(float);
    together_ = std::min(channel_groups_, std::max(kWindowBytes / (of_channel * s_.channel_group),
                                                   ceil_div(kLeastEntries, per_group_)));
    const int64_t of_output = stretch_ * kCount * sizeof(float);
    chunk_ = std::clamp<int64_t>(
        (together_ < channel_groups_ ? kSumsBytes : 0) / of_output / kLanes * kLanes, kLanes,
        round_up(outputs_, kLanes));
    for (int64_t group = 0; group < together_; ++group)
      for (int64_t tap : planes_.taps())
        bases_.insert(bases_.end(), s_.slots, group * s_.channel_group * planes_.channel() + tap);
  }

  int64_t scratch_bytes() const {
    return round_up(planes_.bytes(), kCacheLine) +
           chunk_ * stretch_ * kCount * static_cast<int64_t>(sizeof(float));
  }

  void run(const float* x, const char* weight, const Epilogue<float>& epilogue,
           const Worker& worker) const {
    float* planes = reinterpret_cast<float*>(worker.scratch);
    float* sums = reinterpret_cast<float*>(worker.scratch + round_up(planes_.bytes(), kCacheLine));
    int64_t filled = -1;
    const int64_t tasks = tiles_ * split_;
    for (int64_t task = worker.first(tasks); task < worker.last(tasks); ++task) {
      const int64_t tile = task % tiles_, part = task / tiles_;
      if (tile != filled) fill(x, tile, planes);
      filled = tile;
      const Place place = place_of(tile);
      for (int64_t g = 0; g < s_.groups; ++g)
        run_group(g, part, place, planes + g * channels_ * planes_.channel(), sums,
                  reinterpret_cast<const PlanarEntry*>(weight), epilogue.of_group(g, outputs_));
    }
  }

 private:
  static constexpr int64_t kCount = Lanes<float>::kCount;
  static constexpr int64_t kMostVectors = kPlanarRegisters;
  // Of the first-level cache for windows, and of the second for sums. Few entries at a time would
  // spend more on sums, to and from memory, than windows in the second-level cache cost.
  static constexpr int64_t kWindowBytes = 16 << 10, kSumsBytes = 64 << 10, kLeastEntries = 24;

  // The outputs of a tile: `rows` rows of `columns` from pixel `first` on.
  struct Place {
    int64_t first, rows, columns;
  };

  Place place_of(int64_t tile) const {
    if (flat_) return {tile * unit_, 1, std::min(unit_, pixels_ - tile * unit_)};
    const auto [image, row, count] = rows_[tile];
    return {(image * s_.out_height + row) * s_.out_width, count, s_.out_width};
  }

  void fill(const float* x, int64_t tile, float* planes) const {
    if (flat_) {
      const int64_t from = tile * unit_;
      planes_.fill_pixels(x + from * s_.x_stride, std::min(unit_, pixels_ - from), planes);
    } else {
      const auto [image, row, count] = rows_[tile];
      planes_.fill_rows(x + image * s_.height * s_.width * s_.x_stride, row, count, planes);
    }
  }

  // One group of channels at one tile: all of `part` of the outputs.
  void run_group(int64_t g, int64_t part, const Place& place, const float* planes, float* sums,
                 const PlanarEntry* weight, const Epilogue<float>& epilogue) const {
    const int64_t blocks = ceil_div(outputs_, kLanes);
    const int64_t first = blocks * part / split_ * kLanes;
    const int64_t last = std::min(outputs_, blocks * (part + 1) / split_ * kLanes);
    const int64_t end = (place.rows - 1) * planes_.columns() + place.columns;
    const int64_t vectors = ceil_div(end, kCount), stretches = ceil_div(vectors, stretch_);
    PlanarSums p;
    p.bases = bases_.data();
    p.channel = planes_.channel();
    for (int64_t i = 0; i < stretches; ++i) {
      const int64_t begin = vectors * i / stretches, count = vectors * (i + 1) / stretches - begin;
      const auto kernel = pick(count, std::make_integer_sequence<int, kMostVectors>());
      for (int64_t output = first; output < last; output += chunk_) {
        const int64_t many = std::min(chunk_, last - output);
        for (int64_t cut = 0; cut < channel_groups_; cut += together_) {
          p.count = std::min(together_, channel_groups_ - cut) * per_group_;
          p.x = planes + cut * s_.channel_group * p.channel + begin * kCount;
          p.begin = cut == 0;
          for (int64_t o = 0; o < many; ++o) {
            const int64_t row = (g * outputs_ + output + o) * channel_groups_ + cut;
            p.entries = weight + row * per_group_;
            p.sums = sums + o * stretch_ * kCount;
            fetch(p.entries + channel_groups_ * per_group_, p.count);
            kernel(p);
          }
        }
        for (int64_t o = 0; o < many; o += kLanes)
          store(place, begin * kCount, count, sums + o * stretch_ * kCount,
                epilogue.at(place.first, output + o));
      }
    }
  }

  // The next output's entries come in meanwhile: they lie elsewhere, perhaps beyond L2.
  static void fetch(const PlanarEntry* entries, int64_t count) {
    constexpr int64_t kLine = kCacheLine / sizeof(PlanarEntry);
    for (int64_t i = 0; i < count; i += kLine) __builtin_prefetch(entries + i);
  }

  using Kernel = void (*)(const PlanarSums&);
  template <int... VectorsLessOne>
  static Kernel pick(int64_t vectors, std::integer_sequence<int, VectorsLessOne...>) {
    static constexpr Kernel kTable[] = {planar_sums<VectorsLessOne + 1>...};
    return kTable[vectors - 1];
  }

  // Sums of 16 outputs, or as many as there are, at `vectors` registers of positions.
  void store(const Place& place, int64_t position, int64_t vectors, const float* sums,
             const Epilogue<float>& epilogue) const {
    using Vector = Lanes<float>::Vector;
    int64_t row = position / planes_.columns(), column = position % planes_.columns();
    for (int64_t v = 0; v < vectors; ++v) {
      alignas(kCacheLine) float turned[kCount][kLanes];
      UNROLLED_FOR (int64_t from = 0; from < kLanes; from += kCount) {
        Vector block[kCount];
        UNROLLED_FOR (int64_t i = 0; i < kCount; ++i)
          block[i] =
              *reinterpret_cast<const Vector*>(sums + (from + i) * stretch_ * kCount + v * kCount);
        transpose<float>(block);
        UNROLLED_FOR (int64_t i = 0; i < kCount; ++i)
          *reinterpret_cast<Vector*>(&turned[i][from]) = block[i];
      }
      for (int64_t i = 0; i < kCount && row < place.rows;) {
        const int64_t pixel = row * s_.out_width + column;
        const int64_t left = std::min(kCount - i, place.columns - column);
        int64_t j = 0;
        for (; j + 4 <= left; j += 4) finish_pixels<4>(&turned[i + j], epilogue.at(pixel + j, 0));
        for (; j < left; ++j) finish_pixels<1>(&turned[i + j], epilogue.at(pixel + j, 0));
        const int64_t passed = std::min(kCount - i, planes_.columns() - column);
        i += passed;
        column += passed;
        if (column == planes_.columns()) {
          column = 0;
          ++row;
        }
      }
    }
  }

  // Sums of neighbouring pixels, 16 outputs of each.
  template <int Pixels>
  static void finish_pixels(const float (*sums)[kLanes], const Epilogue<float>& epilogue) {
    Floats all[1][Pixels];
    UNROLLED_FOR (int k = 0; k < Pixels; ++k) all[0][k] = load(sums[k]);
    finish(all, epilogue);
  }

  const Step& s_;
  bool flat_;
  Planes planes_;
  int64_t outputs_, channels_, channel_groups_;
  int64_t per_group_;  // entries of an output in a channel group
  RowTiles rows_;
  int64_t pixels_ = 0, unit_ = 0, tiles_ = 0;
  int64_t split_ = 1;
  int64_t stretch_ = 1;         // registers of positions that are computed at once
  int64_t together_ = 1;        // channel groups whose windows stay in the cache
  int64_t chunk_ = kLanes;      // outputs whose sums do
  std::vector<int64_t> bases_;  // see PlanarSums
};

}  // namespace spre
