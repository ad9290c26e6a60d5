// preprocess on a GPU: device code and launch, without framework types.
// efficientad_fast/ops/preprocess.py is the contract.
//
// A block makes a tile of the result from a few source rows at a time: it stages their pixels in shared memory, filters
// them horizontally, and adds them to the vertical sums, which stay in registers. So any scale fits.

#pragma once

#include "device.h"
#include "numbers.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <type_traits>

namespace efficientad_fast::cuda {

inline constexpr int kImageThreads = 256;
inline constexpr int kImageTileWidth = 32;  // pixels of the result; a warp's lanes
inline constexpr int kImageTileHeight = 8;
inline constexpr int kImageTileRow = 3 * kImageTileWidth;
inline constexpr int kImageElements = kImageTileHeight * kImageTileRow / kImageThreads;  // of the result, per thread
inline constexpr int kImageSharedBytes = 46 * 1024;  // of the 48 KB that need no permission
inline constexpr int kImageFewestRows = 4;           // staged at a time, below which staging is left out
inline constexpr int kImageUnstagedRows = 32;
inline constexpr int kFractionBits = 22;  // of Pillow's weights

// One side of the resize by a triangle filter, whose half width is one input, or one output where that is wider.
struct Axis {
  int length, target;
  double scale, stretch, inverse_stretch;
  int most;  // inputs that one output reads

  Axis() = default;
  Axis(int length, int target)
      : length(length),
        target(target),
        scale(static_cast<double>(length) / static_cast<double>(target)),
        stretch(std::max(scale, 1.0)),
        inverse_stretch(1.0 / stretch),
        most(static_cast<int>(std::min(2.0 * std::ceil(stretch) + 1.0, static_cast<double>(length)))) {}

  // Inputs that `outputs` neighbouring outputs read, at most.
  int reach(int outputs) const {
    return static_cast<int>(std::min((outputs - 1) * scale + 2.0 * stretch + 2.0, static_cast<double>(length)));
  }
};

// One call. Sides are below 2^30.
struct Preprocess {
  const void* image;  // (N, H, W, 3), uint8 or float32
  Dtype image_dtype;
  int64_t image_stride, row_stride, column_stride, channel_stride;  // in elements
  int64_t images;
  Axis rows, columns;
  bool pillow;
  float mean[3], std[3];     // pillow: (level / 255 - mean) / std
  float scale[3], shift[3];  // antialias: number * scale + shift
  void* out;                 // (N, 3, h, w)
  Dtype out_dtype;
  int pixel_stride;          // numbers from a pixel to the next, 3 or 4; 0 for planes

