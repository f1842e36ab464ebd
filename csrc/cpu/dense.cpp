// The dense plan: W0 + s (B1 A1) ⊙ (B2 A2) for a block of output rows, formed, used by torch's matrix products and
// contracted while it is in cache. For fp32 and fp64, where r1*r2 is large against m*n/(m+n).
//   x [T, n], dy [T, m], W0 [m, n], a1 [r1, n], b1 [m, r1], a2 [r2, n], b2 [m, r2]; factors contiguous, all of one dtype
#include "khatri_rao.h"
#include "kernels.h"

// Each loop is compiled for several instruction sets; the loader picks by the processor.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define ABBA_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define ABBA_CLONES
#endif
#define ABBA_INLINE inline __attribute__((always_inline))

namespace abba::cpu {
namespace {

constexpr int64_t kBlockElements = 1 << 20;  // of W0 at once
constexpr int64_t kTileRows = 4;             // accumulators of a tile: 4 rows x 2 vectors x 2 products
constexpr int64_t kGrainRows = 16;           // rows of W0 that one thread takes at least

// Rows of the block, beginning at row of the layer. Pointers are to the layer's first row, but for in, out1 and out2.
template <typename T>
struct Rows {
  const T *a1, *b1, *a2, *b2;
  int64_t r1, r2, n, row;
  const T* in;     // [rows, n], leading dimension in_ld
  int64_t in_ld;
  T *out1, *out2;  // [rows, n]
  T s;
};

// kContract false: out1 = in + s m1 m2, the weights. True: out1 = in m2, out2 = in m1, the gradients of B1 A1 and B2 A2
// up to s. m1 = B1 A1, m2 = B2 A2, in registers for kRows rows and kVectors vectors of columns.
template <typename T, bool kContract, int kRows, typename V, int kVectors>
ABBA_INLINE void tile(const Rows<T>& p, int64_t i, int64_t k) {
  constexpr int64_t width = sizeof(V) / sizeof(T);
  V m1[kRows][kVectors] = {}, m2[kRows][kVectors] = {};
  const T* b1 = p.b1 + (p.row + i) * p.r1;
  const T* b2 = p.b2 + (p.row + i) * p.r2;
  const auto load = [](const T* from) { V v; __builtin_memcpy(&v, from, sizeof v); return v; };
  const auto store = [](T* to, const V& v) { __builtin_memcpy(to, &v, sizeof v); };
  for (int64_t a = 0; a < p.r1; ++a)
    for (int v = 0; v < kVectors; ++v) {
      const V column = load(p.a1 + a * p.n + k + v * width);
      for (int r = 0; r < kRows; ++r) m1[r][v] += column * b1[r * p.r1 + a];
    }
  for (int64_t a = 0; a < p.r2; ++a)
    for (int v = 0; v < kVectors; ++v) {
      const V column = load(p.a2 + a * p.n + k + v * width);
      for (int r = 0; r < kRows; ++r) m2[r][v] += column * b2[r * p.r2 + a];
    }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = k + v * width;
      const V in = load(p.in + (i + r) * p.in_ld + at);
      if (kContract) {
        store(p.out1 + (i + r) * p.n + at, in * m2[r][v]);
        store(p.out2 + (i + r) * p.n + at, in * m1[r][v]);
      } else {
        store(p.out1 + (i + r) * p.n + at, in + p.s * m1[r][v] * m2[r][v]);
      }
    }
}

template <typename T, bool kContract>
ABBA_INLINE void rows_of_tiles(const Rows<T>& p, int64_t begin, int64_t end) {
  using Vector __attribute__((vector_size(64))) = T;
  constexpr int64_t width = 64 / sizeof(T);
  const int64_t wide = p.n / (2 * width) * (2 * width);
  int64_t i = begin;
  for (; i + kTileRows <= end; i += kTileRows) {
    for (int64_t k = 0; k < wide; k += 2 * width) tile<T, kContract, kTileRows, Vector, 2>(p, i, k);
    for (int64_t k = wide; k < p.n; ++k) tile<T, kContract, kTileRows, T, 1>(p, i, k);
  }
  for (; i < end; ++i)
    for (int64_t k = 0; k < p.n; ++k) tile<T, kContract, 1, T, 1>(p, i, k);
}

ABBA_CLONES void weight_rows(const Rows<float>& p, int64_t begin, int64_t end) { rows_of_tiles<float, false>(p, begin, end); }
ABBA_CLONES void weight_rows(const Rows<double>& p, int64_t begin, int64_t end) { rows_of_tiles<double, false>(p, begin, end); }
ABBA_CLONES void gradient_rows(const Rows<float>& p, int64_t begin, int64_t end) { rows_of_tiles<float, true>(p, begin, end); }
ABBA_CLONES void gradient_rows(const Rows<double>& p, int64_t begin, int64_t end) { rows_of_tiles<double, true>(p, begin, end); }

// A [rows, n] block that outlives the call: fresh pages for it would cost more than what is computed in it.
template <typename T>
Tensor scratch(int which, int64_t rows, const Tensor& like) {
  thread_local std::vector<T> buffers[2];
  const int64_t n = like.size(1);
  if (static_cast<int64_t>(buffers[which].size()) < rows * n) buffers[which].resize(rows * n);
  return torch::stable::from_blob(buffers[which].data(), {rows, n}, {n, 1}, like.device(), like.scalar_type());
}

template <typename T>
struct Layer {
  Tensor weight;
  Rows<T> rows;

