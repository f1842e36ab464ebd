// factor_grad on Hopper: P[R, D] = vᵀ x, contracted with the factors before it leaves the block (formulas in factor_grad.cu);
// for bf16 and fp16 x and v whose rows TMA can copy (dispatch.h).
//
// A block makes P for 64 or 256 rows (a, b) by 128 features over a share of the tokens, in steps of 64. One thread of the
// producing warpgroup brings v and x by TMA, its other warps stage the factors in fp32 for the end. Each consuming
// warpgroup multiplies 128 rows by 128 features, or 64 by 64, both operands from shared memory, MN-major. P then takes the
// pipeline's memory: a thread contracts one feature of it, and leaves r1 + r2 sums in the workspace, which the last block
// adds up (factor_grad.cuh). Grid: (feature tiles, row tiles, shares of the tokens). At most 227 KB of shared memory.
#include "factor_grad.cuh"
#include "pipeline_sm90.cuh"

namespace abba {
namespace {

// --- config ---

template <typename T_, int kRank2_, bool kWide>
struct FactorGradSm90Config {
  using T = T_;
  static constexpr int kRank2 = kRank2_;
  static constexpr int kTilesM = kWide ? 2 : 1;                    // m64 tiles of a warpgroup
  static constexpr int kTiles = kWide ? 4 : 1, kBlockRows = 64 * kTiles;
  static constexpr int kGroupFeatures = kWide ? kGradFeatures : kGradFeatures / kConsumerGroups;  // wgmma's n
  static constexpr int kXTiles = kGradFeatures / 64;
  static constexpr int kBlockTokens = 64;
  static constexpr int kStages = 4;
  static constexpr int kBlockRanks1 = kBlockRows / kRank2;         // values of a
  static constexpr int kParts = kBlockRanks1 > 1 ? 2 : 1, kPartRanks1 = kBlockRanks1 / kParts;  // a warpgroup contracts a part
  static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;

