// Kernels that are right, and show what the emulator makes of CUDA C++.

#include "cuda/device.h"
#include "simt/bindings.h"

namespace {

using efficientad_fast::cuda::launch;
using efficientad_fast::simt::Buffer;

__global__ void scale(const float* in, float* out, int count, float factor) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < count) {
    out[i] = in[i] * factor;
  }
}

}  // namespace

EFFICIENTAD_FAST_SIMT_BINDINGS(m) {
  m.def("scale", [](const Buffer& in, const Buffer& out, int count, float factor, int threads) {
    launch(scale, (count + threads - 1) / threads, threads, 0, nullptr, in.as<float>(), out.as<float>(), count, factor);
  });
}
