// The kernel in the emulator.

#include "ptx_check_kernel.h"
#include "simt/bindings.h"

EFFICIENTAD_FAST_SIMT_BINDINGS(m) {
  using efficientad_fast::simt::Buffer;
  namespace cuda = efficientad_fast::cuda;
  m.attr("result_bytes") = sizeof(cuda::CheckResult);
  m.def("check", [](const Buffer& numbers, const Buffer& pairs, const Buffer& results, bool has_e4m3) {
    cuda::launch_check({numbers.as<uint4>(), pairs.as<float2>(), results.as<cuda::CheckResult>()}, has_e4m3, nullptr);
  });
}
