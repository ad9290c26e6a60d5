// identity(x): a contiguous copy of x. The template for the next operators.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace {

using torch::stable::Tensor;

// Below this many bytes per thread, starting a thread costs more than it saves.
constexpr int64_t kGrainBytes = 64 * 1024;

Tensor identity(const Tensor& x) {
  STD_TORCH_CHECK(x.is_cpu(), "identity: expected x on the CPU; move it there or call the operator of its device");
  Tensor out = torch::stable::new_empty(x, x.sizes());
  const int64_t bytes = x.numel() * static_cast<int64_t>(x.element_size());
  if (bytes == 0) {
    return out;
  }
  const Tensor source = torch::stable::contiguous(x);
  const std::byte* from = static_cast<const std::byte*>(source.const_data_ptr());
  std::byte* to = static_cast<std::byte*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, bytes, kGrainBytes, [from, to](int64_t begin, int64_t end) {
    std::memcpy(to + begin, from + begin, static_cast<std::size_t>(end - begin));
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(efficientad_fast, CPU, m) { m.impl("identity", TORCH_BOX(&identity)); }
STABLE_TORCH_LIBRARY_IMPL(efficientad_fast_cpu, CPU, m) { m.impl("identity", TORCH_BOX(&identity)); }
