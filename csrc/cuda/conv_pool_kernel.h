// conv_pool on a GPU, in mixed precision: device code and launches, without framework types.
// efficientad_fast/ops/conv_pool.py is the contract.

#pragma once

#include "device.h"
#include "implicit_gemm.h"
#include "numbers.h"
#include "ptx.h"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>

namespace efficientad_fast::cuda {

struct ConvPool {
  Convolution convolution;
  Made made;
  int groups, group_outputs;
  const float* scale;  // or nullptr, as bias
  const float* bias;
  bool relu;
  void* out;  // (N, h, w, outputs of all groups)
  Number number, out_number;
  int multiprocessors, shared_of_block;  // bytes that a block may have at most

  // The rest is set by the launch.
  bool wide_stores, wide_statistics;
};

template <Number kOut>
inline constexpr int kRun = 16 / bytes_of(kOut);

inline __device__ int run_of(Number out) { return 16 / bytes_of(out); }

// 32 bits of a run, from its number `first` on.
template <Number kOut>
__device__ __forceinline__ unsigned word_of(const float* numbers) {
  if constexpr (kOut == Number::kFloat32) {
    return __float_as_uint(numbers[0]);
  } else if constexpr (kOut == Number::kFloat16) {
    const __half2 pair = __floats2half2_rn(numbers[0], numbers[1]);
    return *reinterpret_cast<const unsigned*>(&pair);
  } else if constexpr (kOut == Number::kBFloat16) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(numbers[0], numbers[1]);
    return *reinterpret_cast<const unsigned*>(&pair);
  } else {
    return to_e4m3(numbers[0], numbers[1]) | static_cast<unsigned>(to_e4m3(numbers[2], numbers[3])) << 16;
  }
}

template <Number kOut>
__device__ __forceinline__ void store_number(void* out, int64_t index, float number) {
  if constexpr (kOut == Number::kFloat32) {
    static_cast<float*>(out)[index] = number;
  } else if constexpr (kOut == Number::kFloat16) {
    static_cast<__half*>(out)[index] = __float2half_rn(number);
  } else if constexpr (kOut == Number::kBFloat16) {
    static_cast<__nv_bfloat16*>(out)[index] = __float2bfloat16_rn(number);
  } else {
    static_cast<unsigned char*>(out)[index] = static_cast<unsigned char>(to_e4m3(number, 0));
  }
}

// A run of one pixel, of which `count` outputs are there.
template <Number kOut>
__device__ __forceinline__ void store_run(const ConvPool& p, int64_t index, const float (&numbers)[kRun<kOut>],
                                          int count) {
  constexpr int kOfWord = kRun<kOut> / 4;
  if (p.wide_stores && count >= kRun<kOut>) {
    auto* const to = reinterpret_cast<uint4*>(static_cast<unsigned char*>(p.out) + index * bytes_of(kOut));
    *to = make_uint4(word_of<kOut>(numbers), word_of<kOut>(numbers + kOfWord), word_of<kOut>(numbers + 2 * kOfWord),
                     word_of<kOut>(numbers + 3 * kOfWord));
  } else {
#pragma unroll
    for (int i = 0; i < kRun<kOut>; ++i) {
      if (i < count) {
        store_number<kOut>(p.out, index + i, numbers[i]);
      }
    }
  }
}

// A run of scales or biases; what is not given or there is `otherwise`.
template <int kCount>
__device__ __forceinline__ void load_statistics(float (&numbers)[kCount], const float* from, int output, int count,
                                                bool wide, float otherwise) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    numbers[i] = otherwise;
  }
  if (from == nullptr) {
    return;
  }
  if (wide && count >= kCount) {
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      const float4 four = *reinterpret_cast<const float4*>(from + output + i);
      numbers[i] = four.x, numbers[i + 1] = four.y, numbers[i + 2] = four.z, numbers[i + 3] = four.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i < count) {
        numbers[i] = from[output + i];
      }
    }
  }
}

// The number where it is `inside` and not below `floor`, NaN too, else zero.
__device__ __forceinline__ float rectified(float number, float floor, bool inside) {
  return inside && !(number < floor) ? number : 0.0f;
}

__device__ __forceinline__ float floor_of(const ConvPool& p) {
  return p.relu ? 0.0f : -std::numeric_limits<float>::infinity();
}

