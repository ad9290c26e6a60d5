// hard_feature_loss: what every compiled library checks before it computes, and where the gradient lies.
// efficientad_fast/ops/hard_feature_loss.py is the contract.

#pragma once

#include "checks.h"
#include "layouts.h"
#include "quantile.h"

#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <initializer_list>
#include <utility>

namespace efficientad_fast::hard_feature_loss {

inline constexpr const char* kName = "hard_feature_loss";
inline constexpr int64_t kMostParts = 1024;
inline constexpr int64_t kWorkspace = quantile::kWorkspace + 2 * kMostParts;

inline void check_features(const Tensor& teacher, const Tensor& student, bool cuda) {
  require_device_kind(kName, "teacher", teacher, cuda);
  EFFICIENTAD_FAST_REQUIRE(teacher.dim() == 4 && teacher.numel() >= 1, kName, "teacher",
                           "(N, C, h, w) with at least one number", shape_text(teacher));
  EFFICIENTAD_FAST_REQUIRE(shape_text(student) == shape_text(teacher), kName, "student",
                           shape_text(teacher) + " as teacher is", shape_text(student));
  const auto floating = {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16};
  for (const auto& [name, given] : {std::pair<const char*, const Tensor&>{"teacher", teacher}, {"student", student}}) {
    EFFICIENTAD_FAST_REQUIRE(is_one_of(given.scalar_type(), floating), kName, name, "float32, float16 or bfloat16",
                             dtype_text(given.scalar_type()));
  }
  require_device_of(kName, "teacher", teacher, "student", student);
}

inline void check(const Tensor& teacher, const Tensor& student, double fraction, bool cuda) {
  check_features(teacher, student, cuda);
  EFFICIENTAD_FAST_REQUIRE(0 <= fraction && fraction <= 1, kName, "fraction", "a number in [0, 1]", fraction);
}

inline void check_number(const Tensor& teacher, const char* name, const Tensor& given, ScalarType dtype) {
  EFFICIENTAD_FAST_REQUIRE(given.dim() == 0, kName, name, "of shape ()", "shape " + shape_text(given));
  EFFICIENTAD_FAST_REQUIRE(given.scalar_type() == dtype, kName, name, dtype_text(dtype),
                           dtype_text(given.scalar_type()));
  require_device_of(kName, "teacher", teacher, name, given);
}

inline void check_outputs(const Tensor& teacher, const Tensor& loss, const Tensor& threshold, const Tensor& count,
                          const Tensor& workspace) {
  check_number(teacher, "loss", loss, ScalarType::Float);
  check_number(teacher, "threshold", threshold, ScalarType::Float);
  check_number(teacher, "count", count, ScalarType::Long);
  const std::string expected = text(std::initializer_list<int64_t>{kWorkspace});
  EFFICIENTAD_FAST_REQUIRE(shape_text(workspace) == expected, kName, "workspace", expected, shape_text(workspace));
  EFFICIENTAD_FAST_REQUIRE(workspace.scalar_type() == ScalarType::Long, kName, "workspace",
                           dtype_text(ScalarType::Long), dtype_text(workspace.scalar_type()));
  EFFICIENTAD_FAST_REQUIRE(workspace.is_contiguous(), kName, "workspace", "contiguous",
                           "strides " + text(workspace.strides()));
  require_device_of(kName, "teacher", teacher, "workspace", workspace);
}

inline void check_gradient(const Tensor& teacher, const Tensor& student, const Tensor& threshold, const Tensor& count,
                           const Tensor& grad_loss, bool cuda) {
  check_features(teacher, student, cuda);
  check_number(teacher, "threshold", threshold, ScalarType::Float);
  check_number(teacher, "grad_loss", grad_loss, ScalarType::Float);
  check_number(teacher, "count", count, ScalarType::Long);
}

// The gradient is channels-last then.
inline bool has_channels_innermost(const Tensor& student) {
  return student.stride(1) == 1;
}

inline Tensor new_gradient(const Tensor& student) {
  const int64_t images = student.size(0), channels = student.size(1), height = student.size(2), width = student.size(3);
  if (!has_channels_innermost(student)) {
    return torch::stable::new_empty(student, {images, channels, height, width});
  }
  return new_channels_last(student, images, channels, height, width);
}

}  // namespace efficientad_fast::hard_feature_loss
