// autoencoder on a GPU: device code and launches, without framework types.
// efficientad_fast/ops/autoencoder.py is the contract.
//
// A launch for each of the 13 layers. A block has a tile of 8 columns by 2 to 16 rows of one image's result, and some
// of its outputs. All that these pixels read, a window of the image, comes to shared memory once: copied, or blended of
// four pixels where the layer reads a resized image, so that no resized image is ever written and no pixel of it is
// blended for each tap anew. Then the sum runs over taps and channels: every tap is the same window, read by ldmatrix
// from another place, and only weights are still loaded, two or three stages ahead.
//
// For one image a layer waits more than it computes. So blocks are many, with small tiles where there are few pixels,
// and the sum of a small tile is divided into slices, each in other warps, which are added in the end, in the same
// order every time. enconv6, whose result of 256 x 256 pixels is one pixel, has a block for each number that it writes.
//
// Why layers do not share a launch, though images between enconv5 and deconv2 fit in shared memory: one block loads 100
// to 150 GB/s from L2, the 131 KB of weights of such a layer in about 1 us and the 524 KB of enconv6 in 4, where 16 to
// 64 blocks take a tenth of that; the next launch of a graph begins about 1 us after the last. The products of deconv2,
// 81 pixels, take one multiprocessor 3 us. What is left is deconv1, 16 pixels, computed anew by each block of deconv2:
// half a microsecond less with one image, and with 32 images 50 MB of weights more. (Reckoned, not measured.)
//
// What has other channels than vectors of 8 is copied number by number, and float32 takes a plain way: both are right
// and slow.

#pragma once

#include "../autoencoder_layers.h"
#include "device.h"
#include "numbers.h"
#include "ptx.h"

#include <algorithm>
#include <array>
#include <cstdint>

namespace efficientad_fast::cuda {

namespace autoencoder_layer {

inline constexpr int kTileColumns = 8;
inline constexpr int kChunk = 64;   // most channels of a window
inline constexpr int kStep = 16;    // depth of one product of tensor cores
inline constexpr int kPiece = 64;   // depth of a slice's part of a stage
inline constexpr int kEight = 8;    // numbers of 16 bits in a vector
inline constexpr int kFlat = 4;     // channels of an image's pixel in shared memory
inline constexpr int kMostTaps = 64;
inline constexpr int kMostSteps = kMostTaps * kChunk / kStep;
// Rows of matrices in shared memory are so much longer that eight of them begin in different banks.
inline constexpr int kSpace = 8;
// Of a stage of weights, for one output.
inline constexpr int kPieceLength = kPiece + kSpace;

// The most that a launch asks for; convolve_shared_bytes counts.
inline constexpr std::size_t kAutoencoderSharedBytes = 96 * 1024;

// Divides by the same number again and again. Exact while dividend * number is below 2^32.
struct Divisor {
  unsigned number = 1, reciprocal = 0;

  Divisor() = default;
  explicit Divisor(int64_t by)
      : number(static_cast<unsigned>(by)),
        reciprocal(by == 1 ? 0 : static_cast<unsigned>(((uint64_t{1} << 32) + by - 1) / by)) {}
};

__device__ __forceinline__ int divided(int dividend, const Divisor& by) {
  return by.reciprocal == 0 ? dividend : static_cast<int>(__umulhi(static_cast<unsigned>(dividend), by.reciprocal));
}

// A layer of some images. Strides and lengths in numbers.
struct Layer {
  const void* read;  // (N, height, width, channels), channels next to each other
  int64_t image_stride, row_stride, pixel_stride;
  int height, width, channels;
  const void* weights;  // (outputs, kernel, kernel, channels)
  const float* bias;
  void* out;  // (N, out_height, out_width, outputs)
  int out_height, out_width, outputs;
  int images;
  int kernel, stride, padding;
  int read_height, read_width;  // of what the convolution reads, which is larger or smaller where it is resized
  float scale_y, scale_x;       // rows and columns of `read` for one of that
  bool resized, relu;
  bool narrow;  // whether out is of e4m3

