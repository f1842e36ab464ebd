// The dense plan: W0 + s (B1 A1) ⊙ (B2 A2) for a block of output rows, formed, used by torch's matrix products and
// contracted while it is in cache. For fp32 and fp64, where r1*r2 is large against m*n/(m+n).
//   x [T, n], dy [T, m], W0 [m, n], a1 [r1, n], b1 [m, r1], a2 [r2, n], b2 [m, r2]; factors contiguous, all of one dtype
#include <memory>
#include <new>

#include "khatri_rao.h"
#include "kernels.h"

// The loops over a share of rows are compiled for several instruction sets, and form_and_contract picks by the processor.
// Each has vectors of its registers' width: g++ passes wider ones through memory, which made the loops thirty times slower.
#if defined(__x86_64__) && defined(__GNUC__)
#define ABBA_TARGET(instructions) __attribute__((target(instructions)))
#endif
#define ABBA_INLINE inline __attribute__((always_inline))

namespace abba::cpu {
namespace {

constexpr int64_t kBlockElements = 1 << 20;  // of W0 at once
constexpr int64_t kShareRows = 16;           // rows of W0 that one thread takes at least
constexpr int64_t kPanel = 64;               // columns of W0 at once, and
constexpr int64_t kRows = 16;                // rows: both products and the factors' panels are 32 KiB in fp32, an L1 cache
constexpr int64_t kGroup = 4;                // rows that are formed, a tile of multiply, while the next are fetched
constexpr int64_t kLine = 64;                // bytes of a cache line

struct Free {
  void operator()(void* memory) const { ::operator delete(memory, std::align_val_t{kLine}); }
};
template <typename T>
using Buffer = std::unique_ptr<T[], Free>;

// Aligned to lines: torch's product into an array that is not takes a tenth longer.
template <typename T>
Buffer<T> zeros(int64_t count) {
  T* memory = static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t{kLine}));
  std::fill(memory, memory + count, T(0));
  return Buffer<T>(memory);
}

// One pair of factors: a [r, n], b [m, r], da [r, n] and db [m, r]
template <typename T>
struct Pair {
  const T *a, *b;
  int64_t r;
  T* da;  // this share's, added to, up to s
  T* db;  // written
};

// What a share of W0's rows is formed from and becomes: [rows, n] each, null where it isn't wanted.
template <typename T>
struct Share {
  Pair<T> pair[2];  // b and db begin at the share's first row
  int64_t rows, n;
  T s;
  const T* base;  // W0, leading dimension base_ld
  int64_t base_ld;
  T* weight;    // = W0 + s (B1 A1) ⊙ (B2 A2)
  const T* dw;  // dW, contracted onto the pairs' da and db
};

// --- the microkernel ---

template <typename T>
struct Left {  // element [i, d] of a matrix is at[i * row + d * depth]
  const T* at;
  int64_t row, depth;
};

// out [kTileRows, kVectors vectors] = left [kTileRows, depth] * right [depth, ...], kAdd: +=. The product is summed in
// registers and then added: sums of sums, whose rounding errors grow more slowly than those of one long sum.
template <typename T, typename V, bool kAdd, int kTileRows, int kVectors>
ABBA_INLINE void multiply_tile(T* out, int64_t out_ld, Left<T> left, const T* right, int64_t right_ld, int64_t depth) {
  constexpr int64_t width = sizeof(V) / sizeof(T);
  V sum[kTileRows][kVectors] = {};
  for (int64_t d = 0; d < depth; ++d) {
    V line[kVectors];
    for (int v = 0; v < kVectors; ++v) __builtin_memcpy(&line[v], right + d * right_ld + v * width, sizeof(V));
    for (int i = 0; i < kTileRows; ++i)
      for (int v = 0; v < kVectors; ++v) sum[i][v] += line[v] * left.at[i * left.row + d * left.depth];
  }
  for (int i = 0; i < kTileRows; ++i)
    for (int v = 0; v < kVectors; ++v) {
      V value = sum[i][v];
      if (kAdd) {
        __builtin_memcpy(&value, out + i * out_ld + v * width, sizeof(V));
        value += sum[i][v];
      }
      __builtin_memcpy(out + i * out_ld + v * width, &value, sizeof(V));
    }
}

template <typename T, typename V, bool kAdd, int kTileRows, int kVectors>
ABBA_INLINE void multiply_column(T* out, int64_t out_ld, int64_t rows, Left<T> left, const T* right, int64_t right_ld,
                                 int64_t depth) {
  int64_t i = 0;
  for (; i + kTileRows <= rows; i += kTileRows, left.at += kTileRows * left.row)
    multiply_tile<T, V, kAdd, kTileRows, kVectors>(out + i * out_ld, out_ld, left, right, right_ld, depth);
  for (; i < rows; ++i, left.at += left.row)
    multiply_tile<T, V, kAdd, 1, kVectors>(out + i * out_ld, out_ld, left, right, right_ld, depth);
}

