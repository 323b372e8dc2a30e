// The C interface of the inference engine. Python fills in steps and runs them in one call.
//
// A program is an array of steps over buffers. All activations are channels-last: a pixel is
// `channels` consecutive elements, and the next pixel lies `*_stride` elements further on. Those
// between planar convs may lie in planes instead. No function keeps state: two threads may run the
// same program over different buffers at once.
#pragma once

#include <cstdint>

namespace spre {

enum Kind : int64_t {
  kSparseConv = 0,     // N:M weights, see below; also linear (a 1x1 conv over N pixels)
  kDenseConv = 1,      // without groups and dilation: the stem, and layers left dense
  kDepthwiseConv = 2,  // one filter a channel
  kMaxPool = 3,
  kAveragePool = 4,   // the divisor is the number of taps, or of those inside where count_inside
  kAffine = 5,        // y = activation(x * scale + bias + residual), scale and residual optional
  kCopy = 6,          // x to y, pixel by pixel: concatenation where it cannot be avoided
  kWinogradConv = 7,  // a dense 3x3 conv, without groups, dilation and strides; float32
};

enum Activation : int64_t {
  kIdentity = 0,
  kRelu = 1,
  kRelu6 = 2,
  kSilu = 3,
  kHardswish = 4,
};

enum Type : int64_t { kFloat32 = 0, kBFloat16 = 1 };

inline constexpr int64_t kPlaneSlack = 16;  // elements behind a plane, which are anyone's

// One operation. An operand is the number of a buffer (-1: none) and an offset into it in bytes.
//
// Weights of kSparseConv, contiguous and aligned to 64 bytes:
//   [groups][ceil(O / 16)][ceil(C / channel_group)][kernel_h * kernel_w][slots][2][lanes]
// with O outputs and C inputs in each of the groups. [..][0][:] are values, [..][1][:] are the
// channels, counted from the first of the channel group, that they multiply. float32: 16 lanes of
// 4 bytes, lane l belongs to output l; channel_group is 16 or 32. bfloat16: 32 lanes of 2 bytes,
// lanes 2l and 2l + 1 belong to output l; channel_group is 32. Unused slots hold value 0, channel
// 0. The non-zeros of an output are in the order of their channels.
//
// Where `parts` is 2 or 4 (float32, channel_group 16, a number of slots that it divides) each part
// of the slots holds those of as large a part of the channel group, as it can where M divides such
// a part: what picks one of fewer channels is faster on shorter registers. With 4 parts a channel c
// is given by the places of its four bytes, 4c to 4c + 3 from the lowest byte on, for shuffles of
// bytes.
//
// Where `planar` is 1 (float32, one part), neighbouring pixels share registers instead of outputs:
//   [groups][O][ceil(C / channel_group)][kernel_h * kernel_w][slots][2]
// with a value and its channel side by side.
// Weights of kDenseConv: float32 [ceil(O / 16)][kernel_h][kernel_w * C][16], or bfloat16
// [ceil(O / 16)][kernel_h][ceil(kernel_w * C / 2)][16][2], a lone last number beside a zero.
// Weights of kWinogradConv: float32 [ceil(O / 16)][side + 2][side + 2][C][16], the transformed
// filters of tiles with `winograd` outputs a side, 2 or 4.
// Weights of kDepthwiseConv: [kernel_h * kernel_w][ceil(C / 16) * 16]; of kAffine: the scale, [C],
// always float32.
// Bias is always float32, padded with zeros to a multiple of 16 outputs (per group).
struct Step {
  int64_t kind;
  int64_t type;  // of x, y, residual and weights
  int64_t x, x_offset, x_stride;
  int64_t y, y_offset, y_stride;
  int64_t residual, residual_offset, residual_stride;
  int64_t weight, weight_offset;
  int64_t bias, bias_offset;
  int64_t batch, height, width, channels;       // of x, all groups together
  int64_t out_height, out_width, out_channels;  // of y
  int64_t kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  int64_t groups;
  int64_t activation;
  int64_t count_inside;
  int64_t slots, channel_group, parts, planar;
  // 1, which only a planar conv takes: the operand lies in planes. Image by image and channel by
  // channel, the pixels of a plane side by side; planes lie `*_stride` elements apart, which is at
  // least kPlaneSlack more than they have. Where y does, the residual must, and the activation is
  // none or one of the first two.
  int64_t x_planes, y_planes, residual_planes;
  int64_t winograd;
  // How the work is cut, for experiments and tests. 0 in tile_pixels (of kDenseConv in tile_rows,
  // which is all that it looks at): the engine's own rule chooses all of these.
  int64_t tile_blocks;  // blocks of 16 outputs held in registers
  int64_t tile_pixels;  // pixels held in registers; planar: registers of pixels; of kWinogradConv:
                        // tiles that are transformed at once
  int64_t tile_rows;    // output rows (1x1: times out_width pixels) packed at once
  int64_t split;        // parts that the outputs are divided into among threads
  // 1: x is not packed. Only 1x1 without padding, where C / groups is a multiple of the channels
  // that a register holds: of channel_group, or with AVX2 of channel_group / parts.
  int64_t direct;
};

// The OpenMP runtime that torch runs on, as its GOMP_parallel and omp_get_* functions. Null where
// there is none: everything then runs on the calling thread.
struct OpenMP {
  void (*parallel)(void (*)(void*), void*, unsigned threads, unsigned flags);
  int (*thread)();
  int (*threads)();
};

}  // namespace spre

extern "C" {

// Changes whenever this file does, in any way that its callers see.
int64_t spre_version();

// "avx512_bf16", "avx512", "avx2" or "portable". Only the first has kernels for bfloat16.
const char* spre_isa();

// Whether this CPU can run the library of that spre_isa(). Ask the portable library.
int64_t spre_supports(const char* isa);

// Whether this library has a kernel for a step: for its kind, type and layout of weights.
int64_t spre_takes(const spre::Step* step);

// The bytes of scratch, aligned to 64, that a run on so many threads needs.
int64_t spre_scratch(const spre::Step* steps, int64_t count, int64_t threads);

// Runs the steps in order; each sees what the ones before it wrote.
void spre_run(const spre::Step* steps, int64_t count, void* const* buffers, void* scratch,
              int64_t threads, const spre::OpenMP* openmp);
}
