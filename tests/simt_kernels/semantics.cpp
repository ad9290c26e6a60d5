// Kernels that are right, and show what the emulator makes of CUDA C++.

#include "cuda/device.h"
#include "cuda/ptx.h"
#include "simt/bindings.h"

#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <string>
#include <type_traits>

namespace {

using efficientad_fast::cuda::Product;
using efficientad_fast::cuda::launch;
using efficientad_fast::cuda::named_barrier_arrive;
using efficientad_fast::cuda::named_barrier_sync;
using efficientad_fast::simt::Buffer;

__global__ void scale(const float* in, float* out, int count, float factor) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < count) {
    out[i] = in[i] * factor;
  }
}

// Every thread writes where it is: thread and block, three numbers each.
__global__ void positions(int* out) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  int* const own = out + 6 * (block * (blockDim.x * blockDim.y * blockDim.z) + thread);
  const uint3 numbers[2] = {threadIdx, blockIdx};
  for (int i = 0; i < 2; ++i) {
    own[3 * i] = static_cast<int>(numbers[i].x);
    own[3 * i + 1] = static_cast<int>(numbers[i].y);
    own[3 * i + 2] = static_cast<int>(numbers[i].z);
  }
}

template <typename T>
__global__ void shuffles(const T* in, T* out, int mode, int argument, int width) {
  const unsigned all = 0xffffffffu;
  const T own = in[threadIdx.x];
  out[threadIdx.x] = mode == 0   ? __shfl_sync(all, own, argument, width)
                     : mode == 1 ? __shfl_up_sync(all, own, static_cast<unsigned>(argument), width)
                     : mode == 2 ? __shfl_down_sync(all, own, static_cast<unsigned>(argument), width)
                                 : __shfl_xor_sync(all, own, argument, width);
}

// Of every thread: ballot, any and all over its warp; or, and, count over the block.
__global__ void votes(const int* in, unsigned* out) {
  const int t = static_cast<int>(threadIdx.x), predicate = in[t];
  unsigned* const own = out + 6 * t;
  own[0] = __ballot_sync(0xffffffffu, predicate);
  own[1] = static_cast<unsigned>(__any_sync(0xffffffffu, predicate));
  own[2] = static_cast<unsigned>(__all_sync(0xffffffffu, predicate));
  own[3] = static_cast<unsigned>(__syncthreads_or(predicate));
  own[4] = static_cast<unsigned>(__syncthreads_and(predicate));
  own[5] = static_cast<unsigned>(__syncthreads_count(predicate));
}

// Lanes that have left are not waited for.
__global__ void lanes_that_stay(unsigned* out) {
  const unsigned lane = threadIdx.x;
  if (lane >= 20) {
    return;
  }
  out[2 * lane] = __ballot_sync(0xffffffffu, lane % 2 == 0);
  out[2 * lane + 1] = __activemask();
}

template <typename T>
__device__ T warp_sum(T value) {
  for (int offset = 16; offset > 0; offset /= 2) {
    value += __shfl_down_sync(0xffffffffu, value, static_cast<unsigned>(offset));
  }
  return value;
}

// The sum of every block, by warps and then by the first of them.
template <typename T>
__global__ void block_sums(const T* in, T* out, int count) {
  __shared__ T partial[32];
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  const T sum = warp_sum(i < count ? in[i] : T(0));
  if (lane == 0) {
    partial[warp] = sum;
  }
  __syncthreads();
  if (warp == 0) {
    const T total = warp_sum(lane < static_cast<int>(blockDim.x / 32) ? partial[lane] : T(0));
    if (lane == 0) {
      out[blockIdx.x] = total;
    }
  }
}

// A tree over dynamic shared memory with a barrier at every step: the largest of a block, NaN if there is one.
__global__ void block_maxima(const float* in, float* out) {
  EFFICIENTAD_FAST_DYNAMIC_SHARED(float, tile);
  const unsigned t = threadIdx.x;
  tile[t] = in[blockIdx.x * blockDim.x + t];
  __syncthreads();
  for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
    if (t < half) {
      const float a = tile[t], b = tile[t + half];
      tile[t] = a > b || a != a ? a : b;
    }
    __syncthreads();
  }
  if (t == 0) {
    out[blockIdx.x] = tile[0];
  }
}

