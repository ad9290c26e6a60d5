// feature_distance on a GPU, in mixed precision: device code and launches, without framework types.
// efficientad_fast/ops/feature_distance.py is the contract.
//
// A block sums both convolutions of 128 outputs for a tile of pixels, one behind the other, in the same registers, and
// squares and adds them there. Each of the blocks that have a tile's outputs writes its sums; the last to be done adds
// all of them, in order, so that who comes when changes no bit.

#pragma once

#include "device.h"
#include "implicit_gemm.h"

#include <cstdint>

namespace efficientad_fast::cuda {

struct FeatureDistance {
  Convolution first, second;
  bool paired;  // whether there is a second
  Made made;
  int outputs;
  const float* scale;  // or nullptr, as bias
  const float* bias;
  float* out;              // `made.count`
  float* workspace;        // zeros, but for sums that a call left
  int64_t workspace_size;  // numbers
  Number number;
  int multiprocessors, shared_of_block;  // bytes that a block may have at most

  // Set by the launch.
  int* counts;  // of a tile's blocks, those that are done
};

template <typename Tile>
__host__ __device__ inline int parts_of(const FeatureDistance& p) {
  return (p.outputs + Tile::kOutputs - 1) / Tile::kOutputs;
}

template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kLeastBlocks) feature_distance(const FeatureDistance p) {
  // Once products are done, of each half of the outputs, and whether this is the last block of a tile. What a launch is
  // granted unasked would not have room for more.
  EFFICIENTAD_FAST_DYNAMIC_SHARED(float, squares);
  int& last = *reinterpret_cast<int*>(squares + Tile::kWarpColumns * Tile::kPixels);
  const int parts = parts_of<Tile>(p), part = blockIdx.x % parts, tile = blockIdx.x / parts;
  const int block_output = part * Tile::kOutputs;
  constexpr int kRunOfOutputs = 16;
  Sums<Tile::kWarpTiles> sums;
  sum_products<Tile, true>(sums, p.first, p.second, p.paired, p.made, tile, /*group=*/0, block_output, p.outputs,
                           kRunOfOutputs);

  // The difference is turned round where there are two, and so is the bias; its square is the same.
  const WarpPlace<Tile> warp;
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const int first_output = block_output + warp.column * kWarpOutputs + t * kRunOfOutputs;
  __syncthreads();
  float totals[Tile::kWarpTiles][2] = {};
#pragma unroll
  for (int i = 0; i < kRunOfOutputs; ++i) {
    const int output = first_output + i;
    if (warp.slice == 0 && output < p.outputs) {
      const float scale = p.scale == nullptr ? 1.0f : p.scale[output];
      float bias = p.bias == nullptr ? 0.0f : p.bias[output];
      bias = p.paired ? -bias : bias;
#pragma unroll
      for (int m = 0; m < Tile::kWarpTiles; ++m) {
#pragma unroll
        for (int v = 0; v < 2; ++v) {
          const float difference = __fmaf_rn(sums[m][i / 2][2 * v + i % 2], scale, bias);
          totals[m][v] = __fmaf_rn(difference, difference, totals[m][v]);
        }
      }
    }
  }
#pragma unroll
  for (int m = 0; m < Tile::kWarpTiles; ++m) {
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      float total = totals[m][v];
      total += __shfl_xor_sync(0xffffffffu, total, 1);
      total += __shfl_xor_sync(0xffffffffu, total, 2);
      if (warp.slice == 0 && t == 0) {
        squares[warp.column * Tile::kPixels + warp.row * Tile::kWarpPixels + 16 * m + 8 * v + g] = total;
      }
    }
  }
  __syncthreads();

  const int pixel = tile * Tile::kPixels + static_cast<int>(threadIdx.x);
  const bool taken = threadIdx.x < Tile::kPixels && pixel < p.made.count;
  const float count = static_cast<float>(p.outputs);
  float own = 0;
  if (taken) {
#pragma unroll
    for (int column = 0; column < Tile::kWarpColumns; ++column) {
      own += squares[column * Tile::kPixels + threadIdx.x];
    }
  }
  if (parts == 1) {
    if (taken) {
      p.out[pixel] = own / count;
    }
    return;
  }
  const int64_t part_of = p.made.count;
  if (taken) {
    __stcg(p.workspace + part * part_of + pixel, own);
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(p.counts + tile, 1) == parts - 1 ? 1 : 0;
    __threadfence();
  }
  __syncthreads();
  if (last == 0) {
    return;
  }
  if (taken) {
    float total = 0;
    for (int i = 0; i < parts; ++i) {
      total += __ldcg(p.workspace + i * part_of + pixel);
    }
    p.out[pixel] = total / count;
  }
  if (threadIdx.x == 0) {
    p.counts[tile] = 0;
  }
}

template <typename Tile>
inline int64_t feature_distance_tiles(const FeatureDistance& call) {
  return (int64_t{call.made.count} + Tile::kPixels - 1) / Tile::kPixels;
}

template <typename Tile>
inline void launch_feature_distance_tiles(FeatureDistance call, cudaStream_t stream) {
  const int64_t tiles = feature_distance_tiles<Tile>(call);
  // From the end, where no call that shares the workspace writes sums.
  call.counts = reinterpret_cast<int*>(call.workspace + call.workspace_size - tiles);
  launch(feature_distance<Tile>, dim3(static_cast<unsigned>(tiles * parts_of<Tile>(call))), dim3(Tile::kThreads),
         Tile::kSharedBytes, stream, call);
}

template <Number kNumber>
inline void launch_feature_distance_of(const FeatureDistance& call, cudaStream_t stream) {
  if (!call.first.is_wide(kNumber, call.made, call.outputs) ||
      (call.paired && !call.second.is_wide(kNumber, call.made, call.outputs))) {
    return launch_feature_distance_tiles<GatheringGemm<kNumber>>(call, stream);
  }
  if constexpr (kNumber != Number::kFloat32) {
    if (feature_distance_tiles<LargeGemm<kNumber>>(call) * parts_of<LargeGemm<kNumber>>(call) >=
        kLargeBlocks * int64_t{call.multiprocessors}) {
      return call.shared_of_block >= LargeGemm<kNumber>::kSharedBytes
                 ? launch_feature_distance_tiles<LargeGemm<kNumber>>(call, stream)
                 : launch_feature_distance_tiles<ShallowGemm<kNumber>>(call, stream);
    }
  }
  launch_feature_distance_tiles<SmallGemm<kNumber>>(call, stream);
}

// The most blocks that a launch may have.
inline int64_t feature_distance_most_blocks(const FeatureDistance& call) {
  using Tile = GatheringGemm<Number::kFloat16>;
  return feature_distance_tiles<Tile>(call) * parts_of<Tile>(call);
}

inline void launch_feature_distance(const FeatureDistance& call, cudaStream_t stream) {
  if (call.made.count == 0) {
    return;
  }
  switch (call.number) {
    case Number::kFloat16: return launch_feature_distance_of<Number::kFloat16>(call, stream);
    case Number::kBFloat16: return launch_feature_distance_of<Number::kBFloat16>(call, stream);
    case Number::kE4m3: return launch_feature_distance_of<Number::kE4m3>(call, stream);
    default: return launch_feature_distance_of<Number::kFloat32>(call, stream);
  }
}

}  // namespace efficientad_fast::cuda
