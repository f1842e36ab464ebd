// The dense plan: W0 + s (B1 A1) ⊙ (B2 A2) for a block of output rows, formed, used by torch's matrix products and
// contracted while it is in cache. For fp32 and fp64, where r1*r2 is large against m*n/(m+n).
//   x [T, n], dy [T, m], W0 [m, n], a1 [r1, n], b1 [m, r1], a2 [r2, n], b2 [m, r2]; factors contiguous, all of one dtype
#include "khatri_rao.h"
#include "kernels.h"

// The row loops are compiled for several instruction sets, and rows_loop picks by the processor. Each has vectors of its own
// registers' width: g++ takes wider ones apart through memory, which makes the loops ten times slower.
#if defined(__x86_64__) && defined(__GNUC__)
#define ABBA_TARGET(instructions) __attribute__((target(instructions)))
#endif
#define ABBA_INLINE inline __attribute__((always_inline))

namespace abba::cpu {
namespace {

constexpr int64_t kBlockElements = 1 << 20;  // of W0 at once
constexpr int64_t kTileRows = 4;             // accumulators of a tile: 4 rows x 2 vectors x 2 products
constexpr int64_t kGrainRows = 16;           // rows of W0 that one thread takes at least

// A block of W0's rows, beginning at row. The factors' pointers are to the layer's first row, the others to the block's.
template <typename T>
struct Rows {
  const T *a1, *b1, *a2, *b2;
  int64_t r1, r2, n, row;
  T s;
  const T* base;         // W0 [rows, n], leading dimension base_ld
  int64_t base_ld;
  T *weight, *dw, *dw2;  // [rows, n] each
};

// With m1 = B1 A1 and m2 = B2 A2 in registers, for kRows rows and kVectors vectors of columns:
//   kWeight: weight = W0 + s m1 m2.   kGradient: (dw, dw2) = (dw m2, dw m1), the gradients of B1 A1 and B2 A2 up to s.
template <typename T, bool kWeight, bool kGradient, int kRows, typename V, int kVectors>
ABBA_INLINE void tile(const Rows<T>& p, int64_t i, int64_t k) {
  constexpr int64_t width = sizeof(V) / sizeof(T);
  V m1[kRows][kVectors] = {}, m2[kRows][kVectors] = {};
  const T* b1 = p.b1 + (p.row + i) * p.r1;
  const T* b2 = p.b2 + (p.row + i) * p.r2;
  for (int64_t a = 0; a < p.r1; ++a)
    for (int v = 0; v < kVectors; ++v) {
      V column;
      __builtin_memcpy(&column, p.a1 + a * p.n + k + v * width, sizeof column);
      for (int r = 0; r < kRows; ++r) m1[r][v] += column * b1[r * p.r1 + a];
    }
  for (int64_t a = 0; a < p.r2; ++a)
    for (int v = 0; v < kVectors; ++v) {
      V column;
      __builtin_memcpy(&column, p.a2 + a * p.n + k + v * width, sizeof column);
      for (int r = 0; r < kRows; ++r) m2[r][v] += column * b2[r * p.r2 + a];
    }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = (i + r) * p.n + k + v * width;
      if (kWeight) {
        V value;
        __builtin_memcpy(&value, p.base + (i + r) * p.base_ld + k + v * width, sizeof value);
        value += p.s * m1[r][v] * m2[r][v];
        __builtin_memcpy(p.weight + at, &value, sizeof value);
      }
      if (kGradient) {
        V dw;
        __builtin_memcpy(&dw, p.dw + at, sizeof dw);
        const V first = dw * m2[r][v], second = dw * m1[r][v];
        __builtin_memcpy(p.dw + at, &first, sizeof first);
        __builtin_memcpy(p.dw2 + at, &second, sizeof second);
      }
    }
}

template <typename T, int kVectorBytes, bool kWeight, bool kGradient>
ABBA_INLINE void rows_of_tiles(const Rows<T>& p, int64_t begin, int64_t end) {
  using Vector __attribute__((vector_size(kVectorBytes))) = T;
  constexpr int64_t width = kVectorBytes / sizeof(T);
  const int64_t wide = p.n / (2 * width) * (2 * width);
  int64_t i = begin;
  for (; i + kTileRows <= end; i += kTileRows) {
    for (int64_t k = 0; k < wide; k += 2 * width) tile<T, kWeight, kGradient, kTileRows, Vector, 2>(p, i, k);
    for (int64_t k = wide; k < p.n; ++k) tile<T, kWeight, kGradient, kTileRows, T, 1>(p, i, k);
  }
  for (; i < end; ++i)
    for (int64_t k = 0; k < p.n; ++k) tile<T, kWeight, kGradient, 1, T, 1>(p, i, k);
}

template <typename T, bool kWeight, bool kGradient>
void rows_128(const Rows<T>& p, int64_t begin, int64_t end) {
  rows_of_tiles<T, 16, kWeight, kGradient>(p, begin, end);
}

#ifdef ABBA_TARGET
template <typename T, bool kWeight, bool kGradient>
ABBA_TARGET("avx2,fma") void rows_256(const Rows<T>& p, int64_t begin, int64_t end) {
  rows_of_tiles<T, 32, kWeight, kGradient>(p, begin, end);
}

template <typename T, bool kWeight, bool kGradient>
ABBA_TARGET("avx512f,fma") void rows_512(const Rows<T>& p, int64_t begin, int64_t end) {
  rows_of_tiles<T, 64, kWeight, kGradient>(p, begin, end);
}
#endif

template <typename T, bool kWeight, bool kGradient>
auto rows_loop() {
#ifdef ABBA_TARGET
  if (__builtin_cpu_supports("avx512f")) return rows_512<T, kWeight, kGradient>;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return rows_256<T, kWeight, kGradient>;
#endif
  return rows_128<T, kWeight, kGradient>;
}

// A [rows, n] block that outlives the call: fresh pages for it would cost more than what is computed in it.
template <typename T>
Tensor scratch(int which, int64_t rows, const Tensor& like) {
  thread_local std::vector<T> buffers[3];
  const int64_t n = like.size(1);
  if (static_cast<int64_t>(buffers[which].size()) < rows * n) buffers[which].resize(rows * n);
  return torch::stable::from_blob(buffers[which].data(), {rows, n}, {n, 1}, like.device(), like.scalar_type());
}

template <typename T>
struct Layer {
  Tensor weight;
  Rows<T> rows;