// Calls `body` with each run of a thread's outputs: its first sums and output, how many there are, scales, biases.
template <Number kOut, typename Body>
__device__ __forceinline__ void for_each_run(const ConvPool& p, int first_output, int last_output, const Body& body) {
#pragma unroll
  for (int run = 0; run < 16 / kRun<kOut>; ++run) {
    const int output = first_output + run * (4 * kRun<kOut>) + threadIdx.x % 4 * kRun<kOut>;
    const int count = last_output - output;
    if (count > 0) {
      float scale[kRun<kOut>], bias[kRun<kOut>];
      load_statistics(scale, p.scale, output, count, p.wide_statistics, 1.0f);
      load_statistics(bias, p.bias, output, count, p.wide_statistics, 0.0f);
      body(run * (kRun<kOut> / 2), output, count, scale, bias);
    }
  }
}

// Pixels `upper` and `lower` of the result, where they are there (not negative).
template <Number kOut>
__device__ __forceinline__ void write_pixels(const ConvPool& p, const float (&sums)[kOutputTiles][4], int first_output,
                                             int last_output, int upper, int lower) {
  const int64_t channels = int64_t{p.groups} * p.group_outputs;
  const float floor = floor_of(p);
  for_each_run<kOut>(p, first_output, last_output, [&](int tile, int output, int count, const auto& scale,
                                                       const auto& bias) {
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      const int pixel = v == 0 ? upper : lower;
      if (pixel >= 0) {
        float made[kRun<kOut>];
#pragma unroll
        for (int i = 0; i < kRun<kOut>; ++i) {
          made[i] = rectified(__fmaf_rn(sums[tile + i / 2][2 * v + i % 2], scale[i], bias[i]), floor, true);
        }
        store_run<kOut>(p, pixel * channels + output, made, count);
      }
    }
  });
}

// The quad's four pixels that lie in what the convolution makes: bit 2 v + h. The others count as zeros.
__device__ __forceinline__ unsigned made_of_quad(const Made& made, int y, int x) {
  unsigned inside = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = 2 * y - made.pool_padding + i / 2, column = 2 * x - made.pool_padding + i % 2;
    inside |= (row >= 0 && row < made.height && column >= 0 && column < made.width ? 1u : 0u) << i;
  }
  return inside;
}

// Pixel `pixel` of the result, the mean of a quad, whose left sums are in `left` and right ones in `right`.
template <Number kOut>
__device__ __forceinline__ void write_quad(const ConvPool& p, const float (&left)[kOutputTiles][4],
                                           const float (&right)[kOutputTiles][4], int first_output, int last_output,
                                           int pixel, unsigned inside) {
  const int64_t channels = int64_t{p.groups} * p.group_outputs;
  const float floor = floor_of(p);
  for_each_run<kOut>(p, first_output, last_output, [&](int tile, int output, int count, const auto& scale,
                                                       const auto& bias) {
    float means[kRun<kOut>];
#pragma unroll
    for (int i = 0; i < kRun<kOut>; ++i) {
      float total = 0;
#pragma unroll
      for (int v = 0; v < 2; ++v) {
        const int k = 2 * v + i % 2;
        total += rectified(__fmaf_rn(left[tile + i / 2][k], scale[i], bias[i]), floor, (inside >> (2 * v) & 1u) != 0);
        total +=
            rectified(__fmaf_rn(right[tile + i / 2][k], scale[i], bias[i]), floor, (inside >> (2 * v + 1) & 1u) != 0);
      }
      means[i] = 0.25f * total;
    }
    store_run<kOut>(p, pixel * channels + output, means, count);
  });
}

// Calls `body` with a constant of the type that the result has.
template <typename Body>
__device__ __forceinline__ void with_number(Number number, const Body& body) {
  switch (number) {
    case Number::kFloat16: return body(std::integral_constant<Number, Number::kFloat16>{});
    case Number::kBFloat16: return body(std::integral_constant<Number, Number::kBFloat16>{});
    case Number::kE4m3: return body(std::integral_constant<Number, Number::kE4m3>{});
    default: return body(std::integral_constant<Number, Number::kFloat32>{});
  }
}

template <typename Tile>
__host__ __device__ inline int output_tiles_of(const ConvPool& p) {
  return (p.group_outputs + Tile::kOutputs - 1) / Tile::kOutputs;
}

