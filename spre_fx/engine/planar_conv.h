// N:M sparse convolution with neighbouring pixels side by side in registers. The input is turned
// into planes, so that a non-zero, wherever it stands, is one number times registers of pixels: no
// permutes, and each register of a plane is read by a multiply-add. Sums are turned back on their
// way to memory. Between two planar convs neither is needed: what one leaves in planes, the other
// reads there.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "epilogue.h"
#include "image_lanes.h"
#include "input_planes.h"
#include "team.h"
#include "tiling.h"

namespace spre {

// What ReLU and ReLU6 are.
struct Bounds {
  float least = -kInfinity, most = kInfinity;
};
inline Bounds bounds_of(const Step& s) {
  if (s.activation != kRelu && s.activation != kRelu6) return {};
  return {0, s.activation == kRelu ? kInfinity : 6};
}
// What is no number stays so.
SPRE_INLINE float bounded(float x, const Bounds& to) {
  x = to.least > x ? to.least : x;
  return to.most < x ? to.most : x;
}
SPRE_INLINE Lanes<float>::Vector bounded(Lanes<float>::Vector x, const Bounds& to) {
  const Lanes<float>::Vector least = Lanes<float>::Vector{} + to.least,
                             most = Lanes<float>::Vector{} + to.most;
  x = least > x ? least : x;
  return most < x ? most : x;
}

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

