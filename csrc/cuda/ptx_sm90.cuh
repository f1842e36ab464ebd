// One-instruction wrappers for Hopper (sm_90a): mbarrier, TMA, wgmma, stmatrix, named barriers. See ptx.cuh.
//
// Descriptors and tensor maps are for two-byte elements in tiles of 64 columns, 128 bytes a row, with the 128-byte
// swizzle: chunk c of row r lies at chunk c ^ (r % 8), which is Tile<64> of tile.cuh. Tiles are 1024-byte aligned.
#pragma once
#if !defined(ABBA_EMULATE)
#include <cuda.h>  // CUtensorMap
#endif

#include "ptx.cuh"

namespace abba {

// A matrix in global memory as TMA sees it; a kernel takes it as `const ABBA_GRID_CONSTANT TensorMap`.
#if defined(ABBA_EMULATE)
using TensorMap = emulation::TensorMap;
#define ABBA_GRID_CONSTANT
#else
using TensorMap = CUtensorMap;
#define ABBA_GRID_CONSTANT __grid_constant__
#endif

// --- mbarrier: 8 bytes in shared memory, 8-byte aligned; phases end when `count` threads arrived and all bytes landed ---

ABBA_DEVICE void mbarrier_init(uint32_t barrier, uint32_t count ABBA_SITE) {
#if defined(ABBA_EMULATE)
  emulation::mbarrier_init(barrier, count, site);
#else
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(barrier), "r"(count) : "memory");
#endif
}

// After the inits and before the block's barrier: TMA, which arrives from another proxy, sees them too.
ABBA_DEVICE void mbarrier_init_fence(ABBA_SITE_ONLY) {
#if defined(ABBA_EMULATE)
  emulation::mbarrier_init_fence(site);
#else
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

// What this thread did before precedes what waiters do after.
ABBA_DEVICE void mbarrier_arrive(uint32_t barrier ABBA_SITE) {
#if defined(ABBA_EMULATE)
  emulation::mbarrier_arrive(barrier, 0, site);
#else
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(barrier) : "memory");
#endif
}

// Arrives, and adds to the bytes that this phase waits for.
ABBA_DEVICE void mbarrier_arrive_expect(uint32_t barrier, uint32_t bytes ABBA_SITE) {
#if defined(ABBA_EMULATE)
  emulation::mbarrier_arrive(barrier, bytes, site);
#else
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(barrier), "r"(bytes) : "memory");
#endif
}

// Waits until the phase of this parity (0 for the first, 1 for the second, ...) has ended.
ABBA_DEVICE void mbarrier_wait(uint32_t barrier, uint32_t parity ABBA_SITE) {
#if defined(ABBA_EMULATE)
  emulation::mbarrier_wait(barrier, parity, site);
#else
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "ABBA_WAIT:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra ABBA_DONE;\n"
      "bra ABBA_WAIT;\n"
      "ABBA_DONE:\n"
      "}" :: "r"(barrier), "r"(parity) : "memory");
#endif
}

// --- TMA ---

// Makes this thread's writes to shared memory, and those it has seen, visible to TMA and wgmma (the async proxy).
ABBA_DEVICE void fence_proxy_async(ABBA_SITE_ONLY) {
#if defined(ABBA_EMULATE)
  emulation::proxy_fence(site);
#else
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

ABBA_DEVICE void prefetch_tensor_map(const TensorMap& map) {
#if !defined(ABBA_EMULATE)
  asm volatile("prefetch.tensormap [%0];" :: "l"(&map) : "memory");
#endif
}

// Copies the map's box at (column, row) into a tile; what lies outside of the matrix becomes zero. The barrier counts the
// bytes of the whole box.
ABBA_DEVICE void tma_load(uint32_t tile, const TensorMap& map, int column, int row, uint32_t barrier ABBA_SITE) {
#if defined(ABBA_EMULATE)
  emulation::tensor_load(tile, map, column, row, barrier, site);
#else
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
      :: "r"(tile), "l"(&map), "r"(column), "r"(row), "r"(barrier) : "memory");
#endif
}

