// y += s * u * KR, one block of features at a time: s and the sum with y are applied in the product's epilogue.
#include "khatri_rao.h"
#include "kernels.h"

namespace abba::cpu {

void expand_(Tensor& y, const Tensor& u, const Tensor& f1, const Tensor& f2, double s) {
  const int64_t features = y.size(1), rank = u.size(1);
  const ScalarType type = compute_type(y.scalar_type());
  const bool widen = type != y.scalar_type();
  const Tensor wide_u = widen ? torch::stable::to(u, type) : u;
  const int64_t column_bytes = rank * static_cast<int64_t>(wide_u.element_size());
  const int64_t block = std::min(features, std::max<int64_t>(kBlockBytes / column_bytes / kChunk, 1) * kChunk);
  Tensor scratch = empty(wide_u, rank, block);
  for (int64_t d = 0; d < features; d += block) {
    const int64_t count = std::min(block, features - d);
    Tensor kr = view(scratch, 0, rank, count, count, 1), columns = columns_of(y, d, count);
    form_khatri_rao(kr, f1, f2, 0, rank, d, count);
    if (widen) {
      Tensor wide = torch::stable::to(columns, type);
      gemm_(wide, wide_u, kr, 1.0, s);
      torch::stable::copy_(columns, wide);
    } else {
      gemm_(columns, wide_u, kr, 1.0, s);
    }
  }
}

}  // namespace abba::cpu
