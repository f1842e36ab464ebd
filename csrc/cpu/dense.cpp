// The dense plan: products with P = base + s (L1 R1) ⊙ (L2 R2), for fp32 and fp64, where r1*r2 is large against m*n/(m+n). P is
// formed strip by strip in the layout that the product reads, and a strip of its gradient is contracted onto the factors while
// it is in cache: neither is ever whole.
//   forward    y [T, m]  = x P + bias,  P [n, m] = W0^T + s (A1^T B1^T) ⊙ (A2^T B2^T)
//   backward   dx [T, n] = dy P,        P [m, n] = W0 + s (B1 A1) ⊙ (B2 A2),  dP = dy^T x
#include <memory>
#include <new>

#include "khatri_rao.h"
#include "kernels.h"

// The loops of a piece are compiled for several instruction sets, and run_piece picks by the processor. Each has vectors of its
// registers' width: g++ passes wider ones through memory, which made the loops thirty times slower.
#if defined(__x86_64__) && defined(__GNUC__)
#define ABBA_TARGET(instructions) __attribute__((target(instructions)))
#endif
#define ABBA_INLINE inline __attribute__((always_inline))
#ifdef __GNUC__
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed between inlined functions only
#endif

namespace abba::cpu {
namespace {

constexpr int64_t kLine = 64;              // bytes of a cache line
constexpr int64_t kPanelBytes = 24 << 10;  // of a product's right operand in the innermost loops: most of an L1 cache
constexpr int64_t kStrip = 96;             // rows of its left operand at once: they stay in L2
constexpr int64_t kColumns = 768;          // of P in a piece, at most, and
constexpr int64_t kTokens = 2048;          // tokens, at most: they bound the packed copies
constexpr int64_t kShareTokens = 512;      // that a thread takes at least where tokens are divided
constexpr int64_t kFormed = 64;            // columns of P that are formed at once, and
constexpr int64_t kRows = 16;              // rows: both products and the factors' panels are 32 KiB in fp32
constexpr int64_t kGroup = 4;              // rows that are formed while the next are fetched, a tile of multiply

struct Free {
  void operator()(void* memory) const { ::operator delete(memory, std::align_val_t{kLine}); }
};
template <typename T>
using Buffer = std::unique_ptr<T[], Free>;

template <typename T>
Buffer<T> zeros(int64_t count) {
  T* memory = static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t{kLine}));
  std::fill(memory, memory + count, T(0));
  return Buffer<T>(memory);
}

// Memory of this thread that outlives the call: fresh pages would cost more than what is computed in them.
template <typename T>
T* scratch(int64_t count) {
  thread_local struct {
    Buffer<T> memory;
    int64_t size = 0;
  } block;
  if (block.size < count) {
    block.memory = zeros<T>(count);
    block.size = count;
  }
  return block.memory.get();
}

constexpr int64_t round_up(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }
constexpr int64_t padded_rank(int64_t r) { return round_up(r, 16); }  // to whole vectors of any width

// The size of near-equal blocks of a length, none longer than the most; a multiple of kRows.
constexpr int64_t block_size(int64_t length, int64_t most) {
  const int64_t blocks = std::max<int64_t>(1, (length + most - 1) / most);
  return std::max(kRows, round_up((length + blocks - 1) / blocks, kRows));
}

template <typename T>
struct Matrix {  // element [i, j] is at[i * row + j * column]
  const T* at;
  int64_t row, column;

  Matrix from(int64_t i, int64_t j) const { return {at + i * row + j * column, row, column}; }
  Matrix transposed() const { return {at, column, row}; }
};

template <typename T>
struct Pair {
  Matrix<T> left, right;  // [K, r], [r, N]
  int64_t r;
  T *dleft, *dright;  // [K, padded_rank], [r, N]: added to, up to s
};

