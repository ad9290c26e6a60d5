// Convolutions as products of matrices on tensor cores, for conv_pool and feature_distance.
//
// The left matrix has a row for every pixel that a convolution makes, the right one a column for every output; they are
// as deep as the kernel's taps times the channels. A block multiplies a tile of both: of each row it copies pieces of
// 64 or 128 bytes to shared memory, several pieces ahead of those that it multiplies. The left matrix is never written:
// the piece of a row is where its pixel, moved by the tap, lies in the image. Rows need not be neighbours there: pixels
// count through images without regard to their borders, and only the last tile is not full.

#pragma once

#include "device.h"
#include "ptx.h"

#include <cstdint>
#include <type_traits>

namespace efficientad_fast::cuda {

enum class Number : int { kFloat32, kFloat16, kBFloat16, kE4m3 };

constexpr int bytes_of(Number number) {
  return number == Number::kFloat32 ? 4 : number == Number::kE4m3 ? 1 : 2;
}

template <Number kNumber>
inline constexpr Product kProductOfNumber = kNumber == Number::kFloat16    ? Product::kFloat16
                                            : kNumber == Number::kBFloat16 ? Product::kBFloat16
                                                                           : Product::kE4m3;

// What convolutions make, and what becomes of it: pixels, or the means of quads of pixels.
struct Made {
  int height, width;          // before pooling
  int out_height, out_width;  // after it
  int count;                  // pixels of the results of all images
  bool pool;
  int pool_padding;
};

// What a convolution reads. Strides are in numbers; channels are next to each other.
struct Convolution {
  const void* images;   // (N, height, width, channels of all groups)
  const void* weights;  // (outputs of all groups, kernel, kernel, channels), dense
  int64_t image_stride, row_stride, pixel_stride;
  int height, width;
  int channels;  // of a group
  int kernel, padding;

