// preprocess on a GPU: what preprocess_kernel.h needs to know of tensors.

#include "../preprocess.h"
#include "preprocess_kernel.h"
#include "tensors.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <string>
#include <vector>

namespace efficientad_fast {

namespace {

using preprocess::kName;
using preprocess::Settings;
using torch::stable::accelerator::DeviceGuard;

void preprocess_into(const Tensor& image, const Settings& settings, Tensor& out) {
  cuda::require_side(kName, "image", "height", image.size(1));
  cuda::require_side(kName, "image", "width", image.size(2));
  cuda::require_side(kName, "size", "height", out.size(2));
  cuda::require_side(kName, "size", "width", out.size(3));
  cuda::Preprocess call{};
  call.image = image.const_data_ptr(), call.image_dtype = cuda::dtype_of(image);
  call.image_stride = image.stride(0), call.row_stride = image.stride(1);
  call.column_stride = image.stride(2), call.channel_stride = image.stride(3);
  call.images = image.size(0);
  call.rows = cuda::Axis(static_cast<int>(image.size(1)), static_cast<int>(out.size(2)));
  call.columns = cuda::Axis(static_cast<int>(image.size(2)), static_cast<int>(out.size(3)));
  call.pillow = settings.pillow;
  call.set_statistics(settings.mean, settings.std);
  call.out = out.mutable_data_ptr(), call.out_dtype = cuda::dtype_of(out);
  call.pixel_stride = static_cast<int>(preprocess::pixel_stride(out));
  cuda::require_blocks(kName, "image", call.images, cuda::preprocess_blocks(call));
  const DeviceGuard guard(image.get_device_index());
  cuda::launch_preprocess(call, cuda::current_stream(image));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void preprocess_out(const Tensor& image, std::string resize, std::vector<double> mean, std::vector<double> std,
                    Tensor out) {
  const Settings settings = preprocess::checked_settings(image, resize, mean, std, /*cuda=*/true);
  preprocess::check_output(image, out);
  preprocess_into(image, settings, out);
}

Tensor preprocess_default(const Tensor& image, std::vector<int64_t> size, std::string resize, std::vector<double> mean,
                          std::vector<double> std, bool channels_last, ScalarType dtype) {
  const Settings settings = preprocess::checked_settings(image, resize, mean, std, /*cuda=*/true);
  require_positive_size(kName, size);
  preprocess::check_dtype("dtype", dtype);
  const DeviceGuard guard(image.get_device_index());
  Tensor out = preprocess::empty_output(image, size, channels_last, dtype);
  preprocess_into(image, settings, out);
  return out;
}

}  // namespace

}  // namespace efficientad_fast

STABLE_TORCH_LIBRARY_IMPL(efficientad_fast_cuda, CUDA, m) {
  m.impl("preprocess", TORCH_BOX(&efficientad_fast::preprocess_default));
  m.impl("preprocess.out", TORCH_BOX(&efficientad_fast::preprocess_out));
}