template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kLeastBlocks) conv_pool(const ConvPool p) {
  // Blocks beside each other read the same pixels.
  const int output_tiles = output_tiles_of<Tile>(p), of_pixels = output_tiles * p.groups;
  const int tile = blockIdx.x / of_pixels, group = blockIdx.x % of_pixels / output_tiles;
  const int last_output = (group + 1) * p.group_outputs;
  const int block_output = group * p.group_outputs + blockIdx.x % output_tiles * Tile::kOutputs;
  Sums<Tile::kWarpTiles> sums;
  sum_products<Tile, false>(sums, p.convolution, p.convolution, /*paired=*/false, p.made, tile, group, block_output,
                            last_output, run_of(p.out_number));
  const WarpPlace<Tile> warp;
  if (warp.slice > 0) {
    return;
  }
  const int g = threadIdx.x % 32 / 4;
  const int first_output = block_output + warp.column * kWarpOutputs;
  with_number(p.out_number, [&](auto number) {
    if (p.made.pool) {
      const int first_quad = tile * (Tile::kPixels / 4) + warp.row * (Tile::kWarpPixels / 4);
#pragma unroll
      for (int i = 0; i < Tile::kWarpTiles; i += 2) {
        const int quad = first_quad + 4 * i + g;
        if (quad < p.made.count) {
          unsigned inside = 15;
          if (p.made.pool_padding > 0) {
            const Place place = place_of(quad, p.made.out_height, p.made.out_width);
            inside = made_of_quad(p.made, place.y, place.x);
          }
          write_quad<decltype(number)::value>(p, sums[i], sums[i + 1], first_output, last_output, quad, inside);
        }
      }
    } else {
      const int first_pixel = tile * Tile::kPixels + warp.row * Tile::kWarpPixels;
#pragma unroll
      for (int i = 0; i < Tile::kWarpTiles; ++i) {
        const int upper = first_pixel + 16 * i + g, lower = upper + 8;
        write_pixels<decltype(number)::value>(p, sums[i], first_output, last_output, upper < p.made.count ? upper : -1,
                                              lower < p.made.count ? lower : -1);
      }
    }
  });
}

// The stem: a 4 x 4 kernel over up to 4 channels, pooled. All of its depth, 64, is multiplied at once. A warp keeps the
// weights of 64 outputs in registers and goes through tiles of the image, of which the next is copied meanwhile. The
// depth is ordered so that what a lane multiplies is one pixel's 4 channels: of step s, k = 2 t, 2 t + 1, 2 t + 8 and
// 2 t + 9 stand for row s and column t of the kernel.

inline constexpr int kStemKernel = 4, kStemChannels = 4;
inline constexpr int kStemThreads = 128;
inline constexpr int kStemOutputs = kStemThreads / 32 * kWarpOutputs;
inline constexpr int kStemMostOutputs = 65535 * kStemOutputs;  // a launch has no more blocks in y
inline constexpr int kStemRows = 4, kStemColumns = 16;  // of a tile, pooled
inline constexpr int kStemImageRows = 2 * kStemRows + kStemKernel - 1;
inline constexpr int kStemImageColumns = 2 * kStemColumns + kStemKernel - 1;
inline constexpr int kStemPixelBytes = 2 * kStemChannels;
inline constexpr int kStemRun = 8;  // outputs of a thread that are next to each other
// A rectified bias below the opposite of this counts as that: zeros are left either way, and four times it is finite.
inline constexpr float kStemLargestBias = 4.0e37f;

// Without scales; with scales, and there without padding of the pooling or with it.
enum class StemKind { kPlain, kScaled, kPadded };

// Blocks of a multiprocessor that there must be registers for: as many as the compiler spills nothing for.
template <StemKind kKind, Number kOut>
inline constexpr int kStemBlocks =
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 800 || __CUDA_ARCH__ == 900)
    kKind == StemKind::kPlain && kOut != Number::kE4m3 ? 3 :
#endif
    2;

struct StemTiles {
  int rows, columns, count;  // of an image; of all

  __host__ __device__ explicit StemTiles(const Made& made)
      : rows((made.out_height + kStemRows - 1) / kStemRows),
        columns((made.out_width + kStemColumns - 1) / kStemColumns),
        count(made.count / (made.out_height * made.out_width) * rows * columns) {}

  // The tile's image, and the first row and column of the result in it.
  __device__ __forceinline__ Place operator[](int tile) const {
    const Place place = place_of(tile, rows, columns);
    return {place.image, place.y * kStemRows, place.x * kStemColumns};
  }
};

