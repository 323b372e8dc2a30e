// The three passes of a conv with masked weights, over images side by side in vectors.
//
// Forward and input gradient are the same computation: outputs at which rows of entries read a
// buffer of lanes. A tile of neighbouring outputs stays in registers while the entries of one row
// pass by: a broadcast for each, and a product for each vector of the tile. Entries are cut into
// blocks of input channels, so that what they read stays in the first-level cache.
#pragma once

#include "image_lanes.h"
#include "lane_window.h"
#include "masked_entries.h"
#include "team.h"
#include "tile_kernels.h"
#include "training.h"
#include "types.h"

namespace spre {

inline constexpr int64_t kBlockBytes = 24 * 1024;  // of what the entries of a block read
// At least, between two writes: numbers of images are transposed a vector at a time.
inline constexpr int64_t kStripColumns = 24;

template <class Number>
class MaskedConvRun {
  static constexpr int64_t kCount = Lanes<Number>::kCount;
  using Part = EntryRule::Part;

 public:
  MaskedConvRun(const MaskedConv& conv, int64_t pass)
      : conv_(conv),
        pass_(pass),
        backward_(pass == kInputGradient),
        x_(conv.images, conv.channels, conv.height, conv.width, conv.channels_last),
        y_(conv.images, conv.filters, conv.out_height, conv.out_width, conv.channels_last),
        from_(backward_ ? y_ : x_),
        to_(backward_ ? x_ : y_),
        groups_(ceil_div(conv.images, kCount)),
        reach_h_((conv.kernel_h - 1) * conv.dilation_h),
        reach_w_((conv.kernel_w - 1) * conv.dilation_w),
        read_h_(backward_ ? 1 : conv.stride_h),
        write_h_(backward_ ? conv.stride_h : 1),
        write_w_(backward_ ? conv.stride_w : 1),
        shift_h_(backward_ ? conv.padding_h : 0),
        shift_w_(backward_ ? conv.padding_w : 0),
        grid_h_((to_.height - 1 + shift_h_) / write_h_ + 1),
        before_h_(backward_ ? reach_h_ / conv.stride_h : conv.padding_h),
        after_h_(backward_ ? 0 : reach_h_),
        lanes_(backward_ ? reach_w_ / conv.stride_w : conv.padding_w, backward_ ? 1 : conv.stride_w,
               backward_ ? reach_w_ / conv.stride_w + (to_.width - 1 + shift_w_) / write_w_ + 1
                         : (conv.out_width - 1) * conv.stride_w + reach_w_ + 1,
               from_.channels),
        lane_rows_((grid_h_ - 1) * read_h_ + 1 + after_h_ + (backward_ ? before_h_ : 0)),
        dy_(0, 1, conv.out_width, conv.filters),
        tile_(ceil_div(to_.height, write_h_), ceil_div(to_.width, write_w_)),
        window_(tile_,
                backward_ ? Window::Tap{before_h_, lanes_.before} : Window::Tap{reach_h_, reach_w_},
                read_h_, conv.kernel_h, conv.kernel_w, conv.dilation_h * conv.dilation_w > 1,
                lanes_),
        strip_(tile_.rows * ceil_div(kStripColumns, tile_.rows * write_h_ * to_.width)),
        block_(std::clamp<int64_t>(kBlockBytes / (window_.of_channel() * kVectorBytes), 1,
                                   from_.channels)),
        blocks_(ceil_div(from_.channels, block_)) {}

  int64_t scratch_bytes(int64_t kept, int64_t threads) const {
    return shared_bytes(kept) + threads * own_bytes(kept);
  }

