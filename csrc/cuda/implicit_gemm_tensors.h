// Tensors as implicit_gemm.h takes them. Host code; the stable ABI only.

#pragma once

#include "../layouts.h"
#include "implicit_gemm_call.h"
#include "tensors.h"

#include <cstdint>

namespace efficientad_fast::cuda {

// Of a dtype that `mixed` takes.
inline Number number_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Half: return Number::kFloat16;
    case ScalarType::BFloat16: return Number::kBFloat16;
    case ScalarType::Float8_e4m3fn: return Number::kE4m3;
    default: return Number::kFloat32;
  }
}

inline int multiprocessors_of(const Tensor& tensor) {
  return attribute_of(tensor, cudaDevAttrMultiProcessorCount);
}

// What a launch may ask for, in bytes.
inline int shared_of_block(const Tensor& tensor) {
  return attribute_of(tensor, cudaDevAttrMaxSharedMemoryPerBlockOptin);
}

// A convolution's operands; copies are held of images whose channels are not next to each other, and of weights that
// are not channels-last.
class Operands {
 public:
  Operands(const char* operator_name, const char* name, const Tensor& images, const Tensor& weight, int64_t padding)
      : images_(with_channels_together(images)), weight_(dense_channels_last(weight)) {
    require_side(operator_name, name, "height", images.size(2));
    require_side(operator_name, name, "width", images.size(3));
    const bool countable = weight.size(0) < kSideLimit && weight.numel() / weight.size(0) < kSideLimit;
    EFFICIENTAD_FAST_REQUIRE(countable, operator_name, name,
                             "for weights of less than 2^30 outputs, with less than 2^30 numbers each, on a GPU",
                             shape_text(weight));
    convolution = convolution_of(images_.const_data_ptr(), images_.sizes(), images_.strides(), weight_.const_data_ptr(),
                                 weight_.sizes(), padding);
  }

  Convolution convolution{};

 private:
  Tensor images_, weight_;
};

// What becomes of a convolution of such images in `out`.
inline Made checked_made(const char* operator_name, const char* name, const Convolution& from, bool pool,
                         int64_t pool_padding, const Tensor& out) {
  const int64_t count = out.size(0) * out.size(2) * out.size(3);
  EFFICIENTAD_FAST_REQUIRE(count < kSideLimit, operator_name, name, "a smaller batch on a GPU", out.size(0));
  return made_of(from, out.sizes(), pool, pool_padding);
}

}  // namespace efficientad_fast::cuda
