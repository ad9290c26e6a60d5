// The instructions of cuda/ptx.h, for a host compiler. Reached through that header.

#pragma once

#include "device.h"

#include <cstdint>

namespace efficientad_fast::cuda {

template <int kBytes, bool kKept = kBytes != 16>
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool taken) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async copies 4, 8 or 16 bytes");
  simt::copy_async(shared, global, kBytes, taken);
}

__device__ __forceinline__ void commit_copies() { simt::commit_copies(); }

template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  static_assert(kPending >= 0, "so many groups may be under way");
  simt::wait_for_copies(kPending);
}

__device__ __forceinline__ void load_matrices(unsigned (&matrices)[4], const void* row) {
  const simt::Matrices got = simt::load_matrices(simt::WarpOperation::kLoadFour, row);
  matrices[0] = got.registers[0];
  matrices[1] = got.registers[1];
  matrices[2] = got.registers[2];
  matrices[3] = got.registers[3];
}

__device__ __forceinline__ void load_matrices(unsigned (&matrices)[2], const void* row) {
  const simt::Matrices got = simt::load_matrices(simt::WarpOperation::kLoadTwo, row);
  matrices[0] = got.registers[0];
  matrices[1] = got.registers[1];
}

template <Product kProduct>
__device__ __forceinline__ void multiply_add(float (&sums)[4], const unsigned (&left)[4], const unsigned (&right)[2]) {
  constexpr simt::WarpOperation kOperation = kProduct == Product::kFloat16    ? simt::WarpOperation::kMultiplyFloat16
                                             : kProduct == Product::kBFloat16 ? simt::WarpOperation::kMultiplyBFloat16
                                                                              : simt::WarpOperation::kMultiplyE4m3;
  const simt::Sums got = simt::multiply_add(kOperation, {{sums[0], sums[1], sums[2], sums[3]}},
                                            {{left[0], left[1], left[2], left[3]}},
                                            right[0] | static_cast<std::uint64_t>(right[1]) << 32);
  sums[0] = got.numbers[0];
  sums[1] = got.numbers[1];
  sums[2] = got.numbers[2];
  sums[3] = got.numbers[3];
}

__device__ __forceinline__ unsigned short to_e4m3(float low, float high) {
  return static_cast<unsigned short>(simt::e4m3_from_float(low) | simt::e4m3_from_float(high) << 8);
}

__device__ __forceinline__ float larger(float a, float b) {
  return a != a ? a : b != b ? b : a < b || (a == b && __builtin_signbit(a)) ? b : a;
}

__device__ __forceinline__ void named_barrier_sync(int barrier, int threads) {
  simt::named_barrier(simt::WarpOperation::kBarrierSync, barrier, threads);
}

__device__ __forceinline__ void named_barrier_arrive(int barrier, int threads) {
  simt::named_barrier(simt::WarpOperation::kBarrierArrive, barrier, threads);
}

}  // namespace efficientad_fast::cuda
