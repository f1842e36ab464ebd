// The only place that knows how a Khatri–Rao fragment forms: KR[(a, b), d] = f1[a, d] f2[b, d], index a*r2 + b.
//
// A fragment of f2 comes from shared memory by ldmatrix (the tile keeps the factor's own order, [r, D] or [D, r]) and serves
// every a; f1 is staged in the order in which lanes read it. One packed multiply makes two elements of the operand, in the
// register that the tensor core reads. b is padded with zeros to kRank2, a power of two, while it is staged.
#pragma once
#include <type_traits>

#include "../launchers.h"
#include "tile.cuh"

namespace abba {

// fn(T{}) for the activations' element type.
template <typename Fn>
int with_element_type(Dtype dtype, Fn&& fn) {
  return dtype == Dtype::kFloat16 ? fn(__half{}) : fn(__nv_bfloat16{});
}

template <typename T>
ABBA_DEVICE T from_float(float value) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(value);
  } else {
    return __float2bfloat16_rn(value);
  }
}

template <typename T>
ABBA_DEVICE float to_float(T value) {
  if constexpr (std::is_same_v<T, __half>) {
    return __half2float(value);
  } else {
    return __bfloat162float(value);
  }
}

template <typename T>
ABBA_DEVICE uint32_t pack(T low, T high) {
  return static_cast<uint32_t>(reinterpret_cast<const uint16_t&>(low)) |
         static_cast<uint32_t>(reinterpret_cast<const uint16_t&>(high)) << 16;
}

template <typename T>
ABBA_DEVICE T half_of(uint32_t word, int half) {
  const uint16_t bits = static_cast<uint16_t>(word >> (16 * half));
  return reinterpret_cast<const T&>(bits);
}

// Two products, each rounded once.
template <typename T>
ABBA_DEVICE uint32_t multiply2(uint32_t x, uint32_t y) {
  using T2 = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
  const T2 product = __hmul2(reinterpret_cast<const T2&>(x), reinterpret_cast<const T2&>(y));
  return reinterpret_cast<const uint32_t&>(product);
}

// One half of a word in both halves.
ABBA_DEVICE uint32_t broadcast_half(uint32_t word, int half) {
#ifdef __CUDA_ARCH__
  return __byte_perm(word, 0, half ? 0x3232 : 0x1010);
#else
  return (word >> (16 * half) & 0xffff) * 0x10001u;
#endif
}

// --- a factor's elements ---

template <typename T>
ABBA_DEVICE float factor_at(const Factor& f, bool fp32, int64_t rank, int64_t feature) {
  const int64_t at = rank * f.rank_stride + feature * f.feature_stride;
  return fp32 ? static_cast<const float*>(f.data)[at] : to_float(static_cast<const T*>(f.data)[at]);
}

// Powers of two that f1 and f2 are multiplied by before they are rounded, and what undoes both. In float16 a product of two
// small factors would be rounded to zero: the largest of each is brought to about 2^7, so that products reach 2^15.
struct Scales {
  float f1, f2, undo;
};

ABBA_DEVICE float power_of_two(int exponent) {  // -126 to 127
  const uint32_t bits = static_cast<uint32_t>(127 + exponent) << 23;
  return reinterpret_cast<const float&>(bits);
}

// partial_maxima [2][32] of |f1| and |f2|, from factor_magnitudes; every thread of a warp calls it.
template <typename T>
ABBA_DEVICE Scales scales_of(const void* partial_maxima) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return {1.f, 1.f, 1.f};
  } else {
    int exponents[2];
    #pragma unroll
    for (int i = 0; i < 2; ++i) {
      float largest = static_cast<const float*>(partial_maxima)[32 * i + threadIdx.x % 32];
      #pragma unroll
      for (int offset = 16; offset > 0; offset /= 2)
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, offset));
      const int exponent = static_cast<int>(reinterpret_cast<const uint32_t&>(largest) >> 23) - 126;  // 2^(exponent-1) <= largest
      exponents[i] = largest > 0.f && largest < INFINITY ? max(-60, min(60, 7 - exponent)) : 0;
    }
    return {power_of_two(exponents[0]), power_of_two(exponents[1]), power_of_two(-exponents[0] - exponents[1])};
  }
}

