// quantile on a GPU: device code and launches, without framework types.
// efficientad_fast/ops/quantile.py is the contract.
//
// Selection by digits: of the numbers that share the digits found so far with a wanted rank, the next digit is counted,
// which tells the rank's own. No pass waits for the host.

#pragma once

#include "device.h"
#include "numbers.h"

#include <algorithm>
#include <cstdint>
#include <limits>

namespace efficientad_fast::cuda {

inline constexpr int kQuantileThreads = 256;
inline constexpr int kQuantileNumbers = 16 * kQuantileThreads;  // of a block, where there are few
inline constexpr int64_t kQuantileMaxBlocks = 1024;
inline constexpr int kPair = 2;           // fractions taken at once
inline constexpr int kSlots = 2 * kPair;  // ranks: each fraction lies between two
inline constexpr int kBins = 2048;
inline constexpr int kRows = 4;    // prefixes of a launch of count_lower
inline constexpr unsigned kNanKey = 0xffffffffu;

// Digits of a key, from the highest: bits 21 to 31, 10 to 20, 0 to 9.
inline constexpr int kDigits = 3;
inline constexpr int kDigitShift[kDigits] = {21, 10, 0};

// What a workspace holds.
struct Selection {
  unsigned long long counts[kDigits][kSlots][kBins];
  unsigned long long rank[kSlots];             // among the numbers whose key begins with the digits found
  unsigned long long prefix[kDigits][kSlots];  // the digits up to each
};

struct Quantile {
  const float* values;  // contiguous, `count` of them
  int64_t count;
  double fractions[kPair];
  int fraction_count;
  float* out;
  Selection* selection;
  bool aligned;  // to vectors
};

struct QuantileCount {
  const float* values;
  int64_t count;
  unsigned prefixes[kRows];    // 2^16 where there is none
  unsigned long long* counts;  // (65536,) or (kRows, 65536)
  bool aligned;
};

// The bits of a number as an integer of the same order; NaN as the largest.
__device__ __forceinline__ unsigned key_of(float number) {
  const unsigned bits = __float_as_uint(number);
  return number != number ? kNanKey : bits >> 31 ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ double number_of(unsigned key) {
  return __uint_as_float(key >> 31 ? key ^ 0x80000000u : ~key);
}

// The lower of the two ranks that a fraction lies between, and how far along.
struct Position {
  int64_t low;
  double along;

  __device__ __forceinline__ Position(double fraction, int64_t count) {
    const double position = __dmul_rn(fraction, static_cast<double>(count - 1));
    low = static_cast<int64_t>(position);
    along = __dsub_rn(position, static_cast<double>(low));
  }
};

// By comparison: a kernel's arguments cannot be indexed, but in a copy in local memory.
__device__ __forceinline__ double fraction_at(const Quantile& p, int index) {
  static_assert(kPair == 2);
  return index == 0 ? p.fractions[0] : p.fractions[1];
}

// In the order of operations of the reference.
__device__ __forceinline__ double interpolate(double lower, double upper, double along) {
  if (along == 0 || lower == upper) {
    return lower;
  }
  const double difference = __dsub_rn(upper, lower);
  return along < 0.5 ? __dadd_rn(lower, __dmul_rn(difference, along))
                     : __dsub_rn(upper, __dmul_rn(difference, __dsub_rn(1.0, along)));
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

// What is known of each slot's key before its digit `kDigit`.
template <int kDigit>
__device__ __forceinline__ void load_prefixes(const Selection& selection, unsigned (&prefix)[kSlots]) {
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) {
    if constexpr (kDigit == 0) {
      prefix[slot] = 0;
    } else {
      prefix[slot] = static_cast<unsigned>(selection.prefix[kDigit - 1][slot]);
    }
  }
}

// The first slot with the same prefix as `slot`, which counts for both.
__device__ __forceinline__ int owner_of(const unsigned (&prefix)[kSlots], int slot) {
  int owner = slot;
#pragma unroll
  for (int earlier = kSlots - 1; earlier >= 0; --earlier) {
    if (earlier < slot && prefix[earlier] == prefix[slot]) {
      owner = earlier;
    }
  }
  return owner;
}

__global__ void __launch_bounds__(kQuantileThreads) reset_selection(const Quantile p) {
  const int first = blockIdx.x * kQuantileThreads + threadIdx.x;
  unsigned long long* const counts = &p.selection->counts[0][0][0];
  for (int i = first; i < kDigits * kSlots * kBins; i += gridDim.x * kQuantileThreads) {
    counts[i] = 0;
  }
  if (first < kSlots) {
    const Position position(fraction_at(p, first / 2), p.count);
    const int64_t rank = min(position.low + first % 2, p.count - 1);
    p.selection->rank[first] = static_cast<unsigned long long>(rank);
  }
}

// Adds this block's histograms of one digit to the selection's.
template <int kDigit>
__global__ void __launch_bounds__(kQuantileThreads) count_digits(const Quantile p) {
  constexpr int kCounted = kDigit == 0 ? 1 : kSlots;  // before the first digit all slots are one
  __shared__ unsigned counts[kCounted * kBins];
  unsigned prefix[kSlots];
  load_prefixes<kDigit>(*p.selection, prefix);
  bool counting[kSlots];
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) {
    counting[slot] = owner_of(prefix, slot) == slot;
  }
  for (int i = threadIdx.x; i < kCounted * kBins; i += kQuantileThreads) {
    counts[i] = 0;
  }
  __syncthreads();
  for_each_number(p.values, p.count, p.aligned, [&](float number) {
    const unsigned key = key_of(number);
    const unsigned bin = (key >> kDigitShift[kDigit]) & (kDigit == kDigits - 1 ? kBins / 2 - 1 : kBins - 1);
    if constexpr (kDigit == 0) {
      atomicAdd(&counts[bin], 1u);
    } else {
      const unsigned found = key >> kDigitShift[kDigit - 1];
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) {
        if (counting[slot] && found == prefix[slot]) {
          atomicAdd(&counts[slot * kBins + bin], 1u);
        }
      }
    }
  });
  __syncthreads();
  for (int i = threadIdx.x; i < kCounted * kBins; i += kQuantileThreads) {
    if (counts[i] > 0) {
      atomicAdd(&p.selection->counts[kDigit][0][0] + i, static_cast<unsigned long long>(counts[i]));
    }
  }
}