// What is computed at once: out = in P + bias for some tokens T and columns N of P, and from dP = in^T grad_in their part of the
// factors' gradients.
template <typename T>
struct Piece {
  int64_t tokens, depth, columns;  // T, K, N
  Matrix<T> in, base;              // [T, K], [K, N]
  T s;
  Pair<T> pair[2];
  const T* bias;      // [N], or null
  T* out;             // [T, N], or null
  int64_t out_ld;     // of out and of dright: N of the layer
  Matrix<T> grad_in;  // [T, N], or at null

  Piece part(int64_t token, int64_t num_tokens, int64_t column, int64_t num_columns) const {
    Piece p = *this;
    p.tokens = num_tokens, p.columns = num_columns;
    p.in = in.from(token, 0), p.base = base.from(0, column);
    for (Pair<T>& pair : p.pair) pair.right = pair.right.from(0, column);
    if (bias) p.bias += column;
    if (out) p.out += token * out_ld + column;
    if (grad_in.at) {
      p.grad_in = grad_in.from(token, column);
      for (Pair<T>& pair : p.pair) pair.dright += column;
    }
    return p;
  }
};

// --- the microkernel ---

template <typename V, typename T>
ABBA_INLINE V load(const T* at) {
  V value;
  __builtin_memcpy(&value, at, sizeof(V));
  return value;
}

template <typename V, typename T>
ABBA_INLINE void store(T* at, const V& value) {
  __builtin_memcpy(at, &value, sizeof(V));
}

template <typename T>
struct Left {  // a matrix's rows in tiles: element [i, d] of a tile is at[i * row + d * depth], and the next tile begins at + tile
  const T* at;
  int64_t row, depth, tile;
};

// out [kTileRows, kVectors vectors] = left [kTileRows, depth] * right [depth, ...], add: +=. The product is summed in
// registers and then added: sums of sums, whose rounding errors grow more slowly than those of one long sum.
template <typename T, typename V, int kTileRows, int kVectors>
ABBA_INLINE void multiply_tile(T* out, int64_t out_ld, const Left<T>& left, const T* right, int64_t right_ld, int64_t depth,
                               bool add) {
  constexpr int64_t width = sizeof(V) / sizeof(T);
  V sum[kTileRows][kVectors] = {};
#pragma GCC unroll 4
  for (int64_t d = 0; d < depth; ++d) {
    V line[kVectors];
    for (int v = 0; v < kVectors; ++v) line[v] = load<V>(right + d * right_ld + v * width);
    for (int i = 0; i < kTileRows; ++i)
      for (int v = 0; v < kVectors; ++v) sum[i][v] += line[v] * left.at[i * left.row + d * left.depth];
  }
  for (int i = 0; i < kTileRows; ++i)
    for (int v = 0; v < kVectors; ++v) {
      T* at = out + i * out_ld + v * width;
      store(at, add ? load<V>(at) + sum[i][v] : sum[i][v]);
    }
}

// The same for any number of rows. kAhead: the panel that follows this one is asked for meanwhile, a part for each tile.
template <typename T, typename V, int kTileRows, int kVectors, bool kAhead = false>
ABBA_INLINE void multiply_column(T* out, int64_t out_ld, int64_t rows, Left<T> left, const T* right, int64_t right_ld,
                                 int64_t depth, bool add) {
  constexpr int64_t line = kLine / static_cast<int64_t>(sizeof(T));
  const T* ahead = right + depth * right_ld;
  const int64_t part = kAhead ? round_up(depth * right_ld * kTileRows / rows, line) : 0;
  int64_t i = 0;
  for (; i + kTileRows <= rows; i += kTileRows, left.at += left.tile) {
    for (const T* end = ahead + part; ahead < end; ahead += line) __builtin_prefetch(ahead, 0, 2);
    multiply_tile<T, V, kTileRows, kVectors>(out + i * out_ld, out_ld, left, right, right_ld, depth, add);
  }
  for (; i < rows; ++i, left.at += left.row)
    multiply_tile<T, V, 1, kVectors>(out + i * out_ld, out_ld, left, right, right_ld, depth, add);
}