// The way back, for what lies inside.
ABBA_DEVICE void tma_store(const TensorMap& map, int column, int row, uint32_t tile ABBA_SITE) {
#if defined(ABBA_EMULATE)
  emulation::tensor_store(map, column, row, tile, site);
#else
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];"
               :: "l"(&map), "r"(column), "r"(row), "r"(tile) : "memory");
#endif
}

// Makes a group of this thread's stores since the last one.
ABBA_DEVICE void tma_commit() {
#if defined(ABBA_EMULATE)
  emulation::bulk_commit();
#else
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#endif
}

// Waits until all but the N latest of this thread's groups have been read from shared memory.
template <int N>
ABBA_DEVICE void tma_wait_read() {
#if defined(ABBA_EMULATE)
  emulation::bulk_wait_read(N);
#else
  asm volatile("cp.async.bulk.wait_group.read %0;" :: "n"(N) : "memory");
#endif
}

// --- wgmma: four warps, a multiple of four the first; asynchronous until wgmma_wait ---

// The matrix descriptor of a tile, or of a part of it. If k is a row's direction (K-major): rows are of 64 k, eight of them
// are a group, groups are 1024 bytes apart; k16 step i begins 32 i bytes further. If k counts rows (MN-major): eight rows
// are a group, groups are 1024 bytes apart; the next 64 columns are another tile, tile_bytes further.
ABBA_DEVICE uint64_t matrix_descriptor(uint32_t address, uint32_t tile_bytes = 16) {
  constexpr uint64_t kGroupBytes = 1024, kSwizzle128 = 1;
  return (address & 0x3ffff) >> 4 | static_cast<uint64_t>(tile_bytes >> 4) << 16 | (kGroupBytes >> 4) << 32 | kSwizzle128 << 62;
}

// Before a wgmma that reads registers which other instructions wrote.
ABBA_DEVICE void wgmma_fence(ABBA_SITE_ONLY) {
#if defined(ABBA_EMULATE)
  emulation::wgmma_fence(site);
#else
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

ABBA_DEVICE void wgmma_commit(ABBA_SITE_ONLY) {
#if defined(ABBA_EMULATE)
  emulation::wgmma_commit(site);
#else
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Waits until at most the N latest groups are in flight: their registers and tiles are still in use.
// After the last wait, settle the accumulators: to the compiler they were ready when wgmma was issued.
template <int N>
ABBA_DEVICE void wgmma_wait(ABBA_SITE_ONLY) {
#if defined(ABBA_EMULATE)
  emulation::wgmma_wait(N, site);
#else
  asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(N) : "memory");
#endif
}

template <int kCount>
ABBA_DEVICE void settle(float (&d)[kCount]) {
#if defined(ABBA_EMULATE)
  (void)d;
#else
  #pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i]) :: "memory");
#endif
}

#define ABBA_D8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define ABBA_D32(i) ABBA_D8(i), ABBA_D8(i + 8), ABBA_D8(i + 16), ABBA_D8(i + 24)
#define ABBA_NAMES32 \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define ABBA_NAMES64 ABBA_NAMES32 \
  ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define ABBA_WGMMA(n, type, names, ...) \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " {" names "}, " __VA_ARGS__ : "memory")
