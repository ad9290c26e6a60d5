// quantile on the CPU: two passes, of which the first counts the upper 16 bits of all numbers, and the second the lower
// ones of those near a wanted rank. Threads have histograms of their own, and sums of integers have no order.

#include "quantile.h"

#include "level.h"
#include "quantile_source.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <mutex>
#include <numeric>
#include <vector>

namespace efficientad_fast {

namespace {

using quantile::kBuckets;
using quantile::kSourceBlock;
using quantile::Source;

constexpr int64_t kBlock = 64;  // numbers whose keys a processor makes at once

#define EFFICIENTAD_FAST_KERNEL "quantile_kernel.h"
#include "for_each_level.h"

// Numbers per thread below which its histogram costs more than it saves.
constexpr int64_t kGrain = 256 * 1024;
// Histograms that a thread fills in one pass, of 512 KB each.
constexpr int64_t kRows = 8;

// counts += the histograms that count(values, numbers, into) makes of blocks.
template <typename Count>
void count_in_parts(const Source& source, int64_t numbers, int64_t buckets, int64_t* counts, const Count& count) {
  std::mutex adding;
  torch::stable::parallel_for(0, numbers, kGrain, [&](int64_t begin, int64_t end) {
    const bool whole = end - begin == numbers;
    std::vector<int64_t> part(whole ? 0 : buckets);
    float room[kSourceBlock];
    for (int64_t first = begin; first < end; first += kSourceBlock) {
      const int64_t block = std::min(kSourceBlock, end - first);
      count(source(first, block, room), block, whole ? counts : part.data());
    }
    const std::lock_guard<std::mutex> guard(adding);
    for (std::size_t bucket = 0; bucket < part.size(); ++bucket) {
      counts[bucket] += part[bucket];
    }
  });
}

void add_upper(const Source& source, int64_t numbers, int64_t* counts) {
  count_in_parts(source, numbers, kBuckets, counts, [](const float* values, int64_t block, int64_t* into) {
    EFFICIENTAD_FAST_DISPATCH(count_upper, values, block, into);
  });
}

// At most kRows prefixes.
void add_lower(const Source& source, int64_t numbers, const uint32_t* prefixes, int64_t rows, int64_t* counts) {
  count_in_parts(source, numbers, rows * kBuckets, counts, [=](const float* values, int64_t block, int64_t* into) {
    EFFICIENTAD_FAST_DISPATCH(count_lower, values, block, prefixes, rows, into);
  });
}

Source source_of(const Tensor& dense) {
  const float* const values = static_cast<const float*>(dense.const_data_ptr());
  return [values](int64_t first, int64_t, float*) { return values + first; };
}

// The ranks that a quantile of `count` numbers lies between, and how far along.
struct Ranks {
  int64_t low, high;
  double along;

  Ranks(double fraction, int64_t count) {
    // Stored, so that no compiler makes one rounding of a product and a difference.
    const volatile double position = fraction * static_cast<double>(count - 1);
    low = static_cast<int64_t>(position);
    high = std::min(low + 1, count - 1);
    along = position - static_cast<double>(low);
  }
};

// The bucket that holds `rank`, and how many numbers are in those before it.
struct Place {
  int64_t bucket, before;