// out [rows, columns] = left [rows, depth] * right [depth, columns], for a short depth; columns is a multiple of the vector's
// width. Eight accumulators hide the latency of a multiply-add and leave room in 16 registers.
template <typename T, typename V>
ABBA_INLINE void multiply(T* out, int64_t out_ld, int64_t rows, int64_t columns, const Matrix<T>& left, const T* right,
                          int64_t right_ld, int64_t depth, bool add) {
  constexpr int64_t width = sizeof(V) / sizeof(T);
  int64_t k = 0;
  for (; k + 2 * width <= columns; k += 2 * width)
    multiply_column<T, V, 4, 2>(out + k, out_ld, rows, {left.at, left.row, left.column, 4 * left.row}, right + k, right_ld,
                                depth, add);
  if (k < columns)
    multiply_column<T, V, 8, 1>(out + k, out_ld, rows, {left.at, left.row, left.column, 8 * left.row}, right + k, right_ld,
                                depth, add);
}

// --- packing: what the innermost loops read lies in the order in which they read it ---

// to [depth, width], rows to_ld apart, = the transpose of from [width, depth], rows from_ld apart; vectors of 16 bytes, which any
// processor interleaves in one instruction.
template <typename T>
ABBA_INLINE void transpose(T* to, int64_t to_ld, const T* from, int64_t from_ld, int64_t depth) {
  using V __attribute__((vector_size(16))) = T;
  constexpr int64_t width = 16 / sizeof(T);
  int64_t d = 0;
#if __has_builtin(__builtin_shufflevector)
  for (; d + width <= depth; d += width) {
    V in[width], out[width];
    for (int i = 0; i < width; ++i) in[i] = load<V>(from + i * from_ld + d);
    for (int stage = 1; stage < width; stage *= 2) {
      for (int i = 0; i < width / 2; ++i) {
        if constexpr (width == 4) {
          out[2 * i] = __builtin_shufflevector(in[i], in[i + 2], 0, 4, 1, 5);
          out[2 * i + 1] = __builtin_shufflevector(in[i], in[i + 2], 2, 6, 3, 7);
        } else {
          out[2 * i] = __builtin_shufflevector(in[i], in[i + 1], 0, 2);
          out[2 * i + 1] = __builtin_shufflevector(in[i], in[i + 1], 1, 3);
        }
      }
      for (int i = 0; i < width; ++i) in[i] = out[i];
    }
    for (int i = 0; i < width; ++i) store(to + (d + i) * to_ld, in[i]);
  }
#endif
  for (; d < depth; ++d)
    for (int i = 0; i < width; ++i) to[d * to_ld + i] = from[i * from_ld + d];
}

// to [columns, kTileRows] = the transpose of from [kTileRows, columns]
template <int kTileRows, typename T>
ABBA_INLINE void pack_tile(T* to, const Matrix<T>& from, int64_t columns) {
  constexpr int width = 16 / sizeof(T);
  if (from.row == 1) {
    for (int64_t d = 0; d < columns; ++d) {
      __builtin_prefetch(from.at + (d + kRows) * from.column);
      __builtin_memcpy(to + d * kTileRows, from.at + d * from.column, kTileRows * sizeof(T));
    }
  } else if (from.column == 1) {
    for (int i = 0; i < kTileRows; i += width) {
      const int first = std::min(i, kTileRows - width);  // the last rows again, where they don't fill a group
      transpose(to + first, kTileRows, from.at + first * from.row, from.row, columns);
    }
  } else {
    for (int64_t d = 0; d < columns; ++d)
      for (int i = 0; i < kTileRows; ++i) to[d * kTileRows + i] = from.at[i * from.row + d * from.column];
  }
}

// to [kRows, kFormed] = from [kRows, columns], whose columns are contiguous
template <typename T>
ABBA_INLINE void turn(T* to, const Matrix<T>& from, int64_t columns) {
  constexpr int64_t width = 16 / sizeof(T);
  int64_t c = 0;
  for (; c + width <= columns; c += width) transpose(to + c, kFormed, from.at + c * from.column, from.column, kRows);
  for (; c < columns; ++c)
    for (int64_t i = 0; i < kRows; ++i) to[i * kFormed + c] = from.at[i + c * from.column];
}

