// quantile on a GPU: device code and launches, without framework types.
// efficientad_fast/ops/quantile.py is the contract.

#pragma once

#include "device.h"
#include "numbers.h"
#include "selection.h"

#include <algorithm>
#include <cstdint>
#include <limits>

namespace efficientad_fast::cuda {

inline constexpr int kQuantileThreads = 256;
inline constexpr int kQuantileNumbers = 16 * kQuantileThreads;  // of a block, where there are few
inline constexpr int64_t kQuantileMaxBlocks = 1024;
inline constexpr int kPair = 2;           // fractions taken at once
inline constexpr int kSlots = 2 * kPair;  // ranks: each fraction lies between two
inline constexpr int kRows = 4;           // prefixes of a launch of count_lower

using QuantileSelection = Selection<kSlots>;  // what a workspace holds

struct Quantile {
  const float* values;  // contiguous, `count` of them
  int64_t count;
  double fractions[kPair];
  int fraction_count;
  float* out;
  QuantileSelection* selection;
  bool aligned;  // to vectors
};

struct QuantileCount {
  const float* values;
  int64_t count;
  unsigned prefixes[kRows];    // 2^16 where there is none
  unsigned long long* counts;  // (65536,) or (kRows, 65536)
  bool aligned;
};

// By comparison: a kernel's arguments cannot be indexed, but in a copy in local memory.
__device__ __forceinline__ double fraction_at(const Quantile& p, int index) {
  static_assert(kPair == 2);
  return index == 0 ? p.fractions[0] : p.fractions[1];
}

// Calls `body` for every number, spread over the threads of all blocks.
template <typename Body>
__device__ __forceinline__ void for_each_number(const float* values, int64_t count, bool aligned, const Body& body) {
  using Four = Vector<float>;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kQuantileThreads + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kQuantileThreads;
  const int64_t vectors = aligned ? count / Four::kCount : 0;
  for (int64_t i = first; i < vectors; i += step) {
    const Four four = reinterpret_cast<const Four*>(values)[i];
#pragma unroll
    for (int j = 0; j < Four::kCount; ++j) {
      body(four.element[j]);
    }
  }
  for (int64_t i = vectors * Four::kCount + first; i < count; i += step) {
    body(values[i]);
  }
}

__global__ void __launch_bounds__(kQuantileThreads) reset_selection(const Quantile p) {
  const int first = blockIdx.x * kQuantileThreads + threadIdx.x;
  reset_counts(*p.selection, first, gridDim.x * kQuantileThreads);
  if (first < kSlots) {
    const Position position(fraction_at(p, first / 2), p.count);
    const int64_t rank = min(position.low + first % 2, p.count - 1);
    p.selection->rank[first] = static_cast<unsigned long long>(rank);
  }
}

// Adds this block's histograms of one digit to the selection's.
template <int kDigit>
__global__ void __launch_bounds__(kQuantileThreads) count_digits(const Quantile p) {
  using Counts = DigitCounts<kDigit, kQuantileThreads, kSlots>;
  __shared__ unsigned shared[Counts::kNumbers];
  const Counts counts(*p.selection, shared);
  for_each_number(p.values, p.count, p.aligned, [&](float number) { counts.count(key_of(number)); });
  counts.add_to(*p.selection);
}

// After the last digit, the quantiles are there.
template <int kDigit>
__global__ void __launch_bounds__(kQuantileThreads) select_digits(const Quantile p) {
  __shared__ unsigned keys[kSlots];
  select_digit<kDigit, kQuantileThreads>(*p.selection, keys);
  if constexpr (kDigit == kDigits - 1) {
    __syncthreads();
    const int index = threadIdx.x;
    if (index < p.fraction_count) {
      const bool nan = p.selection->counts[0][0][kNanBin] > 0;
      const double along = Position(fraction_at(p, index), p.count).along;
      const double exact = interpolate(number_of(keys[2 * index]), number_of(keys[2 * index + 1]), along);
      p.out[index] = nan ? std::numeric_limits<float>::quiet_NaN() : __double2float_rn(exact);
    }
  }
}

__global__ void __launch_bounds__(kQuantileThreads) count_upper(const QuantileCount p) {
  for_each_number(p.values, p.count, p.aligned,
                  [&](float number) { atomicAdd(p.counts + (key_of(number) >> 16), 1ull); });
}

__global__ void __launch_bounds__(kQuantileThreads) count_lower(const QuantileCount p) {
  for_each_number(p.values, p.count, p.aligned, [&](float number) {
    const unsigned key = key_of(number);
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      if (key >> 16 == p.prefixes[row]) {
        atomicAdd(p.counts + (row << 16 | static_cast<int>(key & 0xffffu)), 1ull);
      }
    }
  });
}

inline dim3 quantile_blocks(int64_t count) {
  return dim3(static_cast<unsigned>(std::min((count + kQuantileNumbers - 1) / kQuantileNumbers, kQuantileMaxBlocks)));
}

// `call` without fractions; results go to its `out`, in the order of `fractions`.
inline void launch_quantile(Quantile call, const double* fractions, int64_t fraction_count, cudaStream_t stream) {
  const dim3 blocks = quantile_blocks(call.count), threads(kQuantileThreads);
  const dim3 reset_blocks((kDigits * kSlots * kBins) / (4 * kQuantileThreads));
  call.aligned = is_aligned(call.values);
  for (int64_t first = 0; first < fraction_count; first += kPair) {
    call.fraction_count = static_cast<int>(std::min<int64_t>(kPair, fraction_count - first));
    for (int i = 0; i < kPair; ++i) {
      call.fractions[i] = fractions[first + (i < call.fraction_count ? i : 0)];
    }
    launch(reset_selection, reset_blocks, threads, 0, stream, call);
    launch(count_digits<0>, blocks, threads, 0, stream, call);
    launch(select_digits<0>, dim3(1), threads, 0, stream, call);
    launch(count_digits<1>, blocks, threads, 0, stream, call);
    launch(select_digits<1>, dim3(1), threads, 0, stream, call);
    launch(count_digits<2>, blocks, threads, 0, stream, call);
    launch(select_digits<2>, dim3(1), threads, 0, stream, call);
    call.out += call.fraction_count;
  }
}

// `call` without prefixes; those given are in [0, 65536). No number: nothing to launch.
inline void launch_quantile_count(QuantileCount call, const int64_t* prefixes, int64_t rows, cudaStream_t stream) {
  if (call.count == 0) {
    return;
  }
  const dim3 blocks = quantile_blocks(call.count), threads(kQuantileThreads);
  call.aligned = is_aligned(call.values);
  if (rows == 0) {
    launch(count_upper, blocks, threads, 0, stream, call);
  }
  for (int64_t first = 0; first < rows; first += kRows) {
    for (int row = 0; row < kRows; ++row) {
      call.prefixes[row] = first + row < rows ? static_cast<unsigned>(prefixes[first + row]) : 1u << 16;
    }
    launch(count_lower, blocks, threads, 0, stream, call);
    call.counts += static_cast<int64_t>(kRows) << 16;
  }
}

}  // namespace efficientad_fast::cuda
