// Every wrapper of ptx.cuh, and what khatri_rao.cuh does in registers, each alone in a kernel that only brings its operands
// and takes away its results. nvcc compiles this for a GPU, g++ for the emulator; tests/test_conformance.py says what both
// must compute. a and b are read, out is written; words are 32 bits.
#include "wrappers.h"

#include <map>
#include <string>

#include "cuda/khatri_rao.cuh"

namespace abba {
namespace {

constexpr int kSharedBytes = 4096;

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

ABBA_DEVICE int thread() { return static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); }

// --- shared memory ---

// out[i] = address of byte a[i], from the start; out[last] = the start's distance to a multiple of 1024
__global__ void smem_addresses(const Params p) {
  ABBA_DYNAMIC_SMEM(smem);
  const int i = threadIdx.x, last = blockDim.x;
  write(p.out, i, smem_address(smem + read<int>(p.a, i)) - smem_address(smem));
  if (i == 0) write(p.out, last, smem_address(smem) % 1024);
}

// out[lane] = the registers of a lane, whose address is that of row b[lane] of a [64 rows of 16 bytes]
template <int kCount, bool kTrans>
__global__ void ldmatrix(const Params p) {
  ABBA_DYNAMIC_SMEM(smem);
  const int lane = threadIdx.x;
  for (int row = lane; row < 64; row += 32) reinterpret_cast<uint4*>(smem)[row] = read<uint4>(p.a, row);
  __syncthreads();
  const uint32_t address = smem_address(smem) + 16 * read<int>(p.b, lane);
  uint32_t r[kCount];
  if constexpr (kCount == 4) {
    ldmatrix_x4<kTrans>(r, address);
  } else {
    ldmatrix_x2<kTrans>(r, address);
  }
  for (int j = 0; j < kCount; ++j) write(p.out, lane * kCount + j, r[j]);
}

// out[i] = a Word of shared memory that was ones before b[i] bytes of a[i] came by cp.async; another thread's, so that
// they pass the wait and a barrier
template <typename Word>
__global__ void cp_async(const Params p) {
  ABBA_DYNAMIC_SMEM(smem);
  constexpr int kBytes = sizeof(Word);
  const int i = threadIdx.x, other = blockDim.x - 1 - i;
  for (int at = 0; at < kBytes; at += 4) *reinterpret_cast<uint32_t*>(smem + kBytes * i + at) = ~0u;
  __syncthreads();
  const uint32_t target = smem_address(smem) + kBytes * i;
  const Word* source = static_cast<const Word*>(p.a) + i;
  if constexpr (kBytes == 16) {
    cp_async_16(target, source, read<int>(p.b, i));
  } else {
    cp_async_4(target, source, read<int>(p.b, i));
  }
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  write(p.out, other, reinterpret_cast<const Word*>(smem)[other]);
}

// out[group][i] = a[group][i]; each of three groups is read as soon as the wait for it says so, an empty one behind them
__global__ void cp_async_groups(const Params p) {
  ABBA_DYNAMIC_SMEM(smem);
  const int i = threadIdx.x, count = blockDim.x;
  const uint32_t shared = smem_address(smem);
  for (int group = 0; group < 3; ++group) {
    const int at = group * count + i;
    cp_async_16(shared + 16 * at, static_cast<const uint4*>(p.a) + at, 16);
    cp_async_commit();
  }
  cp_async_commit();
  cp_async_wait<3>();
  write(p.out, i, reinterpret_cast<const uint4*>(smem)[i]);
  cp_async_wait<2>();
  write(p.out, count + i, reinterpret_cast<const uint4*>(smem)[count + i]);
  cp_async_wait<0>();
  write(p.out, 2 * count + i, reinterpret_cast<const uint4*>(smem)[2 * count + i]);
}

// --- the collectives of a warp ---

// out[lane] = the four floats b[lane], plus the product of the fragments a[lane] [4 words of A, 2 of B]
template <typename T>
__global__ void mma(const Params p) {
  const int lane = threadIdx.x;
  uint32_t a[4], b[2];
  float d[4];
  for (int i = 0; i < 4; ++i) a[i] = read<uint32_t>(p.a, lane * 6 + i);
  for (int i = 0; i < 2; ++i) b[i] = read<uint32_t>(p.a, lane * 6 + 4 + i);
  for (int i = 0; i < 4; ++i) d[i] = read<float>(p.b, lane * 4 + i);
  mma_m16n8k16<T>(d, a, b);
  for (int i = 0; i < 4; ++i) write(p.out, lane * 4 + i, d[i]);
}

// out[lane] = a's word from lane b[lane], from lane ^ 5, from lane + 3
__global__ void shuffles(const Params p) {
  const int lane = threadIdx.x;
  const uint32_t value = read<uint32_t>(p.a, lane);
  const uint32_t words[3] = {__shfl_sync(0xffffffffu, value, read<int>(p.b, lane)), __shfl_xor_sync(0xffffffffu, value, 5),
                             __shfl_down_sync(0xffffffffu, value, 3)};
  for (int i = 0; i < 3; ++i) write(p.out, lane * 3 + i, words[i]);
}

// out[lane] = the scales and what undoes them, for the maxima a [2][32]
__global__ void scales(const Params p) {
  const Scales scales = scales_of<__half>(p.a);
  write(p.out, threadIdx.x * 3, scales.f1);
  write(p.out, threadIdx.x * 3 + 1, scales.f2);
  write(p.out, threadIdx.x * 3 + 2, scales.undo);
}

// --- two elements in a word ---

// out[i] = a[i] b[i]
template <typename T>
__global__ void multiply(const Params p) {
  const int i = thread();
  write(p.out, i, multiply2<T>(read<uint32_t>(p.a, i), read<uint32_t>(p.b, i)));
}

// out[i] = a[i]'s low half twice, its high half twice, its halves exchanged
template <typename T>
__global__ void halves(const Params p) {
  const int i = thread();
  const uint32_t word = read<uint32_t>(p.a, i);
  write(p.out, 3 * i, broadcast_half(word, 0));
  write(p.out, 3 * i + 1, broadcast_half(word, 1));
  write(p.out, 3 * i + 2, pack(half_of<T>(word, 1), half_of<T>(word, 0)));
}

// out[i] = the float of a[i]'s low half, and in a word's low half that float rounded again
template <typename T>
__global__ void widen(const Params p) {
  const int i = thread();
  const float value = to_float(half_of<T>(read<uint32_t>(p.a, i), 0));
  write(p.out, 2 * i, value);
  write(p.out, 2 * i + 1, pack(from_float<T>(value), T(0.f)));
}

// out[i] = the float a[i], rounded, in a word's low half
template <typename T>
__global__ void narrow(const Params p) {
  const int i = thread();
  write(p.out, i, pack(from_float<T>(read<float>(p.a, i)), T(0.f)));
}

// out[i] = 2^a[i]
__global__ void powers_of_two(const Params p) {
  const int i = thread();
  write(p.out, i, power_of_two(read<int>(p.a, i)));
}

const std::map<std::string, void (*)(Params)> kKernels = {
    {"smem_address", smem_addresses},
    {"ldmatrix_x4", ldmatrix<4, false>},
    {"ldmatrix_x4_trans", ldmatrix<4, true>},
    {"ldmatrix_x2", ldmatrix<2, false>},
    {"ldmatrix_x2_trans", ldmatrix<2, true>},
    {"cp_async_16", cp_async<uint4>},
    {"cp_async_4", cp_async<uint32_t>},
    {"cp_async_groups", cp_async_groups},
    {"mma_bfloat16", mma<__nv_bfloat16>},
    {"mma_float16", mma<__half>},
    {"shuffles", shuffles},
    {"scales", scales},
    {"multiply_bfloat16", multiply<__nv_bfloat16>},
    {"multiply_float16", multiply<__half>},
    {"halves_bfloat16", halves<__nv_bfloat16>},
    {"halves_float16", halves<__half>},
    {"widen_bfloat16", widen<__nv_bfloat16>},
    {"widen_float16", widen<__half>},
    {"narrow_bfloat16", narrow<__nv_bfloat16>},
    {"narrow_float16", narrow<__half>},
    {"powers_of_two", powers_of_two},
};

}  // namespace
}  // namespace abba

extern "C" int run_wrapper(const char* name, const void* a, const void* b, void* out, int blocks, int threads) {
  const auto kernel = abba::kKernels.find(name);
  if (kernel == abba::kKernels.end()) return -1;
  const int error =
      ABBA_LAUNCH(kernel->second, blocks, threads, abba::kSharedBytes, nullptr, abba::Params{a, b, out});
#if !defined(ABBA_EMULATE)
  if (!error) return cudaDeviceSynchronize();
#endif
  return error;
}