// to [rows / kTileRows, columns, kTileRows] = from [rows, columns]; the last tile is not filled up
template <int kTileRows, typename T>
ABBA_INLINE void pack_tiles(T* to, const Matrix<T>& from, int64_t rows, int64_t columns) {
  const int64_t block = from.row == 1 ? kRows : columns;  // whole lines of a few columns rather than parts of many
  for (int64_t d = 0; d < columns; d += block) {
    const int64_t count = std::min(block, columns - d);
    int64_t i = 0;
    for (; i + kTileRows <= rows; i += kTileRows) pack_tile<kTileRows>(to + i * columns + d * kTileRows, from.from(i, d), count);
    for (int64_t j = i; j < rows; ++j)
      for (int64_t c = d; c < d + count; ++c) to[i * columns + c * kTileRows + j - i] = from.at[j * from.row + c * from.column];
  }
}

// to [columns / kPanel, rows, kPanel] = from [rows, columns], the last panel filled up with zeros
template <int64_t kPanel, typename T>
ABBA_INLINE void pack_panels(T* to, const Matrix<T>& from, int64_t rows, int64_t columns) {
  for (int64_t first = 0; first < rows; first += kRows)
    for (int64_t c = 0; c < columns; c += kPanel)
      for (int64_t i = first; i < std::min(first + kRows, rows); ++i) {
        const Matrix<T> row = from.from(i, c);
        T* line = to + c * rows + i * kPanel;
        const int64_t count = std::min(kPanel, columns - c);
        if (row.column == 1 && count == kPanel) {
          __builtin_prefetch(row.at + kRows * row.row);
          __builtin_memcpy(line, row.at, kPanel * sizeof(T));
        } else {
          for (int64_t j = 0; j < kPanel; ++j) line[j] = j < count ? row.at[j * row.column] : T(0);
        }
      }
}

// --- one piece ---

template <typename T>
struct Stage {  // kFormed columns of a pair's right factor: [r, kFormed], [kFormed, padded_rank], its gradient [r, kFormed]
  T *right, *right_t, *dright;
};

template <typename T, int kVectorBytes>
struct Loops {
  using V __attribute__((vector_size(kVectorBytes))) = T;
  static constexpr int64_t width = kVectorBytes / sizeof(T), kPanel = 2 * width;
  static constexpr int kTileRows = kVectorBytes == 64 ? 12 : 6;  // with two vectors a row, most of the registers are accumulators
  static constexpr int64_t kDepth = kPanelBytes / (kPanel * static_cast<int64_t>(sizeof(T)));

  const Piece<T>& p;
  const bool gradient = p.grad_in.at;
  const int64_t depth_block = block_size(p.depth, kDepth), token_block = block_size(p.tokens, kDepth);
  const int64_t ld = round_up(p.columns, kFormed);
  const int64_t first_stage = kFormed * (2 * p.pair[0].r + padded_rank(p.pair[0].r));  // its size
  const int64_t both_stages = first_stage + kFormed * (2 * p.pair[1].r + padded_rank(p.pair[1].r));
  T* const tiles = scratch<T>(kStrip * kDepth + ld * depth_block + ld / kFormed * both_stages +
                              (gradient ? ld * (kStrip + p.tokens) : 0));  // of in
  T* const operand = tiles + kStrip * kDepth;   // P [ld / kPanel, depth, kPanel]
  T* const stages = operand + ld * depth_block;
  T* const strip = stages + ld / kFormed * both_stages;  // of dP: [kStrip, ld]
  T* const panels = strip + kStrip * ld;        // grad_in [blocks of tokens, ld / kPanel, tokens, kPanel]

  ABBA_INLINE Stage<T> stage(int64_t column, int i) const {
    T* at = stages + column / kFormed * both_stages + i * first_stage;
    const int64_t r = p.pair[i].r;
    return {at, at + r * kFormed, at + (r + padded_rank(r)) * kFormed};
  }