// 8 bytes: the channels of a pixel or a tap, with zeros for those that there are not.
__device__ __forceinline__ uint2 four_channels(const unsigned char* from, int channels, bool wide) {
  if (wide) {
    return *reinterpret_cast<const uint2*>(from);
  }
  unsigned bits[4];
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    bits[c] = c < channels ? bits_at<Number::kFloat16>(from + 2 * c) : 0;
  }
  return make_uint2(bits[0] | bits[1] << 16, bits[2] | bits[3] << 16);
}

inline __host__ __device__ bool is_wide_stem(const Convolution& from) {
  const auto whole = [](int64_t numbers) { return numbers % kStemChannels == 0; };
  return from.channels == kStemChannels && whole(from.image_stride) && whole(from.row_stride) &&
         whole(from.pixel_stride) && reinterpret_cast<uintptr_t>(from.images) % kStemPixelBytes == 0 &&
         reinterpret_cast<uintptr_t>(from.weights) % kStemPixelBytes == 0;
}

__device__ __forceinline__ void load_stem_tile(unsigned char* to, const ConvPool& p, const Place& tile, bool wide) {
  const Convolution& from = p.convolution;
  const auto* const image = static_cast<const unsigned char*>(from.images) + tile.image * from.image_stride * 2;
  const int first_y = 2 * tile.y - p.made.pool_padding - from.padding;
  const int first_x = 2 * tile.x - p.made.pool_padding - from.padding;
  for (int i = threadIdx.x; i < kStemImageRows * kStemImageColumns; i += kStemThreads) {
    const int y = first_y + i / kStemImageColumns, x = first_x + i % kStemImageColumns;
    const bool inside = y >= 0 && y < from.height && x >= 0 && x < from.width;
    const auto* const pixel = image + (y * from.row_stride + x * from.pixel_stride) * 2;
    if (wide) {
      copy_async<kStemPixelBytes>(to + i * kStemPixelBytes, pixel, inside);
    } else {
      *reinterpret_cast<uint2*>(to + i * kStemPixelBytes) =
          inside ? four_channels(pixel, from.channels, false) : make_uint2(0, 0);
    }
  }
}

// Each pixel and that to its right, as a lane multiplies them: channels 0 and 1 of both, then 2 and 3 of both.
__device__ __forceinline__ void pair_stem_pixels(uint4* pairs, const unsigned char* pixels) {
  for (int i = threadIdx.x; i < kStemImageRows * kStemImageColumns - 1; i += kStemThreads) {
    const auto* const pixel = reinterpret_cast<const uint2*>(pixels) + i;
    const uint2 left = pixel[0], right = pixel[1];
    pairs[i] = make_uint4(left.x, right.x, left.y, right.y);
  }
}

// Eight neighbouring outputs of a quad: the means of the rectified sums. `first` holds scales and `second` biases, and
// pixels that are not `inside` (made_of_quad) count as zeros. Plain, the bias b is taken out of sum and mean: relu(s + b)
// = max(s, -b) + b, for four numbers at once and never below zero, since each addition is as monotonic as what it
// rounds; `first` holds what sums are at least, and `second` b.
template <StemKind kKind>
__device__ __forceinline__ void average_stem(float (&means)[kStemRun], const float (*upper)[4],
                                             const float (*lower)[4], const float* first, const float* second,
                                             float floor, unsigned inside) {
  constexpr bool kPlain = kKind == StemKind::kPlain;
  float ones[kStemRun], others[kStemRun];
#pragma unroll
  for (int i = 0; i < kStemRun; i += 4) {
    const float4 one = *reinterpret_cast<const float4*>(first + i);
    const float4 other = *reinterpret_cast<const float4*>(second + i);
    ones[i] = one.x, ones[i + 1] = one.y, ones[i + 2] = one.z, ones[i + 3] = one.w;
    others[i] = other.x, others[i + 1] = other.y, others[i + 2] = other.z, others[i + 3] = other.w;
  }
#pragma unroll
  for (int i = 0; i < kStemRun; ++i) {
    const auto of = [&](float sum, int pixel) {
      const float number = kPlain ? larger(sum, ones[i]) : larger(__fmaf_rn(sum, ones[i], others[i]), floor);
      return kKind != StemKind::kPadded || (inside >> pixel & 1u) != 0 ? number : 0.0f;
    };
    const float above = of(upper[i / 2][i % 2], 0) + of(upper[i / 2][2 + i % 2], 1);
    const float below = of(lower[i / 2][i % 2], 2) + of(lower[i / 2][2 + i % 2], 3);
    means[i] = kPlain ? __fmaf_rn(0.25f, above + below, others[i]) : 0.25f * (above + below);
  }
}