  // What follows from that: launch_layer.
  bool flat;             // pixels of kFlat numbers without space, so that a row of the kernel is one step deep
  bool vectors_read;     // whether pixels are copied in vectors
  bool vectors_weights;  // whether weights are, and lie in the order of the sum
  bool vectors_out;
  int tap_depth;   // channels of a tap in the sum
  int row_length;  // of a weight: kernel * kernel * channels
  int depth;       // kernel * kernel * tap_depth, of a chunk of channels
  int pitch;       // from pixel to pixel in the window
  Divisor by_kernel, by_window_columns, by_tap_steps, by_tap_vectors;
  int window_columns, tile_columns;
};

template <typename Element>
inline constexpr Product kProductOf = std::is_same_v<Element, __half> ? Product::kFloat16 : Product::kBFloat16;

// What a block computes, and how its warps divide it.
template <int kTileRows, int kTileOutputs, int kPixelWarps, int kOutputWarps, int kTileSlices, int kTileStages>
struct TileShape {
  static constexpr int kRows = kTileRows, kOutputs = kTileOutputs, kSlices = kTileSlices, kStages = kTileStages;
  static constexpr int kPixels = kRows * kTileColumns;
  static constexpr int kWarpsOfOutputs = kOutputWarps;
  static constexpr int kWarpsOfSlice = kPixelWarps * kOutputWarps;
  static constexpr int kThreads = 32 * kWarpsOfSlice * kSlices;
  static constexpr int kPixelTiles = kPixels / (16 * kPixelWarps);    // of a warp
  static constexpr int kOutputTiles = kOutputs / (16 * kOutputWarps);  // of a warp, 16 outputs each
  static constexpr int kStageNumbers = kSlices * kOutputs * kPieceLength;
  // Of a multiprocessor: with twice the sums, half as many threads.
  static constexpr int kBlocks = (kPixelTiles * kOutputTiles >= 16 ? 256 : 512) / kThreads;
  // Many sums leave no registers for filling a second window.
  static constexpr bool kOneWindow = kPixelTiles > 2;
  static constexpr int kSumLength = kOutputs + 8;
  static constexpr std::size_t kSumBytes = sizeof(float) * kSlices * kPixels * kSumLength;
  static constexpr std::size_t kWeightBytes = 2 * kStages * kStageNumbers;
  static_assert(kPixelTiles * 16 * kPixelWarps == kPixels && kOutputTiles * 16 * kOutputWarps == kOutputs);
};

inline constexpr std::size_t kPlaceBytes = sizeof(int) * kMostSteps;
inline constexpr std::size_t kHeadBytes = kPlaceBytes + sizeof(float) * 64;  // places and biases

__host__ __device__ constexpr std::size_t window_bytes(int rows, int kernel, int stride, int pitch) {
  const int window_rows = (rows - 1) * stride + kernel, window_columns = (kTileColumns - 1) * stride + kernel;
  return (2 * static_cast<std::size_t>(window_rows * window_columns * pitch) + 127) / 128 * 128;
}

template <typename Shape>
constexpr std::size_t convolve_shared_bytes(int kernel, int stride, int pitch) {
  const std::size_t window = window_bytes(Shape::kRows, kernel, stride, pitch);
  return kHeadBytes + std::max(window + Shape::kWeightBytes, Shape::kSumBytes);
}

// For many pixels, and from there to few.
using HighTile = TileShape<32, 64, 4, 1, 1, 3>;
using WideTile = TileShape<16, 64, 2, 2, 2, 3>;
using LargeTile = TileShape<8, 64, 2, 2, 1, 3>;
using NarrowTile = TileShape<8, 32, 4, 1, 1, 4>;
using SlicedTile = TileShape<4, 32, 2, 1, 4, 3>;
using SmallTile = TileShape<2, 16, 1, 1, 8, 3>;

template <typename Shape>
inline constexpr bool kFitsShared = convolve_shared_bytes<Shape>(4, 2, kChunk + kSpace) <= kAutoencoderSharedBytes &&
                                    convolve_shared_bytes<Shape>(8, 1, kChunk + kSpace) <= kAutoencoderSharedBytes;
static_assert(kFitsShared<LargeTile> && kFitsShared<NarrowTile> && kFitsShared<SlicedTile> && kFitsShared<SmallTile>);

// Of a resized row or column: the one before in what was resized, that after, and how near to the latter it is.
struct ResizedPlace {
  int before, after;
  float along;

  __device__ __forceinline__ ResizedPlace(int place, float scale, int length) {
    const float position = max(__fmaf_rn(static_cast<float>(place) + 0.5f, scale, -0.5f), 0.0f);
    before = min(static_cast<int>(position), length - 1);  // rounding may reach beyond the last one
    after = min(before + 1, length - 1);
    along = min(position - static_cast<float>(before), 1.0f);
  }
};

// Four pixels, and what each of them counts.
struct Corners {
  int upper_left, upper_right, lower_left, lower_right;  // what is resized has less than 2^31 numbers an image
  float weights[4];

  __device__ __forceinline__ Corners(const Layer& p, int y, int x) {
    const ResizedPlace row(y, p.scale_y, p.height), column(x, p.scale_x, p.width);
    const int row_stride = static_cast<int>(p.row_stride), pixel_stride = static_cast<int>(p.pixel_stride);
    const int above = row.before * row_stride, below = row.after * row_stride;
    const int before = column.before * pixel_stride, after = column.after * pixel_stride;
    upper_left = above + before, upper_right = above + after;
    lower_left = below + before, lower_right = below + after;
    weights[0] = (1 - row.along) * (1 - column.along), weights[1] = (1 - row.along) * column.along;
    weights[2] = row.along * (1 - column.along), weights[3] = row.along * column.along;
  }
};

__device__ __forceinline__ float blended(const Corners& corners, float upper_left, float upper_right, float lower_left,
                                         float lower_right) {
  const float upper = __fmaf_rn(upper_right, corners.weights[1], upper_left * corners.weights[0]);
  return __fmaf_rn(lower_right, corners.weights[3], __fmaf_rn(lower_left, corners.weights[2], upper));
}

// One number of what the convolution reads.
template <typename Element>
__device__ __forceinline__ float number_read(const Layer& p, const Element* image, int y, int x,
                                             int channel) {
  if (!p.resized) {
    return to_number<float>(image[y * p.row_stride + x * p.pixel_stride + channel]);
  }
  const Corners corners(p, y, x);
  return blended(corners, to_number<float>(image[corners.upper_left + channel]),
                 to_number<float>(image[corners.upper_right + channel]),
                 to_number<float>(image[corners.lower_left + channel]),
                 to_number<float>(image[corners.lower_right + channel]));
}

// Four pixels' vectors, and what they are blended to.
template <typename Element>
struct CornerVectors {
  Vector<Element> upper_left, upper_right, lower_left, lower_right;

