// What the parts of the runtime share: the state of the running blocks, findings, checks.
#pragma once
#include <bit>
#include <cstring>
#include <deque>
#include <memory>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "control.h"
#include "emulation.h"
#include "fibers.h"
#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

#if defined(__SANITIZE_THREAD__)
#error "the emulator's runtime provides the hooks of -fsanitize=thread: compile it without"
#endif

namespace abba::emulation {

#if defined(ABBA_EMULATION_CHECKED)
constexpr bool kChecked = true;
#else
constexpr bool kChecked = false;
#endif
constexpr uint32_t kSharedBase = 1024;  // the window's first address; 0 is not one
constexpr size_t kStackBytes = 256 << 10;
constexpr unsigned kWarpSize = 32, kFullMask = 0xffffffffu;

struct Block;

// ---- what is kept of accesses --------------------------------------------------------------------------------------

struct Access {
  uint32_t time = 0;   // of the warp's clock; 0: no access yet
  uint32_t block = 0;  // counted over all launches
  uint16_t thread = 0;
};

// Two bytes of memory. Of reads these four are enough: if any read races with a write, one of them does, as long as
// everything comes from one block; of other blocks the last read stands for all.
struct Cell {
  Access write, read, read_same_warp, read_other_warp, read_other_block;
  bool initialised = false, in_flight = false, atomic = false;
};

// What precedes a fence.
struct Snapshot {
  uint32_t block, block_synced, warp_synced, own;
  uint16_t thread;
  bool covers(const Access& access) const {
    if (access.block != block) return false;
    if (access.thread == thread && access.time <= own) return true;
    const bool same_warp = access.thread / kWarpSize == thread / kWarpSize;
    return access.time <= (same_warp ? std::max(block_synced, warp_synced) : block_synced);
  }
};
using Knowledge = std::vector<Snapshot>;

inline void take_over(Knowledge& to, Knowledge& from) {
  to.insert(to.end(), from.begin(), from.end());
  from.clear();
}

// ---- threads, warps, blocks ----------------------------------------------------------------------------------------

enum class State { kOther, kAtBarrier, kDone };  // kOther: runs, can run, or waits for its warp

struct AsyncCopy {
  uint32_t destination, source_bytes;
  const void* source;
  Site site;
};

struct Thread {
  Block* block = nullptr;
  unsigned index = 0, lane = 0;
  uint3 position = {};
  State state = State::kOther;
  Context context = {};
  unsigned char* stack = nullptr;
  const char* waits_in = "";
  Site site = {};
  std::vector<AsyncCopy> open_group = {};
  std::deque<std::vector<AsyncCopy>> groups = {};
  Knowledge known = {};     // of other blocks
  Knowledge observed = {};  // by atomics since the last fence: known from the next one on
  Knowledge fenced = {};    // by the last fence: what an atomic publishes
  uint32_t fence_time = 0;
};

struct Warp {
  uint32_t time, synced;
  Knowledge known;
  void* operands[kWarpSize];
  unsigned arrived;
  const char* operation;
  Site site;
};

struct Counters {
  int64_t ldmatrix_phases = 0, ldmatrix_extra_wavefronts = 0, mma = 0, cp_async = 0, cp_async_bytes = 0;
};

// On the heap, one per OS thread: a library that is loaded later gets little thread-local memory.
struct Block {
  uint32_t number = 0, synced = 0;
  uint3 position;
  const Grid* grid;
  void (*body)(void*);
  void* body_context;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::deque<Thread*> ready;
  unsigned alive = 0, at_barrier = 0;
  Site barrier_site;
  std::unique_ptr<unsigned char, decltype(&free)> shared{nullptr, &free};
  std::vector<Cell> shadow;
  Knowledge known;
  Context main;
  std::mt19937 random;
  std::string fatal_error;
  Counters counters;
};

extern __attribute__((tls_model("initial-exec"))) thread_local Thread* t_thread;  // null outside of kernels
extern uint32_t g_first_block;                                                    // of the running launch

// ---- findings ------------------------------------------------------------------------------------------------------

template <typename... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

// A place in the kernel: a line where a wrapper passed one, else the address after a call of a hook.
struct Place {
  const void* code = nullptr;
  Site site = {};
  Place(const void* code) : code(code) {}
  Place(const Site& site) : site(site) {}
  std::string name() const;
};

// Notes a finding, one of each kind for each place. The kernel goes on.
void note(const char* kind, const Place& place, const std::string& what);
template <typename... Parts>
void report(const char* kind, const Place& place, const Parts&... parts) {
  note(kind, place, text(parts...));
}

// Ends the launch, where to go on would do harm. It throws nothing itself: a fiber's stack has no caller to catch it.
[[noreturn]] void end_launch(const Place& place, const std::string& why);
template <typename... Parts>
[[noreturn]] void fatal(const Place& place, const Parts&... parts) {
  end_launch(place, text(parts...));
}

// " [block 3, thread 17]", of the running thread
std::string who();

// What was noted since the last call.
std::vector<std::string> take_findings();

// ---- checks, in checks.cpp -----------------------------------------------------------------------------------------

enum class Kind { kRead, kWrite, kAtomic };

// Checks an access to shared memory against all others, in the check build.
void check_shared(uint32_t offset, size_t bytes, Kind kind, const Place& place, const char* operation);

// Checks that an access lies within a registered buffer and, in the check build, against all others. False where no
// buffer is registered at the address.
bool check_global(const void* pointer, size_t bytes, Kind kind, const Place& place, const char* operation);

// Whether buffers must be registered: always in the check build; else, as soon as one is.
bool buffers_matter();

// All threads of the block, or of the warp, are at a barrier: what they did precedes what they do next.
void order_block(Block& block);
void order_warp(Warp& warp);
void forget_atomics();  // of the last launch

// ---- the scheduler, in runtime.cpp ---------------------------------------------------------------------------------

// Leaves the running thread for another one that can run, or for itself.
void yield();

// Makes a waiting thread one that can run.
void wake(Thread& thread);

// All lanes meet; the last one to come computes for all.
template <typename Compute>
void collective(const char* operation, const Site& site, void* operands, Compute compute) {
  Thread& thread = *t_thread;
  Block& block = *thread.block;
  Warp& warp = block.warps[thread.index / kWarpSize];
  if (!warp.arrived) {
    warp.operation = operation;
    warp.site = site;
  } else if (strcmp(warp.operation, operation) || warp.site.line() != site.line() ||
             strcmp(warp.site.file_name(), site.file_name())) {
    fatal(site, "divergent warp: some lanes are in ", warp.operation, " at ", Place(warp.site).name(), ", others in ",
          operation);
  }
  warp.operands[thread.lane] = operands;
  warp.arrived |= 1u << thread.lane;
  if (warp.arrived != kFullMask) {
    thread.waits_in = operation;
    thread.site = site;
    yield();
    return;
  }
  warp.arrived = 0;
  compute(warp);
  Thread* first = &block.threads[thread.index - thread.lane];
  for (Thread* other = first; other != first + kWarpSize; ++other)
    if (other != &thread) wake(*other);
}

}  // namespace abba::emulation
