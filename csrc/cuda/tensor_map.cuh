// Host side of TMA: descriptions of the matrices that it copies.
#pragma once
#include "../launchers.h"
#include "ptx_sm90.cuh"

namespace abba {

#if !defined(ABBA_EMULATE)

// A function of the driver, without linking to it; null if it has none of that name.
template <typename Function>
Function driver_function(const char* name) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
  const cudaError_t error = cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &result);
#else
  const cudaError_t error = cudaGetDriverEntryPoint(name, &found, cudaEnableDefault, &result);
#endif
  return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<Function>(found) : nullptr;
}

// The driver wants a current context; the runtime, which gives each thread one when it needs it, may not have needed it yet.
inline cudaError_t need_context() {
  static const auto current = driver_function<decltype(&cuCtxGetCurrent)>("cuCtxGetCurrent");
  CUcontext context = nullptr;
  if (current && current(&context) == CUDA_SUCCESS && context) return cudaSuccess;
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  return error == cudaSuccess ? cudaSetDevice(device) : error;
}

#endif

// The rows [num_rows, num_columns] of two-byte elements, in boxes of box_rows by 64. Returns a cudaError_t.
inline int make_tensor_map(TensorMap& map, const Rows& rows, int64_t num_rows, int64_t num_columns, int box_rows) {
#if defined(ABBA_EMULATE)
  map = emulation::tensor_map(rows.data, num_columns, num_rows, 2 * rows.stride, box_rows);
  return 0;
#else
  static const auto encode = driver_function<decltype(&cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled");
  if (!encode) return cudaErrorNotSupported;
  if (const cudaError_t error = need_context()) return error;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(num_columns), static_cast<cuuint64_t>(num_rows)};
  const cuuint64_t strides[1] = {2 * static_cast<cuuint64_t>(rows.stride)};
  const cuuint32_t box[2] = {64, static_cast<cuuint32_t>(box_rows)}, steps[2] = {1, 1};
  const CUresult result = encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 2, rows.data, sizes, strides, box, steps,
                                 CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                                 CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return static_cast<int>(result);  // the runtime has the same numbers
#endif
}

}  // namespace abba
