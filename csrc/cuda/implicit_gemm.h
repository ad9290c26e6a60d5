// Convolutions as products of matrices on tensor cores, for conv_pool and feature_distance.
//
// The left matrix has a row for every pixel that a convolution makes, the right one a column for every output; they are
// as deep as the kernel's taps times the channels. A block multiplies a tile of both: of each row it copies pieces of
// 64 bytes to shared memory, several pieces ahead of those that it multiplies. The left matrix is never written: the
// piece of a row is where its pixel, moved by the tap, lies in the image. Rows need not be neighbours there: pixels
// count through images without regard to their borders, and only the last tile is not full.

#pragma once

#include "device.h"
#include "ptx.h"

#include <cstdint>

namespace efficientad_fast::cuda {

enum class Number : int { kFloat32, kFloat16, kBFloat16, kE4m3 };

constexpr int bytes_of(Number number) {
  return number == Number::kFloat32 ? 4 : number == Number::kE4m3 ? 1 : 2;
}

template <Number kNumber>
inline constexpr Product kProductOfNumber = kNumber == Number::kFloat16    ? Product::kFloat16
                                            : kNumber == Number::kBFloat16 ? Product::kBFloat16
                                                                           : Product::kE4m3;

// What a convolution reads. Strides are in numbers; channels are next to each other.
struct Convolution {
  const void* images;   // (N, height, width, channels of all groups)
  const void* weights;  // (outputs of all groups, kernel, kernel, channels), dense
  int64_t image_stride, row_stride, pixel_stride;
  int height, width;
  int channels;  // of a group
  int kernel, padding;

  // Whether pieces of 16 bytes are aligned and within one pixel.
  bool is_wide(Number number) const {
    const int bytes = bytes_of(number);
    const auto whole = [bytes](int64_t numbers) { return numbers * bytes % 16 == 0; };
    return whole(channels) && whole(image_stride) && whole(row_stride) && whole(pixel_stride) &&
           reinterpret_cast<uintptr_t>(images) % 16 == 0 && reinterpret_cast<uintptr_t>(weights) % 16 == 0;
  }
};

// What convolutions make, and what becomes of it: pixels, or the means of quads of pixels.
struct Made {
  int height, width;          // before pooling
  int out_height, out_width;  // after it
  int count;                  // pixels of the results of all images
  bool pool;
  int pool_padding;
};

inline constexpr int kPieceBytes = 64;     // of a row, at a time
inline constexpr int kTileOutputs = 128;
inline constexpr int kWarpOutputs = 64;    // two warps beside each other have the tile's outputs
inline constexpr int kOutputTiles = kWarpOutputs / 8;
inline constexpr int kImplicitGemmSharedBytes = 48 * 1024;

// kWarpTiles: how many times 16 pixels a warp has; kWarpRows: warps above each other. kWide: pieces of 16 bytes.
template <Number kTheNumber, int kTheWarpTiles, int kWarpRows, bool kIsWide>
struct Tile {
  static constexpr Number kNumber = kTheNumber;
  static constexpr int kWarpTiles = kTheWarpTiles;
  static constexpr bool kWide = kIsWide;
  static constexpr int kWarpPixels = 16 * kWarpTiles;
  static constexpr int kPixels = kWarpPixels * kWarpRows;
  static constexpr int kThreads = 32 * 2 * kWarpRows;
  // Of a multiprocessor. 0 leaves it to the compiler, which has some registers spilled for a third where it gathers.
  static constexpr int kLeastBlocks = kWide ? 0 : 2;
  static constexpr int kStageBytes = (kPixels + kTileOutputs) * kPieceBytes;
  static constexpr int kStages = kImplicitGemmSharedBytes / kStageBytes;
  static constexpr int kDepth = kPieceBytes / bytes_of(kNumber);
  static_assert(kWarpTiles % 2 == 0, "the pixels of a quad are in two of a warp's 16 rows");
  static_assert(kStages >= 3, "copies of two pieces are under way while a third is multiplied");
};

// Where there are many blocks, and where there are few. Sums of e4m3 are held twice.
template <Number kNumber>
using LargeGemm = Tile<kNumber, kNumber == Number::kE4m3 ? 2 : 4, kNumber == Number::kE4m3 ? 4 : 2, true>;
template <Number kNumber, bool kWide>
using SmallGemm = Tile<kNumber, 2, 2, kWide>;

// The least number of blocks for which large tiles are worth it: every multiprocessor has as many at a time.
inline constexpr int kBlocksOfMultiprocessor = 2;

// Sums of a warp's 16 kTiles pixels and 64 outputs: what multiply_add takes, by 16 pixels and 8 outputs.
template <int kTiles>
using Sums = float[kTiles][kOutputTiles][4];

// Of 16 bytes of a row in shared memory. Eight rows' same pieces lie in different banks, and so do two whole rows.
__device__ __forceinline__ int swizzled(int row, int piece) {
  return row * kPieceBytes + ((piece ^ (row >> 1 & 3)) << 4);
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
    const auto* const images = static_cast<const unsigned char*>(from.images) + int64_t{group} * channels_ * kBytes;
#pragma unroll
    for (int i = 0; i < kPixelRows; ++i) {
      const int row = first_row + i * kRowsApart;
      // A quad is in rows g, g + 8, g + 16, g + 24 of 32: in one thread's sums.
      const int index = made.pool ? tile * (Tile::kPixels / 4) + row / 32 * 8 + row % 8 : tile * Tile::kPixels + row;
      Place place = place_of(index, made.out_height, made.out_width);
      if (made.pool) {
        place.y = 2 * place.y - made.pool_padding + row / 8 % 2;
        place.x = 2 * place.x - made.pool_padding + row / 16 % 2;
      }
      const int y = place.y - from.padding, x = place.x - from.padding;
      taps_[i] = index < made.count
                     ? taps_inside(y, from.height, kernel_) | taps_inside(x, from.width, kernel_) << 16
                     : 0;
      pixel_[i] = images + place.image * from.image_stride * kBytes + y * row_bytes_ + x * pixel_bytes_;
    }
    const int64_t output_bytes = int64_t{kernel_} * kernel_ * channels_ * kBytes;
#pragma unroll
    for (int i = 0; i < kOutputRows; ++i) {
      const int row = first_row + i * kRowsApart;
      const int output = first_output + row / kWarpOutputs * kWarpOutputs + output_of_column(row % kWarpOutputs, run);
      output_[i] =
          output < last_output ? static_cast<const unsigned char*>(from.weights) + output * output_bytes : nullptr;
    }
    y_ = x_ = channel_ = 0;
    image_offset_ = weight_offset_ = 0;
    advance(static_cast<int>(threadIdx.x % kPieces) * kCount);
  }

