// Includes the file EFFICIENTAD_FAST_KERNEL once per instruction set, each time inside a namespace of its own:
// baseline_level, avx2_level, avx512_level. The file holds functions alone; what it needs is included before this.
// No include guard: a source file may do this for several kernels. It sees EFFICIENTAD_FAST_LANES, how many floats a
// vector has, and EFFICIENTAD_FAST_REGISTERS, how many vectors the processor holds.

#define EFFICIENTAD_FAST_LANES 4
#ifdef EFFICIENTAD_FAST_X86_LEVELS
#define EFFICIENTAD_FAST_REGISTERS 16
#else
#define EFFICIENTAD_FAST_REGISTERS 32
#endif
namespace baseline_level {
#include EFFICIENTAD_FAST_KERNEL
}
#undef EFFICIENTAD_FAST_LANES
#undef EFFICIENTAD_FAST_REGISTERS

#ifdef EFFICIENTAD_FAST_X86_LEVELS

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define EFFICIENTAD_FAST_LANES 8
#define EFFICIENTAD_FAST_REGISTERS 16
namespace avx2_level {
#include EFFICIENTAD_FAST_KERNEL
}
#undef EFFICIENTAD_FAST_LANES
#undef EFFICIENTAD_FAST_REGISTERS
#ifdef __clang__
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif
#define EFFICIENTAD_FAST_LANES 16
#define EFFICIENTAD_FAST_REGISTERS 32
namespace avx512_level {
#include EFFICIENTAD_FAST_KERNEL
}
#undef EFFICIENTAD_FAST_LANES
#undef EFFICIENTAD_FAST_REGISTERS
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
#undef EFFICIENTAD_FAST_KERNEL