  __device__ __forceinline__ void load(const Corners& corners, const Element* image) {
    const auto vector_at = [image](int place) { return *reinterpret_cast<const Vector<Element>*>(image + place); };
    upper_left = vector_at(corners.upper_left), upper_right = vector_at(corners.upper_right);
    lower_left = vector_at(corners.lower_left), lower_right = vector_at(corners.lower_right);
  }

  __device__ __forceinline__ Vector<Element> blend(const Corners& corners, bool taken) const {
    Vector<Element> result;
#pragma unroll
    for (int i = 0; i < kEight; ++i) {
      const float number =
          blended(corners, to_number<float>(upper_left.element[i]), to_number<float>(upper_right.element[i]),
                  to_number<float>(lower_left.element[i]), to_number<float>(lower_right.element[i]));
      result.element[i] = to_element<Element>(taken ? number : 0.0f);
    }
    return result;
  }
};

// Where a column of the window lies in its row: with stride 2 the odd ones after the even ones, for those that a tap
// reads for pixels beside each other are to lie beside each other.
__device__ __forceinline__ int window_place(const Layer& p, int column) {
  return p.stride == 1 || p.flat ? column : column / 2 + (column % 2) * ((p.window_columns + 1) / 2);
}

// A vector of the window: the pixel in what the convolution reads, its channel, and its place.
struct WindowVector {
  int y, x, channel, place;
  bool inside;  // what is read has this pixel

  __device__ __forceinline__ WindowVector(const Layer& p, int index, int first_y, int first_x,
                                          int first_channel) {
    const int pixel = divided(index, p.by_tap_vectors);
    const int row = divided(pixel, p.by_window_columns), column = pixel - row * p.window_columns;
    const int size = p.flat ? kFlat : kEight;
    const int offset = index * size - pixel * p.tap_depth;
    y = first_y + row, x = first_x + column, channel = first_channel + offset;
    place = (row * p.window_columns + window_place(p, column)) * p.pitch + offset;
    inside = y >= 0 && y < p.read_height && x >= 0 && x < p.read_width;
  }
};

// Fills the window whose first pixel is (y, x) of what the convolution reads; zeros outside. Copies are neither
// committed nor waited for.
template <typename Element, typename Shape>
__device__ __forceinline__ void fill_window(const Layer& p, const Element* image, int y, int x,
                                            int first_channel, Element* window) {
  constexpr int kThreads = Shape::kThreads;
  const int window_rows = (Shape::kRows - 1) * p.stride + p.kernel;
  const int count = window_rows * p.window_columns * static_cast<int>(p.by_tap_vectors.number);
  if (!p.vectors_read) {
    const int size = p.flat ? kFlat : kEight;
#pragma unroll 1
    for (int i = threadIdx.x; i < count; i += kThreads) {
      const WindowVector vector(p, i, y, x, first_channel);
#pragma unroll 1
      for (int j = 0; j < size; ++j) {
        const int channel = vector.channel + j;
        const bool taken = vector.inside && channel < p.channels;
        window[vector.place + j] =
            to_element<Element>(taken ? number_read(p, image, vector.y, vector.x, channel) : 0.0f);
      }
    }
  } else if (!p.resized) {
#pragma unroll 4
    for (int i = threadIdx.x; i < count; i += kThreads) {
      const WindowVector vector(p, i, y, x, first_channel);
      const bool taken = vector.inside && vector.channel < p.channels;
      const Element* const from = image + vector.y * p.row_stride + vector.x * p.pixel_stride + vector.channel;
      if (p.flat) {
        copy_async<kFlat * sizeof(Element)>(window + vector.place, taken ? from : image, taken);
      } else {
        copy_async<kEight * sizeof(Element)>(window + vector.place, taken ? from : image, taken);
      }
    }
  } else {
    // Two vectors of a pixel at once: loads do not wait for each other, and its corners are found once.
    const int pairs = static_cast<int>(p.by_tap_steps.number), pair_count = count / 2;
#pragma unroll 1
    for (int i = threadIdx.x; i < pair_count; i += kThreads) {
      const int pixel = divided(i, p.by_tap_steps), row = divided(pixel, p.by_window_columns);
      const int column = pixel - row * p.window_columns, offset = (i - pixel * pairs) * kEight;
      const int read_y = y + row, read_x = x + column;
      const bool inside = read_y >= 0 && read_y < p.read_height && read_x >= 0 && read_x < p.read_width;
      Element* const to = window + (row * p.window_columns + window_place(p, column)) * p.pitch + offset;
      // Of what is outside the corners are pixels too, of which nothing is taken.
      const Corners corners(p, read_y, read_x);
      CornerVectors<Element> vectors[2];
      bool taken[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int channel = first_channel + offset + j * pairs * kEight;
        taken[j] = inside && channel < p.channels;
        vectors[j].load(corners, image + (channel < p.channels ? channel : 0));
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        *reinterpret_cast<Vector<Element>*>(to + j * pairs * kEight) = vectors[j].blend(corners, taken[j]);
      }
    }
  }
}

// What a thread loads of each stage's weights, which lie as (slices, outputs, kPieceLength): zeros beyond the depth and
// the outputs. Threads beside each other load what lies beside each other, of all slices.
template <typename Element, typename Shape>
struct WeightLoads {
  static constexpr int kVectors = kPiece / kEight * Shape::kSlices;  // of an output
  static constexpr int kOutputsAtOnce = Shape::kThreads / kVectors;
  static constexpr int kStageDepth = Shape::kSlices * kPiece;
  static_assert(Shape::kOutputs % kOutputsAtOnce == 0);