  Place(const int64_t* ends, int64_t rank)
      : bucket(std::upper_bound(ends, ends + kBuckets, rank) - ends), before(bucket == 0 ? 0 : ends[bucket - 1]) {}
};

double number_of(uint32_t key) {
  const uint32_t bits = key >> 31 ? key ^ 0x80000000u : ~key;
  float number;
  std::memcpy(&number, &bits, sizeof(number));
  return number;
}

double interpolate(double lower, double upper, double along) {
  if (along == 0 || lower == upper) {
    return lower;
  }
  const double difference = upper - lower;
  const volatile double step = along < 0.5 ? difference * along : difference * (1 - along);
  return along < 0.5 ? lower + step : upper - step;
}

}  // namespace

void quantile::quantiles(const Source& source, int64_t numbers, const std::vector<double>& fractions, float* out) {
  std::vector<int64_t> ends(kBuckets);
  add_upper(source, numbers, ends.data());
  if (ends.back() > 0) {
    std::fill_n(out, fractions.size(), std::numeric_limits<float>::quiet_NaN());
    return;
  }
  std::partial_sum(ends.begin(), ends.end(), ends.begin());

  std::vector<int64_t> wanted;
  for (const double fraction : fractions) {
    const Ranks ranks(fraction, numbers);
    wanted.insert(wanted.end(), {ranks.low, ranks.high});
  }
  std::sort(wanted.begin(), wanted.end());
  wanted.erase(std::unique(wanted.begin(), wanted.end()), wanted.end());
  std::vector<double> found;  // the numbers at the wanted ranks
  std::vector<int64_t> counts;
  while (found.size() < wanted.size()) {
    std::vector<uint32_t> prefixes;
    std::size_t last = found.size();
    for (; last < wanted.size(); ++last) {
      const auto prefix = static_cast<uint32_t>(Place(ends.data(), wanted[last]).bucket);
      if (prefixes.empty() || prefixes.back() != prefix) {
        if (prefixes.size() == kRows) {
          break;
        }
        prefixes.push_back(prefix);
      }
    }
    counts.assign(prefixes.size() * kBuckets, 0);
    add_lower(source, numbers, prefixes.data(), static_cast<int64_t>(prefixes.size()), counts.data());
    for (std::size_t row = 0; row < prefixes.size(); ++row) {
      const auto begin = counts.begin() + static_cast<int64_t>(row) * kBuckets;
      std::partial_sum(begin, begin + kBuckets, begin);
    }
    std::size_t row = 0;
    while (found.size() < last) {
      const int64_t rank = wanted[found.size()];
      const Place place(ends.data(), rank);
      row += prefixes[row] != static_cast<uint32_t>(place.bucket);
      const Place within(counts.data() + static_cast<int64_t>(row) * kBuckets, rank - place.before);
      found.push_back(number_of(prefixes[row] << 16 | static_cast<uint32_t>(within.bucket)));
    }
  }
  const auto number_at = [&](int64_t rank) {
    return found[std::lower_bound(wanted.begin(), wanted.end(), rank) - wanted.begin()];
  };
  for (std::size_t i = 0; i < fractions.size(); ++i) {
    const Ranks ranks(fractions[i], numbers);
    out[i] = static_cast<float>(interpolate(number_at(ranks.low), number_at(ranks.high), ranks.along));
  }
}

namespace {

void compute(const Tensor& values, const std::vector<double>& fractions, float* out) {
  const Tensor dense = torch::stable::contiguous(values);
  quantile::quantiles(source_of(dense), dense.numel(), fractions, out);
}

void quantile_out(const Tensor& values, std::vector<double> fractions, Tensor out, Tensor workspace) {
  quantile::check(values, fractions, /*cuda=*/false);
  quantile::check_outputs(values, fractions, out, workspace);
  compute(values, fractions, static_cast<float*>(out.mutable_data_ptr()));
}

Tensor quantile_default(const Tensor& values, std::vector<double> fractions) {
  quantile::check(values, fractions, /*cuda=*/false);
  Tensor out = torch::stable::new_empty(values, {static_cast<int64_t>(fractions.size())});
  compute(values, fractions, static_cast<float*>(out.mutable_data_ptr()));
  return out;
}

void quantile_count(const Tensor& values, std::vector<int64_t> prefixes, Tensor counts) {
  quantile::check_count(values, prefixes, counts, /*cuda=*/false);
  const Tensor dense = torch::stable::contiguous(values);
  const Source source = source_of(dense);
  int64_t* const into = static_cast<int64_t*>(counts.mutable_data_ptr());
  if (prefixes.empty()) {
    add_upper(source, dense.numel(), into);
  }
  const std::vector<uint32_t> narrow(prefixes.begin(), prefixes.end());
  const auto all = static_cast<int64_t>(narrow.size());
  for (int64_t row = 0; row < all; row += kRows) {
    add_lower(source, dense.numel(), narrow.data() + row, std::min(kRows, all - row), into + row * kBuckets);
  }
}

}  // namespace

}  // namespace efficientad_fast

#define EFFICIENTAD_FAST_REGISTER(library)                                   \
  STABLE_TORCH_LIBRARY_IMPL(library, CPU, m) {                               \
    m.impl("quantile", TORCH_BOX(&efficientad_fast::quantile_default));      \
    m.impl("quantile.out", TORCH_BOX(&efficientad_fast::quantile_out));      \
    m.impl("quantile.count", TORCH_BOX(&efficientad_fast::quantile_count));  \
  }
EFFICIENTAD_FAST_REGISTER(efficientad_fast)
EFFICIENTAD_FAST_REGISTER(efficientad_fast_cpu)