// Ten results of as many threads' atomics: see test_atomics.
template <typename T>
__global__ void atomics(T* out) {
  const T i = static_cast<T>(blockIdx.x * blockDim.x + threadIdx.x);
  atomicAdd(out, i);
  atomicMax(out + 1, i);
  atomicMin(out + 2, i);
  atomicAnd(out + 3, ~(T(1) << (threadIdx.x % 31)));
  atomicOr(out + 4, T(1) << (threadIdx.x % 31));
  atomicXor(out + 5, T(1) << (threadIdx.x % 31));
  atomicCAS(out + 6, T(0), T(7));
  atomicCAS(out + 6, T(1), T(8));
  const T before = atomicExch(out + 7, T(5));
  if (before == T(0)) {
    atomicAdd(out + 8, T(1));
  }
  __shared__ T count;
  if (threadIdx.x == 0) {
    count = T(0);
  }
  __syncthreads();
  atomicAdd(&count, T(1));
  __syncthreads();
  if (threadIdx.x == 0) {
    atomicAdd(out + 9, count);
  }
}

__global__ void other_atomics(float* sum, double* wide_sum, unsigned* counters) {
  atomicAdd(sum, 0.25f);
  atomicAdd(wide_sum, 0.5);
  atomicInc(counters, 4u);
  atomicDec(counters + 1, 4u);
  atomicSub(counters + 2, 3u);
}

enum Pattern : int { kWriterFences = 0, kAllFence = 1, kLanesFence = 2 };

