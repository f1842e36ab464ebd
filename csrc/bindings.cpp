// The extension module abba_ext._C: importing it registers the operators; build_info() says how it was built.
#include <pybind11/pybind11.h>

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled operators of abba_ext; importing this module registers them as torch.ops.abba.*";
  m.def("build_info", [] {
    py::dict info;
    info["torch"] = ABBA_BUILD_TORCH;
    info["compiler"] = ABBA_BUILD_COMPILER;
    info["flags"] = ABBA_BUILD_FLAGS;
    info["cuda"] = ABBA_BUILD_CUDA;
    return info;
  }, "How this module was built: torch and compiler versions, compiler flags, CUDA architectures ('' if none).");
}