  // Whether pieces of 16 bytes are aligned and within one pixel, and 31 bits hold how far the bytes that a tile of at
  // most 256 of these pixels reads are from each other, and so for `outputs` of weights.
  bool is_wide(Number number, const Made& made, int64_t outputs) const {
    const int bytes = bytes_of(number);
    const auto whole = [bytes](int64_t numbers) { return numbers * bytes % 16 == 0; };
    const auto near = [bytes](int64_t numbers) { return numbers < INT32_MAX / bytes; };
    const int64_t tile_images = 256 / (int64_t{made.out_height} * made.out_width) + 2;
    return whole(channels) && whole(image_stride) && whole(row_stride) && whole(pixel_stride) &&
           reinterpret_cast<uintptr_t>(images) % 16 == 0 && reinterpret_cast<uintptr_t>(weights) % 16 == 0 &&
           near(tile_images * image_stride + (height + 2 * padding + 2) * row_stride +
                (width + 2 * padding + 2) * pixel_stride) &&
           near(outputs * kernel * kernel * channels);
  }
};

inline constexpr int kWarpOutputs = 64;
inline constexpr int kOutputTiles = kWarpOutputs / 8;
// The most that a launch asks for: what every GPU since 8.0 has, and where a block may have it (8.0, 9.0, 10.0).
inline constexpr int kImplicitGemmSharedBytes = 96 * 1024;
inline constexpr int kImplicitGemmOptinSharedBytes = 144 * 1024;

// kWarpTiles: how many times 16 pixels a warp has; kWarpRows: warps above each other, kWarpColumns beside each other,
// and kSlices, each with its part of the depth. kPieceBytes: of a row, at a time. kWide: pieces are copied by 16 bytes.
template <Number kTheNumber, int kTheWarpTiles, int kWarpRows, int kTheWarpColumns, int kTheSlices, int kThePieceBytes,
          int kTheStages, bool kIsWide>
struct Tile {
  static constexpr Number kNumber = kTheNumber;
  static constexpr int kWarpTiles = kTheWarpTiles, kWarpColumns = kTheWarpColumns, kSlices = kTheSlices;
  static constexpr bool kWide = kIsWide;
  static constexpr int kWarpPixels = 16 * kWarpTiles;
  static constexpr int kPixels = kWarpPixels * kWarpRows;
  static constexpr int kOutputs = kWarpOutputs * kWarpColumns;
  static constexpr int kWarpsOfSlice = kWarpColumns * kWarpRows;
  static constexpr int kThreads = 32 * kWarpsOfSlice * kSlices;
  // Of a multiprocessor. 0 leaves it to the compiler, which has some registers spilled for a third where it gathers.
  static constexpr int kLeastBlocks = kWide ? 0 : 2;
  static constexpr int kPieceBytes = kThePieceBytes;
  static constexpr int kStageBytes = (kPixels + kOutputs) * kPieceBytes;
  static constexpr int kStages = kTheStages;
  static constexpr int kSumBytes = 4 * (kSlices - 1) * kPixels * kOutputs;
  static constexpr int kSharedBytes = kStages * kStageBytes > kSumBytes ? kStages * kStageBytes : kSumBytes;
  static constexpr int kDepth = kPieceBytes / bytes_of(kNumber);
  static_assert(kWarpTiles % 2 == 0, "the pixels of a quad are in two of a warp's 16 rows");
  static_assert(kStages >= 3, "copies of two pieces are under way while a third is multiplied");
  static_assert(kPieceBytes == 64 || kPieceBytes == 128, "as swizzled has them");
  static_assert(kSharedBytes <= kImplicitGemmOptinSharedBytes);
};

// Where there are many blocks, and where there are few, which have as many warps for half of the pixels: two slices of
// the depth. Deep pieces halve the waits; large tiles are Shallow where a block may not have so much shared memory. Sums
// of e4m3 are held twice, so that there are registers for fewer. docs/cuda-kernels.md has what was measured.
template <Number kNumber>
struct Tiles {
  using Large = Tile<kNumber, 4, 4, 2, 1, 128, 3, true>;
  using Shallow = Tile<kNumber, 4, 4, 2, 1, 64, 4, true>;
  using Small = Tile<kNumber, 4, 2, 2, 2, 128, 3, true>;
};

template <>
struct Tiles<Number::kE4m3> {
  using Large = Tile<Number::kE4m3, 2, 4, 2, 1, 64, 3, true>;
  using Shallow = Large;
  using Small = Tile<Number::kE4m3, 2, 2, 2, 1, 64, 4, true>;
};

template <>
struct Tiles<Number::kFloat32> {
  using Small = Tile<Number::kFloat32, 2, 2, 2, 1, 64, 4, true>;
};

template <Number kNumber>
using LargeGemm = typename Tiles<kNumber>::Large;
template <Number kNumber>
using ShallowGemm = typename Tiles<kNumber>::Shallow;
template <Number kNumber>
using SmallGemm = typename Tiles<kNumber>::Small;
// Where rows are not made of 16 bytes that lie together.
template <Number kNumber>
using GatheringGemm = Tile<kNumber, 2, 2, 2, 1, 64, 4, false>;

static_assert(ShallowGemm<Number::kFloat16>::kSharedBytes <= kImplicitGemmSharedBytes &&
              SmallGemm<Number::kFloat16>::kSharedBytes <= kImplicitGemmSharedBytes &&
              LargeGemm<Number::kE4m3>::kSharedBytes <= kImplicitGemmSharedBytes);

// The least number of blocks, for each multiprocessor, for which large tiles are worth it.
inline constexpr int kLargeBlocks = 1;

// Sums of a warp's 16 kTiles pixels and 64 outputs: what multiply_add takes, by 16 pixels and 8 outputs.
template <int kTiles>
using Sums = float[kTiles][kOutputTiles][4];

// Of 16 bytes of a row in shared memory. Eight rows' same pieces lie in different banks.
template <int kPieceBytes>
__device__ __forceinline__ int swizzled(int row, int piece) {
  return row * kPieceBytes + ((piece ^ (kPieceBytes == 64 ? row >> 1 & 3 : row & 7)) << 4);
}

// The output, among a warp's, that stands in column `column` of the products. Those of a thread are next to each other,
// in runs of `run` (4, 8 or 16), so that it can store 16 bytes.
__device__ __forceinline__ int output_of_column(int column, int run) {
  const int half = run / 2, tile = column / 8, pair = column % 8 / 2;
  return tile / half * (4 * run) + pair * run + tile % half * 2 + column % 2;
}

// A pixel that a convolution makes.
struct Place {
  int image, y, x;
};

__device__ __forceinline__ Place place_of(int index, int height, int width) {
  const unsigned row = static_cast<unsigned>(index) / static_cast<unsigned>(width);
  const unsigned image = row / static_cast<unsigned>(height);
  return {static_cast<int>(image), static_cast<int>(row - image * height), static_cast<int>(index - row * width)};
}

// Which taps, the first of which is at `first`, lie in an image of that length: a bit for each.
__device__ __forceinline__ unsigned taps_inside(int first, int length, int kernel) {
  const int low = min(max(-first, 0), kernel), high = min(max(length - first, low), kernel);
  return ((1u << high) - 1) & ~((1u << low) - 1);
}

// One number of a piece, in the low bits.
template <Number kNumber>
__device__ __forceinline__ unsigned bits_at(const unsigned char* place) {
  if constexpr (kNumber == Number::kFloat32) {
    return *reinterpret_cast<const unsigned*>(place);
  } else if constexpr (kNumber == Number::kE4m3) {
    return *place;
  } else {
    return *reinterpret_cast<const unsigned short*>(place);
  }
}

// Copies a tile's pieces to shared memory, from the first tap and channels to the last: of some rows, a thread copies
// one of the four 16 bytes of each piece.
template <typename Tile>
class Loader {
 public:
  // tile: of pixels; first_output, last_output: of the block's, in all groups; run: of output_of_column.
  __device__ __forceinline__ void begin(const Convolution& from, const Made& made, int tile, int group,
                                        int first_output, int last_output, int run) {
    const int first_row = threadIdx.x / kPieces;
    kernel_ = from.kernel, channels_ = from.channels;
    row_bytes_ = from.row_stride * kBytes;
    pixel_bytes_ = from.pixel_stride * kBytes;
    const auto place_of_row = [&](int row) {
      // A quad is in rows g, g + 8, g + 16, g + 24 of 32: in one thread's sums.
      const int index = made.pool ? tile * (Tile::kPixels / 4) + row / 32 * 8 + row % 8 : tile * Tile::kPixels + row;
      Place place = place_of(index, made.out_height, made.out_width);
      if (made.pool) {
        place.y = 2 * place.y - made.pool_padding + row / 8 % 2;
        place.x = 2 * place.x - made.pool_padding + row / 16 % 2;
      }
      place.y -= from.padding, place.x -= from.padding;
      return place;
    };
    const Place first = place_of_row(0);
    images_ = static_cast<const unsigned char*>(from.images) + int64_t{group} * channels_ * kBytes +
              first.image * from.image_stride * kBytes + first.y * row_bytes_ + first.x * pixel_bytes_;
    weights_ = static_cast<const unsigned char*>(from.weights);
#pragma unroll
    for (int i = 0; i < kPixelRows; ++i) {
      const int row = first_row + i * kRowsApart;
      const bool there = (made.pool ? tile * (Tile::kPixels / 4) + row / 32 * 8 + row % 8
                                    : tile * Tile::kPixels + row) < made.count;
      const Place place = place_of_row(row);
      const unsigned rows = taps_inside(place.y, from.height, kernel_);
      taps_[i] = there ? rows | taps_inside(place.x, from.width, kernel_) << 16 : 0;
      pixel_[i] = static_cast<Offset>((place.image - first.image) * from.image_stride * kBytes +
                                      (place.y - first.y) * row_bytes_ + (place.x - first.x) * pixel_bytes_);
    }
    const int64_t output_bytes = int64_t{kernel_} * kernel_ * channels_ * kBytes;
    outputs_ = 0;
#pragma unroll
    for (int i = 0; i < kOutputRows; ++i) {
      const int row = first_row + i * kRowsApart;
      const int output = first_output + row / kWarpOutputs * kWarpOutputs + output_of_column(row % kWarpOutputs, run);
      output_[i] = static_cast<Offset>(output * output_bytes);
      outputs_ |= (output < last_output ? 1u : 0u) << i;
    }
    const int depth = static_cast<int>(threadIdx.x % kPieces) * kCount, tap = depth / channels_;
    channel_ = depth - tap * channels_;
    y_ = tap / kernel_, x_ = tap - y_ * kernel_;
    const int more_taps = Tile::kDepth / channels_;
    more_channels_ = Tile::kDepth - more_taps * channels_;
    more_y_ = more_taps / kernel_, more_x_ = more_taps - more_y_ * kernel_;
    weight_offset_ = depth * kBytes;
    find_piece();
  }

