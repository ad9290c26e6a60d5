// Kernels that are wrong on purpose, `kernel<true>`, and the same kernels put right, `kernel<false>`.
// All are launched with `count` floats to read and as many, unwritten, to write.

#include "cuda/device.h"
#include "cuda/ptx.h"
#include "simt/bindings.h"

#include <cstdint>
#include <cstring>

namespace {

using efficientad_fast::cuda::Product;
using efficientad_fast::cuda::commit_copies;
using efficientad_fast::cuda::copy_async;
using efficientad_fast::cuda::launch;
using efficientad_fast::cuda::load_matrices;
using efficientad_fast::cuda::multiply_add;
using efficientad_fast::cuda::named_barrier_arrive;
using efficientad_fast::cuda::named_barrier_sync;
using efficientad_fast::cuda::wait_for_copies;
using efficientad_fast::simt::Buffer;

__device__ __forceinline__ int global_thread() { return static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); }

// Bounds

template <bool kWrong>
__global__ void read_past_end(const float* in, float* out, int count) {
  const int i = global_thread();
  const float next = kWrong || i + 1 < count ? in[i + 1] : 0.0f;
  if (i < count) {
    out[i] = next;
  }
}

template <bool kWrong>
__global__ void read_before_begin(const float* in, float* out, int) {
  const int i = global_thread();
  out[i] = in[kWrong || i > 0 ? i - 1 : 0];
}

template <bool kWrong>
__global__ void write_past_end(const float* in, float* out, int count) {
  const int i = global_thread();
  if (kWrong ? i <= count : i < count) {
    out[i] = in[0];
  }
}

// An index twice too large: not next to the buffer, and not in another one either.
template <bool kWrong>
__global__ void stride_too_large(const float* in, float* out, int) {
  const int i = global_thread();
  out[i] = in[kWrong ? 2 * i : i];
}

template <bool kWrong>
__global__ void byte_past_end(const float* in, float* out, int count) {
  const int t = static_cast<int>(threadIdx.x), bytes = count * 4;
  auto* const to = reinterpret_cast<unsigned char*>(out);
  to[t] = reinterpret_cast<const unsigned char*>(in)[kWrong ? bytes - t : bytes - 1 - t];
}

template <bool kWrong>
__global__ void write_read_only(const float* in, float* out, int) {
  const int i = global_thread();
  out[i] = in[i];
  if (kWrong) {
    const_cast<float*>(in)[i] = 0.0f;
  }
}

template <bool kWrong>
__global__ void null_pointer(const float* in, float* out, int) {
  const float* const from = kWrong ? nullptr : in;
  out[global_thread()] = from[3];
}

template <bool kWrong>
__global__ void wild_pointer(const float* in, float* out, int) {
  const auto address = reinterpret_cast<std::uintptr_t>(in) ^ (kWrong ? std::uintptr_t{1} << 45 : 0);
  out[global_thread()] = *reinterpret_cast<const float*>(address);
}

template <bool kWrong>
__global__ void misaligned_vector(const float* in, float* out, int) {
  const float4 four = *reinterpret_cast<const float4*>(in + (kWrong ? 1 : 4));
  out[global_thread()] = four.x;
}

template <bool kWrong>
__global__ void copy_past_end(const float* in, float* out, int count) {
  if (threadIdx.x == 0) {
    memcpy(out, in, (count + (kWrong ? 1 : 0)) * sizeof(float));
  }
}

template <bool kWrong>
__global__ void fill_past_end(const float*, float* out, int count) {
  if (threadIdx.x == 0) {
    memset(out, 0, (count + (kWrong ? 1 : 0)) * sizeof(float));
  }
}

struct Wide {
  float values[8];
};

template <bool kWrong>
__global__ void structure_past_end(const float* in, float* out, int count) {
  const int i = 8 * global_thread();
  if (kWrong ? i <= count : i < count) {
    *reinterpret_cast<Wide*>(out + i) = *reinterpret_cast<const Wide*>(in + (i < count ? i : 0));
  }
}

template <bool kWrong>
__global__ void shared_off_by_one(const float* in, float* out, int) {
  __shared__ float before[64];
  __shared__ float tile[64];
  const int t = static_cast<int>(threadIdx.x);
  before[t] = 0.0f;
  tile[t + (kWrong ? 1 : 0)] = in[t];
  __syncthreads();
  out[t] = tile[t] + before[t];
}

template <bool kWrong>
__global__ void shared_row_too_far(const float* in, float* out, int) {
  __shared__ float tile[8][8];
  __shared__ float after[64];
  const int t = static_cast<int>(threadIdx.x);
  after[t] = 0.0f;
  tile[t / 8][t % 8] = in[t];
  __syncthreads();
  out[t] = tile[t / 8 + (kWrong ? 1 : 0)][t % 8] + after[t];
}

template <bool kWrong>
__global__ void dynamic_shared_too_small(const float* in, float* out, int) {
  EFFICIENTAD_FAST_DYNAMIC_SHARED(float, tile);
  const int t = static_cast<int>(threadIdx.x);
  tile[kWrong ? t + 1 : t] = in[t];
  out[t] = tile[kWrong ? t + 1 : t];
}

template <bool kWrong>
__global__ void local_of_another_thread(const float* in, float* out, int) {
  __shared__ const float* pointers[64];
  const int t = static_cast<int>(threadIdx.x);
  float own = in[t];
  pointers[t] = &own;
  __syncthreads();
  out[t] = *pointers[kWrong ? t ^ 1 : t];
  __syncthreads();
}

__device__ __attribute__((noinline)) float descend(const float* in, int depth) {
  float room[1024];
  for (int i = 0; i < 1024; ++i) {
    room[i] = in[i % 64];
  }
  const float below = depth > 0 ? descend(room, depth - 1) : 0.0f;
  return room[depth % 64] + below;
}

template <bool kWrong>
__global__ void too_much_local_memory(const float* in, float* out, int) {
  out[global_thread()] = descend(in, kWrong ? 1000 : 3);
}

