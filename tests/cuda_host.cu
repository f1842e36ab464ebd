// The host code around the kernels, on a runtime and a driver that answer what a test wants: linked with --wrap by
// tests/test_cuda_host.py.
#include "cuda/device.cu"
#include "cuda/tensor_map.cuh"

#include <string_view>

namespace {

constexpr int kDevice = 3;

}  // namespace

extern "C" {

int probe_error, device_error, shared_bytes, encode_error;  // what is answered
int has_context, binds;                                     // of this thread; how often one was bound

cudaError_t __wrap_cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->sharedSizeBytes = shared_bytes;
  return static_cast<cudaError_t>(probe_error);
}

cudaError_t __wrap_cudaGetDevice(int* device) {
  *device = kDevice;
  return static_cast<cudaError_t>(device_error);
}

cudaError_t __wrap_cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  *value = attribute == cudaDevAttrMultiProcessorCount && device == kDevice ? 132 : -1;
  return cudaSuccess;
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

int ask_device(int* num_sms, int* sm90) {
  abba::DeviceInfo info;
  const int error = abba::device_info(info);
  *num_sms = info.num_sms, *sm90 = info.sm90;
  return error;
}

int describe_matrix() {
  abba::TensorMap map;
  return abba::make_tensor_map(map, {&map, 64}, 64, 64, 64);
}

}  // extern "C"
