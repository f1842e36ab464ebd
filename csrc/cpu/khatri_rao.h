// The only place on the CPU that knows how a Khatri-Rao operand forms, the index i = a*r2 + b, and how factors lie in
// memory. Factors are read through their strides into small contiguous stages of kChunk features, so the layouts
// [r, D] and [D, r] (and any other) cost the same and are never copied whole.
#pragma once
#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "../stable.h"

namespace abba::cpu {

constexpr int64_t kChunk = 64;               // features staged at once by one thread
constexpr int64_t kBlockBytes = 2 << 20;     // one Khatri-Rao block: about a core's L2 cache
constexpr int64_t kWidenedTokens = 1024;     // tokens of fp16 or bf16 widened to fp32 at once

// Products and sums run in fp32, for fp64 in fp64.
template <typename T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Whether torch has products in bf16 worth their name: those of oneDNN begin with AVX-512, and what it does with AVX2 takes 4 to
// 60 times as long as in fp32 (benchmarks/NOTES.md).
inline bool has_bf16_products() {
#if defined(__x86_64__) && defined(__GNUC__)
  static const bool supported = __builtin_cpu_supports("avx512f");
  return supported;
#else
  return true;
#endif
}

// The dtype in which the matrix products run. fp16 is widened to fp32, whose range a product of two small factors needs.
inline ScalarType compute_type(ScalarType activation) {
  const bool widen = activation == ScalarType::Half || (activation == ScalarType::BFloat16 && !has_bf16_products());
  return widen ? ScalarType::Float : activation;
}

template <typename Fn>
auto dispatch_float(ScalarType dtype, Fn&& fn) {
  switch (dtype) {
    case ScalarType::Double: return fn(double{});
    case ScalarType::Float: return fn(float{});
    case ScalarType::BFloat16: return fn(BFloat16{});
    default: return fn(Half{});
  }
}

// stage[r][k] = f[r][begin + k] for count <= kChunk features
template <typename F, typename A>
void stage_factor(A* stage, const Tensor& f, int64_t begin, int64_t count) {
  const F* g_f = static_cast<const F*>(f.data_ptr());
  const int64_t rank = f.size(0), rank_stride = f.stride(0), feature_stride = f.stride(1);
  if (feature_stride == 1) {
    for (int64_t r = 0; r < rank; ++r)
      for (int64_t k = 0; k < count; ++k) stage[r * kChunk + k] = static_cast<A>(g_f[r * rank_stride + begin + k]);
  } else {
    for (int64_t k = 0; k < count; ++k)
      for (int64_t r = 0; r < rank; ++r)
        stage[r * kChunk + k] = static_cast<A>(g_f[r * rank_stride + (begin + k) * feature_stride]);
  }
}

// Rows [row, row+rows) x features [begin, begin+count) of the Khatri-Rao operand, rounded once to out's dtype.
//   out [rows, count] contiguous
inline void form_khatri_rao(Tensor& out, const Tensor& f1, const Tensor& f2, int64_t row, int64_t rows, int64_t begin,
                            int64_t count) {
  const int64_t r1 = f1.size(0), r2 = f2.size(0), ld = out.stride(0);
  dispatch_float(out.scalar_type(), [&](auto c) {
    using C = decltype(c);
    using A = acc_t<C>;
    C* g_out = static_cast<C*>(out.data_ptr());
    dispatch_float(f1.scalar_type(), [&](auto f) {
      using F = decltype(f);
      const int64_t chunks = (count + kChunk - 1) / kChunk;
      torch::stable::parallel_for(0, chunks, std::max<int64_t>(1, 32768 / (kChunk * rows)), [&](int64_t lo, int64_t hi) {
        std::vector<A> stage1(r1 * kChunk), stage2(r2 * kChunk);
        for (int64_t chunk = lo; chunk < hi; ++chunk) {
          const int64_t offset = chunk * kChunk, n = std::min(kChunk, count - offset);
          stage_factor<F>(stage1.data(), f1, begin + offset, n);
          stage_factor<F>(stage2.data(), f2, begin + offset, n);
          for (int64_t i = 0; i < rows; ++i) {
            const A* p1 = stage1.data() + (row + i) / r2 * kChunk;
            const A* p2 = stage2.data() + (row + i) % r2 * kChunk;
            C* dst = g_out + i * ld + offset;
            for (int64_t k = 0; k < n; ++k) dst[k] = static_cast<C>(p1[k] * p2[k]);
          }
        }
      });
    });
  });
}

// Contracts P [R, count] of features [begin, begin+count) onto the factor gradients:
//   df1[a,d] = s * sum_b P[(a,b),d] f2[b,d]      df2[b,d] = s * sum_a P[(a,b),d] f1[a,d]
inline void contract_khatri_rao(Tensor& df1, Tensor& df2, const Tensor& p, const Tensor& f1, const Tensor& f2,
                                int64_t begin, int64_t count, double s) {
  const int64_t r1 = f1.size(0), r2 = f2.size(0), ld = p.stride(0);
  dispatch_float(p.scalar_type(), [&](auto c) {
    using C = decltype(c);
    using A = acc_t<C>;
    const C* g_p = static_cast<const C*>(p.data_ptr());
    dispatch_float(f1.scalar_type(), [&](auto f) {
      using F = decltype(f);
      F* g_df1 = static_cast<F*>(df1.data_ptr());
      F* g_df2 = static_cast<F*>(df2.data_ptr());
      const int64_t chunks = (count + kChunk - 1) / kChunk;
      torch::stable::parallel_for(0, chunks, 1, [&](int64_t lo, int64_t hi) {
        std::vector<A> stage1(r1 * kChunk), stage2(r2 * kChunk), sum2(r2 * kChunk);
        for (int64_t chunk = lo; chunk < hi; ++chunk) {
          const int64_t offset = chunk * kChunk, n = std::min(kChunk, count - offset), d = begin + offset;
          stage_factor<F>(stage1.data(), f1, d, n);
          stage_factor<F>(stage2.data(), f2, d, n);
          std::fill(sum2.begin(), sum2.end(), A(0));
          for (int64_t a = 0; a < r1; ++a) {
            A sum1[kChunk] = {};
            const A* p1 = stage1.data() + a * kChunk;
            for (int64_t b = 0; b < r2; ++b) {
              const C* src = g_p + (a * r2 + b) * ld + offset;
              const A* p2 = stage2.data() + b * kChunk;
              A* acc2 = sum2.data() + b * kChunk;
              for (int64_t k = 0; k < n; ++k) {
                const A value = static_cast<A>(src[k]);
                sum1[k] += value * p2[k];
                acc2[k] += value * p1[k];
              }
            }
            for (int64_t k = 0; k < n; ++k)
              g_df1[a * df1.stride(0) + (d + k) * df1.stride(1)] = static_cast<F>(static_cast<A>(s) * sum1[k]);
          }
          for (int64_t b = 0; b < r2; ++b)
            for (int64_t k = 0; k < n; ++k)
              g_df2[b * df2.stride(0) + (d + k) * df2.stride(1)] = static_cast<F>(static_cast<A>(s) * sum2[b * kChunk + k]);
        }
      });
    });
  });
}

// The matrix products are torch's own (MKL, oneDNN, ...), reached below the dispatcher: no autograd, no autocast.
// out [i, j] = beta * out + alpha * a [i, k] * b [k, j]
inline void gemm_(Tensor& out, const Tensor& a, const Tensor& b, double beta, double alpha) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), beta, alpha));
}

inline Tensor rows_of(const Tensor& t, int64_t begin, int64_t count) {
  return view(t, begin * t.stride(0), count, t.size(1), t.stride(0), t.stride(1));
}

inline Tensor columns_of(const Tensor& t, int64_t begin, int64_t count) {
  return view(t, begin * t.stride(1), t.size(0), count, t.stride(0), t.stride(1));
}

inline Tensor transposed(const Tensor& t) { return view(t, 0, t.size(1), t.size(0), t.stride(1), t.stride(0)); }

}  // namespace abba::cpu
