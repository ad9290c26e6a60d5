// Contiguous elements of any floating dtype, to and from the type that a kernel computes in.

#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>

namespace efficientad_fast {

// Calls `body` with a null pointer of the C++ type of `dtype`.
template <typename Body>
void with_floating_type(torch::headeronly::ScalarType dtype, const Body& body) {
  using torch::headeronly::ScalarType;
  switch (dtype) {
    case ScalarType::Float: return body(static_cast<float*>(nullptr));
    case ScalarType::Double: return body(static_cast<double*>(nullptr));
    case ScalarType::Half: return body(static_cast<torch::headeronly::Half*>(nullptr));
    case ScalarType::BFloat16: return body(static_cast<torch::headeronly::BFloat16*>(nullptr));
    default: STD_TORCH_CHECK(false, "not a floating dtype");  // callers have checked
  }
}

// `count` elements from `first` on.
template <typename T>
void load_as(const void* from, torch::headeronly::ScalarType dtype, int64_t first, int64_t count, T* to) {
  with_floating_type(dtype, [=](auto* kind) {
    const auto* typed = static_cast<const std::remove_pointer_t<decltype(kind)>*>(from) + first;
    for (int64_t i = 0; i < count; ++i) {
      to[i] = static_cast<T>(typed[i]);
    }
  });
}

template <typename T>
void store_as(const T* from, void* to, torch::headeronly::ScalarType dtype, int64_t first, int64_t count) {
  with_floating_type(dtype, [=](auto* kind) {
    using Stored = std::remove_pointer_t<decltype(kind)>;
    auto* typed = static_cast<Stored*>(to) + first;
    for (int64_t i = 0; i < count; ++i) {
      typed[i] = static_cast<Stored>(from[i]);
    }
  });
}

}  // namespace efficientad_fast
