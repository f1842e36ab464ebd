// The emulated wrappers for Python: run(name, a, b, out, blocks, threads), see wrappers.h.
#include "wrappers.h"

#include "emulation/control_bindings.h"

PYBIND11_MODULE(EMULATED_MODULE, module) {
  abba::emulation::bind_control(module);
  module.def("run", [](const std::string& name, uintptr_t a, uintptr_t b, uintptr_t out, int blocks, int threads) {
    return run_wrapper(name.c_str(), reinterpret_cast<const void*>(a), reinterpret_cast<const void*>(b),
                       reinterpret_cast<void*>(out), blocks, threads);
  });
}