  ABBA_INLINE void pack() const {
    for (int64_t f = 0; f < p.columns; f += kFormed)
      for (int i = 0; i < 2; ++i) {
        const Stage<T> to = stage(f, i);
        const Matrix<T> right = p.pair[i].right.from(0, f);
        const int64_t r = p.pair[i].r, padded = padded_rank(r), count = std::min(kFormed, p.columns - f);
        for (int64_t a = 0; a < r; ++a)
          for (int64_t c = 0; c < kFormed; ++c)
            to.right[a * kFormed + c] = c < count ? right.at[a * right.row + c * right.column] : T(0);
        if (!gradient) continue;
        for (int64_t c = 0; c < kFormed; ++c)
          for (int64_t a = 0; a < padded; ++a) to.right_t[c * padded + a] = a < r ? to.right[a * kFormed + c] : T(0);
        std::fill(to.dright, to.dright + r * kFormed, T(0));
      }
    if (!gradient) return;
    for (int64_t t = 0; t < p.tokens; t += token_block)
      pack_panels<kPanel>(panels + t * ld, p.grad_in.from(t, 0), std::min(token_block, p.tokens - t), p.columns);
  }

  // strip [rows, columns] = in^T grad_in, rows from k on
  ABBA_INLINE void multiply_gradient(int64_t k, int64_t rows) const {
    for (int64_t t = 0; t < p.tokens; t += token_block) {
      const int64_t tokens = std::min(token_block, p.tokens - t);
      pack_tiles<kTileRows>(tiles, p.in.from(t, k).transposed(), rows, tokens);
      for (int64_t c = 0; c < p.columns; c += kPanel)
        multiply_column<T, V, kTileRows, 2, true>(strip + c, ld, rows, {tiles, 1, kTileRows, kTileRows * tokens},
                                                  panels + t * ld + c * tokens, kPanel, tokens, t > 0);
    }
  }

  // Asks for the lines of kRows rows of the base: some of them at each of the kRows / kGroup calls.
  ABBA_INLINE void prefetch_base(const Matrix<T>& base, int64_t rows, int64_t columns, int64_t group) const {
    constexpr int64_t line = kLine / static_cast<int64_t>(sizeof(T)), groups = kRows / kGroup;
    if (base.column == 1) {
      for (int64_t i = group * kGroup; i < std::min((group + 1) * kGroup, rows); ++i)
        for (int64_t j = 0; j < columns; j += line) __builtin_prefetch(base.at + i * base.row + j);
    } else {
      for (int64_t j = group * columns / groups; j < (group + 1) * columns / groups; ++j)
        for (int64_t i = 0; i < rows; i += line) __builtin_prefetch(base.at + i * base.row + j * base.column);
    }
  }

  // One row of kFormed columns into the panels of the operand: base + s m1 ⊙ m2
  ABBA_INLINE void form_row(T* to, int64_t panel_size, const Matrix<T>& base, const T* m1, const T* m2, int64_t count) const {
    for (int64_t c = 0; c < count; c += kPanel, to += panel_size) {
      const T* from = base.at + c * base.column;
      if (base.column == 1 && c + kPanel <= count) {
        for (int64_t j = 0; j < kPanel; j += width)
          store(to + j, load<V>(from + j) + p.s * load<V>(m1 + c + j) * load<V>(m2 + c + j));
      } else {
        for (int64_t j = 0; j < kPanel; ++j) to[j] = c + j < count ? from[j * base.column] + p.s * m1[c + j] * m2[c + j] : T(0);
      }
    }
  }

