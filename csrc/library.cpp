// Defines the operators. Kernels register themselves, each in a file of its own.
//
// The public namespace `efficientad_fast` must be defined exactly once: by the CPU library, or by Python
// where no CPU library is compiled. Each library adds a namespace whose operators run its kernels and no other.

#include <torch/csrc/stable/library.h>

namespace {

void define_operators(torch::stable::detail::StableLibrary& m) {
#define EFFICIENTAD_FAST_SCHEMA(...) m.def(__VA_ARGS__);
#include "schemas.inc"
#undef EFFICIENTAD_FAST_SCHEMA
}

}  // namespace

#ifdef EFFICIENTAD_FAST_CUDA
STABLE_TORCH_LIBRARY(efficientad_fast_cuda, m) { define_operators(m); }
#else
STABLE_TORCH_LIBRARY(efficientad_fast, m) { define_operators(m); }
STABLE_TORCH_LIBRARY(efficientad_fast_cpu, m) { define_operators(m); }
#endif
