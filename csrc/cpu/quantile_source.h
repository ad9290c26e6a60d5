// Exact quantiles of numbers that need not lie in memory. quantile.cpp has the function.

#pragma once

#include <cstdint>
#include <functional>
#include <vector>

namespace efficientad_fast::quantile {

// How many numbers a source is asked for at most.
inline constexpr int64_t kSourceBlock = 4096;

// Where the numbers from `first` on are, of which `count` are read: in memory already, or written to `room`, which has
// place for kSourceBlock. Called by several threads, and twice or more for each number.
using Source = std::function<const float*(int64_t first, int64_t count, float* room)>;

// The quantiles of `numbers` numbers, at least one, into `out`. The fractions have been checked.
void quantiles(const Source& source, int64_t numbers, const std::vector<double>& fractions, float* out);

}  // namespace efficientad_fast::quantile
