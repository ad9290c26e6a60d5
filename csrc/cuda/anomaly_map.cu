// anomaly_map on a GPU: what anomaly_map_kernel.h needs to know of tensors.

#include "../anomaly_map.h"
#include "anomaly_map_kernel.h"
#include "tensors.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace efficientad_fast {

namespace {

using anomaly_map::kName;
using torch::stable::accelerator::DeviceGuard;

cuda::RawMap raw_map(const Tensor& map) {
  return {map.const_data_ptr(), cuda::dtype_of(map), map.stride(0), map.stride(2), map.stride(3)};
}

void anomaly_map_out(const Tensor& map_st, const Tensor& map_ae, std::optional<std::vector<double>> quantiles,
                     int64_t border, std::string convention, Tensor out, Tensor score) {
  anomaly_map::check_maps(map_st, map_ae, /*cuda=*/true);
  anomaly_map::check_outputs(map_st, map_ae, out, score);
  const auto folded = anomaly_map::checked_coefficients(quantiles, border, convention);
  cuda::require_side(kName, "border", "one side", border);
  cuda::require_side(kName, "map_st", "height and border", map_st.size(2) + 2 * border);
  cuda::require_side(kName, "map_st", "width and border", map_st.size(3) + 2 * border);
  cuda::require_side(kName, "size", "height", out.size(2));
  cuda::require_side(kName, "size", "width", out.size(3));
  const cuda::AnomalyMap call{raw_map(map_st),
                              raw_map(map_ae),
                              map_st.size(0),
                              static_cast<int>(map_st.size(2)),
                              static_cast<int>(map_st.size(3)),
                              static_cast<int>(border),
                              static_cast<int>(out.size(2)),
                              static_cast<int>(out.size(3)),
                              folded.st,
                              folded.ae,
                              folded.inside,
                              folded.outside,
                              out.mutable_data_ptr(),
                              score.mutable_data_ptr()};
  cuda::require_blocks(kName, "map_st", call.images, cuda::anomaly_map_blocks(call, cuda::kMapMaxRows));
  const DeviceGuard guard(map_st.get_device_index());
  cuda::launch_anomaly_map(call, cuda::current_stream(map_st));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

std::tuple<Tensor, Tensor> anomaly_map_default(const Tensor& map_st, const Tensor& map_ae, std::vector<int64_t> size,
                                               std::optional<std::vector<double>> quantiles, int64_t border,
                                               std::string convention) {
  anomaly_map::check_maps(map_st, map_ae, /*cuda=*/true);
  require_positive_size(kName, size);
  const DeviceGuard guard(map_st.get_device_index());
  const ScalarType dtype = anomaly_map::result_dtype(map_st, map_ae);
  Tensor out = torch::stable::new_empty(map_st, {map_st.size(0), 1, size[0], size[1]}, dtype);
  Tensor score = torch::stable::new_empty(map_st, {map_st.size(0)}, dtype);
  anomaly_map_out(map_st, map_ae, std::move(quantiles), border, std::move(convention), out, score);
  return {out, score};
}

std::tuple<Tensor, Tensor, Tensor> anomaly_map_drop_in(const Tensor& map_st, const Tensor& map_ae,
                                                       std::optional<Tensor> st_quantiles,
                                                       std::optional<Tensor> ae_quantiles) {
  anomaly_map::check_drop_in(map_st, map_ae, st_quantiles, ae_quantiles, /*cuda=*/true);
  const DeviceGuard guard(map_st.get_device_index());
  const auto empty = [&](ScalarType dtype) { return torch::stable::new_empty(map_st, map_st.sizes(), dtype); };
  Tensor combined = empty(anomaly_map::promoted(map_st.scalar_type(), map_ae.scalar_type()));
  Tensor st_result = empty(map_st.scalar_type()), ae_result = empty(map_ae.scalar_type());
  if (map_st.numel() == 0) {
    return {combined, st_result, ae_result};
  }
  const Tensor st = torch::stable::contiguous(map_st), ae = torch::stable::contiguous(map_ae);
  cuda::DropIn call{};
  call.st = st.const_data_ptr(), call.st_dtype = cuda::dtype_of(st);
  call.ae = ae.const_data_ptr(), call.ae_dtype = cuda::dtype_of(ae);
  call.st_result = st_result.mutable_data_ptr(), call.ae_result = ae_result.mutable_data_ptr();
  call.combined = combined.mutable_data_ptr(), call.combined_dtype = cuda::dtype_of(combined);
  if (st_quantiles) {
    call.st_quantiles = st_quantiles->const_data_ptr();
    call.st_quantile_dtype = cuda::dtype_of(*st_quantiles), call.st_quantile_stride = st_quantiles->stride(0);
  }
  if (ae_quantiles) {
    call.ae_quantiles = ae_quantiles->const_data_ptr();
    call.ae_quantile_dtype = cuda::dtype_of(*ae_quantiles), call.ae_quantile_stride = ae_quantiles->stride(0);
  }
  call.count = map_st.numel();
  cuda::launch_drop_in(call, cuda::current_stream(map_st));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {combined, st_result, ae_result};
}

}  // namespace

}  // namespace efficientad_fast

STABLE_TORCH_LIBRARY_IMPL(efficientad_fast_cuda, CUDA, m) {
  m.impl("anomaly_map", TORCH_BOX(&efficientad_fast::anomaly_map_default));
  m.impl("anomaly_map.out", TORCH_BOX(&efficientad_fast::anomaly_map_out));
  m.impl("anomaly_map.drop_in", TORCH_BOX(&efficientad_fast::anomaly_map_drop_in));
}
