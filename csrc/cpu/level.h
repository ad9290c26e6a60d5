// Instruction sets: a kernel's source is compiled once for each (for_each_level.h), and the processor chooses at run time.

#pragma once

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define EFFICIENTAD_FAST_X86_LEVELS 1
#endif

namespace efficientad_fast {

enum class Level { baseline, avx2, avx512 };

// The best that this processor has, or a lower one where EFFICIENTAD_FAST_CPU_LEVEL names it when the first kernel runs:
// baseline, avx2, avx512.
Level level();

}  // namespace efficientad_fast

// Calls FUNCTION of the namespace that was compiled for level().
#ifdef EFFICIENTAD_FAST_X86_LEVELS
#define EFFICIENTAD_FAST_DISPATCH(FUNCTION, ...)                                                      \
  (::efficientad_fast::level() == ::efficientad_fast::Level::avx512 ? avx512_level::FUNCTION(__VA_ARGS__) \
   : ::efficientad_fast::level() == ::efficientad_fast::Level::avx2 ? avx2_level::FUNCTION(__VA_ARGS__)   \
                                                                    : baseline_level::FUNCTION(__VA_ARGS__))
#else
#define EFFICIENTAD_FAST_DISPATCH(FUNCTION, ...) baseline_level::FUNCTION(__VA_ARGS__)
#endif
