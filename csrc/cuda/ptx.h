// Every PTX instruction that kernels use, in one place; what the emulator does in its place is in simt/ptx.h.
//
// Source of layouts: PTX ISA, "Warp-level matrix fragment layouts" of mma.m16n8k16 and mma.m16n8k32, and ldmatrix.

#pragma once

#include "device.h"

#include <cstdint>

namespace efficientad_fast::cuda {

// What a product is of. Registers hold two numbers of 16 bits, or four of 8, the first in the low bits.
enum class Product { kFloat16, kBFloat16, kE4m3 };

// Of the tiles that a warp multiplies: 16 by kDepth, times kDepth by 8.
template <Product kProduct>
inline constexpr int kProductDepth = kProduct == Product::kE4m3 ? 32 : 16;

}  // namespace efficientad_fast::cuda

#ifdef EFFICIENTAD_FAST_SIMT

#include "../simt/ptx.h"

#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800

// GPUs that have none of this: the library compiles for them, and the host refuses (tensors.h, require_products).
namespace efficientad_fast::cuda {

template <int kBytes, bool kKept = kBytes != 16>
__device__ __forceinline__ void copy_async(void*, const void*, bool) { __trap(); }

__device__ __forceinline__ void commit_copies() {}

template <int kPending>
__device__ __forceinline__ void wait_for_copies() {}

template <int kCount>
__device__ __forceinline__ void load_matrices(unsigned (&)[kCount], const void*) { __trap(); }

template <Product kProduct>
__device__ __forceinline__ void multiply_add(float (&)[4], const unsigned (&)[4], const unsigned (&)[2]) { __trap(); }

__device__ __forceinline__ unsigned short to_e4m3(float, float) {
  __trap();
  return 0;
}

__device__ __forceinline__ float larger(float, float) {
  __trap();
  return 0;
}

}  // namespace efficientad_fast::cuda

#else

namespace efficientad_fast::cuda {

__device__ __forceinline__ unsigned shared_address(const void* place) {
  return static_cast<unsigned>(__cvta_generic_to_shared(place));
}

// kBytes (4, 8 or 16) from global to shared memory, both so aligned; zeros, and nothing read, where not `taken`. They are
// there for this thread once it has waited for the group that they were committed to, for others after a barrier then.
// kKept: by the multiprocessor's own cache, for what it reads again soon; fewer bytes than 16 always are.
template <int kBytes, bool kKept = kBytes != 16>
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool taken) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async copies 4, 8 or 16 bytes");
  const int read = taken ? kBytes : 0;
  if constexpr (!kKept) {
    static_assert(kBytes == 16, "cp.async.cg copies 16 bytes");
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(read)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)), "l"(global),
                 "n"(kBytes), "r"(read)
                 : "memory");
  }
}

// All copies of this thread since the last call are a group.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until of this thread's groups at most the last kPending are under way.
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four matrices of 8 rows of 16 bytes. Lane i gives the address, a multiple of 16, of row i % 8 of matrix i / 8; of each
// matrix a lane gets the 4 bytes i % 4 of row i / 4.
__device__ __forceinline__ void load_matrices(unsigned (&matrices)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same of two matrices, whose rows lanes 0 to 15 give.
__device__ __forceinline__ void load_matrices(unsigned (&matrices)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(matrices[0]), "=r"(matrices[1])
               : "r"(shared_address(row))
               : "memory");
}

// sums += left * right, of a warp: 16 x 8 sums, 16 x depth by depth x 8. With g = lane / 4, t = lane % 4, in units of
// registers: left[0..3] hold rows g, g + 8, g, g + 8 of columns t, t, t + 4, t + 4; right[0..1] rows t, t + 4 of column g;
// sums[0..3] row g of columns 2 t, 2 t + 1, then row g + 8 of them.
template <Product kProduct>
__device__ __forceinline__ void multiply_add(float (&sums)[4], const unsigned (&left)[4], const unsigned (&right)[2]) {
  if constexpr (kProduct == Product::kFloat16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right[0]), "r"(right[1]));
  } else if constexpr (kProduct == Product::kBFloat16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right[0]), "r"(right[1]));
  } else {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 890
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right[0]), "r"(right[1]));
#else
    __trap();  // the host refuses float8 there
#endif
  }
}

// To e4m3, halves to even; what is beyond 448 becomes 448, NaN stays. `low` in the low byte.
__device__ __forceinline__ unsigned short to_e4m3(float low, float high) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 890
  unsigned short pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
  return pair;
#else
  __trap();
  return 0;
#endif
}

// NaN where one of them is, and zero without a sign where one is such and the other a zero too.
__device__ __forceinline__ float larger(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

}  // namespace efficientad_fast::cuda

#endif

#ifndef EFFICIENTAD_FAST_SIMT

namespace efficientad_fast::cuda {

// Barriers 1 to 15 of a block (0 is that of __syncthreads) are for some of its warps: `threads`, a multiple of 32, of
// whole warps, whose lanes come together. A barrier is over when so many have come, by either function, and is then as
// new; nobody may come to it again before he knows so.
//
// Waits for all others: what they did before they came, arrived ones too, comes before what this thread does next.
__device__ __forceinline__ void named_barrier_sync(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Comes and waits for nobody: what this thread did before is known to those who sync, and it learns nothing of them.
__device__ __forceinline__ void named_barrier_arrive(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

}  // namespace efficientad_fast::cuda

#endif
