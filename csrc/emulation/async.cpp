// mbarriers, and TMA, which acts on them and on bulk groups.
//
// A load is as late as it may be (Copy::kLate): it lands when no thread can run without it. Its tile counts as written
// when the phase ends that it landed in, and by nobody who did not wait for that phase or heard of it from one who did.
#include <stdexcept>

#include "runtime.h"

namespace abba::emulation {
namespace {

constexpr uint32_t kBarrierBytes = 8, kRowBytes = 128, kChunkBytes = 16, kAtomBytes = 1024;

Mbarrier& mbarrier_at(uint32_t address, const char* operation, const Site& site) {
  shared_pointer(address, kBarrierBytes, kBarrierBytes, operation, site);
  const auto found = t_thread->block->mbarriers.find(address);
  if (found == t_thread->block->mbarriers.end())
    fatal(site, "mbarrier: ", operation, " on shared memory+", address - kSharedBase, ", where none was initialised");
  if (kChecked && !running_thread().follows(found->second.init))
    report("race", site, operation, " on an mbarrier that thread ", found->second.init.agent,
           " initialises with nothing that orders the two");
  return found->second;
}

size_t tile_bytes(const TensorMap& map) { return size_t{map.box_rows} * kRowBytes; }

std::span<Cell> cells_of(const TensorCopy& copy) {
  return std::span(t_thread->block->shadow).subspan((copy.tile - kSharedBase) / 2, tile_bytes(copy.map) / 2);
}

// Ends the phase if everything has arrived.
void advance(Mbarrier& barrier, const Site& site) {
  if (barrier.pending) return;
  if (barrier.bytes < 0)
    fatal(site, "mbarrier: ", -barrier.bytes, " bytes more landed in phase ", barrier.phase, " than it expects");
  if (barrier.bytes > 0) return;
  ++barrier.phase;
  barrier.pending = barrier.count;
  if constexpr (kChecked) {
    for (const TensorCopy& load : barrier.landed)
      for (Cell& cell : cells_of(load)) {
        cell.in_flight = InFlight::kNothing;
        cell.write.time = barrier.phase;
      }
    barrier.generic.add(barrier.agent, barrier.phase);
    barrier.ended.publish({barrier.generic.take(), barrier.async.take()});
  }
  barrier.landed.clear();
  for (Thread* thread : std::exchange(barrier.waiting, {})) wake(*thread);
}

}  // namespace

void mbarrier_init(uint32_t address, uint32_t count, Site site) {
  constexpr uint32_t kMost = (1 << 20) - 1;
  Thread& thread = *t_thread;
  Block& block = *thread.block;
  shared_pointer(address, kBarrierBytes, kBarrierBytes, "mbarrier.init", site);
  if (count == 0 || count > kMost) fatal(site, "mbarrier: a count of ", count, ", not of 1 to ", kMost);
  check_shared(address - kSharedBase, kBarrierBytes, Kind::kWrite, site, "mbarrier.init");
  Mbarrier& barrier = block.mbarriers[address] = {};
  barrier.count = barrier.pending = count;
  if constexpr (!kChecked) return;
  barrier.agent = new_agent(block, text("TMA, for the mbarrier at ", address - kSharedBase, ","));
  barrier.init = running_thread().now;
  for (uint32_t i = 0; i < kBarrierBytes / 2; ++i) block.shadow[(address - kSharedBase) / 2 + i].mbarrier = true;
}

void mbarrier_init_fence(Site) {
  Thread& thread = *t_thread;
  for (auto& [address, barrier] : thread.block->mbarriers)
    if (barrier.init.agent == thread.index && !barrier.init_fenced) {
      barrier.init.time = thread.time;
      barrier.init_fenced = true;
    }
  ++thread.time;
}

void mbarrier_arrive(uint32_t address, uint32_t expected_bytes, Site site) {
  Mbarrier& barrier = mbarrier_at(address, "mbarrier.arrive", site);
  if (barrier.pending == 0)
    fatal(site, "mbarrier: arrival ", barrier.count + 1, " of ", barrier.count, " in phase ", barrier.phase);
  barrier.bytes += expected_bytes;
  --barrier.pending;
  release(*t_thread, barrier.generic, barrier.async);
  advance(barrier, site);
}

void mbarrier_wait(uint32_t address, uint32_t parity, Site site) {
  Thread& thread = *t_thread;
  Mbarrier& barrier = mbarrier_at(address, "mbarrier.try_wait", site);
  if (parity > 1) fatal(site, "mbarrier: a parity of ", parity);
  thread.waits_in = "mbarrier.try_wait";
  thread.site = site;
  while (barrier.phase % 2 == parity) {
    barrier.waiting.push_back(&thread);
    yield();
  }
  if constexpr (kChecked) barrier.ended.acquire(thread.knows);
}

void proxy_fence(Site) { order_proxies(*t_thread); }

// ---- TMA -----------------------------------------------------------------------------------------------------------

TensorMap tensor_map(const void* base, uint64_t columns, uint64_t rows, uint64_t row_bytes, uint32_t box_rows) {
  constexpr uint64_t kMostElements = uint64_t{1} << 32, kMostRowBytes = uint64_t{1} << 40;
  const auto refuse = [](const auto&... why) { throw std::runtime_error(text("tensor map: ", why...)); };
  if (reinterpret_cast<uintptr_t>(base) % 16) refuse("the matrix at ", base, " is not 16-byte aligned");
  if (!columns || columns > kMostElements || !rows || rows > kMostElements)
    refuse(rows, " rows of ", columns, " elements, not of 1 to 2^32");
  if (row_bytes % 16 || row_bytes >= kMostRowBytes)
    refuse("rows ", row_bytes, " bytes apart, not a multiple of 16 below 2^40");
  if (row_bytes < 2 * columns && rows > 1) refuse("rows of ", 2 * columns, " bytes, ", row_bytes, " bytes apart");
  if (box_rows < 1 || box_rows > 256) refuse("boxes of ", box_rows, " rows, not of 1 to 256");
  return {base, columns, rows, row_bytes, 64, box_rows};
}

namespace {

// body(row of the box, pointer to global memory, bytes): the parts of its rows that lie inside of the matrix
template <typename Body>
void for_rows_inside(const TensorCopy& copy, Body body) {
  const TensorMap& map = copy.map;
  const int64_t first = std::max<int64_t>(copy.column, 0);
  const int64_t last = std::min<int64_t>(copy.column + map.box_columns, static_cast<int64_t>(map.columns));
  for (int64_t r = 0; r < map.box_rows && first < last; ++r) {
    const int64_t row = copy.row + r;
    if (row < 0 || row >= static_cast<int64_t>(map.rows)) continue;
    const char* pointer = static_cast<const char*>(map.base) + row * static_cast<int64_t>(map.row_bytes) + 2 * first;
    body(static_cast<uint32_t>(r), const_cast<char*>(pointer), 2 * static_cast<size_t>(last - first));
  }
}

// The element's place in shared memory: the swizzle acts on addresses.
unsigned char* element(const TensorCopy& copy, uint32_t row, uint32_t column) {
  const uint32_t address = swizzled(copy.tile + row * kRowBytes + 2 * column);
  return t_thread->block->shared.get() + (address - kSharedBase);
}

TensorCopy start(uint32_t tile, const TensorMap& map, int column, int row, uint32_t barrier, const char* operation,
                 const Site& site) {
  shared_pointer(tile, tile_bytes(map), kRowBytes, operation, site);
  if (tile % kAtomBytes)
    report("TMA", site, operation, ": the tile at ", tile - kSharedBase,
           " is not 1024-byte aligned, as the swizzle of its first row needs");
  return {tile, map, column, row, barrier, site};
}

void check_inside(const TensorCopy& copy, Kind kind, const char* operation, const Accessor& who) {
  if (!buffers_matter()) return;
  for_rows_inside(copy, [&](uint32_t, char* pointer, size_t bytes) {
    if (!check_global(pointer, bytes, kind, copy.site, operation, who))
      fatal(copy.site, "bounds: ", operation, " of ", bytes, " bytes at ", static_cast<void*>(pointer),
            ", not in a registered buffer");
  });
}

void land(const TensorCopy& load) {
  Block& block = *t_thread->block;
  memset(block.shared.get() + (load.tile - kSharedBase), 0, tile_bytes(load.map));
  for_rows_inside(load, [&](uint32_t row, const char* pointer, size_t bytes) {
    const uint32_t first = load.column < 0 ? static_cast<uint32_t>(-load.column) : 0;
    for (uint32_t i = 0; i < bytes / 2; ++i) memcpy(element(load, row, first + i), pointer + 2 * i, 2);
  });
  Mbarrier& barrier = block.mbarriers[load.barrier];
  barrier.bytes -= static_cast<int64_t>(tile_bytes(load.map));
  barrier.landed.push_back(load);
  advance(barrier, load.site);
}

void store_now(const TensorCopy& store) {
  for_rows_inside(store, [&](uint32_t row, char* pointer, size_t bytes) {
    const uint32_t first = store.column < 0 ? static_cast<uint32_t>(-store.column) : 0;
    for (uint32_t i = 0; i < bytes / 2; ++i) memcpy(pointer + 2 * i, element(store, row, first + i), 2);
  });
}

}  // namespace

void tensor_load(uint32_t tile, const TensorMap& map, int column, int row, uint32_t address, Site site) {
  Block& block = *t_thread->block;
  const TensorCopy load = start(tile, map, column, row, address, "TMA load", site);
  const Mbarrier& barrier = mbarrier_at(address, "TMA load", site);
  const Accessor who = async_agent(barrier.agent, barrier.phase + 1, std::span(block.all).subspan(t_thread->index, 1));
  if (kChecked && !barrier.init_fenced && !who.sees(barrier.init))
    report("proxy", site, "TMA load for an mbarrier that was initialised with no fence in between");
  check_inside(load, Kind::kRead, "TMA load", who);
  check_shared(tile - kSharedBase, tile_bytes(map), Kind::kWrite, site, "TMA load", who);
  if constexpr (kChecked)
    for (Cell& cell : cells_of(load)) cell.in_flight = InFlight::kTensorLoad;
  ++block.counters.tma_loads;
  block.counters.tma_bytes += static_cast<int64_t>(tile_bytes(map));
  if (config().copy == Copy::kEarly) return land(load);
  memset(block.shared.get() + (tile - kSharedBase), 0xff, tile_bytes(map));
  block.loads.push_back(load);
}

bool land_a_load(Block& block) {
  if (block.loads.empty()) return false;
  const size_t chosen = config().order == Order::kRandom ? block.random() % block.loads.size() : 0;
  const TensorCopy load = block.loads[chosen];
  block.loads.erase(block.loads.begin() + static_cast<ptrdiff_t>(chosen));
  land(load);
  return true;
}

void tensor_store(const TensorMap& map, int column, int row, uint32_t tile, Site site) {
  Thread& thread = *t_thread;
  Block& block = *thread.block;
  const TensorCopy store = start(tile, map, column, row, 0, "TMA store", site);
  if (kChecked && !thread.stores_agent) thread.stores_agent = new_agent(block, text("a TMA store of thread ", thread.index));
  const Accessor who =
      async_agent(thread.stores_agent, thread.stores.time(), std::span(block.all).subspan(thread.index, 1));
  check_shared(tile - kSharedBase, tile_bytes(map), Kind::kRead, site, "TMA store", who);
  check_inside(store, Kind::kWrite, "TMA store", who);
  if (config().copy == Copy::kEarly) store_now(store);
  thread.stores.open.push_back(store);
}

void bulk_commit() { t_thread->stores.commit(); }

void bulk_wait_read(size_t groups_in_flight) {
  Thread& thread = *t_thread;
  thread.stores.wait(groups_in_flight, [](const TensorCopy& store) {
    if (config().copy == Copy::kLate) store_now(store);
  });
  if (thread.stores_agent)
    learn(std::span(thread.block->all).subspan(thread.index, 1), thread.stores_agent, thread.stores.ended);
}

// ---- what is in flight at the end ----------------------------------------------------------------------------------

void check_copies_at_exit(const Thread& thread) {
  if (thread.copies.any()) report("cp.async", Site(), "a thread exits while its copies are in flight");
  if (thread.stores.any()) report("TMA", Site(), "a thread exits while its stores may read shared memory");
}

void check_copies_at_end(const Block& block) {
  const bool landed = std::ranges::any_of(block.mbarriers, [](const auto& one) { return !one.second.landed.empty(); });
  if (landed || !block.loads.empty()) report("TMA", Site(), "the block exits while loads are in flight");
}

}  // namespace abba::emulation
