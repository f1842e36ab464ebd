// The instructions of ptx.cuh and the collectives of a warp.
#include "products.h"
#include "runtime.h"

namespace abba::emulation {
namespace {

void require_full(unsigned mask, const char* operation, const Site& site) {
  if (mask != kFullMask) fatal(site, operation, ": only the full mask is emulated, got ", mask);
}

}  // namespace

// ---- collectives of a warp -----------------------------------------------------------------------------------------

void sync_warp(unsigned mask, Site site) {
  require_full(mask, "__syncwarp", site);
  collective("__syncwarp", site, nullptr, [](Warp&) { order(t_thread->block->lanes_of(*t_thread)); });
}

uint32_t shuffle(const char* name, unsigned mask, uint32_t value, unsigned source_lane, Site site) {
  struct Operands {
    uint32_t value, result;
    unsigned source;
  } operands{value, 0, source_lane};
  require_full(mask, name, site);
  collective(name, site, &operands, [](Warp& warp) {
    const auto of = [&](unsigned lane) { return static_cast<Operands*>(warp.operands[lane]); };
    for (unsigned lane = 0; lane < kWarpSize; ++lane) of(lane)->result = of(of(lane)->source)->value;
  });
  return operands.result;
}

// ---- matrices -----------------------------------------------------------------------------------------------------

uint32_t shared_address(const void* pointer, Site site) {
  const Block& block = *t_thread->block;
  const ptrdiff_t offset = static_cast<const unsigned char*>(pointer) - block.shared.get();
  if (offset < 0 || static_cast<size_t>(offset) > block.grid->shared_bytes)
    fatal(site, "smem_address: the pointer is not one into shared memory");
  return kSharedBase + static_cast<uint32_t>(offset);
}

namespace {

struct MmaOperands {
  float* d;
  const uint32_t *a, *b;
};

void multiply(const Warp& warp, bool bfloat16) {
  float a[16][16], b[16 * 8], d[16 * 8];
  for (unsigned lane = 0; lane < kWarpSize; ++lane) {
    const auto& operands = *static_cast<const MmaOperands*>(warp.operands[lane]);
    const unsigned g = lane / 4, t = lane % 4;
    read_fragment(a, operands.a, lane, bfloat16);
    for (unsigned half = 0; half < 2; ++half)
      for (unsigned i = 0; i < 2; ++i)
        b[(2 * t + 8 * i + half) * 8 + g] = value_of(operands.b[i] >> 16 * half & 0xffff, bfloat16);
    for (unsigned i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = operands.d[i];
  }
  add_product<8>(d, a, b);
  for (unsigned lane = 0; lane < kWarpSize; ++lane)
    for (unsigned i = 0; i < 4; ++i)
      static_cast<const MmaOperands*>(warp.operands[lane])->d[i] = d[(lane / 4 + i / 2 * 8) * 8 + 2 * (lane % 4) + i % 2];
}

// Eight rows of 16 bytes, moved at once: rows that lie in the same four banks and differ take turns.
int extra_wavefronts(const uint32_t (&addresses)[8]) {
  int rows[8] = {}, most = 0;
  for (int i = 0; i < 8; ++i)
    if (std::find(addresses, addresses + i, addresses[i]) == addresses + i)
      most = std::max(most, ++rows[addresses[i] / 16 % 8]);
  return most - 1;
}

}  // namespace

void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b, bool bfloat16, Site site) {
  MmaOperands operands{d, a, b};
  collective(bfloat16 ? "mma.m16n8k16.bf16" : "mma.m16n8k16.f16", site, &operands, [&](Warp& warp) {
    multiply(warp, bfloat16);
    ++t_thread->block->counters.mma;
  });
}

void load_matrices(uint32_t* r, int count, bool transposed, uint32_t address, Site site) {
  struct Operands {
    uint32_t* r;
    uint32_t address;
  } operands{r, address};
  if (static_cast<int>(lane()) < 8 * count) {  // the other lanes' addresses are not used
    shared_pointer(address, 16, 16, "ldmatrix", site);
    check_shared(address - kSharedBase, 16, Kind::kRead, site, "ldmatrix");
  }
  collective(transposed ? "ldmatrix.trans" : "ldmatrix", site, &operands, [&](Warp& warp) {
    const auto of = [&](unsigned lane) { return static_cast<Operands*>(warp.operands[lane]); };
    Block& block = *t_thread->block;
    for (int matrix = 0; matrix < count; ++matrix) {
      uint32_t addresses[8];
      uint16_t elements[8][8];
      for (unsigned row = 0; row < 8; ++row) {
        addresses[row] = of(8 * matrix + row)->address;
        memcpy(elements[row], block.shared.get() + (addresses[row] - kSharedBase), 16);
      }
      ++block.counters.ldmatrix_phases;
      block.counters.ldmatrix_extra_wavefronts += extra_wavefronts(addresses);
      for (unsigned lane = 0; lane < kWarpSize; ++lane) {
        const unsigned g = lane / 4, t = lane % 4;
        of(lane)->r[matrix] = transposed ? elements[2 * t][g] | uint32_t{elements[2 * t + 1][g]} << 16
                                         : elements[g][2 * t] | uint32_t{elements[g][2 * t + 1]} << 16;
      }
    }
  });
}

void store_matrices(uint32_t address, const uint32_t* r, int count, bool transposed, Site site) {
  struct Operands {
    const uint32_t* r;
    uint32_t address;
  } operands{r, address};
  if (static_cast<int>(lane()) < 8 * count) {
    shared_pointer(address, 16, 16, "stmatrix", site);
    check_shared(address - kSharedBase, 16, Kind::kWrite, site, "stmatrix");
  }
  collective(transposed ? "stmatrix.trans" : "stmatrix", site, &operands, [&](Warp& warp) {
    const auto of = [&](unsigned lane) { return static_cast<Operands*>(warp.operands[lane]); };
    Block& block = *t_thread->block;
    for (int matrix = 0; matrix < count; ++matrix) {
      uint32_t addresses[8];
      for (unsigned row = 0; row < 8; ++row) {
        addresses[row] = of(8 * matrix + row)->address;
        uint16_t elements[8];
        for (unsigned i = 0; i < 8; ++i) {  // the matrix's element [row][i], or [i][row]
          const unsigned g = transposed ? i : row, column = transposed ? row : i;
          elements[i] = static_cast<uint16_t>(of(4 * g + column / 2)->r[matrix] >> 16 * (column % 2));
        }
        memcpy(block.shared.get() + (addresses[row] - kSharedBase), elements, 16);
      }
      ++block.counters.stmatrix_phases;
      block.counters.stmatrix_extra_wavefronts += extra_wavefronts(addresses);
    }
  });
}

// ---- cp.async ------------------------------------------------------------------------------------------------------

namespace {

void copy_now(const AsyncCopy& copy) {
  unsigned char* destination = t_thread->block->shared.get() + (copy.destination - kSharedBase);
  memcpy(destination, copy.source, copy.source_bytes);
  memset(destination + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
}

void mark(const AsyncCopy& copy, bool in_flight) {
  if constexpr (!kChecked) return;
  Cell* cells = &t_thread->block->shadow[(copy.destination - kSharedBase) / 2];
  for (Cell* cell = cells; cell != cells + copy.bytes / 2; ++cell)
    cell->in_flight = in_flight ? InFlight::kAsyncCopy : InFlight::kNothing;
}

}  // namespace

void async_copy(uint32_t destination, uint32_t bytes, const void* source, uint32_t source_bytes, Site site) {
  unsigned char* target = shared_pointer(destination, bytes, bytes, "cp.async", site);
  if (source_bytes > bytes) fatal(site, "cp.async: a source of ", source_bytes, " bytes");
  if (reinterpret_cast<uintptr_t>(source) % bytes)
    fatal(site, "cp.async: the source ", source, " is not ", bytes, "-byte aligned");
  if (source_bytes && buffers_matter() && !check_global(source, source_bytes, Kind::kRead, site, "cp.async"))
    fatal(site, "bounds: cp.async of ", source_bytes, " bytes from ", source, ", not in a registered buffer");
  check_shared(destination - kSharedBase, bytes, Kind::kWrite, site, "cp.async");
  const AsyncCopy copy{destination, bytes, source_bytes, source, site};
  if (config().copy == Copy::kEarly) copy_now(copy);
  else memset(target, 0xff, bytes);
  mark(copy, true);
  t_thread->copies.open.push_back(copy);
  ++t_thread->block->counters.cp_async;
  t_thread->block->counters.cp_async_bytes += source_bytes;
}

void async_commit() { t_thread->copies.commit(); }

void async_wait(size_t groups_in_flight) {
  t_thread->copies.wait(groups_in_flight, [](const AsyncCopy& copy) {
    if (config().copy == Copy::kLate) copy_now(copy);
    mark(copy, false);
    // The copy is this thread's write at the time of its wait.
    check_shared(copy.destination - kSharedBase, copy.bytes, Kind::kWrite, copy.site, "cp.async");
  });
}

}  // namespace abba::emulation
