// Tensors as convolution.h takes them. Host code; the stable ABI only.

#pragma once

#include "checks.h"
#include "convolution.h"
#include "layouts.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

namespace efficientad_fast::convolution {

// Images (N, C, H, W) of any strides; a copy is held where channels are not neighbours in memory.
class Images {
 public:
  Images(const Tensor& images, int64_t kernel, int64_t padding) : held_(with_channels_together(images)) {
    source.data = static_cast<const float*>(held_.const_data_ptr());
    source.image = held_.stride(0);
    source.row = held_.stride(2);
    source.pixel = held_.stride(3);
    source.channels = held_.size(1);
    source.height = held_.size(2);
    source.width = held_.size(3);
    source.kernel = kernel;
    source.padding = padding;
  }

  Source source;

 private:
  Tensor held_;
};

inline Result result_of(Tensor& out) {
  return {static_cast<float*>(out.mutable_data_ptr()), out.size(0), out.size(2), out.size(3), out.size(1)};
}

inline Packed packed_of(const Tensor& packed) {
  return {static_cast<const float*>(packed.const_data_ptr()), packed.size(1), packed.size(2), packed.size(3)};
}

inline Workspace workspace_of(Tensor& workspace) {
  return {static_cast<float*>(workspace.mutable_data_ptr()), workspace.size(0), workspace.size(1)};
}

// As many rows as there are threads.
inline Tensor new_workspace(const Tensor& like, int64_t numbers) {
  return torch::stable::new_empty(like, {static_cast<int64_t>(torch::stable::get_num_threads()), numbers});
}

// Weights (groups * outputs, channels, kernel, kernel) in packed weights of that shape; where `subtracted` is given, there
// is one group, and its convolution is taken off.
inline Tensor packed_weights(const Tensor& weight, const std::optional<Tensor>& subtracted,
                             const std::vector<int64_t>& shape) {
  Tensor packed = torch::stable::new_zeros(weight, shape);
  const Packed layout = packed_of(packed);
  float* const to = static_cast<float*>(packed.mutable_data_ptr());
  const int64_t groups = shape[0], of_group = layout.panels * layout.planes * layout.depth * kPanel;
  Weights weights;
  weights.filter = std::max(weight.size(2), subtracted ? subtracted->size(2) : 0);
  const auto pack_part = [&](const Tensor& part) {
    const Tensor dense = torch::stable::contiguous(part);
    weights.outputs = part.size(0) / groups;
    weights.channels = part.size(1);
    weights.kernel = part.size(2);
    for (int64_t group = 0; group < groups; ++group) {
      weights.data = static_cast<const float*>(dense.const_data_ptr()) + group * (part.numel() / groups);
      pack(weights, layout, to + group * of_group);
    }
  };
  pack_part(weight);
  if (subtracted) {
    weights.first = packing::depth_of(layout.planes, {{weight.size(1), weight.size(2)}});
    weights.scale = -1;
    pack_part(*subtracted);
  }
  return packed;
}

}  // namespace efficientad_fast::convolution
