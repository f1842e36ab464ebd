// project on Hopper: uᵀ[R, T] = KR(f1, f2)[R, D] xᵀ[D, T], for bf16 and fp16 x whose rows TMA can copy (dispatch.h).
//
// A block makes 128 or 256 columns (a, b) of u for 64 tokens, in steps of 64 features. The producing warpgroup
// brings x by TMA and the factors through registers, two steps ahead, rounded on the way. Each of the two consuming ones
// forms the Khatri–Rao operand of its 64 or 128 columns in registers, as wgmma's A, double-buffered; x is B. u leaves
// transposed, by stmatrix and TMA. Grid: (token tiles, column tiles). At most 132 KB of shared memory. fp32 accumulation,
// one rounding.
#include "../dispatch.h"
#include "pipeline_sm90.cuh"

namespace abba {
namespace {

// --- config ---

template <typename T_, int kRank2_, bool kRanksInner_, int kTilesM_>
struct ProjectSm90Config {
  using T = T_;
  static constexpr int kRank2 = kRank2_;
  static constexpr bool kRanksInner = kRanksInner_;    // f2 lies as [D, r2]
  static constexpr int kTilesM = kTilesM_;             // m64 tiles of a warpgroup
  static constexpr int kBlockTokens = 64;              // wgmma's n
  static constexpr int kTiles = kConsumerGroups * kTilesM, kBlockColumns = 64 * kTiles;
  static constexpr int kBlockRanks1 = kBlockColumns / kRank2;  // values of a
  static constexpr int kBlockFeatures = 64;
  static constexpr int kStages = 6;
  using F2 = F2Tile<kRank2, kBlockFeatures, kRanksInner>;
  using F1 = F1PairOrder<kBlockRanks1>;
  using KR = KrRowsOverFeatures<T, kRank2, kBlockFeatures, kRanksInner, kBlockRanks1>;