  // Of kParts parts of a piece one, to a stage that nobody reads. Zeros behind the last piece.
  template <int kParts>
  __device__ __forceinline__ void load(unsigned char* stage, int part) {
    const int first_row = threadIdx.x / kPieces;
    unsigned char* const to = stage + swizzled<Tile::kPieceBytes>(first_row, threadIdx.x % kPieces);
    constexpr int kRows = kPixelRows + kOutputRows;
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      if (row < part * kRows / kParts || row >= (part + 1) * kRows / kParts) {
        continue;
      }
      unsigned char* const to_row = to + row * (kRowsApart * Tile::kPieceBytes);
      if (row < kPixelRows) {
        const int i = row;
        if constexpr (Tile::kWide) {
          // Other taps read them again.
          copy_async<16, /*kKept=*/true>(to_row, images_ + image_offset_ + pixel_[i],
                                         (taps_[i] & tap_) == wanted_tap_);
        } else {
          gather(to_row, [&](int y, int x, int64_t offset, int) -> const unsigned char* {
            return (taps_[i] >> y & taps_[i] >> (16 + x) & 1u) != 0 ? images_ + pixel_[i] + offset : nullptr;
          });
        }
      } else {
        const int i = row - kPixelRows;
        if constexpr (Tile::kWide) {
          copy_async<16>(to_row, weights_ + weight_offset_ + output_[i], (outputs_inside_ >> i & 1u) != 0);
        } else {
          gather(to_row, [&](int, int, int64_t, int number) -> const unsigned char* {
            return (outputs_ >> i & 1u) != 0 ? weights_ + output_[i] + weight_offset_ + number * kBytes : nullptr;
          });
        }
      }
    }
  }

