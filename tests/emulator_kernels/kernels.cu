// Small kernels, each right or with one bug, that the emulator is checked with. kBug = 0 is right.
#include "kernels.h"

#include <map>
#include <stdexcept>

#include "cuda/ptx.cuh"

namespace abba {
namespace {

struct Params {
  void* pointers[4];
  int sizes[4];
};

template <typename T>
ABBA_DEVICE T* as(void* pointer) {
  return static_cast<T*>(pointer);
}

// ---- shared memory -------------------------------------------------------------------------------------------------

// out[i] = in[last - i] through shared memory
template <int kBug>
__global__ void reverse(const Params p) {
  ABBA_DYNAMIC_SMEM(smem);
  const unsigned i = threadIdx.x, last = blockDim.x - 1;
  as<unsigned>(smem)[i] = as<const unsigned>(p.pointers[0])[i];
  if (kBug != 1) __syncthreads();
  as<unsigned>(p.pointers[1])[i] = as<unsigned>(smem)[last - i];
}

// the same within each warp
template <int kBug>
__global__ void reverse_warp(const Params p) {
  ABBA_DYNAMIC_SMEM(smem);
  const unsigned i = threadIdx.x;
  as<unsigned>(smem)[i] = as<const unsigned>(p.pointers[0])[i];
  if (kBug != 1) __syncwarp();
  as<unsigned>(p.pointers[1])[i] = as<unsigned>(smem)[(kBug == 2 ? i ^ 63 : i ^ 31)];  // 2: that of another warp
}

// out[i] = sum over rounds of in[round][last - i], through one buffer
template <int kBug>
__global__ void refill(const Params p) {
  ABBA_DYNAMIC_SMEM(smem);
  const unsigned i = threadIdx.x, count = blockDim.x;
  unsigned sum = 0;
  for (unsigned round = 0; round < 3; ++round) {
    if (round && kBug != 1) __syncthreads();  // all have read the last round's
    as<unsigned>(smem)[i] = as<const unsigned>(p.pointers[0])[round * count + i];
    __syncthreads();
    sum += as<unsigned>(smem)[count - 1 - i];
  }
  as<unsigned>(p.pointers[1])[i] = sum;
}

// 1: a thread stores past the end of shared memory; 2: all but a warp meet at the barrier; 3: they meet at two of them
template <int kBug>
__global__ void barrier(const Params p) {
  ABBA_DYNAMIC_SMEM(smem);
  const unsigned i = threadIdx.x;
  as<unsigned>(smem)[kBug == 1 && i == 5 ? blockDim.x : i] = i;
  if (kBug == 3 && i >= 32) {
    __syncthreads();
  } else if (kBug != 2 || i >= 32) {
    __syncthreads();
  }
  as<unsigned>(p.pointers[0])[i] = i;
}

// ---- cp.async ------------------------------------------------------------------------------------------------------

// out[i] = sum over tiles of in[tile][last - i], tiles of one 16-byte chunk per thread in two buffers
template <int kBug>
__global__ void double_buffer(const Params p) {
  ABBA_DYNAMIC_SMEM(smem);
  const int i = threadIdx.x, count = blockDim.x, tiles = p.sizes[0];
  const uint32_t shared = smem_address(smem);
  const auto load = [&](int tile) {
    if (tile < tiles)
      cp_async_16(shared + (tile % 2 * count + i) * 16, as<const uint4>(p.pointers[0]) + tile * count + i, 16);
    cp_async_commit();
  };
  unsigned sum = 0;
  load(0);
  for (int tile = 0; tile < tiles; ++tile) {
    load(tile + 1);
    if (kBug == 1) cp_async_wait<2>();  // not even this tile's
    else cp_async_wait<1>();
    if (kBug != 2) __syncthreads();
    sum += as<uint4>(smem)[tile % 2 * count + count - 1 - i].x;
    if (kBug != 3) __syncthreads();  // all have read before the next load
  }
  as<unsigned>(p.pointers[1])[i] = sum;
}

// Two 16-byte chunks of zeros but for sizes[0] bytes from pointers[0]. 1: past the end of these; 2: the second chunk is
// not zeroed; 3: from an address that is not aligned; 4: in flight at the end; 5: read while in flight
template <int kBug>
__global__ void chunk(const Params p) {
  ABBA_DYNAMIC_SMEM(smem);
  const int lane = threadIdx.x, bytes = p.sizes[0];
  const uint32_t shared = smem_address(smem);
  const char* in = as<const char>(p.pointers[0]) + (kBug == 3 ? 2 : 0);
  if (lane == 0) cp_async_16(shared, in, kBug == 1 ? 16 : bytes);
  if (lane == 1 && kBug != 2) cp_async_16(shared + 16, in, 0);
  cp_async_commit();
  if (kBug != 4 && kBug != 5) cp_async_wait<0>();
  __syncthreads();
  uint32_t r[2];
  if (kBug != 4) ldmatrix_x2<false>(r, shared + lane % 2 * 16);
  if (kBug == 5) cp_async_wait<0>();
  if (kBug != 4) as<uint32_t>(p.pointers[1])[lane] = r[0];
}

// ---- ldmatrix, mma, shuffles ---------------------------------------------------------------------------------------

// The registers of every lane, of matrices at rows of 16 bytes. 1: past the end; 2: not aligned; 3: a lane misses
template <int kCount, bool kTrans, int kBug>
__global__ void matrices(const Params p) {
  ABBA_DYNAMIC_SMEM(smem);
  const unsigned lane = threadIdx.x;
  as<uint4>(smem)[lane] = as<const uint4>(p.pointers[0])[lane];
  __syncthreads();
  const uint32_t address = smem_address(smem) + lane * 16 + (lane == 3 ? (kBug == 1 ? 512 : kBug == 2 ? 8 : 0) : 0);
  uint32_t r[kCount];
  if (kBug == 3 && lane == 31) return;
  if constexpr (kCount == 4) ldmatrix_x4<kTrans>(r, address);
  else ldmatrix_x2<kTrans>(r, lane < 16 ? address : 0u);
  for (int j = 0; j < kCount; ++j) as<uint32_t>(p.pointers[1])[lane * kCount + j] = r[j];
}

// Reads an 8x64 tile with rows of 128 bytes: without the swizzle all rows of a matrix are in the same banks.
template <bool kSwizzled>
__global__ void wavefronts(const Params) {
  ABBA_DYNAMIC_SMEM(smem);
  const unsigned lane = threadIdx.x, row = lane % 8, chunk = lane / 8;
  for (unsigned i = lane; i < 64; i += 32) as<uint4>(smem)[i] = uint4{};
  __syncthreads();
  uint32_t r[4];
  ldmatrix_x4<false>(r, smem_address(smem) + row * 128 + (kSwizzled ? chunk ^ row : chunk) * 16);
}

// d[lane][4] += a[lane][4] b[lane][2]. 1: a lane misses; 2: half of the warp is at another mma
template <typename T, int kBug>
__global__ void mma(const Params p) {
  const unsigned lane = threadIdx.x;
  uint32_t a[4], b[2];
  float d[4];
  for (int i = 0; i < 4; ++i) a[i] = as<const uint32_t>(p.pointers[0])[lane * 4 + i];
  for (int i = 0; i < 2; ++i) b[i] = as<const uint32_t>(p.pointers[1])[lane * 2 + i];
  for (int i = 0; i < 4; ++i) d[i] = as<float>(p.pointers[2])[lane * 4 + i];
  if (kBug == 2 && lane < 16) {
    mma_m16n8k16<T>(d, a, b);
  } else if (kBug != 1 || lane != 7) {
    mma_m16n8k16<T>(d, a, b);
  }
  for (int i = 0; i < 4; ++i) as<float>(p.pointers[2])[lane * 4 + i] = d[i];
}

// 1: the upper half of the warp misses; 2: says so in its mask
template <int kBug>
__global__ void shuffles(const Params p) {
  const unsigned lane = threadIdx.x, mask = kBug == 2 ? 0xffffu : 0xffffffffu;
  if (kBug && lane >= 16) return;
  float* out = as<float>(p.pointers[0]) + lane * 3;
  const float value = lane * 0.5f;
  out[0] = __shfl_sync(mask, value, lane / 4);
  out[1] = __shfl_xor_sync(mask, value, 5);
  out[2] = __shfl_down_sync(mask, value, 3);
}

// ---- global memory -------------------------------------------------------------------------------------------------

// y[row][column] = bfloat16(x[row][column]) for sizes[0] columns, rows sizes[1] apart; a block is a row.
// 1: a column too many; 2: reads a row's gap; 3: writes x; 4: all rows are one; 5: stores a word between two
template <int kBug>
__global__ void convert(const Params p) {
  const int columns = p.sizes[0], stride = p.sizes[1], column = threadIdx.x;
  const int64_t row = kBug == 4 ? 0 : blockIdx.x;
  float* x = as<float>(p.pointers[0]) + row * stride;
  __nv_bfloat16* y = as<__nv_bfloat16>(p.pointers[1]) + row * stride;
  const float value = x[kBug == 2 && column < columns ? column + 1 : min(column, columns - 1)];
  if (kBug == 1 ? column <= columns : column < columns) y[column] = __float2bfloat16_rn(value);
  if (kBug == 3 && column == 0) x[0] = 1;
  if (kBug == 5 && column == 0) *reinterpret_cast<unsigned*>(y + (row + 1) % 2) = 0;
}

// sum[i] += x[i] on memory that a memset zeroed, or (1) that nothing was written to
template <int kBug>
__global__ void accumulate(const Params p) {
  const unsigned i = threadIdx.x;
  as<float>(p.pointers[1])[i] += as<const float>(p.pointers[0])[i];
}

// out[i] = scratch[last - i] after scratch[i] = i, in global memory
template <int kBug>
__global__ void scratch(const Params p) {
  const unsigned i = threadIdx.x;
  unsigned* scratch = as<unsigned>(p.pointers[0]) + blockIdx.x * blockDim.x;
  scratch[i] = i;
  if (kBug != 1) __syncthreads();
  as<unsigned>(p.pointers[1])[blockIdx.x * blockDim.x + i] = scratch[blockDim.x - 1 - i];
}

// out[i] = sum over blocks of partial[block][i] = block + i, by the block that arrives last.
// 1: no barrier before the ticket; 2: no fence before it; 3: none after it; 4: no barrier after it; 5: takes no ticket
template <int kBug>
__global__ void last_arriver(const Params p) {
  ABBA_DYNAMIC_SMEM(smem);
  const unsigned i = threadIdx.x, count = blockDim.x;
  unsigned* partial = as<unsigned>(p.pointers[0]);
  unsigned* counter = as<unsigned>(p.pointers[1]);
  bool* is_last = as<bool>(smem);
  partial[blockIdx.x * count + i] = blockIdx.x + i;
  if (kBug != 1) __syncthreads();
  if (i == 0) {
    if (kBug != 2) __threadfence();
    const unsigned ticket = kBug == 5 ? blockIdx.x : atomicAdd(counter, 1);
    if (kBug != 3) __threadfence();
    *is_last = ticket == gridDim.x - 1;
  }
  if (kBug != 4) __syncthreads();
  if (!*is_last) return;
  unsigned sum = 0;
  for (unsigned block = 0; block < gridDim.x; ++block) sum += __ldcg(&partial[block * count + count - 1 - i]);
  as<unsigned>(p.pointers[2])[count - 1 - i] = sum;
  if (i == 0) *counter = 0;  // for the next launch
}

// y[index] = x[index] for index = sizes[0] * 2^20, beyond 2^31; 1: the source's index has 32 bits
template <int kBug>
__global__ void far(const Params p) {
  ABBA_DYNAMIC_SMEM(smem);
  const int64_t index = int64_t{p.sizes[0]} << 20;
  const auto* x = as<const __nv_bfloat16>(p.pointers[0]) + (kBug == 1 ? static_cast<int>(index) : index);
  if (threadIdx.x == 0) cp_async_16(smem_address(smem), x, 16);
  cp_async_commit();
  cp_async_wait<0>();
  if (threadIdx.x == 0) as<__nv_bfloat16>(p.pointers[1])[index] = as<__nv_bfloat16>(smem)[0];
}

#define RIGHT(kernel) {#kernel, kernel<0>}
#define WRONG(kernel, bug) {#kernel "/" #bug, kernel<bug>}

const std::map<std::string, void (*)(Params)> kKernels = {
    RIGHT(reverse), WRONG(reverse, 1),
    RIGHT(reverse_warp), WRONG(reverse_warp, 1), WRONG(reverse_warp, 2),
    RIGHT(refill), WRONG(refill, 1),
    RIGHT(barrier), WRONG(barrier, 1), WRONG(barrier, 2), WRONG(barrier, 3),
    RIGHT(double_buffer), WRONG(double_buffer, 1), WRONG(double_buffer, 2), WRONG(double_buffer, 3),
    RIGHT(chunk), WRONG(chunk, 1), WRONG(chunk, 2), WRONG(chunk, 3), WRONG(chunk, 4), WRONG(chunk, 5),
    {"ldmatrix_x4", matrices<4, false, 0>}, {"ldmatrix_x4_trans", matrices<4, true, 0>},
    {"ldmatrix_x2", matrices<2, false, 0>}, {"ldmatrix_x2_trans", matrices<2, true, 0>},
    {"ldmatrix_x4/1", matrices<4, false, 1>}, {"ldmatrix_x4/2", matrices<4, false, 2>},
    {"ldmatrix_x4/3", matrices<4, false, 3>},
    {"wavefronts", wavefronts<true>}, {"wavefronts/1", wavefronts<false>},
    {"mma_bfloat16", mma<__nv_bfloat16, 0>}, {"mma_float16", mma<__half, 0>},
    {"mma_bfloat16/1", mma<__nv_bfloat16, 1>}, {"mma_bfloat16/2", mma<__nv_bfloat16, 2>},
    RIGHT(shuffles), WRONG(shuffles, 1), WRONG(shuffles, 2),
    RIGHT(convert), WRONG(convert, 1), WRONG(convert, 2), WRONG(convert, 3), WRONG(convert, 4),
    WRONG(convert, 5), RIGHT(accumulate), WRONG(accumulate, 1),
    RIGHT(scratch), WRONG(scratch, 1),
    RIGHT(last_arriver), WRONG(last_arriver, 1), WRONG(last_arriver, 2), WRONG(last_arriver, 3), WRONG(last_arriver, 4),
    WRONG(last_arriver, 5),
    RIGHT(far), WRONG(far, 1),
};

}  // namespace

// sizes: blocks, threads, bytes of shared memory, then the kernel's own
void run_kernel(const std::string& name, const std::vector<uintptr_t>& pointers, const std::vector<int>& sizes) {
  Params p = {};
  for (size_t i = 0; i < pointers.size(); ++i) p.pointers[i] = reinterpret_cast<void*>(pointers[i]);
  for (size_t i = 3; i < sizes.size(); ++i) p.sizes[i - 3] = sizes[i];
  if (name == "accumulate") ABBA_MEMSET_ASYNC(p.pointers[1], 0, sizes[1] * sizeof(float), nullptr);
  if (name.starts_with("last_arriver")) ABBA_MEMSET_ASYNC(p.pointers[1], 0, sizeof(unsigned), nullptr);
  ABBA_LAUNCH(kKernels.at(name), sizes[0], sizes[1], sizes[2], nullptr, p);
}

}  // namespace abba
