// Tiles of two-byte elements in shared memory: swizzled so that ldmatrix meets no bank twice, filled by guarded copies
// from global memory (cp.async of 16 bytes or of 4, as the alignment allows, or element by element).
#pragma once
#include "compat.cuh"
#include "ptx.cuh"

namespace abba {

constexpr int kChunk = 8;  // elements of a 16-byte chunk

// Rows of kColumns elements (a power of two >= 8), one behind the other. A chunk's place in its row is XORed with the row
// number, so that eight rows of one chunk column, which is what ldmatrix reads at once, lie in eight different bank groups.
template <int kColumns>
struct Tile {
  static constexpr int kChunks = kColumns / kChunk;
  static constexpr int kRowBytes = 2 * kColumns;
  static constexpr int kRowsPerLine = kRowBytes < 128 ? 128 / kRowBytes : 1;
  static constexpr int kMask = (kChunks < 8 ? kChunks : 8) - 1;

  ABBA_DEVICE static uint32_t chunk_offset(int row, int chunk) {
    return row * kRowBytes + ((chunk ^ (row / kRowsPerLine & kMask)) << 4);
  }
  ABBA_DEVICE static uint32_t element_offset(int row, int column) {
    return chunk_offset(row, column / kChunk) + 2 * (column % kChunk);
  }
};

// Which source columns a tile's chunk holds: the first one, and how many count (the rest is zero).
struct Span {
  int64_t column;
  int count;
};

ABBA_DEVICE int clamp_count(int64_t count) { return count < 0 ? 0 : count > kChunk ? kChunk : static_cast<int>(count); }

// Columns of x or y: those of the matrix.
struct FeatureColumns {
  int64_t first, num_features;
  ABBA_DEVICE Span operator()(int chunk) const {
    const int64_t column = first + chunk * kChunk;
    return {column, clamp_count(num_features - column)};
  }
};

// Columns of u or v: (a, b) with b padded to kRank2.
template <int kRank2>
struct RankColumns {
  int first_a, r1, r2;
  ABBA_DEVICE Span operator()(int chunk) const {
    const int a = first_a + chunk * kChunk / kRank2, b = chunk * kChunk % kRank2;
    return {static_cast<int64_t>(a) * r2 + b, a < r1 ? clamp_count(r2 - b) : 0};
  }
};

// Bytes that may be copied at a time, 16, 4 or 2: what divides the start of each row and of each run of columns in it.
ABBA_DEVICE int copy_bytes(const void* g, int64_t stride, int run = kChunk) {
  const uintptr_t starts = reinterpret_cast<uintptr_t>(g) | static_cast<uintptr_t>(2 * stride | 2 * run);
  return starts % 16 == 0 ? 16 : starts % 4 == 0 ? 4 : 2;
}

// This thread's chunks of a tile: they lie in one chunk column, kRowStep rows apart.
template <int kRows, int kColumns, int kThreads>
struct ThreadChunks {
  static constexpr int kChunks = Tile<kColumns>::kChunks, kRowStep = kThreads / kChunks, kCount = kRows / kRowStep;
  static_assert(kThreads % kChunks == 0 && kRows % kRowStep == 0);

