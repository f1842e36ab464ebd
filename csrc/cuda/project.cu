// project: u[T, R] = x[T, D] KR(f1, f2)ᵀ, for bf16 and fp16 x; called in forward with x and A, in backward with dy and Bᵀ.
//
// project_kernel: a block makes a tile of 64 tokens by 64 or 256 columns (a, b), a warp 16 to 64 by 64 of them, in steps of
// 64 features. x arrives through a cp.async pipeline; the factors pass through registers, one step ahead, and are rounded
// on the way. Grid: (token tiles, column tiles). At most 50 KB of shared memory. Accumulation in fp32, one rounding.
// small_project_kernel: for T <= 64 a block makes 8 columns of all tokens; its 16 warps share out the features, fragments
// come straight from global memory, and the warps' sums are added in a fixed order. One launch, no workspace.
#include "../dispatch.h"
#include "khatri_rao.cuh"

namespace abba {
namespace {

// --- config ---

template <typename T_, int kRank2_, bool kRanksInner_, bool kWide>
struct ProjectConfig {
  using T = T_;
  static constexpr int kRank2 = kRank2_;
  static constexpr bool kRanksInner = kRanksInner_;       // f2 lies as [D, r2]
  static constexpr int kTilesM = !kWide ? 1 : kRank2 == 64 ? 2 : 4;  // m16 tiles of a warp, as the registers allow
  static constexpr int kWarpsM = 4 / kTilesM, kWarpsN = kWide ? 4 : 1;
  static constexpr int kThreads = 32 * kWarpsM * kWarpsN;
  static constexpr int kBlocksPerSm = 256 / kThreads;  // at up to 255 registers
  static constexpr int kBlockTokens = 16 * kTilesM * kWarpsM;
  static constexpr int kWarpColumns = 64;
  static constexpr int kBlockFeatures = 64;               // a row of the x tile is 128 bytes
  static constexpr int kStages = 4;
  static constexpr int kWarpRanks1 = kWarpColumns / kRank2;     // values of a in a warp
  static constexpr int kBlockRanks1 = kWarpRanks1 * kWarpsN;    // and in a block
  using XTile = Tile<kBlockFeatures>;
  using F2 = F2Tile<kRank2, kBlockFeatures, kRanksInner>;
  using F1 = F1PairOrder<kBlockRanks1>;