// Initialisation

template <bool kWrong>
__global__ void unwritten_shared(const float* in, float* out, int) {
  __shared__ float tile[64];
  const int t = static_cast<int>(threadIdx.x);
  if (!kWrong || t != 40) {
    tile[t] = in[t];
  }
  __syncthreads();
  out[t] = tile[63 - t];
}

// Each block writes its own half, but reads both: what the other block left there is not its own.
template <bool kWrong>
__global__ void shared_of_another_block(const float* in, float* out, int) {
  __shared__ float tile[64];
  const int t = static_cast<int>(threadIdx.x), block = static_cast<int>(blockIdx.x);
  tile[block * 32 + t] = in[t];
  __syncthreads();
  out[block * 32 + t] = tile[kWrong ? t : block * 32 + t];
}

template <bool kWrong>
__global__ void unwritten_output(const float* in, float* out, int) {
  const int i = global_thread();
  if (kWrong) {
    out[i] += in[i];
  } else {
    out[i] = in[i];
  }
}

template <bool kWrong>
__global__ void unwritten_counter(const float*, float* out, int) {
  if (!kWrong) {
    if (threadIdx.x == 0) {
      out[0] = 0.0f;
    }
    __syncthreads();
  }
  atomicAdd(out, 1.0f);
}

// Races

template <bool kWrong>
__global__ void missing_barrier(const float* in, float* out, int) {
  __shared__ float tile[64];
  const int t = static_cast<int>(threadIdx.x);
  tile[t] = in[t];
  if (!kWrong) {
    __syncthreads();
  }
  out[t] = tile[t > 0 ? t - 1 : 0];
}

// The barrier after the reads is as needed as that before them.
template <bool kWrong>
__global__ void missing_second_barrier(const float* in, float* out, int) {
  __shared__ float tile[64];
  const int t = static_cast<int>(threadIdx.x);
  float sum = 0.0f;
  for (int round = 0; round < 2; ++round) {
    tile[t] = in[t];
    __syncthreads();
    sum += tile[63 - t];
    if (!kWrong) {
      __syncthreads();
    }
  }
  out[t] = sum;
}

// Read by one lane, and then written by another of its warp.
template <bool kWrong>
__global__ void write_after_read_in_warp(const float* in, float* out, int) {
  __shared__ float tile[64];
  const int t = static_cast<int>(threadIdx.x);
  tile[t] = in[t];
  __syncthreads();
  if (t == 0) {
    out[0] = tile[1];
  }
  if (!kWrong) {
    __syncwarp();
  }
  if (t == 1) {
    tile[1] = 0.0f;
  }
}

// Read by many, and then written by one.
template <bool kWrong>
__global__ void write_after_read_in_block(const float* in, float* out, int) {
  __shared__ float first;
  const int t = static_cast<int>(threadIdx.x);
  if (t == 0) {
    first = in[0];
  }
  __syncthreads();
  out[t] = first;
  if (!kWrong) {
    __syncthreads();
  }
  if (t == 63) {
    first = 0.0f;
  }
}

template <bool kWrong>
__global__ void write_after_read_of_block(const float*, float* out, int) {
  if (blockIdx.x == 0) {
    out[2 + threadIdx.x] = out[0];
  } else if (threadIdx.x == 5) {
    out[kWrong ? 0 : 1] = 1.0f;
  }
}

template <bool kWrong>
__global__ void write_after_reads_of_blocks(const float*, float* out, int) {
  if (blockIdx.x < 3) {
    out[2 + blockIdx.x] = out[0];
  } else {
    out[kWrong ? 0 : 1] = 1.0f;
  }
}

template <bool kWrong>
__global__ void read_after_atomic(const float*, float* out, int) {
  auto* const counter = reinterpret_cast<unsigned*>(out);
  if (threadIdx.x < 32) {
    atomicAdd(counter, 1u);
  }
  if (!kWrong) {
    __syncthreads();
  }
  if (threadIdx.x == 32) {
    counter[1] = *counter;
  }
}

template <bool kWrong>
__global__ void missing_syncwarp(const float* in, float* out, int) {
  __shared__ float tile[64];
  const int t = static_cast<int>(threadIdx.x);
  tile[t] = in[t];
  if (!kWrong) {
    __syncwarp();
  }
  out[t] = tile[t % 32 > 0 ? t - 1 : t];
}

// __syncwarp orders the lanes of one warp, and no others.
template <bool kWrong>
__global__ void syncwarp_for_syncthreads(const float* in, float* out, int) {
  __shared__ float tile[64];
  const int t = static_cast<int>(threadIdx.x);
  tile[t] = in[t];
  if (kWrong) {
    __syncwarp();
  } else {
    __syncthreads();
  }
  out[t] = tile[t < 32 ? t : t - 32];
}

template <bool kWrong>
__global__ void half_a_syncwarp(const float* in, float* out, int) {
  __shared__ float tile[64];
  const int t = static_cast<int>(threadIdx.x), lane = t % 32;
  tile[t] = in[t];
  __syncwarp(lane < 16 ? 0x0000ffffu : 0xffff0000u);
  out[t] = tile[kWrong ? (lane < 16 ? t : t - 16) : t ^ 1];
}

template <bool kWrong>
__global__ void same_byte(const float* in, float* out, int) {
  const int t = static_cast<int>(threadIdx.x);
  reinterpret_cast<unsigned char*>(out)[kWrong ? t / 2 : t] = static_cast<unsigned char>(in[t]);
}

template <bool kWrong>
__global__ void byte_of_a_word(const float* in, float* out, int) {
  const int t = static_cast<int>(threadIdx.x);
  if (t == 0) {
    out[0] = in[0];
  }
  if (!kWrong) {
    __syncthreads();
  }
  if (t == 1) {
    reinterpret_cast<unsigned char*>(out)[4] = reinterpret_cast<unsigned char*>(out)[3];
  }
}

