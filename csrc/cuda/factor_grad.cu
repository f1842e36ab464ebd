// factor_grad: with P = vᵀ x [R, D], which never leaves the registers,
//   df1[a, d] = s Σ_b P[(a,b), d] f2[b, d],   df2[b, d] = s Σ_a P[(a,b), d] f1[a, d];
// for bf16 and fp16 x and v; called in backward with (x, v; A) and with (dy, u; Bᵀ).
//
// A block makes P for 64 or 256 rows (a, b) by 128 features over a share of the tokens, a warp 64 rows by 64 or 32 features,
// in steps of 32 tokens that arrive through a cp.async pipeline. It contracts P with the factors in fp32 and leaves r1 + r2
// rows in the workspace; of the blocks of one feature tile the last to arrive adds them up in a fixed order, applies s and
// rounds once. No float atomics: the same bits in every run. Grid: (feature tiles, row tiles, shares of the tokens).
// At most 72 KB of shared memory.
#include "factor_grad.cuh"

namespace abba {
namespace {

// --- config ---

template <typename T_, int kRank2_, bool kWide>
struct FactorGradConfig {
  using T = T_;
  static constexpr int kRank2 = kRank2_;
  static constexpr int kWarpsM = kWide ? 4 : 1, kWarpsN = kWide ? 2 : 4;
  static constexpr int kThreads = 32 * kWarpsM * kWarpsN;
  static constexpr int kBlockRows = 64 * kWarpsM;                          // (a, b)
  static constexpr int kWarpFeatures = kGradFeatures / kWarpsN;
  static constexpr int kTilesM = 4, kTilesN = kWarpFeatures / 8;           // m16 and n8 tiles of a warp
  static constexpr int kBlockTokens = 32;
  static constexpr int kStages = 3;
  static constexpr int kWarpRanks1 = 64 / kRank2, kBlockRanks1 = kBlockRows / kRank2;  // values of a
  static constexpr int kLaneRanks2 = kRank2 / 8;                           // values of b that a lane holds: g, g + 8, ...
  using VTile = Tile<kBlockRows>;
  using XTile = Tile<kGradFeatures>;

