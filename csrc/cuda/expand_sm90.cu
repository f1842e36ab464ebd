// expand_ on Hopper: yᵀ[D, T] += s KR(f1, f2)ᵀ[D, R] uᵀ[R, T], for bf16 and fp16 y and u whose rows TMA can copy and at most
// 1024 columns (a, b) (dispatch.h).
//
// As many blocks as multiprocessors share out the tiles of 64 or 128 tokens by 64 features; a block's tiles follow each other
// along the features and keep the tile of u, all R columns of it, in shared memory. The producing warpgroup brings y by TMA
// and the factors through registers, one tile ahead, into a ring of slots. The two consuming ones take turns: each forms
// the Khatri–Rao operand of its tile in registers, as wgmma's A with the tokens as n, adds to y in its slot and sends that
// off by TMA while the other one multiplies. At most 212 KB of shared memory. fp32 accumulation, s and y added in fp32, one
// rounding.
#include "../dispatch.h"
#include "pipeline_sm90.cuh"

namespace abba {
namespace {

// --- config ---

template <typename T_, int kRank2_, bool kRanksInner_, int kBlockTokens_>
struct ExpandSm90Config {
  using T = T_;
  static constexpr int kRank2 = kRank2_;
  static constexpr bool kRanksInner = kRanksInner_;     // f2 lies as [D, r2]
  static constexpr int kBlockTokens = kBlockTokens_;    // wgmma's n
  static constexpr int kBlockFeatures = 64;             // wgmma's m
  static constexpr int kMaxColumns = kBlockTokens == 128 ? kSm90WideExpandColumns : kSm90MaxExpandColumns;
  static constexpr int kRanks1 = kMaxColumns / kRank2 < kSm90MaxExpandRank1 ? kMaxColumns / kRank2 : kSm90MaxExpandRank1;
  static constexpr int kSlots = kBlockTokens == 128 ? 6 : 4;
  using F2 = F2Tile<kRank2, kBlockFeatures, kRanksInner>;
  using F1 = F1RowOrder<kBlockFeatures>;
  using KR = KrRowsOverRanks<T, kRank2, kBlockFeatures, kRanksInner>;

  // Shared memory: u [kMaxColumns / 64], y, f1 and f2 [kSlots], barriers of the slots and of u
  static constexpr int kTileBytes = kBlockTokens * SwizzledTile::kRowBytes, kF1Bytes = kRanks1 * F1::kRankBytes;
  static constexpr int kYAt = kRanks1 * kRank2 / 64 * kTileBytes, kF1At = kYAt + kSlots * kTileBytes;
  static constexpr int kF2At = kF1At + kSlots * kF1Bytes, kBarriersAt = kF2At + kSlots * F2::kBytes;
  static constexpr int kUBarriersAt = kBarriersAt + StageBarriers<kSlots>::kBytes;
  static constexpr int kSharedBytes = kUBarriersAt + StageBarriers<1>::kBytes;
};

// --- kernel ---

// A block's tiles: those from first to last, counted token tile by token tile.
template <typename C>
struct Tiles {
  int64_t first, last;
  int per_row;  // tiles of features

