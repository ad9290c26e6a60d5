// Every wrapper of cuda/ptx.h in one kernel, whose results tests compare: the emulator's with a GPU's.

#pragma once

#include "cuda/ptx.h"

#include <cstdint>

namespace efficientad_fast::cuda {

inline constexpr int kCheckThreads = 64;  // two warps
inline constexpr int kCheckSharedBytes = 4 * kCheckThreads * 16;

// Numbers of 32 bits that a thread writes.
struct CheckResult {
  unsigned copied[4], copied_later[4], halves[2], words[1];
  unsigned four[4], two[2];
  float sums[3][4];  // by Product
  unsigned e4m3;
  float larger;
  unsigned handed;
};

struct Check {
  const uint4* numbers;  // (8 * kCheckThreads,): what is copied and multiplied
  const float2* pairs;   // (kCheckThreads,): what is narrowed
  CheckResult* results;  // (kCheckThreads,)
};

template <Product kProduct>
__device__ __forceinline__ void check_product(float (&sums)[4], const uint4* numbers, int thread) {
  // Of the first half of the numbers: small ones in each format, as the test makes them.
  const uint4 left = numbers[static_cast<int>(kProduct) * kCheckThreads + thread];
  const uint4 right = numbers[static_cast<int>(kProduct) * kCheckThreads + (thread ^ 3)];
  const unsigned left_registers[4] = {left.x, left.y, left.z, left.w}, right_registers[2] = {right.y, right.w};
  for (int i = 0; i < 4; ++i) {
    sums[i] = static_cast<float>(thread + i);
  }
  multiply_add<kProduct>(sums, left_registers, right_registers);
  multiply_add<kProduct>(sums, left_registers, right_registers);
}

template <bool kHasE4m3>
__global__ void __launch_bounds__(kCheckThreads) check_wrappers(const Check p) {
  EFFICIENTAD_FAST_DYNAMIC_SHARED(uint4, shared);
  const int thread = threadIdx.x;
  const uint4* const numbers = p.numbers + 4 * kCheckThreads;
  CheckResult& result = p.results[thread];

  copy_async<16>(shared + thread, numbers + thread, thread % 5 != 0);
  commit_copies();
  copy_async<16>(shared + kCheckThreads + thread, numbers + kCheckThreads + thread, true);
  commit_copies();
  auto* const halves = reinterpret_cast<uint2*>(shared + 2 * kCheckThreads);
  auto* const words = reinterpret_cast<unsigned*>(shared + 3 * kCheckThreads);
  copy_async<8>(halves + thread, reinterpret_cast<const uint2*>(numbers + 2 * kCheckThreads) + thread, thread % 3 != 0);
  copy_async<4>(words + thread, reinterpret_cast<const unsigned*>(numbers + 3 * kCheckThreads) + thread, thread % 7 != 0);
  commit_copies();
  wait_for_copies<2>();
  __syncthreads();
  const uint4 copied = shared[thread ^ 1];
  wait_for_copies<0>();
  __syncthreads();
  const uint4 later = shared[kCheckThreads + (thread ^ 2)];
  const uint2 half = halves[thread ^ 4];
  result.copied[0] = copied.x, result.copied[1] = copied.y, result.copied[2] = copied.z, result.copied[3] = copied.w;
  result.copied_later[0] = later.x, result.copied_later[1] = later.y;
  result.copied_later[2] = later.z, result.copied_later[3] = later.w;
  result.halves[0] = half.x, result.halves[1] = half.y;
  result.words[0] = words[thread ^ 8];

  unsigned four[4], two[2];
  load_matrices(four, shared + kCheckThreads + (thread * 5 + 3) % kCheckThreads);
  load_matrices(two, shared + kCheckThreads + (thread * 7 + 1) % kCheckThreads);
  for (int i = 0; i < 4; ++i) {
    result.four[i] = four[i];
  }
  result.two[0] = two[0], result.two[1] = two[1];

  named_barrier_sync(1, kCheckThreads);  // the words have been read
  words[thread] = 3 * thread + 1;
  if (thread < 32) {
    named_barrier_arrive(15, kCheckThreads);
    result.handed = 0;
  } else {
    named_barrier_sync(15, kCheckThreads);
    result.handed = words[thread - 32];
  }

  result.larger = larger(p.pairs[thread].x, p.pairs[thread].y);
  float sums[3][4] = {};
  check_product<Product::kFloat16>(sums[0], p.numbers, thread);
  check_product<Product::kBFloat16>(sums[1], p.numbers, thread);
  result.e4m3 = 0;
  if constexpr (kHasE4m3) {
    check_product<Product::kE4m3>(sums[2], p.numbers, thread);
    result.e4m3 = to_e4m3(p.pairs[thread].x, p.pairs[thread].y);
  }
  for (int product = 0; product < 3; ++product) {
    for (int i = 0; i < 4; ++i) {
      result.sums[product][i] = sums[product][i];
    }
  }
}

inline void launch_check(const Check& call, bool has_e4m3, cudaStream_t stream) {
  launch(has_e4m3 ? check_wrappers<true> : check_wrappers<false>, dim3(1), dim3(kCheckThreads), kCheckSharedBytes, stream,
         call);
}

}  // namespace efficientad_fast::cuda
