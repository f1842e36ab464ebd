// The host code around the kernels, on a runtime and a driver that answer what a test wants: linked with --wrap by
// tests/test_cuda_host.py.
#include "cuda/tensor_map.cuh"

#include <string_view>

namespace {

constexpr int kDevice = 3;

}  // namespace

extern "C" {

int device_error, encode_error;  // what is answered
int has_context, binds;            // of this thread; how often one was bound

cudaError_t __wrap_cudaGetDevice(int* device) {
  *device = kDevice;
  return static_cast<cudaError_t>(device_error);
}

cudaError_t __wrap_cudaSetDevice(int device) {
  ++binds;
  has_context = device == kDevice;
  return cudaSuccess;
}

static CUresult current_context(CUcontext* context) {
  *context = has_context ? reinterpret_cast<CUcontext>(&has_context) : nullptr;
  return CUDA_SUCCESS;
}

static CUresult encode(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                       const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                       CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  return has_context ? static_cast<CUresult>(encode_error) : CUDA_ERROR_INVALID_CONTEXT;
}

static cudaError_t find(const char* name, void** function, cudaDriverEntryPointQueryResult* result) {
  const bool is_encode = std::string_view(name) == "cuTensorMapEncodeTiled";
  *function = is_encode ? reinterpret_cast<void*>(encode) : reinterpret_cast<void*>(current_context);
  *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

cudaError_t __wrap_cudaGetDriverEntryPoint(const char* name, void** function, unsigned long long,
                                           cudaDriverEntryPointQueryResult* result) {
  return find(name, function, result);
}

cudaError_t __wrap_cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                                    cudaDriverEntryPointQueryResult* result) {
  return find(name, function, result);
}

int describe_matrix() {
  abba::TensorMap map;
  return abba::make_tensor_map(map, {&map, 64}, 64, 64, 64);
}

}  // extern "C"
