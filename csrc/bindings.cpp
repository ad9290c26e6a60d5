// `efficientad_fast._C`: how the package was compiled and what this processor can do. No PyTorch headers.

#include <pybind11/pybind11.h>

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["version"] = EFFICIENTAD_FAST_VERSION;
#if defined(__clang__)
  info["compiler"] = __VERSION__;
#elif defined(__GNUC__)
  info["compiler"] = "GCC " __VERSION__;
#else
  info["compiler"] = "unknown";
#endif
  info["cpp_standard"] = static_cast<long>(__cplusplus);
  info["flags"] = EFFICIENTAD_FAST_FLAGS;
  info["python"] = PY_VERSION;
  info["pybind11"] = PYBIND11_TOSTRING(PYBIND11_VERSION_MAJOR) "." PYBIND11_TOSTRING(PYBIND11_VERSION_MINOR);
  info["torch"] = EFFICIENTAD_FAST_TORCH;
  return info;
}

// AVX-512 means the F, BW, DQ and VL parts together: that is what compilers vectorise for.
py::dict cpu_features() {
  py::dict features;
#if (defined(__x86_64__) || defined(__i386__)) && (defined(__GNUC__) || defined(__clang__))
  __builtin_cpu_init();
  features["avx2"] = __builtin_cpu_supports("avx2") != 0;
  features["fma"] = __builtin_cpu_supports("fma") != 0;
  features["avx512"] = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                       __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
  features["avx2"] = false;
  features["fma"] = false;
  features["avx512"] = false;
#endif
#if defined(__aarch64__) || defined(__ARM_NEON)
  features["neon"] = true;
#else
  features["neon"] = false;
#endif
  return features;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "How efficientad_fast was compiled, and the vector instructions of this processor.";
  m.def("build_info", &build_info, "Compiler, language standard, flags and versions, as compiled in.");
  m.def("cpu_features", &cpu_features, "Vector instruction sets of the processor that runs this: name to bool.");
}