  // Once all parts of a piece are under way.
  __device__ __forceinline__ void advance() {
    weight_offset_ += Tile::kPieceBytes;
    channel_ += more_channels_;
    const int carry = channel_ >= channels_ ? 1 : 0;
    channel_ -= carry * channels_;
    x_ += more_x_ + carry;
    const int next_row = x_ >= kernel_ ? 1 : 0;
    x_ -= next_row * kernel_;
    y_ += more_y_ + next_row;
    find_piece();
  }

 private:
  using Offset = std::conditional_t<Tile::kWide, int, int64_t>;
  static constexpr int kBytes = bytes_of(Tile::kNumber);
  static constexpr int kCount = 16 / kBytes;
  static constexpr int kPieces = Tile::kPieceBytes / 16;
  static constexpr int kRowsApart = Tile::kThreads / kPieces;
  static constexpr int kPixelRows = Tile::kPixels / kRowsApart, kOutputRows = Tile::kOutputs / kRowsApart;
  static_assert(kRowsApart % 8 == 0 && Tile::kPixels % kRowsApart == 0 && Tile::kOutputs % kRowsApart == 0);

  __device__ __forceinline__ void find_piece() {
    const bool within = y_ < kernel_;
    image_offset_ = y_ * row_bytes_ + x_ * pixel_bytes_ + channel_ * kBytes;
    tap_ = within ? 1u << y_ | 1u << (16 + x_) : 0;
    wanted_tap_ = within ? tap_ : 1;
    outputs_inside_ = within ? outputs_ : 0;
  }

  // 16 bytes, number by number, where `place_of_number` says that there is one.
  template <typename PlaceOfNumber>
  __device__ __forceinline__ void gather(unsigned char* to, const PlaceOfNumber& place_of_number) const {
    constexpr int kOfWord = 4 / kBytes;
    unsigned words[4] = {};
    int y = y_, x = x_, channel = channel_;
#pragma unroll
    for (int word = 0; word < 4; ++word) {
#pragma unroll
      for (int i = 0; i < kOfWord; ++i) {
        if (y < kernel_) {
          const unsigned char* const place =
              place_of_number(y, x, y * row_bytes_ + x * pixel_bytes_ + channel * kBytes, word * kOfWord + i);
          words[word] |= place == nullptr ? 0 : bits_at<Tile::kNumber>(place) << i * (8 * kBytes);
          if (++channel == channels_) {
            channel = 0;
            if (++x == kernel_) {
              x = 0;
              ++y;
            }
          }
        }
      }
    }
    *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
  }