  // Shared memory: v and x [kStages]; f1 [kBlockRanks1] and f2 [kRank2], rows of 128 in fp32; barriers and a flag.
  // After the loop P and the second part's sums over a take the stages' place. P's pitch lets float2 be stored without a bank twice.
  static constexpr int kTileBytes = kBlockTokens * SwizzledTile::kRowBytes, kStageBytes = (kTiles + kXTiles) * kTileBytes;
  static constexpr int kPitch = kGradFeatures + 8, kSumsAt = 4 * kBlockRows * kPitch;
  static constexpr int kF1At = kStages * kStageBytes, kF2At = kF1At + 4 * kBlockRanks1 * kGradFeatures;
  static constexpr int kBarriersAt = kF2At + 4 * kRank2 * kGradFeatures;
  static constexpr int kFactorsAt = kBarriersAt + StageBarriers<kStages>::kBytes, kFlagAt = kFactorsAt + 8;
  static constexpr int kSharedBytes = kFlagAt + 8;
  static_assert(kSumsAt + 4 * kRank2 * kGradFeatures <= kF1At);
};

// --- kernel ---

// The steps of 64 tokens of a block's share; shares differ by at most one.
struct Steps {
  int64_t first;
  int count;
  ABBA_DEVICE explicit Steps(int64_t num_tokens, int block_tokens) {
    const int64_t all = (num_tokens + block_tokens - 1) / block_tokens;
    first = all * blockIdx.z / gridDim.z;
    count = static_cast<int>(all * (blockIdx.z + 1) / gridDim.z - first);
  }
};

template <typename C>
ABBA_DEVICE void produce(const FactorGradParams& p, const TensorMap& x_map, const TensorMap& v_map, unsigned char* smem,
                         const StageBarriers<C::kStages>& barriers, const Steps& steps) {
  using T = typename C::T;
  const int64_t feature0 = static_cast<int64_t>(blockIdx.x) * kGradFeatures;
  const int a0 = blockIdx.y * C::kBlockRanks1;
  if (threadIdx.x >= 32) {
    constexpr int kThreads = kGroupThreads - 32;
    const bool fp32 = p.factors.dtype == Dtype::kFloat32;
    const auto stage = [&](const Factor& f, int rank, int num_ranks, int count, float* s_rows) {
      #pragma unroll 1
      for (int i = threadIdx.x - 32; i < count * kGradFeatures; i += kThreads) {
        const bool ranks_inner = f.rank_stride == 1;
        const int r = ranks_inner ? i % count : i / kGradFeatures, d = ranks_inner ? i / count : i % kGradFeatures;
        const bool inside = rank + r < num_ranks && feature0 + d < p.launch.num_features;
        s_rows[r * kGradFeatures + d] = inside ? factor_at<T>(f, fp32, rank + r, feature0 + d) : 0.f;
      }
    };
    stage(p.factors.f1, a0, p.factors.r1, C::kBlockRanks1, reinterpret_cast<float*>(smem + C::kF1At));
    stage(p.factors.f2, 0, p.factors.r2, C::kRank2, reinterpret_cast<float*>(smem + C::kF2At));
    arrive_warp(smem_address(smem) + C::kFactorsAt);
  } else if (threadIdx.x == 0) {
    Ring<C::kStages> ring;
    for (int step = 0; step < steps.count; ++step) {
      const uint32_t s_v = smem_address(smem) + ring.stage * C::kStageBytes, s_x = s_v + C::kTiles * C::kTileBytes;
      const int token = static_cast<int>((steps.first + step) * C::kBlockTokens);
      barriers.wait_empty(ring);
      mbarrier_arrive_expect(barriers.full(ring.stage), C::kStageBytes);
      #pragma unroll
      for (int i = 0; i < C::kTiles; ++i)
        tma_load(s_v + i * C::kTileBytes, v_map, blockIdx.y * C::kBlockRows + i * 64, token, barriers.full(ring.stage));
      #pragma unroll
      for (int i = 0; i < C::kXTiles; ++i)
        tma_load(s_x + i * C::kTileBytes, x_map, static_cast<int>(feature0) + i * 64, token, barriers.full(ring.stage));
      ring.advance();
    }
  }
}

template <typename C>
ABBA_DEVICE void consume(const FactorGradParams& p, const GradWorkspace& workspace, unsigned char* smem,
                         const StageBarriers<C::kStages>& barriers, const Steps& steps) {
  using T = typename C::T;
  const int group = threadIdx.x / kGroupThreads - 1, thread = threadIdx.x - kGroupThreads;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const int tile0 = C::kTiles == 1 ? 0 : group * C::kTilesM, column0 = C::kTiles == 1 ? group * C::kGroupFeatures : 0;
  const auto sync = [] { sync_some<1, kConsumerThreads>(); };

  float acc[C::kTilesM][C::kGroupFeatures / 2];  // the first products set it: nothing else may write it in the loop
  Ring<C::kStages> ring;
  int previous = 0;
  const auto multiply = [&](auto is_first) {
    constexpr bool kFirst = decltype(is_first)::value;
    const uint32_t s_v = smem_address(smem) + ring.stage * C::kStageBytes + tile0 * C::kTileBytes;
    const uint32_t s_x = smem_address(smem) + ring.stage * C::kStageBytes + C::kTiles * C::kTileBytes + column0 / 64 * C::kTileBytes;
    barriers.wait_full(ring);
    wgmma_fence();
    #pragma unroll
    for (int k = 0; k < C::kBlockTokens / 16; ++k) {
      const int at = k * 16 * SwizzledTile::kRowBytes;
      #pragma unroll
      for (int m = 0; m < C::kTilesM; ++m) {
        const uint64_t v = matrix_descriptor(s_v + m * C::kTileBytes + at), x = matrix_descriptor(s_x + at, C::kTileBytes);
        if (kFirst && k == 0) {
          wgmma<T, C::kGroupFeatures, false>(acc[m], v, x);
        } else {
          wgmma<T, C::kGroupFeatures, true>(acc[m], v, x);
        }
      }
    }
    wgmma_commit();
    wgmma_wait<1>();  // one step in flight, this one
    if (!kFirst) arrive_warp(barriers.empty(previous));
    previous = ring.stage;
    ring.advance();
  };
  multiply(std::true_type{});
  for (int step = 1; step < steps.count; ++step) multiply(std::false_type{});
  wgmma_wait<0>();
  #pragma unroll
  for (int m = 0; m < C::kTilesM; ++m) settle(acc[m]);
  sync();  // the pipeline's memory is free

  float* s_p = reinterpret_cast<float*>(smem);  // [kBlockRows][kPitch]
  #pragma unroll
  for (int m = 0; m < C::kTilesM; ++m)
    #pragma unroll
    for (int j = 0; j < C::kGroupFeatures / 8; ++j)
      #pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = (tile0 + m) * 64 + warp * 16 + lane / 4 + 8 * h;
        const float2 pair = {acc[m][4 * j + 2 * h], acc[m][4 * j + 2 * h + 1]};
        *reinterpret_cast<float2*>(s_p + row * C::kPitch + column0 + 8 * j + lane % 4 * 2) = pair;
      }
  mbarrier_wait(smem_address(smem) + C::kFactorsAt, 0);
  sync();

