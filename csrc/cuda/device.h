// The device language of every kernel header: CUDA's own under nvcc, the emulator's (csrc/simt/) under a host compiler.

#pragma once

#ifdef EFFICIENTAD_FAST_SIMT

#include "../simt/device.h"

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <utility>

// Declares `T* name`, the block's dynamic shared memory, aligned to 128 bytes.
#define EFFICIENTAD_FAST_DYNAMIC_SHARED(T, name)                                \
  extern __shared__ __align__(128) unsigned char efficientad_fast_dynamic_shared[]; \
  T* const name = reinterpret_cast<T*>(efficientad_fast_dynamic_shared)

namespace efficientad_fast::cuda {

// Launches `kernel`. The caller checks with STD_CUDA_KERNEL_LAUNCH_CHECK, which also sees a refused attribute.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t dynamic_shared_bytes, cudaStream_t stream,
            Arguments&&... arguments) {
  constexpr std::size_t kGrantedUnasked = 48 * 1024;
  if (dynamic_shared_bytes > kGrantedUnasked) {
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(dynamic_shared_bytes));
  }
  kernel<<<grid, block, dynamic_shared_bytes, stream>>>(std::forward<Arguments>(arguments)...);
}

// How many blocks of `kernel` a multiprocessor has room for at once, by the code that this GPU runs of it.
template <typename... Parameters>
int resident_blocks(void (*kernel)(Parameters...), int threads, std::size_t dynamic_shared_bytes) {
  int count = 0;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel, threads, dynamic_shared_bytes);
  return count;
}

}  // namespace efficientad_fast::cuda

#endif