// The instruction for T and N: operands after d as text, counted on from N / 2, then as arguments.
#define ABBA_WGMMA_OF(text32, text64, ...)                                                    \
  if constexpr (N == 64 && std::is_same_v<T, __half>) {                                       \
    ABBA_WGMMA("64", "f16", ABBA_NAMES32, text32 : ABBA_D32(0) : __VA_ARGS__);                \
  } else if constexpr (N == 64) {                                                             \
    ABBA_WGMMA("64", "bf16", ABBA_NAMES32, text32 : ABBA_D32(0) : __VA_ARGS__);               \
  } else if constexpr (std::is_same_v<T, __half>) {                                           \
    ABBA_WGMMA("128", "f16", ABBA_NAMES64, text64 : ABBA_D32(0), ABBA_D32(32) : __VA_ARGS__); \
  } else {                                                                                    \
    ABBA_WGMMA("128", "bf16", ABBA_NAMES64, text64 : ABBA_D32(0), ABBA_D32(32) : __VA_ARGS__); \
  }

// d[64, N] = a[64, 16] b[16, N] in float, plus d if kAdd; T bfloat16 or float16, a from registers, b K-major: a tile [N][k].
// Warp w of the four has rows 16 w to 16 w + 15, as in mma_m16n8k16: a's registers are those, d[4 j + i] is its d[i] of the
// n8 tile j.
template <typename T, int N, bool kAdd>
ABBA_DEVICE void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b ABBA_SITE) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>);
  static_assert(N == 64 || N == 128);
#if defined(ABBA_EMULATE)
  emulation::wgmma(d, N, a, 0, b, kAdd, std::is_same_v<T, __nv_bfloat16>, site);
#else
  ABBA_WGMMA_OF("{%32, %33, %34, %35}, %36, %37, 1, 1, 0;", "{%64, %65, %66, %67}, %68, %69, 1, 1, 0;",
                "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kAdd))
#endif
}

// The same with a, too, from shared memory, both MN-major: tiles [k][64] and [k][N].
template <typename T, int N, bool kAdd>
ABBA_DEVICE void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b ABBA_SITE) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>);
  static_assert(N == 64 || N == 128);
#if defined(ABBA_EMULATE)
  emulation::wgmma(d, N, nullptr, a, b, kAdd, std::is_same_v<T, __nv_bfloat16>, site);
#else
  ABBA_WGMMA_OF("%32, %33, %34, 1, 1, 1, 1;", "%64, %65, %66, 1, 1, 1, 1;", "l"(a), "l"(b), "n"(kAdd))
#endif
}
#undef ABBA_WGMMA_OF
#undef ABBA_WGMMA
#undef ABBA_D8
#undef ABBA_D32
#undef ABBA_NAMES32
#undef ABBA_NAMES64

// --- the rest ---

// The inverse of ldmatrix_x4.
template <bool kTrans>
ABBA_DEVICE void stmatrix_x4(uint32_t address, const uint32_t (&r)[4] ABBA_SITE) {
#if defined(ABBA_EMULATE)
  emulation::store_matrices(address, r, 4, kTrans, site);
#else
  if constexpr (kTrans) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};"
                 :: "r"(address), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
  } else {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};"
                 :: "r"(address), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
  }
#endif
}

// __syncthreads for kThreads of the block's threads, whole warps. Barrier 0 is that of __syncthreads.
template <int kBarrier, int kThreads>
ABBA_DEVICE void sync_some(ABBA_SITE_ONLY) {
  static_assert(kBarrier > 0 && kBarrier < 16 && kThreads % 32 == 0);
#if defined(ABBA_EMULATE)
  emulation::named_barrier(kBarrier, kThreads, site);
#else
  asm volatile("bar.sync %0, %1;" :: "n"(kBarrier), "n"(kThreads) : "memory");
#endif
}

// Registers per thread of this warpgroup from here on; all its warps call it.
template <int kRegisters>
ABBA_DEVICE void give_registers(ABBA_SITE_ONLY) {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
#if defined(ABBA_EMULATE)
  emulation::set_registers(kRegisters, site);
#else
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(kRegisters));
#endif
}
template <int kRegisters>
ABBA_DEVICE void take_registers(ABBA_SITE_ONLY) {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
#if defined(ABBA_EMULATE)
  emulation::set_registers(kRegisters, site);
#else
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(kRegisters));
#endif
}

}  // namespace abba