template <bool kWrong>
__global__ void race_in_global(const float* in, float* out, int) {
  const int t = static_cast<int>(threadIdx.x);
  out[t] = in[t];
  if (!kWrong) {
    __syncthreads();
  }
  const float left = out[t > 0 ? t - 1 : 0];
  __syncthreads();
  out[t] = left;
}

template <bool kWrong>
__global__ void race_of_blocks_writing(const float* in, float* out, int) {
  const int t = static_cast<int>(threadIdx.x), block = static_cast<int>(blockIdx.x);
  out[kWrong ? t : block * 32 + t] = in[t];
}

template <bool kWrong>
__global__ void race_of_blocks_reading(const float* in, float* out, int) {
  const int t = static_cast<int>(threadIdx.x), block = static_cast<int>(blockIdx.x);
  out[block * 32 + t] = in[t];
  __syncthreads();
  if (kWrong ? block == 1 : false) {
    out[block * 32 + t] = out[t];
  }
}

template <bool kWrong>
__global__ void plain_and_atomic(const float*, float* out, int) {
  auto* const counter = reinterpret_cast<unsigned*>(out);
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    counter[kWrong ? 1 : 0] = 0;
  }
  __syncthreads();
  if (kWrong || blockIdx.x == 0) {
    atomicAdd(counter + (kWrong ? 1 : 0), 1u);
  }
}