  const Element* first_row;
  int output, depth, place;

  __device__ __forceinline__ WeightLoads(const Layer& p, int first_output) {
    const int vector = threadIdx.x % kVectors, slice = vector / (kPiece / kEight), row = threadIdx.x / kVectors;
    output = first_output + row, depth = vector * kEight;
    place = (slice * Shape::kOutputs + row) * kPieceLength + depth - slice * kPiece;
    first_row = static_cast<const Element*>(p.weights) + static_cast<int64_t>(output) * p.row_length;
  }

  __device__ __forceinline__ void load(const Layer& p, int first_channel, int stage, Element* to) const {
    const int stage_depth = depth + stage * kStageDepth;
    if (p.vectors_weights) {
#pragma unroll
      for (int more = 0; more < Shape::kOutputs; more += kOutputsAtOnce) {
        copy_async<16>(to + place + more * kPieceLength, first_row + stage_depth + more * p.row_length,
                       stage_depth < p.depth && output + more < p.outputs);
      }
      return;
    }
#pragma unroll 1
    for (int more = 0; more < Shape::kOutputs; more += kOutputsAtOnce) {
      const bool is_row = stage_depth < p.depth && output + more < p.outputs;
#pragma unroll 1
      for (int j = 0; j < kEight; ++j) {
        const int tap = (stage_depth + j) / p.tap_depth, tap_channel = (stage_depth + j) % p.tap_depth;
        const int channel = first_channel + tap_channel;
        const bool is_weight = is_row && channel < p.channels;
        to[place + more * kPieceLength + j] =
            is_weight ? first_row[more * p.row_length + tap * p.channels + channel] : to_element<Element>(0.0f);
      }
    }
  }
};

// Eight numbers of the result, of which `count` are there.
template <typename Element>
__device__ __forceinline__ void store_eight(const Layer& p, const float (&numbers)[kEight], int64_t place,
                                            int count) {
  if (p.narrow) {
    unsigned char* const out = static_cast<unsigned char*>(p.out) + place;
    unsigned short pairs[kEight / 2];
#pragma unroll
    for (int i = 0; i < kEight / 2; ++i) {
      pairs[i] = to_e4m3(numbers[2 * i], numbers[2 * i + 1]);
    }
    if (p.vectors_out) {
      *reinterpret_cast<uint2*>(out) = make_uint2(pairs[0] | static_cast<unsigned>(pairs[1]) << 16,
                                                  pairs[2] | static_cast<unsigned>(pairs[3]) << 16);
      return;
    }
#pragma unroll
    for (int i = 0; i < kEight; ++i) {
      if (i < count) {
        out[i] = static_cast<unsigned char>(pairs[i / 2] >> (i % 2 * 8));
      }
    }
    return;
  }
  Element* const out = static_cast<Element*>(p.out) + place;
  Vector<Element> vector;
#pragma unroll
  for (int i = 0; i < kEight; ++i) {
    vector.element[i] = to_element<Element>(numbers[i]);
  }
  if (p.vectors_out) {
    *reinterpret_cast<Vector<Element>*>(out) = vector;
    return;
  }
#pragma unroll
  for (int i = 0; i < kEight; ++i) {
    if (i < count) {
      out[i] = vector.element[i];
    }
  }
}

// NaN stays.
__device__ __forceinline__ float rectified(const Layer& p, float number) {
  return p.relu && number < 0 ? 0.0f : number;
}

// A block for each tile of pixels, tile of outputs and image.
template <typename Element, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocks) convolve(const Layer p) {
  EFFICIENTAD_FAST_DYNAMIC_SHARED(unsigned char, shared);
  int* const places = reinterpret_cast<int*>(shared);
  float* const biases = reinterpret_cast<float*>(shared + kPlaceBytes);
  Element* const window = reinterpret_cast<Element*>(shared + kHeadBytes);
  Element* const weights =
      reinterpret_cast<Element*>(shared + kHeadBytes + window_bytes(Shape::kRows, p.kernel, p.stride, p.pitch));

  const int tile_row = static_cast<int>(blockIdx.x) / p.tile_columns;
  const int first_y = tile_row * Shape::kRows;
  const int first_x = (static_cast<int>(blockIdx.x) - tile_row * p.tile_columns) * kTileColumns;
  const int first_output = blockIdx.y * Shape::kOutputs;
  const int64_t image_index = blockIdx.z;
  const Element* const image = static_cast<const Element*>(p.read) + image_index * p.image_stride;

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int slice = warp / Shape::kWarpsOfSlice, warp_of_slice = warp % Shape::kWarpsOfSlice;
  const int first_pixel = warp_of_slice / Shape::kWarpsOfOutputs * Shape::kPixelTiles * 16;
  const int warp_output = warp_of_slice % Shape::kWarpsOfOutputs * Shape::kOutputTiles * 16;
  const int steps = p.depth / kStep;
  constexpr int kPieceSteps = kPiece / kStep;
  const int stages = (steps + Shape::kSlices * kPieceSteps - 1) / (Shape::kSlices * kPieceSteps);

  const WeightLoads<Element, Shape> weight_loads(p, first_output);
  const auto load_stage = [&](int first_channel, int stage) {
    if (stage < stages) {
      weight_loads.load(p, first_channel, stage, weights + stage % Shape::kStages * Shape::kStageNumbers);
    }
    commit_copies();
  };
  const auto fill = [&](int first_channel) {
    fill_window<Element, Shape>(p, image, first_y * p.stride - p.padding, first_x * p.stride - p.padding, first_channel,
                                window);
  };
  if (threadIdx.x < Shape::kOutputs) {
    const int output = first_output + threadIdx.x;
    const bool taken = output < p.outputs;
    copy_async<4>(biases + threadIdx.x, p.bias + (taken ? output : 0), taken);
  }

  // Where in the window each step of the sum begins, for the tile's first pixel.
  const int row_pitch = p.window_columns * p.pitch;
  const auto find_places = [&] {
    for (int step = threadIdx.x; step < steps; step += Shape::kThreads) {
      if (p.flat) {
        places[step] = step * row_pitch;
      } else {
        const int tap = divided(step, p.by_tap_steps), tap_row = divided(tap, p.by_kernel);
        const int column = window_place(p, tap - tap_row * p.kernel);
        places[step] = tap_row * row_pitch + column * p.pitch + step * kStep - tap * p.tap_depth;
      }
    }
  };
  // From there, where each of the warp's pixels is read.
  const Element* rows[Shape::kPixelTiles];
#pragma unroll
  for (int tile = 0; tile < Shape::kPixelTiles; ++tile) {
    const int pixel = first_pixel + tile * 16 + lane % 16;
    const int column_pitch = p.flat ? p.stride * p.pitch : p.pitch;
    rows[tile] = window + pixel / kTileColumns * p.stride * row_pitch + pixel % kTileColumns * column_pitch +
                 lane / 16 * kEight;
  }
  const int weight_place =
      (slice * Shape::kOutputs + warp_output + lane / 16 * 8 + lane % 8) * kPieceLength + lane / 8 % 2 * kEight;

  float sums[Shape::kPixelTiles][2 * Shape::kOutputTiles][4] = {};
  const auto multiply = [&](int place, const Element* right_rows) {
    unsigned left[Shape::kPixelTiles][4];
#pragma unroll
    for (int tile = 0; tile < Shape::kPixelTiles; ++tile) {
      load_matrices(left[tile], rows[tile] + place);
    }
#pragma unroll
    for (int pair = 0; pair < Shape::kOutputTiles; ++pair) {
      unsigned right[4];
      load_matrices(right, right_rows + pair * 16 * kPieceLength);
      const unsigned lower[2] = {right[0], right[1]}, upper[2] = {right[2], right[3]};
#pragma unroll
      for (int tile = 0; tile < Shape::kPixelTiles; ++tile) {
        multiply_add<kProductOf<Element>>(sums[tile][2 * pair], left[tile], lower);
        multiply_add<kProductOf<Element>>(sums[tile][2 * pair + 1], left[tile], upper);
      }
    }
  };
#pragma unroll 1
  for (int first_channel = 0; first_channel < (Shape::kOneWindow ? kChunk : p.channels); first_channel += kChunk) {
    if (first_channel > 0) {
      __syncthreads();
    }
    if (!p.resized) {
      fill(first_channel);
    }
#pragma unroll 1
    for (int stage = 0; stage < Shape::kStages - 1; ++stage) {
      load_stage(first_channel, stage);
    }
    // While weights are on their way.
    if (first_channel == 0) {
      find_places();
    }
    if (p.resized) {
      fill(first_channel);
    }
#pragma unroll 1
    for (int stage = 0; stage < stages; ++stage) {
      wait_for_copies<Shape::kStages - 2>();
      __syncthreads();
      load_stage(first_channel, stage + Shape::kStages - 1);
      const Element* const right_rows = weights + stage % Shape::kStages * Shape::kStageNumbers + weight_place;
      const int first_step = (stage * Shape::kSlices + slice) * kPieceSteps;
      if (first_step + kPieceSteps <= steps) {
        static_assert(kPieceSteps == 4);
        const int4 four = *reinterpret_cast<const int4*>(places + first_step);
        multiply(four.x, right_rows);
        multiply(four.y, right_rows + kStep);
        multiply(four.z, right_rows + 2 * kStep);
        multiply(four.w, right_rows + 3 * kStep);
      } else {
#pragma unroll 1
        for (int step = first_step; step < steps; ++step) {
          multiply(places[step], right_rows + (step - first_step) * kStep);
        }
      }
    }
  }

  // All sums meet where the window and weights were.
  __syncthreads();
  float* const all = reinterpret_cast<float*>(window);
#pragma unroll
  for (int tile = 0; tile < Shape::kPixelTiles; ++tile) {
#pragma unroll
    for (int eight = 0; eight < 2 * Shape::kOutputTiles; ++eight) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int pixel = first_pixel + tile * 16 + half * 8 + lane / 4;
        const int output = warp_output + eight * 8 + lane % 4 * 2;
        *reinterpret_cast<float2*>(all + (slice * Shape::kPixels + pixel) * Shape::kSumLength + output) =
            make_float2(sums[tile][eight][2 * half], sums[tile][eight][2 * half + 1]);
      }
    }
  }
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < Shape::kPixels * Shape::kOutputs / kEight; i += Shape::kThreads) {
    const int pixel = i / (Shape::kOutputs / kEight), output = i % (Shape::kOutputs / kEight) * kEight;
    const int y = first_y + pixel / kTileColumns, x = first_x + pixel % kTileColumns;
    const int count = p.outputs - first_output - output;
    if (y >= p.out_height || x >= p.out_width || count <= 0) {
      continue;
    }
    float numbers[kEight] = {};
    const auto add = [&numbers](const float* row) {
      const float4 first = *reinterpret_cast<const float4*>(row), last = *reinterpret_cast<const float4*>(row + 4);
      numbers[0] += first.x, numbers[1] += first.y, numbers[2] += first.z, numbers[3] += first.w;
      numbers[4] += last.x, numbers[5] += last.y, numbers[6] += last.z, numbers[7] += last.w;
    };
#pragma unroll
    for (int part = 0; part < Shape::kSlices; ++part) {
      add(all + (part * Shape::kPixels + pixel) * Shape::kSumLength + output);
    }
    add(biases + output);
#pragma unroll
    for (int j = 0; j < kEight; ++j) {
      numbers[j] = rectified(p, numbers[j]);
    }
    const int64_t place = ((image_index * p.out_height + y) * p.out_width + x) * p.outputs + first_output + output;
    store_eight<Element>(p, numbers, place, count);
  }
}

