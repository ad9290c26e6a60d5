// Selection by digits on a GPU, device code: of the numbers that share the digits found so far with a wanted rank, the
// next digit is counted, which tells the rank's own. No pass waits for the host.

#pragma once

#include "device.h"

#include <cstdint>

namespace efficientad_fast::cuda {

inline constexpr int kBins = 2048;
inline constexpr unsigned kNanKey = 0xffffffffu;

// Digits of a key, from the highest: bits 21 to 31, 10 to 20, 0 to 9.
inline constexpr int kDigits = 3;
template <int kDigit>
inline constexpr int kDigitBits = kDigit == kDigits - 1 ? 10 : 11;
template <int kDigit>
inline constexpr int kDigitShift = kDigit == kDigits - 1 ? 0 : 10 + 11 * (kDigits - 2 - kDigit);
inline constexpr unsigned kNanBin = kNanKey >> kDigitShift<0>;  // of the first digit

// What is counted and found. A slot is a wanted rank.
template <int kSlots>
struct Selection {
  unsigned long long counts[kDigits][kSlots][kBins];
  unsigned long long rank[kSlots];             // among the numbers whose key begins with the digits found
  unsigned long long prefix[kDigits][kSlots];  // the digits up to each
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

// In the order of operations of the reference.
__device__ __forceinline__ double interpolate(double lower, double upper, double along) {
  if (along == 0 || lower == upper) {
    return lower;
  }
  const double difference = __dsub_rn(upper, lower);
  return along < 0.5 ? __dadd_rn(lower, __dmul_rn(difference, along))
                     : __dsub_rn(upper, __dmul_rn(difference, __dsub_rn(1.0, along)));
}

// For thread `first` of `threads`.
template <int kSlots>
__device__ __forceinline__ void reset_counts(Selection<kSlots>& selection, int first, int threads) {
  unsigned long long* const counts = &selection.counts[0][0][0];
  for (int i = first; i < kDigits * kSlots * kBins; i += threads) {
    counts[i] = 0;
  }
}

// What is known of each slot's key before its digit `kDigit`.
template <int kDigit, int kSlots>
__device__ __forceinline__ void load_prefixes(const Selection<kSlots>& selection, unsigned (&prefix)[kSlots]) {
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
template <int kSlots>
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

// The histograms of one digit that a block of kThreads makes, one for every slot with a prefix of its own.
template <int kDigit, int kThreads, int kSlots>
class DigitCounts {
 public:
  static constexpr int kNumbers = (kDigit == 0 ? 1 : kSlots) * kBins;  // before the first digit all slots are one

  // `counts`: kNumbers in shared memory. Every thread of the block comes here, and to add_to.
  __device__ __forceinline__ DigitCounts(const Selection<kSlots>& selection, unsigned* counts) : counts_(counts) {
    load_prefixes<kDigit>(selection, prefix_);
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      counting_[slot] = owner_of(prefix_, slot) == slot;
    }
    for (int i = threadIdx.x; i < kNumbers; i += kThreads) {
      counts_[i] = 0;
    }
    __syncthreads();
  }

  __device__ __forceinline__ void count(unsigned key) const {
    const unsigned bin = key >> kDigitShift<kDigit> & ((1u << kDigitBits<kDigit>) - 1);
    if constexpr (kDigit == 0) {
      atomicAdd(&counts_[bin], 1u);
    } else {
      const unsigned found = key >> kDigitShift<kDigit - 1>;
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) {
        if (counting_[slot] && found == prefix_[slot]) {
          atomicAdd(&counts_[slot * kBins + bin], 1u);
        }
      }
    }
  }

  // Whether a key is larger than all that a slot, a constant, counts.
  __device__ __forceinline__ bool is_above(unsigned key, int slot) const {
    static_assert(kDigit > 0, "before the first digit every key is counted");
    return key >> kDigitShift<kDigit - 1> > prefix_[slot];
  }

  __device__ __forceinline__ void add_to(Selection<kSlots>& selection) const {
    __syncthreads();
    for (int i = threadIdx.x; i < kNumbers; i += kThreads) {
      if (counts_[i] > 0) {
        atomicAdd(&selection.counts[kDigit][0][0] + i, static_cast<unsigned long long>(counts_[i]));
      }
    }
  }

 private:
  unsigned* counts_;
  unsigned prefix_[kSlots];
  bool counting_[kSlots];
};

// A block of kThreads finds every slot's next digit, once all are counted. `keys` of the block has what is known then,
// behind a barrier.
template <int kDigit, int kThreads, int kSlots>
__device__ __forceinline__ void select_digit(Selection<kSlots>& selection, unsigned (&keys)[kSlots]) {
  constexpr int kSlotThreads = kThreads / kSlots;
  constexpr int kThreadBins = kBins / kSlotThreads;
  static_assert(kSlotThreads % 32 == 0 && kSlotThreads * kSlots == kThreads, "every slot has whole warps");
  __shared__ unsigned long long of_warp[kThreads / 32];
  const int slot = threadIdx.x / kSlotThreads, thread = threadIdx.x % kSlotThreads;
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
  const unsigned long long* const counts = selection.counts[kDigit][owner] + thread * kThreadBins;
  unsigned long long mine = 0;
#pragma unroll
  for (int bin = 0; bin < kThreadBins; ++bin) {
    mine += counts[bin];
  }
  unsigned long long end = mine;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const unsigned long long before = __shfl_up_sync(0xffffffffu, end, distance);
    end += static_cast<int>(threadIdx.x % 32) >= distance ? before : 0;
  }
  if (threadIdx.x % 32 == 31) {
    of_warp[threadIdx.x / 32] = end;
  }
  __syncthreads();
  for (int warp = slot * (kSlotThreads / 32); warp < static_cast<int>(threadIdx.x / 32); ++warp) {
    end += of_warp[warp];
  }
  if (rank < end && rank >= end - mine) {
    unsigned long long left = rank - (end - mine);
    int bin = 0;
    while (left >= counts[bin]) {
      left -= counts[bin++];
    }
    keys[slot] = known << kDigitBits<kDigit> | static_cast<unsigned>(thread * kThreadBins + bin);
    selection.prefix[kDigit][slot] = keys[slot];
    selection.rank[slot] = left;
  }
}

}  // namespace efficientad_fast::cuda