  const unsigned char *images_, *weights_;    // what the first tap reads for the tile's first pixel; all weights
  Offset pixel_[kPixelRows];                  // from there
  unsigned taps_[kPixelRows];                 // inside of the image: rows in the low half, columns in the high one
  Offset output_[kOutputRows];
  unsigned outputs_;                          // a bit for each that is there
  int64_t row_bytes_, pixel_bytes_;
  int kernel_, channels_;
  int more_y_, more_x_, more_channels_;  // from piece to piece
  // Of the next piece.
  int y_, x_, channel_;
  int64_t image_offset_;
  std::conditional_t<Tile::kWide, unsigned, int64_t> weight_offset_;
  unsigned tap_, wanted_tap_;  // in taps_
  unsigned outputs_inside_;
};

// What a warp multiplies in one step: 16 bytes twice of each row. Pixels' are loaded anew as soon as they are
// multiplied, outputs', which all pixels need, to the other of two places.
template <typename Tile>
struct Fragments {
  unsigned rows[Tile::kWarpTiles][4], columns[2][kOutputTiles / 2][4];

  // `left` and `right` are the warp's rows in shared memory.
  __device__ __forceinline__ void load_row(int i, const unsigned char* left, int step) {
    const int lane = threadIdx.x % 32;
    load_matrices(rows[i], left + swizzled<Tile::kPieceBytes>(lane % 16, 2 * step + lane / 16) +
                               i * (16 * Tile::kPieceBytes));
  }

  __device__ __forceinline__ void load_columns(int place, const unsigned char* right, int step) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < kOutputTiles / 2; ++j) {
      load_matrices(columns[place][j],
                    right + swizzled<Tile::kPieceBytes>(lane % 8 + lane / 16 * 8, 2 * step + lane / 8 % 2) +
                        j * (16 * Tile::kPieceBytes));
    }
  }

  __device__ __forceinline__ void multiply_row(float (&sums)[kOutputTiles][4], int i, int place) const {
#pragma unroll
    for (int j = 0; j < kOutputTiles; ++j) {
      const unsigned column[2] = {columns[place][j / 2][j % 2 * 2], columns[place][j / 2][j % 2 * 2 + 1]};
      multiply_add<kProductOfNumber<Tile::kNumber>>(sums[j], rows[i], column);
    }
  }
};

// Adds the products of a piece, of float32: `left` and `right` are the warp's rows in shared memory.
template <typename Tile>
__device__ __forceinline__ void multiply_plainly(Sums<Tile::kWarpTiles>& sums, const unsigned char* left,
                                                 const unsigned char* right) {
  constexpr int kPieceBytes = Tile::kPieceBytes;
  const int lane = threadIdx.x % 32;
  const int g = lane / 4, t = lane % 4;
#pragma unroll 1
  for (int piece = 0; piece < kPieceBytes / 16; ++piece) {
    float4 pixels[Tile::kWarpTiles][2];
#pragma unroll
    for (int i = 0; i < Tile::kWarpTiles; ++i) {
#pragma unroll
      for (int v = 0; v < 2; ++v) {
        pixels[i][v] = *reinterpret_cast<const float4*>(left + swizzled<kPieceBytes>(16 * i + 8 * v + g, piece));
      }
    }
#pragma unroll
    for (int column = 0; column < 2 * kOutputTiles; ++column) {
      const int j = column / 2, b = column % 2;
      const float4 weight = *reinterpret_cast<const float4*>(right + swizzled<kPieceBytes>(8 * j + 2 * t + b, piece));
#pragma unroll
      for (int i = 0; i < Tile::kWarpTiles; ++i) {
#pragma unroll
        for (int v = 0; v < 2; ++v) {
          float& sum = sums[i][j][2 * v + b];
          sum = __fmaf_rn(pixels[i][v].x, weight.x, sum);
          sum = __fmaf_rn(pixels[i][v].y, weight.y, sum);
          sum = __fmaf_rn(pixels[i][v].z, weight.z, sum);
          sum = __fmaf_rn(pixels[i][v].w, weight.w, sum);
        }
      }
    }
  }
}