inline constexpr int kNumberThreads = 128;

// A block for each number of the result: for sums of many products, of few pixels, neither resized nor padded.
template <typename Element>
__global__ void __launch_bounds__(kNumberThreads) sum_for_number(const Layer p) {
  __shared__ float parts[kNumberThreads / 32];
  const int output = blockIdx.x % p.outputs, pixel = blockIdx.x / p.outputs;
  const int y = pixel / p.out_width * p.stride, x = pixel % p.out_width * p.stride;
  const Element* const image = static_cast<const Element*>(p.read) + blockIdx.z * p.image_stride + y * p.row_stride +
                               x * p.pixel_stride;
  const Element* const weights = static_cast<const Element*>(p.weights) + static_cast<int64_t>(output) * p.row_length;
  float sum = 0;
#pragma unroll 4
  for (int depth = threadIdx.x * kEight; depth < p.row_length; depth += kNumberThreads * kEight) {
    const int tap = divided(depth / kEight, p.by_tap_vectors), row = divided(tap, p.by_kernel);
    const int64_t place = row * p.row_stride + (tap - row * p.kernel) * p.pixel_stride + (depth - tap * p.channels);
    const Vector<Element> left = *reinterpret_cast<const Vector<Element>*>(image + place);
    const Vector<Element> right = *reinterpret_cast<const Vector<Element>*>(weights + depth);
#pragma unroll
    for (int i = 0; i < kEight; ++i) {
      sum = __fmaf_rn(to_number<float>(left.element[i]), to_number<float>(right.element[i]), sum);
    }
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  }
  if (threadIdx.x % 32 == 0) {
    parts[threadIdx.x / 32] = sum;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    float all = p.bias[output];
#pragma unroll
    for (int i = 0; i < kNumberThreads / 32; ++i) {
      all += parts[i];
    }
    const int64_t place = (static_cast<int64_t>(blockIdx.z) * p.out_height * p.out_width + pixel) * p.outputs + output;
    static_cast<Element*>(p.out)[place] = to_element<Element>(rectified(p, all));
  }
}

