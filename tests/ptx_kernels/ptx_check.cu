// The kernel on a GPU: a program that reads numbers and pairs from one file and writes the results to another.

#include "ptx_check_kernel.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace {

namespace cuda = efficientad_fast::cuda;

void require(bool good, const char* what) {
  if (!good) {
    std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(cudaGetLastError()));
    std::exit(1);
  }
}

}  // namespace

int main(int count, char** arguments) {
  require(count == 3, "usage: ptx_check NUMBERS RESULTS");
  const std::size_t number_bytes = 8 * cuda::kCheckThreads * sizeof(uint4);
  const std::size_t pair_bytes = cuda::kCheckThreads * sizeof(float2);
  const std::size_t result_bytes = cuda::kCheckThreads * sizeof(cuda::CheckResult);
  std::vector<unsigned char> given(number_bytes + pair_bytes), results(result_bytes);
  std::FILE* const file = std::fopen(arguments[1], "rb");
  require(file != nullptr && std::fread(given.data(), 1, given.size(), file) == given.size(), "the file of numbers");
  std::fclose(file);
  cudaDeviceProp properties{};
  require(cudaGetDeviceProperties(&properties, 0) == cudaSuccess, "the device");
  unsigned char* memory = nullptr;
  require(cudaMalloc(&memory, given.size() + result_bytes) == cudaSuccess, "cudaMalloc");
  require(cudaMemcpy(memory, given.data(), given.size(), cudaMemcpyHostToDevice) == cudaSuccess, "the copy there");
  require(cudaMemset(memory + given.size(), 0xff, result_bytes) == cudaSuccess, "cudaMemset");
  const cuda::Check call{reinterpret_cast<const uint4*>(memory), reinterpret_cast<const float2*>(memory + number_bytes),
                         reinterpret_cast<cuda::CheckResult*>(memory + given.size())};
  cuda::launch_check(call, 10 * properties.major + properties.minor >= 89, nullptr);
  require(cudaGetLastError() == cudaSuccess && cudaDeviceSynchronize() == cudaSuccess, "the kernel");
  require(cudaMemcpy(results.data(), memory + given.size(), result_bytes, cudaMemcpyDeviceToHost) == cudaSuccess,
          "the copy back");
  std::FILE* const out = std::fopen(arguments[2], "wb");
  require(out != nullptr && std::fwrite(results.data(), 1, result_bytes, out) == result_bytes, "the file of results");
  std::fclose(out);
  return 0;
}
