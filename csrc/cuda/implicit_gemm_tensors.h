// Tensors as implicit_gemm.h takes them. Host code; the stable ABI only.

#pragma once

#include "../packing.h"
#include "implicit_gemm.h"
#include "tensors.h"

#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <optional>

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

// (N, C, H, W) as (N, H, W, C), and back.
inline Tensor channels_behind(const Tensor& images) {
  return torch::stable::transpose(torch::stable::transpose(images, 1, 2), 2, 3);
}

inline Tensor channels_in_front(const Tensor& images) {
  return torch::stable::transpose(torch::stable::transpose(images, 2, 3), 1, 2);
}

// A new dense (N, C, H, W) tensor in channels-last memory.
inline Tensor new_images(const Tensor& like, int64_t images, int64_t channels, int64_t height, int64_t width) {
  return channels_in_front(torch::stable::new_empty(like, {images, height, width, channels}));
}

// A convolution's operands; copies are held of images whose channels are not next to each other, and of weights that
// are not channels-last.
class Operands {
 public:
  Operands(const char* operator_name, const char* name, const Tensor& images, const Tensor& weight, int64_t padding)
      : images_(images), weight_(weight) {
    require_side(operator_name, name, "height", images.size(2));
    require_side(operator_name, name, "width", images.size(3));
    const bool countable = weight.size(0) < kSideLimit && weight.numel() / weight.size(0) < kSideLimit;
    EFFICIENTAD_FAST_REQUIRE(countable, operator_name, name,
                             "for weights of less than 2^30 outputs, with less than 2^30 numbers each, on a GPU",
                             shape_text(weight));
    if (images.stride(1) != 1 && images.size(1) != 1) {
      images_ = channels_in_front(torch::stable::contiguous(channels_behind(images)));
    }
    if (!packing::is_dense_channels_last(weight)) {
      weight_ = channels_in_front(torch::stable::contiguous(channels_behind(weight)));
    }
    convolution.images = images_.const_data_ptr();
    convolution.weights = weight_.const_data_ptr();
    // A side of one has any stride, which would say nothing of how pieces are aligned.
    convolution.image_stride = images_.size(0) > 1 ? images_.stride(0) : 0;
    convolution.row_stride = images_.size(2) > 1 ? images_.stride(2) : 0;
    convolution.pixel_stride = images_.size(3) > 1 ? images_.stride(3) : 0;
    convolution.height = static_cast<int>(images_.size(2));
    convolution.width = static_cast<int>(images_.size(3));
    convolution.channels = static_cast<int>(weight_.size(1));
    convolution.kernel = static_cast<int>(weight_.size(2));
    convolution.padding = static_cast<int>(padding);
  }

  Convolution convolution{};

 private:
  Tensor images_, weight_;
};

// (N, C, H, W), which a convolution with that kernel makes of `images`.
inline Made made_of(const char* operator_name, const char* name, const Tensor& images, int64_t kernel, int64_t padding,
                    bool pool, int64_t pool_padding, const Tensor& out) {
  const int64_t count = out.size(0) * out.size(2) * out.size(3);
  EFFICIENTAD_FAST_REQUIRE(count < kSideLimit, operator_name, name, "a smaller batch on a GPU", images.size(0));
  Made made{};
  made.height = static_cast<int>(images.size(2) + 2 * padding - kernel + 1);
  made.width = static_cast<int>(images.size(3) + 2 * padding - kernel + 1);
  made.out_height = static_cast<int>(out.size(2));
  made.out_width = static_cast<int>(out.size(3));
  made.count = static_cast<int>(count);
  made.pool = pool;
  made.pool_padding = static_cast<int>(pool_padding);
  return made;
}

// `numbers` that a kernel reads one after the other.
class Statistics {
 public:
  explicit Statistics(const std::optional<Tensor>& numbers)
      : held_(numbers ? std::optional(torch::stable::contiguous(*numbers)) : std::nullopt) {}

  const float* data() const { return held_ ? static_cast<const float*>(held_->const_data_ptr()) : nullptr; }

 private:
  std::optional<Tensor> held_;
};

}  // namespace efficientad_fast::cuda