  // `x` and `weight` as the pass needs them: see training.h.
  void run(const Number* x, const Number* y_gradient, const Number* weight, const uint8_t* mask,
           const Number* bias, Number* result, int64_t kept, char* scratch, int64_t threads,
           const OpenMP* openmp) const {
    Part* of_filter = reinterpret_cast<Part*>(scratch);
    Part* of_place = of_filter + conv_.filters;
    int32_t* places = reinterpret_cast<int32_t*>(of_place + conv_.groups * filter_size());
    make_rule(of_filter, of_place);
    Entries<Number> entries(buckets(), kept, scratch + rule_bytes());
    fill_entries(conv_, pass_ == kWeightGradient ? nullptr : weight, mask, {of_filter, of_place},
                 places, &entries);
    char* own = scratch + shared_bytes(kept);
    const int64_t own_size = own_bytes(kept);
    int64_t of = 1;  // threads that there are
    in_parallel(openmp, threads, [&](int64_t thread, int64_t threads) {
      if (thread == 0) of = threads;
      const Worker worker{thread, threads, threads, own + thread * own_size};
      if (pass_ == kWeightGradient)
        products(x, y_gradient, entries, kept, worker);
      else
        sums(backward_ ? y_gradient : x, entries, backward_ ? nullptr : bias, result, worker);
    });
    if (pass_ != kWeightGradient) return;
    std::memset(result, 0, conv_.filters * filter_size() * sizeof(Number));
    for (int64_t e = 0; e < kept; ++e) {
      Number sum = 0;
      for (int64_t thread = 0; thread < of; ++thread)
        sum += reinterpret_cast<const Number*>(own + thread * own_size)[e];
      result[entries.place[e]] = sum;
    }
  }

 private:
  int64_t filter_size() const {
    return conv_.channels / conv_.groups * conv_.kernel_h * conv_.kernel_w;
  }
  int64_t phases() const { return write_h_ * write_w_; }
  int64_t buckets() const { return phases() * blocks_ * to_.channels; }

  int64_t rule_bytes() const {
    const int64_t parts = conv_.filters + conv_.groups * filter_size();
    const int64_t places = filter_size() * sizeof(int32_t);
    return round_up(parts * static_cast<int64_t>(sizeof(Part)) + places, kCacheLine);
  }
  int64_t shared_bytes(int64_t kept) const {
    return rule_bytes() + Entries<Number>::bytes(buckets(), kept);
  }
  // Of a thread: gradients of the entries, what is read, and what is written.
  int64_t gradient_bytes(int64_t kept) const {
    if (pass_ != kWeightGradient) return 0;
    return round_up(kept * static_cast<int64_t>(sizeof(Number)), kCacheLine);
  }
  // The window of the last tile may end behind the lanes.
  int64_t lane_bytes() const {
    return round_up((lane_rows_ * lanes_.vectors() + tile_.columns) * kVectorBytes, kCacheLine);
  }
  int64_t window_bytes() const {
    return round_up(block_ * window_.of_channel() * kVectorBytes, kCacheLine);
  }
  int64_t own_bytes(int64_t kept) const {
    const int64_t written = pass_ == kWeightGradient ? conv_.out_height * dy_.vectors()
                                                     : to_.channels * strip_ * write_h_ * to_.width;
    return gradient_bytes(kept) + lane_bytes() + window_bytes() +
           round_up(written * kVectorBytes, kCacheLine);
  }

  // Where each weight is used and what it reads there.
  void make_rule(Part* of_filter, Part* of_place) const {
    const int64_t channels = conv_.channels / conv_.groups, taps = conv_.kernel_h * conv_.kernel_w;
    for (int64_t o = 0; o < conv_.filters; ++o) of_filter[o] = backward_ ? reads(o) : part(o, 0);
    for (int64_t channel = 0; channel < conv_.channels; ++channel)
      for (int64_t i = 0; i < taps; ++i) {
        const int64_t c = channel % channels;
        const int64_t place = conv_.weight_channels_last ? i * channels + c : c * taps + i;
        const int64_t bucket = phase_of(i) * blocks_ * to_.channels + channel;
        const Part of_channel = backward_ ? part(bucket, 0) : reads(channel);
        of_place[channel / channels * filter_size() + place] = {
            of_channel.bucket, of_channel.offset + part(0, window_.place(i, tap(i))).offset};
      }
  }
  // Of a channel that is read.
  Part reads(int64_t channel) const {
    return part(channel / block_ * to_.channels, channel % block_ * window_.of_channel());
  }
  // Input pixels of a phase see the taps of that phase, and the outputs before their own.
  int64_t phase_of(int64_t tap) const {
    return tap / conv_.kernel_w * conv_.dilation_h % write_h_ * write_w_ +
           tap % conv_.kernel_w * conv_.dilation_w % write_w_;
  }
  Window::Tap tap(int64_t i) const {
    const int64_t u = i / conv_.kernel_w * conv_.dilation_h;
    const int64_t v = i % conv_.kernel_w * conv_.dilation_w;
    if (!backward_) return {u, v};
    return {before_h_ - u / write_h_, lanes_.before - v / write_w_};
  }
  static Part part(int64_t bucket, int64_t vectors) {
    return {static_cast<int32_t>(bucket), static_cast<int32_t>(vectors * kCount)};
  }

