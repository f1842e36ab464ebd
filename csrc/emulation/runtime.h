// What the parts of the runtime share: the state of the running blocks, findings, checks.
#pragma once
#include <algorithm>
#include <bit>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <span>
#include <sstream>
#include <string>
#include <vector>

#include "clocks.h"
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

// Reads of a cell by agents of one time, those 32 group to 32 group + 31 that the mask names.
struct Reads {
  uint32_t block, time, mask, next;  // next in the list; 0: none
  uint16_t group;
};

class ReadLists {
 public:
  Reads& operator[](uint32_t i) { return entries_[i]; }
  void push(uint32_t& list, Reads reads) {
    uint32_t at = free_;
    if (at) free_ = entries_[at].next;
    else at = static_cast<uint32_t>(entries_.size()), entries_.emplace_back();
    reads.next = list;
    entries_[at] = reads;
    list = at;
  }
  void pop(uint32_t& list) {  // the first one
    const uint32_t first = list;
    list = entries_[first].next;
    entries_[first].next = free_;
    free_ = first;
  }
  void clear();

 private:
  std::vector<Reads> entries_{1};
  uint32_t free_ = 0;
};

enum class InFlight : uint8_t { kNothing, kAsyncCopy, kTensorLoad };

// Two bytes of memory: the last write and all reads since that no later one stands for.
struct Cell {
  Access write;
  uint32_t reads = 0;  // a list
  bool initialised = false, atomic = false, mbarrier = false;
  InFlight in_flight = InFlight::kNothing;
};

// Who accesses memory: an agent, and what precedes.
struct Accessor {
  Access now;
  const Clock *generic, *async;  // async: of the async proxy, else null
  unsigned thread = UINT32_MAX;  // whose own accesses precede too
  uint32_t time_for_async = 0;   // up to which the async proxy sees these

  bool follows(const Access& access) const;
  bool sees(const Access& write) const;  // of those that it follows
};

// ---- threads, warps, blocks ----------------------------------------------------------------------------------------

enum class State { kOther, kAtBarrier, kDone };  // kOther: runs, can run, or waits for others than the whole block

struct AsyncCopy {
  uint32_t destination, bytes, source_bytes;
  const void* source;
  Site site;
};

// A copy by TMA, either way.
struct TensorCopy {
  uint32_t tile;
  TensorMap map;
  int64_t column, row;
  uint32_t barrier;  // of a load
  Site site;
};

// Groups of what is in flight, as `commit` makes them and `wait` ends them.
template <typename Operation>
struct Groups {
  std::vector<Operation> open = {};
  std::deque<std::vector<Operation>> closed = {};
  uint32_t ended = 0;

  void commit() {
    closed.push_back(std::move(open));
    open.clear();
  }
  // end(operation) for those of all groups but the latest ones
  template <typename End>
  void wait(size_t in_flight, End end) {
    for (; closed.size() > in_flight; closed.pop_front(), ++ended)
      for (Operation& operation : closed.front()) end(operation);
  }
  uint32_t time() const { return ended + static_cast<uint32_t>(closed.size()) + 1; }  // of the open group
  bool empty() const { return open.empty() && closed.empty(); }
  bool any() const {
    return !open.empty() || std::any_of(closed.begin(), closed.end(), [](const auto& group) { return !group.empty(); });
  }
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
  Groups<AsyncCopy> copies = {};
  Groups<TensorCopy> stores = {};
  unsigned stores_agent = 0;  // 0: none yet
  Knowledge knows = {};
  uint32_t time = 1, time_for_async = 0;
  Snapshots observed = {};  // by atomics since the last fence: known from the next one on
  Snapshots fenced = {};    // by the last fence: what an atomic publishes
  uint32_t fence_time = 0;  // of the last fence, if nothing was released since
};

// wgmma of a warp: its 16 rows
struct Wgmma {
  float* d[kWarpSize];
  const uint32_t* a[kWarpSize];
  uint64_t a_descriptor, b_descriptor;
  int n;
  bool from_registers, add, bfloat16;
  Site site;
};

// The registers d while operations on them are in flight.
struct Accumulators {
  float* first;  // lane 0's: which they are
  unsigned operations;
  std::vector<float> values;  // [16][n]
};

struct Warp {
  void* operands[kWarpSize] = {};
  unsigned arrived = 0;
  const char* operation = "";
  Site site = {};
  Groups<Wgmma> wgmma = {};
  unsigned wgmma_agent = 0;  // 0: none yet
  bool wgmma_fenced = false;
  std::vector<Accumulators> accumulators = {};
  size_t wgmma_steps = 0;  // fences, commits and waits too
  unsigned registers = 0;  // as set, 0: never
};

struct Warpgroup {
  std::vector<std::pair<const char*, Site>> wgmma_steps;  // of the warp that is farthest
};

