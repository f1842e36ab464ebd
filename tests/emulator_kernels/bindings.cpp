// The emulator's self-check for Python: run(name, pointers, sizes), see kernels.h.
#include "kernels.h"

#include "emulation/control_bindings.h"

PYBIND11_MODULE(EMULATED_MODULE, module) {
  abba::emulation::bind_control(module);
  module.def("run", [](const std::string& name, const std::vector<uintptr_t>& pointers, const std::vector<int>& sizes) {
    abba::run_kernel(name, pointers, sizes);
  });
}