inline constexpr int kPlainThreads = 256;

// A thread for each number of the result, in float32.
__global__ void __launch_bounds__(kPlainThreads) convolve_plain(const Layer p) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kPlainThreads + threadIdx.x;
  const int64_t image_numbers = static_cast<int64_t>(p.out_height) * p.out_width * p.outputs;
  if (index >= image_numbers) {
    return;
  }
  const int output = static_cast<int>(index % p.outputs);
  const int64_t pixel = index / p.outputs;
  const int y = static_cast<int>(pixel / p.out_width), x = static_cast<int>(pixel % p.out_width);
  const float* const image = static_cast<const float*>(p.read) + blockIdx.z * p.image_stride;
  const float* weights = static_cast<const float*>(p.weights) + static_cast<int64_t>(output) * p.row_length;
  float sum = 0;
  for (int row = 0; row < p.kernel; ++row) {
    for (int column = 0; column < p.kernel; ++column, weights += p.channels) {
      const int place_y = y * p.stride - p.padding + row, place_x = x * p.stride - p.padding + column;
      if (place_y < 0 || place_y >= p.read_height || place_x < 0 || place_x >= p.read_width) {
        continue;
      }
      float tap_sum = 0;  // sums of sums: an order of magnitude nearer than one of thousands
      for (int channel = 0; channel < p.channels; ++channel) {
        tap_sum = __fmaf_rn(number_read(p, image, place_y, place_x, channel), weights[channel], tap_sum);
      }
      sum += tap_sum;
    }
  }
  const float number = rectified(p, sum + p.bias[output]);
  const int64_t place = static_cast<int64_t>(blockIdx.z) * image_numbers + index;
  if (p.narrow) {
    static_cast<unsigned char*>(p.out)[place] = static_cast<unsigned char>(to_e4m3(number, 0.0f));
  } else {
    static_cast<float*>(p.out)[place] = number;
  }
}

