// The emulator as a Python module, with the functions of what it is linked with. tests/simt_build.py compiles it.

#include "bindings.h"

#include <pybind11/stl.h>

#include <vector>

namespace py = pybind11;
namespace simt = efficientad_fast::simt;

namespace efficientad_fast::simt {
namespace {

std::vector<Binder>& binders() {
  static std::vector<Binder> all;
  return all;
}

}  // namespace

Bindings::Bindings(Binder binder) { binders().push_back(binder); }

}  // namespace efficientad_fast::simt

PYBIND11_MODULE(emulated, m) {
  m.doc() = "CUDA C++ kernels in the emulator of csrc/simt.";
  py::register_local_exception<simt::KernelError>(m, "KernelError", PyExc_RuntimeError);

  py::class_<simt::Buffer>(m, "Buffer", py::module_local(), "Device memory: a copy of `nbytes` bytes at `pointer`.")
      .def(py::init([](std::string name, std::uintptr_t pointer, std::size_t nbytes, bool writable, bool initialised) {
             return new simt::Buffer(std::move(name), reinterpret_cast<void*>(pointer), nbytes, writable, initialised);
           }),
           py::arg("name"), py::arg("pointer"), py::arg("nbytes"), py::kw_only(), py::arg("writable") = false,
           py::arg("initialised") = true)
      .def("download", &simt::Buffer::download, "Copies what is initialised or was written back to `pointer`.")
      .def_property_readonly("unwritten", &simt::Buffer::unwritten, "Bytes that are neither initialised nor written.")
      .def_property_readonly("writable", &simt::Buffer::writable)
      .def_property_readonly("name", &simt::Buffer::name);

  m.def(
      "configure",
      [](int threads, std::uint64_t order) {
        simt::settings() = {threads, order};
      },
      py::kw_only(), py::arg("threads") = 1, py::arg("order") = 0,
      "System threads that run blocks, and the seed of the order of blocks and threads (0: by index).");
  m.def(
      "take_counts",
      [] {
        const simt::Counts counts = simt::take_counts();
        return py::dict(py::arg("accesses") = counts.accesses, py::arg("switches") = counts.switches,
                        py::arg("blocks") = counts.blocks);
      },
      "Accesses, switches of threads and blocks since the last call.");
  m.def("unguarded_shared_variables", &simt::unguarded_shared_variables,
        "Pairs of shared variables so close that an access past the first is not noticed.");
  for (const simt::Binder bind : efficientad_fast::simt::binders()) {
    bind(m);
  }
}