  // The next piece, to a stage that nobody reads.
  __device__ __forceinline__ void load(unsigned char* stage) {
    const int first_row = threadIdx.x / kPieces;
    unsigned char* to = stage + swizzled(first_row, threadIdx.x % kPieces);
    const bool within = y_ < kernel_;
#pragma unroll
    for (int i = 0; i < kPixelRows; ++i) {
      if constexpr (Tile::kWide) {
        // Other taps read them again.
        copy_async<16, /*kKept=*/true>(to, pixel_[i] + image_offset_, within && is_inside(taps_[i], y_, x_));
      } else {
        gather(to, [&](int y, int x, int64_t offset, int) -> const unsigned char* {
          return is_inside(taps_[i], y, x) ? pixel_[i] + offset : nullptr;
        });
      }
      to += kRowsApart * kPieceBytes;
    }
#pragma unroll
    for (int i = 0; i < kOutputRows; ++i) {
      if constexpr (Tile::kWide) {
        copy_async<16>(to, output_[i] + weight_offset_, within && output_[i] != nullptr);
      } else {
        gather(to, [&](int, int, int64_t, int number) -> const unsigned char* {
          return output_[i] == nullptr ? nullptr : output_[i] + weight_offset_ + number * kBytes;
        });
      }
      to += kRowsApart * kPieceBytes;
    }
    advance(Tile::kDepth);
  }

 private:
  static constexpr int kBytes = bytes_of(Tile::kNumber);
  static constexpr int kCount = 16 / kBytes;
  static constexpr int kPieces = kPieceBytes / 16;
  static constexpr int kRowsApart = Tile::kThreads / kPieces;
  static constexpr int kPixelRows = Tile::kPixels / kRowsApart, kOutputRows = kTileOutputs / kRowsApart;
  static_assert(kRowsApart % 8 == 0 && Tile::kPixels % kRowsApart == 0);

  __device__ __forceinline__ static bool is_inside(unsigned taps, int y, int x) {
    return (taps >> y & taps >> (16 + x) & 1u) != 0;
  }

