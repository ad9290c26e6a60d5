// quantile: what the CPU and the CUDA library check before they compute.
// efficientad_fast/ops/quantile.py is the contract.

#pragma once

#include "checks.h"

#include <algorithm>
#include <cstdint>
#include <set>
#include <string>
#include <vector>

namespace efficientad_fast::quantile {

inline constexpr const char* kName = "quantile";
inline constexpr int64_t kBuckets = 1 << 16;
inline constexpr int64_t kWorkspace = 3 * 4 * 2048 + 4 * 4;

inline void check_values(const Tensor& values, bool cuda) {
  require_device_kind(kName, "values", values, cuda);
  EFFICIENTAD_FAST_REQUIRE(values.scalar_type() == ScalarType::Float, kName, "values", "float32",
                           dtype_text(values.scalar_type()));
}

inline void check(const Tensor& values, const std::vector<double>& fractions, bool cuda) {
  check_values(values, cuda);
  EFFICIENTAD_FAST_REQUIRE(values.numel() >= 1, kName, "values", "at least one number", "shape " + shape_text(values));
  const bool within =
      std::all_of(fractions.begin(), fractions.end(), [](double fraction) { return 0 <= fraction && fraction <= 1; });
  EFFICIENTAD_FAST_REQUIRE(within, kName, "fractions", "numbers in [0, 1]", list_text(fractions));
}

inline void check_written(const Tensor& values, const char* name, const Tensor& given,
                          const std::vector<int64_t>& shape, ScalarType dtype) {
  EFFICIENTAD_FAST_REQUIRE(shape_text(given) == text(shape), kName, name, text(shape), shape_text(given));
  EFFICIENTAD_FAST_REQUIRE(given.scalar_type() == dtype, kName, name, dtype_text(dtype),
                           dtype_text(given.scalar_type()));
  EFFICIENTAD_FAST_REQUIRE(given.is_contiguous(), kName, name, "contiguous", "strides " + text(given.strides()));
  require_device_of(kName, "values", values, name, given);
}

inline void check_outputs(const Tensor& values, const std::vector<double>& fractions, const Tensor& out,
                          const Tensor& workspace) {
  check_written(values, "out", out, {static_cast<int64_t>(fractions.size())}, ScalarType::Float);
  check_written(values, "workspace", workspace, {kWorkspace}, ScalarType::Long);
}

inline void check_count(const Tensor& values, const std::vector<int64_t>& prefixes, const Tensor& counts, bool cuda) {
  check_values(values, cuda);
  const std::set<int64_t> different(prefixes.begin(), prefixes.end());
  const bool fitting = different.size() == prefixes.size() &&
                       (different.empty() || (*different.begin() >= 0 && *different.rbegin() < kBuckets));
  EFFICIENTAD_FAST_REQUIRE(fitting, kName, "prefixes", "different numbers in [0, 65535]", list_text(prefixes));
  std::vector<int64_t> shape{kBuckets};
  if (!prefixes.empty()) {
    shape.insert(shape.begin(), static_cast<int64_t>(prefixes.size()));
  }
  check_written(values, "counts", counts, shape, ScalarType::Long);
}

}  // namespace efficientad_fast::quantile
