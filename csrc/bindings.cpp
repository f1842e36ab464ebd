// The extension module abba_ext._C: importing it registers the operators; build_info() says how it was built.
#include <pybind11/pybind11.h>

#include <string>

#include "cuda_backend.h"

namespace py = pybind11;

namespace {

abba::ScalarType dtype(const std::string& name) {
  if (name == "bfloat16") return abba::ScalarType::BFloat16;
  if (name == "float16") return abba::ScalarType::Half;
  return name == "float64" ? abba::ScalarType::Double : abba::ScalarType::Float;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled operators of abba_ext; importing this module registers them as torch.ops.abba.*";
  m.def("uncovered_by_cuda", [](const std::string& activations, const std::string& factors, int64_t r1, int64_t r2, int device) {
    return abba::cuda::uncovered(dtype(activations), dtype(factors), r1, r2, device);
  }, "Why no CUDA kernel covers such a call; '' if one does.");
  m.def("takes_sm90", &abba::cuda::takes_sm90, "Whether the kernels for Hopper take such a call, if a CUDA kernel covers it.");
  m.def("build_info", [] {
    py::dict info;
    info["torch"] = ABBA_BUILD_TORCH;
    info["compiler"] = ABBA_BUILD_COMPILER;
    info["flags"] = ABBA_BUILD_FLAGS;
    info["cuda"] = ABBA_BUILD_CUDA;
    info["nvcc"] = ABBA_BUILD_NVCC;
    return info;
  }, "How this module was built: torch and compilers, compiler flags, CUDA architectures ('' if none).");
}
