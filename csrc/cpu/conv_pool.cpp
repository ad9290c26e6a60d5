// conv_pool on the CPU; convolution.h does the work.

#include "conv_pool.h"

#include "convolution_tensors.h"

#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <optional>
#include <string>

namespace efficientad_fast {

namespace {

using namespace convolution;

void run(const Tensor& input, const Tensor& packed, const std::optional<Tensor>& bias, int64_t kernel_size,
         int64_t padding, bool relu, bool pool, int64_t pool_padding, int64_t groups, Tensor& out, Tensor& workspace) {
  Images images(input, kernel_size, padding);
  images.source.channels /= groups;
  const DenseNumbers biases(bias);
  convolve(images.source, groups, /*stride=*/1, packed_of(packed), {biases.data(), relu, pool, pool_padding},
           result_of(out), workspace_of(workspace));
}

void conv_pool_out(const Tensor& input, const Tensor& packed, std::optional<Tensor> bias, int64_t kernel_size,
                   int64_t padding, bool relu, bool pool, int64_t pool_padding, int64_t groups, Tensor out,
                   Tensor workspace) {
  conv_pool::check_outputs(input, packed, bias, kernel_size, padding, pool, pool_padding, groups, out, workspace,
                           /*cuda=*/false);
  run(input, packed, bias, kernel_size, padding, relu, pool, pool_padding, groups, out, workspace);
}

Tensor conv_pool_pack(const Tensor& weight, int64_t groups, std::string algorithm) {
  return packed_weights(weight, std::nullopt, conv_pool::check_pack(weight, groups, algorithm, /*cuda=*/false));
}

Tensor conv_pool_default(const Tensor& input, const Tensor& weight, std::optional<Tensor> bias, int64_t padding,
                         bool relu, bool pool, int64_t pool_padding, int64_t groups) {
  const auto size = conv_pool::check(input, weight, bias, padding, pool, pool_padding, groups, /*cuda=*/false);
  Tensor out = new_channels_last(input, input.size(0), weight.size(0), size.height, size.width);
  Tensor workspace = new_workspace(input, kWorkspace);
  run(input, conv_pool_pack(weight, groups, "auto"), bias, weight.size(2), padding, relu, pool, pool_padding, groups, out,
      workspace);
  return out;
}

}  // namespace

}  // namespace efficientad_fast

#define EFFICIENTAD_FAST_REGISTER(library)                                     \
  STABLE_TORCH_LIBRARY_IMPL(library, CPU, m) {                                 \
    m.impl("conv_pool", TORCH_BOX(&efficientad_fast::conv_pool_default));      \
    m.impl("conv_pool.out", TORCH_BOX(&efficientad_fast::conv_pool_out));      \
    m.impl("conv_pool.pack", TORCH_BOX(&efficientad_fast::conv_pool_pack));    \
  }
EFFICIENTAD_FAST_REGISTER(efficientad_fast)
EFFICIENTAD_FAST_REGISTER(efficientad_fast_cpu)
