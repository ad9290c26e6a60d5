// feature_distance: what every compiled library checks before it computes.
// efficientad_fast/ops/feature_distance.py is the contract.

#pragma once

#include "checks.h"
#include "packing.h"

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace efficientad_fast::feature_distance {

inline constexpr const char* kName = "feature_distance";
inline constexpr int64_t kWorkspace = packing::kWorkspace;

inline void check_pairing(bool given, bool other_given, const char* argument, const char* other) {
  EFFICIENTAD_FAST_REQUIRE(given || !other_given, kName, argument, std::string("given where ") + other + " is", "None");
}

// Of both convolutions, which must agree.
inline Size checked_size(const Tensor& first, const std::optional<Tensor>& second, int64_t kernel_first,
                         int64_t kernel_second, int64_t padding_first, int64_t padding_second) {
  packing::check_padding(kName, "padding_first", padding_first, kernel_first);
  const Size size = packing::checked_size(kName, "first", first, kernel_first, padding_first);
  if (!second) {
    EFFICIENTAD_FAST_REQUIRE(padding_second == 0, kName, "padding_second", "0 without second", padding_second);
    return size;
  }
  EFFICIENTAD_FAST_REQUIRE(second->size(0) == first.size(0), kName, "second",
                           "of " + std::to_string(first.size(0)) + " images as first is", shape_text(*second));
  packing::check_padding(kName, "padding_second", padding_second, kernel_second);
  const Size other = packing::checked_size(kName, "second", *second, kernel_second, padding_second);
  EFFICIENTAD_FAST_REQUIRE(other.height == size.height && other.width == size.width, kName, "second",
                           "such that its convolution has " + packing::size_text(size.height, size.width) +
                               " pixels as that of first has",
                           packing::size_text(other.height, other.width));
  return size;
}

// What both overloads that compute check of their activations.
inline void check_activations(const Tensor& first, const std::optional<Tensor>& second, bool cuda, bool mixed = false) {
  require_device_kind(kName, "first", first, cuda);
  packing::check_images(kName, "first", first, mixed);
  if (second) {
    packing::check_images(kName, "second", *second, mixed);
    require_device_of(kName, "first", first, "second", *second);
  }
}

inline void check_second_weight(const Tensor& weight_first, const Tensor& weight_second, bool mixed = false) {
  packing::check_weight(kName, "weight_second", weight_second, mixed);
  EFFICIENTAD_FAST_REQUIRE(weight_second.size(0) == weight_first.size(0), kName, "weight_second",
                           "of " + std::to_string(weight_first.size(0)) + " outputs as weight_first is",
                           shape_text(weight_second));
}

// Activations and weights that are not packed; height and width of the result.
inline Size checked_given(const Tensor& first, const Tensor& weight_first, const std::optional<Tensor>& second,
                          const std::optional<Tensor>& weight_second, int64_t padding_first, int64_t padding_second,
                          bool cuda, bool mixed) {
  check_activations(first, second, cuda, mixed);
  packing::check_weight(kName, "weight_first", weight_first, mixed);
  require_device_of(kName, "first", first, "weight_first", weight_first);
  packing::check_channels(kName, "first", first, weight_first.size(1), "this weight_first");
  check_pairing(second.has_value(), weight_second.has_value(), "second", "weight_second");
  check_pairing(weight_second.has_value(), second.has_value(), "weight_second", "second");
  if (second) {
    check_second_weight(weight_first, *weight_second, mixed);
    require_device_of(kName, "first", first, "weight_second", *weight_second);
    packing::check_channels(kName, "second", *second, weight_second->size(1), "this weight_second");
  }
  packing::check_same_dtype(kName, "weight_first", weight_first, "first", first);
  if (second) {
    packing::check_same_dtype(kName, "second", *second, "first", first);
    packing::check_same_dtype(kName, "weight_second", *weight_second, "first", first);
  }
  return checked_size(first, second, weight_first.size(2), second ? weight_second->size(2) : 0, padding_first,
                      padding_second);
}

// The default overload; height and width of its result.
inline Size check(const Tensor& first, const Tensor& weight_first, const std::optional<Tensor>& second,
                  const std::optional<Tensor>& weight_second, const std::optional<Tensor>& bias, int64_t padding_first,
                  int64_t padding_second, bool cuda) {
  const Size size = checked_given(first, weight_first, second, weight_second, padding_first, padding_second, cuda,
                                  /*mixed=*/false);
  if (bias) {
    packing::check_bias(kName, "bias", *bias, weight_first.size(0), "first", first);
  }
  return size;
}

// feature_distance.pack; the shape of its result.
inline std::vector<int64_t> check_pack(const Tensor& weight_first, const std::optional<Tensor>& weight_second,
                                       const std::string& algorithm, bool cuda) {
  require_device_kind(kName, "weight_first", weight_first, cuda);
  packing::check_weight(kName, "weight_first", weight_first);
  std::vector<packing::Source> sources{{weight_first.size(1), weight_first.size(2)}};
  if (weight_second) {
    check_second_weight(weight_first, *weight_second);
    require_device_of(kName, "weight_first", weight_first, "weight_second", *weight_second);
    sources.push_back({weight_second->size(1), weight_second->size(2)});
  }
  const int64_t planes = packing::checked_planes(kName, algorithm, sources);
  return packing::packed_shape(1, weight_first.size(0), planes, sources);
}

inline void check_map(const Tensor& first, Size size, const Tensor& out) {
  const std::string shape = text(std::vector<int64_t>{first.size(0), 1, size.height, size.width});
  EFFICIENTAD_FAST_REQUIRE(shape_text(out) == shape, kName, "out", shape, shape_text(out));
  packing::require_float32(kName, "out", out);
  EFFICIENTAD_FAST_REQUIRE(out.is_contiguous(), kName, "out", "contiguous", "strides " + text(out.strides()));
  require_device_of(kName, "first", first, "out", out);
}

// feature_distance.out
inline void check_outputs(const Tensor& first, const std::optional<Tensor>& second, const Tensor& packed,
                          const std::optional<Tensor>& bias, int64_t channels, int64_t kernel_first,
                          int64_t kernel_second, int64_t padding_first, int64_t padding_second, const Tensor& out,
                          const Tensor& workspace, bool cuda) {
  check_activations(first, second, cuda);
  EFFICIENTAD_FAST_REQUIRE(channels >= 1, kName, "channels", "at least 1", channels);
  packing::check_kernel(kName, "kernel_first", kernel_first);
  std::vector<packing::Source> sources{{first.size(1), kernel_first}};
  if (second) {
    packing::check_kernel(kName, "kernel_second", kernel_second);
    sources.push_back({second->size(1), kernel_second});
  } else {
    EFFICIENTAD_FAST_REQUIRE(kernel_second == 0, kName, "kernel_second", "0 without second", kernel_second);
  }
  const Size size = checked_size(first, second, kernel_first, kernel_second, padding_first, padding_second);
  packing::check_packed(kName, "packed", packed, 1, channels, sources, "first", first);
  if (bias) {
    packing::check_bias(kName, "bias", *bias, channels, "first", first);
  }
  check_map(first, size, out);
  packing::check_workspace(kName, workspace, kWorkspace, "first", first);
}

// What is too deep to be packed is refused by all that compute, packed or not.
inline void checked_depth(const Tensor& weight_first, const std::optional<Tensor>& weight_second) {
  std::vector<packing::Source> sources{{weight_first.size(1), weight_first.size(2)}};
  if (weight_second) {
    sources.push_back({weight_second->size(1), weight_second->size(2)});
  }
  packing::checked_planes(kName, "auto", sources);
}

// Of a kernel's block where several divide a pixel's outputs.
inline constexpr int64_t kFewestOutputs = 32;

// Numbers of the workspace of feature_distance.mixed for maps of that size; feature_distance.py says why so many.
inline int64_t mixed_workspace(int64_t images, int64_t height, int64_t width, int64_t outputs) {
  return images * height * width * (1 + packing::rounded_up(outputs, kFewestOutputs / 2) / (kFewestOutputs / 2));
}

// feature_distance.mixed
inline void check_mixed(const Tensor& first, const Tensor& weight_first, const std::optional<Tensor>& second,
                        const std::optional<Tensor>& weight_second, const std::optional<Tensor>& scale,
                        const std::optional<Tensor>& bias, int64_t padding_first, int64_t padding_second,
                        const Tensor& out, const Tensor& workspace, bool cuda) {
  const Size size = checked_given(first, weight_first, second, weight_second, padding_first, padding_second, cuda,
                                  /*mixed=*/true);
  const int64_t outputs = weight_first.size(0);
  if (scale) {
    packing::check_bias(kName, "scale", *scale, outputs, "first", first);
  }
  if (bias) {
    packing::check_bias(kName, "bias", *bias, outputs, "first", first);
  }
  check_map(first, size, out);
  packing::check_mixed_workspace(kName, workspace, mixed_workspace(first.size(0), size.height, size.width, outputs),
                                 "first", first);
  packing::require_float32(kName, "workspace", workspace);
}

}  // namespace efficientad_fast::feature_distance
