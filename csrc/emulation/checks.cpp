// Findings, the buffers that kernels may access, and who may access what when.
//
// In the check build the kernels are compiled with -fsanitize=thread, which calls __tsan_read4(address) and its kin at
// every access; this file provides them, in place of that sanitizer's own runtime. No file of the emulator may be
// compiled so, and they come first on the linker's command line: an inline function in a file of both is then theirs.
//
// Who comes before whom. Within a block only __syncthreads and __syncwarp order accesses, and always those of all
// threads of the block or the warp. So two clocks do the work of a vector clock per thread: every access carries its
// warp's time; what lies at or before block.synced precedes everything after the last __syncthreads, likewise
// warp.synced and __syncwarp. Blocks are unordered, except that a __threadfence takes a Snapshot of what precedes it,
// the thread's next atomic publishes that, and who sees the atomic knows it from its own next __threadfence on.
#include <atomic>
#include <mutex>
#include <set>
#include <stdexcept>
#include <unordered_map>

#include "runtime.h"

// The module that this is linked into, by symbols that the linker defines.
extern "C" __attribute__((visibility("hidden"))) const char __ehdr_start[], _end[];

namespace abba::emulation {
namespace {

struct RegisteredBuffer : Buffer {
  static constexpr size_t kPageCells = 1024;
  std::unordered_map<size_t, std::unique_ptr<Cell[]>> pages;  // sparse: buffers may be huge and hardly touched
  size_t last_page = SIZE_MAX;
  Cell* last = nullptr;

