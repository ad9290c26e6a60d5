// Where channels lie in memory. Host code of both libraries; the stable ABI only.

#pragma once

#include "checks.h"

#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <optional>

namespace efficientad_fast {

// (N, C, H, W) as (N, H, W, C) in the same memory, and back.
inline Tensor channels_behind(const Tensor& images) {
  return torch::stable::transpose(torch::stable::transpose(images, 1, 2), 2, 3);
}

inline Tensor channels_in_front(const Tensor& images) {
  return torch::stable::transpose(torch::stable::transpose(images, 2, 3), 1, 2);
}

// A new dense (N, C, H, W) tensor in channels-last memory.
inline Tensor new_channels_last(const Tensor& like, int64_t images, int64_t channels, int64_t height, int64_t width,
                                std::optional<ScalarType> dtype = std::nullopt) {
  return channels_in_front(torch::stable::new_empty(like, {images, height, width, channels}, dtype));
}

inline Tensor copied_channels_last(const Tensor& images) {
  return channels_in_front(torch::stable::contiguous(channels_behind(images)));
}

// As it is where channels are next to each other in memory, else a copy in which they are.
inline Tensor with_channels_together(const Tensor& images) {
  return images.stride(1) == 1 || images.size(1) == 1 ? images : copied_channels_last(images);
}

// (N, C, H, W) without gaps, channels next to each other. The stride of a dimension of 1 does not matter.
inline bool is_dense_channels_last(const Tensor& given) {
  int64_t stride = 1;
  for (const int axis : {1, 3, 2, 0}) {
    if (given.size(axis) != 1) {
      if (given.stride(axis) != stride) {
        return false;
      }
      stride *= given.size(axis);
    }
  }
  return true;
}

// As it is where it is that, else a copy which is.
inline Tensor dense_channels_last(const Tensor& given) {
  return is_dense_channels_last(given) ? given : copied_channels_last(given);
}

// Numbers that are read one after the other, where there are any.
class DenseNumbers {
 public:
  explicit DenseNumbers(const std::optional<Tensor>& numbers)
      : held_(numbers ? std::optional(torch::stable::contiguous(*numbers)) : std::nullopt) {}

  const float* data() const { return held_ ? static_cast<const float*>(held_->const_data_ptr()) : nullptr; }

 private:
  std::optional<Tensor> held_;
};

}  // namespace efficientad_fast