  // Shared memory: v and x [kStages]; after the loop, in fp32, f1 [kBlockRanks1], f2 [kRank2] and the sums over a [kRank2],
  // rows of kPitch, and a flag. The pitch lets eight rows of b be read without a bank twice.
  static constexpr int kVBytes = kBlockTokens * VTile::kRowBytes, kXBytes = kBlockTokens * XTile::kRowBytes;
  static constexpr int kStageBytes = kVBytes + kXBytes;
  static constexpr int kPitch = kGradFeatures + 8;
  static constexpr int kF2At = 4 * kBlockRanks1 * kPitch, kSumsAt = kF2At + 4 * kRank2 * kPitch;
  static constexpr int kFlagAt = kSumsAt + 4 * kRank2 * kPitch;
  static constexpr int kSharedBytes = kStages * kStageBytes > kFlagAt + 16 ? kStages * kStageBytes : kFlagAt + 16;
};

// --- kernel ---

template <typename C>
__global__ void __launch_bounds__(C::kThreads) factor_grad_kernel(const FactorGradParams p, const GradWorkspace workspace) {
  using T = typename C::T;
  ABBA_DYNAMIC_SMEM(smem);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int warp_m = warp % C::kWarpsM, warp_n = warp / C::kWarpsM;
  const int64_t feature0 = static_cast<int64_t>(blockIdx.x) * kGradFeatures;
  const int a0 = blockIdx.y * C::kBlockRanks1, r1 = p.factors.r1, r2 = p.factors.r2;
  const int64_t num_tokens = p.launch.num_tokens, num_features = p.launch.num_features;
  // The shares differ by at most one step.
  const int64_t all_steps = (num_tokens + C::kBlockTokens - 1) / C::kBlockTokens;
  const int64_t first_step = all_steps * blockIdx.z / gridDim.z;
  const int num_steps = static_cast<int>(all_steps * (blockIdx.z + 1) / gridDim.z - first_step);
  const T* x = static_cast<const T*>(p.x.data);
  const T* v = static_cast<const T*>(p.v.data);
  const int x_bytes = copy_bytes(x, p.x.stride), v_bytes = copy_bytes(v, p.v.stride, r2);
  const bool fp32 = p.factors.dtype == Dtype::kFloat32;

  const auto load_step = [&](int step) {
    if (step < num_steps) {
      unsigned char* s_v = smem + step % C::kStages * C::kStageBytes;
      const int64_t token = (first_step + step) * C::kBlockTokens;
      load_tile<C::kBlockTokens, C::kBlockRows, C::kThreads>(s_v, v, p.v.stride, token, num_tokens,
                                                             RankColumns<C::kRank2>{a0, r1, r2}, v_bytes);
      load_tile<C::kBlockTokens, kGradFeatures, C::kThreads>(s_v + C::kVBytes, x, p.x.stride, token, num_tokens,
                                                              FeatureColumns{feature0, num_features}, x_bytes);
    }
    cp_async_commit();  // an empty group past the end keeps the count
  };

  float acc[C::kTilesM][C::kTilesN][4] = {};
  for (int step = 0; step < C::kStages - 1; ++step) load_step(step);
  for (int step = 0; step < num_steps; ++step) {
    // Always kStages - 1 groups in flight here. After the barrier this step's tiles are visible, and no warp reads what the
    // previous step used: the next copies go there.
    cp_async_wait<C::kStages - 2>();
    __syncthreads();
    load_step(step + C::kStages - 1);
    const uint32_t s_v = smem_address(smem) + step % C::kStages * C::kStageBytes, s_x = s_v + C::kVBytes;
    #pragma unroll
    for (int k = 0; k < C::kBlockTokens; k += 16) {
      uint32_t r_v[C::kTilesM][4];
      #pragma unroll
      for (int m = 0; m < C::kTilesM; ++m) load_a<true, C::kBlockRows>(r_v[m], s_v, warp_m * 64 + m * 16, k);
      #pragma unroll
      for (int n = 0; n < C::kTilesN; n += 2) {
        uint32_t r_x[4];
        load_b<true, kGradFeatures>(r_x, s_x, warp_n * C::kWarpFeatures + n * 8, k);
        #pragma unroll
        for (int h = 0; h < 2; ++h) {
          const uint32_t b[2] = {r_x[2 * h], r_x[2 * h + 1]};
          #pragma unroll
          for (int m = 0; m < C::kTilesM; ++m) mma_m16n8k16<T>(acc[m][n + h], r_v[m], b);
        }
      }
    }
  }
  cp_async_wait<0>();
  __syncthreads();  // the pipeline's memory is free

  float* s_f1 = reinterpret_cast<float*>(smem);
  float* s_f2 = reinterpret_cast<float*>(smem + C::kF2At);
  float* s_sums = reinterpret_cast<float*>(smem + C::kSumsAt);
  // Eight ranks at a time: few enough registers beside the accumulators.
  const auto stage = [&](auto count, auto ranks_inner, const Factor& f, int rank, int num_ranks, float* s_rows) {
    constexpr int kCount = decltype(count)::value, kAtOnce = kCount < 8 ? kCount : 8;
    using Values = FactorTile<T, kAtOnce, kGradFeatures, C::kThreads, decltype(ranks_inner)::value>;
    #pragma unroll 1
    for (int first = 0; first < kCount; first += kAtOnce) {
      Values values(f, fp32, rank + first, num_ranks, feature0);
      values.load(num_features - feature0);
      Values::for_each([&](int j, int r, int d) { s_rows[(first + r) * C::kPitch + d] = values.values[j]; });
    }
  };
  const auto stage_factor = [&](auto count, const Factor& f, int rank, int num_ranks, float* s_rows) {
    if (f.rank_stride == 1) {
      stage(count, std::true_type{}, f, rank, num_ranks, s_rows);
    } else {
      stage(count, std::false_type{}, f, rank, num_ranks, s_rows);
    }
  };
  stage_factor(std::integral_constant<int, C::kBlockRanks1>{}, p.factors.f1, a0, r1, s_f1);
  stage_factor(std::integral_constant<int, C::kRank2>{}, p.factors.f2, 0, r2, s_f2);
  __syncthreads();

  // P[(a0 + warp_m kWarpRanks1 + i, g + 8 j), feature0 + column(n) + e]
  const auto product = [&](int i, int j, int n, int e) -> float& {
    const int row = i * C::kRank2 + j * 8;
    return acc[row / 16][n][row / 8 % 2 * 2 + e];
  };
  const auto column = [&](int n) { return warp_n * C::kWarpFeatures + n * 8 + 2 * t; };
  const auto pair = [&](float* rows, int row, int n) { return reinterpret_cast<float2*>(rows + row * C::kPitch + column(n)); };
  const int num_sums = C::kBlockRanks1 + C::kRank2;

  #pragma unroll
  for (int n = 0; n < C::kTilesN; ++n) {
    float2 f2[C::kLaneRanks2], over_a[C::kLaneRanks2] = {};
    #pragma unroll
    for (int j = 0; j < C::kLaneRanks2; ++j) f2[j] = *pair(s_f2, g + 8 * j, n);
    #pragma unroll
    for (int i = 0; i < C::kWarpRanks1; ++i) {
      const float2 f1 = *pair(s_f1, warp_m * C::kWarpRanks1 + i, n);
      float2 over_b = {};
      #pragma unroll
      for (int j = 0; j < C::kLaneRanks2; ++j) {
        over_b.x += product(i, j, n, 0) * f2[j].x;
        over_b.y += product(i, j, n, 1) * f2[j].y;
        over_a[j].x += product(i, j, n, 0) * f1.x;
        over_a[j].y += product(i, j, n, 1) * f1.y;
      }
      #pragma unroll
      for (int offset = 4; offset < 32; offset *= 2) {
        over_b.x += __shfl_xor_sync(0xffffffffu, over_b.x, offset);
        over_b.y += __shfl_xor_sync(0xffffffffu, over_b.y, offset);
      }
      __syncwarp();  // all lanes have read f1: its place takes the sum over b
      if (g == 0) *pair(s_f1, warp_m * C::kWarpRanks1 + i, n) = over_b;
    }
    #pragma unroll
    for (int j = 0; j < C::kLaneRanks2; ++j) product(0, j, n, 0) = over_a[j].x, product(0, j, n, 1) = over_a[j].y;
  }
  // The sums over a, of one warp row after the other. (Those of a lane have taken the place of its P of a = 0.)
  #pragma unroll
  for (int turn = 0; turn < C::kWarpsM; ++turn) {
    if (warp_m == turn) {
      #pragma unroll
      for (int n = 0; n < C::kTilesN; ++n)
        #pragma unroll
        for (int j = 0; j < C::kLaneRanks2; ++j) {
          float2* sum = pair(s_sums, g + 8 * j, n);
          const float2 before = turn == 0 ? float2{} : *sum;
          const float2 after = {before.x + product(0, j, n, 0), before.y + product(0, j, n, 1)};
          *sum = after;
        }
    }
    __syncthreads();
  }
  for (int i = threadIdx.x; i < num_sums * kGradFeatures; i += C::kThreads) {
    const int row = i / kGradFeatures, d = i % kGradFeatures;
    const float* s_row = row < C::kBlockRanks1 ? s_f1 + row * C::kPitch : s_sums + (row - C::kBlockRanks1) * C::kPitch;
    if (feature0 + d < num_features) workspace.row(blockIdx.z, blockIdx.y, row)[feature0 + d] = s_row[d];
  }

  add_up_shares<T, C::kThreads>(p, workspace, threadIdx.x, reinterpret_cast<unsigned*>(smem + C::kFlagAt), [] { __syncthreads(); });
}

// --- launcher ---

template <typename T, int kRank2, bool kWide>
int launch(const FactorGradParams& p, const GradShape& shape) {
  using C = FactorGradConfig<T, kRank2, kWide>;
  return ABBA_LAUNCH((factor_grad_kernel<C>), shape.grid(), dim3(C::kThreads), C::kSharedBytes, p.launch.stream, p,
                     GradWorkspace(p, shape));
}

}  // namespace

size_t factor_grad_workspace(const Launch& launch, int r1, int r2) {
  const GradShape shape(launch, r1, r2);
  return shape.arrivals_bytes() + shape.sums_bytes(launch.num_features);
}

int factor_grad(const FactorGradParams& p) {
  const GradShape shape(p.launch, p.factors.r1, p.factors.r2);
  if (const int error = clear_arrivals(p, shape)) return error;
  if (covered_by_sm90(p.launch, p.factors, p.x, p.v)) return factor_grad_sm90(p);
  return with_element_type(p.launch.dtype, [&](auto element) {
    using T = decltype(element);
    return with_rank2(p.factors, [&](auto rank2, auto) {
      constexpr int kRank2 = decltype(rank2)::value;
      return is_wide_grad(p.factors.r1, kRank2) ? launch<T, kRank2, true>(p, shape) : launch<T, kRank2, false>(p, shape);
    });
  });
}

}  // namespace abba
