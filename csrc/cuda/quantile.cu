// quantile on a GPU: what quantile_kernel.h needs to know of tensors.

#include "../quantile.h"
#include "quantile_kernel.h"
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

using torch::stable::accelerator::DeviceGuard;

static_assert(sizeof(cuda::QuantileSelection) == quantile::kWorkspace * sizeof(int64_t));

void quantile_out(const Tensor& values, std::vector<double> fractions, Tensor out, Tensor workspace) {
  quantile::check(values, fractions, /*cuda=*/true);
  quantile::check_outputs(values, fractions, out, workspace);
  const DeviceGuard guard(values.get_device_index());
  if (fractions.empty()) {
    return;
  }
  const Tensor dense = torch::stable::contiguous(values);
  cuda::Quantile call{};
  call.values = static_cast<const float*>(dense.const_data_ptr());
  call.count = dense.numel();
  call.out = static_cast<float*>(out.mutable_data_ptr());
  call.selection = static_cast<cuda::QuantileSelection*>(workspace.mutable_data_ptr());
  cuda::launch_quantile(call, fractions.data(), static_cast<int64_t>(fractions.size()), cuda::current_stream(values));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor quantile_default(const Tensor& values, std::vector<double> fractions) {
  quantile::check(values, fractions, /*cuda=*/true);
  const DeviceGuard guard(values.get_device_index());
  Tensor out = torch::stable::new_empty(values, {static_cast<int64_t>(fractions.size())});
  Tensor workspace = torch::stable::new_empty(values, {quantile::kWorkspace}, ScalarType::Long);
  quantile_out(values, std::move(fractions), out, workspace);
  return out;
}

void quantile_count(const Tensor& values, std::vector<int64_t> prefixes, Tensor counts) {
  quantile::check_count(values, prefixes, counts, /*cuda=*/true);
  const DeviceGuard guard(values.get_device_index());
  const Tensor dense = torch::stable::contiguous(values);
  cuda::QuantileCount call{};
  call.values = static_cast<const float*>(dense.const_data_ptr());
  call.count = dense.numel();
  call.counts = static_cast<unsigned long long*>(counts.mutable_data_ptr());
  cuda::launch_quantile_count(call, prefixes.data(), static_cast<int64_t>(prefixes.size()),
                              cuda::current_stream(values));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

}  // namespace efficientad_fast

STABLE_TORCH_LIBRARY_IMPL(efficientad_fast_cuda, CUDA, m) {
  m.impl("quantile", TORCH_BOX(&efficientad_fast::quantile_default));
  m.impl("quantile.out", TORCH_BOX(&efficientad_fast::quantile_out));
  m.impl("quantile.count", TORCH_BOX(&efficientad_fast::quantile_count));
}