  // Rows [k + first, k + first + height) of P, with M1 = L1 R1 and M2 = L2 R2 in L1: operand = base + s M1 ⊙ M2; dP ⊙ M2, the
  // gradient of M1 up to s, is contracted onto L1 and R1, dP ⊙ M1 onto L2 and R2.
  ABBA_INLINE void form_and_contract(int64_t k, int64_t first, int64_t height, int64_t depth) const {
    alignas(kLine) T product[2][kRows * kFormed], turned[kRows * kFormed];
    for (int64_t f = 0; f < p.columns; f += kFormed) {
      const int64_t count = std::min(kFormed, p.columns - f);
      const Stage<T> stages[2] = {stage(f, 0), stage(f, 1)};
      for (int64_t j = 0; j < height; j += kRows) {
        const int64_t rows = std::min(kRows, height - j), row = k + first + j;
        Matrix<T> base = p.base.from(row, f);
        for (int64_t g = 0; g < rows; g += kGroup) {
          if (p.out) prefetch_base(base.from(kRows, 0), std::min(kRows, height - j - kRows), count, g / kGroup);
          for (int i = 0; i < 2; ++i)
            multiply<T, V>(product[i] + g * kFormed, kFormed, std::min(kGroup, rows - g), kFormed,
                           p.pair[i].left.from(row + g, 0), stages[i].right, kFormed, p.pair[i].r, false);
        }
        if (p.out && base.row == 1 && rows == kRows) {
          turn(turned, base, count);
          base = {turned, kFormed, 1};
        }
        for (int64_t i = 0; i < rows; ++i) {
          T *m1 = product[0] + i * kFormed, *m2 = product[1] + i * kFormed;
          if (p.out)
            form_row(operand + f * depth + (first + j + i) * kPanel, depth * kPanel, base.from(i, 0), m1, m2, count);
          if (!gradient) continue;
          for (int64_t c = 0; c < kFormed; c += width) {
            const V dp = load<V>(strip + (j + i) * ld + f + c), dm1 = dp * load<V>(m2 + c);
            store(m2 + c, dp * load<V>(m1 + c));
            store(m1 + c, dm1);
          }
        }
        if (!gradient) continue;
        for (int i = 0; i < 2; ++i) {
          const Pair<T>& pair = p.pair[i];
          const int64_t padded = padded_rank(pair.r);
          multiply<T, V>(pair.dleft + row * padded, padded, rows, padded, {product[i], kFormed, 1}, stages[i].right_t, padded,
                         count, true);
          multiply<T, V>(stages[i].dright, kFormed, pair.r, kFormed, pair.left.from(row, 0).transposed(), product[i], kFormed,
                         rows, true);
        }
      }
    }
  }

  // out = in operand, or +=; in's columns from k on
  ABBA_INLINE void multiply_out(int64_t k, int64_t depth) const {
    alignas(kLine) T last[kStrip * kPanel];  // where P ends within a panel
    for (int64_t t = 0; t < p.tokens; t += kStrip) {
      const int64_t rows = std::min(kStrip, p.tokens - t);
      pack_tiles<kTileRows>(tiles, p.in.from(t, k), rows, depth);
      for (int64_t c = 0; c < p.columns; c += kPanel) {
        const int64_t count = std::min(kPanel, p.columns - c);
        const bool whole = count == kPanel, add = p.bias || k > 0;
        T* out = p.out + t * p.out_ld + c;
        if (p.bias && k == 0)
          for (int64_t i = 0; i < rows; ++i) std::copy(p.bias + c, p.bias + c + count, out + i * p.out_ld);
        multiply_column<T, V, kTileRows, 2>(whole ? out : last, whole ? p.out_ld : kPanel, rows,
                                            {tiles, 1, kTileRows, kTileRows * depth}, operand + c * depth, kPanel, depth,
                                            whole && add);
        if (whole) continue;
        for (int64_t i = 0; i < rows; ++i)
          for (int64_t j = 0; j < count; ++j)
            out[i * p.out_ld + j] = (add ? out[i * p.out_ld + j] : T(0)) + last[i * kPanel + j];
      }
    }
  }