  Layer(const Tensor& w, const Tensor& a1, const Tensor& b1, const Tensor& a2, const Tensor& b2, double s)
      : weight(w),
        rows{ptr(a1), ptr(b1), ptr(a2), ptr(b2), a1.size(0), a2.size(0), w.size(1), 0, nullptr, 0, nullptr, nullptr,
             static_cast<T>(s)} {}

  static const T* ptr(const Tensor& t) { return static_cast<const T*>(t.data_ptr()); }

  // fn(first row, rows) over near-equal blocks of W0's rows
  template <typename Fn>
  void for_each_block(Fn&& fn) const {
    const int64_t m = weight.size(0), blocks = std::max<int64_t>(1, (m * weight.size(1) + kBlockElements - 1) / kBlockElements);
    const int64_t size = (m + blocks - 1) / blocks;
    for (int64_t row = 0; row < m; row += size) fn(row, std::min(size, m - row));
  }

  // out = W0 + s (B1 A1) ⊙ (B2 A2) of count rows
  void form_weight(Tensor& out, int64_t row, int64_t count) const {
    Tensor base = slice(weight, 0, row, count);
    if (base.stride(1) != 1) base = torch::stable::copy_(out, base);
    Rows<T> p = rows;
    p.row = row, p.in = ptr(base), p.in_ld = base.stride(0), p.out1 = static_cast<T*>(out.data_ptr());
    torch::stable::parallel_for(0, count, kGrainRows, [&](int64_t lo, int64_t hi) { weight_rows(p, lo, hi); });
  }

  // dw becomes the gradient of B1 A1, other that of B2 A2, both up to s
  void split_gradient(Tensor& dw, Tensor& other, int64_t row, int64_t count) const {
    Rows<T> p = rows;
    p.row = row, p.in = ptr(dw), p.in_ld = dw.size(1);
    p.out1 = static_cast<T*>(dw.data_ptr()), p.out2 = static_cast<T*>(other.data_ptr());
    torch::stable::parallel_for(0, count, kGrainRows, [&](int64_t lo, int64_t hi) { gradient_rows(p, lo, hi); });
  }
};

template <typename T>
void forward(Tensor& y, const Tensor& x, const std::optional<Tensor>& bias, const Layer<T>& layer) {
  layer.for_each_block([&](int64_t row, int64_t count) {
    Tensor weight = scratch<T>(0, count, layer.weight), columns = slice(y, 1, row, count);
    layer.form_weight(weight, row, count);
    if (bias) {
      const Tensor part = slice(*bias, 0, row, count);
      TORCH_ERROR_CODE_CHECK(
          aoti_torch_cpu_addmm_out(columns.get(), part.get(), x.get(), transposed(weight).get(), 1.0, 1.0));
    } else {
      gemm_(columns, x, transposed(weight), 0.0, 1.0);
    }
  });
}

template <typename T>
void backward(Tensor& dx, Tensor& da1, Tensor& db1, Tensor& da2, Tensor& db2, const Tensor& x, const Tensor& dy,
              const Tensor& a1, const Tensor& b1, const Tensor& a2, const Tensor& b2, const Layer<T>& layer, double s,
              bool need_x, bool need_factors) {
  layer.for_each_block([&](int64_t row, int64_t count) {
    const double beta = row == 0 ? 0.0 : 1.0;  // the first block overwrites what the others add to
    const Tensor columns = slice(dy, 1, row, count);
    Tensor block = scratch<T>(0, count, layer.weight);
    if (need_x) {
      layer.form_weight(block, row, count);
      gemm_(dx, columns, block, beta, 1.0);
    }
    if (need_factors) {
      Tensor other = scratch<T>(1, count, layer.weight);
      gemm_(block, transposed(columns), x, 0.0, 1.0);  // dW
      layer.split_gradient(block, other, row, count);
      Tensor db1_rows = slice(db1, 0, row, count), db2_rows = slice(db2, 0, row, count);
      gemm_(db1_rows, block, transposed(a1), 0.0, s);
      gemm_(db2_rows, other, transposed(a2), 0.0, s);
      gemm_(da1, transposed(slice(b1, 0, row, count)), block, beta, s);
      gemm_(da2, transposed(slice(b2, 0, row, count)), other, beta, s);
    }
  });
}

}  // namespace

void dense_forward(Tensor& y, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& a1,
                   const Tensor& b1, const Tensor& a2, const Tensor& b2, double s) {
  if (x.scalar_type() == ScalarType::Double) {
    forward<double>(y, x, bias, {weight, a1, b1, a2, b2, s});
  } else {
    forward<float>(y, x, bias, {weight, a1, b1, a2, b2, s});
  }
}

void dense_backward(Tensor& dx, Tensor& da1, Tensor& db1, Tensor& da2, Tensor& db2, const Tensor& x, const Tensor& dy,
                    const Tensor& weight, const Tensor& a1, const Tensor& b1, const Tensor& a2, const Tensor& b2, double s,
                    bool need_x, bool need_factors) {
  if (x.scalar_type() == ScalarType::Double) {
    backward<double>(dx, da1, db1, da2, db2, x, dy, a1, b1, a2, b2, {weight, a1, b1, a2, b2, s}, s, need_x, need_factors);
  } else {
    backward<float>(dx, da1, db1, da2, db2, x, dy, a1, b1, a2, b2, {weight, a1, b1, a2, b2, s}, s, need_x, need_factors);
  }
}

}  // namespace abba::cpu
