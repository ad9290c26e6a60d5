// feature_distance on a GPU, in mixed precision: what feature_distance_kernel.h needs to know of tensors.

#include "../feature_distance.h"
#include "feature_distance_kernel.h"
#include "implicit_gemm.h"
#include "implicit_gemm_tensors.h"
#include "tensors.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <optional>

namespace efficientad_fast {

namespace {

using feature_distance::kName;
using torch::stable::accelerator::DeviceGuard;

static_assert(cuda::kWarpOutputs >= feature_distance::kFewestOutputs);  // tiles have at least those of a warp

void feature_distance_mixed(const Tensor& first, const Tensor& weight_first, std::optional<Tensor> second,
                            std::optional<Tensor> weight_second, std::optional<Tensor> scale,
                            std::optional<Tensor> bias, int64_t padding_first, int64_t padding_second, Tensor out,
                            Tensor workspace) {
  feature_distance::check_mixed(first, weight_first, second, weight_second, scale, bias, padding_first, padding_second,
                                out, workspace, /*cuda=*/true);
  cuda::require_products(kName, "first", first);
  const DeviceGuard guard(first.get_device_index());
  const cuda::Operands operands(kName, "first", first, weight_first, padding_first);
  std::optional<cuda::Operands> others;
  if (second) {
    others.emplace(kName, "second", *second, *weight_second, padding_second);
  }
  const DenseNumbers scales(scale), biases(bias);
  cuda::FeatureDistance call{};
  call.first = operands.convolution;
  call.second = others ? others->convolution : operands.convolution;
  call.paired = second.has_value();
  call.made = cuda::checked_made(kName, "first", call.first, /*pool=*/false, /*pool_padding=*/0, out);
  call.outputs = static_cast<int>(weight_first.size(0));
  call.scale = scales.data();
  call.bias = biases.data();
  call.out = static_cast<float*>(out.mutable_data_ptr());
  call.workspace = static_cast<float*>(workspace.mutable_data_ptr());
  call.workspace_size = workspace.size(0);
  call.number = cuda::number_of(first);
  call.multiprocessors = cuda::multiprocessors_of(first);
  call.shared_of_block = cuda::shared_of_block(first);
  cuda::require_blocks(kName, "first", first.size(0), cuda::feature_distance_most_blocks(call));
  if (call.made.count == 0) {
    return;
  }
  cuda::launch_feature_distance(call, cuda::current_stream(first));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor feature_distance_default(const Tensor& first, const Tensor& weight_first, std::optional<Tensor> second,
                                std::optional<Tensor> weight_second, std::optional<Tensor> bias, int64_t padding_first,
                                int64_t padding_second) {
  const auto size = feature_distance::check(first, weight_first, second, weight_second, bias, padding_first,
                                            padding_second, /*cuda=*/true);
  feature_distance::checked_depth(weight_first, weight_second);
  const DeviceGuard guard(first.get_device_index());
  Tensor out = torch::stable::new_empty(first, {first.size(0), 1, size.height, size.width});
  const int64_t numbers =
      feature_distance::mixed_workspace(first.size(0), size.height, size.width, weight_first.size(0));
  Tensor workspace = torch::stable::new_zeros(first, {numbers});
  feature_distance_mixed(first, weight_first, second, weight_second, std::nullopt, bias, padding_first, padding_second,
                         out, workspace);
  return out;
}

}  // namespace

}  // namespace efficientad_fast

STABLE_TORCH_LIBRARY_IMPL(efficientad_fast_cuda, CUDA, m) {
  m.impl("feature_distance", TORCH_BOX(&efficientad_fast::feature_distance_default));
  m.impl("feature_distance.mixed", TORCH_BOX(&efficientad_fast::feature_distance_mixed));
}