// kRanks x kFeatures elements of a factor on their way through the registers of kThreads threads: load early, store late.
// Neighbouring threads take neighbouring addresses of a factor that lies as [D, r] if kRanksInner, as [r, D] if not.
template <typename T, int kRanks, int kFeatures, int kThreads, bool kRanksInner>
struct FactorTile {
  static constexpr int kElements = kRanks * kFeatures, kPerThread = (kElements + kThreads - 1) / kThreads;
  static constexpr int kInner = kRanksInner ? kRanks : kFeatures, kOuterStep = kThreads / kInner;
  static_assert(kThreads % kInner == 0);

  const char* source;    // this thread's first element
  int64_t step;          // bytes from one of its elements to the next
  int ranks_left;        // that exist from the tile's first on
  bool fp32;
  float values[kPerThread];

  ABBA_DEVICE FactorTile(const Factor& f, bool fp32, int rank, int num_ranks, int64_t feature)
      : ranks_left(num_ranks - rank), fp32(fp32) {
    const int inner = static_cast<int>(threadIdx.x) % kInner, outer = static_cast<int>(threadIdx.x) / kInner;
    const int element_bytes = fp32 ? 4 : 2;
    source = static_cast<const char*>(f.data) +
             ((rank + (kRanksInner ? inner : outer)) * f.rank_stride + (feature + (kRanksInner ? outer : inner)) * f.feature_stride) *
                 element_bytes;
    step = kOuterStep * (kRanksInner ? f.feature_stride : f.rank_stride) * element_bytes;
  }

  // body(j, rank, feature) for this thread's elements
  template <typename Body>
  ABBA_DEVICE static void for_each(Body body) {
    const int inner = static_cast<int>(threadIdx.x) % kInner, outer = static_cast<int>(threadIdx.x) / kInner;
    #pragma unroll
    for (int j = 0; j < kPerThread; ++j) {
      const int at = outer + j * kOuterStep;
      if (kElements % kThreads != 0 && at >= kElements / kInner) break;
      body(j, kRanksInner ? inner : at, kRanksInner ? at : inner);
    }
  }

  ABBA_DEVICE void load(int64_t features_left) {
    const int features = features_left < kFeatures ? static_cast<int>(features_left) : kFeatures;
    const char* at = source;
    if (fp32) {
      for_each([&](int j, int r, int d) {
        values[j] = r < ranks_left && d < features ? *reinterpret_cast<const float*>(at) : 0.f;
        at += step;
      });
    } else {
      for_each([&](int j, int r, int d) {
        values[j] = r < ranks_left && d < features ? to_float(*reinterpret_cast<const T*>(at)) : 0.f;
        at += step;
      });
    }
  }

  // offset(rank, feature) is where an element goes, in bytes from s_tile; rounded here, times a power of two.
  template <typename Offset>
  ABBA_DEVICE void store(unsigned char* s_tile, float scale, Offset offset) const {
    for_each([&](int j, int r, int d) {
      const T value = from_float<T>(scale * values[j]);
      *reinterpret_cast<T*>(s_tile + offset(r, d)) = value;
    });
  }
};

// f2's tile in shared memory, in the factor's own order: [kRank2][kFeatures], or [kFeatures][kRank2] if kRanksInner.
template <int kRank2, int kFeatures, bool kRanksInner>
struct F2Tile {
  static constexpr int kColumns = kRanksInner ? kRank2 : kFeatures;
  static constexpr int kBytes = 2 * kRank2 * kFeatures;
  ABBA_DEVICE static uint32_t offset(int rank, int feature) {
    return kRanksInner ? Tile<kColumns>::element_offset(feature, rank) : Tile<kColumns>::element_offset(rank, feature);
  }
};

// --- KR as the B operand of a contraction over features (project): n = (a, b), k = feature ---