inline bool is_multiple(const void* pointer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

inline int64_t tiles_of(int64_t length, int64_t tile) { return (length + tile - 1) / tile; }

template <typename Shape>
int64_t tile_count(const Layer& p) {
  return tiles_of(p.out_height, Shape::kRows) * tiles_of(p.out_width, kTileColumns) *
         tiles_of(p.outputs, Shape::kOutputs) * p.images;
}

template <typename Element, typename Shape>
void launch_convolve(const Layer& p, cudaStream_t stream) {
  const int64_t tiles = tiles_of(p.out_height, Shape::kRows) * p.tile_columns;
  const dim3 blocks(static_cast<unsigned>(tiles), static_cast<unsigned>(tiles_of(p.outputs, Shape::kOutputs)),
                    static_cast<unsigned>(p.images));
  launch(convolve<Element, Shape>, blocks, dim3(Shape::kThreads),
         convolve_shared_bytes<Shape>(p.kernel, p.stride, p.pitch), stream, p);
}

// From so many blocks on a tile is not too large: multiprocessors of a GPU, and somewhat more.
inline constexpr int64_t kEnoughHigh = 240, kEnoughWide = 120, kEnoughBlocks = 160, kEnoughSliced = 80;
// Blocks of sum_for_number load all weights for every pixel.
inline constexpr int64_t kMostPixelsByNumber = 4;

template <typename Element>
void launch_products(const Layer& p, cudaStream_t stream) {
  const int64_t pixels = static_cast<int64_t>(p.out_height) * p.out_width;
  if (!p.resized && p.padding == 0 && p.vectors_read && p.vectors_weights && !p.narrow && !p.flat &&
      pixels <= kMostPixelsByNumber) {
    const dim3 blocks(static_cast<unsigned>(pixels * p.outputs), 1, static_cast<unsigned>(p.images));
    launch(sum_for_number<Element>, blocks, dim3(kNumberThreads), 0, stream, p);
  } else if (p.channels <= kChunk && p.outputs > NarrowTile::kOutputs && tile_count<HighTile>(p) >= kEnoughHigh &&
             tiles_of(p.out_height, WideTile::kRows) % 2 == 0 &&
             convolve_shared_bytes<HighTile>(p.kernel, p.stride, p.pitch) <= kAutoencoderSharedBytes) {
    launch_convolve<Element, HighTile>(p, stream);
  } else if (p.channels <= kChunk && p.outputs > NarrowTile::kOutputs && tile_count<WideTile>(p) >= kEnoughWide &&
             convolve_shared_bytes<WideTile>(p.kernel, p.stride, p.pitch) <= kAutoencoderSharedBytes) {
    launch_convolve<Element, WideTile>(p, stream);
  } else if (p.outputs > NarrowTile::kOutputs && tile_count<LargeTile>(p) >= kEnoughBlocks) {
    launch_convolve<Element, LargeTile>(p, stream);
  } else if (tile_count<NarrowTile>(p) >= kEnoughBlocks) {
    launch_convolve<Element, NarrowTile>(p, stream);
  } else if (tile_count<SlicedTile>(p) >= kEnoughSliced) {
    launch_convolve<Element, SlicedTile>(p, stream);
  } else {
    launch_convolve<Element, SmallTile>(p, stream);
  }
}

// Of a layer all but what follows.
inline void launch_layer(Layer p, Dtype dtype, cudaStream_t stream) {
  const int64_t bytes = dtype == Dtype::kFloat32 ? 4 : 2;
  const auto strides_fit = [&p](int64_t multiple) {
    return p.pixel_stride % multiple == 0 && p.row_stride % multiple == 0 && p.image_stride % multiple == 0;
  };
  p.row_length = p.kernel * p.kernel * p.channels;
  if (dtype == Dtype::kFloat32) {
    const int64_t numbers = static_cast<int64_t>(p.out_height) * p.out_width * p.outputs;
    launch(convolve_plain, dim3(static_cast<unsigned>(tiles_of(numbers, kPlainThreads)), 1, p.images),
           dim3(kPlainThreads), 0, stream, p);
    return;
  }
  p.flat = !p.resized && p.kernel == kFlat && p.stride == 2 && p.channels <= kFlat;
  p.tap_depth = p.flat ? kFlat : static_cast<int>(std::min<int64_t>(tiles_of(p.channels, kStep) * kStep, kChunk));
  p.depth = p.kernel * p.kernel * p.tap_depth;
  p.pitch = p.flat ? kFlat : p.tap_depth + kSpace;
  const int vector = p.flat ? kFlat : kEight;
  p.vectors_read = p.channels % vector == 0 && strides_fit(vector) && is_multiple(p.read, vector * bytes);
  p.vectors_weights = p.tap_depth == p.channels && p.row_length % kEight == 0 && is_aligned(p.weights);
  p.vectors_out = p.outputs % kEight == 0 && is_multiple(p.out, p.narrow ? 8 : 16);
  p.window_columns = (kTileColumns - 1) * p.stride + p.kernel;
  p.tile_columns = static_cast<int>(tiles_of(p.out_width, kTileColumns));
  p.by_kernel = Divisor(p.kernel), p.by_window_columns = Divisor(p.window_columns);
  p.by_tap_steps = Divisor(std::max(p.tap_depth / kStep, 1)), p.by_tap_vectors = Divisor(p.tap_depth / vector);
  dtype == Dtype::kFloat16 ? launch_products<__half>(p, stream) : launch_products<__nv_bfloat16>(p, stream);
}

}  // namespace autoencoder_layer

