// The one include through which csrc reaches torch: the LibTorch stable ABI, fixed at 2.11, so that a build
// against any torch >= 2.11 loads into any other. Must come before every other torch header.
#pragma once
#define TORCH_TARGET_VERSION 0x020b000000000000

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

namespace abba {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The two ways in which csrc makes a matrix: torch::stable's own (new_empty, narrow, transpose, view) are boxed calls of the
// dispatcher, each of which takes longer than a small product.

// An uninitialised matrix on the device of like.
inline Tensor empty(const Tensor& like, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride,
                    ScalarType dtype) {
  const int64_t sizes[] = {rows, columns}, strides[] = {row_stride, column_stride};
  const auto shim_dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  int32_t device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(2, sizes, strides, shim_dtype, device_type, like.get_device_index(), &made));
  return Tensor(made);
}

inline Tensor empty(const Tensor& like, int64_t rows, int64_t columns, ScalarType dtype) {
  return empty(like, rows, columns, columns, 1, dtype);
}

inline Tensor empty(const Tensor& like, int64_t rows, int64_t columns) { return empty(like, rows, columns, like.scalar_type()); }

// Elements of t, from the one at offset on, as a matrix.
inline Tensor view(const Tensor& t, int64_t offset, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride) {
  const int64_t sizes[] = {rows, columns}, strides[] = {row_stride, column_stride};
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), 2, sizes, strides, offset, &made));
  return Tensor(made);
}

}  // namespace abba
