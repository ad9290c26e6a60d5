// Includes the file EFFICIENTAD_FAST_KERNEL once per instruction set, each time inside a namespace of its own:
// baseline_level, avx2_level, avx512_level. The file holds functions alone; what it needs is included before this.
// No include guard: a source file may do this for several kernels.

namespace baseline_level {
#include EFFICIENTAD_FAST_KERNEL
}

#ifdef EFFICIENTAD_FAST_X86_LEVELS

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace avx2_level {
#include EFFICIENTAD_FAST_KERNEL
}
#ifdef __clang__
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif
namespace avx512_level {
#include EFFICIENTAD_FAST_KERNEL
}
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
#undef EFFICIENTAD_FAST_KERNEL