  // `then(group, first, last)` for each group of images and the part of its `rows` that is due.
  template <class Then>
  void for_each_group(int64_t rows, const Worker& worker, Then then) const {
    const int64_t first = worker.first(groups_ * rows), last = worker.last(groups_ * rows);
    if (first == last) return;
    for (int64_t group = first / rows; group * rows < last; ++group)
      then(group, std::max(first - group * rows, int64_t{0}), std::min(last - group * rows, rows));
  }
  int64_t images_of(int64_t group) const { return std::min(kCount, conv_.images - group * kCount); }

  // Fills the lanes that rows [first, last) of the grid read.
  void read(const Number* from, int64_t group, int64_t first, int64_t last, Number* lanes) const {
    const int64_t of_row = lanes_.vectors() * kCount;
    const int64_t begin = first * read_h_;
    const int64_t end = (last - 1) * read_h_ + 1 + after_h_ + (backward_ ? before_h_ : 0);
    const int64_t top = std::clamp(before_h_, begin, end);
    const int64_t bottom = std::clamp(before_h_ + from_.height, top, end);
    std::memset(lanes + begin * of_row, 0, (top - begin) * of_row * sizeof(Number));
    std::memset(lanes + bottom * of_row, 0, (end - bottom) * of_row * sizeof(Number));
    to_lanes(from + group * kCount * from_.of_image + (top - before_h_) * from_.of_row, from_,
             images_of(group), bottom - top, lanes_, lanes + top * of_row);
  }

  void sums(const Number* from, const Entries<Number>& entries, const Number* bias, Number* to,
            const Worker& worker) const {
    Number* lanes = reinterpret_cast<Number*>(worker.scratch);
    Number* window = reinterpret_cast<Number*>(worker.scratch + lane_bytes());
    Number* strip = reinterpret_cast<Number*>(worker.scratch + lane_bytes() + window_bytes());
    for_each_group(grid_h_, worker, [&](int64_t group, int64_t first, int64_t last) {
      read(from, group, first, last, lanes);
      for (int64_t row = first; row < last; row += strip_) {
        const int64_t end = std::min(row + strip_, last);
        for (int64_t phase = 0; phase < phases(); ++phase)
          fill_strip(lanes, entries, phase, row, end, bias, window, strip);
        write(strip, group, row * write_h_ - shift_h_, (end - row) * write_h_, to);
      }
    });
  }

  // Rows [first, last) of the grid, of which one phase of outputs is computed.
  void fill_strip(const Number* lanes, const Entries<Number>& entries, int64_t phase, int64_t first,
                  int64_t last, const Number* bias, Number* window, Number* strip) const {
    const int64_t a = phase / write_w_ - shift_h_, b = phase % write_w_ - shift_w_;
    const int64_t top = std::max(first, ceil_div(std::max<int64_t>(-a, 0), write_h_));
    const int64_t left = ceil_div(std::max<int64_t>(-b, 0), write_w_);
    const int64_t bottom = std::min(last, end_of(to_.height - a, write_h_));
    const int64_t right = end_of(to_.width - b, write_w_);
    const int64_t strip_row = to_.width * kCount;
    for (int64_t row = top; row < bottom; row += tile_.rows)
      for (int64_t column = left; column < right; column += tile_.columns) {
        const TileKernels<Number> kernels = kernels_of<Number>(
            std::min(tile_.rows, bottom - row), std::min(tile_.columns, right - column));
        const Tile<Number> y = {strip + ((row - first) * write_h_ + a + shift_h_) * strip_row +
                                    (column * write_w_ + b) * kCount,
                                write_w_ * kCount, write_h_ * strip_row,
                                strip_ * write_h_ * strip_row};
        for (int64_t block = 0; block < blocks_; ++block) {
          copy_window(lanes, row, column, block, window);
          kernels.sum({entries.start + (phase * blocks_ + block) * to_.channels, entries.offset,
                       entries.value, to_.channels},
                      window, window_.of_row() * kCount, y, block == 0, bias);
        }
      }
  }
  // The first multiple of `step` that is not below `size`, in steps.
  static int64_t end_of(int64_t size, int64_t step) { return size <= 0 ? 0 : ceil_div(size, step); }