  Cell& cell(size_t offset) {
    const size_t index = offset / 2, page = index / kPageCells;
    if (page != last_page) {
      auto& cells = pages[page];
      if (!cells) {
        cells = std::make_unique<Cell[]>(kPageCells);
        for (size_t i = 0; i < kPageCells; ++i) cells[i].initialised = initialised;
      }
      last_page = page, last = cells.get();
    }
    return last[index % kPageCells];
  }
  bool holds(size_t offset, size_t n) const {
    return offset + n <= bytes && (row_stride == 0 || offset % row_stride + n <= row_bytes);
  }
};

std::vector<RegisteredBuffer> g_buffers;
std::unordered_map<const unsigned*, Knowledge> g_published;  // by the atomics on this address
std::mutex g_mutex;                                          // of the two below
std::vector<std::string> g_findings;
std::set<std::pair<std::string, std::string>> g_found;  // kind and place

}  // namespace

// ---- findings ------------------------------------------------------------------------------------------------------

std::string Place::name() const {
  if (!code) return site.line() ? text(site.file_name(), ":", site.line()) : "the end of the kernel";
  return text("module+0x", std::hex, static_cast<const char*>(code) - __ehdr_start - 1);
}

std::string who() {
  return text(" [block ", t_thread->block->number - g_first_block, ", thread ", t_thread->index, "]");
}

void note(const char* kind, const Place& place, const std::string& what) {
  const std::lock_guard lock(g_mutex);
  constexpr size_t kMost = 20;
  if (g_findings.size() < kMost && g_found.emplace(kind, place.name()).second)
    g_findings.push_back(text(kind, ": ", what, who(), " at ", place.name()));
}

std::vector<std::string> take_findings() {
  g_found.clear();
  return std::exchange(g_findings, {});
}

// ---- what precedes what --------------------------------------------------------------------------------------------

namespace {

bool covers(const Knowledge& knowledge, const Access& access) {
  return std::any_of(knowledge.begin(), knowledge.end(), [&](const Snapshot& s) { return s.covers(access); });
}

bool precedes(const Access& access, const Thread& thread) {
  const Block& block = *thread.block;
  if (access.time == 0 || access.block < g_first_block) return true;
  if (access.block == block.number) {
    const Snapshot now{block.number, block.synced, block.warps[thread.index / kWarpSize].synced, UINT32_MAX,
                       static_cast<uint16_t>(thread.index)};
    return now.covers(access);
  }
  return covers(block.known, access) || covers(block.warps[thread.index / kWarpSize].known, access) ||
         covers(thread.known, access);
}

void check_cell(Cell& cell, Kind kind, const Place& place, const char* memory, size_t offset, const char* operation) {
  Thread& thread = *t_thread;
  const Warp& warp = thread.block->warps[thread.index / kWarpSize];
  Access now{warp.time, thread.block->number, static_cast<uint16_t>(thread.index)};
  const auto race = [&](const char* done, const Access& other) {
    report("race", place, operation, " of ", memory, "+", offset, ", ", done, " by thread ", other.thread, " of block ",
           other.block - g_first_block, " with nothing that orders the two");
  };
  if (cell.in_flight)
    report("cp.async", place, operation, " of ", memory, "+", offset, " while a cp.async into it is in flight");
  if (!(kind == Kind::kAtomic && cell.atomic) && !precedes(cell.write, thread)) race("written", cell.write);
  if (kind != Kind::kWrite && !cell.initialised)
    report("uninitialised", place, operation, " of ", memory, "+", offset, ", never written");
  if (kind == Kind::kRead) {
    if (cell.read.block != now.block) {
      cell.read_other_block = cell.read;
      cell.read_same_warp = cell.read_other_warp = {};
    } else if (cell.read.thread / kWarpSize != now.thread / kWarpSize) {
      cell.read_other_warp = cell.read;
      cell.read_same_warp = {};
    } else if (cell.read.thread != now.thread) {
      cell.read_same_warp = cell.read;
    }
    cell.read = now;
    return;
  }
  for (const Access& read : {cell.read, cell.read_same_warp, cell.read_other_warp, cell.read_other_block})
    if (!precedes(read, thread)) race("read", read);
  // A fence before an atomic orders the atomic itself too.
  if (kind == Kind::kAtomic && thread.fence_time > thread.block->synced) now.time = thread.fence_time;
  cell.write = now;
  cell.initialised = true;
  cell.atomic = kind == Kind::kAtomic;
}

}  // namespace

void order_block(Block& block) {
  if constexpr (!kChecked) return;
  for (const Warp& warp : block.warps) block.synced = std::max(block.synced, warp.time);
  for (Warp& warp : block.warps) {
    warp.time = block.synced + 1;
    take_over(block.known, warp.known);
  }
  for (Thread& thread : block.threads) take_over(block.known, thread.known);
}

void order_warp(Warp& warp) {
  if constexpr (!kChecked) return;
  warp.synced = warp.time++;
  Thread* first = t_thread - t_thread->lane;
  for (Thread* thread = first; thread != first + kWarpSize; ++thread) take_over(warp.known, thread->known);
}

void forget_atomics() { g_published.clear(); }

void thread_fence() {
  std::atomic_thread_fence(std::memory_order_seq_cst);
  if constexpr (!kChecked) return;
  Thread& thread = *t_thread;
  Block& block = *thread.block;
  Warp& warp = block.warps[thread.index / kWarpSize];
  take_over(thread.known, thread.observed);
  thread.fence_time = warp.time++;  // what follows is later than the snapshot
  thread.fenced = {{block.number, block.synced, warp.synced, thread.fence_time, static_cast<uint16_t>(thread.index)}};
  for (const Knowledge* more : {&thread.known, &warp.known, &block.known})
    thread.fenced.insert(thread.fenced.end(), more->begin(), more->end());
}

unsigned atomic_add(unsigned* address, unsigned value, Site site) {
  if (buffers_matter() && !check_global(address, sizeof *address, Kind::kAtomic, site, "atomicAdd"))
    fatal(site, "atomicAdd at ", address, ", not in a registered buffer");
  if constexpr (kChecked) {
    Knowledge& published = g_published[address];
    t_thread->observed.insert(t_thread->observed.end(), published.begin(), published.end());
    published.insert(published.end(), t_thread->fenced.begin(), t_thread->fenced.end());
  }
  return __atomic_fetch_add(address, value, __ATOMIC_SEQ_CST);
}

// ---- accesses ------------------------------------------------------------------------------------------------------

void check_shared(uint32_t offset, size_t bytes, Kind kind, const Place& place, const char* operation) {
  if constexpr (kChecked)
    for (size_t cell = offset / 2; cell < (offset + bytes + 1) / 2; ++cell)
      check_cell(t_thread->block->shadow[cell], kind, place, "shared memory", 2 * cell, operation);
}

bool check_global(const void* pointer, size_t bytes, Kind kind, const Place& place, const char* operation) {
  const char* address = static_cast<const char*>(pointer);
  for (RegisteredBuffer& buffer : g_buffers) {
    if (address < buffer.base || address >= buffer.base + buffer.bytes) continue;
    const size_t offset = address - buffer.base;
    if (!buffer.holds(offset, bytes)) {
      fatal(place, "bounds: ", operation, " of ", bytes, " bytes at ", buffer.name, "+", offset,
            ", past the end of it or of a row");
    } else if (kind != Kind::kRead && !buffer.writable) {
      fatal(place, "bounds: ", operation, " of ", buffer.name, "+", offset, ", which is read-only");
    } else if (kChecked && (buffer.writable || !buffer.initialised)) {  // else nothing can be wrong
      for (size_t o = offset & ~size_t{1}; o < offset + bytes; o += 2)
        check_cell(buffer.cell(o), kind, place, buffer.name.c_str(), o, operation);
    }
    return true;
  }
  return false;
}

bool buffers_matter() { return kChecked || !g_buffers.empty(); }

int set_memory(void* pointer, int byte, size_t bytes) {
  const char* address = static_cast<const char*>(pointer);
  for (RegisteredBuffer& buffer : g_buffers) {
    if (address < buffer.base || address >= buffer.base + buffer.bytes) continue;
    const size_t offset = address - buffer.base;
    if (!buffer.writable || !buffer.holds(offset, bytes))
      throw std::runtime_error(
          text("bounds: memset of ", bytes, " bytes at ", buffer.name, "+", offset, ", past its end or read-only"));
    memset(pointer, byte, bytes);
    if constexpr (kChecked)
      for (size_t o = offset & ~size_t{1}; o < offset + bytes; o += 2) buffer.cell(o).initialised = true;
    return 0;
  }
  throw std::runtime_error(text("bounds: memset of ", bytes, " bytes at ", pointer, ", not in a registered buffer"));
}

void register_buffer(Buffer buffer) { g_buffers.push_back({std::move(buffer), {}, SIZE_MAX, nullptr}); }
void clear_buffers() { g_buffers.clear(); }

#if defined(ABBA_EMULATION_CHECKED)
namespace {

// A load or store of the kernel.
void check_access(const void* pointer, size_t bytes, bool write, const void* code) {
  Thread* thread = t_thread;
  if (!thread) return;  // a launcher, on the host
  const auto* address = static_cast<const unsigned char*>(pointer);
  if (address >= thread->stack && address < thread->stack + kStackBytes) return;
  const Kind kind = write ? Kind::kWrite : Kind::kRead;
  const char* operation = write ? "store" : "load";
  const unsigned char* shared = thread->block->shared.get();
  const size_t shared_bytes = thread->block->grid->shared_bytes;
  if (address >= shared && address + bytes <= shared + shared_bytes)
    return check_shared(address - shared, bytes, kind, code, operation);
  if (check_global(pointer, bytes, kind, code, operation)) return;
  const char* constant = static_cast<const char*>(pointer);
  if (!write && constant >= __ehdr_start && constant < _end) return;
  fatal(code, "bounds: ", operation, " of ", bytes, " bytes at ", pointer, ", neither in the ", shared_bytes,
        " bytes of shared memory nor in a registered buffer (shared memory", std::showpos, address - shared, ")");
}

}  // namespace
#endif

}  // namespace abba::emulation

#if defined(ABBA_EMULATION_CHECKED)
#define ABBA_HOOK(name, bytes, write) \
  void __tsan_##name(void* p) { abba::emulation::check_access(p, bytes, write, __builtin_return_address(0)); }
#define ABBA_HOOKS(n) \
  ABBA_HOOK(read##n, n, false) ABBA_HOOK(write##n, n, true) \
  ABBA_HOOK(unaligned_read##n, n, false) ABBA_HOOK(unaligned_write##n, n, true) \
  ABBA_HOOK(volatile_read##n, n, false) ABBA_HOOK(volatile_write##n, n, true)
extern "C" {
ABBA_HOOKS(1) ABBA_HOOKS(2) ABBA_HOOKS(4) ABBA_HOOKS(8) ABBA_HOOKS(16)
void __tsan_read_range(void* p, size_t n) { abba::emulation::check_access(p, n, false, __builtin_return_address(0)); }
void __tsan_write_range(void* p, size_t n) { abba::emulation::check_access(p, n, true, __builtin_return_address(0)); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_read(void**) {}
void __tsan_vptr_update(void**, void*) {}
}
#endif
