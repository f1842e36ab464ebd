// CPU kernels of the three operators. Arguments are checked by the caller (ops.cpp).
//   T tokens, D features, f1 [r1, D] and f2 [r2, D] in any strides, R = r1*r2, KR[(a,b), d] = f1[a,d] * f2[b,d]
#pragma once
#include "../stable.h"

namespace abba::cpu {

// u [T, R] = x [T, D] * KR^T
void project(Tensor& u, const Tensor& x, const Tensor& f1, const Tensor& f2);

// y [T, D] += s * u [T, R] * KR
void expand_(Tensor& y, const Tensor& u, const Tensor& f1, const Tensor& f2, double s);

// P [R, D] = v [T, R]^T * x [T, D];  df1[a,d] = s * sum_b P[(a,b),d] f2[b,d];  df2[b,d] = s * sum_a P[(a,b),d] f1[a,d]
void factor_grad(Tensor& df1, Tensor& df2, const Tensor& x, const Tensor& v, const Tensor& f1, const Tensor& f2, double s);

}  // namespace abba::cpu