  const int d = thread % kGradFeatures, part = thread / kGradFeatures;
  const int64_t feature = static_cast<int64_t>(blockIdx.x) * kGradFeatures + d;
  const bool inside = feature < p.launch.num_features;
  const float* s_f1 = reinterpret_cast<const float*>(smem + C::kF1At) + d;
  const float* s_f2 = reinterpret_cast<const float*>(smem + C::kF2At) + d;
  float* s_sums = reinterpret_cast<float*>(smem + C::kSumsAt) + d;  // [kRank2][128]
  float over_a[C::kRank2] = {};
  if (part < C::kParts) {
    float f2[C::kRank2];
    #pragma unroll
    for (int b = 0; b < C::kRank2; ++b) f2[b] = s_f2[b * kGradFeatures];
    #pragma unroll 1
    for (int i = part * C::kPartRanks1; i < (part + 1) * C::kPartRanks1; ++i) {
      const float f1 = s_f1[i * kGradFeatures];
      float over_b = 0.f;
      #pragma unroll
      for (int b = 0; b < C::kRank2; ++b) {
        const float product = s_p[(i * C::kRank2 + b) * C::kPitch + d];
        over_b += product * f2[b];
        over_a[b] += product * f1;
      }
      if (inside) workspace.row(blockIdx.z, blockIdx.y, i)[feature] = over_b;
    }
  }
  if (C::kParts == 2) {
    if (part == 1)
      #pragma unroll
      for (int b = 0; b < C::kRank2; ++b) s_sums[b * kGradFeatures] = over_a[b];
    sync();
  }
  if (part == 0 && inside)
    #pragma unroll
    for (int b = 0; b < C::kRank2; ++b) {
      const float sum = C::kParts == 2 ? over_a[b] + s_sums[b * kGradFeatures] : over_a[b];
      workspace.row(blockIdx.z, blockIdx.y, C::kBlockRanks1 + b)[feature] = sum;
    }
  add_up_shares<T, kConsumerThreads>(p, workspace, thread, reinterpret_cast<unsigned*>(smem + C::kFlagAt), sync);
}

template <typename C>
__global__ void __launch_bounds__(kSm90Threads, 1)
    factor_grad_sm90_kernel(const FactorGradParams p, const GradWorkspace workspace, const ABBA_GRID_CONSTANT TensorMap x_map,
                            const ABBA_GRID_CONSTANT TensorMap v_map) {
#if ABBA_SM90A
  ABBA_DYNAMIC_SMEM(smem);
  const StageBarriers<C::kStages> barriers{smem_address(smem) + C::kBarriersAt};
  const Steps steps(p.launch.num_tokens, C::kBlockTokens);
  if (threadIdx.x == 0) {
    prefetch_tensor_map(x_map), prefetch_tensor_map(v_map);
    barriers.init(1, kConsumerWarps);  // TMA's bytes; the consumers' warps
    mbarrier_init(smem_address(smem) + C::kFactorsAt, kGroupThreads / 32 - 1);
    mbarrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < kGroupThreads) {
    give_registers<C::kProducerRegisters>();
    produce<C>(p, x_map, v_map, smem, barriers, steps);
  } else {
    take_registers<C::kConsumerRegisters>();
    consume<C>(p, workspace, smem, barriers, steps);
  }
#else
  __trap();  // never launched
#endif
}

// --- launcher ---

template <typename T, int kRank2, bool kWide>
int launch(const FactorGradParams& p, const GradShape& shape) {
  using C = FactorGradSm90Config<T, kRank2, kWide>;
  const int64_t num_columns = static_cast<int64_t>(p.factors.r1) * p.factors.r2;
  TensorMap x_map, v_map;
  if (const int error = make_tensor_map(x_map, p.x, p.launch.num_tokens, p.launch.num_features, C::kBlockTokens)) return error;
  if (const int error = make_tensor_map(v_map, p.v, p.launch.num_tokens, num_columns, C::kBlockTokens)) return error;
  return ABBA_LAUNCH((factor_grad_sm90_kernel<C>), shape.grid(), dim3(kSm90Threads), C::kSharedBytes, p.launch.stream, p,
                     GradWorkspace(p, shape), x_map, v_map);
}

}  // namespace

int factor_grad_sm90(const FactorGradParams& p) {
  const GradShape shape(p.launch, p.factors.r1, p.factors.r2);
  return with_element_type(p.launch.dtype, [&](auto element) {
    using T = decltype(element);
    return with_rank2(p.factors, [&](auto rank2, auto) {
      constexpr int kRank2 = decltype(rank2)::value;
      return is_wide_grad(p.factors.r1, kRank2) ? launch<T, kRank2, true>(p, shape) : launch<T, kRank2, false>(p, shape);
    });
  });
}

}  // namespace abba
