#include "level.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace efficientad_fast {

namespace {

Level best() {
#ifdef EFFICIENTAD_FAST_X86_LEVELS
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx2 && avx512 ? Level::avx512 : avx2 ? Level::avx2 : Level::baseline;
#else
  return Level::baseline;
#endif
}

Level chosen() {
  const Level supported = best();
  const char* wanted = std::getenv("EFFICIENTAD_FAST_CPU_LEVEL");
  if (wanted == nullptr) {
    return supported;
  }
  const Level named = std::strcmp(wanted, "baseline") == 0 ? Level::baseline
                      : std::strcmp(wanted, "avx2") == 0   ? Level::avx2
                                                           : Level::avx512;
  return std::min(named, supported);
}

}  // namespace

Level level() {
  // Once: kernels ask for each row, on threads of their own, and Python may change the environment meanwhile.
  static const Level level = chosen();
  return level;
}

}  // namespace efficientad_fast