  __device__ __forceinline__ void advance(int numbers) {
    weight_offset_ += int64_t{numbers} * kBytes;
    channel_ += numbers;
    while (channel_ >= channels_ && y_ < kernel_) {
      channel_ -= channels_;
      if (++x_ == kernel_) {
        x_ = 0;
        ++y_;
      }
    }
    image_offset_ = y_ * row_bytes_ + x_ * pixel_bytes_ + channel_ * kBytes;
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

  const unsigned char* pixel_[kPixelRows];    // that the first tap reads, wherever it lies
  unsigned taps_[kPixelRows];                 // inside of the image: rows in the low half, columns in the high one
  const unsigned char* output_[kOutputRows];  // its weights, or nullptr
  int64_t row_bytes_, pixel_bytes_, image_offset_, weight_offset_;
  int kernel_, channels_;
  int y_, x_, channel_;  // of the next piece
};

// Adds the products of a piece: `left` and `right` are the warp's rows in shared memory.
template <typename Tile>
__device__ __forceinline__ void multiply(Sums<Tile::kWarpTiles>& sums, const unsigned char* left,
                                         const unsigned char* right) {
  const int lane = threadIdx.x % 32;
  if constexpr (Tile::kNumber == Number::kFloat32) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll 1
    for (int piece = 0; piece < kPieceBytes / 16; ++piece) {
      float4 pixels[Tile::kWarpTiles][2];
#pragma unroll
      for (int i = 0; i < Tile::kWarpTiles; ++i) {
#pragma unroll
        for (int v = 0; v < 2; ++v) {
          pixels[i][v] = *reinterpret_cast<const float4*>(left + swizzled(16 * i + 8 * v + g, piece));
        }
      }
#pragma unroll
      for (int column = 0; column < 2 * kOutputTiles; ++column) {
        const int j = column / 2, b = column % 2;
        const float4 weight = *reinterpret_cast<const float4*>(right + swizzled(8 * j + 2 * t + b, piece));
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
  } else {
    const int left_row = lane % 16, left_piece = lane / 16;
    const int right_row = lane % 8 + lane / 16 * 8, right_piece = lane / 8 % 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      unsigned rows[Tile::kWarpTiles][4];
#pragma unroll
      for (int i = 0; i < Tile::kWarpTiles; ++i) {
        load_matrices(rows[i], left + swizzled(left_row, 2 * half + left_piece) + i * (16 * kPieceBytes));
      }
#pragma unroll
      for (int j = 0; j < kOutputTiles; j += 2) {
        unsigned columns[4];
        load_matrices(columns, right + swizzled(right_row, 2 * half + right_piece) + j * (8 * kPieceBytes));
        const unsigned column[2] = {columns[0], columns[1]}, next[2] = {columns[2], columns[3]};
#pragma unroll
        for (int i = 0; i < Tile::kWarpTiles; ++i) {
          multiply_add<kProductOfNumber<Tile::kNumber>>(sums[i][j], rows[i], column);
          multiply_add<kProductOfNumber<Tile::kNumber>>(sums[i][j + 1], rows[i], next);
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
  const int warp = threadIdx.x / 32;
  const int left = warp / 2 * (Tile::kWarpPixels * kPieceBytes);
  const int right = (Tile::kPixels + warp % 2 * kWarpOutputs) * kPieceBytes;
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

  Loader<Tile> loader;
  loader.begin(first, made, tile, group, first_output, last_output, run);
  int writing = 0, reading = 0;
  for (int piece = 1 - Tile::kStages; piece < pieces; ++piece) {
    if (piece >= 0) {
      wait_for_copies<Tile::kStages - 2>();
      __syncthreads();
    }
    const int loading = piece + Tile::kStages - 1;
    if (loading < pieces) {
      if (kTwo && loading == first_pieces) {
        loader.begin(second, made, tile, group, first_output, last_output, run);
      }
      loader.load(stages + writing * Tile::kStageBytes);
    }
    commit_copies();
    writing = writing + 1 == Tile::kStages ? 0 : writing + 1;
    if (piece >= 0) {
      if (kTwo && piece == first_pieces) {
        take_out();
        for_each_sum<Tile::kWarpTiles>(sums, [](float& sum, int, int, int) { sum = -sum; });
      }
      const unsigned char* const stage = stages + reading * Tile::kStageBytes;
      if constexpr (kTakenOut) {
        multiply<Tile>(part, stage + left, stage + right);
        if (piece % 2 == 1) {
          take_out();
        }
      } else {
        multiply<Tile>(sums, stage + left, stage + right);
      }
      reading = reading + 1 == Tile::kStages ? 0 : reading + 1;
    }
  }
  take_out();
}

}  // namespace efficientad_fast::cuda
