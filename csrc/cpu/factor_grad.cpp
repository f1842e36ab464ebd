// P = v^T x for one block of features at a time, contracted onto the two factor gradients while it is in cache.
#include "khatri_rao.h"
#include "kernels.h"

namespace abba::cpu {

void factor_grad(Tensor& df1, Tensor& df2, const Tensor& x, const Tensor& v, const Tensor& f1, const Tensor& f2, double s) {
  const int64_t features = x.size(1), rank = v.size(1);
  const ScalarType type = compute_type(x.scalar_type());
  const bool widen = type != x.scalar_type();
  const Tensor v_t = transposed(widen ? torch::stable::to(v, type) : v);
  const int64_t column_bytes = rank * static_cast<int64_t>(v_t.element_size());
  const int64_t block = std::min(features, std::max<int64_t>(kBlockBytes / column_bytes / kChunk, 1) * kChunk);
  Tensor scratch = empty(v_t, rank, block);
  for (int64_t d = 0; d < features; d += block) {
    const int64_t count = std::min(block, features - d);
    Tensor p = view(scratch, 0, rank, count, count, 1);
    const Tensor columns = columns_of(x, d, count);
    gemm_(p, v_t, widen ? torch::stable::to(columns, type) : columns, 0.0, 1.0);
    contract_khatri_rao(df1, df2, p, f1, f2, d, count, s);
  }
}

}  // namespace abba::cpu
