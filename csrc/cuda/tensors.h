// What a launch is told of tensors. Host code; the stable ABI only.

#pragma once

#include "../checks.h"
#include "numbers.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

#include <cuda_runtime.h>

#include <cstdint>
#include <string>

namespace efficientad_fast::cuda {

// Of a dtype that the operator's checks let through.
inline Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double: return Dtype::kFloat64;
    case ScalarType::Half: return Dtype::kFloat16;
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    case ScalarType::Byte: return Dtype::kUint8;
    default: return Dtype::kFloat32;
  }
}

inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline int attribute_of(const Tensor& tensor, cudaDeviceAttr attribute) {
  int value = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, tensor.get_device_index()));
  return value;
}

// Refuses a tensor on a GPU without the instructions of ptx.h, and e4m3 on one without those for e4m3.
inline void require_products(const char* operator_name, const char* name, const Tensor& given) {
  const int major = attribute_of(given, cudaDevAttrComputeCapabilityMajor);
  const int minor = attribute_of(given, cudaDevAttrComputeCapabilityMinor);
  const std::string found = "one of " + std::to_string(major) + "." + std::to_string(minor);
  EFFICIENTAD_FAST_REQUIRE(major >= 8, operator_name, name, "on a GPU of compute capability 8.0 or newer", found);
  EFFICIENTAD_FAST_REQUIRE(given.scalar_type() != ScalarType::Float8_e4m3fn || 10 * major + minor >= 89, operator_name,
                           name, "of another dtype than float8_e4m3fn on a GPU of compute capability below 8.9", found);
}

// Kernels index sides with 32 bits, and so does a launch its blocks.
constexpr int64_t kSideLimit = int64_t{1} << 30;
constexpr int64_t kBlockLimit = (int64_t{1} << 31) - 1;

inline void require_side(const char* operator_name, const char* name, const char* side, int64_t length) {
  EFFICIENTAD_FAST_REQUIRE(length < kSideLimit, operator_name, name,
                           std::string("less than 2^30 in ") + side + " on a GPU", length);
}

inline void require_blocks(const char* operator_name, const char* name, int64_t images, int64_t blocks) {
  EFFICIENTAD_FAST_REQUIRE(blocks <= kBlockLimit, operator_name, name, "a smaller batch on a GPU", images);
}

}  // namespace efficientad_fast::cuda
