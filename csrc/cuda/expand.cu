// expand_: y[T, D] += s u[T, R] KR(f1, f2), for bf16 and fp16 y and u; called in forward on the base's output with Bᵀ, in
// backward on dx with A.
//
// A block keeps a tile of 16 or 64 tokens of u (up to 256 columns at a time) in shared memory and walks over tiles of 128
// features; a warp makes all its tokens by 32 features, in steps of 16 columns (a, b). Per feature tile f1 and f2 are
// staged once and the tile of y is prefetched while the products run; it is updated in place and written once.
// Grid: (token tiles, groups of feature tiles). At most 72 KB of shared memory. fp32 accumulation, s and y added in fp32,
// one rounding.
#include "../dispatch.h"
#include "khatri_rao.cuh"

namespace abba {
namespace {

// --- config ---

constexpr int kRanksAtOnce = 8;

template <typename T_, int kRank2_, bool kRanksInner_, int kTilesM_>
struct ExpandConfig {
  using T = T_;
  static constexpr int kRank2 = kRank2_;
  static constexpr bool kRanksInner = kRanksInner_;  // f2 lies as [D, r2]
  static constexpr int kTilesM = kTilesM_;           // m16 tiles of tokens
  static constexpr int kWarps = 4, kThreads = 32 * kWarps;
  static constexpr int kBlockTokens = 16 * kTilesM;
  static constexpr int kBlocksPerSm = kRank2 == 64 ? 2 : 3;  // what the registers allow
  static constexpr int kBlockFeatures = 32 * kWarps;
  static constexpr int kBlockColumns = 256;          // of u at a time
  static constexpr int kBlockRanks1 = kBlockColumns / kRank2, kStagedRanks1 = kBlockRanks1 < 8 ? 8 : kBlockRanks1;
  using UTile = Tile<kBlockColumns>;
  using YTile = Tile<kBlockFeatures>;
  using F2 = F2Tile<kRank2, kBlockFeatures, kRanksInner>;
  using F1 = F1FeatureOrder<kBlockFeatures>;