struct Autoencoder {
  const void* image;  // (N, height, width, channels), channels next to each other; strides in numbers
  int64_t image_stride, row_stride, pixel_stride;
  int64_t images, height, width, channels;
  const void* weights[autoencoder::kLayers];  // (outputs, kernel, kernel, channels)
  const float* biases[autoencoder::kLayers];
  int64_t outputs[autoencoder::kLayers];
  Dtype dtype;      // of image, weights and workspace: float32, float16 or bfloat16
  void* workspace;  // two activations, each as large as mixed_parts has it
  void* out;        // (N, out_height, out_width, outputs)
  int64_t out_height, out_width;
  bool narrow;  // whether out is of e4m3, else of `dtype`
};

// Images that a launch takes: the third dimension of a grid.
inline constexpr int64_t kMostImages = 65535;

inline void launch_autoencoder(const Autoencoder& call, cudaStream_t stream) {
  const auto layers = autoencoder::layers(call.height, call.width, {call.out_height, call.out_width});
  const auto parts = autoencoder::mixed_parts(call.images, layers, call.outputs);
  const int64_t bytes = call.dtype == Dtype::kFloat32 ? 4 : 2;
  const auto moved = [](const void* pointer, int64_t by) {
    return static_cast<void*>(static_cast<char*>(const_cast<void*>(pointer)) + by);
  };
  void* const activations[2] = {call.workspace, moved(call.workspace, parts[0] * bytes)};

  autoencoder_layer::Layer p{};
  p.read = call.image;
  p.image_stride = call.image_stride, p.row_stride = call.row_stride, p.pixel_stride = call.pixel_stride;
  p.height = static_cast<int>(call.height), p.width = static_cast<int>(call.width);
  p.channels = static_cast<int>(call.channels);
  for (int64_t index = 0; index < autoencoder::kLayers; ++index) {
    const autoencoder::Layer& layer = layers[index];
    const bool last = index == autoencoder::kLayers - 1;
    p.weights = call.weights[index], p.bias = call.biases[index];
    p.outputs = static_cast<int>(call.outputs[index]);
    p.out = last ? call.out : activations[index % 2];
    p.out_height = static_cast<int>(layer.out_height), p.out_width = static_cast<int>(layer.out_width);
    p.kernel = static_cast<int>(layer.kernel), p.stride = static_cast<int>(layer.stride);
    p.padding = static_cast<int>(layer.padding);
    p.read_height = static_cast<int>(layer.height), p.read_width = static_cast<int>(layer.width);
    p.scale_y = static_cast<float>(static_cast<double>(p.height) / layer.height);
    p.scale_x = static_cast<float>(static_cast<double>(p.width) / layer.width);
    p.resized = layer.resized, p.relu = layer.relu;
    p.narrow = last && call.narrow;
    const int64_t out_stride = layer.out_height * layer.out_width * call.outputs[index];
    for (int64_t first = 0; first < call.images; first += kMostImages) {
      autoencoder_layer::Layer some = p;
      some.images = static_cast<int>(std::min(call.images - first, kMostImages));
      some.read = moved(p.read, first * p.image_stride * bytes);
      some.out = moved(p.out, first * out_stride * (p.narrow ? 1 : bytes));
      autoencoder_layer::launch_layer(some, call.dtype, stream);
    }
    p.read = p.out;
    p.height = p.out_height, p.width = p.out_width, p.channels = p.outputs;
    p.pixel_stride = p.channels, p.row_stride = static_cast<int64_t>(p.width) * p.channels;
    p.image_stride = p.height * p.row_stride;
  }
}

}  // namespace efficientad_fast::cuda