template <Number kOut>
__device__ __forceinline__ void store_stem(unsigned char* to, const float (&means)[kStemRun]) {
  constexpr int kOfWord = 4 / bytes_of(kOut), kWords = kStemRun / kOfWord;
  unsigned words[kWords];
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    words[i] = word_of<kOut>(means + i * kOfWord);
  }
  if constexpr (kWords == 2) {
    *reinterpret_cast<uint2*>(to) = make_uint2(words[0], words[1]);
  } else {
#pragma unroll
    for (int i = 0; i < kWords; i += 4) {
      reinterpret_cast<uint4*>(to)[i / 4] = make_uint4(words[i], words[i + 1], words[i + 2], words[i + 3]);
    }
  }
}

// Each half of a part's outputs is multiplied while the half before, in other registers, is averaged and written.
template <Number kNumber, Number kOut, StemKind kKind>
__global__ void __launch_bounds__(kStemThreads, kStemBlocks<kKind, kOut>) conv_pool_stem(const ConvPool p) {
  constexpr bool kPlain = kKind == StemKind::kPlain;
  constexpr int kTileBytes = kStemImageRows * kStemImageColumns * kStemPixelBytes;
  __shared__ __align__(16) unsigned char pixels[kTileBytes];
  __shared__ uint4 pairs[kStemImageRows * kStemImageColumns];
  __shared__ __align__(16) float statistics[2][kStemOutputs];  // as average_stem has them
  const StemTiles tiles(p.made);
  const bool wide = is_wide_stem(p.convolution);
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const int warp_output = static_cast<int>(threadIdx.x) / 32 * kWarpOutputs;
  load_stem_tile(pixels, p, tiles[blockIdx.x], wide);
  commit_copies();
  const float floor = floor_of(p);
  for (int i = threadIdx.x; i < kStemOutputs; i += kStemThreads) {
    const int output = blockIdx.y * kStemOutputs + i;
    const bool there = output < p.group_outputs;
    const float scale = there && p.scale != nullptr ? p.scale[output] : 1.0f;
    float bias = there && p.bias != nullptr ? p.bias[output] : 0.0f;
    if (kPlain && p.relu) {
      bias = bias < -kStemLargestBias ? -kStemLargestBias : bias;  // NaN stays
    }
    statistics[0][i] = !kPlain ? scale : p.relu ? -bias : floor;
    statistics[1][i] = bias;
  }
  const int first_output = blockIdx.y * kStemOutputs + warp_output;
  unsigned weights[kStemKernel][kOutputTiles][2];
#pragma unroll
  for (int j = 0; j < kOutputTiles; ++j) {
    const int output = first_output + output_of_column(8 * j + g, kStemRun);
    const auto* const of_output = static_cast<const unsigned char*>(p.convolution.weights) +
                                  int64_t{output} * (kStemKernel * kStemKernel * 2 * p.convolution.channels);
#pragma unroll
    for (int s = 0; s < kStemKernel; ++s) {
      const int tap = s * kStemKernel + t;
      const uint2 four = output < p.group_outputs
                             ? four_channels(of_output + tap * 2 * p.convolution.channels, p.convolution.channels, wide)
                             : make_uint2(0, 0);
      weights[s][j][0] = four.x, weights[s][j][1] = four.y;
    }
  }

  Sums<2> sums = {};
  const float* const own_statistics = statistics[0] + warp_output + t * kStemRun;
  const int own_output = first_output + t * kStemRun;
  const int64_t pixel_bytes = int64_t{p.group_outputs} * bytes_of(kOut);
  auto* const own_out = static_cast<unsigned char*>(p.out) + int64_t{own_output} * bytes_of(kOut);
  // Of the quad in `sums`.
  unsigned char* to = own_out;
  bool there = false;
  unsigned inside = 15;
  // Plain sums of pixels that the convolution does not make, such that they add nothing; nothing matters beside a bias
  // that is infinite or NaN.
  const auto leave_out = [&](int half) {
    if (kPlain && p.made.pool_padding > 0 && inside != 15) {
#pragma unroll
      for (int i = 0; i < kStemRun; ++i) {
        const int j = half * (kOutputTiles / 2) + i / 2;
        const float bias = own_statistics[kStemOutputs + half * (4 * kStemRun) + i];
        const float nothing = bias - bias == 0 ? -bias : 0.0f;
#pragma unroll
        for (int pixel = 0; pixel < 4; ++pixel) {
          float& sum = sums[pixel / 2][j][pixel % 2 * 2 + i % 2];
          sum = (inside >> pixel & 1u) != 0 ? sum : nothing;
        }
      }
    }
  };
  const auto write = [&](auto which) {
    constexpr int kHalf = decltype(which)::value, kFirst = kHalf * (kOutputTiles / 2);
    const float* const first = own_statistics + kHalf * (4 * kStemRun);
    float means[kStemRun];
    average_stem<kKind>(means, sums[0] + kFirst, sums[1] + kFirst, first, first + kStemOutputs, floor, inside);
    const int output = own_output + kHalf * (4 * kStemRun), count = p.group_outputs - output;
    unsigned char* const place = to + kHalf * (4 * kStemRun * bytes_of(kOut));
    if (p.wide_stores && count >= kStemRun) {
      if (there) {
        store_stem<kOut>(place, means);
      }
    } else if (there) {
#pragma unroll
      for (int i = 0; i < kStemRun; ++i) {
        if (i < count) {
          store_number<kOut>(place, i, means[i]);
        }
      }
    }
  };
  using LowerHalf = std::integral_constant<int, 0>;
  using UpperHalf = std::integral_constant<int, 1>;

  for (int tile = blockIdx.x; tile < tiles.count; tile += gridDim.x) {
    wait_for_copies<0>();
    __syncthreads();
    pair_stem_pixels(pairs, pixels);
    __syncthreads();
    if (const int next = tile + gridDim.x; next < tiles.count) {
      load_stem_tile(pixels, p, tiles[next], wide);
      commit_copies();
    }
    const Place place = tiles[tile];
#pragma unroll 1
    for (int part = 0; part < kStemRows * kStemColumns / 8; ++part) {
      const int row = part / (kStemColumns / 8), column = part % (kStemColumns / 8) * 8 + g;
      const uint4* const first = pairs + 2 * row * kStemImageColumns + 2 * column + t;
      uint4 four[kStemKernel + 1];  // by row of the image
#pragma unroll
      for (int y = 0; y <= kStemKernel; ++y) {
        four[y] = first[y * kStemImageColumns];
      }
      const auto multiply_half = [&](int first_tile) {
#pragma unroll
        for (int v = 0; v < 2; ++v) {
#pragma unroll
          for (int j = first_tile; j < first_tile + kOutputTiles / 2; ++j) {
#pragma unroll
            for (int k = 0; k < 4; ++k) {
              sums[v][j][k] = 0;
            }
          }
        }
#pragma unroll
        for (int s = 0; s < kStemKernel; ++s) {
#pragma unroll
          for (int v = 0; v < 2; ++v) {
            const uint4 of_row = four[s + v];
            const unsigned rows[4] = {of_row.x, of_row.y, of_row.z, of_row.w};
#pragma unroll
            for (int j = first_tile; j < first_tile + kOutputTiles / 2; ++j) {
              multiply_add<kProductOfNumber<kNumber>>(sums[v][j], rows, weights[s][j]);
            }
          }
        }
      };
      multiply_half(0);
      write(UpperHalf{});
      const int y = place.y + row, x = place.x + column;
      there = y < p.made.out_height && x < p.made.out_width;
      to = own_out + ((place.image * p.made.out_height + y) * p.made.out_width + x) * pixel_bytes;
      inside = kKind != StemKind::kScaled && p.made.pool_padding > 0 ? made_of_quad(p.made, y, x) : 15u;
      leave_out(0);
      multiply_half(kOutputTiles / 2);
      write(LowerHalf{});
      leave_out(1);
    }
  }
  write(UpperHalf{});
}

