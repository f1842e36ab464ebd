// Small kernels of Hopper's instructions, each right or with one bug, as in kernels.cu. A variant that is right, too, has a
// name of its own.
#include "kernels.h"

#include <map>
#include <string>
#include <type_traits>

#include "cuda/ptx_sm90.cuh"
#include "cuda/tensor_map.cuh"

namespace abba {
namespace {

struct Params {
  void* pointers[4];
  int sizes[12];
};

template <typename T>
ABBA_DEVICE T* as(void* pointer) {
  return static_cast<T*>(pointer);
}

constexpr int kTileRows = 64, kTileBytes = kTileRows * 128;

ABBA_DEVICE uint32_t swizzled(uint32_t offset) { return offset ^ (offset >> 7 & 7) << 4; }

// ---- TMA and mbarrier ----------------------------------------------------------------------------------------------

// Copies one box of [rows, 64] from `in` at column sizes[8], row sizes[9] to the same place of `out`.
// 1: does not wait for the load; 2: waits for the other parity; 3: no fence behind the init; 4: expects too few bytes, 5: too
// many; 6: a tile that is not aligned; 7: exits before its store has read; 8: the tile is overwritten before; 9: no init;
// 10: an init too many; 11: reads the mbarrier; 12: loads twice; 13: arrives twice; 14: one arrival too few; 15: exits before
// the load has landed; 16: no barrier behind the init; 17: a barrier that is not aligned; 18: past the end of shared memory
template <int kBug>
__global__ void box(const Params p, const ABBA_GRID_CONSTANT TensorMap in, const ABBA_GRID_CONSTANT TensorMap out) {
  ABBA_DYNAMIC_SMEM(smem);
  constexpr int kBarrierAt = kTileBytes + 128;
  const int bytes = p.sizes[3] * 128, column = p.sizes[8], row = p.sizes[9];
  const uint32_t tile = smem_address(smem) + (kBug == 6 ? 128 : kBug == 18 ? 1 << 14 : 0);
  const uint32_t barrier = smem_address(smem) + kBarrierAt + (kBug == 17 ? 4 : 0);
  if (threadIdx.x == 0) {
    if (kBug != 9) mbarrier_init(barrier, kBug == 14 ? 2 : 1);
    if (kBug == 10) mbarrier_init(barrier, 1);
    if (kBug != 3) mbarrier_init_fence();
  }
  if (kBug != 16) __syncthreads();
  if (threadIdx.x == 32) {
    mbarrier_arrive_expect(barrier, bytes + (kBug == 4 ? -128 : kBug == 5 ? 128 : 0));
    if (kBug == 13) mbarrier_arrive(barrier);
    tma_load(tile, in, column, row, barrier);
    if (kBug == 12) tma_load(tile, in, column, row, barrier);
    if (kBug == 15) return;
  }
  if (kBug == 15) return;
  if (kBug != 1) mbarrier_wait(barrier, kBug == 2 ? 1 : 0);
  if (kBug == 11) as<uint32_t>(p.pointers[2])[0] = as<uint32_t>(smem + kBarrierAt)[threadIdx.x == 3 ? 1 : 0];
  if (threadIdx.x == 0) {
    tma_store(out, column, row, tile);
    tma_commit();
    if (kBug == 8) as<uint32_t>(smem)[5] = 0;
    if (kBug != 7) tma_wait_read<0>();
    as<uint32_t>(smem)[5] = 0;
  }
}

// Writes the tile of threadIdx.x by stores, and from there to `out`. kLate: the proxies' fence is that of the storing thread.
// 1: no fence; 2: no barrier; 3: the fence is before the writes; 4: a barrier of fewer threads; 5: of two counts;
// 6: half of a warp misses; 7: stores before the group is committed
template <bool kLate, int kBug>
__global__ void publish(const Params p, const ABBA_GRID_CONSTANT TensorMap, const ABBA_GRID_CONSTANT TensorMap out) {
  ABBA_DYNAMIC_SMEM(smem);
  const int i = threadIdx.x;
  if (kBug == 3) fence_proxy_async();
  for (int row = i; row < kTileRows; row += 64)
    for (int column = 0; column < 64; ++column)
      as<uint16_t>(smem)[swizzled(row * 128 + column * 2) / 2] = static_cast<uint16_t>(100 * row + column);
  if (!kLate && kBug != 1 && kBug != 3) fence_proxy_async();
  if (kBug == 4) {
    if (i < 32) sync_some<1, 32>();
  } else if (kBug == 5) {
    i < 32 ? sync_some<1, 64>() : sync_some<1, 96>();
  } else if (kBug != 2 && !(kBug == 6 && i >= 48)) {
    sync_some<1, 64>();
  }
  if (i == 0) {
    if (kLate) fence_proxy_async();
    tma_store(out, 0, 0, smem_address(smem));
    if (kBug != 7) tma_commit();
    tma_wait_read<0>();
  }
}

// out[i] = sum over tiles of the row i of the tiles [64, 64] of `in`, int16, through two stages; a warp produces, two consume.
// 1: no wait for the tile; 2: with the wrong parity; 3: no wait for the stage to be empty; 4: released before it is read;
// 5: lane 0 releases for lanes that it does not know of; 6: released by one of two warps, counted twice; 7: waits for three
template <int kBug>
__global__ void pipeline(const Params p, const ABBA_GRID_CONSTANT TensorMap in, const ABBA_GRID_CONSTANT TensorMap) {
  ABBA_DYNAMIC_SMEM(smem);
  const int i = threadIdx.x, tiles = p.sizes[1] / kTileRows;
  const uint32_t tile0 = smem_address(smem), barriers = tile0 + 2 * kTileBytes;
  if (i == 0) {
    for (int stage = 0; stage < 2; ++stage) {
      mbarrier_init(barriers + 8 * stage, 1);                          // full
      mbarrier_init(barriers + 16 + 8 * stage, kBug == 7 ? 3 : 2);  // empty
    }
    mbarrier_init_fence();
  }
  __syncthreads();
  unsigned sum = 0;
  for (int t = 0; t < tiles; ++t) {
    const int stage = t % 2, phase = t / 2 % 2;
    const uint32_t full = barriers + 8 * stage, empty = barriers + 16 + 8 * stage;
    if (i >= 64) {
      if (i == 64) {
        if (kBug != 3) mbarrier_wait(empty, phase ^ 1);
        mbarrier_arrive_expect(full, kTileBytes);
        tma_load(tile0 + stage * kTileBytes, in, 0, t * kTileRows, full);
      }
      continue;
    }
    if (kBug != 1) mbarrier_wait(full, kBug == 2 ? phase ^ 1 : phase);
    if (kBug == 4) __syncwarp();
    if (kBug == 4 && i % 32 == 0) mbarrier_arrive(empty);
    for (int column = 0; column < 64; ++column)
      sum += as<uint16_t>(smem + stage * kTileBytes)[swizzled(i * 128 + column * 2) / 2];
    if (kBug != 5) __syncwarp();
    if (kBug != 4 && kBug != 6 && i % 32 == 0) mbarrier_arrive(empty);
    if (kBug == 6 && i % 32 == 0 && i < 32) mbarrier_arrive(empty), mbarrier_arrive(empty);
  }
  if (i < 64) as<unsigned>(p.pointers[1])[i] = sum;
}

// ---- wgmma ---------------------------------------------------------------------------------------------------------

// out[thread][N / 2] = registers of d = a b over 64 k, plus 0.5: a [steps][thread][4] registers at pointers[2], or tiles.
// b comes by TMA as [N, 64] if a is in registers, else a and b come as [64, 64] and [64, N] in boxes of 64 columns.
// 1: d read before the wait; 2: a written before; 3: no fence; 4: a lane misses; 5: b written by stores, no proxies' fence;
// 6: b refilled before the wait; 7: b not aligned; 8: not waited for; 9: not committed; 10: a warp misses; 11: b has not
// landed; 12: another swizzle; 13: d written before the wait; 14: the lanes' tiles differ; 15: waits for all but one group
template <typename T, int N, bool kShared, int kBug>
__global__ void product(const Params p, const ABBA_GRID_CONSTANT TensorMap a_map, const ABBA_GRID_CONSTANT TensorMap b_map) {
  ABBA_DYNAMIC_SMEM(smem);
  constexpr int kSteps = 4;
  const int i = threadIdx.x;
  const uint32_t tile_a = smem_address(smem), tile_b = tile_a + (kShared ? kTileBytes : 0), barrier = tile_a + 3 * kTileBytes;
  if (i == 0) {
    mbarrier_init(barrier, 1);
    mbarrier_init_fence();
  }
  __syncthreads();
  const auto load_b = [&] {
    for (int n = 0; n < N; n += 64) kShared ? tma_load(tile_b + n * 128, b_map, n, 0, barrier) : tma_load(tile_b + n * 128, b_map, 0, n, barrier);
  };
  if (i == 0 && kBug != 5) {
    mbarrier_arrive_expect(barrier, (kShared + N / 64) * kTileBytes);
    if (kShared) tma_load(tile_a, a_map, 0, 0, barrier);
    load_b();
  }
  if (kBug == 5) {
    for (int row = i; row < N; row += 128) as<uint4>(smem)[8 * row] = uint4{};
    for (int chunk = i; chunk < N * 8; chunk += 128) as<uint4>(smem)[chunk] = uint4{};
    __syncthreads();
  } else if (kBug != 11) {
    mbarrier_wait(barrier, 0);
  }
  uint32_t a[kSteps][4];
  if (!kShared)
    for (int step = 0; step < kSteps; ++step)
      for (int j = 0; j < 4; ++j) a[step][j] = as<const uint32_t>(p.pointers[2])[(step * 128 + i) * 4 + j];
  float d[N / 2];
  for (int j = 0; j < N / 2; ++j) d[j] = 0.5f;
  if (kBug != 3) wgmma_fence();
  if (kBug == 4 && i == 77) return;
  if (kBug == 10 && i >= 96) return;
  for (int step = 0; step < kSteps; ++step) {
    if constexpr (kShared) {
      wgmma<T, N, true>(d, matrix_descriptor(tile_a + 2048 * step, kTileBytes), matrix_descriptor(tile_b + 2048 * step, kTileBytes));
    } else {
      uint64_t b = matrix_descriptor(tile_b + 32 * step + (kBug == 7 ? 256 : kBug == 14 && i == 3 ? 1024 : 0));
      if (kBug == 12) b ^= uint64_t{3} << 62;
      wgmma<T, N, true>(d, a[step], b);
    }
  }
  if (kBug != 9) wgmma_commit();
  if (kBug == 15) wgmma_commit();
  if (kBug == 1) as<float>(p.pointers[3])[i * N / 2] = d[0];
  if (kBug == 2) a[1][2] = 0;
  if (kBug == 6 && i == 0) load_b();
  if (kBug == 13) d[3] = 7;
  if (kBug == 15) wgmma_wait<2>();
  else if (kBug != 8) wgmma_wait<0>();
  for (int j = 0; j < N / 2; ++j) as<float>(p.pointers[3])[i * N / 2 + j] = d[j];
}

// The same d twice, without adding in between: d = b's part of the second step alone. Groups end one by one.
template <int kBug>
__global__ void replaced(const Params p, const ABBA_GRID_CONSTANT TensorMap, const ABBA_GRID_CONSTANT TensorMap) {
  ABBA_DYNAMIC_SMEM(smem);
  const int i = threadIdx.x;
  for (int chunk = i; chunk < 512; chunk += 128) {
    const uint32_t two = 0x40004000, one = 0x3f803f80, value = chunk / 8 % 2 ? two : one;  // row n: of ones or of twos
    as<uint4>(smem)[chunk] = uint4{value, value, value, value};
  }
  fence_proxy_async();
  __syncthreads();
  uint32_t a[2][4];
  for (int j = 0; j < 4; ++j) a[0][j] = 0x3f803f80, a[1][j] = 0x40404040;  // ones, 3.0s
  float d[2][32];
  for (int step = 0; step < 2; ++step) {
    wgmma_fence();
    wgmma<__nv_bfloat16, 64, false>(d[step], a[step], matrix_descriptor(smem_address(smem)));
    wgmma<__nv_bfloat16, 64, true>(d[step], a[step], matrix_descriptor(smem_address(smem) + 32));
    wgmma_commit();
  }
  wgmma_wait<1>();
  for (int j = 0; j < 32; ++j) as<float>(p.pointers[1])[i * 64 + j] = d[kBug ? 1 : 0][j];
  wgmma_wait<0>();
  for (int j = 0; j < 32; ++j) as<float>(p.pointers[1])[i * 64 + 32 + j] = d[1][j];
}

// ---- stmatrix, registers -------------------------------------------------------------------------------------------

// Four matrices of eight rows of 16 bytes to shared memory and back: out[lane][4] registers of in[lane][4].
// 1: not aligned; 2: past the end; 3: read before others have stored
template <bool kTrans, int kBug>
__global__ void matrices(const Params p, const ABBA_GRID_CONSTANT TensorMap, const ABBA_GRID_CONSTANT TensorMap) {
  ABBA_DYNAMIC_SMEM(smem);
  const int lane = threadIdx.x, place = lane / 8 * 8 + (lane % 8 ^ 5);
  const uint32_t address = smem_address(smem) + place * 16;
  uint32_t r[4];
  for (int j = 0; j < 4; ++j) r[j] = as<const uint32_t>(p.pointers[0])[lane * 4 + j];
  stmatrix_x4<kTrans>(address + (lane == 3 ? (kBug == 1 ? 8 : kBug == 2 ? 512 : 0) : 0), r);
  if (kBug != 3) __syncwarp();
  as<uint4>(p.pointers[2])[place] = as<const uint4>(smem)[place ^ 1];
  ldmatrix_x4<kTrans>(r, address);
  for (int j = 0; j < 4; ++j) as<uint32_t>(p.pointers[1])[lane * 4 + j] = r[j];
}

// 1: more than there are; 2: three warps of four; 3: more than the launch's 168 for each thread; 4: nothing given first
template <int kBug>
__global__ void registers(const Params, const ABBA_GRID_CONSTANT TensorMap, const ABBA_GRID_CONSTANT TensorMap) {
  if (kBug == 3) threadIdx.x < 128 ? give_registers<64>() : take_registers<224>();
  else if (threadIdx.x >= 128 && (kBug != 2 || threadIdx.x < 352)) take_registers<kBug == 1 ? 240 : 232>();
  else if (threadIdx.x < 128 && kBug != 4) give_registers<40>();
}

using Kernel = void (*)(Params, TensorMap, TensorMap);

// kernel(bug) under "name" for 0, else under "name/bug"
template <int... kBugs>
void add(std::map<std::string, Kernel>& kernels, const std::string& name, auto kernel) {
  (kernels.emplace(kBugs ? name + "/" + std::to_string(kBugs) : name, kernel(std::integral_constant<int, kBugs>{})), ...);
}

#define KERNEL(...) [](auto bug) -> Kernel { return __VA_ARGS__; }
std::map<std::string, Kernel> all_kernels() {
  std::map<std::string, Kernel> k;
  add<0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18>(k, "box", KERNEL(box<bug>));
  add<0, 1, 2, 3, 4, 5, 6, 7>(k, "publish", KERNEL(publish<false, bug>));
  add<0>(k, "publish_late", KERNEL(publish<true, bug>));
  add<0, 1, 2, 3, 4, 5, 6, 7>(k, "pipeline", KERNEL(pipeline<bug>));
  add<0>(k, "registers_bfloat16_64", KERNEL(product<__nv_bfloat16, 64, false, bug>));
  add<0>(k, "registers_bfloat16_128", KERNEL(product<__nv_bfloat16, 128, false, bug>));
  add<0>(k, "registers_float16_64", KERNEL(product<__half, 64, false, bug>));
  add<0>(k, "registers_float16_128", KERNEL(product<__half, 128, false, bug>));
  add<0>(k, "tiles_bfloat16_64", KERNEL(product<__nv_bfloat16, 64, true, bug>));
  add<0>(k, "tiles_bfloat16_128", KERNEL(product<__nv_bfloat16, 128, true, bug>));
  add<0>(k, "tiles_float16_64", KERNEL(product<__half, 64, true, bug>));
  add<0>(k, "tiles_float16_128", KERNEL(product<__half, 128, true, bug>));
  add<1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15>(k, "registers", KERNEL(product<__nv_bfloat16, 64, false, bug>));
  add<1, 3, 6, 8, 11>(k, "tiles", KERNEL(product<__half, 128, true, bug>));
  add<0, 1>(k, "replaced", KERNEL(replaced<bug>));
  add<0, 1, 2, 3>(k, "stmatrix", KERNEL(matrices<false, bug>));
  add<0>(k, "stmatrix_trans", KERNEL(matrices<true, bug>));
  add<0, 1, 2, 3, 4>(k, "set_registers", KERNEL(registers<bug>));
  return k;
}

}  // namespace

// sizes: blocks, threads, bytes of shared memory; then for the matrices at the first two pointers columns, rows, the rows'
// stride and the rows of a box, and the kernel's own. A kernel without these has no matrices.
void run_kernel(const std::string& name, const std::vector<uintptr_t>& pointers, const std::vector<int>& sizes) {
  Params p = {};
  TensorMap maps[2] = {};
  for (size_t i = 0; i < pointers.size(); ++i) p.pointers[i] = reinterpret_cast<void*>(pointers[i]);
  for (size_t i = 3; i < sizes.size(); ++i) p.sizes[i - 3] = sizes[i];
  for (int i = 0; i < 2 && sizes.size() > 3; ++i) {
    const int* of = p.sizes + 4 * i;
    make_tensor_map(maps[i], {p.pointers[i], of[2]}, of[1], of[0], of[3]);
  }
  static const std::map<std::string, Kernel> kernels = all_kernels();
  ABBA_LAUNCH(kernels.at(name), sizes[0], sizes[1], sizes[2], nullptr, p, maps[0], maps[1]);
}

}  // namespace abba
