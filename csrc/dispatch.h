// The one table of what the CUDA kernels cover, and which of their forms a shape takes. None of the thresholds is measured
// yet: each is reasoned from the number of blocks that a device with 132 multiprocessors needs.
#pragma once
#include <type_traits>

#include "launchers.h"

namespace abba {

constexpr int kMaxRank2 = 64;
constexpr int kMaxRank1 = 65535;  // the most blocks of a grid along y, of at least one value of a each

// Up to here project splits the features over the warps of a block instead of the tokens over blocks.
constexpr int64_t kSmallTokens = 64;

// r2 as the kernels have it: b is padded with zeros to the next of these.
constexpr int padded_rank2(int r2) { return r2 <= 8 ? 8 : r2 <= 16 ? 16 : r2 <= 32 ? 32 : 64; }

// Columns (a, b) of a block of project: 256, so that x is read once, where 64-token blocks fill most of the device.
inline bool wide_project(const Launch& launch, int r1, int rank2) {
  return r1 * static_cast<int64_t>(rank2) > 64 && (launch.num_tokens + 63) / 64 * 4 >= 3 * launch.num_sms;
}

// Blocks of expand that share a tile of tokens: enough of them to have four blocks on every multiprocessor.
inline int64_t expand_feature_groups(int64_t token_tiles, int64_t feature_tiles, int num_sms) {
  const int64_t groups = (4 * num_sms + token_tiles - 1) / token_tiles;
  return groups < feature_tiles ? groups : feature_tiles;
}

// Blocks of factor_grad that share out the tokens: enough to fill the device once, of at least 512 tokens each.
inline int factor_grad_splits(int64_t num_tokens, int64_t other_blocks, int num_sms) {
  const int64_t wanted = (num_sms + other_blocks / 2) / other_blocks, most = (num_tokens + 511) / 512;
  const int64_t splits = wanted < most ? wanted : most;
  return static_cast<int>(splits < 1 ? 1 : splits);
}

// --- Hopper ---

// Rows that TMA can address: 16-byte aligned, with 32-bit coordinates and a stride of less than 2^40 bytes.
inline bool tma_rows(const Rows& rows, int64_t num_rows, int64_t num_columns) {
  constexpr int64_t kMost = int64_t{1} << 31;
  return reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && rows.stride % 8 == 0 && rows.stride >= num_columns &&
         rows.stride < int64_t{1} << 39 && num_rows < kMost && num_columns < kMost;
}

// Which calls the kernels for sm_90a take, if launch.sm90 wants them at all: tokens enough for tiles of 64, an r2 that needs
// no padding, rows that TMA can address.
inline bool covered_by_sm90(const Launch& launch, const FactorPair& factors, const Rows& x, const Rows& u) {
  const int64_t num_columns = static_cast<int64_t>(factors.r1) * factors.r2;
  return launch.sm90 && launch.num_tokens > kSmallTokens && factors.r2 == padded_rank2(factors.r2) &&
         tma_rows(x, launch.num_tokens, launch.num_features) && tma_rows(u, launch.num_tokens, num_columns);
}

// expand_sm90 keeps all columns (a, b) of u for a block's tokens in shared memory: 128 tokens up to the first number of
// columns, 64 up to the second; more, or more values of a, are left to the other kernel.
constexpr int kSm90WideExpandColumns = 256, kSm90MaxExpandColumns = 1024, kSm90MaxExpandRank1 = 64;
inline bool expand_covered_by_sm90(const Launch& launch, const FactorPair& factors, const Rows& y, const Rows& u) {
  return factors.r1 <= kSm90MaxExpandRank1 && factors.r1 * factors.r2 <= kSm90MaxExpandColumns &&
         covered_by_sm90(launch, factors, y, u);
}

// Columns (a, b) of a block of project_sm90: 256, so that x is read once, where its 64-token blocks fill most of the device.
inline bool wide_project_sm90(const Launch& launch, int r1, int rank2) {
  return r1 * static_cast<int64_t>(rank2) > 128 && (launch.num_tokens + 63) / 64 * 4 >= 3 * launch.num_sms;
}

// fn(padded r2, whether f2 lies as [D, r2]) as compile-time constants.
template <typename Fn>
int with_rank2(const FactorPair& factors, Fn&& fn) {
  const auto with_layout = [&](auto rank2) {
    return factors.f2.rank_stride == 1 ? fn(rank2, std::true_type{}) : fn(rank2, std::false_type{});
  };
  switch (padded_rank2(factors.r2)) {
    case 8: return with_layout(std::integral_constant<int, 8>{});
    case 16: return with_layout(std::integral_constant<int, 16>{});
    case 32: return with_layout(std::integral_constant<int, 32>{});
    default: return with_layout(std::integral_constant<int, 64>{});
  }
}

}  // namespace abba
