// What the host asks of the CUDA runtime besides launches. The current device is meant.
#include "../launchers.h"
#include "compat.cuh"

namespace abba {
namespace {

// Only asked about, never launched: its shared memory tells code for sm_90a from other code that runs on Hopper.
constexpr size_t kSm90Mark = 4096;
__global__ void probe() {
#if ABBA_SM90A
  __shared__ volatile unsigned char mark[kSm90Mark];
  mark[threadIdx.x] = 0;
#endif
}

bool is_without_code(cudaError_t error) {
  return error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction ||
         error == cudaErrorUnsupportedPtxVersion;
}

}  // namespace

int device_info(DeviceInfo& info) {
  info = {0, false};
  cudaFuncAttributes attributes;
  int device = 0;
  cudaError_t error = cudaFuncGetAttributes(&attributes, probe);
  if (error == cudaSuccess) {
    info.sm90 = attributes.sharedSizeBytes >= kSm90Mark;
    error = cudaGetDevice(&device);
  }
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&info.num_sms, cudaDevAttrMultiProcessorCount, device);
  cudaGetLastError();  // it is returned; nobody else should find it
  return is_without_code(error) ? cudaSuccess : error;
}

std::string cuda_error(int error) {
  const cudaError_t code = static_cast<cudaError_t>(error);
  return std::string(cudaGetErrorName(code)) + " (" + cudaGetErrorString(code) + ")";
}

}  // namespace abba