  // The end of the sums, which then go to a plane instead; null where there is more to come.
  float* y;
  const float* residual;  // may be null
  float bias;
  Bounds bounds;
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
  if (p.y == nullptr) {
    UNROLLED_FOR (int v = 0; v < Vectors; ++v) memory[v] = sums[v];
    return;
  }
  UNROLLED_FOR (int v = 0; v < Vectors; ++v) sums[v] += p.bias;
  if (p.residual != nullptr) {
    UNROLLED_FOR (int v = 0; v < Vectors; ++v) sums[v] += load_unaligned(p.residual + v * kCount);
  }
  const Bounds bounds = p.bounds;
  UNROLLED_FOR (int v = 0; v < Vectors; ++v) {
    sums[v] = bounded(sums[v], bounds);
    std::memcpy(p.y + v * kCount, &sums[v], sizeof(Vector));
  }
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
    if (flat_) {  // a 1x1 conv knows no rows: tiles are stretches of all pixels, or of an image's
      const bool planes = s_.x_planes || s_.y_planes || s_.residual_planes;
      const int64_t images = planes ? 1 : s_.batch;
      pixels_ = images * s_.out_height * s_.out_width;
      unit_ = std::clamp<int64_t>(s_.tile_rows * s_.out_width, 1, std::max<int64_t>(1, pixels_));
      if (s_.x_planes || s_.y_planes) unit_ = round_up(unit_, kLanes);  // whole registers
      of_image_ = ceil_div(pixels_, unit_);
      tiles_ = s_.batch / images * of_image_;
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
      const Place place = place_of(tile);
      const float* from = planes;
      if (planes_.in_place())
        from = x + place.image * s_.channels * s_.x_stride + place.first;
      else if (tile != filled)
        fill(x, place, planes);
      filled = tile;
      for (int64_t g = 0; g < s_.groups; ++g)
        run_group(g, part, place, from + g * channels_ * planes_.channel(), sums,
                  reinterpret_cast<const PlanarEntry*>(weight), epilogue);
    }
  }

 private:
  static constexpr int64_t kCount = Lanes<float>::kCount;
  static constexpr int64_t kMostVectors = kPlanarRegisters;
  // Of the first-level cache for windows, and of the second for sums. Few entries at a time would
  // spend more on sums, to and from memory, than windows in the second-level cache cost.
  static constexpr int64_t kWindowBytes = 16 << 10, kSumsBytes = 64 << 10, kLeastEntries = 24;

  // The outputs of a tile: `rows` rows of `columns` from pixel `first` of the image on, or of the
  // batch where a flat conv takes that for one image.
  struct Place {
    int64_t image, first, rows, columns;
  };

  Place place_of(int64_t tile) const {
    if (flat_) {
      const int64_t first = tile % of_image_ * unit_;
      return {tile / of_image_, first, 1, std::min(unit_, pixels_ - first)};
    }
    const auto [image, row, count] = rows_[tile];
    return {image, row * s_.out_width, count, s_.out_width};
  }

  void fill(const float* x, const Place& place, float* planes) const {
    const int64_t row = place.first / s_.out_width;
    if (flat_)
      planes_.fill_pixels(x + (place.image * pixels_ + place.first) * s_.x_stride, place.columns,
                          planes);
    else if (s_.x_planes)
      planes_.copy_rows(x + place.image * s_.channels * s_.x_stride, row, place.rows, planes);
    else
      planes_.fill_rows(x + place.image * s_.height * s_.width * s_.x_stride, row, place.rows,
                        planes);
  }

  // One group of channels at one tile: all of `part` of the outputs.
  void run_group(int64_t g, int64_t part, const Place& place, const float* planes, float* sums,
                 const PlanarEntry* weight, const Epilogue<float>& epilogue) const {
    const int64_t blocks = ceil_div(outputs_, kLanes);
    const int64_t first = blocks * part / split_ * kLanes;
    const int64_t last = std::min(outputs_, blocks * (part + 1) / split_ * kLanes);
    const int64_t end = (place.rows - 1) * planes_.columns() + place.columns;
    const int64_t vectors = ceil_div(end, kCount), stretches = ceil_div(vectors, stretch_);
    PlanarSums p{};
    p.bases = bases_.data();
    p.channel = planes_.channel();
    p.bounds = flat_ || epilogue.residual == nullptr ? bounds_of(s_) : Bounds{};
    for (int64_t i = 0; i < stretches; ++i) {
      const int64_t begin = vectors * i / stretches, count = vectors * (i + 1) / stretches - begin;
      const auto kernel = pick(count, std::make_integer_sequence<int, kMostVectors>());
      for (int64_t output = first; output < last; output += chunk_) {
        const int64_t many = std::min(chunk_, last - output);
        const Sums all{sums, g, output, many, begin * kCount, count};
        const End end = end_of(place, all, epilogue);
        for (int64_t cut = 0; cut < channel_groups_; cut += together_) {
          const bool last_cut = cut + together_ >= channel_groups_;
          p.count = std::min(together_, channel_groups_ - cut) * per_group_;
          p.x = planes + cut * s_.channel_group * p.channel + begin * kCount;
          p.begin = cut == 0;
          p.y = nullptr;
          for (int64_t o = 0; o < many; ++o) {
            const int64_t row = (g * outputs_ + output + o) * channel_groups_ + cut;
            p.entries = weight + row * per_group_;
            p.sums = sums + o * stretch_ * kCount;
            if (s_.y_planes && last_cut) {
              p.y = end.y + o * end.y_step;
              p.residual =
                  end.residual == nullptr ? nullptr : end.residual + o * s_.residual_stride;
              p.bias = end.bias == nullptr ? 0 : end.bias[o];
            }
            fetch(p.entries + channel_groups_ * per_group_, p.count);
            kernel(p);
          }
        }
        if (!s_.y_planes)
          store_pixels(place, all, epilogue);
        else if (!flat_)
          copy_to_planes(place, all, epilogue);
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

  // Of outputs [output, output + many) of a group, at `vectors` registers of positions.
  struct Sums {
    float* first;
    int64_t group, output, many;
    int64_t position, vectors;
  };

  // Where the sums of some outputs end, from the first of them on: in their planes, or where they
  // are if there is something between their rows.
  struct End {
    float* y;
    int64_t y_step;
    const float* residual;
    const float* bias;
  };
  End end_of(const Place& place, const Sums& sums, const Epilogue<float>& epilogue) const {
    const float* bias = epilogue.of_group(sums.group, outputs_).bias;
    if (bias != nullptr) bias += sums.output;
    if (!flat_) return {sums.first, stretch_ * kCount, nullptr, bias};
    const float* residual = residual_plane(place, sums.group, sums.output, epilogue);
    if (residual != nullptr) residual += sums.position;
    float* y = y_plane(place, sums.group, sums.output, epilogue) + sums.position;
    return {y, s_.y_stride, residual, bias};
  }

  // Of sums that have ended.
  void copy_to_planes(const Place& place, const Sums& sums, const Epilogue<float>& epilogue) const {
    using Vector = Lanes<float>::Vector;
    const Bounds bounds = bounds_of(s_);
    for (int64_t o = 0; o < sums.many; ++o) {
      float* y = y_plane(place, sums.group, sums.output + o, epilogue);
      const float* residual = residual_plane(place, sums.group, sums.output + o, epilogue);
      const float* from = sums.first + o * stretch_ * kCount;
      for_each_row(place, sums, [&](int64_t at, int64_t pixel, int64_t count) {
        int64_t i = 0;
        for (; i + kCount <= count; i += kCount) {
          Vector some = load_unaligned(from + at + i);
          if (residual != nullptr)
            some = bounded(some + load_unaligned(residual + pixel + i), bounds);
          std::memcpy(y + pixel + i, &some, sizeof(some));
        }
        for (; i < count; ++i) {
          const float one = from[at + i];
          y[pixel + i] = residual == nullptr ? one : bounded(one + residual[pixel + i], bounds);
        }
      });
    }
  }

  void store_pixels(const Place& place, const Sums& sums, const Epilogue<float>& epilogue) const {
    Epilogue<float> of_group = epilogue.of_group(sums.group, outputs_);
    if (s_.residual_planes && epilogue.residual != nullptr) {
      for (int64_t o = 0; o < sums.many; ++o) {
        const int64_t output = sums.output + o;
        const float bias = of_group.bias == nullptr ? 0 : of_group.bias[output];
        const float* residual = residual_plane(place, sums.group, output, epilogue);
        float* to = sums.first + o * stretch_ * kCount;
        for_each_row(place, sums, [&](int64_t at, int64_t pixel, int64_t count) {
          for (int64_t i = 0; i < count; ++i) to[at + i] = to[at + i] + bias + residual[pixel + i];
        });
      }
      of_group.residual = of_group.bias = nullptr;
    }
    const int64_t pixel = place.image * (flat_ ? pixels_ : s_.out_height * s_.out_width);
    for (int64_t o = 0; o < sums.many; o += kLanes)
      store(place, sums.position, sums.vectors, sums.first + o * stretch_ * kCount,
            of_group.at(pixel + place.first, sums.output + o));
  }

  // The number of the plane of an output.
  int64_t plane(const Place& place, int64_t group, int64_t output) const {
    return place.image * s_.out_channels + group * outputs_ + output;
  }
  float* y_plane(const Place& place, int64_t group, int64_t output,
                 const Epilogue<float>& epilogue) const {
    return epilogue.y + plane(place, group, output) * s_.y_stride + place.first;
  }
  const float* residual_plane(const Place& place, int64_t group, int64_t output,
                              const Epilogue<float>& epilogue) const {
    if (epilogue.residual == nullptr) return nullptr;
    return epilogue.residual + plane(place, group, output) * s_.residual_stride + place.first;
  }

  // `then(i, pixel, count)` for each row of outputs among the positions: the sum of the first of
  // them is the i-th, and how far its pixel is from that of the place.
  template <class Then>
  void for_each_row(const Place& place, const Sums& sums, Then then) const {
    const int64_t columns = planes_.columns(), end = sums.position + sums.vectors * kCount;
    for (int64_t row = sums.position / columns; row < place.rows && row * columns < end; ++row) {
      const int64_t first = std::max(sums.position, row * columns);
      const int64_t last = std::min(end, row * columns + place.columns);
      if (first < last)
        then(first - sums.position, row * (s_.out_width - columns) + first, last - first);
    }
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
  int64_t unit_ = 0, tiles_ = 0;
  int64_t pixels_ = 0, of_image_ = 0;  // of a flat conv: of what it takes for an image, and tiles
  int64_t split_ = 1;
  int64_t stretch_ = 1;         // registers of positions that are computed at once
  int64_t together_ = 1;        // channel groups whose windows stay in the cache
  int64_t chunk_ = kLanes;      // outputs whose sums do
  std::vector<int64_t> bases_;  // see PlanarSums
};

}  // namespace spre