  // Shared memory: x [kStages], u [kTiles], f1 and f2 [kStages], barriers
  static constexpr int kTileBytes = kBlockTokens * SwizzledTile::kRowBytes, kF1Bytes = 2 * kBlockRanks1 * kBlockFeatures;
  static constexpr int kUAt = kStages * kTileBytes, kF1At = kUAt + kTiles * kTileBytes, kF2At = kF1At + kStages * kF1Bytes;
  static constexpr int kBarriersAt = kF2At + kStages * F2::kBytes;
  static constexpr int kSharedBytes = kBarriersAt + StageBarriers<kStages>::kBytes;
};

// --- kernel ---

template <typename C>
ABBA_DEVICE void produce(const ProjectParams& p, const TensorMap& x_map, unsigned char* smem,
                         const StageBarriers<C::kStages>& barriers, int num_steps) {
  using T = typename C::T;
  using F1Values = FactorTile<T, C::kBlockRanks1, C::kBlockFeatures, kGroupThreads, C::kRanksInner>;
  using F2Values = FactorTile<T, C::kRank2, C::kBlockFeatures, kGroupThreads, C::kRanksInner>;
  const int token = blockIdx.x * C::kBlockTokens, a0 = blockIdx.y * C::kBlockRanks1;
  const bool fp32 = p.factors.dtype == Dtype::kFloat32;
  const Scales scales = scales_of<T>(p.workspace);

  // Two sets of registers, for the even and for the odd steps.
  F1Values r_f1[2] = {{p.factors.f1, fp32, a0, p.factors.r1, 0}, {p.factors.f1, fp32, a0, p.factors.r1, C::kBlockFeatures}};
  F2Values r_f2[2] = {{p.factors.f2, fp32, 0, p.factors.r2, 0}, {p.factors.f2, fp32, 0, p.factors.r2, C::kBlockFeatures}};
  const int64_t f1_step = p.factors.f1.feature_stride * 2 * C::kBlockFeatures * (fp32 ? 4 : 2);  // bytes
  const int64_t f2_step = p.factors.f2.feature_stride * 2 * C::kBlockFeatures * (fp32 ? 4 : 2);
  const auto load = [&](int step, int set) {
    const int64_t features_left = p.launch.num_features - static_cast<int64_t>(step) * C::kBlockFeatures;
    r_f1[set].load(features_left), r_f1[set].source += f1_step;
    r_f2[set].load(features_left), r_f2[set].source += f2_step;
  };
  Ring<C::kStages> ring;
  const auto fill = [&](int step, int set) {
    barriers.wait_empty(ring);
    if (threadIdx.x == 0) {
      mbarrier_arrive_expect(barriers.full(ring.stage), C::kTileBytes);
      tma_load(smem_address(smem) + ring.stage * C::kTileBytes, x_map, step * C::kBlockFeatures, token,
               barriers.full(ring.stage));
    }
    r_f1[set].store(smem + C::kF1At + ring.stage * C::kF1Bytes, scales.f1, C::F1::offset);
    r_f2[set].store(smem + C::kF2At + ring.stage * C::F2::kBytes, scales.f2, C::F2::offset);
    if (step + 2 < num_steps) load(step + 2, set);
    arrive_warp(barriers.full(ring.stage));
    ring.advance();
  };

  load(0, 0);
  if (num_steps > 1) load(1, 1);
  for (int step = 0; step < num_steps; step += 2) {  // the factors of this step and the next are in registers or on their way
    fill(step, 0);
    if (step + 1 < num_steps) fill(step + 1, 1);
  }
}

template <typename C>
ABBA_DEVICE void consume(const ProjectParams& p, const TensorMap& u_map, unsigned char* smem,
                         const StageBarriers<C::kStages>& barriers, int num_steps) {
  using T = typename C::T;
  const int group = threadIdx.x / kGroupThreads - 1, tile0 = group * C::kTilesM;
  const uint32_t s_x = smem_address(smem), s_u = s_x + C::kUAt;
  float acc[C::kTilesM][C::kBlockTokens / 2];  // the first products set it: nothing else may write it in the loop
  uint32_t r_kr[2][C::kTilesM][4];
  Ring<C::kStages> ring;
  int previous = 0;
  const auto multiply = [&](auto is_first) {
    constexpr bool kFirst = decltype(is_first)::value;
    barriers.wait_full(ring);
    const typename C::KR kr{smem + C::kF1At + ring.stage * C::kF1Bytes, s_x + C::kF2At + ring.stage * C::F2::kBytes};
    kr.template make<C::kTilesM>(r_kr[0], tile0, 0);
    #pragma unroll
    for (int k = 0; k < C::kBlockFeatures / 16; ++k) {
      const uint64_t x = matrix_descriptor(s_x + ring.stage * C::kTileBytes + 32 * k);
      wgmma_fence();
      #pragma unroll
      for (int m = 0; m < C::kTilesM; ++m) {
        if (kFirst && k == 0) {
          wgmma<T, C::kBlockTokens, false>(acc[m], r_kr[0][m], x);
        } else {
          wgmma<T, C::kBlockTokens, true>(acc[m], r_kr[k % 2][m], x);
        }
      }
      wgmma_commit();
      // One k16 step in flight here, this one: the other half of r_kr is free, and so is what the last stage was.
      wgmma_wait<1>();
      if (!kFirst && k == 0) arrive_warp(barriers.empty(previous));
      if (k + 1 < C::kBlockFeatures / 16) kr.template make<C::kTilesM>(r_kr[(k + 1) % 2], tile0, k + 1);
    }
    previous = ring.stage;
    ring.advance();
  };
  multiply(std::true_type{});
  for (int step = 1; step < num_steps; ++step) multiply(std::false_type{});
  wgmma_wait<0>();
  #pragma unroll
  for (int m = 0; m < C::kTilesM; ++m) settle(acc[m]);

  const float undo = scales_of<T>(p.workspace).undo;
  #pragma unroll
  for (int m = 0; m < C::kTilesM; ++m)
    #pragma unroll
    for (int j = 0; j < C::kBlockTokens / 8; j += 2) {
      uint32_t r[4];
      #pragma unroll
      for (int i = 0; i < 4; ++i)
        r[i] = pack(from_float<T>(undo * acc[m][4 * j + 2 * i]), from_float<T>(undo * acc[m][4 * j + 2 * i + 1]));
      stmatrix_x4<true>(transposed_address(s_u + (tile0 + m) * C::kTileBytes, j), r);
    }
  fence_proxy_async();
  group == 0 ? sync_some<1, kGroupThreads>() : sync_some<2, kGroupThreads>();
  if (threadIdx.x % kGroupThreads == 0) {
    #pragma unroll
    for (int m = 0; m < C::kTilesM; ++m) {
      const int column = blockIdx.y * C::kBlockColumns + (tile0 + m) * 64;
      tma_store(u_map, column, blockIdx.x * C::kBlockTokens, s_u + (tile0 + m) * C::kTileBytes);
    }
    tma_commit();
    tma_wait_read<0>();  // shared memory lives as long as the block
  }
}

template <typename C>
__global__ void __launch_bounds__(kSm90Threads, 1)
    project_sm90_kernel(const ProjectParams p, const ABBA_GRID_CONSTANT TensorMap x_map, const ABBA_GRID_CONSTANT TensorMap u_map) {
#if ABBA_SM90A
  ABBA_DYNAMIC_SMEM(smem);
  const StageBarriers<C::kStages> barriers{smem_address(smem) + C::kBarriersAt};
  const int num_steps = static_cast<int>((p.launch.num_features + C::kBlockFeatures - 1) / C::kBlockFeatures);
  if (threadIdx.x == 0) {
    prefetch_tensor_map(x_map), prefetch_tensor_map(u_map);
    barriers.init(1 + kGroupThreads / 32, kConsumerWarps);  // TMA's bytes and the producer's warps; the consumers' warps
    mbarrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < kGroupThreads) {
    produce<C>(p, x_map, smem, barriers, num_steps);
  } else {
    consume<C>(p, u_map, smem, barriers, num_steps);
  }
#else
  __trap();  // never launched
#endif
}

// --- launcher ---

template <typename T, int kRank2, bool kRanksInner, int kTilesM>
int launch(const ProjectParams& p) {
  using C = ProjectSm90Config<T, kRank2, kRanksInner, kTilesM>;
  const int64_t num_tokens = p.launch.num_tokens, num_columns = static_cast<int64_t>(p.factors.r1) * p.factors.r2;
  TensorMap x_map, u_map;
  if (const int error = make_tensor_map(x_map, p.x, num_tokens, p.launch.num_features, C::kBlockTokens)) return error;
  if (const int error = make_tensor_map(u_map, p.u, num_tokens, num_columns, C::kBlockTokens)) return error;
  const dim3 grid(static_cast<unsigned>((num_tokens + C::kBlockTokens - 1) / C::kBlockTokens),
                  static_cast<unsigned>((num_columns + C::kBlockColumns - 1) / C::kBlockColumns));
  return ABBA_LAUNCH((project_sm90_kernel<C>), grid, dim3(kSm90Threads), C::kSharedBytes, p.launch.stream, p, x_map, u_map);
}

}  // namespace

int project_sm90(const ProjectParams& p) {
  return with_element_type(p.launch.dtype, [&](auto element) {
    using T = decltype(element);
    return with_rank2(p.factors, [&](auto rank2, auto ranks_inner) {
      constexpr int kRank2 = decltype(rank2)::value;
      constexpr bool kRanksInner = decltype(ranks_inner)::value;
      return wide_project_sm90(p.launch, p.factors.r1, kRank2) ? launch<T, kRank2, kRanksInner, 2>(p)
                                                               : launch<T, kRank2, kRanksInner, 1>(p);
    });
  });
}

}  // namespace abba
