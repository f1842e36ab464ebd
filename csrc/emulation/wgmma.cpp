// wgmma. Each of a warpgroup's warps computes its 16 rows by itself: the four need not meet, and do not here, as a meeting
// would order what nothing orders.
//
// In the late schedules (Copy::kLate) operands are read at the wait, and the accumulators are NaN until then.
#include <limits>

#include "products.h"
#include "runtime.h"

namespace abba::emulation {
namespace {

constexpr int kK = 16, kChunk = 8;  // elements

// A matrix descriptor's fields, see "Matrix descriptor format" in PTX's documentation.
struct Descriptor {
  uint32_t address, leading, stride;
  bool mn_major;

  Descriptor(uint64_t bits, bool mn_major, const Site& site)
      : address((bits & 0x3fff) << 4),
        leading((bits >> 16 & 0x3fff) << 4),
        stride((bits >> 32 & 0x3fff) << 4),
        mn_major(mn_major) {
    constexpr uint32_t kAtomBytes = 1024, kRowBytes = 128;
    if (bits >> 62 != 1) fatal(site, "wgmma: a descriptor with swizzle mode ", bits >> 62, "; only 1, 128 bytes, is emulated");
    if (bits >> 49 & 7) fatal(site, "wgmma: a descriptor with a base offset; only 0 is emulated");
    if (stride != kAtomBytes) fatal(site, "wgmma: a stride of ", stride, " bytes; only 1024 is emulated");
    if (address % kAtomBytes >= (mn_major ? 1 : kRowBytes))
      fatal(site, "wgmma: the tile of shared memory+", int64_t{address} - kSharedBase, " is not 1024-byte aligned");
  }

