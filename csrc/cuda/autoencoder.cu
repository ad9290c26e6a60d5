// autoencoder on a GPU: what autoencoder_kernel.h needs to know of tensors.

#include "../autoencoder.h"
#include "autoencoder_kernel.h"
#include "tensors.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <utility>
#include <vector>

namespace efficientad_fast {

namespace {

using autoencoder::kName;
using torch::stable::accelerator::DeviceGuard;

void autoencoder_mixed(const Tensor& image, std::vector<Tensor> weights, std::vector<Tensor> biases, Tensor out,
                       Tensor workspace) {
  const std::vector<int64_t> channels =
      autoencoder::check_mixed(image, weights, biases, out, workspace, /*cuda=*/true);
  const auto layers = autoencoder::layers(image.size(2), image.size(3), {out.size(2), out.size(3)});
  cuda::require_side(kName, "image", "height", image.size(2));
  cuda::require_side(kName, "image", "width", image.size(3));
  for (int64_t index = 0; index < autoencoder::kLayers; ++index) {
    const int64_t numbers = layers[index].out_height * layers[index].out_width * channels[index];
    EFFICIENTAD_FAST_REQUIRE(numbers <= cuda::kBlockLimit, kName, "image",
                             "of fewer pixels on a GPU: no layer may write more than 2^31 numbers of one", numbers);
  }
  for (const auto& [name, given] : {std::pair<const char*, const Tensor&>{"image", image}, {"out", out}}) {
    if (given.scalar_type() != ScalarType::Float) {  // for which there is a plain way
      cuda::require_products(kName, name, given);
    }
  }
  const DeviceGuard guard(image.get_device_index());
  if (image.size(0) == 0) {
    return;
  }
  const Tensor read = with_channels_together(image);
  cuda::Autoencoder call{};
  call.image = read.const_data_ptr();
  call.image_stride = read.stride(0), call.row_stride = read.stride(2), call.pixel_stride = read.stride(3);
  call.images = read.size(0), call.height = read.size(2), call.width = read.size(3), call.channels = read.size(1);
  std::vector<Tensor> kept;  // until the launches have been made
  for (int64_t index = 0; index < autoencoder::kLayers; ++index) {
    kept.push_back(dense_channels_last(weights[index]));
    call.weights[index] = kept.back().const_data_ptr();
    kept.push_back(torch::stable::contiguous(biases[index]));
    call.biases[index] = static_cast<const float*>(kept.back().const_data_ptr());
    call.outputs[index] = channels[index];
  }
  call.dtype = cuda::dtype_of(image);
  call.workspace = workspace.mutable_data_ptr();
  call.out = out.mutable_data_ptr();
  call.out_height = out.size(2), call.out_width = out.size(3);
  call.narrow = out.scalar_type() == ScalarType::Float8_e4m3fn;
  cuda::launch_autoencoder(call, cuda::current_stream(image));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

}  // namespace efficientad_fast

STABLE_TORCH_LIBRARY_IMPL(efficientad_fast_cuda, CUDA, m) {
  m.impl("autoencoder.mixed", TORCH_BOX(&efficientad_fast::autoencoder_mixed));
}
