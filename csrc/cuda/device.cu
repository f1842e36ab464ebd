// What the host asks of the CUDA runtime besides launches. The current device is meant.
#include "../launchers.h"
#include "compat.cuh"

namespace abba {
namespace {

__global__ void probe() {}

}  // namespace

DeviceInfo device_info() {
  cudaFuncAttributes attributes;
  int device = 0, multiprocessors = 0;
  const bool known = cudaFuncGetAttributes(&attributes, probe) == cudaSuccess && cudaGetDevice(&device) == cudaSuccess &&
                     cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device) == cudaSuccess;
  cudaGetLastError();  // "no code for this device" is an answer, not an error to leave behind
  if (!known) return {0, false};
  // Code for 9.0 is always that for sm_90a (build_support/cuda_toolkit.py), unless the driver made it from older PTX.
  return {multiprocessors, attributes.binaryVersion == 90 && attributes.ptxVersion == 90};
}

const char* cuda_error_name(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace abba