struct Mbarrier {
  uint32_t count = 0, pending = 0, phase = 0;
  int64_t bytes = 0;  // that are still to land
  unsigned agent = 0;
  Access init = {};
  bool init_fenced = false;
  Join generic = {}, async = {};  // of those that arrived
  Release ended = {};             // by the last phase's end
  std::vector<TensorCopy> landed = {};
  std::vector<Thread*> waiting = {};
};

struct NamedBarrier {
  unsigned expected = 0;
  std::vector<Thread*> waiting = {};
};

struct Counters {
  int64_t ldmatrix_phases = 0, ldmatrix_extra_wavefronts = 0, stmatrix_phases = 0, stmatrix_extra_wavefronts = 0, mma = 0,
          wgmma = 0, cp_async = 0, cp_async_bytes = 0, tma_loads = 0, tma_bytes = 0;
};

// On the heap, one per OS thread: a library that is loaded later gets little thread-local memory.
struct Block {
  uint32_t number = 0;
  uint3 position;
  const Grid* grid;
  void (*body)(void*);
  void* body_context;
  std::vector<Thread> threads;
  std::vector<Thread*> all;  // of these
  std::vector<Warp> warps;
  std::vector<Warpgroup> warpgroups;
  std::vector<std::string> agents;  // behind the threads: their names
  std::deque<Thread*> ready;
  unsigned alive = 0, at_barrier = 0;
  Site barrier_site;
  NamedBarrier named_barriers[16];
  std::map<uint32_t, Mbarrier> mbarriers;  // by address
  std::deque<TensorCopy> loads;            // that have not landed
  std::unique_ptr<unsigned char, decltype(&free)> shared{nullptr, &free};
  std::vector<Cell> shadow;
  ReadLists reads;
  Context main;
  std::mt19937 random;
  std::string fatal_error;
  Counters counters;

  Warp& warp_of(const Thread& thread) { return warps[thread.index / kWarpSize]; }
  std::span<Thread* const> lanes_of(const Thread& thread) const {
    return std::span(all).subspan(thread.index - thread.lane, kWarpSize);
  }
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

// ---- what precedes what, in clocks.cpp; nothing is known of it in the fast build -------------------------------------

// A barrier of these threads: what they did precedes what they do next.
void order(std::span<Thread* const> threads);

// Adds what the thread did and knows; what it does next comes later.
void release(Thread& thread, Join& generic, Join& async);

// From here on the agent's accesses up to the time precede those of the threads.
void learn(std::span<Thread* const> threads, unsigned agent, uint32_t time);

// fence.proxy.async
void order_proxies(Thread& thread);

unsigned new_agent(Block& block, std::string name);
void forget_atomics();  // of the last launch

// ---- checks, in checks.cpp -----------------------------------------------------------------------------------------

enum class Kind { kRead, kWrite, kAtomic };

Accessor running_thread();
// An agent of the async proxy, in whose name these lanes, with one knowledge, start what it does: one of them or a warp's.
Accessor async_agent(unsigned agent, uint32_t time, std::span<Thread* const> lanes);

// Checks an access to shared memory against all others, in the check build.
void check_shared(uint32_t offset, size_t bytes, Kind kind, const Place& place, const char* operation,
                  const Accessor& who = running_thread());

// Checks that an access lies within a registered buffer and, in the check build, against all others. False where no
// buffer is registered at the address.
bool check_global(const void* pointer, size_t bytes, Kind kind, const Place& place, const char* operation,
                  const Accessor& who = running_thread());

// Whether buffers must be registered: always in the check build; else, as soon as one is.
bool buffers_matter();

// Where an address of the shared window is; ends the launch where the bytes do not lie within it or are not aligned.
unsigned char* shared_pointer(uint32_t address, size_t bytes, size_t alignment, const char* operation, const Site& site);

// The 128-byte swizzle: chunk c of row r of a tile of 128-byte rows lies at c ^ (r % 8).
constexpr uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

// ---- the ends of a thread and of a block, in async.cpp and wgmma.cpp: notes what is still in flight --------------------

void check_copies_at_exit(const Thread& thread);
void check_copies_at_end(const Block& block);
void check_wgmma_at_exit(const Thread& thread);
void check_wgmma_at_end(const Block& block);

// Lets one of the loads land, where nothing else can happen. False if there is none.
bool land_a_load(Block& block);

#if defined(ABBA_EMULATION_CHECKED)
// A load or store of the kernel on its thread's stack, where the registers are that wgmma uses.
void check_registers(const void* pointer, size_t bytes, bool write, const Place& place);
#endif

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
  Warp& warp = block.warp_of(thread);
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
  for (Thread* other : block.lanes_of(thread))
    if (other != &thread) wake(*other);
}

}  // namespace abba::emulation