  static constexpr int kYAt = kBlockTokens * UTile::kRowBytes;
  static constexpr int kF1At = kYAt + kBlockTokens * YTile::kRowBytes;
  static constexpr int kF2At = kF1At + kStagedRanks1 * F1::kRankBytes;
  static constexpr int kSharedBytes = kF2At + F2::kBytes;
};

// --- kernel ---

template <typename C>
__global__ void __launch_bounds__(C::kThreads, C::kBlocksPerSm) expand_kernel(const ExpandParams p) {
  using T = typename C::T;
  ABBA_DYNAMIC_SMEM(smem);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * C::kBlockTokens;
  const int64_t num_tokens = p.launch.num_tokens, num_features = p.launch.num_features;
  const int r1 = p.factors.r1, r2 = p.factors.r2;
  const int num_chunks = (r1 + C::kBlockRanks1 - 1) / C::kBlockRanks1;
  const T* u = static_cast<const T*>(p.u.data);
  T* y = static_cast<T*>(p.y.data);
  const int u_bytes = copy_bytes(u, p.u.stride, r2), y_bytes = copy_bytes(y, p.y.stride);
  const bool fp32 = p.factors.dtype == Dtype::kFloat32;
  const Scales scales = scales_of<T>(p.workspace);
  const float s = p.s * scales.undo;
  unsigned char* s_y = smem + C::kYAt;
  unsigned char* s_f1 = smem + C::kF1At;
  const uint32_t s_u = smem_address(smem), s_f2 = smem_address(smem) + C::kF2At;

  const auto load_u = [&](int chunk) {
    load_tile<C::kBlockTokens, C::kBlockColumns, C::kThreads>(smem, u, p.u.stride, token, num_tokens,
                                                              RankColumns<C::kRank2>{chunk * C::kBlockRanks1, r1, r2}, u_bytes);
  };
  // Eight ranks at a time: few enough registers beside the accumulators.
  const auto stage_factor = [&](const Factor& f, float scale, int rank, int num_ranks, int count, int64_t feature,
                                unsigned char* s_tile, auto offset) {
    #pragma unroll 1
    for (int first = 0; first < count; first += kRanksAtOnce) {
      FactorTile<T, kRanksAtOnce, C::kBlockFeatures, C::kThreads, C::kRanksInner> values(f, fp32, rank + first, num_ranks, feature);
      values.load(num_features - feature);
      values.store(s_tile, scale, [&](int r, int d) { return offset(first + r, d); });
    }
  };

  const int64_t stride = static_cast<int64_t>(gridDim.y) * C::kBlockFeatures;
  for (int64_t feature = static_cast<int64_t>(blockIdx.y) * C::kBlockFeatures; feature < num_features; feature += stride) {
    const FeatureColumns y_columns{feature, num_features};
    float acc[C::kTilesM][4][4] = {};
    uint32_t f2[C::kRank2 / 8][4];
    for (int chunk = 0; chunk < num_chunks; ++chunk) {
      __syncthreads();  // whatever was read or written in shared memory before is done with
      // A u that is one chunk stays for all feature tiles.
      if (num_chunks > 1 || feature == static_cast<int64_t>(blockIdx.y) * C::kBlockFeatures) load_u(chunk);
      cp_async_commit();
      if (chunk == 0)
        load_tile<C::kBlockTokens, C::kBlockFeatures, C::kThreads>(s_y, y, p.y.stride, token, num_tokens, y_columns, y_bytes);
      cp_async_commit();
      stage_factor(p.factors.f1, scales.f1, chunk * C::kBlockRanks1, r1, C::kBlockRanks1, feature, s_f1, C::F1::offset);
      if (chunk == 0) stage_factor(p.factors.f2, scales.f2, 0, r2, C::kRank2, feature, smem + C::kF2At, C::F2::offset);
      cp_async_wait<1>();  // u is there; y may still be on its way
      __syncthreads();
      if (chunk == 0) load_f2_over_ranks<C::kRank2, C::kBlockFeatures, C::kRanksInner>(f2, s_f2, warp * 32);

      // A k16 step is 16 values of b for one a; with r2 = 8, all of b for two.
      const int num_a = min(C::kBlockRanks1, r1 - chunk * C::kBlockRanks1);
      constexpr int kStepRanks1 = C::kRank2 == 8 ? 2 : 1, kSteps = C::kRank2 == 8 ? 1 : C::kRank2 / 16;
      #pragma unroll 2
      for (int a = 0; a < num_a; a += kStepRanks1) {
        const uint2 low = C::F1::load(s_f1, a, warp), high = kStepRanks1 == 2 ? C::F1::load(s_f1, a + 1, warp) : low;
        uint32_t f1[4][2];  // [n8 tile][k8 half], the same value in both halves of a word
        #pragma unroll
        for (int n = 0; n < 4; ++n) {
          f1[n][0] = broadcast_half(n < 2 ? low.x : low.y, n % 2);
          f1[n][1] = kStepRanks1 == 2 ? broadcast_half(n < 2 ? high.x : high.y, n % 2) : f1[n][0];
        }
        #pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          uint32_t kr[4][2];
          #pragma unroll
          for (int n = 0; n < 4; ++n)
            #pragma unroll
            for (int h = 0; h < 2; ++h) kr[n][h] = multiply2<T>(f1[n][h], f2[C::kRank2 == 8 ? 0 : 2 * step + h][n]);
          #pragma unroll
          for (int m = 0; m < C::kTilesM; ++m) {
            uint32_t r_u[4];
            load_a<false, C::kBlockColumns>(r_u, s_u, m * 16, a * C::kRank2 + step * 16);
            #pragma unroll
            for (int n = 0; n < 4; ++n) mma_m16n8k16<T>(acc[m][n], r_u, kr[n]);
          }
        }
      }
    }

    cp_async_wait<0>();
    __syncthreads();  // y is there
    #pragma unroll
    for (int m = 0; m < C::kTilesM; ++m)
      #pragma unroll
      for (int n = 0; n < 4; ++n)
        #pragma unroll
        for (int h = 0; h < 2; ++h) {
          uint32_t* word = reinterpret_cast<uint32_t*>(
              s_y + C::YTile::element_offset(m * 16 + lane / 4 + 8 * h, warp * 32 + n * 8 + lane % 4 * 2));
          const uint32_t old = *word;
          *word = pack(from_float<T>(to_float(half_of<T>(old, 0)) + s * acc[m][n][2 * h]),
                       from_float<T>(to_float(half_of<T>(old, 1)) + s * acc[m][n][2 * h + 1]));
        }
    __syncthreads();
    store_tile<C::kBlockTokens, C::kBlockFeatures, C::kThreads>(y, p.y.stride, token, num_tokens, y_columns, y_bytes == 16, s_y);
  }
}

// --- launcher ---

template <typename T, int kRank2, bool kRanksInner, int kTilesM>
int launch(const ExpandParams& p) {
  using C = ExpandConfig<T, kRank2, kRanksInner, kTilesM>;
  const int64_t token_tiles = (p.launch.num_tokens + C::kBlockTokens - 1) / C::kBlockTokens;
  const int64_t feature_tiles = (p.launch.num_features + C::kBlockFeatures - 1) / C::kBlockFeatures;
  const dim3 grid(static_cast<unsigned>(token_tiles),
                  static_cast<unsigned>(expand_feature_groups(token_tiles, feature_tiles, p.launch.num_sms)));
  return ABBA_LAUNCH((expand_kernel<C>), grid, dim3(C::kThreads), C::kSharedBytes, p.launch.stream, p);
}

}  // namespace

int expand_(const ExpandParams& p) {
  if (const int error = factor_magnitudes(p.launch, p.factors, p.workspace)) return error;
  if (expand_covered_by_sm90(p.launch, p.factors, p.y, p.u)) return expand_sm90(p);
  return with_element_type(p.launch.dtype, [&](auto element) {
    using T = decltype(element);
    return with_rank2(p.factors, [&](auto rank2, auto ranks_inner) {
      constexpr int kRank2 = decltype(rank2)::value;
      constexpr bool kRanksInner = decltype(ranks_inner)::value;
      if (p.launch.num_tokens <= 16) return launch<T, kRank2, kRanksInner, 1>(p);
      return launch<T, kRank2, kRanksInner, 4>(p);
    });
  });
}

}  // namespace abba