// The block that comes last adds up what all have written. out[0] is the sum, out[1] the ticket, the rest partial sums.
template <bool kWrong>
__global__ void missing_fence(const float* in, float* out, int) {
  __shared__ bool last;
  auto* const ticket = reinterpret_cast<unsigned*>(out + 1);
  if (threadIdx.x == 0) {
    out[2 + blockIdx.x] = in[blockIdx.x];
    if (!kWrong) {
      __threadfence();
    }
    last = atomicInc(ticket, gridDim.x - 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (last && threadIdx.x == 0) {
    float sum = 0.0f;
    for (unsigned i = 0; i < gridDim.x; ++i) {
      sum += out[2 + i];
    }
    out[0] = sum;
  }
}

// A fence is for what comes before it.
template <bool kWrong>
__global__ void fence_too_early(const float* in, float* out, int) {
  auto* const ticket = reinterpret_cast<unsigned*>(out + 1);
  if (kWrong) {
    __threadfence();
  }
  out[2 + blockIdx.x] = in[blockIdx.x];
  if (!kWrong) {
    __threadfence();
  }
  if (atomicAdd(ticket, 1u) == 1) {
    out[0] = out[2] + out[3];
  }
}

// A fence is for its own thread, and for others only once a barrier has been passed.
template <bool kWrong>
__global__ void fence_of_another_thread(const float* in, float* out, int) {
  auto* const ticket = reinterpret_cast<unsigned*>(out + 1);
  if (threadIdx.x == 1) {
    out[2 + blockIdx.x] = in[blockIdx.x];
  }
  if (!kWrong) {
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    __threadfence();
    if (atomicAdd(ticket, 1u) == 1) {
      out[0] = out[3 - blockIdx.x];
    }
  }
}

// Barriers and warps

template <bool kWrong>
__global__ void divergent_barrier(const float* in, float* out, int) {
  const int t = static_cast<int>(threadIdx.x);
  if (kWrong && t >= 40) {
    return;
  }
  __syncthreads();
  out[t] = in[t];
}

template <bool kWrong>
__global__ void different_barriers(const float* in, float* out, int) {
  const int t = static_cast<int>(threadIdx.x);
  if (kWrong && t >= 32) {
    __syncthreads();
  } else {
    __syncthreads_or(t);
  }
  out[t] = in[t];
}

template <bool kWrong>
__global__ void warp_waits_for_barrier(const float* in, float* out, int) {
  const int t = static_cast<int>(threadIdx.x);
  if (kWrong && t == 7) {
    __syncthreads();
  } else {
    __syncwarp();
  }
  out[t] = in[t];
}

template <bool kWrong>
__global__ void different_warp_operations(const float* in, float* out, int) {
  const int t = static_cast<int>(threadIdx.x);
  const float other =
      kWrong && t % 2 == 1 ? __shfl_down_sync(0xffffffffu, in[t], 1) : __shfl_xor_sync(0xffffffffu, in[t], 1);
  out[t] = other;
}

template <bool kWrong>
__global__ void shuffle_outside_mask(const float* in, float* out, int) {
  const int t = static_cast<int>(threadIdx.x), lane = t % 32;
  out[t] = in[t];
  if (lane < 16) {
    out[t] = __shfl_xor_sync(0x0000ffffu, in[t], kWrong ? 16 : 8);
  }
}

template <bool kWrong>
__global__ void shuffle_from_exited(const float* in, float* out, int) {
  const int t = static_cast<int>(threadIdx.x);
  out[t] = in[t];
  if (t == 5) {
    return;
  }
  out[t] = __shfl_sync(0xffffffffu, in[t], kWrong ? 5 : 6);
}

template <bool kWrong>
__global__ void shuffle_from_missing_lane(const float* in, float* out, int) {  // 40 threads: 8 lanes in the second warp
  const int t = static_cast<int>(threadIdx.x);
  out[t] = __shfl_xor_sync(0xffffffffu, in[t], kWrong ? 8 : 4);
}

template <bool kWrong>
__global__ void not_in_own_mask(const float* in, float* out, int) {
  const int t = static_cast<int>(threadIdx.x);
  out[t] = in[t];
  if (t < 17) {
    __syncwarp(kWrong ? 0x0000ffffu : 0x0001ffffu);
  }
}

template <bool kWrong>
__global__ void waits_for_ever(const float*, float* out, int) {
  auto* const flag = reinterpret_cast<int*>(out);
  if (threadIdx.x == 0) {
    atomicExch(flag, kWrong ? 0 : 1);
  }
  __syncthreads();
  if (threadIdx.x == 1) {
    while (atomicAdd(flag, 0) == 0) {
    }
  }
}

template <bool kWrong>
__global__ void trapped(const float* in, float* out, int) {
  const int i = global_thread();
  out[i] = in[i];
  if (kWrong && in[i] == 9.0f) {
    __trap();
  }
}

// Asynchronous copies

// Every thread copies its own four bytes.
template <bool kWrong>
__global__ void missing_wait(const float* in, float* out, int) {
  __shared__ float tile[64];
  const int t = static_cast<int>(threadIdx.x);
  copy_async<4>(tile + t, in + t, true);
  commit_copies();
  if (!kWrong) {
    wait_for_copies<0>();
  }
  __syncthreads();
  out[t] = tile[63 - t];
  wait_for_copies<0>();
}

template <bool kWrong>
__global__ void missing_commit(const float* in, float* out, int) {
  __shared__ float tile[64];
  const int t = static_cast<int>(threadIdx.x);
  copy_async<4>(tile + t, in + t, true);
  if (!kWrong) {
    commit_copies();
  }
  wait_for_copies<0>();
  out[t] = tile[t];
  commit_copies();
  wait_for_copies<0>();
}

// Who waits has its own bytes, and no others.
template <bool kWrong>
__global__ void missing_barrier_after_wait(const float* in, float* out, int) {
  __shared__ float tile[64];
  const int t = static_cast<int>(threadIdx.x);
  copy_async<4>(tile + t, in + t, true);
  commit_copies();
  if (kWrong) {
    __syncthreads();
  }
  wait_for_copies<0>();
  if (!kWrong) {
    __syncthreads();
  }
  out[t] = tile[t > 0 ? t - 1 : 0];
}

template <bool kWrong>
__global__ void too_few_groups_waited_for(const float* in, float* out, int) {
  __shared__ float tile[2][64];
  const int t = static_cast<int>(threadIdx.x);
  for (auto& stage : tile) {
    copy_async<4>(stage + t, in + t, true);
    commit_copies();
  }
  wait_for_copies<1>();
  __syncthreads();
  const float first = tile[0][63 - t];
  if (!kWrong) {
    wait_for_copies<0>();
    __syncthreads();
  }
  out[t] = first + tile[1][63 - t];
  wait_for_copies<0>();
}

template <bool kWrong>
__global__ void ends_before_its_copy(const float* in, float* out, int) {
  __shared__ float tile[64];
  const int t = static_cast<int>(threadIdx.x);
  copy_async<4>(tile + t, in + t, true);
  commit_copies();
  if (!kWrong) {
    wait_for_copies<0>();
  }
  out[t] = in[t];
}

// A stage is filled anew as soon as one's own value has been read from it.
template <bool kWrong>
__global__ void stage_overwritten_too_early(const float* in, float* out, int) {
  __shared__ float tile[64];
  const int t = static_cast<int>(threadIdx.x);
  float sum = 0.0f;
  for (int stage = 0; stage < 2; ++stage) {
    copy_async<4>(tile + t, in + t, true);
    commit_copies();
    wait_for_copies<0>();
    __syncthreads();
    sum += tile[63 - t];
    if (!kWrong) {
      __syncthreads();
    }
  }
  out[t] = sum;
}

template <bool kWrong>
__global__ void copy_over_what_others_read(const float* in, float* out, int) {
  __shared__ float tile[64];
  const int t = static_cast<int>(threadIdx.x);
  tile[t] = in[t];
  __syncthreads();
  out[t] = tile[t ^ 1];
  if (!kWrong) {
    __syncthreads();
  }
  if (t == 63) {
    copy_async<4>(tile, in, true);
    commit_copies();
  }
  __syncthreads();  // too late for what has begun
  wait_for_copies<0>();
}

template <bool kWrong>
__global__ void written_under_a_copy(const float* in, float* out, int) {
  __shared__ float tile[64];
  const int t = static_cast<int>(threadIdx.x);
  copy_async<4>(tile + t, in + t, true);
  commit_copies();
  if (!kWrong) {
    wait_for_copies<0>();
  }
  tile[t] = 0.0f;
  out[t] = tile[t];
}

template <bool kWrong>
__global__ void two_copies_to_one_place(const float* in, float* out, int) {
  __shared__ float tile[64];
  const int t = static_cast<int>(threadIdx.x);
  copy_async<4>(tile + (kWrong ? 0 : t), in, true);
  commit_copies();
  wait_for_copies<0>();
  out[t] = 0.0f;
}

template <bool kWrong>
__global__ void source_changes_on_the_way(const float* in, float* out, int) {
  __shared__ float tile[64];
  const int t = static_cast<int>(threadIdx.x);
  out[t] = in[t];
  copy_async<4>(tile + t, out + t, true);
  commit_copies();
  if (!kWrong) {
    wait_for_copies<0>();
  }
  out[t] = -1.0f;
  wait_for_copies<0>();
}

template <bool kWrong>
__global__ void unwritten_source(const float* in, float* out, int) {
  __shared__ float tile[64];
  const int t = static_cast<int>(threadIdx.x);
  if (!kWrong || t != 40) {
    out[t] = in[t];
  }
  copy_async<4>(tile + t, out + t, true);
  commit_copies();
  wait_for_copies<0>();
}

template <bool kWrong>
__global__ void source_past_end(const float* in, float* out, int count) {
  __shared__ __align__(16) float tile[128];
  const int t = static_cast<int>(threadIdx.x), from = 4 * t;
  copy_async<16>(tile + from, in + from, kWrong ? from <= count : from < count);
  commit_copies();
  wait_for_copies<0>();
  out[t] = tile[from];
}

template <bool kWrong>
__global__ void source_not_global(const float* in, float* out, int) {
  __shared__ float tile[64];
  __shared__ float other[64];
  const int t = static_cast<int>(threadIdx.x);
  other[t] = in[t];
  copy_async<4>(tile + t, (kWrong ? other : in) + t, true);
  commit_copies();
  wait_for_copies<0>();
  out[t] = tile[t];
}

template <bool kWrong>
__global__ void target_not_shared(const float* in, float* out, int) {
  __shared__ float tile[64];
  const int t = static_cast<int>(threadIdx.x);
  copy_async<4>((kWrong ? out : tile) + t, in + t, true);
  commit_copies();
  wait_for_copies<0>();
}

template <bool kWrong>
__global__ void target_of_registers(const float* in, float* out, int) {
  __shared__ float tile[64];
  const int t = static_cast<int>(threadIdx.x);
  float own[1] = {};
  copy_async<4>(kWrong ? own : tile + t, in + t, true);
  commit_copies();
  wait_for_copies<0>();
  out[t] = kWrong ? own[0] : tile[t];
}

template <bool kWrong>
__global__ void target_past_end(const float* in, float* out, int) {
  __shared__ __align__(16) float tile[64];
  const int t = static_cast<int>(threadIdx.x);
  if (t <= (kWrong ? 16 : 15)) {
    copy_async<16>(tile + 4 * t, in, true);
    commit_copies();
    wait_for_copies<0>();
    out[t] = tile[4 * t];
  }
}

template <bool kWrong>
__global__ void misaligned_target(const float* in, float* out, int) {
  __shared__ __align__(16) float tile[128];
  const int t = static_cast<int>(threadIdx.x);
  if (t < 32) {
    copy_async<16>(tile + (kWrong ? 2 : 4) * t, in, true);
    commit_copies();
    wait_for_copies<0>();
    out[t] = tile[4 * t];
  }
}

template <bool kWrong>
__global__ void misaligned_source(const float* in, float* out, int) {
  __shared__ __align__(16) float tile[64];
  const int t = static_cast<int>(threadIdx.x);
  if (t < 8) {
    copy_async<8>(tile + 2 * t, in + (kWrong ? t : 2 * t), true);
    commit_copies();
    wait_for_copies<0>();
    out[t] = tile[2 * t];
  }
}

// An address that is not read has to be aligned nonetheless.
template <bool kWrong>
__global__ void misaligned_source_not_taken(const float* in, float* out, int) {
  __shared__ __align__(16) float tile[256];
  const int t = static_cast<int>(threadIdx.x);
  copy_async<16>(tile + 4 * t, in + (kWrong ? 1 : 1000), false);
  commit_copies();
  wait_for_copies<0>();
  out[t] = tile[4 * t];
}

// Matrices of a warp

template <bool kWrong>
__global__ void misaligned_row(const float* in, float* out, int) {
  __shared__ __align__(16) float rows[64];
  const int t = static_cast<int>(threadIdx.x);
  rows[t] = in[t];
  __syncthreads();
  unsigned matrices[2];
  load_matrices(matrices, rows + (kWrong ? 3 : 4) * (t % 16));
  out[t] = static_cast<float>(matrices[0]);
}

template <bool kWrong>
__global__ void row_past_end(const float* in, float* out, int) {
  __shared__ __align__(16) float rows[64];
  const int t = static_cast<int>(threadIdx.x);
  rows[t] = in[t];
  __syncthreads();
  unsigned matrices[4];
  load_matrices(matrices, rows + 4 * (t % (kWrong ? 32 : 16)));
  out[t] = static_cast<float>(matrices[0]);
}

template <bool kWrong>
__global__ void row_not_shared(const float* in, float* out, int) {
  __shared__ __align__(16) float rows[64];
  const int t = static_cast<int>(threadIdx.x);
  rows[t] = in[t];
  __syncthreads();
  unsigned matrices[2];
  load_matrices(matrices, (kWrong ? in : rows) + 4 * (t % 16));
  out[t] = static_cast<float>(matrices[0]);
}

template <bool kWrong>
__global__ void unwritten_row(const float* in, float* out, int) {
  __shared__ __align__(16) float rows[64];
  const int t = static_cast<int>(threadIdx.x);
  if (!kWrong || t != 22) {
    rows[t] = in[t];
  }
  __syncthreads();
  unsigned matrices[2];
  load_matrices(matrices, rows + 4 * (t % 16));
  out[t] = static_cast<float>(matrices[0]);
}

// Rows that another warp has filled.
template <bool kWrong>
__global__ void rows_without_barrier(const float* in, float* out, int) {
  __shared__ __align__(16) float rows[64];
  const int t = static_cast<int>(threadIdx.x);
  rows[t] = in[t];
  if (kWrong) {
    __syncwarp();
  } else {
    __syncthreads();
  }
  if (t >= 32) {
    unsigned matrices[2];
    load_matrices(matrices, rows + 4 * (t % 16));
    out[t] = static_cast<float>(matrices[0]);
  }
}

// Rows that the lane itself has filled, but that others get.
template <bool kWrong>
__global__ void own_rows_without_syncwarp(const float* in, float* out, int) {
  __shared__ __align__(16) float rows[128];
  const int t = static_cast<int>(threadIdx.x);
  for (int i = 0; i < 4; ++i) {
    rows[4 * t + i] = in[t + i];
  }
  if (!kWrong) {
    __syncwarp();
  }
  unsigned matrices[4];
  load_matrices(matrices, rows + 4 * t);
  out[t] = static_cast<float>(matrices[0]);
}

template <bool kWrong>
__global__ void rows_overwritten_without_syncwarp(const float* in, float* out, int) {
  __shared__ __align__(16) float rows[128];
  const int t = static_cast<int>(threadIdx.x);
  for (int i = 0; i < 4; ++i) {
    rows[4 * t + i] = in[t + i];
  }
  __syncwarp();
  unsigned matrices[4];
  load_matrices(matrices, rows + 4 * t);
  if (!kWrong) {
    __syncwarp();
  }
  rows[4 * t] = 0.0f;
  out[t] = static_cast<float>(matrices[0]);
}

// Loading rows that are still under way.
template <bool kWrong>
__global__ void rows_under_way(const float* in, float* out, int) {
  __shared__ __align__(16) float rows[64];
  const int t = static_cast<int>(threadIdx.x);
  copy_async<4>(rows + t, in + t, true);
  commit_copies();
  if (!kWrong) {
    wait_for_copies<0>();
  }
  __syncthreads();
  unsigned matrices[2];
  load_matrices(matrices, rows + 4 * (t % 16));
  out[t] = static_cast<float>(matrices[0]);
  wait_for_copies<0>();
}

template <bool kWrong>
__global__ void lane_missing_in_load(const float* in, float* out, int) {
  __shared__ __align__(16) float rows[64];
  const int t = static_cast<int>(threadIdx.x);
  rows[t] = in[t];
  __syncthreads();
  unsigned matrices[2] = {};
  if (!kWrong || t != 37) {
    load_matrices(matrices, rows + 4 * (t % 16));
  }
  out[t] = static_cast<float>(matrices[0]);
}

template <bool kWrong>
__global__ void lane_elsewhere_in_load(const float* in, float* out, int) {
  __shared__ __align__(16) float rows[64];
  const int t = static_cast<int>(threadIdx.x);
  rows[t] = in[t];
  __syncthreads();
  unsigned matrices[2] = {};
  if (!kWrong || t != 37) {
    load_matrices(matrices, rows + 4 * (t % 16));
  }
  __syncwarp();
  out[t] = static_cast<float>(matrices[0]);
}

template <bool kWrong>
__global__ void lane_missing_in_multiply(const float* in, float* out, int) {
  const int t = static_cast<int>(threadIdx.x);
  out[t] = in[t];
  if (kWrong && t == 5) {
    return;
  }
  float sums[4] = {};
  const unsigned left[4] = {}, right[2] = {};
  multiply_add<Product::kFloat16>(sums, left, right);
  out[t] = sums[0];
}

template <bool kWrong>
__global__ void lanes_that_do_not_exist(const float* in, float* out, int) {  // a block of 40 threads
  const int t = static_cast<int>(threadIdx.x);
  out[t] = in[t];
  if (kWrong || t < 32) {
    float sums[4] = {};
    const unsigned left[4] = {}, right[2] = {};
    multiply_add<Product::kE4m3>(sums, left, right);
    out[t] = sums[0];
  }
}

template <bool kWrong>
__global__ void products_of_two_kinds(const float* in, float* out, int) {
  const int t = static_cast<int>(threadIdx.x);
  out[t] = in[t];
  float sums[4] = {};
  const unsigned left[4] = {}, right[2] = {};
  if (t < 16 && kWrong) {
    multiply_add<Product::kBFloat16>(sums, left, right);
  } else {
    multiply_add<Product::kFloat16>(sums, left, right);
  }
  out[t] = sums[0];
}

// Named barriers

template <bool kWrong>
__global__ void arrives_before_it_writes(const float* in, float* out, int) {
  const int t = static_cast<int>(threadIdx.x), warp = t / 32;
  __shared__ float tile[32];
  if (warp == 0) {
    if (kWrong) {
      named_barrier_arrive(1, 64);
    }
    tile[t] = in[t];
    if (!kWrong) {
      named_barrier_arrive(1, 64);
    }
  } else {
    named_barrier_sync(1, 64);
    out[t] = tile[t % 32];
  }
}

template <bool kWrong>
__global__ void reads_without_named_barrier(const float* in, float* out, int) {
  const int t = static_cast<int>(threadIdx.x), warp = t / 32;
  __shared__ float tile[32];
  if (warp == 0) {
    tile[t] = in[t];
    named_barrier_arrive(1, kWrong ? 64 : 96);
  } else {
    if (!kWrong || warp == 1) {
      named_barrier_sync(1, kWrong ? 64 : 96);
    }
    out[t - 32] = tile[t % 32];
  }
}

template <bool kWrong>
__global__ void syncs_with_other_warps(const float* in, float* out, int) {
  const int t = static_cast<int>(threadIdx.x), warp = t / 32;
  __shared__ float tile[32];
  if (warp == 0) {
    tile[t] = in[t];
  }
  if (!kWrong || warp > 0) {
    named_barrier_sync(1, kWrong ? 64 : 96);
  }
  if (warp > 0) {
    out[t - 32] = tile[t % 32];
  }
}

template <bool kWrong>
__global__ void arrives_and_learns_nothing(const float* in, float* out, int) {
  const int t = static_cast<int>(threadIdx.x), warp = t / 32;
  __shared__ float tile[32];
  if (warp == 0) {
    tile[t] = in[t];
    named_barrier_sync(1, 64);
  } else if (kWrong) {
    named_barrier_arrive(1, 64);
    out[t] = tile[t % 32];
  } else {
    named_barrier_sync(1, 64);
    out[t] = tile[t % 32];
  }
}

template <bool kWrong>
__global__ void overwrites_without_named_barrier(const float* in, float* out, int) {
  const int t = static_cast<int>(threadIdx.x), warp = t / 32;
  __shared__ float tile[32];
  for (int stage = 0; stage < 2; ++stage) {
    if (warp == 0) {
      tile[t] = in[t];
      named_barrier_arrive(1 + stage, 64);
    } else {
      named_barrier_sync(1 + stage, 64);
      out[t] = tile[t % 32];
    }
    if (!kWrong && warp == 0) {
      named_barrier_sync(3, 64);
    } else if (!kWrong) {
      named_barrier_arrive(3, 64);
    }
  }
}

template <bool kWrong>
__global__ void overwrites_before_all_have_read(const float* in, float* out, int) {
  const int t = static_cast<int>(threadIdx.x), warp = t / 32;
  __shared__ float tile[32];
  constexpr int kReaders = kWrong ? 1 : 2;
  if (warp == 0) {
    tile[t] = in[t];
    named_barrier_arrive(1, 96);
    named_barrier_sync(2, 32 + 32 * kReaders);
    tile[t] = 0.0f;
  } else {
    named_barrier_sync(1, 96);
    out[t - 32] = tile[t % 32];
    if (warp <= kReaders) {
      named_barrier_arrive(2, 32 + 32 * kReaders);
    }
  }
}

template <bool kWrong>
__global__ void lane_missing_at_named_barrier(const float* in, float* out, int) {
  const int t = static_cast<int>(threadIdx.x);
  out[t] = in[t];
  if (kWrong && t == 5) {
    return;
  }
  named_barrier_sync(1, 64);
}

template <bool kWrong>
__global__ void lane_elsewhere_at_named_barrier(const float* in, float* out, int) {
  const int t = static_cast<int>(threadIdx.x), warp = t / 32;
  out[t] = in[t];
  if (!kWrong || t != 5) {
    if (warp == 0) {
      named_barrier_arrive(1, 64);
    } else {
      named_barrier_sync(1, 64);
    }
  }
  __syncthreads();
}

template <bool kWrong>
__global__ void lanes_without_threads_at_named_barrier(const float* in, float* out, int) {
  const int t = static_cast<int>(threadIdx.x), warp = t / 32;
  out[t] = in[t];
  if (kWrong || warp == 0) {
    named_barrier_sync(1, 32);
  }
}

template <bool kWrong>
__global__ void lanes_at_two_named_barriers(const float* in, float* out, int) {
  const int t = static_cast<int>(threadIdx.x);
  out[t] = in[t];
  named_barrier_sync(kWrong && t % 32 >= 16 ? 2 : 1, 64);
}

template <bool kWrong>
__global__ void named_barrier_zero(const float* in, float* out, int) {
  const int t = static_cast<int>(threadIdx.x);
  out[t] = in[t];
  named_barrier_sync(kWrong ? 0 : 1, 64);
}

template <bool kWrong>
__global__ void named_barrier_sixteen(const float* in, float* out, int) {
  const int t = static_cast<int>(threadIdx.x);
  out[t] = in[t];
  named_barrier_sync(kWrong ? 16 : 15, 64);
}

template <bool kWrong>
__global__ void named_barrier_of_part_of_a_warp(const float* in, float* out, int) {
  const int t = static_cast<int>(threadIdx.x);
  out[t] = in[t];
  named_barrier_sync(1, kWrong ? 40 : 64);
}

template <bool kWrong>
__global__ void named_barrier_of_more_than_the_block(const float* in, float* out, int) {
  const int t = static_cast<int>(threadIdx.x);
  out[t] = in[t];
  named_barrier_sync(1, kWrong ? 96 : 64);
}

template <bool kWrong>
__global__ void named_barrier_of_two_sizes(const float* in, float* out, int) {
  const int t = static_cast<int>(threadIdx.x), warp = t / 32;
  out[t] = in[t];
  if (warp == 0) {
    named_barrier_arrive(1, 64);
  } else {
    named_barrier_sync(1, kWrong ? 32 : 64);
  }
}

template <bool kWrong>
__global__ void named_barrier_of_too_many(const float* in, float* out, int) {
  const int t = static_cast<int>(threadIdx.x), warp = t / 32;
  if (warp < 2) {
    out[t] = in[t];
    named_barrier_sync(1, kWrong ? 96 : 64);
  }
}

template <bool kWrong>
__global__ void arrives_and_nobody_else(const float* in, float* out, int) {
  const int t = static_cast<int>(threadIdx.x), warp = t / 32;
  out[t] = in[t];
  if (warp == 0) {
    named_barrier_arrive(1, 64);
  } else if (!kWrong) {
    named_barrier_sync(1, 64);
  }
}

template <bool kWrong>
__global__ void arrives_twice(const float* in, float* out, int) {
  const int t = static_cast<int>(threadIdx.x), warp = t / 32;
  out[t] = in[t];
  for (int stage = 0; stage < 2; ++stage) {
    if (warp == 0) {
      named_barrier_arrive(1, 64);
    } else {
      named_barrier_sync(1, 64);
    }
    if (!kWrong && stage == 0) {
      named_barrier_sync(2, 64);
    }
  }
}

template <bool kWrong>
__global__ void arrives_again_untold(const float* in, float* out, int) {
  const int t = static_cast<int>(threadIdx.x), warp = t / 32;
  out[t] = in[t];
  for (int stage = 0; stage < 2; ++stage) {
    if (warp == 0) {
      named_barrier_sync(1, 64);
    } else {
      named_barrier_arrive(1, 64);
    }
    if (!kWrong && stage == 0) {
      named_barrier_sync(2, 64);
    }
  }
}

}  // namespace

#define BOTH(name, grid, block, dynamic_bytes)                                                                       \
  m.def(#name, [](const Buffer& in, const Buffer& out, bool wrong) {                                                 \
    launch(wrong ? name<true> : name<false>, grid, block, dynamic_bytes, nullptr, in.as<float>(), out.as<float>(),   \
           static_cast<int>(in.bytes() / sizeof(float)));                                                            \
  })