  // body(address, mn, k): the chunks of eight elements, in k if that is the major direction, for mn in [first, last)
  template <typename Body>
  void for_chunks(int first, int last, Body body) const {
    if (mn_major) {
      for (int mn = first; mn < last; mn += kChunk)
        for (int k = 0; k < kK; ++k)
          body(swizzled(address + mn / 64 * leading + k / 8 * stride + k % 8 * 128 + mn % 64 * 2), mn, k);
    } else {
      for (int mn = first; mn < last; ++mn)
        for (int k = 0; k < kK; k += kChunk) body(swizzled(address + mn / 8 * stride + mn % 8 * 128 + k * 2), mn, k);
    }
  }
};

template <typename Body>
void for_elements(const Descriptor& descriptor, int first, int last, bool bfloat16, Body body) {  // body(mn, k, value)
  const unsigned char* shared = t_thread->block->shared.get() - kSharedBase;
  descriptor.for_chunks(first, last, [&](uint32_t address, int mn, int k) {
    uint16_t chunk[kChunk];
    memcpy(chunk, shared + address, sizeof chunk);
    for (int i = 0; i < kChunk; ++i)
      body(mn + (descriptor.mn_major ? i : 0), k + (descriptor.mn_major ? 0 : i), value_of(chunk[i], bfloat16));
  });
}

int first_row(const Thread& thread) { return static_cast<int>(thread.index / kWarpSize % 4) * 16; }

// ---- checks --------------------------------------------------------------------------------------------------------

// The warps of a warpgroup must execute the same instructions, each when it comes to them.
void step(Warp& warp, const char* operation, const Site& site) {
  Block& block = *t_thread->block;
  auto& steps = block.warpgroups[t_thread->index / kWarpSize / 4].wgmma_steps;
  if (warp.wgmma_steps == steps.size()) steps.emplace_back(operation, site);
  const auto& [other, other_site] = steps[warp.wgmma_steps++];
  if (strcmp(other, operation) || other_site.line() != site.line())
    fatal(site, "divergent warpgroup: a warp is in ", operation, ", where another one was in ", other, " at ",
          Place(other_site).name());
}

void check_operand(const Descriptor& descriptor, int first, int last, const Site& site, const Accessor& who) {
  descriptor.for_chunks(first, last, [&](uint32_t address, int, int) {
    shared_pointer(address, 16, 16, "wgmma", site);
    check_shared(address - kSharedBase, 16, Kind::kRead, site, "wgmma", who);
  });
}

void check_operands(Warp& warp, const Wgmma& one) {
  Block& block = *t_thread->block;
  if (kChecked && !warp.wgmma_agent)
    warp.wgmma_agent = new_agent(block, text("wgmma of warp ", t_thread->index / kWarpSize));
  std::vector<Thread*> lanes(block.lanes_of(*t_thread).begin(), block.lanes_of(*t_thread).end());
  while (!lanes.empty()) {  // once for all lanes that know the same, which are mostly all
    const auto same = [&](const Thread* thread) {
      return thread->knows.generic == lanes[0]->knows.generic && thread->knows.async == lanes[0]->knows.async;
    };
    const auto end = std::stable_partition(lanes.begin() + 1, lanes.end(), same);
    const Accessor who = async_agent(warp.wgmma_agent, warp.wgmma.time(), std::span(lanes.begin(), end));
    check_operand({one.b_descriptor, !one.from_registers, one.site}, 0, one.n, one.site, who);
    const int row = first_row(*t_thread);
    if (!one.from_registers) check_operand({one.a_descriptor, true, one.site}, row, row + 16, one.site, who);
    lanes.erase(lanes.begin(), end);
  }
}

// ---- products ------------------------------------------------------------------------------------------------------

// The place in d[16][n] of a lane's register i.
int place_of(unsigned lane, int i, int n) {
  return static_cast<int>(lane / 4 + i / 2 % 2 * 8) * n + i / 4 * 8 + static_cast<int>(lane % 4) * 2 + i % 2;
}

Accumulators& accumulators_of(Warp& warp, const Wgmma& one) {
  return *std::ranges::find(warp.accumulators, one.d[0], &Accumulators::first);
}

void begin(Warp& warp, const Wgmma& one) {
  if (std::ranges::find(warp.accumulators, one.d[0], &Accumulators::first) == warp.accumulators.end()) {
    Accumulators& taken = warp.accumulators.emplace_back(one.d[0], 0, std::vector<float>(16 * one.n));
    for (unsigned lane = 0; lane < kWarpSize; ++lane)
      for (int i = 0; i < one.n / 2; ++i) {
        taken.values[place_of(lane, i, one.n)] = one.d[lane][i];
        one.d[lane][i] = std::numeric_limits<float>::quiet_NaN();
      }
  }
  ++accumulators_of(warp, one).operations;
}

void finish(Warp& warp, const Wgmma& one) {
  float a[16][kK], b[kK * 128];
  for_elements({one.b_descriptor, !one.from_registers, one.site}, 0, one.n, one.bfloat16,
               [&](int n, int k, float value) { b[k * one.n + n] = value; });
  if (one.from_registers) {
    for (unsigned lane = 0; lane < kWarpSize; ++lane) read_fragment(a, one.a[lane], lane, one.bfloat16);
  } else {
    const int row = first_row(*t_thread);
    for_elements({one.a_descriptor, true, one.site}, row, row + 16, one.bfloat16,
                 [&](int m, int k, float value) { a[m - row][k] = value; });
  }
  Accumulators& d = accumulators_of(warp, one);
  if (!one.add) std::ranges::fill(d.values, 0.f);
  one.n == 64 ? add_product<64>(d.values.data(), a, b) : add_product<128>(d.values.data(), a, b);
  if (--d.operations) return;
  for (unsigned lane = 0; lane < kWarpSize; ++lane)
    for (int i = 0; i < one.n / 2; ++i) one.d[lane][i] = d.values[place_of(lane, i, one.n)];
  warp.accumulators.erase(warp.accumulators.begin() + (&d - warp.accumulators.data()));
}

}  // namespace

// ---- instructions --------------------------------------------------------------------------------------------------

void wgmma_fence(Site site) {
  collective("wgmma.fence", site, nullptr, [&](Warp& warp) {
    step(warp, "wgmma.fence", site);
    warp.wgmma_fenced = true;
  });
}

void wgmma_commit(Site site) {
  collective("wgmma.commit_group", site, nullptr, [&](Warp& warp) {
    step(warp, "wgmma.commit_group", site);
    warp.wgmma.commit();
    warp.wgmma_fenced = false;
  });
}

void wgmma_wait(size_t groups_in_flight, Site site) {
  collective("wgmma.wait_group", site, nullptr, [&](Warp& warp) {
    step(warp, "wgmma.wait_group", site);
    warp.wgmma.wait(groups_in_flight, [&](const Wgmma& one) {
      if (config().copy == Copy::kLate) finish(warp, one);
    });
    if (warp.wgmma_agent) learn(t_thread->block->lanes_of(*t_thread), warp.wgmma_agent, warp.wgmma.ended);
  });
}

void wgmma(float* d, int n, const uint32_t* a, uint64_t a_descriptor, uint64_t b_descriptor, bool add, bool bfloat16,
           Site site) {
  struct Operands {
    float* d;
    const uint32_t* a;
    uint64_t a_descriptor, b_descriptor;
  } operands{d, a, a_descriptor, b_descriptor};
  collective(bfloat16 ? "wgmma.bf16" : "wgmma.f16", site, &operands, [&](Warp& warp) {
    step(warp, "wgmma", site);
    Wgmma one{{}, {}, a_descriptor, b_descriptor, n, a != nullptr, add, bfloat16, site};
    for (unsigned lane = 0; lane < kWarpSize; ++lane) {
      const auto& of_lane = *static_cast<const Operands*>(warp.operands[lane]);
      if (of_lane.a_descriptor != a_descriptor || of_lane.b_descriptor != b_descriptor)
        fatal(site, "wgmma: the lanes of a warp have different descriptors");
      one.d[lane] = of_lane.d;
      one.a[lane] = of_lane.a;
    }
    if (!warp.wgmma_fenced) report("wgmma", site, "no wgmma.fence since the last group, or ever");
    check_operands(warp, one);
    begin(warp, one);
    if (config().copy == Copy::kEarly) finish(warp, one);
    warp.wgmma.open.push_back(one);
    if (first_row(*t_thread) == 0) ++t_thread->block->counters.wgmma;
  });
}

void check_wgmma_at_exit(const Thread& thread) {
  if (thread.block->warp_of(thread).wgmma.any())
    report("wgmma", Site(), "a warp exits with wgmma that it did not commit or wait for");
}

void check_wgmma_at_end(const Block& block) {
  for (size_t i = 0; i < block.warps.size(); ++i)
    if (block.warps[i].wgmma_steps != block.warpgroups[i / 4].wgmma_steps.size())
      report("divergent warpgroup", Site(), "warp ", i, " executed fewer wgmma instructions than others of its warpgroup");
}

#if defined(ABBA_EMULATION_CHECKED)
void check_registers(const void* pointer, size_t bytes, bool write, const Place& place) {
  const Warp& warp = t_thread->block->warp_of(*t_thread);
  const char* address = static_cast<const char*>(pointer);
  const auto within = [&](const void* registers, size_t size) {
    const char* first = static_cast<const char*>(registers);
    return first && address < first + size && first < address + bytes;
  };
  const auto check = [&](const Wgmma& one) {
    const bool accumulator = within(one.d[t_thread->lane], sizeof(float) * one.n / 2);
    if (accumulator || (write && within(one.a[t_thread->lane], 4 * sizeof(uint32_t))))
      report("wgmma", place, write ? "store to" : "load of", accumulator ? " an accumulator" : " a register of A",
             " while the wgmma at ", Place(one.site).name(), " is in flight");
  };
  for (const auto& group : warp.wgmma.closed) std::ranges::for_each(group, check);
  std::ranges::for_each(warp.wgmma.open, check);
}
#endif

}  // namespace abba::emulation