  ABBA_INLINE void run() const {
    pack();
    for (int64_t k = 0; k == 0 || k < p.depth; k += depth_block) {
      const int64_t depth = std::min(depth_block, p.depth - k);
      for (int64_t first = 0; first < depth; first += kStrip) {
        const int64_t height = std::min(kStrip, depth - first);
        if (gradient) multiply_gradient(k + first, height);
        form_and_contract(k, first, height, depth);
      }
      if (p.out) multiply_out(k, depth);
    }
    if (!gradient) return;
    for (int64_t f = 0; f < p.columns; f += kFormed)
      for (int i = 0; i < 2; ++i)
        for (int64_t a = 0; a < p.pair[i].r; ++a)
          for (int64_t c = 0; c < std::min(kFormed, p.columns - f); ++c)
            p.pair[i].dright[a * p.out_ld + f + c] += stage(f, i).dright[a * kFormed + c];
  }
};

template <typename T>
void run_piece_128(const Piece<T>& p) {
  Loops<T, 16>{p}.run();
}

#ifdef ABBA_TARGET
template <typename T>
ABBA_TARGET("avx2,fma") void run_piece_256(const Piece<T>& p) {
  Loops<T, 32>{p}.run();
}

template <typename T>
ABBA_TARGET("avx512f,fma") void run_piece_512(const Piece<T>& p) {
  Loops<T, 64>{p}.run();
}
#endif

template <typename T>
void run_piece(const Piece<T>& p) {
#ifdef ABBA_TARGET
  if (__builtin_cpu_supports("avx512f")) return run_piece_512(p);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return run_piece_256(p);
#endif
  run_piece_128(p);
}

// --- a layer ---

// How the threads divide the work: by P's columns, each of which is formed once, and only then by tokens, enough of them that
// forming P again costs little beside their products. The sums depend on the number of threads and on nothing else.
struct Shares {
  int64_t columns, tokens;

  Shares(int64_t num_columns, int64_t num_tokens) {
    const int64_t threads = torch::stable::get_num_threads();
    columns = std::clamp<int64_t>(num_columns / kFormed, 1, threads);
    tokens = std::clamp<int64_t>(num_tokens / kShareTokens, 1, threads / columns);
  }
};