// The sum over all blocks by whichever comes last. workspace: a ticket, that the last block sets back, a value that all
// blocks read and the last one changes, and a partial sum of every thread.
__global__ void sum_of_all(const float* in, float* out, float* workspace, int pattern) {
  __shared__ bool last;
  auto* const ticket = reinterpret_cast<unsigned*>(workspace);
  float* const factor = workspace + 1;
  float* const partial = workspace + 2;
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x, count = gridDim.x * blockDim.x;
  partial[i] = in[i] * *factor;
  if (pattern == kAllFence) {
    __threadfence();
  }
  if (pattern == kLanesFence) {  // blocks of one warp
    __threadfence();
    __syncwarp();
  } else {
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    if (pattern == kWriterFences) {
      __threadfence();
    }
    last = atomicAdd(ticket, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (last) {
    float sum = 0.0f;
    for (unsigned k = threadIdx.x; k < count; k += blockDim.x) {
      sum += partial[k];
    }
    sum = warp_sum(sum);
    if (threadIdx.x == 0) {
      *out = sum;
      *ticket = 0;
      *factor += 1.0f;
    }
  }
}

// The same among the warps of a block, in shared memory and without a barrier after the first.
__global__ void sum_by_last_warp(const float* in, float* out) {
  __shared__ float partial[4];
  __shared__ unsigned ticket;
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (threadIdx.x == 0) {
    ticket = 0;
  }
  __syncthreads();
  const float sum = warp_sum(in[threadIdx.x]);
  unsigned turn = 0;
  if (lane == 0) {
    partial[warp] = sum;
    __threadfence_block();
    turn = atomicAdd(&ticket, 1u);
  }
  turn = __shfl_sync(0xffffffffu, turn, 0);
  if (turn == 3) {
    const float total = warp_sum(lane < 4 ? partial[lane] : 0.0f);
    if (lane == 0) {
      *out = total;
    }
  }
}

// The same shared bytes as words, halves and single bytes, by different threads in turn.
__global__ void parts_of_words(unsigned char* out) {
  __shared__ __align__(16) unsigned char bytes[16];
  const int t = static_cast<int>(threadIdx.x);
  if (t < 4) {
    reinterpret_cast<unsigned*>(bytes)[t] = 0x01010101u * static_cast<unsigned>(t);
  }
  __syncthreads();
  bytes[t] = static_cast<unsigned char>(bytes[t] + 16);
  __syncthreads();
  if (t < 8) {
    auto* const half = reinterpret_cast<unsigned short*>(bytes) + t;
    *half = static_cast<unsigned short>(*half + 1);
  }
  __syncthreads();
  if (t == 0) {
    uint4 all = *reinterpret_cast<uint4*>(bytes);
    all.w = all.x;
    *reinterpret_cast<uint4*>(bytes) = all;
  }
  __syncthreads();
  out[t] = bytes[t];
}

// Lanes of a warp hand a row on within shared memory, ordered by nothing but __syncwarp.
__global__ void rotate_in_warp(const float* in, float* out, int steps) {
  __shared__ float tile[64];
  const int t = static_cast<int>(threadIdx.x), next = t / 32 * 32 + (t + 1) % 32;
  tile[t] = in[t];
  for (int i = 0; i < steps; ++i) {
    __syncwarp();
    const float value = tile[next];
    __syncwarp();
    tile[t] = value;
  }
  out[t] = tile[t];
}

// A warp hands rows to three others through two stages; the last of them reads by the byte.
__global__ void handed_over(const float* in, float* out, int rows) {
  __shared__ float tile[2][32];
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  for (int row = 0; row < rows; ++row) {
    const int stage = row % 2, full = 1 + stage, empty = 3 + stage;
    if (warp == 0) {
      if (row >= 2) {
        named_barrier_sync(empty, 128);
      }
      tile[stage][lane] = in[row * 32 + lane];
      named_barrier_arrive(full, 128);
    } else {
      named_barrier_sync(full, 128);
      float value = tile[stage][lane ^ warp];
      if (warp == 3) {
        unsigned bits = 0;
        for (unsigned i = 0; i < 4; ++i) {
          bits |= static_cast<unsigned>(reinterpret_cast<const unsigned char*>(&tile[stage][lane ^ warp])[i]) << 8 * i;
        }
        value = __uint_as_float(bits);
      }
      out[(row * 3 + warp - 1) * 32 + lane] = value;
      if (row + 2 < rows) {
        named_barrier_arrive(empty, 128);
      }
    }
  }
}

// Two groups of two warps turn their rows, each with a barrier of its own and the second twice as far.
__global__ void rotate_in_groups(const float* in, float* out, int steps) {
  __shared__ float tile[128];
  const int t = static_cast<int>(threadIdx.x), group = t / 64, next = group * 64 + (t + 1) % 64;
  tile[t] = in[t];
  for (int i = 0; i < steps * (1 + group); ++i) {
    named_barrier_sync(1 + group, 64);
    const float value = tile[next];
    named_barrier_sync(1 + group, 64);
    tile[t] = value;
  }
  out[t] = tile[t];
}

// All read a row before anybody comes to a named barrier, and one warp writes the next over it after.
__global__ void overwritten_after_named_barrier(const float* in, float* out, int rows) {
  __shared__ float tile[32];
  const int t = static_cast<int>(threadIdx.x);
  for (int row = 0; row < rows; ++row) {
    if (t < 32) {
      tile[t] = in[row * 32 + t];
    }
    __syncthreads();
    const float value = tile[t % 32 ^ 1];
    if (t < 32) {
      named_barrier_sync(1, 96);
      tile[t] += 1.0f;
    } else {
      __syncwarp();
      named_barrier_arrive(1, 96);
    }
    __syncthreads();
    out[row * 96 + t] = value + tile[t % 32];
    __syncthreads();
  }
}

// The last block adds up what all blocks wrote; its threads wait for each other at a named barrier alone.
__global__ void sum_by_last_group(const float* in, float* out, float* parts, unsigned* counter) {
  __shared__ bool last;
  const unsigned t = threadIdx.x, i = blockIdx.x * 64 + t;
  parts[i] = in[i];
  __threadfence();
  named_barrier_sync(1, 64);
  if (t == 0) {
    last = atomicAdd(counter, 1u) == gridDim.x - 1;
  }
  named_barrier_sync(1, 64);
  if (last) {
    __threadfence();
    float sum = 0.0f;
    for (unsigned block = 0; block < gridDim.x; ++block) {
      sum += parts[block * 64 + (t ^ 33)];
    }
    out[t] = sum;
  }
}

// Every block reads what nobody has written, after as many other reads as it is told.
__global__ void fail_after(const float* reads, float* out) {
  float sum = 0.0f;
  for (int i = 0; i < static_cast<int>(reads[blockIdx.x]); ++i) {
    sum += reads[blockIdx.x];
  }
  out[blockIdx.x] += sum;
}

__global__ void to_halves(const float* in, __half* halves, __nv_bfloat16* bfloats, int count) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) {
    halves[i] = __float2half_rn(in[i]);
    bfloats[i] = __float2bfloat16_rn(in[i]);
  }
}