template <typename Tile>
inline int64_t conv_pool_blocks(const ConvPool& call) {
  const int64_t pixels = int64_t{call.made.count} * (call.made.pool ? 4 : 1);
  return (pixels + Tile::kPixels - 1) / Tile::kPixels * call.groups * output_tiles_of<Tile>(call);
}

template <typename Tile>
inline void launch_conv_pool_tiles(const ConvPool& call, cudaStream_t stream) {
  launch(conv_pool<Tile>, dim3(static_cast<unsigned>(conv_pool_blocks<Tile>(call))), dim3(Tile::kThreads),
         Tile::kSharedBytes, stream, call);
}

template <Number kNumber>
inline void launch_conv_pool_of(const ConvPool& call, cudaStream_t stream) {
  if (!call.convolution.is_wide(kNumber, call.made, int64_t{call.groups} * call.group_outputs)) {
    return launch_conv_pool_tiles<GatheringGemm<kNumber>>(call, stream);
  }
  if constexpr (kNumber != Number::kFloat32) {
    if (conv_pool_blocks<LargeGemm<kNumber>>(call) >= kLargeBlocks * int64_t{call.multiprocessors}) {
      return call.shared_of_block >= LargeGemm<kNumber>::kSharedBytes
                 ? launch_conv_pool_tiles<LargeGemm<kNumber>>(call, stream)
                 : launch_conv_pool_tiles<ShallowGemm<kNumber>>(call, stream);
    }
  }
  launch_conv_pool_tiles<SmallGemm<kNumber>>(call, stream);
}