// A warp for each slot finds its next digit; after the last one, the quantiles are there.
template <int kDigit>
__global__ void __launch_bounds__(32 * kSlots) select_digits(const Quantile p) {
  constexpr int kLaneBins = kBins / 32;
  __shared__ unsigned keys[kSlots];
  Selection& selection = *p.selection;
  const int slot = threadIdx.x / 32, lane = threadIdx.x % 32;
  unsigned prefix[kSlots];
  load_prefixes<kDigit>(selection, prefix);
  const unsigned long long rank = selection.rank[slot];
  int owner = 0;
  unsigned known = 0;
#pragma unroll
  for (int other = 0; other < kSlots; ++other) {
    if (other == slot) {
      owner = owner_of(prefix, other);
      known = prefix[other];
    }
  }
  const unsigned long long* const counts = selection.counts[kDigit][owner] + lane * kLaneBins;
  unsigned long long mine = 0;
  for (int bin = 0; bin < kLaneBins; ++bin) {
    mine += counts[bin];
  }
  unsigned long long end = mine;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const unsigned long long before = __shfl_up_sync(0xffffffffu, end, distance);
    end += lane >= distance ? before : 0;
  }
  if (rank < end && rank >= end - mine) {
    unsigned long long left = rank - (end - mine);
    int bin = 0;
    while (left >= counts[bin]) {
      left -= counts[bin++];
    }
    constexpr int kBits = kDigit == kDigits - 1 ? 10 : 11;
    keys[slot] = known << kBits | static_cast<unsigned>(lane * kLaneBins + bin);
    selection.prefix[kDigit][slot] = keys[slot];
    selection.rank[slot] = left;
  }
  if constexpr (kDigit == kDigits - 1) {
    __syncthreads();
    const int index = threadIdx.x;
    if (index < p.fraction_count) {
      const bool nan = selection.counts[0][0][kNanKey >> kDigitShift[0]] > 0;
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
    launch(select_digits<0>, dim3(1), dim3(32 * kSlots), 0, stream, call);
    launch(count_digits<1>, blocks, threads, 0, stream, call);
    launch(select_digits<1>, dim3(1), dim3(32 * kSlots), 0, stream, call);
    launch(count_digits<2>, blocks, threads, 0, stream, call);
    launch(select_digits<2>, dim3(1), dim3(32 * kSlots), 0, stream, call);
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