// out [rows, columns] = left [rows, depth] * right [depth, columns], kAdd: +=; columns is a multiple of the vector's width.
// Eight accumulators hide the latency of a multiply-add and leave room in 16 registers.
template <typename T, typename V, bool kAdd>
ABBA_INLINE void multiply(T* out, int64_t out_ld, int64_t rows, int64_t columns, Left<T> left, const T* right,
                          int64_t right_ld, int64_t depth) {
  constexpr int64_t width = sizeof(V) / sizeof(T);
  int64_t k = 0;
  for (; k + 2 * width <= columns; k += 2 * width)
    multiply_column<T, V, kAdd, 4, 2>(out + k, out_ld, rows, left, right + k, right_ld, depth);
  if (k < columns) multiply_column<T, V, kAdd, 8, 1>(out + k, out_ld, rows, left, right + k, right_ld, depth);
}

// --- one share of rows ---

// Asks for the lines of rows [row, row + kGroup) and a panel of columns at k that will be read and written.
template <typename T>
ABBA_INLINE void prefetch(const Share<T>& p, int64_t row, int64_t k) {
  for (int64_t j = row; j < std::min(row + kGroup, p.rows); ++j)
    for (int64_t c = k; c < k + kPanel; c += kLine / static_cast<int64_t>(sizeof(T))) {
      if (p.weight) __builtin_prefetch(p.base + j * p.base_ld + c), __builtin_prefetch(p.weight + j * p.n + c, 1);
      if (p.dw) __builtin_prefetch(p.dw + j * p.n + c);
    }
}

// For each panel of columns and each kRows rows, with M1 = B1 A1 and M2 = B2 A2 in L1, formed kGroup rows at a time:
// weight = W0 + s M1 ⊙ M2, and dW ⊙ M2, the gradient of M1 up to s, contracted onto a1 and b1, dW ⊙ M1 onto a2 and b2. The
// panels of the factors lie contiguous.
template <typename T, int kVectorBytes>
ABBA_INLINE void form_and_contract_with(const Share<T>& p) {
  using V __attribute__((vector_size(kVectorBytes))) = T;
  constexpr int64_t width = kVectorBytes / sizeof(T);
  struct Stage {
    int64_t padded;  // r, rounded up to whole vectors
    Buffer<T> a, a_t, da, db, product;  // [r, kPanel], [kPanel, padded], [r, kPanel], [rows, padded], [kRows, kPanel]
  } stages[2];
  for (int i = 0; i < 2; ++i) {
    const int64_t r = p.pair[i].r, padded = (r + width - 1) / width * width;
    stages[i].padded = padded;
    stages[i].a = zeros<T>(r * kPanel);
    stages[i].product = zeros<T>(kRows * kPanel);
    if (p.dw) {
      stages[i].a_t = zeros<T>(kPanel * padded);
      stages[i].da = zeros<T>(r * kPanel);
      stages[i].db = zeros<T>(p.rows * padded);
    }
  }
  for (int64_t k = 0; k < p.n; k += kPanel) {
    const int64_t count = std::min(kPanel, p.n - k);
    for (int i = 0; i < 2; ++i)
      for (int64_t a = 0; a < p.pair[i].r; ++a)
        for (int64_t c = 0; c < kPanel; ++c) {
          const T value = c < count ? p.pair[i].a[a * p.n + k + c] : T(0);
          stages[i].a[a * kPanel + c] = value;
          if (p.dw) stages[i].a_t[c * stages[i].padded + a] = value, stages[i].da[a * kPanel + c] = T(0);
        }
    for (int64_t row = 0; row < p.rows; row += kRows) {
      const int64_t rows = std::min(kRows, p.rows - row);
      for (int64_t j = 0; j < rows; j += kGroup) {
        const int64_t end = std::min(j + kGroup, rows), next = row + j + kGroup;
        if (next < p.rows) prefetch(p, next, k);
        else if (k + kPanel < p.n) prefetch(p, 0, k + kPanel);
        for (int i = 0; i < 2; ++i) {
          const Pair<T>& pair = p.pair[i];
          multiply<T, V, false>(stages[i].product.get() + j * kPanel, kPanel, end - j, kPanel,
                                {pair.b + (row + j) * pair.r, pair.r, 1}, stages[i].a.get(), kPanel, pair.r);
        }
        for (int64_t i = j; i < end; ++i) {
          T* __restrict m1 = stages[0].product.get() + i * kPanel;
          T* __restrict m2 = stages[1].product.get() + i * kPanel;
          if (p.weight) {
            const T* __restrict base = p.base + (row + i) * p.base_ld + k;
            T* __restrict weight = p.weight + (row + i) * p.n + k;
            for (int64_t c = 0; c < count; ++c) weight[c] = base[c] + p.s * m1[c] * m2[c];
          }
          if (p.dw) {
            const T* __restrict dw = p.dw + (row + i) * p.n + k;
            for (int64_t c = 0; c < count; ++c) {
              const T first = dw[c] * m2[c];
              m2[c] = dw[c] * m1[c];
              m1[c] = first;
            }
          }
        }
      }
      if (!p.dw) continue;
      for (int i = 0; i < 2; ++i) {
        const Pair<T>& pair = p.pair[i];
        const Stage& stage = stages[i];
        multiply<T, V, true>(stage.db.get() + row * stage.padded, stage.padded, rows, stage.padded,
                             {stage.product.get(), kPanel, 1}, stage.a_t.get(), stage.padded, count);
        multiply<T, V, true>(stage.da.get(), kPanel, pair.r, kPanel, {pair.b + row * pair.r, 1, pair.r},
                             stage.product.get(), kPanel, rows);
      }
    }
    if (!p.dw) continue;
    for (int i = 0; i < 2; ++i)
      for (int64_t a = 0; a < p.pair[i].r; ++a)
        for (int64_t c = 0; c < count; ++c) p.pair[i].da[a * p.n + k + c] += stages[i].da[a * kPanel + c];
  }
  if (!p.dw) return;
  for (int i = 0; i < 2; ++i)
    for (int64_t j = 0; j < p.rows; ++j)
      for (int64_t a = 0; a < p.pair[i].r; ++a)
        p.pair[i].db[j * p.pair[i].r + a] = p.s * stages[i].db[j * stages[i].padded + a];
}

