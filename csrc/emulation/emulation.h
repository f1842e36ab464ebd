// What the kernels' own sources see when g++ compiles them to run on the CPU (ABBA_EMULATE); the toolkit's headers give
// the types and their arithmetic. A CUDA thread is a fiber: those of a block share one OS thread and take turns,
// changing only at barriers and at the collectives of a warp. Blocks run one after another, each to its end: one that
// spins until another one writes hangs. Behind it: fibers and runtime.cpp run threads, instructions, async and wgmma.cpp
// are what they do, clocks and checks.cpp say what is wrong with it.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <source_location>

// For functions between the kernel and the runtime: the check build must not take their accesses for the kernel's.
#define ABBA_UNCHECKED __attribute__((no_sanitize("thread")))

namespace abba::emulation {

// ---- what compat.cuh and ptx.cuh are made of -----------------------------------------------------------------------

using Site = std::source_location;  // of the caller in the kernel

uint3 thread_index();
uint3 block_index();
dim3 block_size();
dim3 grid_size();

void sync_threads(Site site);
void sync_warp(unsigned mask, Site site);
uint32_t shuffle(const char* name, unsigned mask, uint32_t value, unsigned source_lane, Site site);
unsigned lane();

unsigned atomic_add(unsigned* address, unsigned value, Site site);
void thread_fence();

unsigned char* dynamic_shared_memory();
uint32_t shared_address(const void* pointer, Site site);
void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b, bool bfloat16, Site site);
void load_matrices(uint32_t* r, int count, bool transposed, uint32_t address, Site site);
void async_copy(uint32_t destination, uint32_t bytes, const void* source, uint32_t source_bytes, Site site);
void async_commit();
void async_wait(size_t groups_in_flight);

// ---- and ptx_sm90.cuh ----------------------------------------------------------------------------------------------

// What cuTensorMapEncodeTiled makes of a matrix of two-byte elements and boxes of 64 columns with the 128-byte swizzle.
struct TensorMap {
  const void* base;
  uint64_t columns, rows, row_bytes;  // bytes from row to row
  uint32_t box_columns, box_rows;
};
TensorMap tensor_map(const void* base, uint64_t columns, uint64_t rows, uint64_t row_bytes, uint32_t box_rows);

void mbarrier_init(uint32_t barrier, uint32_t count, Site site);
void mbarrier_init_fence(Site site);
void mbarrier_arrive(uint32_t barrier, uint32_t expected_bytes, Site site);
void mbarrier_wait(uint32_t barrier, uint32_t parity, Site site);
void proxy_fence(Site site);
void tensor_load(uint32_t tile, const TensorMap& map, int column, int row, uint32_t barrier, Site site);
void tensor_store(const TensorMap& map, int column, int row, uint32_t tile, Site site);
void bulk_commit();
void bulk_wait_read(size_t groups_in_flight);
void wgmma_fence(Site site);
void wgmma_commit(Site site);
void wgmma_wait(size_t groups_in_flight, Site site);
void wgmma(float* d, int n, const uint32_t* a, uint64_t a_descriptor, uint64_t b_descriptor, bool add, bool bfloat16,
           Site site);
void store_matrices(uint32_t address, const uint32_t* r, int count, bool transposed, Site site);
void named_barrier(int id, unsigned threads, Site site);
void set_registers(unsigned count, Site site);

int set_memory(void* pointer, int byte, size_t bytes);

struct Grid {
  const char* kernel;
  dim3 blocks, threads;
  size_t shared_bytes;
};
// Runs body(context) in every thread of the grid. Throws std::runtime_error with all that was found wrong.
void run_grid(const Grid& grid, void (*body)(void* context), void* context);

template <typename Body>
ABBA_UNCHECKED void call(void* body) {
  (*static_cast<Body*>(body))();
}

template <typename... Parameters, typename... Arguments>
int launch(const char* name, void (*kernel)(Parameters...), dim3 blocks, dim3 threads, size_t shared_bytes,
           const Arguments&... arguments) {
  auto body = [&]() ABBA_UNCHECKED { kernel(arguments...); };
  run_grid({name, blocks, threads, shared_bytes}, call<decltype(body)>, &body);
  return 0;
}

// 32-bit words between the lanes of a warp.
template <typename T>
inline T shuffle_as(const char* name, unsigned mask, T value, unsigned source_lane, Site site) {
  static_assert(sizeof(T) == 4);
  return std::bit_cast<T>(shuffle(name, mask, std::bit_cast<uint32_t>(value), source_lane, site));
}

}  // namespace abba::emulation

// ---- CUDA's own names ----------------------------------------------------------------------------------------------

#undef __launch_bounds__
#define __launch_bounds__(...)
#define threadIdx ::abba::emulation::thread_index()
#define blockIdx ::abba::emulation::block_index()
#define blockDim ::abba::emulation::block_size()
#define gridDim ::abba::emulation::grid_size()

using std::max;
using std::min;

inline void __syncthreads(std::source_location site = std::source_location::current()) {
  abba::emulation::sync_threads(site);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, std::source_location site = std::source_location::current()) {
  abba::emulation::sync_warp(mask, site);
}
template <typename T>
inline T __shfl_sync(unsigned mask, T value, int source, std::source_location site = std::source_location::current()) {
  return abba::emulation::shuffle_as("__shfl_sync", mask, value, source & 31, site);
}
template <typename T>
inline T __shfl_xor_sync(unsigned mask, T value, int bits,
                         std::source_location site = std::source_location::current()) {
  return abba::emulation::shuffle_as("__shfl_xor_sync", mask, value, (abba::emulation::lane() ^ bits) & 31, site);
}
template <typename T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta,
                          std::source_location site = std::source_location::current()) {
  const unsigned lane = abba::emulation::lane();  // past the end a lane keeps its own
  return abba::emulation::shuffle_as("__shfl_down_sync", mask, value, lane + delta < 32 ? lane + delta : lane, site);
}
inline unsigned atomicAdd(unsigned* address, unsigned value,
                          std::source_location site = std::source_location::current()) {
  return abba::emulation::atomic_add(address, value, site);
}
inline void __threadfence() { abba::emulation::thread_fence(); }
template <typename T>
__forceinline__ T __ldg(const T* pointer) {
  return *pointer;
}
template <typename T>
__forceinline__ T __ldcg(const T* pointer) {
  return *pointer;
}