  template <typename Body>
  ABBA_DEVICE static void for_each(Body body) {  // body(row)
    #pragma unroll
    for (int i = 0; i < kCount; ++i) body(first_row() + i * kRowStep);
  }
  ABBA_DEVICE static int chunk() { return static_cast<int>(threadIdx.x) % kChunks; }
  ABBA_DEVICE static int first_row() { return static_cast<int>(threadIdx.x) / kChunks; }
};

// Starts copying kRows rows from `row` of g [num_rows, .]; rows and columns outside become zero. Ends with cp_async_wait.
template <int kRows, int kColumns, int kThreads, typename T, typename Columns>
ABBA_DEVICE void load_tile(unsigned char* s_tile, const T* g, int64_t stride, int64_t row, int64_t num_rows,
                           const Columns& columns, int bytes) {
  using Chunks = ThreadChunks<kRows, kColumns, kThreads>;
  const int chunk = Chunks::chunk();
  const Span span = columns(chunk);
  const int rows = num_rows - row < kRows ? static_cast<int>(num_rows - row) : kRows;
  const T* source = g + (row + Chunks::first_row()) * stride + span.column;
  const int64_t step = Chunks::kRowStep * stride;
  const uint32_t s_address = smem_address(s_tile);
  if (bytes == 16) {
    Chunks::for_each([&](int r) {
      const int count = r < rows ? span.count : 0;
      cp_async_16(s_address + Tile<kColumns>::chunk_offset(r, chunk), count ? source : g, 2 * count);
      source += step;
    });
  } else if (bytes == 4) {
    #pragma unroll 1
    for (int r = Chunks::first_row(); r < kRows; r += Chunks::kRowStep) {
      #pragma unroll
      for (int e = 0; e < kChunk; e += 2) {
        const int left = r < rows ? max(0, min(2, span.count - e)) : 0;
        cp_async_4(s_address + Tile<kColumns>::chunk_offset(r, chunk) + 2 * e, left ? source + e : g, 2 * left);
      }
      source += step;
    }
  } else {
    #pragma unroll 1
    for (int r = Chunks::first_row(); r < kRows; r += Chunks::kRowStep) {
      T* s_chunk = reinterpret_cast<T*>(s_tile + Tile<kColumns>::chunk_offset(r, chunk));
      #pragma unroll 1
      for (int e = 0; e < kChunk; ++e) {
        const T value = r < rows && e < span.count ? source[e] : T(0.f);
        s_chunk[e] = value;
      }
      source += step;
    }
  }
}

// The way back, for what lies inside.
template <int kRows, int kColumns, int kThreads, typename T, typename Columns>
ABBA_DEVICE void store_tile(T* g, int64_t stride, int64_t row, int64_t num_rows, const Columns& columns, bool aligned,
                            const unsigned char* s_tile) {
  using Chunks = ThreadChunks<kRows, kColumns, kThreads>;
  const int chunk = Chunks::chunk();
  const Span span = columns(chunk);
  const int rows = num_rows - row < kRows ? static_cast<int>(num_rows - row) : kRows;
  T* target = g + (row + Chunks::first_row()) * stride + span.column;
  const int64_t step = Chunks::kRowStep * stride;
  if (aligned && span.count == kChunk) {
    Chunks::for_each([&](int r) {
      const uint4 whole = *reinterpret_cast<const uint4*>(s_tile + Tile<kColumns>::chunk_offset(r, chunk));
      if (r < rows) *reinterpret_cast<uint4*>(target) = whole;
      target += step;
    });
  } else {
    #pragma unroll 1
    for (int r = Chunks::first_row(); r < rows; r += Chunks::kRowStep) {
      const T* s_chunk = reinterpret_cast<const T*>(s_tile + Tile<kColumns>::chunk_offset(r, chunk));
      #pragma unroll 1
      for (int e = 0; e < span.count; ++e) target[e] = s_chunk[e];
      target += step;
    }
  }
}

// --- operand fragments of mma.m16n8k16; `m`, `n` and `k` count from the tile's corner and are multiples of 8 ---

// A (16 rows m, 16 columns k). The tile is [m][k]; with kTrans [k][m].
template <bool kTrans, int kColumns>
ABBA_DEVICE void load_a(uint32_t (&a)[4], uint32_t s_tile, int m, int k) {
  const int lane = threadIdx.x % 32, low = lane % 16, high = lane / 16;
  if constexpr (kTrans) {
    ldmatrix_x4<true>(a, s_tile + Tile<kColumns>::chunk_offset(k + lane % 8 + 8 * high, m / 8 + lane / 8 % 2));
  } else {
    ldmatrix_x4<false>(a, s_tile + Tile<kColumns>::chunk_offset(m + low, k / 8 + high));
  }
}

// Half of A (8 columns k): a[0] and a[1].
template <bool kTrans, int kColumns>
ABBA_DEVICE void load_a_half(uint32_t (&a)[2], uint32_t s_tile, int m, int k) {
  const int lane = threadIdx.x % 16;
  if constexpr (kTrans) {
    ldmatrix_x2<true>(a, s_tile + Tile<kColumns>::chunk_offset(k + lane % 8, m / 8 + lane / 8));
  } else {
    ldmatrix_x2<false>(a, s_tile + Tile<kColumns>::chunk_offset(m + lane, k / 8));
  }
}

// B for two n8 tiles (16 columns n, 16 rows k): b[0], b[1] the first, b[2], b[3] the second. The tile is [n][k]; with kTrans [k][n].
template <bool kTrans, int kColumns>
ABBA_DEVICE void load_b(uint32_t (&b)[4], uint32_t s_tile, int n, int k) {
  const int lane = threadIdx.x % 32, low = lane % 16, high = lane / 16;
  if constexpr (kTrans) {
    ldmatrix_x4<true>(b, s_tile + Tile<kColumns>::chunk_offset(k + low, n / 8 + high));
  } else {
    ldmatrix_x4<false>(b, s_tile + Tile<kColumns>::chunk_offset(n + lane % 8 + 8 * high, k / 8 + lane / 8 % 2));
  }
}

// B for one n8 tile.
template <bool kTrans, int kColumns>
ABBA_DEVICE void load_b(uint32_t (&b)[2], uint32_t s_tile, int n, int k) {
  const int lane = threadIdx.x % 16;
  if constexpr (kTrans) {
    ldmatrix_x2<true>(b, s_tile + Tile<kColumns>::chunk_offset(k + lane, n / 8));
  } else {
    ldmatrix_x2<false>(b, s_tile + Tile<kColumns>::chunk_offset(n + lane % 8, k / 8 + lane / 8));
  }
}

// Half of B (8 rows k) for four n8 tiles.
template <bool kTrans, int kColumns>
ABBA_DEVICE void load_b_half(uint32_t (&b)[4], uint32_t s_tile, int n, int k) {
  const int lane = threadIdx.x % 32;
  if constexpr (kTrans) {
    ldmatrix_x4<true>(b, s_tile + Tile<kColumns>::chunk_offset(k + lane % 8, n / 8 + lane / 8));
  } else {
    ldmatrix_x4<false>(b, s_tile + Tile<kColumns>::chunk_offset(n + lane, k / 8));
  }
}

}  // namespace abba