template <typename T>
void form_and_contract_128(const Share<T>& p) {
  form_and_contract_with<T, 16>(p);
}

#ifdef ABBA_TARGET
template <typename T>
ABBA_TARGET("avx2,fma") void form_and_contract_256(const Share<T>& p) {
  form_and_contract_with<T, 32>(p);
}

template <typename T>
ABBA_TARGET("avx512f,fma") void form_and_contract_512(const Share<T>& p) {
  form_and_contract_with<T, 64>(p);
}
#endif

template <typename T>
void form_and_contract(const Share<T>& p) {
#ifdef ABBA_TARGET
  if (__builtin_cpu_supports("avx512f")) return form_and_contract_512(p);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return form_and_contract_256(p);
#endif
  form_and_contract_128(p);
}

// --- a layer ---

// A [rows, n] block that outlives the call: fresh pages for it would cost more than what is computed in it.
template <typename T>
Tensor scratch(int which, int64_t rows, const Tensor& like) {
  thread_local struct {
    Buffer<T> memory;
    int64_t size = 0;
  } blocks[2];
  auto& block = blocks[which];
  const int64_t n = like.size(1);
  if (block.size < rows * n) {
    block.memory = zeros<T>(rows * n);
    block.size = rows * n;
  }
  return torch::stable::from_blob(block.memory.get(), {rows, n}, {n, 1}, like.device(), like.scalar_type());
}

