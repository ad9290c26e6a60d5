// What implicit_gemm.h is told of tensors, from their sizes and strides. Host code without framework types.

#pragma once

#include "implicit_gemm.h"

#include <cstdint>

namespace efficientad_fast::cuda {

// images: (N, C, H, W), channels next to each other; weights: (outputs, channels, k, k), dense and channels-last.
template <typename Numbers>
Convolution convolution_of(const void* images, const Numbers& sizes, const Numbers& strides, const void* weights,
                           const Numbers& weight_sizes, int64_t padding) {
  // A side of one has any stride, which would say nothing of how pieces are aligned.
  const auto stride = [&](int axis) { return sizes[axis] > 1 ? strides[axis] : 0; };
  Convolution convolution{};
  convolution.images = images;
  convolution.weights = weights;
  convolution.image_stride = stride(0);
  convolution.row_stride = stride(2);
  convolution.pixel_stride = stride(3);
  convolution.height = static_cast<int>(sizes[2]);
  convolution.width = static_cast<int>(sizes[3]);
  convolution.channels = static_cast<int>(weight_sizes[1]);
  convolution.kernel = static_cast<int>(weight_sizes[2]);
  convolution.padding = static_cast<int>(padding);
  return convolution;
}

// out_sizes: (N, outputs, h, w) of the result, pooled where it is; of fewer than 2^31 pixels.
template <typename Numbers>
Made made_of(const Convolution& from, const Numbers& out_sizes, bool pool, int64_t pool_padding) {
  Made made{};
  made.height = from.height + 2 * from.padding - from.kernel + 1;
  made.width = from.width + 2 * from.padding - from.kernel + 1;
  made.out_height = static_cast<int>(out_sizes[2]);
  made.out_width = static_cast<int>(out_sizes[3]);
  made.count = static_cast<int>(out_sizes[0] * out_sizes[2] * out_sizes[3]);
  made.pool = pool;
  made.pool_padding = static_cast<int>(pool_padding);
  return made;
}

}  // namespace efficientad_fast::cuda
