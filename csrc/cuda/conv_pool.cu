// conv_pool on a GPU, in mixed precision: what conv_pool_kernel.h needs to know of tensors.

#include "../conv_pool.h"
#include "conv_pool_kernel.h"
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

using conv_pool::kName;
using torch::stable::accelerator::DeviceGuard;

void conv_pool_mixed(const Tensor& input, const Tensor& weight, std::optional<Tensor> scale, std::optional<Tensor> bias,
                     int64_t padding, bool relu, bool pool, int64_t pool_padding, int64_t groups, Tensor out) {
  conv_pool::check_mixed(input, weight, scale, bias, padding, pool, pool_padding, groups, out, /*cuda=*/true);
  cuda::require_products(kName, "input", input);
  cuda::require_products(kName, "out", out);
  const DeviceGuard guard(input.get_device_index());
  const cuda::Operands operands(kName, "input", input, weight, padding);
  const DenseNumbers scales(scale), biases(bias);
  cuda::ConvPool call{};
  call.convolution = operands.convolution;
  call.made = cuda::checked_made(kName, "input", call.convolution, pool, pool_padding, out);
  call.groups = static_cast<int>(groups);
  call.group_outputs = static_cast<int>(weight.size(0) / groups);
  call.scale = scales.data();
  call.bias = biases.data();
  call.relu = relu;
  call.out = out.mutable_data_ptr();
  call.number = cuda::number_of(input);
  call.out_number = cuda::number_of(out);
  call.multiprocessors = cuda::multiprocessors_of(input);
  call.shared_of_block = cuda::shared_of_block(input);
  cuda::require_blocks(kName, "input", input.size(0), cuda::conv_pool_most_blocks(call));
  if (call.made.count == 0) {
    return;
  }
  cuda::launch_conv_pool(call, cuda::current_stream(input));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor conv_pool_default(const Tensor& input, const Tensor& weight, std::optional<Tensor> bias, int64_t padding,
                         bool relu, bool pool, int64_t pool_padding, int64_t groups) {
  const auto size = conv_pool::check(input, weight, bias, padding, pool, pool_padding, groups, /*cuda=*/true);
  packing::checked_planes(kName, "auto", {{weight.size(1), weight.size(2)}});
  const DeviceGuard guard(input.get_device_index());
  Tensor out = new_channels_last(input, input.size(0), weight.size(0), size.height, size.width);
  conv_pool_mixed(input, weight, std::nullopt, bias, padding, relu, pool, pool_padding, groups, out);
  return out;
}

}  // namespace

}  // namespace efficientad_fast

STABLE_TORCH_LIBRARY_IMPL(efficientad_fast_cuda, CUDA, m) {
  m.impl("conv_pool", TORCH_BOX(&efficientad_fast::conv_pool_default));
  m.impl("conv_pool.mixed", TORCH_BOX(&efficientad_fast::conv_pool_mixed));
}