  // Shared memory: x [kStages], then f1 and f2 [2]
  static constexpr int kXBytes = kBlockTokens * XTile::kRowBytes;
  static constexpr int kF1Bytes = 2 * kBlockRanks1 * kBlockFeatures;
  static constexpr int kF1At = kStages * kXBytes, kF2At = kF1At + 2 * kF1Bytes;
  static constexpr int kSharedBytes = kF2At + 2 * F2::kBytes;
};

constexpr int kSmallWarps = 16;

// --- kernel ---

template <typename C>
__global__ void __launch_bounds__(C::kThreads, C::kBlocksPerSm) project_kernel(const ProjectParams p) {
  using T = typename C::T;
  ABBA_DYNAMIC_SMEM(smem);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_m = warp % C::kWarpsM, warp_n = warp / C::kWarpsM;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * C::kBlockTokens;
  const int a0 = blockIdx.y * C::kBlockRanks1;
  const int64_t num_features = p.launch.num_features;
  const int num_steps = static_cast<int>((num_features + C::kBlockFeatures - 1) / C::kBlockFeatures);
  const T* x = static_cast<const T*>(p.x.data);
  const Scales scales = scales_of<T>(p.workspace);
  const int x_bytes = copy_bytes(x, p.x.stride);
  const bool fp32 = p.factors.dtype == Dtype::kFloat32;

  const auto load_x = [&](int step) {
    if (step < num_steps)
      load_tile<C::kBlockTokens, C::kBlockFeatures, C::kThreads>(
          smem + step % C::kStages * C::kXBytes, x, p.x.stride, token, p.launch.num_tokens,
          FeatureColumns{static_cast<int64_t>(step) * C::kBlockFeatures, num_features}, x_bytes);
    cp_async_commit();  // an empty group past the end keeps the count
  };
  FactorTile<T, C::kBlockRanks1, C::kBlockFeatures, C::kThreads, C::kRanksInner> r_f1(p.factors.f1, fp32, a0, p.factors.r1, 0);
  FactorTile<T, C::kRank2, C::kBlockFeatures, C::kThreads, C::kRanksInner> r_f2(p.factors.f2, fp32, 0, p.factors.r2, 0);
  const int64_t f1_step = p.factors.f1.feature_stride * C::kBlockFeatures * (fp32 ? 4 : 2);  // bytes
  const int64_t f2_step = p.factors.f2.feature_stride * C::kBlockFeatures * (fp32 ? 4 : 2);
  const auto load_factors = [&](int step) {  // steps in their order
    const int64_t features_left = num_features - static_cast<int64_t>(step) * C::kBlockFeatures;
    r_f1.load(features_left), r_f1.source += f1_step;
    r_f2.load(features_left), r_f2.source += f2_step;
  };
  const auto store_factors = [&](int step) {
    r_f1.store(smem + C::kF1At + step % 2 * C::kF1Bytes, scales.f1, C::F1::offset);
    r_f2.store(smem + C::kF2At + step % 2 * C::F2::kBytes, scales.f2, C::F2::offset);
  };

  float acc[C::kTilesM][C::kWarpColumns / 8][4] = {};
  const auto multiply = [&](int step) {
    const uint32_t s_x = smem_address(smem) + step % C::kStages * C::kXBytes;
    const uint32_t s_f2 = smem_address(smem) + C::kF2At + step % 2 * C::F2::kBytes;
    const unsigned char* s_f1 = smem + C::kF1At + step % 2 * C::kF1Bytes;
    #pragma unroll
    for (int k = 0; k < C::kBlockFeatures; k += 16) {
      uint32_t r_x[C::kTilesM][4], f2[C::kRank2 / 8][2];
      #pragma unroll
      for (int m = 0; m < C::kTilesM; ++m)
        load_a<false, C::kBlockFeatures>(r_x[m], s_x, (warp_m * C::kTilesM + m) * 16, k);
      load_f2_over_features<C::kRank2, C::kBlockFeatures, C::kRanksInner>(f2, s_f2, k);
      #pragma unroll
      for (int i = 0; i < C::kWarpRanks1; ++i) {
        const uint2 f1 = C::F1::load(s_f1, warp_n * C::kWarpRanks1 + i, k / 16);
        #pragma unroll
        for (int q = 0; q < C::kRank2 / 8; ++q) {
          const uint32_t kr[2] = {multiply2<T>(f1.x, f2[q][0]), multiply2<T>(f1.y, f2[q][1])};
          #pragma unroll
          for (int m = 0; m < C::kTilesM; ++m) mma_m16n8k16<T>(acc[m][i * (C::kRank2 / 8) + q], r_x[m], kr);
        }
      }
    }
  };

  load_factors(0);
  for (int step = 0; step < C::kStages - 1; ++step) load_x(step);
  store_factors(0);
  for (int step = 0; step < num_steps; ++step) {
    // Always kStages - 1 groups of x in flight here. After the barrier x and the factors of this step are visible, and no
    // warp reads what the previous step used: the next copies go there.
    cp_async_wait<C::kStages - 2>();
    __syncthreads();
    load_x(step + C::kStages - 1);
    if (step + 1 < num_steps) load_factors(step + 1);
    multiply(step);
    if (step + 1 < num_steps) store_factors(step + 1);
  }
  cp_async_wait<0>();

  T* u = static_cast<T*>(p.u.data);
  const int r2 = p.factors.r2;
  const bool in_pairs = copy_bytes(u, p.u.stride, r2) >= 4;
  #pragma unroll
  for (int m = 0; m < C::kTilesM; ++m)
    #pragma unroll
    for (int j = 0; j < C::kWarpColumns / 8; ++j)
      #pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int64_t row = token + (warp_m * C::kTilesM + m) * 16 + lane / 4 + h * 8;
        const int a = a0 + warp_n * C::kWarpRanks1 + j * 8 / C::kRank2, b = j * 8 % C::kRank2 + lane % 4 * 2;
        if (row < p.launch.num_tokens && a < p.factors.r1 && b < r2) {
          T* pair = u + row * p.u.stride + static_cast<int64_t>(a) * r2 + b;
          const T low = from_float<T>(scales.undo * acc[m][j][2 * h]);
          const T high = from_float<T>(scales.undo * acc[m][j][2 * h + 1]);
          if (in_pairs) {
            *reinterpret_cast<uint32_t*>(pair) = pack(low, high);
          } else {
            pair[0] = low;
            if (b + 1 < r2) pair[1] = high;
          }
        }
      }
}

template <typename T, int kTilesM>
__global__ void __launch_bounds__(32 * kSmallWarps, 1) small_project_kernel(const ProjectParams p) {
  ABBA_DYNAMIC_SMEM(smem);
  float* s_sums = reinterpret_cast<float*>(smem);  // [kSmallWarps][16 kTilesM][8]
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int num_tokens = static_cast<int>(p.launch.num_tokens);
  const int64_t num_features = p.launch.num_features, column0 = static_cast<int64_t>(blockIdx.x) * 8;
  const int64_t num_columns = static_cast<int64_t>(p.factors.r1) * p.factors.r2;
  const T* x = static_cast<const T*>(p.x.data);
  const bool fp32 = p.factors.dtype == Dtype::kFloat32, column_inside = column0 + g < num_columns;
  const int64_t a = (column0 + g) / p.factors.r2, b = (column0 + g) % p.factors.r2;

  const Scales scales = scales_of<T>(p.workspace);

  const auto factor_pair = [&](const Factor& f, float scale, int64_t rank, int64_t feature) {
    float v[2] = {};
    #pragma unroll
    for (int e = 0; e < 2; ++e)
      if (column_inside && feature + e < num_features) v[e] = scale * factor_at<T>(f, fp32, rank, feature + e);
    return pack(from_float<T>(v[0]), from_float<T>(v[1]));
  };
  const bool whole_words = reinterpret_cast<uintptr_t>(x) % 4 == 0 && p.x.stride % 2 == 0;
  const auto x_pair = [&](int row, int64_t feature) {
    if (whole_words && row < num_tokens && feature + 1 < num_features)
      return *reinterpret_cast<const uint32_t*>(x + row * p.x.stride + feature);
    T v[2] = {T(0.f), T(0.f)};
    #pragma unroll
    for (int e = 0; e < 2; ++e)
      if (row < num_tokens && feature + e < num_features) v[e] = x[row * p.x.stride + feature + e];
    return pack(v[0], v[1]);
  };

  float acc[kTilesM][4] = {};
  #pragma unroll (kTilesM == 1 ? 2 : 1)  // what the registers allow, on Blackwell too
  for (int64_t k = warp * 16; k < num_features; k += kSmallWarps * 16) {
    uint32_t kr[2];
    #pragma unroll
    for (int h = 0; h < 2; ++h)
      kr[h] = multiply2<T>(factor_pair(p.factors.f1, scales.f1, a, k + 2 * t + 8 * h),
                           factor_pair(p.factors.f2, scales.f2, b, k + 2 * t + 8 * h));
    #pragma unroll
    for (int m = 0; m < kTilesM; ++m) {
      uint32_t r_x[4];
      #pragma unroll
      for (int i = 0; i < 4; ++i) r_x[i] = x_pair(m * 16 + g + i % 2 * 8, k + 2 * t + i / 2 * 8);
      mma_m16n8k16<T>(acc[m], r_x, kr);
    }
  }
  #pragma unroll
  for (int m = 0; m < kTilesM; ++m)
    #pragma unroll
    for (int i = 0; i < 4; ++i)
      s_sums[(warp * 16 * kTilesM + m * 16 + g + i / 2 * 8) * 8 + 2 * t + i % 2] = acc[m][i];
  __syncthreads();
  for (int i = threadIdx.x; i < 16 * kTilesM * 8; i += 32 * kSmallWarps) {
    const int row = i / 8;
    const int64_t column = column0 + i % 8;
    if (row >= num_tokens || column >= num_columns) continue;
    float sum = 0.f;
    #pragma unroll
    for (int w = 0; w < kSmallWarps; ++w) sum += s_sums[w * 16 * kTilesM * 8 + i];
    static_cast<T*>(p.u.data)[row * p.u.stride + column] = from_float<T>(scales.undo * sum);
  }
}

// --- launcher ---

template <typename T, int kRank2, bool kRanksInner, bool kWide>
int launch(const ProjectParams& p) {
  using C = ProjectConfig<T, kRank2, kRanksInner, kWide>;
  const dim3 grid(static_cast<unsigned>((p.launch.num_tokens + C::kBlockTokens - 1) / C::kBlockTokens),
                  static_cast<unsigned>((p.factors.r1 + C::kBlockRanks1 - 1) / C::kBlockRanks1));
  return ABBA_LAUNCH((project_kernel<C>), grid, dim3(C::kThreads), C::kSharedBytes, p.launch.stream, p);
}

template <typename T, int kTilesM>
int launch_small(const ProjectParams& p) {
  const dim3 grid(static_cast<unsigned>((static_cast<int64_t>(p.factors.r1) * p.factors.r2 + 7) / 8));
  constexpr int shared_bytes = kSmallWarps * 16 * kTilesM * 8 * 4;
  return ABBA_LAUNCH((small_project_kernel<T, kTilesM>), grid, dim3(32 * kSmallWarps), shared_bytes, p.launch.stream, p);
}

}  // namespace

int project(const ProjectParams& p) {
  if (const int error = factor_magnitudes(p.launch, p.factors, p.workspace)) return error;
  if (covered_by_sm90(p.launch, p.factors, p.x, p.u)) return project_sm90(p);
  return with_element_type(p.launch.dtype, [&](auto element) {
    using T = decltype(element);
    if (p.launch.num_tokens <= kSmallTokens) {
      if (p.launch.num_tokens <= 16) return launch_small<T, 1>(p);
      return p.launch.num_tokens <= 32 ? launch_small<T, 2>(p) : launch_small<T, 4>(p);
    }
    return with_rank2(p.factors, [&](auto rank2, auto ranks_inner) {
      constexpr int kRank2 = decltype(rank2)::value;
      constexpr bool kRanksInner = decltype(ranks_inner)::value;
      if (wide_project(p.launch, p.factors.r1, kRank2)) return launch<T, kRank2, kRanksInner, true>(p);
      return launch<T, kRank2, kRanksInner, false>(p);
    });
  });
}

}  // namespace abba