// f1's tile for it: the words (2t, 2t+1) and (2t+8, 2t+9) of a k16 step lie together, [k16][a][t][half].
template <int kRanks>
struct F1PairOrder {
  ABBA_DEVICE static uint32_t offset(int a, int feature) {
    const int step = feature / 16, half = feature / 8 % 2, t = feature % 8 / 2;
    return ((step * kRanks + a) * 4 + t) * 8 + half * 4 + feature % 2 * 2;
  }
  ABBA_DEVICE static uint2 load(const unsigned char* s_f1, int a, int step) {
    return *reinterpret_cast<const uint2*>(s_f1 + ((step * kRanks + a) * 4 + threadIdx.x % 4) * 8);
  }
};

// f2's fragments of a k16 step, for all kRank2 values of b: two words per n8 tile.
template <int kRank2, int kFeatures, bool kRanksInner>
ABBA_DEVICE void load_f2_over_features(uint32_t (&f2)[kRank2 / 8][2], uint32_t s_f2, int feature) {
  constexpr int kColumns = F2Tile<kRank2, kFeatures, kRanksInner>::kColumns;
  if constexpr (kRank2 == 8) {
    load_b<kRanksInner, kColumns>(f2[0], s_f2, 0, feature);
  } else {
    #pragma unroll
    for (int q = 0; q < kRank2 / 8; q += 2) {
      uint32_t b[4];
      load_b<kRanksInner, kColumns>(b, s_f2, q * 8, feature);
      f2[q][0] = b[0], f2[q][1] = b[1], f2[q + 1][0] = b[2], f2[q + 1][1] = b[3];
    }
  }
}

// --- KR as the B operand of a contraction over ranks (expand): n = feature, k = (a, b) ---

// f1's tile for it: a lane's four features g, g+8, g+16, g+24 of a warp's 32 lie together, [a][warp][g][n8 tile]. The
// gap behind each a keeps eight of them, which a warp stores at once where f1 lies as [D, r1], from one bank.
template <int kFeatures>
struct F1FeatureOrder {
  static constexpr int kRankBytes = 2 * kFeatures + 32;
  ABBA_DEVICE static uint32_t offset(int a, int feature) {
    return a * kRankBytes + feature / 32 * 64 + feature % 8 * 8 + feature % 32 / 8 * 2;
  }
  ABBA_DEVICE static uint2 load(const unsigned char* s_f1, int a, int warp) {
    return *reinterpret_cast<const uint2*>(s_f1 + a * kRankBytes + warp * 64 + threadIdx.x % 32 / 4 * 8);
  }
};

// f2's fragments for 32 features and all of b: kRank2 / 8 words per n8 tile, in the order of b.
template <int kRank2, int kFeatures, bool kRanksInner>
ABBA_DEVICE void load_f2_over_ranks(uint32_t (&f2)[kRank2 / 8][4], uint32_t s_f2, int feature) {
  constexpr int kColumns = F2Tile<kRank2, kFeatures, kRanksInner>::kColumns;
  #pragma unroll
  for (int q = 0; q < kRank2 / 8; ++q) load_b_half<!kRanksInner, kColumns>(f2[q], s_f2, feature, q * 8);
}

// --- KR as the A operand of a contraction over features (project on Hopper): m = (a, b), k = feature ---

// A warp's 16 rows of a wgmma tile of 64 are one a and 16 values of b, or two a and all 8 of b: its fragment of f2 is the
// same in every tile. The factors' tiles are those of project.
template <typename T, int kRank2, int kFeatures, bool kRanksInner, int kBlockRanks1>
struct KrRowsOverFeatures {
  const unsigned char* s_f1;
  uint32_t s_f2;

