// anomaly_map: what the CPU and the CUDA library check and fold before they compute.
// efficientad_fast/ops/anomaly_map.py is the contract.

#pragma once

#include "checks.h"

#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace efficientad_fast::anomaly_map {

inline constexpr const char* kName = "anomaly_map";
inline constexpr int64_t kMostBorder = 65536;

// anomaly_map = resize(pad(st * map_st + ae * map_ae + inside)) + outside: resizing and padding are linear, so that one
// resize serves both conventions. They differ in where the quantiles' offset goes.
struct Coefficients {
  double st = 0.5, ae = 0.5, inside = 0, outside = 0;
};

inline ScalarType result_dtype(const Tensor& map_st, const Tensor& map_ae) {
  const bool both = map_st.scalar_type() == ScalarType::Double && map_ae.scalar_type() == ScalarType::Double;
  return both ? ScalarType::Double : ScalarType::Float;
}

inline void check_maps(const Tensor& map_st, const Tensor& map_ae, bool cuda) {
  require_device_kind(kName, "map_st", map_st, cuda);
  const bool one_map = map_st.dim() == 4 && map_st.size(1) == 1 && map_st.size(2) >= 1 && map_st.size(3) >= 1;
  EFFICIENTAD_FAST_REQUIRE(one_map, kName, "map_st", "(N, 1, h, w) with h and w of at least 1", shape_text(map_st));
  const std::string shape = shape_text(map_st);
  EFFICIENTAD_FAST_REQUIRE(shape_text(map_ae) == shape, kName, "map_ae", shape + " as map_st is", shape_text(map_ae));
  const auto check_dtype = [](const char* name, ScalarType dtype) {
    EFFICIENTAD_FAST_REQUIRE(
        is_one_of(dtype, {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16, ScalarType::Double}), kName, name,
        "float32, float16, bfloat16 or float64", dtype_text(dtype));
  };
  check_dtype("map_st", map_st.scalar_type());
  check_dtype("map_ae", map_ae.scalar_type());
  require_device_of(kName, "map_st", map_st, "map_ae", map_ae);
}

inline Coefficients checked_coefficients(const std::optional<std::vector<double>>& quantiles, int64_t border,
                                         const std::string& convention) {
  EFFICIENTAD_FAST_REQUIRE(border >= 0 && border <= kMostBorder, kName, "border",
                           "from 0 to " + std::to_string(kMostBorder), border);
  EFFICIENTAD_FAST_REQUIRE(convention == "resized" || convention == "native", kName, "convention",
                           "'resized' or 'native'", "'" + convention + "'");
  Coefficients folded;
  if (!quantiles) {
    return folded;
  }
  bool four = quantiles->size() == 4;
  for (const double quantile : *quantiles) {
    four = four && std::isfinite(quantile);
  }
  EFFICIENTAD_FAST_REQUIRE(four, kName, "quantiles", "four finite numbers [st_start, st_end, ae_start, ae_end]",
                           list_text(*quantiles));
  const double st_start = (*quantiles)[0], st_end = (*quantiles)[1];
  const double ae_start = (*quantiles)[2], ae_end = (*quantiles)[3];
  EFFICIENTAD_FAST_REQUIRE(st_start != st_end && ae_start != ae_end, kName, "quantiles",
                           "such that each end differs from its start", list_text(*quantiles));
  folded.st = 0.05 / (st_end - st_start);
  folded.ae = 0.05 / (ae_end - ae_start);
  const double offset = -(folded.st * st_start + folded.ae * ae_start);
  (convention == "native" ? folded.inside : folded.outside) = offset;
  return folded;
}

inline void check_outputs(const Tensor& map_st, const Tensor& map_ae, const Tensor& anomaly_map, const Tensor& score) {
  const std::string images = std::to_string(map_st.size(0));
  const bool fitting = anomaly_map.dim() == 4 && anomaly_map.size(0) == map_st.size(0) && anomaly_map.size(1) == 1;
  EFFICIENTAD_FAST_REQUIRE(fitting, kName, "anomaly_map", "(" + images + ", 1, H, W)", shape_text(anomaly_map));
  require_positive_size(kName, {anomaly_map.size(2), anomaly_map.size(3)});
  const bool scores = score.dim() == 1 && score.size(0) == map_st.size(0);
  EFFICIENTAD_FAST_REQUIRE(scores, kName, "score", "(" + images + ",)", shape_text(score));
  const ScalarType dtype = result_dtype(map_st, map_ae);
  const auto check_output = [&](const char* name, const Tensor& given) {
    EFFICIENTAD_FAST_REQUIRE(given.scalar_type() == dtype, kName, name, dtype_text(dtype),
                             dtype_text(given.scalar_type()));
    EFFICIENTAD_FAST_REQUIRE(given.is_contiguous(), kName, name, "contiguous", "strides " + text(given.strides()));
    require_device_of(kName, "map_st", map_st, name, given);
  };
  check_output("anomaly_map", anomaly_map);
  check_output("score", score);
}

inline void check_drop_in(const Tensor& map_st, const Tensor& map_ae, const std::optional<Tensor>& st_quantiles,
                          const std::optional<Tensor>& ae_quantiles, bool cuda) {
  check_maps(map_st, map_ae, cuda);
  const auto check_pair = [&](const char* name, const std::optional<Tensor>& given) {
    if (given) {
      const bool pair =
          given->dim() == 1 && given->size(0) == 2 &&
          is_one_of(given->scalar_type(), {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16, ScalarType::Double});
      EFFICIENTAD_FAST_REQUIRE(pair, kName, name, "(2,) of a floating dtype: start and end",
                               shape_text(*given) + " of " + dtype_text(given->scalar_type()));
      require_device_of(kName, "map_st", map_st, name, *given);
    }
  };
  check_pair("st_quantiles", st_quantiles);
  check_pair("ae_quantiles", ae_quantiles);
}

// The dtype that both promote to.
inline ScalarType promoted(ScalarType first, ScalarType second) {
  if (first == second) {
    return first;
  }
  const bool exact = first == ScalarType::Double || second == ScalarType::Double;
  return exact ? ScalarType::Double : ScalarType::Float;  // float16 and bfloat16 promote to float32
}

}  // namespace efficientad_fast::anomaly_map