  // After image_dtype is set.
  void set_statistics(const std::array<double, 3>& means, const std::array<double, 3>& stds) {
    const double unit = image_dtype == Dtype::kUint8 ? 255.0 : 1.0;
    for (int channel = 0; channel < 3; ++channel) {
      mean[channel] = static_cast<float>(means[channel]), std[channel] = static_cast<float>(stds[channel]);
      scale[channel] = static_cast<float>(1.0 / (unit * stds[channel]));
      shift[channel] = static_cast<float>(-means[channel] / stds[channel]);
    }
  }
};

// What a launch adds to a call. Dynamic shared memory holds the weights, the rows that were filtered horizontally, and
// the source rows; the first and the last only where staged.
struct PreprocessLaunch {
  Preprocess call;
  int tiles_across, tiles_down;
  int chunk_rows;                      // source rows at a time
  int pitch;                           // bytes from one staged row to the next
  int filtered_offset, staged_offset;  // in bytes
  bool vectors;                        // source rows are staged as they lie, 16 bytes at a time
};

// a * b, which no compiler may fuse with a following addition, so that taps and weights are the reference's, bit for bit.
__device__ __forceinline__ double rounded_product(double a, double b) {
#ifdef __CUDA_ARCH__
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

__device__ __forceinline__ double centre_of(const Axis& axis, int output) {
  return rounded_product(static_cast<double>(output) + 0.5, axis.scale);
}

// Inputs from first_input to end_input - 1 make an output. Where there is nothing to resize, its own alone does, so
// that a NaN next to it stays there.
__device__ __forceinline__ int first_input(const Axis& axis, int output) {
  if (axis.length == axis.target) {
    return output;
  }
  return max(static_cast<int>(centre_of(axis, output) - axis.stretch + 0.5), 0);
}

__device__ __forceinline__ int end_input(const Axis& axis, int output) {
  if (axis.length == axis.target) {
    return output + 1;
  }
  return min(static_cast<int>(centre_of(axis, output) + axis.stretch + 0.5), axis.length);
}

__device__ __forceinline__ double triangle(const Axis& axis, double centre, int input) {
  const double distance = rounded_product(static_cast<double>(input) - centre + 0.5, axis.inverse_stretch);
  const double height = 1.0 - fabs(distance);
  return height > 0.0 ? height : 0.0;
}

template <typename Weight>
__device__ __forceinline__ Weight weight_of(const Axis& axis, double centre, double total, int input) {
  const double share = triangle(axis, centre, input) / total;
  if constexpr (std::is_same_v<Weight, int>) {
    return static_cast<int>(share * (1 << kFractionBits) + 0.5);
  } else {
    return static_cast<Weight>(share);
  }
}

// What the outputs of a tile read along one side.
template <int kOutputs>
struct TileTaps {
  int first[kOutputs], end[kOutputs];
  double centre[kOutputs], total[kOutputs];

  __device__ __forceinline__ void prepare(const Axis& axis, int tile_start, int slot) {
    const int output = min(tile_start + slot, axis.target - 1);
    first[slot] = first_input(axis, output), end[slot] = end_input(axis, output);
    centre[slot] = centre_of(axis, output);
    // In the order in which Pillow takes the sum.
    double sum = 0.0;
    for (int input = first[slot]; input < end[slot]; ++input) {
      sum += triangle(axis, centre[slot], input);
    }
    total[slot] = sum;
  }

  // Of the input `tap` after the first. Beyond the last one it is a number that nobody reads.
  template <typename Weight>
  __device__ __forceinline__ Weight weight(const Axis& axis, int slot, int tap) const {
    return weight_of<Weight>(axis, centre[slot], total[slot], first[slot] + tap);
  }
};

// A float of the source, in [0, 1], as the nearest of 256 levels, halves to the even one; NaN as 0.
__device__ __forceinline__ uint8_t level_of(float number) {
  const double level = rint(static_cast<double>(number) * 255.0);
  return static_cast<uint8_t>(level > 0.0 ? (level < 255.0 ? level : 255.0) : 0.0);
}

__device__ __forceinline__ uint8_t level_of(uint8_t level) {
  return level;
}

// A sum in units of 2^-22 as a level. A half was added when the sum began.
__device__ __forceinline__ int rounded_level(int sum) {
  return min(max(sum >> kFractionBits, 0), 255);
}

__device__ __forceinline__ float of_channel(const float (&numbers)[3], int channel) {
  return channel == 0 ? numbers[0] : channel == 1 ? numbers[1] : numbers[2];
}

// Source rows [begin, end) of an image, columns [left, right). Staged rows start at the shared address of their first
// 16-byte vector, so that source and copy are aligned alike.
template <typename Source, typename Staged>
__device__ __forceinline__ void stage_rows(const PreprocessLaunch& p, int64_t image, int begin, int end, int left,
                                           int right, unsigned char* staged) {
  const Preprocess& call = p.call;
  const auto* const source = static_cast<const Source*>(call.image) + image * call.image_stride;
  if constexpr (std::is_same_v<Source, Staged>) {
    if (p.vectors) {
      const int row_vectors = p.pitch / 16;
      for (int item = threadIdx.x; item < (end - begin) * row_vectors; item += kImageThreads) {
        const int row = item / row_vectors, vector = item % row_vectors;
        const auto row_start = reinterpret_cast<uintptr_t>(source + (begin + row) * call.row_stride);
        const uintptr_t row_end = row_start + 3 * sizeof(Source) * static_cast<uintptr_t>(call.columns.length);
        const uintptr_t wanted = row_start + 3 * sizeof(Source) * static_cast<uintptr_t>(left);
        const uintptr_t from = wanted - wanted % 16 + 16 * static_cast<uintptr_t>(vector);
        unsigned char* const to = staged + row * p.pitch + 16 * vector;
        if (from >= wanted + 3 * sizeof(Source) * static_cast<uintptr_t>(right - left)) {
          continue;
        }
        if (from >= row_start && from + 16 <= row_end) {
          *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
        } else {
          for (int byte = 0; byte < 16; ++byte) {
            if (from + byte >= row_start && from + byte < row_end) {
              to[byte] = *reinterpret_cast<const unsigned char*>(from + byte);
            }
          }
        }
      }
      return;
    }
  }
  const int columns = right - left, row_elements = 3 * columns;
  const bool channels_inside = call.channel_stride <= call.column_stride;
  for (int item = threadIdx.x; item < (end - begin) * row_elements; item += kImageThreads) {
    const int row = item / row_elements, element = item % row_elements;
    const int column = channels_inside ? element / 3 : element % columns;
    const int channel = channels_inside ? element % 3 : element / columns;
    const Source number = source[(begin + row) * call.row_stride + (left + column) * call.column_stride +
                                 channel * call.channel_stride];
    Staged* const to = reinterpret_cast<Staged*>(staged + row * p.pitch) + 3 * column + channel;
    if constexpr (std::is_same_v<Source, Staged>) {
      *to = number;
    } else {
      *to = level_of(number);
    }
  }
}

template <typename Source, bool kPillow, bool kStaged>
__global__ void __launch_bounds__(kImageThreads) resize_images(const PreprocessLaunch p) {
  using Number = std::conditional_t<kPillow, int, float>;        // of weights and sums
  using Staged = std::conditional_t<kPillow, uint8_t, Source>;   // of the source, in shared memory
  using Filtered = std::conditional_t<kPillow, uint8_t, float>;  // of rows that were filtered horizontally
  constexpr Number kZero = kPillow ? static_cast<Number>(1 << (kFractionBits - 1)) : Number(0);
  __shared__ TileTaps<kImageTileWidth> columns;
  __shared__ TileTaps<kImageTileHeight> rows;
  EFFICIENTAD_FAST_DYNAMIC_SHARED(unsigned char, shared);
  const Preprocess& call = p.call;
  Number* const column_weights = kStaged ? reinterpret_cast<Number*>(shared) : nullptr;
  Number* const row_weights = kStaged ? column_weights + kImageTileWidth * call.columns.most : nullptr;
  auto* const filtered = reinterpret_cast<Filtered*>(shared + p.filtered_offset);
  unsigned char* const staged = shared + p.staged_offset;

  const int thread = threadIdx.x;
  const int tile_x = blockIdx.x % p.tiles_across, tile = blockIdx.x / p.tiles_across;
  const int tile_y = tile % p.tiles_down;
  const int64_t image = tile / p.tiles_down;
  const int first_x = tile_x * kImageTileWidth, first_y = tile_y * kImageTileHeight;
  const int last_x = min(first_x + kImageTileWidth, call.columns.target) - 1;
  const int last_y = min(first_y + kImageTileHeight, call.rows.target) - 1;
  const int left = first_input(call.columns, first_x), right = end_input(call.columns, last_x);
  const int top = first_input(call.rows, first_y), bottom = end_input(call.rows, last_y);

  // The two sides are prepared by different warps, at the same time.
  if (thread < kImageTileWidth) {
    columns.prepare(call.columns, first_x, thread);
  } else if (thread < kImageTileWidth + kImageTileHeight) {
    rows.prepare(call.rows, first_y, thread - kImageTileWidth);
  }
  __syncthreads();
  if constexpr (kStaged) {
    const int most_x = call.columns.most, most_y = call.rows.most;
    for (int item = thread; item < kImageTileWidth * most_x; item += kImageThreads) {
      column_weights[item] = columns.template weight<Number>(call.columns, item / most_x, item % most_x);
    }
    for (int item = thread; item < kImageTileHeight * most_y; item += kImageThreads) {
      row_weights[item] = rows.template weight<Number>(call.rows, item / most_y, item % most_y);
    }
  }

  // Elements of the tile that this thread sums and stores: neighbouring threads have neighbouring addresses.
  int tile_row[kImageElements], tile_element[kImageElements];
  Number sum[kImageElements];
#pragma unroll
  for (int k = 0; k < kImageElements; ++k) {
    const int index = thread + k * kImageThreads;
    tile_row[k] = call.pixel_stride > 0 ? index / kImageTileRow : thread / kImageTileWidth;
    tile_element[k] = call.pixel_stride > 0 ? index % kImageTileRow : thread % kImageTileWidth * 3 + k;
    sum[k] = kZero;
  }
  const auto is_inside = [&](int k) {
    return first_y + tile_row[k] <= last_y && first_x + tile_element[k] / 3 <= last_x;
  };

  for (int begin = top; begin < bottom; begin += p.chunk_rows) {
    const int end = min(begin + p.chunk_rows, bottom);
    if constexpr (kStaged) {
      stage_rows<Source, Staged>(p, image, begin, end, left, right, staged);
    }
    __syncthreads();  // weights and staged rows are there, and nobody reads filtered rows of the last round any more

    for (int item = thread; item < (end - begin) * kImageTileWidth; item += kImageThreads) {
      const int row = item / kImageTileWidth, x = item % kImageTileWidth;
      if (first_x + x > last_x) {
        continue;
      }
      const int first = columns.first[x], taps = columns.end[x] - first;
      Number red = kZero, green = kZero, blue = kZero;
      if constexpr (kStaged) {
        int shift = 0;
        if (std::is_same_v<Source, Staged> && p.vectors) {
          const auto* const source = static_cast<const Source*>(call.image) + image * call.image_stride;
          shift = reinterpret_cast<uintptr_t>(source + (begin + row) * call.row_stride + 3 * left) % 16;
        }
        const auto* pixel = reinterpret_cast<const Staged*>(staged + row * p.pitch + shift) + 3 * (first - left);
        const Number* const weights = column_weights + x * call.columns.most;
        for (int tap = 0; tap < taps; ++tap, pixel += 3) {
          const Number weight = weights[tap];
          red += weight * static_cast<Number>(pixel[0]);
          green += weight * static_cast<Number>(pixel[1]);
          blue += weight * static_cast<Number>(pixel[2]);
        }
      } else {
        const auto* pixel = static_cast<const Source*>(call.image) + image * call.image_stride +
                            (begin + row) * call.row_stride + first * call.column_stride;
        const auto number = [&](int channel) {
          const Source one = pixel[channel * call.channel_stride];
          if constexpr (kPillow) {
            return static_cast<Number>(level_of(one));
          } else {
            return static_cast<Number>(one);
          }
        };
#pragma unroll 1
        for (int tap = 0; tap < taps; ++tap, pixel += call.column_stride) {
          const Number weight = columns.template weight<Number>(call.columns, x, tap);
          red += weight * number(0);
          green += weight * number(1);
          blue += weight * number(2);
        }
      }
      Filtered* const to = filtered + row * kImageTileRow + 3 * x;
      if constexpr (kPillow) {
        red = rounded_level(red), green = rounded_level(green), blue = rounded_level(blue);
      }
      to[0] = static_cast<Filtered>(red), to[1] = static_cast<Filtered>(green), to[2] = static_cast<Filtered>(blue);
    }
    __syncthreads();  // filtered rows are there, and nobody reads staged ones any more

#pragma unroll
    for (int k = 0; k < kImageElements; ++k) {
      if (!is_inside(k)) {
        continue;
      }
      const int slot = tile_row[k], first = rows.first[slot];
      const int from = max(first, begin), to = min(rows.end[slot], end);
      for (int row = from; row < to; ++row) {
        Number weight;
        if constexpr (kStaged) {
          weight = row_weights[slot * call.rows.most + row - first];
        } else {
          weight = rows.template weight<Number>(call.rows, slot, row - first);
        }
        sum[k] += weight * static_cast<Number>(filtered[(row - begin) * kImageTileRow + tile_element[k]]);
      }
    }
  }

#pragma unroll
  for (int k = 0; k < kImageElements; ++k) {
    if (!is_inside(k)) {
      continue;
    }
    const int channel = tile_element[k] % 3, x = first_x + tile_element[k] / 3, y = first_y + tile_row[k];
    float number;
    if constexpr (kPillow) {
      const float unit = static_cast<float>(rounded_level(sum[k])) / 255.0f;
      number = (unit - of_channel(call.mean, channel)) / of_channel(call.std, channel);
    } else {
      number = sum[k] * of_channel(call.scale, channel) + of_channel(call.shift, channel);
    }
    const int64_t height = call.rows.target, width = call.columns.target;
    const int64_t index = call.pixel_stride > 0 ? ((image * height + y) * width + x) * call.pixel_stride + channel
                                                : ((image * 3 + channel) * height + y) * width + x;
    store<AnyDtype>(number, call.out, call.out_dtype, index);
  }
}

inline int64_t preprocess_blocks(const Preprocess& call) {
  const int64_t across = (call.columns.target + kImageTileWidth - 1) / kImageTileWidth;
  return call.images * across * ((call.rows.target + kImageTileHeight - 1) / kImageTileHeight);
}

template <typename Source, bool kPillow>
void launch_preprocess_as(const Preprocess& call, cudaStream_t stream) {
  constexpr bool converted = kPillow && !std::is_same_v<Source, uint8_t>;
  constexpr int64_t staged_size = kPillow ? 1 : sizeof(Source), filtered_row = kImageTileRow * (kPillow ? 1 : 4);
  PreprocessLaunch p{};
  p.call = call;
  p.tiles_across = (call.columns.target + kImageTileWidth - 1) / kImageTileWidth;
  p.tiles_down = (call.rows.target + kImageTileHeight - 1) / kImageTileHeight;
  p.vectors = !converted && call.channel_stride == 1 && call.column_stride == 3;

  const int64_t weights = 4 * (static_cast<int64_t>(kImageTileWidth) * call.columns.most +
                               static_cast<int64_t>(kImageTileHeight) * call.rows.most);
  const int64_t weight_bytes = (weights + 15) / 16 * 16;
  // 15 bytes before the first vector's first wanted byte, then whole vectors.
  const int64_t pitch = (3 * staged_size * call.columns.reach(kImageTileWidth) + 15 + 15) / 16 * 16;
  const int64_t tile_rows = call.rows.reach(kImageTileHeight);
  int64_t rows = std::min((kImageSharedBytes - weight_bytes) / (pitch + filtered_row), tile_rows);
  const auto blocks = dim3(static_cast<unsigned>(preprocess_blocks(call)));
  if (rows >= std::min<int64_t>(tile_rows, kImageFewestRows)) {
    if (rows < tile_rows && rows > kImageTileHeight) {
      rows -= rows % kImageTileHeight;  // whole rounds of the block's warps
    }
    p.chunk_rows = static_cast<int>(rows);
    p.pitch = static_cast<int>(pitch);
    p.filtered_offset = static_cast<int>(weight_bytes);
    p.staged_offset = static_cast<int>(weight_bytes + rows * filtered_row);
    const auto bytes = static_cast<size_t>(weight_bytes + rows * (filtered_row + pitch));
    launch(resize_images<Source, kPillow, true>, blocks, dim3(kImageThreads), bytes, stream, p);
  } else {
    p.chunk_rows = static_cast<int>(std::min<int64_t>(tile_rows, kImageUnstagedRows));
    const auto bytes = static_cast<size_t>(p.chunk_rows * filtered_row);
    launch(resize_images<Source, kPillow, false>, blocks, dim3(kImageThreads), bytes, stream, p);
  }
}

// No image: nothing to launch.
inline void launch_preprocess(const Preprocess& call, cudaStream_t stream) {
  if (call.images == 0) {
    return;
  }
  if (call.image_dtype == Dtype::kUint8) {
    (call.pillow ? launch_preprocess_as<uint8_t, true> : launch_preprocess_as<uint8_t, false>)(call, stream);
  } else {
    (call.pillow ? launch_preprocess_as<float, true> : launch_preprocess_as<float, false>)(call, stream);
  }
}

}  // namespace efficientad_fast::cuda
