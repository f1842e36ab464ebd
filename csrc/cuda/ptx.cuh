// One-instruction wrappers, the only place with inline PTX. Under ABBA_EMULATE each is the same move or product on the
// CPU. A lane is g = lane / 4 (a row of fragments), t = lane % 4 (a pair of columns).
#pragma once
#include <type_traits>

#include "compat.cuh"

#if defined(ABBA_EMULATE)
// The caller, for messages: as a further parameter, or as the only one.
#define ABBA_SITE , std::source_location site = std::source_location::current()
#define ABBA_SITE_ONLY std::source_location site = std::source_location::current()
#else
#define ABBA_SITE
#define ABBA_SITE_ONLY
#endif

namespace abba {

// The 32-bit address in the shared window that ldmatrix and cp.async take.
ABBA_DEVICE uint32_t smem_address(const void* pointer ABBA_SITE) {
#if defined(ABBA_EMULATE)
  return emulation::shared_address(pointer, site);
#else
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
#endif
}

// d[16, 8] += a[16, 16] b[16, 8] in float; a row-major, b column-major, two elements of T per register, low half first:
//   a[0] = a[g][2t, 2t+1]   a[1] = a[g+8][2t, 2t+1]   a[2] = a[g][2t+8, 2t+9]   a[3] = a[g+8][2t+8, 2t+9]
//   b[0] = b[2t, 2t+1][g]   b[1] = b[2t+8, 2t+9][g]   d[0, 1] = d[g][2t, 2t+1]  d[2, 3] = d[g+8][2t, 2t+1]
template <typename T>
ABBA_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] ABBA_SITE) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>);
#if defined(ABBA_EMULATE)
  emulation::mma_m16n8k16(d, a, b, std::is_same_v<T, __nv_bfloat16>, site);
#else
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#endif
}

// Four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8, a multiple of 16.
// r[j] = matrix j [g][2t, 2t+1], with kTrans [2t, 2t+1][g]: the a and b fragments of mma.
template <bool kTrans>
ABBA_DEVICE void ldmatrix_x4(uint32_t (&r)[4], uint32_t address ABBA_SITE) {
#if defined(ABBA_EMULATE)
  emulation::load_matrices(r, 4, kTrans, address, site);
#else
  if constexpr (kTrans) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
  }
#endif
}

// Two such matrices; the addresses are those of lanes 0 to 15.
template <bool kTrans>
ABBA_DEVICE void ldmatrix_x2(uint32_t (&r)[2], uint32_t address ABBA_SITE) {
#if defined(ABBA_EMULATE)
  emulation::load_matrices(r, 2, kTrans, address, site);
#else
  if constexpr (kTrans) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1]) : "r"(address) : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1]) : "r"(address) : "memory");
  }
#endif
}

// Copies 16 bytes from global to shared memory, both 16-byte aligned, without a register and past the L1 cache (.cg).
// Bytes from source_bytes on become zero; with 0 nothing is read. Others see it after cp_async_wait and a barrier.
ABBA_DEVICE void cp_async_16(uint32_t destination, const void* source, uint32_t source_bytes ABBA_SITE) {
#if defined(ABBA_EMULATE)
  emulation::async_copy(destination, 16, source, source_bytes, site);
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :: "r"(destination), "l"(source), "r"(source_bytes) : "memory");
#endif
}

// The same with 4 bytes, both 4-byte aligned, through the L1 cache (.ca): .cg copies 16 alone.
ABBA_DEVICE void cp_async_4(uint32_t destination, const void* source, uint32_t source_bytes ABBA_SITE) {
#if defined(ABBA_EMULATE)
  emulation::async_copy(destination, 4, source, source_bytes, site);
#else
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;"
               :: "r"(destination), "l"(source), "r"(source_bytes) : "memory");
#endif
}

// Makes a group of this thread's copies since the last one; an empty group counts too.
ABBA_DEVICE void cp_async_commit() {
#if defined(ABBA_EMULATE)
  emulation::async_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most the N latest of this thread's groups are in flight.
template <int N>
ABBA_DEVICE void cp_async_wait() {
#if defined(ABBA_EMULATE)
  emulation::async_wait(N);
#else
  asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory");
#endif
}

}  // namespace abba