EFFICIENTAD_FAST_SIMT_BINDINGS(m) {
  BOTH(read_past_end, 2, 32, 0);
  BOTH(read_before_begin, 2, 32, 0);
  BOTH(write_past_end, 3, 32, 0);
  BOTH(stride_too_large, 2, 32, 0);
  BOTH(byte_past_end, 1, 32, 0);
  BOTH(write_read_only, 2, 32, 0);
  BOTH(null_pointer, 2, 32, 0);
  BOTH(wild_pointer, 2, 32, 0);
  BOTH(misaligned_vector, 1, 32, 0);
  BOTH(copy_past_end, 1, 32, 0);
  BOTH(fill_past_end, 1, 32, 0);
  BOTH(structure_past_end, 1, 32, 0);
  BOTH(shared_off_by_one, 1, 64, 0);
  BOTH(shared_row_too_far, 1, 64, 0);
  BOTH(dynamic_shared_too_small, 1, 64, 64 * sizeof(float));
  BOTH(local_of_another_thread, 1, 64, 0);
  BOTH(too_much_local_memory, 1, 1, 0);
  BOTH(unwritten_shared, 1, 64, 0);
  BOTH(shared_of_another_block, 2, 32, 0);
  BOTH(unwritten_output, 2, 32, 0);
  BOTH(unwritten_counter, 1, 64, 0);
  BOTH(missing_barrier, 1, 64, 0);
  BOTH(missing_second_barrier, 1, 64, 0);
  BOTH(write_after_read_in_warp, 1, 64, 0);
  BOTH(write_after_read_in_block, 1, 64, 0);
  BOTH(write_after_read_of_block, 2, 32, 0);
  BOTH(write_after_reads_of_blocks, 4, 1, 0);
  BOTH(read_after_atomic, 1, 64, 0);
  BOTH(missing_syncwarp, 1, 64, 0);
  BOTH(syncwarp_for_syncthreads, 1, 64, 0);
  BOTH(half_a_syncwarp, 1, 64, 0);
  BOTH(same_byte, 1, 64, 0);
  BOTH(byte_of_a_word, 1, 64, 0);
  BOTH(race_in_global, 1, 64, 0);
  BOTH(race_of_blocks_writing, 2, 32, 0);
  BOTH(race_of_blocks_reading, 2, 32, 0);
  BOTH(plain_and_atomic, 2, 32, 0);
  BOTH(missing_fence, 8, 32, 0);
  BOTH(fence_too_early, 2, 1, 0);
  BOTH(fence_of_another_thread, 2, 64, 0);
  BOTH(divergent_barrier, 1, 64, 0);
  BOTH(different_barriers, 1, 64, 0);
  BOTH(warp_waits_for_barrier, 1, 64, 0);
  BOTH(different_warp_operations, 1, 64, 0);
  BOTH(shuffle_outside_mask, 1, 64, 0);
  BOTH(shuffle_from_exited, 1, 32, 0);
  BOTH(shuffle_from_missing_lane, 1, 40, 0);
  BOTH(not_in_own_mask, 1, 64, 0);
  BOTH(waits_for_ever, 1, 32, 0);
  BOTH(trapped, 2, 32, 0);
  BOTH(missing_wait, 1, 64, 0);
  BOTH(missing_commit, 1, 64, 0);
  BOTH(missing_barrier_after_wait, 1, 64, 0);
  BOTH(too_few_groups_waited_for, 1, 64, 0);
  BOTH(ends_before_its_copy, 1, 64, 0);
  BOTH(stage_overwritten_too_early, 1, 64, 0);
  BOTH(copy_over_what_others_read, 1, 64, 0);
  BOTH(written_under_a_copy, 1, 64, 0);
  BOTH(two_copies_to_one_place, 1, 64, 0);
  BOTH(source_changes_on_the_way, 1, 64, 0);
  BOTH(unwritten_source, 1, 64, 0);
  BOTH(source_past_end, 1, 32, 0);
  BOTH(source_not_global, 1, 64, 0);
  BOTH(target_not_shared, 1, 64, 0);
  BOTH(target_of_registers, 1, 64, 0);
  BOTH(target_past_end, 1, 64, 0);
  BOTH(misaligned_target, 1, 64, 0);
  BOTH(misaligned_source, 1, 64, 0);
  BOTH(misaligned_source_not_taken, 1, 64, 0);
  BOTH(misaligned_row, 1, 64, 0);
  BOTH(row_past_end, 1, 64, 0);
  BOTH(row_not_shared, 1, 64, 0);
  BOTH(unwritten_row, 1, 64, 0);
  BOTH(rows_without_barrier, 1, 64, 0);
  BOTH(own_rows_without_syncwarp, 1, 32, 0);
  BOTH(rows_overwritten_without_syncwarp, 1, 32, 0);
  BOTH(rows_under_way, 1, 64, 0);
  BOTH(lane_missing_in_load, 1, 64, 0);
  BOTH(lane_elsewhere_in_load, 1, 64, 0);
  BOTH(lane_missing_in_multiply, 1, 64, 0);
  BOTH(lanes_that_do_not_exist, 1, 40, 0);
  BOTH(products_of_two_kinds, 1, 64, 0);
  BOTH(arrives_before_it_writes, 1, 64, 0);
  BOTH(reads_without_named_barrier, 1, 96, 0);
  BOTH(syncs_with_other_warps, 1, 96, 0);
  BOTH(arrives_and_learns_nothing, 1, 64, 0);
  BOTH(overwrites_without_named_barrier, 1, 64, 0);
  BOTH(overwrites_before_all_have_read, 1, 96, 0);
  BOTH(lane_missing_at_named_barrier, 1, 64, 0);
  BOTH(lane_elsewhere_at_named_barrier, 1, 64, 0);
  BOTH(lanes_without_threads_at_named_barrier, 1, 40, 0);
  BOTH(lanes_at_two_named_barriers, 1, 64, 0);
  BOTH(named_barrier_zero, 1, 64, 0);
  BOTH(named_barrier_sixteen, 1, 64, 0);
  BOTH(named_barrier_of_part_of_a_warp, 1, 64, 0);
  BOTH(named_barrier_of_more_than_the_block, 1, 64, 0);
  BOTH(named_barrier_of_two_sizes, 1, 64, 0);
  BOTH(named_barrier_of_too_many, 1, 96, 0);
  BOTH(arrives_and_nobody_else, 1, 64, 0);
  BOTH(arrives_twice, 1, 64, 0);
  BOTH(arrives_again_untold, 1, 64, 0);
  m.def("launch_shape", [](const Buffer& in, const Buffer& out, unsigned grid, unsigned block, std::size_t bytes) {
    launch(unwritten_output<false>, grid, block, bytes, nullptr, in.as<float>(), out.as<float>(), 0);
  });
}
