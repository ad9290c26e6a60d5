// What a launch is told of tensors. Host code; the stable ABI only.

#pragma once

#include "../checks.h"
#include "numbers.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

#include <cuda_runtime.h>

#include <cstdint>
#include <initializer_list>
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

// Of the architectures (as __CUDA_ARCH__) that code is `compiled` for, the one (such as 80) whose code a GPU of that
// capability runs: a newer GPU runs older code too, machine code of its major version or PTX. 0 where there is none.
constexpr int code_for(int capability, std::initializer_list<int> compiled) {
  int newest = 0;
  for (const int architecture : compiled) {
    const int number = architecture / 10;
    newest = number <= capability && number > newest ? number : newest;
  }
  return newest;
}

static_assert(code_for(89, {800, 900}) == 80 && code_for(90, {750}) == 75 && code_for(80, {900}) == 0);

inline std::string capability_text(int number) {
  return std::to_string(number / 10) + "." + std::to_string(number % 10);
}

// Refuses a tensor on a GPU without the instructions of ptx.h, and e4m3 on one without those for e4m3; also where it
// runs code for an older GPU, which has traps in their place.
inline void require_products(const char* operator_name, const char* name, const Tensor& given) {
  const int capability = 10 * attribute_of(given, cudaDevAttrComputeCapabilityMajor) +
                         attribute_of(given, cudaDevAttrComputeCapabilityMinor);
  const int code = code_for(capability, {__CUDA_ARCH_LIST__});
  const std::string found =
      "one of " + capability_text(capability) + (code == capability ? "" : ", with code for " + capability_text(code));
  EFFICIENTAD_FAST_REQUIRE(code >= 80, operator_name, name,
                           "on a GPU of compute capability 8.0 or newer, with code for 8.0 or newer", found);
  EFFICIENTAD_FAST_REQUIRE(given.scalar_type() != ScalarType::Float8_e4m3fn || code >= 89, operator_name, name,
                           "of another dtype than float8_e4m3fn on a GPU, or by code, of compute capability below 8.9",
                           found);
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
