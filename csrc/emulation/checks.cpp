// Findings, the buffers that kernels may access, and who may access what when.
//
// In the check build the kernels are compiled with -fsanitize=thread, which calls __tsan_read4(address) and its kin at
// every access; this file provides them, in place of that sanitizer's own runtime. No file of the emulator may be
// compiled so, and they come first on the linker's command line: an inline function in a file of both is then theirs.
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
ReadLists g_reads;   // of their cells
std::mutex g_mutex;  // of the two below
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

// ---- cells ---------------------------------------------------------------------------------------------------------

void ReadLists::clear() {
  entries_.resize(1);
  free_ = 0;
}

Accessor running_thread() {
  if constexpr (!kChecked) return {};
  const Thread& thread = *t_thread;
  return {{thread.time, thread.block->number, static_cast<uint16_t>(thread.index)}, thread.knows.generic.get(), nullptr,
          thread.index};
}

Accessor async_agent(unsigned agent, uint32_t time, std::span<Thread* const> lanes) {
  if constexpr (!kChecked) return {};
  const Thread& thread = *lanes[0];
  const Accessor who{{time, thread.block->number, static_cast<uint16_t>(agent)}, thread.knows.generic.get(),
                     thread.knows.async.get()};
  if (lanes.size() > 1) return who;  // what one of them did need not precede what the others do
  return {who.now, who.generic, who.async, thread.index, thread.time_for_async};
}

bool Accessor::follows(const Access& access) const {
  if (access.time == 0 || access.block < g_first_block) return true;
  return (access.block == now.block && access.agent == thread) || generic->covers(access, now.block);
}

bool Accessor::sees(const Access& write) const {
  if (!async || write.time == 0 || write.block < g_first_block) return true;
  if (write.agent >= t_thread->block->threads.size()) return true;  // of the async proxy too
  return (write.block == now.block && write.agent == thread && write.time <= time_for_async) ||
         async->covers(write, now.block);
}

namespace {

// "thread 3 of block 0"
std::string name_of(const Access& access) {
  const Block& block = *t_thread->block;
  const unsigned threads = static_cast<unsigned>(block.threads.size()), agent = access.agent - threads;
  const std::string name = access.agent < threads       ? text("thread ", access.agent)
                           : access.block != block.number ? "TMA"
                                                          : block.agents[agent];
  return text(name, " of block ", access.block - g_first_block);
}

// A reader that the accessor does not follow, if there is one: its agent, else -1.
int unordered_reader(const Reads& reads, const Accessor& who) {
  for (uint32_t mask = reads.mask; mask; mask &= mask - 1) {
    const Access read{reads.time, reads.block, static_cast<uint16_t>(reads.group * 32 + std::countr_zero(mask))};
    if (!who.follows(read)) return read.agent;
  }
  return -1;
}

void keep_read(Cell& cell, ReadLists& lists, const Accessor& who) {
  const Access& now = who.now;
  const Reads reads{now.block, now.time, 1u << now.agent % 32, 0, static_cast<uint16_t>(now.agent / 32)};
  unsigned length = 0;
  bool other_block = false;
  for (uint32_t at = cell.reads; at; at = lists[at].next, ++length) {
    Reads& other = lists[at];
    if (other.block != reads.block) other_block = true;
    else if (other.time == reads.time && other.group == reads.group) return static_cast<void>(other.mask |= reads.mask);
  }
  constexpr unsigned kLong = 8;
  if (length >= kLong || other_block) {
    // This read stands for those that precede it. Of other blocks the last one stands for all.
    bool another = false;
    for (uint32_t* link = &cell.reads; *link;) {
      const Reads& other = lists[*link];
      const bool needed = other.block == now.block || !std::exchange(another, true);
      if (needed && unordered_reader(other, who) >= 0) link = &lists[*link].next;
      else lists.pop(*link);
    }
  }
  lists.push(cell.reads, reads);
}

void check_cell(Cell& cell, ReadLists& lists, Kind kind, const Place& place, const char* memory, size_t offset,
                const char* operation, const Accessor& who) {
  const auto race = [&](const char* done, const Access& other) {
    report("race", place, operation, " of ", memory, "+", offset, ", ", done, " by ", name_of(other),
           " with nothing that orders the two");
  };
  if (cell.mbarrier) report("mbarrier", place, operation, " of ", memory, "+", offset, ", which holds an mbarrier");
  if (cell.in_flight == InFlight::kAsyncCopy)
    report("cp.async", place, operation, " of ", memory, "+", offset, " while a cp.async into it is in flight");
  else if (cell.in_flight == InFlight::kTensorLoad)
    report("TMA", place, operation, " of ", memory, "+", offset, " while a TMA load into it is in flight");
  else if (!(kind == Kind::kAtomic && cell.atomic) && !who.follows(cell.write))
    race("written", cell.write);
  else if (!who.sees(cell.write))
    report("proxy", place, operation, " of ", memory, "+", offset, ", written by ", name_of(cell.write),
           " with no fence.proxy.async in between");
  if (kind != Kind::kWrite && !cell.initialised)
    report("uninitialised", place, operation, " of ", memory, "+", offset, ", never written");
  if (kind == Kind::kRead) return keep_read(cell, lists, who);
  for (; cell.reads; lists.pop(cell.reads)) {
    const Reads& reads = lists[cell.reads];
    if (const int reader = unordered_reader(reads, who); reader >= 0)
      race("read", {reads.time, reads.block, static_cast<uint16_t>(reader)});
  }
  cell.write = who.now;
  // A fence before an atomic orders the atomic itself too.
  if (kind == Kind::kAtomic && t_thread->fence_time) cell.write.time = t_thread->fence_time;
  cell.initialised = true;
  cell.atomic = kind == Kind::kAtomic;
}

}  // namespace

