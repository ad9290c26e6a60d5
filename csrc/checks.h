// How every compiled operator refuses an argument: "OP: ARGUMENT must be EXPECTED, got GOT."
// Host code of both libraries; the stable ABI only.

#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

// A macro, so that the sentence is made only where it is needed.
#define EFFICIENTAD_FAST_REQUIRE(condition, operator_name, argument, expected, got)                               \
  if (!(condition)) {                                                                                             \
    std::ostringstream sentence;                                                                                  \
    sentence << (operator_name) << ": " << (argument) << " must be " << (expected) << ", got " << (got) << "."; \
    throw std::runtime_error(sentence.str());                                                                     \
  }

namespace efficientad_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Numbers as Python writes a tuple of them, or a list.
template <typename Numbers>
std::string text(const Numbers& numbers, char open = '(', char close = ')') {
  std::ostringstream stream;
  stream << open;
  int64_t count = 0;
  for (const auto number : numbers) {
    stream << (count++ ? ", " : "") << number;
  }
  stream << (open == '(' && count == 1 ? "," : "") << close;
  return stream.str();
}

template <typename Numbers>
std::string list_text(const Numbers& numbers) {
  return text(numbers, '[', ']');
}

inline std::string shape_text(const Tensor& tensor) {
  return text(tensor.sizes());
}

inline std::string dtype_text(ScalarType dtype) {
  return std::string("torch.") + [dtype] {
    switch (dtype) {
      case ScalarType::Float: return "float32";
      case ScalarType::Double: return "float64";
      case ScalarType::Half: return "float16";
      case ScalarType::BFloat16: return "bfloat16";
      case ScalarType::Byte: return "uint8";
      case ScalarType::Char: return "int8";
      case ScalarType::Short: return "int16";
      case ScalarType::Int: return "int32";
      case ScalarType::Long: return "int64";
      case ScalarType::Bool: return "bool";
      case ScalarType::Float8_e4m3fn: return "float8_e4m3fn";
      default: return "another dtype";
    }
  }();
}

inline bool is_one_of(ScalarType dtype, std::initializer_list<ScalarType> dtypes) {
  for (const ScalarType one : dtypes) {
    if (one == dtype) {
      return true;
    }
  }
  return false;
}

inline std::string device_text(const Tensor& tensor) {
  return tensor.is_cuda() ? "cuda:" + std::to_string(tensor.get_device_index()) : tensor.is_cpu() ? "cpu" : "another";
}

// `tensor` on the device of `first`, which the operator's implementation has checked.
inline void require_device_of(const char* operator_name, const char* first_name, const Tensor& first, const char* name,
                              const Tensor& tensor) {
  const bool same = tensor.is_cuda() == first.is_cuda() && tensor.is_cpu() == first.is_cpu() &&
                    tensor.get_device_index() == first.get_device_index();
  EFFICIENTAD_FAST_REQUIRE(same, operator_name, name, "on " + device_text(first) + " as " + first_name + " is",
                           device_text(tensor));
}

// An implementation runs on its own kind of device, whichever way it was called.
inline void require_device_kind(const char* operator_name, const char* name, const Tensor& tensor, bool cuda) {
  EFFICIENTAD_FAST_REQUIRE(cuda ? tensor.is_cuda() : tensor.is_cpu(), operator_name, name,
                           cuda ? "on a CUDA device" : "on the CPU", device_text(tensor));
}

inline void require_positive_size(const char* operator_name, const std::vector<int64_t>& size) {
  EFFICIENTAD_FAST_REQUIRE(size.size() == 2 && size[0] >= 1 && size[1] >= 1, operator_name, "size",
                           "a height and a width of at least 1", list_text(size));
}

}  // namespace efficientad_fast
