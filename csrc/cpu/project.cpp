// u = x * KR^T, one block of Khatri-Rao rows at a time: each block is formed over all features, so that every
// product over features runs in one fp32 accumulator and is rounded once.
#include "khatri_rao.h"
#include "kernels.h"

namespace abba::cpu {

void project(Tensor& u, const Tensor& x, const Tensor& f1, const Tensor& f2) {
  const int64_t tokens = x.size(0), features = x.size(1), rank = f1.size(0) * f2.size(0);
  const ScalarType type = compute_type(x.scalar_type());
  if (type != x.scalar_type()) {
    for (int64_t t = 0; t < tokens; t += kWidenedTokens) {
      const int64_t count = std::min(kWidenedTokens, tokens - t);
      Tensor wide = empty(u, count, rank, type);
      project(wide, torch::stable::to(rows_of(x, t, count), type), f1, f2);
      Tensor rows = rows_of(u, t, count);
      torch::stable::copy_(rows, wide);
    }
    return;
  }
  const int64_t row_bytes = features * static_cast<int64_t>(x.element_size());
  const int64_t block = std::min(rank, std::max<int64_t>(kBlockBytes / row_bytes / 16, 1) * 16);
  Tensor scratch = empty(x, block, features);
  for (int64_t i = 0; i < rank; i += block) {
    const int64_t rows = std::min(block, rank - i);
    Tensor kr = rows_of(scratch, 0, rows), columns = columns_of(u, i, rows);
    form_khatri_rao(kr, f1, f2, i, rows, 0, features);
    gemm_(columns, x, transposed(kr), 0.0, 1.0);
  }
}

}  // namespace abba::cpu