inline bool is_stem(const ConvPool& call) {
  const bool narrow = call.number == Number::kFloat16 || call.number == Number::kBFloat16;
  return narrow && call.made.pool && call.groups == 1 && call.convolution.kernel == kStemKernel &&
         call.convolution.channels <= kStemChannels && call.group_outputs <= kStemMostOutputs;
}

template <Number kNumber, Number kOut>
inline void launch_conv_pool_stem_to(const ConvPool& call, cudaStream_t stream) {
  const auto kernel = call.scale == nullptr          ? conv_pool_stem<kNumber, kOut, StemKind::kPlain>
                      : call.made.pool_padding == 0 ? conv_pool_stem<kNumber, kOut, StemKind::kScaled>
                                                    : conv_pool_stem<kNumber, kOut, StemKind::kPadded>;
  const int parts = (call.group_outputs + kStemOutputs - 1) / kStemOutputs;
  // No more than run at once, so that each keeps its weights for as many tiles as there can be.
  const int most = std::max(resident_blocks(kernel, kStemThreads, 0) * call.multiprocessors / parts, 1);
  launch(kernel, dim3(std::min(StemTiles(call.made).count, most), parts), dim3(kStemThreads), 0, stream, call);
}

template <Number kNumber>
inline void launch_conv_pool_stem(const ConvPool& call, cudaStream_t stream) {
  switch (call.out_number) {
    case Number::kFloat16: return launch_conv_pool_stem_to<kNumber, Number::kFloat16>(call, stream);
    case Number::kBFloat16: return launch_conv_pool_stem_to<kNumber, Number::kBFloat16>(call, stream);
    case Number::kE4m3: return launch_conv_pool_stem_to<kNumber, Number::kE4m3>(call, stream);
    default: return launch_conv_pool_stem_to<kNumber, Number::kFloat32>(call, stream);
  }
}

// The most blocks that a launch may have.
inline int64_t conv_pool_most_blocks(const ConvPool& call) {
  return conv_pool_blocks<GatheringGemm<Number::kFloat16>>(call);
}

inline void launch_conv_pool(ConvPool call, cudaStream_t stream) {
  const int bytes = bytes_of(call.out_number);
  call.wide_stores = is_aligned(call.out) && call.group_outputs * bytes % 16 == 0;
  call.wide_statistics = is_aligned(call.scale) && is_aligned(call.bias) && call.group_outputs % 4 == 0;
  if (call.made.count == 0) {
    return;
  }
  if (is_stem(call)) {
    call.number == Number::kFloat16 ? launch_conv_pool_stem<Number::kFloat16>(call, stream)
                                    : launch_conv_pool_stem<Number::kBFloat16>(call, stream);
    return;
  }
  switch (call.number) {
    case Number::kFloat16: return launch_conv_pool_of<Number::kFloat16>(call, stream);
    case Number::kBFloat16: return launch_conv_pool_of<Number::kBFloat16>(call, stream);
    case Number::kE4m3: return launch_conv_pool_of<Number::kE4m3>(call, stream);
    default: return launch_conv_pool_of<Number::kFloat32>(call, stream);
  }
}

}  // namespace efficientad_fast::cuda