template <typename T>
T* ptr(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

template <typename T>
Matrix<T> matrix(const Tensor& t) {
  return {ptr<T>(t), t.stride(0), t.stride(1)};
}

// The whole layer is one piece, cut into as many as are computed one after the other. For gradients, dleft points to an array of
// dleft_size for each share, and dright to one of dright_size for each share of the tokens.
template <typename T>
void run(const Piece<T>& layer, const Shares& shares, int64_t dleft_size, int64_t dright_size) {
  constexpr int64_t unit = 32;
  const int64_t units = (layer.columns + unit - 1) / unit;
  torch::stable::parallel_for(0, shares.columns * shares.tokens, 1, [&](int64_t lo, int64_t hi) {
    for (int64_t share = lo; share < hi; ++share) {
      const int64_t i = share % shares.columns, j = share / shares.columns;
      const int64_t c0 = units * i / shares.columns * unit, c1 = std::min(units * (i + 1) / shares.columns * unit, layer.columns);
      const int64_t t0 = layer.tokens * j / shares.tokens, t1 = layer.tokens * (j + 1) / shares.tokens;
      Piece<T> p = layer;
      if (p.grad_in.at)
        for (Pair<T>& pair : p.pair) pair.dleft += share * dleft_size, pair.dright += j * dright_size;
      const int64_t columns = block_size(c1 - c0, kColumns), tokens = block_size(t1 - t0, kTokens);
      for (int64_t c = c0; c < c1; c += columns)
        for (int64_t t = t0; t < t1; t += tokens)
          run_piece(p.part(t, std::min(tokens, t1 - t), c, std::min(columns, c1 - c)));
    }
  });
}

// out [rows, columns] = s times the sum of as many parts [rows, ld], stride apart
template <typename T>
void sum_parts(Tensor& out, const T* parts, int64_t ld, int64_t stride, int64_t count, T s) {
  const int64_t columns = out.size(1);
  T* const g_out = ptr<T>(out);
  torch::stable::parallel_for(0, out.size(0), std::max<int64_t>(1, 32768 / (columns + 1)), [&](int64_t lo, int64_t hi) {
    for (int64_t i = lo; i < hi; ++i)
      for (int64_t j = 0; j < columns; ++j) {
        T sum = 0;
        for (int64_t part = 0; part < count; ++part) sum += parts[part * stride + i * ld + j];
        g_out[i * columns + j] = s * sum;
      }
  });
}

template <typename T>
void forward(Tensor& y, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor (&a)[2],
             const Tensor (&b)[2], T s) {
  std::optional<Tensor> row;  // the bias, kept until the end
  Piece<T> p{x.size(0), weight.size(1), weight.size(0), matrix<T>(x), matrix<T>(weight).transposed(), s};
  for (int i = 0; i < 2; ++i) p.pair[i] = {matrix<T>(a[i]).transposed(), matrix<T>(b[i]).transposed(), a[i].size(0)};
  if (bias) row = torch::stable::contiguous(*bias), p.bias = ptr<T>(*row);
  p.out = ptr<T>(y), p.out_ld = p.columns;
  run(p, Shares(p.columns, p.tokens), 0, 0);
}

template <typename T>
void backward(Tensor& dx, Tensor (&da)[2], Tensor (&db)[2], const Tensor& x, const Tensor& dy, const Tensor& weight,
              const Tensor (&a)[2], const Tensor (&b)[2], T s, bool need_x, bool need_factors) {
  Piece<T> p{x.size(0), weight.size(0), weight.size(1), matrix<T>(dy), matrix<T>(weight), s};
  for (int i = 0; i < 2; ++i) p.pair[i] = {matrix<T>(b[i]), matrix<T>(a[i]), a[i].size(0)};
  p.out = need_x ? ptr<T>(dx) : nullptr, p.out_ld = p.columns;
  const Shares shares(p.columns, p.tokens);
  if (!need_factors) return run(p, shares, 0, 0);
  p.grad_in = matrix<T>(x);
  const int64_t ld[2] = {padded_rank(p.pair[0].r), padded_rank(p.pair[1].r)}, dleft_size = p.depth * (ld[0] + ld[1]);
  const int64_t dright_size = (p.pair[0].r + p.pair[1].r) * p.columns, num_shares = shares.columns * shares.tokens;
  const Buffer<T> dleft = zeros<T>(num_shares * dleft_size), dright = zeros<T>(shares.tokens * dright_size);
  p.pair[0].dleft = dleft.get(), p.pair[1].dleft = dleft.get() + p.depth * ld[0];
  p.pair[0].dright = dright.get(), p.pair[1].dright = dright.get() + p.pair[0].r * p.columns;
  run(p, shares, dleft_size, dright_size);
  for (int i = 0; i < 2; ++i) {
    sum_parts<T>(db[i], p.pair[i].dleft, ld[i], dleft_size, num_shares, s);
    sum_parts<T>(da[i], p.pair[i].dright, p.columns, dright_size, shares.tokens, s);
  }
}

}  // namespace

void dense_forward(Tensor& y, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& a1,
                   const Tensor& b1, const Tensor& a2, const Tensor& b2, double s) {
  const Tensor a[] = {a1, a2}, b[] = {b1, b2};
  if (x.scalar_type() == ScalarType::Double) {
    forward<double>(y, x, weight, bias, a, b, s);
  } else {
    forward<float>(y, x, weight, bias, a, b, static_cast<float>(s));
  }
}

void dense_backward(Tensor& dx, Tensor& da1, Tensor& db1, Tensor& da2, Tensor& db2, const Tensor& x, const Tensor& dy,
                    const Tensor& weight, const Tensor& a1, const Tensor& b1, const Tensor& a2, const Tensor& b2, double s,
                    bool need_x, bool need_factors) {
  const Tensor a[] = {a1, a2}, b[] = {b1, b2};
  Tensor da[] = {da1, da2}, db[] = {db1, db2};
  if (x.scalar_type() == ScalarType::Double) {
    backward<double>(dx, da, db, x, dy, weight, a, b, s, need_x, need_factors);
  } else {
    backward<float>(dx, da, db, x, dy, weight, a, b, static_cast<float>(s), need_x, need_factors);
  }
}

}  // namespace abba::cpu