template <int kTiles, typename Body>
__device__ __forceinline__ void for_each_sum(Sums<kTiles>& sums, const Body& body) {
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
#pragma unroll
    for (int j = 0; j < kOutputTiles; ++j) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        body(sums[i][j][k], i, j, k);
      }
    }
  }
}

// A warp's place in its block's tile.
template <typename Tile>
struct WarpPlace {
  int slice, row, column;

  __device__ __forceinline__ WarpPlace() {
    const int warp = static_cast<int>(threadIdx.x) / 32, of_slice = warp % Tile::kWarpsOfSlice;
    slice = warp / Tile::kWarpsOfSlice, row = of_slice / Tile::kWarpColumns, column = of_slice % Tile::kWarpColumns;
  }
};

// The first slice's sums become those of all, in order. To be called by the whole block.
template <typename Tile>
__device__ __forceinline__ void add_slices(Sums<Tile::kWarpTiles>& sums, const WarpPlace<Tile>& warp, float* room) {
  constexpr int kOfSlice = Tile::kPixels * Tile::kOutputs;
  const int within = static_cast<int>(threadIdx.x) % (32 * Tile::kWarpsOfSlice);
  const auto place = [&](int slice, int i, int j) {
    const int four = (i * kOutputTiles + j) * (32 * Tile::kWarpsOfSlice) + within;
    return reinterpret_cast<float4*>(room + (slice - 1) * kOfSlice) + four;
  };
  __syncthreads();
  if (warp.slice > 0) {
#pragma unroll
    for (int i = 0; i < Tile::kWarpTiles; ++i) {
#pragma unroll
      for (int j = 0; j < kOutputTiles; ++j) {
        *place(warp.slice, i, j) = make_float4(sums[i][j][0], sums[i][j][1], sums[i][j][2], sums[i][j][3]);
      }
    }
  }
  __syncthreads();
  if (warp.slice == 0) {
#pragma unroll
    for (int slice = 1; slice < Tile::kSlices; ++slice) {
#pragma unroll
      for (int i = 0; i < Tile::kWarpTiles; ++i) {
#pragma unroll
        for (int j = 0; j < kOutputTiles; ++j) {
          const float4 more = *place(slice, i, j);
          sums[i][j][0] += more.x, sums[i][j][1] += more.y, sums[i][j][2] += more.z, sums[i][j][3] += more.w;
        }
      }
    }
  }
}

template <typename Tile>
__device__ __forceinline__ int pieces_of(const Convolution& from) {
  return (from.kernel * from.kernel * from.channels + Tile::kDepth - 1) / Tile::kDepth;
}

