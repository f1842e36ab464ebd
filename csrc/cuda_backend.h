// The three operators on CUDA tensors that ops.cpp has checked and allocated: the handwritten kernels where they cover a
// call, otherwise the composite of torch matmuls (abba_ext/ops.py), with the same results.
#pragma once
#include <string>

#include "stable.h"

namespace abba::cuda {

void project(Tensor& u, const Tensor& x, const Tensor& f1, const Tensor& f2);
void expand_(Tensor& y, const Tensor& u, const Tensor& f1, const Tensor& f2, double s);
void factor_grad(Tensor& df1, Tensor& df2, const Tensor& x, const Tensor& v, const Tensor& f1, const Tensor& f2, double s);

// Why no kernel covers such a call on this device, as the end of a sentence; "" if one does.
std::string uncovered(ScalarType activations, ScalarType factors, int64_t r1, int64_t r2, int device);

// Whether the kernels for Hopper take such a call of contiguous tensors, which one covers.
bool takes_sm90(int64_t num_tokens, int64_t num_features, int64_t r1, int64_t r2, int device);

}  // namespace abba::cuda
