// factor_magnitudes: partial maxima of |f1| and |f2| over 32 slices of the features each, [2][32] float. Runs before project
// and expand_ in float16, which scale the factors by powers of two (khatri_rao.cuh). A maximum is the same in any order.
// Grid: (slices, factors).
#include "khatri_rao.cuh"

namespace abba {
namespace {

constexpr int kSlices = 32, kThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kThreads) magnitudes_kernel(const FactorPair factors, const int64_t num_features,
                                                              float* partial_maxima) {
  ABBA_DYNAMIC_SMEM(smem);
  float* s_maxima = reinterpret_cast<float*>(smem);  // [warps]
  const Factor f = blockIdx.y == 0 ? factors.f1 : factors.f2;
  const int num_ranks = blockIdx.y == 0 ? factors.r1 : factors.r2;
  const bool fp32 = factors.dtype == Dtype::kFloat32, ranks_inner = f.rank_stride == 1;
  const int64_t first = num_features * blockIdx.x / kSlices, count = num_features * (blockIdx.x + 1) / kSlices - first;
  float largest = 0.f;
  for (int64_t i = threadIdx.x; i < count * num_ranks; i += kThreads) {
    const int64_t rank = ranks_inner ? i % num_ranks : i / count, feature = ranks_inner ? i / num_ranks : i % count;
    largest = fmaxf(largest, fabsf(factor_at<T>(f, fp32, rank, first + feature)));
  }
  #pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, offset));
  if (threadIdx.x % 32 == 0) s_maxima[threadIdx.x / 32] = largest;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int warp = 1; warp < kThreads / 32; ++warp) largest = fmaxf(largest, s_maxima[warp]);
  partial_maxima[kSlices * blockIdx.y + blockIdx.x] = largest;
}

}  // namespace

size_t magnitudes_workspace(Dtype activations) {
  return activations == Dtype::kFloat16 ? 2 * kSlices * sizeof(float) : 0;
}

int factor_magnitudes(const Launch& launch, const FactorPair& factors, void* workspace) {
  if (launch.dtype != Dtype::kFloat16) return 0;
  return ABBA_LAUNCH((magnitudes_kernel<__half>), dim3(kSlices, 2), dim3(kThreads), kThreads / 32 * sizeof(float), launch.stream,
                     factors, launch.num_features, static_cast<float*>(workspace));
}

}  // namespace abba