// sums = the products of `first` or, where there is a second, those of `second` less those of `first`: kTwo says that
// there may be one, `paired` that there is. To be called by the whole block.
template <typename Tile, bool kTwo>
__device__ __forceinline__ void sum_products(Sums<Tile::kWarpTiles>& sums, const Convolution& first,
                                             const Convolution& second, bool paired, const Made& made, int tile,
                                             int group, int first_output, int last_output, int run) {
  EFFICIENTAD_FAST_DYNAMIC_SHARED(unsigned char, stages);
  // Tensor cores add products of e4m3 with fewer bits than float32 has: they leave the accumulator every 128 channels.
  // From 9.0 to below 12.0 the compiler makes products of float16 of this instruction, whose sums are in float32.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1200
  constexpr bool kTakenOut = false;
#else
  constexpr bool kTakenOut = Tile::kNumber == Number::kE4m3;
#endif
  const WarpPlace<Tile> warp;
  const int left = warp.row * (Tile::kWarpPixels * Tile::kPieceBytes);
  const int right = (Tile::kPixels + warp.column * kWarpOutputs) * Tile::kPieceBytes;
  const int first_pieces = pieces_of<Tile>(first);
  const int pieces = kTwo && paired ? first_pieces + pieces_of<Tile>(second) : first_pieces;
  Sums<kTakenOut ? Tile::kWarpTiles : 1> part = {};
  for_each_sum<Tile::kWarpTiles>(sums, [](float& sum, int, int, int) { sum = 0; });
  const auto take_out = [&] {
    if constexpr (kTakenOut) {
      for_each_sum<Tile::kWarpTiles>(part, [&](float& sum, int i, int j, int k) {
        sums[i][j][k] += sum;
        sum = 0;
      });
    }
  };

  constexpr bool kPlain = Tile::kNumber == Number::kFloat32;
  constexpr int kSteps = kPlain ? 1 : Tile::kPieceBytes / 32 / Tile::kSlices;
  static_assert(kSteps >= 1 && !(kPlain && Tile::kSlices > 1));
  Loader<Tile> loader;
  loader.begin(first, made, tile, group, first_output, last_output, run);
#pragma unroll 1
  for (int piece = 0; piece < Tile::kStages - 1; ++piece) {
    if (kTwo && paired && piece == first_pieces) {
      loader.begin(second, made, tile, group, first_output, last_output, run);
    }
    loader.template load<1>(stages + piece * Tile::kStageBytes, 0);
    loader.advance();
    commit_copies();
  }
  wait_for_copies<Tile::kStages - 2>();
  __syncthreads();
  Fragments<Tile> fragments;
  const int first_step = warp.slice * kSteps;
  if constexpr (!kPlain) {
    fragments.load_columns(0, stages + right, first_step);
#pragma unroll
    for (int i = 0; i < Tile::kWarpTiles; ++i) {
      fragments.load_row(i, stages + left, first_step);
    }
  }
  int reading = 0;
#pragma unroll 1
  for (int piece = 0; piece < pieces; ++piece) {
    if constexpr (kTwo) {
      if (paired && piece + Tile::kStages - 1 == first_pieces) {
        loader.begin(second, made, tile, group, first_output, last_output, run);
      }
      if (piece == first_pieces) {
        take_out();
        for_each_sum<Tile::kWarpTiles>(sums, [](float& sum, int, int, int) { sum = -sum; });
      }
    }
    const unsigned char* const stage = stages + reading * Tile::kStageBytes;
    unsigned char* const written = stages + ((reading == 0 ? Tile::kStages : reading) - 1) * Tile::kStageBytes;
    if (piece + 1 < pieces) {
      reading = reading + 1 == Tile::kStages ? 0 : reading + 1;
    }
    const unsigned char* const following = stages + reading * Tile::kStageBytes;
    if constexpr (kPlain) {
      loader.template load<1>(written, 0);
      multiply_plainly<Tile>(sums, stage + left, stage + right);
      wait_for_copies<Tile::kStages - 3>();
      __syncthreads();
    } else {
      // Each step loads what the next one multiplies, of the following piece too: of the last piece that is itself.
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const bool last = step == kSteps - 1;
        const unsigned char* const from = last ? following : stage;
        const int next = first_step + (last ? 0 : step + 1);
#pragma unroll
        for (int i = 0; i < Tile::kWarpTiles; ++i) {
          if constexpr (kTakenOut) {
            fragments.multiply_row(part[i], i, step % 2);
          } else {
            fragments.multiply_row(sums[i], i, step % 2);
          }
          if (i == 0) {
            if (last) {
              wait_for_copies<Tile::kStages - 3>();
              __syncthreads();
            }
            fragments.load_columns((step + 1) % 2, from + right, next);
          }
          fragments.load_row(i, from + left, next);
          if (i == 1) {
            loader.template load<kSteps>(written, step);
          }
        }
      }
      if constexpr (kSteps % 2 == 1) {
#pragma unroll
        for (int j = 0; j < kOutputTiles / 2; ++j) {
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            fragments.columns[0][j][k] = fragments.columns[1][j][k];
          }
        }
      }
    }
    loader.advance();
    commit_copies();
    if (kTakenOut && piece % 2 == 1) {
      take_out();
    }
  }
  wait_for_copies<0>();
  take_out();
  if constexpr (Tile::kSlices > 1) {
    add_slices<Tile>(sums, warp, reinterpret_cast<float*>(stages));
  }
}

}  // namespace efficientad_fast::cuda