  Layer(const Tensor& w, const Tensor& a1, const Tensor& b1, const Tensor& a2, const Tensor& b2, double s)
      : weight(w), rows{ptr(a1), ptr(b1), ptr(a2), ptr(b2), a1.size(0), a2.size(0), w.size(1), 0, static_cast<T>(s)} {}

  static T* ptr(const Tensor& t) { return static_cast<T*>(t.data_ptr()); }

  // fn(first row, rows) over near-equal blocks of W0's rows
  template <typename Fn>
  void for_each_block(Fn&& fn) const {
    const int64_t m = weight.size(0), blocks = std::max<int64_t>(1, (m * weight.size(1) + kBlockElements - 1) / kBlockElements);
    const int64_t size = (m + blocks - 1) / blocks;
    for (int64_t row = 0; row < m; row += size) fn(row, std::min(size, m - row));
  }

  // Of count rows: effective = W0 + s (B1 A1) ⊙ (B2 A2) if given; dw, if given, holds dW and becomes the gradient of B1 A1,
  // dw2 that of B2 A2, both up to s.
  void run(int64_t row, int64_t count, Tensor* effective, Tensor* dw, Tensor* dw2) const {
    Rows<T> p = rows;
    p.row = row;
    if (effective) {
      Tensor base = slice(weight, 0, row, count);
      if (base.stride(1) != 1) base = torch::stable::copy_(*effective, base);
      p.base = ptr(base), p.base_ld = base.stride(0), p.weight = ptr(*effective);
    }
    if (dw) p.dw = ptr(*dw), p.dw2 = ptr(*dw2);
    const auto loop = [&]() -> void (*)(const Rows<T>&, int64_t, int64_t) {
      if (effective && dw) return rows_loop<T, true, true>();
      if (effective) return rows_loop<T, true, false>();
      return rows_loop<T, false, true>();
    }();
    torch::stable::parallel_for(0, count, kGrainRows, [&](int64_t lo, int64_t hi) { loop(p, lo, hi); });
  }
};

template <typename T>
void forward(Tensor& y, const Tensor& x, const std::optional<Tensor>& bias, const Layer<T>& layer) {
  layer.for_each_block([&](int64_t row, int64_t count) {
    Tensor effective = scratch<T>(0, count, layer.weight), columns = slice(y, 1, row, count);
    layer.run(row, count, &effective, nullptr, nullptr);
    if (bias) {
      const Tensor part = slice(*bias, 0, row, count);
      TORCH_ERROR_CODE_CHECK(
          aoti_torch_cpu_addmm_out(columns.get(), part.get(), x.get(), transposed(effective).get(), 1.0, 1.0));
    } else {
      gemm_(columns, x, transposed(effective), 0.0, 1.0);
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
    std::optional<Tensor> effective, dw, dw2;
    if (need_x) effective = scratch<T>(0, count, layer.weight);
    if (need_factors) {
      dw = scratch<T>(1, count, layer.weight);
      dw2 = scratch<T>(2, count, layer.weight);
      gemm_(*dw, transposed(columns), x, 0.0, 1.0);
    }
    layer.run(row, count, effective ? &*effective : nullptr, dw ? &*dw : nullptr, dw2 ? &*dw2 : nullptr);
    if (need_x) gemm_(dx, columns, *effective, beta, 1.0);
    if (need_factors) {
      Tensor db1_rows = slice(db1, 0, row, count), db2_rows = slice(db2, 0, row, count);
      gemm_(db1_rows, *dw, transposed(a1), 0.0, s);
      gemm_(db2_rows, *dw2, transposed(a2), 0.0, s);
      gemm_(da1, transposed(slice(b1, 0, row, count)), *dw, beta, s);
      gemm_(da2, transposed(slice(b2, 0, row, count)), *dw2, beta, s);
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
