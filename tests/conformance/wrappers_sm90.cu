// Every wrapper of ptx_sm90.cuh, as wrappers.cu has those of ptx.cuh; tests/test_conformance_sm90.py says what they must
// compute. Tiles are given as the bytes of shared memory, so that the swizzle shows.
#include "wrappers.h"

#include <map>
#include <string>

#include "cuda/pipeline_sm90.cuh"

namespace abba {
namespace {

constexpr int kTileBytes = 64 * 128, kSharedBytes = 3 * kTileBytes + 16;
constexpr int kColumns = 150, kRows = 100, kStride = 160, kBoxRows = 48;  // of the matrix that TMA copies from or to

struct Params {
  const void* a;
  const void* b;
  void* out;
};

template <typename T>
ABBA_DEVICE T read(const void* pointer, int index) {
  return static_cast<const T*>(pointer)[index];
}

template <typename T>
ABBA_DEVICE void write(void* pointer, int index, T value) {
  static_cast<T*>(pointer)[index] = value;
}

// 16-byte chunks to shared memory, for the async proxy too.
ABBA_DEVICE void fill(unsigned char* smem, const void* from, int bytes) {
  for (int i = threadIdx.x; i < bytes / 16; i += blockDim.x) reinterpret_cast<uint4*>(smem)[i] = read<uint4>(from, i);
  fence_proxy_async();
  __syncthreads();
}

#if ABBA_SM90A
#define BODY(...) __VA_ARGS__
#else
#define BODY(...)
#endif

// out[phase][i] = a[phase][its neighbour], through a word of shared memory that each phase of a barrier guards; the last
// phase's parity is asked for twice
__global__ void mbarrier(const Params p, const ABBA_GRID_CONSTANT TensorMap) {
  BODY(ABBA_DYNAMIC_SMEM(smem);
  const int i = threadIdx.x, count = blockDim.x;
  const uint32_t barrier = smem_address(smem);
  int* words = reinterpret_cast<int*>(smem + 16);
  if (i == 0) mbarrier_init(barrier, count);
  __syncthreads();
  for (int phase = 0; phase < 5; ++phase) {
    words[phase * count + i] = read<int>(p.a, phase * count + i);
    mbarrier_arrive(barrier);
    mbarrier_wait(barrier, phase % 2);
    write(p.out, phase * count + i, words[phase * count + (i + 1) % count]);
  }
  mbarrier_wait(barrier, 0);)
}

// out = the bytes of a tile that a box at column b[0], row b[1] of a was copied to
__global__ void load_box(const Params p, const ABBA_GRID_CONSTANT TensorMap map) {
  BODY(ABBA_DYNAMIC_SMEM(smem);
  const uint32_t tile = smem_address(smem);
  const uint32_t barrier = tile + kTileBytes;
  if (threadIdx.x == 0) {
    prefetch_tensor_map(map);
    mbarrier_init(barrier, 1);
    mbarrier_init_fence();
    mbarrier_arrive_expect(barrier, kBoxRows * 128);
    tma_load(tile, map, read<int>(p.b, 0), read<int>(p.b, 1), barrier);
  }
  __syncthreads();
  mbarrier_wait(barrier, 0);
  for (int i = threadIdx.x; i < kBoxRows * 8; i += blockDim.x) write(p.out, i, reinterpret_cast<const uint4*>(smem)[i]);)
}

// The way back: the bytes a of a tile to a box of out
__global__ void store_box(const Params p, const ABBA_GRID_CONSTANT TensorMap map) {
  BODY(ABBA_DYNAMIC_SMEM(smem);
  fill(smem, p.a, kBoxRows * 128);
  if (threadIdx.x == 0) {
    tma_store(map, read<int>(p.b, 0), read<int>(p.b, 1), smem_address(smem));
    tma_commit();
    tma_wait_read<0>();
  })
}

// out[thread] = the registers of d = a b for 64 k, in two groups; a: words [4 steps][thread][4], b: the bytes of a tile [N][k].
template <typename T, int N>
__global__ void wgmma_registers(const Params p, const ABBA_GRID_CONSTANT TensorMap) {
  BODY(ABBA_DYNAMIC_SMEM(smem);
  const int i = threadIdx.x;
  fill(smem, p.b, N * 128);
  uint32_t a[4][4];
  for (int step = 0; step < 4; ++step)
    for (int j = 0; j < 4; ++j) a[step][j] = read<uint32_t>(p.a, (step * 128 + i) * 4 + j);
  float d[N / 2];
  const uint32_t s_b = smem_address(smem);
  wgmma_fence();
  wgmma<T, N, false>(d, a[0], matrix_descriptor(s_b));
  wgmma<T, N, true>(d, a[1], matrix_descriptor(s_b + 32));
  wgmma_commit();
  wgmma_fence();
  wgmma<T, N, true>(d, a[2], matrix_descriptor(s_b + 64));
  wgmma<T, N, true>(d, a[3], matrix_descriptor(s_b + 96));
  wgmma_commit();
  wgmma_wait<0>();
  settle(d);
  for (int j = 0; j < N / 2; ++j) write(p.out, i * N / 2 + j, d[j]);)
}

// The same of a: the bytes of a tile [k][64], b: of N / 64 tiles [k][64].
template <typename T, int N>
__global__ void wgmma_tiles(const Params p, const ABBA_GRID_CONSTANT TensorMap) {
  BODY(ABBA_DYNAMIC_SMEM(smem);
  const int i = threadIdx.x;
  fill(smem, p.a, kTileBytes);
  fill(smem + kTileBytes, p.b, N / 64 * kTileBytes);
  float d[N / 2];
  for (int j = 0; j < N / 2; ++j) d[j] = 0.f;
  const uint32_t s_a = smem_address(smem), s_b = s_a + kTileBytes;
  wgmma_fence();
  for (int step = 0; step < 4; ++step)
    wgmma<T, N, true>(d, matrix_descriptor(s_a + 2048 * step, kTileBytes), matrix_descriptor(s_b + 2048 * step, kTileBytes));
  wgmma_commit();
  wgmma_wait<0>();
  settle(d);
  for (int j = 0; j < N / 2; ++j) write(p.out, i * N / 2 + j, d[j]);)
}

// out [64 rows of 16 bytes]: rows b[lane] hold the matrices whose registers are a[lane][4]
template <bool kTrans>
__global__ void stmatrix(const Params p, const ABBA_GRID_CONSTANT TensorMap) {
  BODY(ABBA_DYNAMIC_SMEM(smem);
  const int lane = threadIdx.x;
  uint32_t r[4];
  for (int j = 0; j < 4; ++j) r[j] = read<uint32_t>(p.a, lane * 4 + j);
  const uint4 ones = {~0u, ~0u, ~0u, ~0u};
  for (int row = lane; row < 64; row += 32) reinterpret_cast<uint4*>(smem)[row] = ones;
  __syncwarp();
  stmatrix_x4<kTrans>(smem_address(smem) + 16 * read<int>(p.b, lane), r);
  __syncwarp();
  for (int row = lane; row < 64; row += 32) write(p.out, row, reinterpret_cast<const uint4*>(smem)[row]);)
}

// out[i] = a's word of another thread of the same half, the halves at different barriers
__global__ void halves(const Params p, const ABBA_GRID_CONSTANT TensorMap) {
  BODY(ABBA_DYNAMIC_SMEM(smem);
  const int i = threadIdx.x;
  reinterpret_cast<int*>(smem)[i] = read<int>(p.a, i);
  i < 64 ? sync_some<1, 64>() : sync_some<2, 64>();
  write(p.out, i, reinterpret_cast<const int*>(smem)[i ^ 63]);)
}

// out[i] = a[i], by a producing and two consuming warpgroups
__global__ void __launch_bounds__(384, 1) registers(const Params p, const ABBA_GRID_CONSTANT TensorMap) {
  BODY(if (threadIdx.x < 128) {
    give_registers<40>();
  } else {
    take_registers<232>();
  }
  write(p.out, threadIdx.x, read<int>(p.a, threadIdx.x));)
}

const std::map<std::string, void (*)(Params, TensorMap)> kKernels = {
    {"mbarrier", mbarrier},
    {"load_box", load_box},
    {"store_box", store_box},
    {"wgmma_registers_bfloat16_64", wgmma_registers<__nv_bfloat16, 64>},
    {"wgmma_registers_bfloat16_128", wgmma_registers<__nv_bfloat16, 128>},
    {"wgmma_registers_float16_64", wgmma_registers<__half, 64>},
    {"wgmma_registers_float16_128", wgmma_registers<__half, 128>},
    {"wgmma_tiles_bfloat16_64", wgmma_tiles<__nv_bfloat16, 64>},
    {"wgmma_tiles_bfloat16_128", wgmma_tiles<__nv_bfloat16, 128>},
    {"wgmma_tiles_float16_64", wgmma_tiles<__half, 64>},
    {"wgmma_tiles_float16_128", wgmma_tiles<__half, 128>},
    {"stmatrix", stmatrix<false>},
    {"stmatrix_trans", stmatrix<true>},
    {"halves", halves},
    {"registers", registers},
};

}  // namespace
}  // namespace abba

extern "C" int run_wrapper(const char* name, const void* a, const void* b, void* out, int blocks, int threads) {
  using namespace abba;
  const auto kernel = kKernels.find(name);
  if (kernel == kKernels.end()) return -1;
  TensorMap map = {};
  const bool loads = kernel->first == "load_box", stores = kernel->first == "store_box";
  int error = 0;
  if (loads || stores) error = make_tensor_map(map, {loads ? const_cast<void*>(a) : out, kStride}, kRows, kColumns, kBoxRows);
  if (!error) error = ABBA_LAUNCH(kernel->second, blocks, threads, kSharedBytes, nullptr, Params{a, b, out}, map);
#if !defined(ABBA_EMULATE)
  if (!error) return cudaDeviceSynchronize();
#endif
  return error;
}
