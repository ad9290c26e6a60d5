// preprocess: what the CPU and the CUDA library check before they compute.
// efficientad_fast/ops/preprocess.py is the contract.

#pragma once

#include "checks.h"
#include "layouts.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

namespace efficientad_fast::preprocess {

inline constexpr const char* kName = "preprocess";

struct Settings {
  bool pillow = false;
  std::array<double, 3> mean{}, std{};
};

inline Settings checked_settings(const Tensor& image, const std::string& resize, const std::vector<double>& mean,
                                 const std::vector<double>& std, bool cuda) {
  require_device_kind(kName, "image", image, cuda);
  const bool rgb = image.dim() == 4 && image.size(3) == 3 && image.size(1) >= 1 && image.size(2) >= 1;
  EFFICIENTAD_FAST_REQUIRE(rgb, kName, "image", "(N, H, W, 3) with H and W of at least 1", shape_text(image));
  EFFICIENTAD_FAST_REQUIRE(is_one_of(image.scalar_type(), {ScalarType::Byte, ScalarType::Float}), kName, "image",
                           "uint8, or float32 in [0, 1]", dtype_text(image.scalar_type()));
  EFFICIENTAD_FAST_REQUIRE(resize == "antialias" || resize == "pillow", kName, "resize", "'antialias' or 'pillow'",
                           "'" + resize + "'");
  Settings settings;
  settings.pillow = resize == "pillow";
  const auto take = [](const char* name, const std::vector<double>& given, std::array<double, 3>& into) {
    const bool three = given.size() == 3 && std::isfinite(given[0]) && std::isfinite(given[1]) && std::isfinite(given[2]);
    EFFICIENTAD_FAST_REQUIRE(three, kName, name, "three finite numbers", list_text(given));
    std::copy(given.begin(), given.end(), into.begin());
  };
  take("mean", mean, settings.mean);
  take("std", std, settings.std);
  EFFICIENTAD_FAST_REQUIRE(std[0] != 0 && std[1] != 0 && std[2] != 0, kName, "std", "three numbers other than zero",
                           list_text(std));
  return settings;
}

inline void check_dtype(const char* name, ScalarType dtype) {
  EFFICIENTAD_FAST_REQUIRE(is_one_of(dtype, {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16}), kName,
                           name, "float32, float16 or bfloat16", dtype_text(dtype));
}

// Numbers from a pixel of (N, 3, h, w) to the next where its channels are next to each other: 3, or 4 where they are the
// first three of four; 0 for planes. Where two layouts are the same bytes, either answer is right.
inline int64_t pixel_stride(const Tensor& out) {
  const int64_t height = out.size(2), width = out.size(3);
  for (const int64_t stride : {3, 4}) {
    if ((out.stride(1) == 1) && (width == 1 || out.stride(3) == stride) &&
        (height == 1 || out.stride(2) == stride * width) &&
        (out.size(0) == 1 || out.stride(0) == stride * width * height)) {
      return stride;
    }
  }
  return 0;
}

inline void check_output(const Tensor& image, const Tensor& out) {
  const bool fitting = out.dim() == 4 && out.size(0) == image.size(0) && out.size(1) == 3;
  EFFICIENTAD_FAST_REQUIRE(fitting, kName, "out", "(" + std::to_string(image.size(0)) + ", 3, h, w)", shape_text(out));
  require_positive_size(kName, {out.size(2), out.size(3)});
  check_dtype("out", out.scalar_type());
  EFFICIENTAD_FAST_REQUIRE(out.is_contiguous() || pixel_stride(out) > 0, kName, "out",
                           "contiguous, channels-last, or the first three of four channels, channels-last",
                           "strides " + text(out.strides()));
  require_device_of(kName, "image", image, "out", out);
}

// (N, 3, *size) in the layout that was asked for.
inline Tensor empty_output(const Tensor& image, const std::vector<int64_t>& size, bool channels_last,
                           ScalarType dtype) {
  if (!channels_last) {
    return torch::stable::new_empty(image, {image.size(0), 3, size[0], size[1]}, dtype);
  }
  return new_channels_last(image, image.size(0), 3, size[0], size[1], dtype);
}

}  // namespace efficientad_fast::preprocess
