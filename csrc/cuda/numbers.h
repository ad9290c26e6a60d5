// Elements of any floating dtype on a device, to and from the type that a kernel computes in.

#pragma once

#include "device.h"

#include <cstdint>
#include <type_traits>

namespace efficientad_fast::cuda {

enum class Dtype : int { kFloat32, kFloat64, kFloat16, kBFloat16, kUint8 };

// In place of an element's type where the dtype is known at run time only.
struct AnyDtype {};

// 16 bytes, which a thread moves at once.
template <typename Element>
struct alignas(16) Vector {
  static constexpr int kCount = 16 / sizeof(Element);
  Element element[kCount];
};

template <typename T, typename Element>
__device__ __forceinline__ T to_number(Element element) {
  if constexpr (std::is_same_v<Element, __half>) {
    return static_cast<T>(__half2float(element));
  } else if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
    return static_cast<T>(__bfloat162float(element));
  } else {
    return static_cast<T>(element);
  }
}

template <typename Element, typename T>
__device__ __forceinline__ Element to_element(T number) {
  if constexpr (std::is_same_v<Element, __half>) {
    return __float2half_rn(static_cast<float>(number));
  } else if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
    return __float2bfloat16_rn(static_cast<float>(number));
  } else {
    return static_cast<Element>(number);
  }
}

// Element `index` of `data`. Where Element is a type, `dtype` is not looked at.
template <typename T, typename Element>
__device__ __forceinline__ T load(const void* data, Dtype dtype, int64_t index) {
  if constexpr (std::is_same_v<Element, AnyDtype>) {
    switch (dtype) {
      case Dtype::kFloat64: return load<T, double>(data, dtype, index);
      case Dtype::kFloat16: return load<T, __half>(data, dtype, index);
      case Dtype::kBFloat16: return load<T, __nv_bfloat16>(data, dtype, index);
      default: return load<T, float>(data, dtype, index);
    }
  } else {
    return to_number<T>(static_cast<const Element*>(data)[index]);
  }
}

template <typename Element, typename T>
__device__ __forceinline__ void store(T number, void* data, Dtype dtype, int64_t index) {
  if constexpr (std::is_same_v<Element, AnyDtype>) {
    switch (dtype) {
      case Dtype::kFloat64: return store<double>(number, data, dtype, index);
      case Dtype::kFloat16: return store<__half>(number, data, dtype, index);
      case Dtype::kBFloat16: return store<__nv_bfloat16>(number, data, dtype, index);
      default: return store<float>(number, data, dtype, index);
    }
  } else {
    static_cast<Element*>(data)[index] = to_element<Element>(number);
  }
}

// Calls `body` with a value of the type of `dtype`, which both have, or with AnyDtype.
template <typename Body>
void with_element(Dtype first, Dtype second, const Body& body) {
  if (first != second) {
    return body(AnyDtype{});
  }
  switch (first) {
    case Dtype::kFloat64: return body(double{});
    case Dtype::kFloat16: return body(__half{});
    case Dtype::kBFloat16: return body(__nv_bfloat16{});
    default: return body(float{});
  }
}

inline bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

}  // namespace efficientad_fast::cuda