template <typename T>
T* ptr(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

template <typename T>
struct Layer {
  Tensor weight, a[2], b[2];
  T s;

  // fn(first row, rows) over near-equal blocks of W0's rows
  template <typename Fn>
  void for_each_block(Fn&& fn) const {
    const int64_t m = weight.size(0), blocks = std::max<int64_t>(1, (m * weight.size(1) + kBlockElements - 1) / kBlockElements);
    const int64_t size = (m + blocks - 1) / blocks;
    for (int64_t row = 0; row < m; row += size) fn(row, std::min(size, m - row));
  }

  // Each thread has a share of a block's rows. The sums depend on the number of threads and on nothing else.
  static int64_t num_shares(int64_t rows) {
    return std::clamp<int64_t>(rows / kShareRows, 1, torch::stable::get_num_threads());
  }

  // Of count rows: effective = W0 + s (B1 A1) ⊙ (B2 A2) if given. dw, if given, holds dW: its rows of db1 and db2 are
  // written, and each share adds to its own da [r1 + r2, n], up to s.
  void run(int64_t row, int64_t count, Tensor* effective, const Tensor* dw, T* da, Tensor* db1, Tensor* db2) const {
    const int64_t n = weight.size(1), r1 = a[0].size(0), r2 = a[1].size(0), shares = num_shares(count);
    Tensor base = slice(weight, 0, row, count);
    if (effective && base.stride(1) != 1) base = torch::stable::copy_(*effective, base);
    torch::stable::parallel_for(0, shares, 1, [&](int64_t lo, int64_t hi) {
      for (int64_t share = lo; share < hi; ++share) {
        const int64_t begin = count * share / shares, end = count * (share + 1) / shares, first = row + begin;
        Share<T> p{{{ptr<T>(a[0]), ptr<T>(b[0]) + first * r1, r1, nullptr, nullptr},
                    {ptr<T>(a[1]), ptr<T>(b[1]) + first * r2, r2, nullptr, nullptr}},
                   end - begin, n, s, nullptr, 0, nullptr, nullptr};
        if (effective) {
          p.base_ld = base.stride(0);
          p.base = ptr<T>(base) + begin * p.base_ld;
          p.weight = ptr<T>(*effective) + begin * n;
        }
        if (dw) {
          p.dw = ptr<T>(*dw) + begin * n;
          p.pair[0].da = da + share * (r1 + r2) * n, p.pair[0].db = ptr<T>(*db1) + first * r1;
          p.pair[1].da = p.pair[0].da + r1 * n, p.pair[1].db = ptr<T>(*db2) + first * r2;
        }
        form_and_contract(p);
      }
    });
  }
};

template <typename T>
void forward(Tensor& y, const Tensor& x, const std::optional<Tensor>& bias, const Layer<T>& layer) {
  layer.for_each_block([&](int64_t row, int64_t count) {
    Tensor effective = scratch<T>(0, count, layer.weight), columns = slice(y, 1, row, count);
    layer.run(row, count, &effective, nullptr, nullptr, nullptr, nullptr);
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
              const Layer<T>& layer, bool need_x, bool need_factors) {
  const int64_t m = layer.weight.size(0), n = layer.weight.size(1), r1 = da1.size(0), r2 = da2.size(0);
  const int64_t shares = layer.num_shares(m);
  const Buffer<T> da = need_factors ? zeros<T>(shares * (r1 + r2) * n) : nullptr;
  layer.for_each_block([&](int64_t row, int64_t count) {
    const Tensor columns = slice(dy, 1, row, count);
    std::optional<Tensor> effective, dw;
    if (need_x) effective = scratch<T>(0, count, layer.weight);
    if (need_factors) {
      dw = scratch<T>(1, count, layer.weight);
      gemm_(*dw, transposed(columns), x, 0.0, 1.0);
    }
    layer.run(row, count, effective ? &*effective : nullptr, dw ? &*dw : nullptr, da.get(), &db1, &db2);
    if (need_x) gemm_(dx, columns, *effective, row == 0 ? 0.0 : 1.0, 1.0);
  });
  if (!need_factors) return;
  torch::stable::parallel_for(0, r1 + r2, std::max<int64_t>(1, 32768 / (n + 1)), [&](int64_t lo, int64_t hi) {
    for (int64_t a = lo; a < hi; ++a) {
      T* out = a < r1 ? ptr<T>(da1) + a * n : ptr<T>(da2) + (a - r1) * n;
      for (int64_t k = 0; k < n; ++k) {
        T sum = 0;
        for (int64_t share = 0; share < shares; ++share) sum += da[(share * (r1 + r2) + a) * n + k];
        out[k] = layer.s * sum;
      }
    }
  });
}

}  // namespace

void dense_forward(Tensor& y, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& a1,
                   const Tensor& b1, const Tensor& a2, const Tensor& b2, double s) {
  if (x.scalar_type() == ScalarType::Double) {
    forward<double>(y, x, bias, {weight, {a1, a2}, {b1, b2}, s});
  } else {
    forward<float>(y, x, bias, {weight, {a1, a2}, {b1, b2}, static_cast<float>(s)});
  }
}

void dense_backward(Tensor& dx, Tensor& da1, Tensor& db1, Tensor& da2, Tensor& db2, const Tensor& x, const Tensor& dy,
                    const Tensor& weight, const Tensor& a1, const Tensor& b1, const Tensor& a2, const Tensor& b2, double s,
                    bool need_x, bool need_factors) {
  if (x.scalar_type() == ScalarType::Double) {
    backward<double>(dx, da1, db1, da2, db2, x, dy, {weight, {a1, a2}, {b1, b2}, s}, need_x, need_factors);
  } else {
    backward<float>(dx, da1, db1, da2, db2, x, dy, {weight, {a1, a2}, {b1, b2}, static_cast<float>(s)}, need_x, need_factors);
  }
}

}  // namespace abba::cpu
