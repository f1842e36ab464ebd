// The one place that knows whether nvcc compiles the kernels or g++ does, for the tests' emulator (ABBA_EMULATE).
//   ABBA_DEVICE                  in front of every device function
//   ABBA_DYNAMIC_SMEM(name);     the block's shared memory: unsigned char*, 1024-byte aligned
//   ABBA_LAUNCH((kernel<T, 16>), grid, block, smem_bytes, stream, arguments...)   -> cudaError_t as an int
//   ABBA_MEMSET_ASYNC(pointer, byte, bytes, stream)                               -> cudaError_t as an int
//   ABBA_SM90A                   1 in code for sm_90a, which alone has the kernels for Hopper, and in host code
#pragma once
#if defined(ABBA_EMULATE)

#include "../emulation/emulation.h"

#define ABBA_DYNAMIC_SMEM(name) unsigned char* const name = ::abba::emulation::dynamic_shared_memory()
#define ABBA_LAUNCH(kernel, grid, block, smem_bytes, stream, ...) \
  (static_cast<void>(stream), ::abba::emulation::launch(#kernel, kernel, grid, block, smem_bytes, __VA_ARGS__))
#define ABBA_MEMSET_ASYNC(pointer, byte, bytes, stream) \
  (static_cast<void>(stream), ::abba::emulation::set_memory(pointer, byte, bytes))

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace abba {

template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t smem_bytes, void* stream,
           const Arguments&... arguments) {
  constexpr size_t kWithoutAsking = 48 * 1024;  // bytes of dynamic shared memory
  if (smem_bytes > kWithoutAsking) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(smem_bytes));
    if (error != cudaSuccess) {
      cudaGetLastError();  // it is returned; nobody else should find it
      return error;
    }
  }
  kernel<<<grid, block, smem_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
  return cudaGetLastError();
}

}  // namespace abba

#define ABBA_DYNAMIC_SMEM(name) extern __shared__ __align__(1024) unsigned char name[]
#define ABBA_LAUNCH(kernel, grid, block, smem_bytes, stream, ...) \
  ::abba::launch(kernel, grid, block, smem_bytes, stream, __VA_ARGS__)
#define ABBA_MEMSET_ASYNC(pointer, byte, bytes, stream) \
  static_cast<int>(cudaMemsetAsync(pointer, byte, bytes, static_cast<cudaStream_t>(stream)))

#endif
#define ABBA_DEVICE __device__ __forceinline__

#if defined(ABBA_EMULATE) || !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define ABBA_SM90A 1
#else
#define ABBA_SM90A 0
#endif