__global__ void from_halves(const __half* halves, const __nv_bfloat16* bfloats, float* out, float* out_bfloats) {
  for (unsigned i = threadIdx.x; i < 65536; i += blockDim.x) {
    out[i] = __half2float(halves[i]);
    out_bfloats[i] = __bfloat162float(bfloats[i]);
  }
}

__global__ void double_to_half(const double* in, __half* halves, int count) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) {
    halves[i] = __half(in[i]);
  }
}

__global__ void half_arithmetic(const __half2* a, const __half2* b, __half2* out, int count) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) {
    out[4 * i] = {a[i].x + b[i].x, a[i].y + b[i].y};
    out[4 * i + 1] = {a[i].x - b[i].x, a[i].y - b[i].y};
    out[4 * i + 2] = {a[i].x * b[i].x, a[i].y * b[i].y};
    out[4 * i + 3] = {a[i].x / b[i].x, a[i].y / b[i].y};
  }
}

template <typename Pair>
__global__ void pair_arithmetic(const Pair* a, const Pair* b, Pair* out, int count) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) {
    out[5 * i] = __hadd2(a[i], b[i]);
    out[5 * i + 1] = __hsub2(a[i], b[i]);
    out[5 * i + 2] = __hmul2(a[i], b[i]);
    out[5 * i + 3] = __hmax2(a[i], b[i]);
    out[5 * i + 4] = __hmin2(a[i], b[i]);
  }
}

__global__ void permuted_bytes(const unsigned* in, unsigned* out, unsigned selector) {
  out[threadIdx.x] = __byte_perm(in[2 * threadIdx.x], in[2 * threadIdx.x + 1], selector);
}

__global__ void to_integers(const float* in, int* out, int count) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) {
    int* const own = out + 5 * i;
    own[0] = __float2int_rn(in[i]);
    own[1] = __float2int_rz(in[i]);
    own[2] = __float2int_rd(in[i]);
    own[3] = __float2int_ru(in[i]);
    own[4] = static_cast<int>(__float2uint_rn(in[i]));
  }
}

__global__ void bit_counts(const unsigned* in, int* out, int count) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) {
    int* const own = out + 6 * i;
    own[0] = __popc(in[i]);
    own[1] = __ffs(static_cast<int>(in[i]));
    own[2] = __clz(static_cast<int>(in[i]));
    own[3] = static_cast<int>(__brev(in[i]));
    own[4] = static_cast<int>(__umulhi(in[i], in[i]));
    own[5] = __float_as_int(__uint_as_float(in[i] & 0x7f7fffffu));
  }
}

// min and max of a number and NaN are the number.
__global__ void extremes(const float* a, const float* b, float* out) {
  out[2 * threadIdx.x] = min(a[threadIdx.x], b[threadIdx.x]);
  out[2 * threadIdx.x + 1] = max(a[threadIdx.x], b[threadIdx.x]);
}

// By copies of kBytes and through shared memory; zeros where `taken` says no. The first half is a group of its own, and
// is used while the second is under way.
template <int kBytes>
__global__ void copies(const char* in, const unsigned char* taken, char* out) {
  EFFICIENTAD_FAST_DYNAMIC_SHARED(char, room);
  const int count = static_cast<int>(blockDim.x), t = static_cast<int>(threadIdx.x), next = (t + 1) % count;
  for (int half = 0; half < 2; ++half) {
    const int i = half * count + t;
    efficientad_fast::cuda::copy_async<kBytes>(room + i * kBytes, in + i * kBytes, taken[i] != 0);
    efficientad_fast::cuda::commit_copies();
  }
  efficientad_fast::cuda::wait_for_copies<1>();
  __syncthreads();
  for (int i = 0; i < kBytes; ++i) {
    out[next * kBytes + i] = room[next * kBytes + i];
  }
  efficientad_fast::cuda::wait_for_copies<0>();
  __syncthreads();
  for (int i = 0; i < kBytes; ++i) {
    out[(count + next) * kBytes + i] = room[(count + next) * kBytes + i];
  }
}