  // The registers of the k16 step, for kTiles tiles from the block's tile `tile` on.
  template <int kTiles>
  ABBA_DEVICE void make(uint32_t (&kr)[kTiles][4], int tile, int step) const {
    constexpr int kColumns = F2Tile<kRank2, kFeatures, kRanksInner>::kColumns;
    using F1 = F1PairOrder<kBlockRanks1>;
    const int row = threadIdx.x / 32 % 4 * 16;
    if constexpr (kRank2 == 8) {
      uint32_t f2[2];
      load_b<kRanksInner, kColumns>(f2, s_f2, 0, step * 16);
      #pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        const int a = ((tile + m) * 64 + row) / 8;
        const uint2 low = F1::load(s_f1, a, step), high = F1::load(s_f1, a + 1, step);
        kr[m][0] = multiply2<T>(low.x, f2[0]), kr[m][1] = multiply2<T>(high.x, f2[0]);
        kr[m][2] = multiply2<T>(low.y, f2[1]), kr[m][3] = multiply2<T>(high.y, f2[1]);
      }
    } else {
      uint32_t f2[4];
      load_a<kRanksInner, kColumns>(f2, s_f2, row % kRank2, step * 16);
      #pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        const uint2 f1 = F1::load(s_f1, ((tile + m) * 64 + row) / kRank2, step);
        kr[m][0] = multiply2<T>(f1.x, f2[0]), kr[m][1] = multiply2<T>(f1.x, f2[1]);
        kr[m][2] = multiply2<T>(f1.y, f2[2]), kr[m][3] = multiply2<T>(f1.y, f2[3]);
      }
    }
  }
};

// --- KR as the A operand of a contraction over ranks (expand on Hopper): m = feature, k = (a, b) ---

// f1's tile for it: a lane's two features g and g+8 of a warp's 16 lie together, [a][warp][g][half]. The gap behind each a
// keeps sixteen of them, which a warp stores at once where f1 lies as [D, r1], from one bank.
template <int kFeatures>
struct F1RowOrder {
  static constexpr int kRankBytes = 2 * kFeatures + 8;
  ABBA_DEVICE static uint32_t offset(int a, int feature) {
    return a * kRankBytes + feature / 16 * 32 + feature % 8 * 4 + feature % 16 / 8 * 2;
  }
  ABBA_DEVICE static uint32_t load(const unsigned char* s_f1, int a, int warp) {
    return *reinterpret_cast<const uint32_t*>(s_f1 + a * kRankBytes + warp * 32 + threadIdx.x % 32 / 4 * 4);
  }
};

// The fragments of f2 for the warp's 16 features and all of b stay in registers; 64 columns (a, b) are four k16 steps.
template <typename T, int kRank2, int kFeatures, bool kRanksInner>
struct KrRowsOverRanks {
  static constexpr int kWords = kRank2 == 8 ? 2 : 4, kFragments = kRank2 == 8 ? 1 : kRank2 / 16;
  uint32_t f2[kFragments][kWords];

  ABBA_DEVICE explicit KrRowsOverRanks(uint32_t s_f2) {
    constexpr int kColumns = F2Tile<kRank2, kFeatures, kRanksInner>::kColumns;
    const int row = threadIdx.x / 32 % 4 * 16;
    if constexpr (kRank2 == 8) {
      load_a_half<!kRanksInner, kColumns>(f2[0], s_f2, row, 0);
    } else {
      #pragma unroll
      for (int q = 0; q < kFragments; ++q) load_a<!kRanksInner, kColumns>(f2[q], s_f2, row, q * 16);
    }
  }

  // The registers of k16 step `step` of the 64 columns `chunk`.
  ABBA_DEVICE void make(uint32_t (&kr)[4], const unsigned char* s_f1, int chunk, int step) const {
    using F1 = F1RowOrder<kFeatures>;
    const int warp = threadIdx.x / 32 % 4;
    const int a = kRank2 == 64 ? chunk : chunk * (64 / kRank2) + step * 16 / kRank2;
    const uint32_t f1 = F1::load(s_f1, a, warp);
    if constexpr (kRank2 == 8) {
      const uint32_t next = F1::load(s_f1, a + 1, warp);
      kr[0] = multiply2<T>(broadcast_half(f1, 0), f2[0][0]), kr[1] = multiply2<T>(broadcast_half(f1, 1), f2[0][1]);
      kr[2] = multiply2<T>(broadcast_half(next, 0), f2[0][0]), kr[3] = multiply2<T>(broadcast_half(next, 1), f2[0][1]);
    } else {
      const uint32_t(&b)[kWords] = f2[step % kFragments];
      #pragma unroll
      for (int i = 0; i < 4; ++i) kr[i] = multiply2<T>(broadcast_half(f1, i % 2), b[i]);
    }
  }
};

}  // namespace abba