// ---- accesses ------------------------------------------------------------------------------------------------------

unsigned char* shared_pointer(uint32_t address, size_t bytes, size_t alignment, const char* operation, const Site& site) {
  const Block& block = *t_thread->block;
  const uint32_t offset = address - kSharedBase;
  if (address < kSharedBase || offset + bytes > block.grid->shared_bytes)
    fatal(site, operation, ": address ", int64_t{address} - kSharedBase, " outside of the ", block.grid->shared_bytes,
          " bytes of shared memory");
  if (offset % alignment)
    fatal(site, operation, ": address ", offset, " in shared memory is not ", alignment, "-byte aligned");
  return block.shared.get() + offset;
}

void check_shared(uint32_t offset, size_t bytes, Kind kind, const Place& place, const char* operation,
                  const Accessor& who) {
  if constexpr (!kChecked) return;
  Block& block = *t_thread->block;
  for (size_t cell = offset / 2; cell < (offset + bytes + 1) / 2; ++cell)
    check_cell(block.shadow[cell], block.reads, kind, place, "shared memory", 2 * cell, operation, who);
}

bool check_global(const void* pointer, size_t bytes, Kind kind, const Place& place, const char* operation,
                  const Accessor& who) {
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
        check_cell(buffer.cell(o), g_reads, kind, place, buffer.name.c_str(), o, operation, who);
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
void clear_buffers() {
  g_buffers.clear();
  g_reads.clear();
}

#if defined(ABBA_EMULATION_CHECKED)
namespace {

// A load or store of the kernel, of a type that is aligned to so many bytes.
void check_access(const void* pointer, size_t bytes, size_t alignment, bool write, const void* code) {
  Thread* thread = t_thread;
  if (!thread) return;  // a launcher, on the host
  const auto* address = static_cast<const unsigned char*>(pointer);
  if (address >= thread->stack && address < thread->stack + kStackBytes) {
    if (!thread->block->warp_of(*thread).wgmma.empty()) check_registers(pointer, bytes, write, code);
    return;
  }
  const Kind kind = write ? Kind::kWrite : Kind::kRead;
  const char* operation = write ? "store" : "load";
  if (reinterpret_cast<uintptr_t>(pointer) % alignment)
    fatal(code, "alignment: ", operation, " of ", bytes, " bytes at ", pointer);
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
#define ABBA_HOOK(name, bytes, align, write) \
  void __tsan_##name(void* p) { abba::emulation::check_access(p, bytes, align, write, __builtin_return_address(0)); }
#define ABBA_HOOKS(n) \
  ABBA_HOOK(read##n, n, n, false) ABBA_HOOK(write##n, n, n, true) \
  ABBA_HOOK(unaligned_read##n, n, 1, false) ABBA_HOOK(unaligned_write##n, n, 1, true) \
  ABBA_HOOK(volatile_read##n, n, n, false) ABBA_HOOK(volatile_write##n, n, n, true)
extern "C" {
ABBA_HOOKS(1) ABBA_HOOKS(2) ABBA_HOOKS(4) ABBA_HOOKS(8) ABBA_HOOKS(16)
void __tsan_read_range(void* p, size_t n) {
  abba::emulation::check_access(p, n, 1, false, __builtin_return_address(0));
}
void __tsan_write_range(void* p, size_t n) {
  abba::emulation::check_access(p, n, 1, true, __builtin_return_address(0));
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_read(void**) {}
void __tsan_vptr_update(void**, void*) {}
}
#endif
