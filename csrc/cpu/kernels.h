// CPU kernels of the three operators and of the dense plan. Arguments are checked by the caller (ops.cpp).
//   T tokens, D features, f1 [r1, D] and f2 [r2, D] in any strides, R = r1*r2, KR[(a,b), d] = f1[a,d] * f2[b,d]
#pragma once
#include <optional>

#include "../stable.h"

namespace abba::cpu {

// u [T, R] = x [T, D] * KR^T
void project(Tensor& u, const Tensor& x, const Tensor& f1, const Tensor& f2);

// y [T, D] += s * u [T, R] * KR
void expand_(Tensor& y, const Tensor& u, const Tensor& f1, const Tensor& f2, double s);

// P [R, D] = v [T, R]^T * x [T, D];  df1[a,d] = s * sum_b P[(a,b),d] f2[b,d];  df2[b,d] = s * sum_a P[(a,b),d] f1[a,d]
void factor_grad(Tensor& df1, Tensor& df2, const Tensor& x, const Tensor& v, const Tensor& f1, const Tensor& f2, double s);

// The dense plan (fp32, fp64): y [T, m] = x [T, n] (W0 + s (B1 A1) ⊙ (B2 A2))^T + bias, and its gradients. W0 [m, n] in any
// strides; a1 [r1, n], b1 [m, r1], a2 [r2, n], b2 [m, r2] contiguous in x's dtype, and so are their gradients.
void dense_forward(Tensor& y, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& a1,
                   const Tensor& b1, const Tensor& a2, const Tensor& b2, double s);
void dense_backward(Tensor& dx, Tensor& da1, Tensor& db1, Tensor& da2, Tensor& db2, const Tensor& x, const Tensor& dy,
                    const Tensor& weight, const Tensor& a1, const Tensor& b1, const Tensor& a2, const Tensor& b2, double s,
                    bool need_x, bool need_factors);

}  // namespace abba::cpu
