// conv_pool: what every compiled library checks before it computes.
// efficientad_fast/ops/conv_pool.py is the contract.

#pragma once

#include "checks.h"
#include "packing.h"

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace efficientad_fast::conv_pool {

inline constexpr const char* kName = "conv_pool";
inline constexpr int64_t kWorkspace = packing::kWorkspace;

inline void check_groups(int64_t groups, int64_t divided, const char* reason) {
  EFFICIENTAD_FAST_REQUIRE(groups >= 1 && divided % groups == 0, kName, "groups",
                           "at least 1 and a divisor of " + std::to_string(divided) + ", " + reason, groups);
}

// Of the results.
inline Size checked_size(const Tensor& input, int64_t kernel, int64_t padding, bool pool, int64_t pool_padding) {
  packing::check_padding(kName, "padding", padding, kernel);
  if (pool) {
    EFFICIENTAD_FAST_REQUIRE(pool_padding == 0 || pool_padding == 1, kName, "pool_padding", "0 or 1", pool_padding);
  } else {
    EFFICIENTAD_FAST_REQUIRE(pool_padding == 0, kName, "pool_padding", "0 without pool", pool_padding);
  }
  return packing::checked_size(kName, "input", input, kernel, padding, pool, pool_padding);
}

// Images and weights that are not packed; height and width of the result.
inline Size checked_given(const Tensor& input, const Tensor& weight, int64_t padding, bool pool, int64_t pool_padding,
                          int64_t groups, bool cuda, bool mixed) {
  require_device_kind(kName, "input", input, cuda);
  packing::check_images(kName, "input", input, mixed);
  packing::check_weight(kName, "weight", weight, mixed);
  packing::check_same_dtype(kName, "weight", weight, "input", input);
  require_device_of(kName, "input", input, "weight", weight);
  check_groups(groups, weight.size(0), "the outputs of weight");
  packing::check_channels(kName, "input", input, weight.size(1) * groups, "this weight and groups");
  return checked_size(input, weight.size(2), padding, pool, pool_padding);
}

// The default overload; height and width of its result.
inline Size check(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, int64_t padding,
                  bool pool, int64_t pool_padding, int64_t groups, bool cuda) {
  const Size size = checked_given(input, weight, padding, pool, pool_padding, groups, cuda, /*mixed=*/false);
  if (bias) {
    packing::check_bias(kName, "bias", *bias, weight.size(0), "input", input);
  }
  return size;
}

// conv_pool.pack; the shape of its result.
inline std::vector<int64_t> check_pack(const Tensor& weight, int64_t groups, const std::string& algorithm, bool cuda) {
  require_device_kind(kName, "weight", weight, cuda);
  packing::check_weight(kName, "weight", weight);
  check_groups(groups, weight.size(0), "the outputs of weight");
  const std::vector<packing::Source> sources{{weight.size(1), weight.size(2)}};
  const int64_t planes = packing::checked_planes(kName, algorithm, sources);
  return packing::packed_shape(groups, weight.size(0) / groups, planes, sources);
}

// conv_pool.out
inline void check_outputs(const Tensor& input, const Tensor& packed, const std::optional<Tensor>& bias,
                          int64_t kernel_size, int64_t padding, bool pool, int64_t pool_padding, int64_t groups,
                          const Tensor& out, const Tensor& workspace, bool cuda) {
  require_device_kind(kName, "input", input, cuda);
  packing::check_images(kName, "input", input);
  packing::check_kernel(kName, "kernel_size", kernel_size);
  check_groups(groups, input.size(1), "the channels of input");
  const Size size = checked_size(input, kernel_size, padding, pool, pool_padding);
  const bool fitting = out.dim() == 4 && out.size(0) == input.size(0) && out.size(1) >= 1 &&
                       out.size(1) % groups == 0 && out.size(2) == size.height && out.size(3) == size.width;
  EFFICIENTAD_FAST_REQUIRE(fitting, kName, "out",
                           "(" + std::to_string(input.size(0)) + ", O, " + std::to_string(size.height) + ", " +
                               std::to_string(size.width) + ") with O a multiple of groups, " + std::to_string(groups),
                           shape_text(out));
  packing::check_activations(kName, "out", out, "input", input);
  packing::check_packed(kName, "packed", packed, groups, out.size(1) / groups,
                        {{input.size(1) / groups, kernel_size}}, "input", input);
  if (bias) {
    packing::check_bias(kName, "bias", *bias, out.size(1), "input", input);
  }
  packing::check_workspace(kName, workspace, kWorkspace, "input", input);
}

// conv_pool.mixed
inline void check_mixed(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& scale,
                        const std::optional<Tensor>& bias, int64_t padding, bool pool, int64_t pool_padding,
                        int64_t groups, const Tensor& out, bool cuda) {
  const Size size = checked_given(input, weight, padding, pool, pool_padding, groups, cuda, /*mixed=*/true);
  if (scale) {
    packing::check_bias(kName, "scale", *scale, weight.size(0), "input", input);
  }
  if (bias) {
    packing::check_bias(kName, "bias", *bias, weight.size(0), "input", input);
  }
  const std::string shape = text(std::vector<int64_t>{input.size(0), weight.size(0), size.height, size.width});
  EFFICIENTAD_FAST_REQUIRE(shape_text(out) == shape, kName, "out", shape, shape_text(out));
  packing::check_activations(kName, "out", out, "input", input, /*mixed=*/true);
}

}  // namespace efficientad_fast::conv_pool