  ABBA_DEVICE explicit Tiles(const Launch& launch)
      : per_row(static_cast<int>((launch.num_features + C::kBlockFeatures - 1) / C::kBlockFeatures)) {
    const int64_t all = (launch.num_tokens + C::kBlockTokens - 1) / C::kBlockTokens * per_row;
    first = all * blockIdx.x / gridDim.x;
    last = all * (blockIdx.x + 1) / gridDim.x;
  }
  ABBA_DEVICE int row(int64_t tile) const { return static_cast<int>(tile / per_row); }      // of tokens
  ABBA_DEVICE int column(int64_t tile) const { return static_cast<int>(tile % per_row); }  // of features
};

template <typename C>
ABBA_DEVICE void produce(const ExpandParams& p, const TensorMap& y_map, const TensorMap& u_map, unsigned char* smem,
                         const StageBarriers<C::kSlots>& slots, const StageBarriers<1>& u_barriers, const Tiles<C>& tiles) {
  using T = typename C::T;
  const uint32_t s_u = smem_address(smem);
  const bool fp32 = p.factors.dtype == Dtype::kFloat32;
  const Scales scales = scales_of<T>(p.workspace);
  const int num_chunks = (p.factors.r1 * C::kRank2 + 63) / 64;

  FactorTile<T, C::kRanks1, C::kBlockFeatures, kGroupThreads, C::kRanksInner> r_f1(p.factors.f1, fp32, 0, p.factors.r1, 0);
  FactorTile<T, C::kRank2, C::kBlockFeatures, kGroupThreads, C::kRanksInner> r_f2(p.factors.f2, fp32, 0, p.factors.r2, 0);
  const char *f1 = r_f1.source, *f2 = r_f2.source;
  const auto load = [&](int64_t tile) {
    const int64_t feature = static_cast<int64_t>(tiles.column(tile)) * C::kBlockFeatures;
    r_f1.source = f1 + feature * p.factors.f1.feature_stride * (fp32 ? 4 : 2);
    r_f2.source = f2 + feature * p.factors.f2.feature_stride * (fp32 ? 4 : 2);
    r_f1.load(p.launch.num_features - feature);
    r_f2.load(p.launch.num_features - feature);
  };
  Ring<C::kSlots> slot;
  Ring<1> u_ring;
  load(tiles.first);
  for (int64_t tile = tiles.first; tile < tiles.last; ++tile) {
    const int token = tiles.row(tile) * C::kBlockTokens;
    slots.wait_empty(slot);
    if (threadIdx.x == 0) {
      mbarrier_arrive_expect(slots.full(slot.stage), C::kTileBytes);
      tma_load(s_u + C::kYAt + slot.stage * C::kTileBytes, y_map, tiles.column(tile) * C::kBlockFeatures, token,
               slots.full(slot.stage));
    }
    if (tile == tiles.first || tiles.column(tile) == 0) {
      u_barriers.wait_empty(u_ring);
      if (threadIdx.x == 0) {
        mbarrier_arrive_expect(u_barriers.full(0), num_chunks * C::kTileBytes);
        for (int chunk = 0; chunk < num_chunks; ++chunk)
          tma_load(s_u + chunk * C::kTileBytes, u_map, chunk * 64, token, u_barriers.full(0));
      }
      u_ring.advance();
    }
    r_f1.store(smem + C::kF1At + slot.stage * C::kF1Bytes, scales.f1, C::F1::offset);
    r_f2.store(smem + C::kF2At + slot.stage * C::F2::kBytes, scales.f2, C::F2::offset);
    if (tile + 1 < tiles.last) load(tile + 1);
    arrive_warp(slots.full(slot.stage));
    slot.advance();
  }
}

template <typename C>
ABBA_DEVICE void consume(const ExpandParams& p, const TensorMap& y_map, unsigned char* smem,
                         const StageBarriers<C::kSlots>& slots, const StageBarriers<1>& u_barriers, const Tiles<C>& tiles) {
  using T = typename C::T;
  const int group = threadIdx.x / kGroupThreads - 1;
  const bool leads = threadIdx.x % kGroupThreads == 0;  // the thread that sends the group's tiles off
  const uint32_t s_u = smem_address(smem);
  const float s = p.s * scales_of<T>(p.workspace).undo;
  const int num_chunks = (p.factors.r1 * C::kRank2 + 63) / 64;
  int u_row = tiles.row(tiles.first);
  Ring<1> u_ring;
  Ring<C::kSlots> slot;
  slot.advance(group);
  int sent = -1;  // the slot whose y is on its way out
  const auto release_sent = [&] {
    if (leads && sent >= 0) {
      tma_wait_read<0>();
      mbarrier_arrive(slots.empty(sent));
    }
    sent = -1;
  };

  // Each group releases each u of the block but the last one, when it is done with it or has no tile in that row.
  const auto pass_to_u_of = [&](int64_t tile) {
    for (; u_row < tiles.row(tile); ++u_row) {
      u_barriers.wait_full(u_ring);
      arrive_warp(u_barriers.empty(0));
      u_ring.advance();
    }
  };

  for (int64_t tile = tiles.first + group; tile < tiles.last; tile += kConsumerGroups, slot.advance(kConsumerGroups)) {
    pass_to_u_of(tile);
    u_barriers.wait_full(u_ring);
    slots.wait_full(slot);
    const uint32_t s_y = s_u + C::kYAt + slot.stage * C::kTileBytes;
    const unsigned char* s_f1 = smem + C::kF1At + slot.stage * C::kF1Bytes;
    const typename C::KR kr(s_u + C::kF2At + slot.stage * C::F2::kBytes);

    float acc[C::kBlockTokens / 2];  // the first product sets it: nothing else may write it in the loop
    uint32_t r_kr[2][4];
    const auto multiply = [&](int chunk, auto is_first) {
      constexpr bool kFirst = decltype(is_first)::value;
      kr.make(r_kr[0], s_f1, chunk, 0);
      #pragma unroll
      for (int k = 0; k < 4; ++k) {
        const uint64_t u = matrix_descriptor(s_u + chunk * C::kTileBytes + 32 * k);
        wgmma_fence();
        if (kFirst && k == 0) {
          wgmma<T, C::kBlockTokens, false>(acc, r_kr[0], u);
        } else {
          wgmma<T, C::kBlockTokens, true>(acc, r_kr[k % 2], u);
        }
        wgmma_commit();
        wgmma_wait<1>();  // one k16 step in flight, this one: the other half of r_kr is free
        if (k < 3) kr.make(r_kr[(k + 1) % 2], s_f1, chunk, k + 1);
      }
    };
    multiply(0, std::true_type{});
    release_sent();
    for (int chunk = 1; chunk < num_chunks; ++chunk) multiply(chunk, std::false_type{});
    wgmma_wait<0>();
    settle(acc);

    #pragma unroll
    for (int j = 0; j < C::kBlockTokens / 8; j += 2) {
      const uint32_t address = transposed_address(s_y, j);
      uint32_t r[4];
      ldmatrix_x4<true>(r, address);
      #pragma unroll
      for (int i = 0; i < 4; ++i)
        r[i] = pack(from_float<T>(to_float(half_of<T>(r[i], 0)) + s * acc[4 * j + 2 * i]),
                    from_float<T>(to_float(half_of<T>(r[i], 1)) + s * acc[4 * j + 2 * i + 1]));
      stmatrix_x4<true>(address, r);
    }
    fence_proxy_async();
    group == 0 ? sync_some<1, kGroupThreads>() : sync_some<2, kGroupThreads>();
    if (leads) {
      tma_store(y_map, tiles.column(tile) * C::kBlockFeatures, tiles.row(tile) * C::kBlockTokens, s_y);
      tma_commit();
    }
    sent = slot.stage;
  }
  pass_to_u_of(tiles.last - 1);
  if (leads) tma_wait_read<0>();  // shared memory lives as long as the block
}

template <typename C>
__global__ void __launch_bounds__(kSm90Threads, 1)
    expand_sm90_kernel(const ExpandParams p, const ABBA_GRID_CONSTANT TensorMap y_map, const ABBA_GRID_CONSTANT TensorMap u_map) {
#if ABBA_SM90A
  ABBA_DYNAMIC_SMEM(smem);
  const StageBarriers<C::kSlots> slots{smem_address(smem) + C::kBarriersAt};
  const StageBarriers<1> u_barriers{smem_address(smem) + C::kUBarriersAt};
  const Tiles<C> tiles(p.launch);
  if (threadIdx.x == 0) {
    prefetch_tensor_map(y_map), prefetch_tensor_map(u_map);
    slots.init(1 + kGroupThreads / 32, 1);  // TMA's bytes and the producer's warps; the thread that sent y off
    u_barriers.init(1, kConsumerWarps);
    mbarrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < kGroupThreads) {
    produce<C>(p, y_map, u_map, smem, slots, u_barriers, tiles);
  } else {
    consume<C>(p, y_map, smem, slots, u_barriers, tiles);
  }
#else
  __trap();  // never launched
#endif
}

// --- launcher ---

template <typename T, int kRank2, bool kRanksInner, int kBlockTokens>
int launch(const ExpandParams& p) {
  using C = ExpandSm90Config<T, kRank2, kRanksInner, kBlockTokens>;
  const int64_t num_tokens = p.launch.num_tokens, num_features = p.launch.num_features;
  TensorMap y_map, u_map;
  if (const int error = make_tensor_map(y_map, p.y, num_tokens, num_features, kBlockTokens)) return error;
  if (const int error = make_tensor_map(u_map, p.u, num_tokens, p.factors.r1 * kRank2, kBlockTokens)) return error;
  const int64_t all = (num_tokens + kBlockTokens - 1) / kBlockTokens * ((num_features + C::kBlockFeatures - 1) / C::kBlockFeatures);
  const dim3 grid(static_cast<unsigned>(all < p.launch.num_sms ? all : p.launch.num_sms));
  return ABBA_LAUNCH((expand_sm90_kernel<C>), grid, dim3(kSm90Threads), C::kSharedBytes, p.launch.stream, p, y_map, u_map);
}

}  // namespace

int expand_sm90(const ExpandParams& p) {
  return with_element_type(p.launch.dtype, [&](auto element) {
    using T = decltype(element);
    return with_rank2(p.factors, [&](auto rank2, auto ranks_inner) {
      constexpr int kRank2 = decltype(rank2)::value;
      constexpr bool kRanksInner = decltype(ranks_inner)::value;
      if (p.factors.r1 * kRank2 <= kSm90WideExpandColumns) return launch<T, kRank2, kRanksInner, 128>(p);
      return launch<T, kRank2, kRanksInner, 64>(p);
    });
  });
}

}  // namespace abba
