// How a file of kernels adds its functions to an emulator module.

#pragma once

#include "emulator.h"

#include <pybind11/pybind11.h>

namespace efficientad_fast::simt {

using Binder = void (*)(pybind11::module_&);

// Registers `binder` for when the module is imported.
struct Bindings {
  explicit Bindings(Binder binder);
};

}  // namespace efficientad_fast::simt

// EFFICIENTAD_FAST_SIMT_BINDINGS(m) { m.def(...); }, once in a file.
#define EFFICIENTAD_FAST_SIMT_BINDINGS(m)                                                                    \
  static void efficientad_fast_simt_bind(pybind11::module_& m);                                              \
  static const ::efficientad_fast::simt::Bindings efficientad_fast_simt_bindings(efficientad_fast_simt_bind); \
  static void efficientad_fast_simt_bind(pybind11::module_& m)