// A group may be empty, and counts nonetheless; what is not committed is not waited for, but keeps nobody waiting.
__global__ void empty_groups(const float* in, float* out) {
  __shared__ float tile[2][32];
  const int t = static_cast<int>(threadIdx.x);
  efficientad_fast::cuda::wait_for_copies<0>();
  efficientad_fast::cuda::copy_async<4>(&tile[0][t], in + t, true);
  efficientad_fast::cuda::commit_copies();
  efficientad_fast::cuda::wait_for_copies<3>();
  efficientad_fast::cuda::commit_copies();
  efficientad_fast::cuda::copy_async<4>(&tile[1][t], in + 32 + t, true);
  efficientad_fast::cuda::wait_for_copies<1>();
  out[t] = tile[0][t];
  efficientad_fast::cuda::wait_for_copies<0>();
  efficientad_fast::cuda::commit_copies();
  efficientad_fast::cuda::wait_for_copies<0>();
  out[32 + t] = tile[1][t];
}

// Rows of 16 bytes in shared memory, `stride` bytes apart, and every register of every lane.
template <int kMatrices>
__global__ void loaded_matrices(const uint4* in, unsigned* out, int stride) {
  EFFICIENTAD_FAST_DYNAMIC_SHARED(char, room);
  const unsigned lane = threadIdx.x;
  *reinterpret_cast<uint4*>(room + lane * stride) = in[lane];
  __syncwarp();
  unsigned matrices[kMatrices];
  efficientad_fast::cuda::load_matrices(matrices, kMatrices == 4 || lane < 16 ? room + lane * stride : nullptr);
  for (int i = 0; i < kMatrices; ++i) {
    out[lane * kMatrices + i] = matrices[i];
  }
}

// One product of fragments that come register by register, lane by lane.
template <Product kProduct>
__global__ void multiplied_fragments(const unsigned* left, const unsigned* right, const float* sums, float* out) {
  const unsigned lane = threadIdx.x;
  unsigned a[4], b[2];
  float c[4];
  for (int i = 0; i < 4; ++i) {
    a[i] = left[lane * 4 + i];
    c[i] = sums[lane * 4 + i];
  }
  for (int i = 0; i < 2; ++i) {
    b[i] = right[lane * 2 + i];
  }
  efficientad_fast::cuda::multiply_add<kProduct>(c, a, b);
  for (int i = 0; i < 4; ++i) {
    out[lane * 4 + i] = c[i];
  }
}

// 64 x 64 numbers of the product of `left` (rows of `depth` bytes) and `right` (columns of `depth` bytes), by 4 warps.
// Two stages of 64 bytes of depth: one is multiplied while the other is copied.
template <Product kProduct>
__global__ void matrix_product(const char* left, const char* right, float* out, int depth) {
  constexpr int kSide = 64, kStage = 64, kRow = kStage + 16, kWarps = 4;
  __shared__ __align__(16) char tiles[2][2][kSide * kRow];
  const int t = static_cast<int>(threadIdx.x), warp = t / 32, lane = t % 32, stages = (depth + kStage - 1) / kStage;
  const auto fetch = [&](int stage) {
    for (int i = t; i < kSide * kStage / 16; i += 32 * kWarps) {
      const int row = i / (kStage / 16), column = i % (kStage / 16) * 16, from = stage * kStage + column;
      for (int side = 0; side < 2; ++side) {
        const char* const source = (side == 0 ? left : right) + static_cast<std::int64_t>(row) * depth + from;
        efficientad_fast::cuda::copy_async<16>(&tiles[stage % 2][side][row * kRow + column], source, from < depth);
      }
    }
    efficientad_fast::cuda::commit_copies();
  };
  float sums[kSide / 8][4] = {};
  fetch(0);
  for (int stage = 0; stage < stages; ++stage) {
    if (stage + 1 < stages) {
      fetch(stage + 1);
      efficientad_fast::cuda::wait_for_copies<1>();
    } else {
      efficientad_fast::cuda::wait_for_copies<0>();
    }
    __syncthreads();
    for (int k = 0; k < kStage; k += 32) {
      unsigned a[4];
      efficientad_fast::cuda::load_matrices(
          a, &tiles[stage % 2][0][(warp * 16 + lane % 16) * kRow + k + lane / 16 * 16]);
      for (int n = 0; n < kSide / 8; ++n) {
        unsigned b[2];
        efficientad_fast::cuda::load_matrices(
            b, &tiles[stage % 2][1][(n * 8 + lane % 8) * kRow + k + lane / 8 % 2 * 16]);
        efficientad_fast::cuda::multiply_add<kProduct>(sums[n], a, b);
      }
    }
    __syncthreads();
  }
  for (int n = 0; n < kSide / 8; ++n) {
    for (int i = 0; i < 4; ++i) {
      out[(warp * 16 + lane / 4 + i / 2 * 8) * kSide + n * 8 + lane % 4 * 2 + i % 2] = sums[n][i];
    }
  }
}

