// What the two families of factor_grad share: the form of a call, the workspace, and the sum over the blocks' shares.
#pragma once
#include "../dispatch.h"
#include "khatri_rao.cuh"

namespace abba {

constexpr int kGradFeatures = 128;  // of a block

// Rows (a, b) of a block: 256, or 64 if there are no more.
inline bool is_wide_grad(int r1, int rank2) { return static_cast<int64_t>(r1) * rank2 > 64; }

struct GradShape {
  int rank2, block_ranks1, splits;
  int64_t feature_tiles, row_tiles;

  GradShape(const Launch& launch, int r1, int r2) {
    rank2 = padded_rank2(r2);
    block_ranks1 = (is_wide_grad(r1, rank2) ? 256 : 64) / rank2;
    feature_tiles = (launch.num_features + kGradFeatures - 1) / kGradFeatures;
    row_tiles = (r1 + block_ranks1 - 1) / block_ranks1;
    splits = factor_grad_splits(launch.num_tokens, feature_tiles * row_tiles, launch.num_sms);
  }
  dim3 grid() const {
    return dim3(static_cast<unsigned>(feature_tiles), static_cast<unsigned>(row_tiles), static_cast<unsigned>(splits));
  }
  size_t arrivals_bytes() const { return (feature_tiles * sizeof(unsigned) + 15) / 16 * 16; }
  size_t sums_bytes(int64_t num_features) const {
    return sizeof(float) * splits * row_tiles * (block_ranks1 + rank2) * num_features;
  }
};

// Shares of the blocks, each [block_ranks1 + rank2][D] in fp32: df1 of its values of a, then df2.
struct GradWorkspace {
  unsigned* arrivals;  // [feature tiles], zero before the launch
  float* sums;         // [splits][row tiles][block_ranks1 + rank2][D]
  int block_ranks1, rank2;
  int64_t num_features;

  GradWorkspace(const FactorGradParams& p, const GradShape& shape)
      : arrivals(static_cast<unsigned*>(p.workspace)),
        sums(reinterpret_cast<float*>(static_cast<char*>(p.workspace) + shape.arrivals_bytes())),
        block_ranks1(shape.block_ranks1), rank2(shape.rank2), num_features(p.launch.num_features) {}

  // A row of the share of the block that has this split of the tokens and this row tile.
  ABBA_DEVICE float* row(int64_t split, int64_t row_tile, int row) const {
    return sums + ((split * gridDim.y + row_tile) * (block_ranks1 + rank2) + row) * num_features;
  }
};

// Before the kernel. Returns a cudaError_t.
inline int clear_arrivals(const FactorGradParams& p, const GradShape& shape) {
  if (shape.row_tiles * shape.splits == 1) return 0;
  return ABBA_MEMSET_ASYNC(p.workspace, 0, shape.arrivals_bytes(), p.launch.stream);
}

template <typename T>
ABBA_DEVICE void write_factor(const Factor& f, bool fp32, int64_t rank, int64_t feature, float value) {
  const int64_t at = rank * f.rank_stride + feature * f.feature_stride;
  if (fp32) {
    static_cast<float*>(f.data)[at] = value;
  } else {
    static_cast<T*>(f.data)[at] = from_float<T>(value);
  }
}

// The end of the kernel, once this block's share is written: of the blocks of a feature tile the last to get here finds all
// shares, adds them up in a fixed order, applies s and rounds once. For kThreads threads; sync is their barrier.
template <typename T, int kThreads, typename Sync>
ABBA_DEVICE void add_up_shares(const FactorGradParams& p, const GradWorkspace& workspace, int thread, unsigned* s_last, Sync sync) {
  const int r1 = p.factors.r1, r2 = p.factors.r2;
  const bool fp32 = p.factors.dtype == Dtype::kFloat32;
  const int64_t slots = static_cast<int64_t>(gridDim.y) * gridDim.z, feature0 = static_cast<int64_t>(blockIdx.x) * kGradFeatures;
  sync();
  if (thread == 0) {
    unsigned before = 0;
    if (slots > 1) {
      __threadfence();  // this block's sums, before its arrival
      before = atomicAdd(workspace.arrivals + blockIdx.x, 1u);
      __threadfence();  // the others' sums, after theirs
    }
    *s_last = before + 1 == slots;
  }
  sync();
  if (!*s_last) return;
  const int64_t d = feature0 + thread % kGradFeatures;
  if (d >= p.launch.num_features) return;
  // A thread's column of one gradient, eight ranks at a time to have as many loads in flight. first(rank) is the first
  // of the rank's shares, which lie `step` apart.
  constexpr int kAtOnce = 8, kRankStep = kThreads / kGradFeatures;
  static_assert(kThreads % kGradFeatures == 0);
  const auto add_up = [&](const Factor& df, int num_ranks, int64_t num_shares, int64_t step, auto first) {
    for (int rank = thread / kGradFeatures; rank < num_ranks; rank += kAtOnce * kRankStep) {
      const float* share[kAtOnce];
      float sums[kAtOnce] = {};
      #pragma unroll
      for (int j = 0; j < kAtOnce; ++j) share[j] = first(min(rank + j * kRankStep, num_ranks - 1)) + d;
      for (int64_t i = 0; i < num_shares; ++i)
        #pragma unroll
        for (int j = 0; j < kAtOnce; ++j) sums[j] += __ldcg(share[j] + i * step);
      #pragma unroll
      for (int j = 0; j < kAtOnce; ++j)
        if (rank + j * kRankStep < num_ranks) write_factor<T>(df, fp32, rank + j * kRankStep, d, p.s * sums[j]);
    }
  };
  const int block_ranks1 = workspace.block_ranks1;
  const int64_t slot = (block_ranks1 + workspace.rank2) * workspace.num_features;
  add_up(p.df1, r1, gridDim.z, gridDim.y * slot,
         [&](int a) { return workspace.row(0, a / block_ranks1, a % block_ranks1); });
  add_up(p.df2, r2, slots, slot, [&](int b) { return workspace.row(0, 0, block_ranks1 + b); });
}

}  // namespace abba