  // Copies what the tile at a place of the grid reads of a block of channels.
  void copy_window(const Number* lanes, int64_t row, int64_t column, int64_t block,
                   Number* window) const {
    const int64_t first = block * block_, top = row * read_h_;
    const int64_t from = top * lanes_.vectors() + first * lanes_.of_channel + column;
    window_.copy(
        lanes + from * kCount, lane_rows_ - top, std::min(block_, from_.channels - first),
        [&](int64_t i) { return tap(i); }, window);
  }

  // Copies a strip to rows [first, first + rows) of what is written, as far as there are such.
  void write(const Number* strip, int64_t group, int64_t first, int64_t rows, Number* to) const {
    const int64_t top = std::max<int64_t>(first, 0), bottom = std::min(first + rows, to_.height);
    const int64_t of_channel = strip_ * write_h_ * to_.width * kCount;
    const int64_t pixels = (bottom - top) * to_.width;
    if (pixels <= 0) return;
    strip += (top - first) * to_.width * kCount;
    to += group * kCount * to_.of_image + top * to_.of_row;
    if (conv_.channels_last)
      for (int64_t i = 0; i < pixels; ++i)
        scatter_lanes(strip + i * kCount, of_channel, images_of(group), to_.channels,
                      to + i * to_.of_column, to_.of_image);
    else
      for (int64_t c = 0; c < to_.channels; ++c)
        scatter_lanes(strip + c * of_channel, kCount, images_of(group), pixels,
                      to + c * to_.of_channel, to_.of_image);
  }

  // The gradients of the entries, of this thread's part of the outputs.
  void products(const Number* x, const Number* y_gradient, const Entries<Number>& entries,
                int64_t kept, const Worker& worker) const {
    Number* gradient = reinterpret_cast<Number*>(worker.scratch);
    Number* lanes = reinterpret_cast<Number*>(worker.scratch + gradient_bytes(kept));
    Number* window = lanes + lane_bytes() / sizeof(Number);
    Number* dy = window + window_bytes() / sizeof(Number);
    const int64_t dy_row = dy_.vectors() * kCount;
    std::fill_n(gradient, kept, Number(0));
    for_each_group(grid_h_, worker, [&](int64_t group, int64_t first, int64_t last) {
      read(x, group, first, last, lanes);
      to_lanes(y_gradient + group * kCount * y_.of_image + first * y_.of_row, y_, images_of(group),
               last - first, dy_, dy + first * dy_row);
      for (int64_t row = first; row < last; row += tile_.rows)
        for (int64_t column = 0; column < y_.width; column += tile_.columns) {
          const TileKernels<Number> kernels = kernels_of<Number>(
              std::min(tile_.rows, last - row), std::min(tile_.columns, y_.width - column));
          const Tile<const Number> of_y = {dy + row * dy_row + column * kCount, kCount, dy_row,
                                           dy_.of_channel * kCount};
          for (int64_t block = 0; block < blocks_; ++block) {
            copy_window(lanes, row, column, block, window);
            kernels.products(
                {entries.start + block * y_.channels, entries.offset, nullptr, y_.channels}, window,
                window_.of_row() * kCount, of_y, gradient);
          }
        }
    });
  }

  MaskedConv conv_;
  int64_t pass_;
  bool backward_;
  Activation4d x_, y_, from_, to_;
  int64_t groups_;             // of images
  int64_t reach_h_, reach_w_;  // from the first tap of a kernel to its last
  // A grid of places reads every `read_h_` rows (columns likewise, as `lanes_` has them) and writes
  // `write_h_ x write_w_` numbers, the phases, at each, from `-shift` on.
  int64_t read_h_, write_h_, write_w_, shift_h_, shift_w_;
  int64_t grid_h_;
  int64_t before_h_, after_h_;  // rows that are read around
  LaneRow lanes_;
  int64_t lane_rows_;
  LaneRow dy_;
  TileShape tile_;
  Window window_;
  int64_t strip_;           // rows of the grid between two writes
  int64_t block_, blocks_;  // of the channels that are read
};

}  // namespace spre
