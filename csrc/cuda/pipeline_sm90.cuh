// What the Hopper kernels have in common: one warpgroup produces, two consume, and mbarriers pass stages between them.
#pragma once
#include "khatri_rao.cuh"
#include "ptx_sm90.cuh"
#include "tensor_map.cuh"

namespace abba {

constexpr int kGroupThreads = 128, kConsumerGroups = 2, kConsumerThreads = kConsumerGroups * kGroupThreads;
constexpr int kSm90Threads = kGroupThreads + kConsumerThreads;
constexpr int kConsumerWarps = kConsumerThreads / 32;
using SwizzledTile = Tile<64>;  // as TMA and wgmma have it

// Position in a ring of stages. The phase of a stage's barriers is the parity of the round.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t phase = 0;
  ABBA_DEVICE void advance(int by = 1) {
    stage += by;
    if (stage >= kStages) stage -= kStages, phase ^= 1;
  }
};

// Two mbarriers for every stage: `full`, when its contents have arrived, and `empty`, when they are no longer needed.
template <int kStages>
struct StageBarriers {
  static constexpr int kBytes = 2 * 8 * kStages;
  uint32_t s_barriers;
  ABBA_DEVICE uint32_t full(int stage) const { return s_barriers + 8 * stage; }
  ABBA_DEVICE uint32_t empty(int stage) const { return s_barriers + 8 * (kStages + stage); }
  ABBA_DEVICE void init(int full_arrivals, int empty_arrivals) const {
    for (int stage = 0; stage < kStages; ++stage) {
      mbarrier_init(full(stage), full_arrivals);
      mbarrier_init(empty(stage), empty_arrivals);
    }
  }
  // A producer may fill the stage: at once in the first round.
  ABBA_DEVICE void wait_empty(const Ring<kStages>& ring) const { mbarrier_wait(empty(ring.stage), ring.phase ^ 1); }
  ABBA_DEVICE void wait_full(const Ring<kStages>& ring) const { mbarrier_wait(full(ring.stage), ring.phase); }
};

// One arrival for what all lanes of the warp did.
ABBA_DEVICE void arrive_warp(uint32_t barrier) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) mbarrier_arrive(barrier);
}

// --- accumulators of wgmma: 64 rows by kTokens columns, to be stored as [kTokens][64] in a swizzled tile ---

// The address, for ldmatrix and stmatrix with .trans, of this lane's row of the four matrices that hold the columns 8 j to
// 8 j + 15 of the warp's 16 rows: registers d[4 j] to d[4 j + 7].
ABBA_DEVICE uint32_t transposed_address(uint32_t s_tile, int j) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  return s_tile + SwizzledTile::chunk_offset(8 * (j + lane / 16) + lane % 8, 2 * warp + lane / 8 % 2);
}

}  // namespace abba