__global__ void to_e4m3(const float2* in, unsigned short* out, int count) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) {
    out[i] = efficientad_fast::cuda::to_e4m3(in[i].x, in[i].y);
  }
}

__global__ void larger(const float2* in, float* out, int count) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) {
    out[i] = efficientad_fast::cuda::larger(in[i].x, in[i].y);
  }
}

template <typename Kernels>
void launch_product(const std::string& product, const Kernels& run) {
  if (product == "float16") {
    run(std::integral_constant<Product, Product::kFloat16>{});
  } else if (product == "bfloat16") {
    run(std::integral_constant<Product, Product::kBFloat16>{});
  } else {
    run(std::integral_constant<Product, Product::kE4m3>{});
  }
}

__constant__ float kWeights[4] = {0.5f, 1.0f, 2.0f, 4.0f};

__global__ void weighted(const float* in, float* out) {
  out[threadIdx.x] = kWeights[threadIdx.x % 4] * __ldg(in + threadIdx.x);
}

}  // namespace

EFFICIENTAD_FAST_SIMT_BINDINGS(m) {
  m.def("scale", [](const Buffer& in, const Buffer& out, int count, float factor, int threads) {
    launch(scale, (count + threads - 1) / threads, threads, 0, nullptr, in.as<float>(), out.as<float>(), count, factor);
  });
  m.def("positions", [](const Buffer& out, std::array<unsigned, 3> grid, std::array<unsigned, 3> block) {
    launch(positions, dim3(grid[0], grid[1], grid[2]), dim3(block[0], block[1], block[2]), 0, nullptr, out.as<int>());
  });
  m.def("shuffles", [](const Buffer& in, const Buffer& out, int mode, int argument, int width) {
    if (in.bytes() == 64 * sizeof(float)) {
      launch(shuffles<float>, 1, 64, 0, nullptr, in.as<float>(), out.as<float>(), mode, argument, width);
    } else {
      launch(shuffles<double>, 1, 64, 0, nullptr, in.as<double>(), out.as<double>(), mode, argument, width);
    }
  });
  m.def("votes", [](const Buffer& in, const Buffer& out) {
    launch(votes, 1, static_cast<unsigned>(in.bytes() / sizeof(int)), 0, nullptr, in.as<int>(), out.as<unsigned>());
  });
  m.def("lanes_that_stay", [](const Buffer& out) { launch(lanes_that_stay, 1, 32, 0, nullptr, out.as<unsigned>()); });
  m.def("block_sums", [](const Buffer& in, const Buffer& out, int count, unsigned threads, bool whole) {
    const auto blocks = (static_cast<unsigned>(count) + threads - 1) / threads;
    if (whole) {
      launch(block_sums<int>, blocks, threads, 0, nullptr, in.as<int>(), out.as<int>(), count);
    } else {
      launch(block_sums<float>, blocks, threads, 0, nullptr, in.as<float>(), out.as<float>(), count);
    }
  });
  m.def("block_maxima", [](const Buffer& in, const Buffer& out, unsigned blocks, unsigned threads) {
    launch(block_maxima, blocks, threads, threads * sizeof(float), nullptr, in.as<float>(), out.as<float>());
  });
  m.def("atomics", [](const Buffer& out, const std::string& type, unsigned blocks, unsigned threads) {
    if (type == "int32") {
      launch(atomics<int>, blocks, threads, 0, nullptr, out.as<int>());
    } else if (type == "uint32") {
      launch(atomics<unsigned>, blocks, threads, 0, nullptr, out.as<unsigned>());
    } else {
      launch(atomics<unsigned long long>, blocks, threads, 0, nullptr, out.as<unsigned long long>());
    }
  });
  m.def("other_atomics", [](const Buffer& sum, const Buffer& wide_sum, const Buffer& counters, unsigned blocks) {
    launch(other_atomics, blocks, 32, 0, nullptr, sum.as<float>(), wide_sum.as<double>(), counters.as<unsigned>());
  });
  m.def("sum_of_all", [](const Buffer& in, const Buffer& out, const Buffer& workspace, int pattern, unsigned blocks) {
    launch(sum_of_all, blocks, 32, 0, nullptr, in.as<float>(), out.as<float>(), workspace.as<float>(), pattern);
  });
  m.def("sum_by_last_warp", [](const Buffer& in, const Buffer& out) {
    launch(sum_by_last_warp, 1, 128, 0, nullptr, in.as<float>(), out.as<float>());
  });
  m.def("parts_of_words", [](const Buffer& out) {
    launch(parts_of_words, 1, 16, 0, nullptr, out.as<unsigned char>());
  });
  m.def("rotate_in_warp", [](const Buffer& in, const Buffer& out, int steps) {
    launch(rotate_in_warp, 1, 64, 0, nullptr, in.as<float>(), out.as<float>(), steps);
  });
  m.def("handed_over", [](const Buffer& in, const Buffer& out, int rows) {
    launch(handed_over, 1, 128, 0, nullptr, in.as<float>(), out.as<float>(), rows);
  });
  m.def("rotate_in_groups", [](const Buffer& in, const Buffer& out, int steps) {
    launch(rotate_in_groups, 1, 128, 0, nullptr, in.as<float>(), out.as<float>(), steps);
  });
  m.def("overwritten_after_named_barrier", [](const Buffer& in, const Buffer& out, int rows) {
    launch(overwritten_after_named_barrier, 1, 96, 0, nullptr, in.as<float>(), out.as<float>(), rows);
  });
  m.def("sum_by_last_group", [](const Buffer& in, const Buffer& out, const Buffer& parts, const Buffer& counter) {
    launch(sum_by_last_group, static_cast<unsigned>(in.bytes() / 256), 64, 0, nullptr, in.as<float>(), out.as<float>(),
           parts.as<float>(), counter.as<unsigned>());
  });
  m.def("fail_after", [](const Buffer& reads, const Buffer& out) {
    launch(fail_after, static_cast<unsigned>(reads.bytes() / sizeof(float)), 1, 0, nullptr, reads.as<float>(),
           out.as<float>());
  });
  m.def("copies", [](const Buffer& in, const Buffer& taken, const Buffer& out, int bytes) {
    const auto count = static_cast<unsigned>(taken.bytes());
    launch(bytes == 4   ? copies<4>
           : bytes == 8 ? copies<8>
                        : copies<16>,
           1, count / 2, out.bytes(), nullptr, in.as<char>(), taken.as<unsigned char>(), out.as<char>());
  });
  m.def("empty_groups", [](const Buffer& in, const Buffer& out) {
    launch(empty_groups, 1, 32, 0, nullptr, in.as<float>(), out.as<float>());
  });
  m.def("loaded_matrices", [](const Buffer& in, const Buffer& out, int matrices, int stride) {
    launch(matrices == 4 ? loaded_matrices<4> : loaded_matrices<2>, 1, 32, static_cast<std::size_t>(32 * stride),
           nullptr, in.as<uint4>(), out.as<unsigned>(), stride);
  });
  m.def("multiplied_fragments", [](const std::string& product, const Buffer& left, const Buffer& right,
                                   const Buffer& sums, const Buffer& out) {
    launch_product(product, [&](auto kind) {
      launch(multiplied_fragments<decltype(kind)::value>, 1, 32, 0, nullptr, left.as<unsigned>(), right.as<unsigned>(),
             sums.as<float>(), out.as<float>());
    });
  });
  m.def("matrix_product", [](const std::string& product, const Buffer& left, const Buffer& right, const Buffer& out,
                             int depth) {
    launch_product(product, [&](auto kind) {
      launch(matrix_product<decltype(kind)::value>, 1, 128, 0, nullptr, left.as<char>(), right.as<char>(),
             out.as<float>(), depth);
    });
  });
  m.def("to_e4m3", [](const Buffer& in, const Buffer& out) {
    launch(to_e4m3, 1, 128, 0, nullptr, in.as<float2>(), out.as<unsigned short>(),
           static_cast<int>(out.bytes() / sizeof(unsigned short)));
  });
  m.def("larger", [](const Buffer& in, const Buffer& out) {
    launch(larger, 1, 128, 0, nullptr, in.as<float2>(), out.as<float>(),
           static_cast<int>(out.bytes() / sizeof(float)));
  });
  m.def("to_halves", [](const Buffer& in, const Buffer& halves, const Buffer& bfloats) {
    launch(to_halves, 1, 128, 0, nullptr, in.as<float>(), halves.as<__half>(), bfloats.as<__nv_bfloat16>(),
           static_cast<int>(in.bytes() / sizeof(float)));
  });
  m.def("from_halves", [](const Buffer& halves, const Buffer& bfloats, const Buffer& out, const Buffer& out_bfloats) {
    launch(from_halves, 1, 128, 0, nullptr, halves.as<__half>(), bfloats.as<__nv_bfloat16>(), out.as<float>(),
           out_bfloats.as<float>());
  });
  m.def("double_to_half", [](const Buffer& in, const Buffer& halves) {
    launch(double_to_half, 1, 128, 0, nullptr, in.as<double>(), halves.as<__half>(),
           static_cast<int>(in.bytes() / sizeof(double)));
  });
  m.def("half_arithmetic", [](const Buffer& a, const Buffer& b, const Buffer& out) {
    launch(half_arithmetic, 1, 128, 0, nullptr, a.as<__half2>(), b.as<__half2>(), out.as<__half2>(),
           static_cast<int>(a.bytes() / sizeof(__half2)));
  });
  m.def("pair_arithmetic", [](const Buffer& a, const Buffer& b, const Buffer& out, bool bfloat16) {
    const int count = static_cast<int>(a.bytes() / 4);
    if (bfloat16) {
      launch(pair_arithmetic<__nv_bfloat162>, 1, 64, 0, nullptr, a.as<__nv_bfloat162>(), b.as<__nv_bfloat162>(),
             out.as<__nv_bfloat162>(), count);
    } else {
      launch(pair_arithmetic<__half2>, 1, 64, 0, nullptr, a.as<__half2>(), b.as<__half2>(), out.as<__half2>(), count);
    }
  });
  m.def("permuted_bytes", [](const Buffer& in, const Buffer& out, unsigned selector) {
    launch(permuted_bytes, 1, static_cast<unsigned>(out.bytes() / 4), 0, nullptr, in.as<unsigned>(),
           out.as<unsigned>(), selector);
  });
  m.def("to_integers", [](const Buffer& in, const Buffer& out) {
    launch(to_integers, 1, 32, 0, nullptr, in.as<float>(), out.as<int>(),
           static_cast<int>(in.bytes() / sizeof(float)));
  });
  m.def("bit_counts", [](const Buffer& in, const Buffer& out) {
    launch(bit_counts, 1, 32, 0, nullptr, in.as<unsigned>(), out.as<int>(),
           static_cast<int>(in.bytes() / sizeof(int)));
  });
  m.def("extremes", [](const Buffer& a, const Buffer& b, const Buffer& out) {
    launch(extremes, 1, static_cast<unsigned>(a.bytes() / sizeof(float)), 0, nullptr, a.as<float>(), b.as<float>(),
           out.as<float>());
  });
  m.def("weighted", [](const Buffer& in, const Buffer& out) {
    launch(weighted, 1, 32, 0, nullptr, in.as<float>(), out.as<float>());
  });
}
