// The scheduler: which thread runs, barriers, grids.
#include "runtime.h"

#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <numeric>
#include <stdexcept>
#include <thread>

namespace abba::emulation {

__attribute__((tls_model("initial-exec"))) thread_local Thread* t_thread = nullptr;
uint32_t g_first_block = 1;

namespace {

Config g_config;
Counters g_counters;
std::vector<std::unique_ptr<Block>> g_workers;

}  // namespace

Config& config() { return g_config; }
void reset_counters() { g_counters = {}; }
std::map<std::string, int64_t> counters() {
  return {{"ldmatrix_phases", g_counters.ldmatrix_phases},
          {"ldmatrix_extra_wavefronts", g_counters.ldmatrix_extra_wavefronts},
          {"stmatrix_phases", g_counters.stmatrix_phases},
          {"stmatrix_extra_wavefronts", g_counters.stmatrix_extra_wavefronts},
          {"mma", g_counters.mma},
          {"wgmma", g_counters.wgmma},
          {"cp_async", g_counters.cp_async},
          {"cp_async_bytes", g_counters.cp_async_bytes},
          {"tma_loads", g_counters.tma_loads},
          {"tma_bytes", g_counters.tma_bytes}};
}

uint3 thread_index() { return t_thread->position; }
uint3 block_index() { return t_thread->block->position; }
dim3 block_size() { return t_thread->block->grid->threads; }
dim3 grid_size() { return t_thread->block->grid->blocks; }
unsigned lane() { return t_thread->lane; }
unsigned char* dynamic_shared_memory() { return t_thread->block->shared.get(); }

// ---- who runs ------------------------------------------------------------------------------------------------------

namespace {

Thread* next_ready(Block& block) {
  auto& ready = block.ready;
  if (ready.empty()) return nullptr;
  const auto by_index = [](const Thread* a, const Thread* b) { return a->index < b->index; };
  auto chosen = ready.begin();
  switch (g_config.order) {
    case Order::kFifo: break;
    case Order::kRandom: chosen += block.random() % ready.size(); break;
    case Order::kLowestFirst: chosen = std::min_element(ready.begin(), ready.end(), by_index); break;
    case Order::kHighestFirst: chosen = std::max_element(ready.begin(), ready.end(), by_index); break;
  }
  std::iter_swap(ready.begin(), chosen);
  Thread* thread = ready.front();
  ready.pop_front();
  return thread;
}

void report_deadlock(Block& block) {
  std::map<std::string, int> waiting;
  for (const Thread& thread : block.threads)
    ++waiting[thread.state == State::kDone ? "exited"
                                           : text("wait in ", thread.waits_in, " at ", Place(thread.site).name())];
  block.fatal_error = text("deadlock of block ", block.number - g_first_block);
  for (const auto& [what, count] : waiting) block.fatal_error += text("; ", count, " threads ", what);
  for (const auto& [address, barrier] : block.mbarriers)
    if (!barrier.waiting.empty())
      block.fatal_error += text("; the mbarrier at ", address - kSharedBase, ", in phase ", barrier.phase, ", lacks ",
                                barrier.pending, " arrivals and ", barrier.bytes, " bytes");
}

}  // namespace

void wake(Thread& thread) {
  thread.state = State::kOther;
  thread.block->ready.push_back(&thread);
}

void yield() {
  Thread& thread = *t_thread;
  Block& block = *thread.block;
  Thread* next = next_ready(block);
  while (!next && block.alive && land_a_load(block)) next = next_ready(block);  // as late as can be
  if (next == &thread) return;
  if (next) {
    t_thread = next;
    change(thread.context, next->context);
  } else {
    if (block.alive) report_deadlock(block);
    change(thread.context, block.main);
  }
}

void end_launch(const Place& place, const std::string& why) {
  Block& block = *t_thread->block;
  block.fatal_error = text(why, who(), " at ", place.name());
  change(t_thread->context, block.main);
  __builtin_unreachable();
}

// ---- barriers ------------------------------------------------------------------------------------------------------

namespace {

void release_barrier(Block& block) {
  order(block.all);
  block.at_barrier = 0;
  for (Thread& thread : block.threads)
    if (thread.state == State::kAtBarrier) wake(thread);
}

}  // namespace

void sync_threads(Site site) {
  Thread& thread = *t_thread;
  Block& block = *thread.block;
  if (block.at_barrier == 0) block.barrier_site = site;
  if (site.line() != block.barrier_site.line() || strcmp(site.file_name(), block.barrier_site.file_name()))
    report("barrier", site, "threads of a block meet at this __syncthreads and at the one at ",
           Place(block.barrier_site).name());
  if (block.alive != block.threads.size())
    report("barrier", site, "__syncthreads after ", block.threads.size() - block.alive, " threads exited");
  thread.state = State::kAtBarrier;
  thread.waits_in = "__syncthreads";
  thread.site = site;
  if (++block.at_barrier == block.alive) release_barrier(block);
  yield();
}

void named_barrier(int id, unsigned threads, Site site) {
  Thread& thread = *t_thread;
  NamedBarrier& barrier = thread.block->named_barriers[id];
  if (barrier.waiting.empty()) barrier.expected = threads;
  if (barrier.expected != threads)
    fatal(site, "barrier: barrier ", id, " of ", barrier.expected, " threads, here of ", threads);
  barrier.waiting.push_back(&thread);
  thread.waits_in = "a named barrier";
  thread.site = site;
  if (barrier.waiting.size() == threads) {
    const std::vector<Thread*> all = std::exchange(barrier.waiting, {});
    for (const Thread* one : all)
      if (std::ranges::count(all, one->index / kWarpSize, [](const Thread* t) { return t->index / kWarpSize; }) !=
          kWarpSize)
        fatal(site, "barrier: a part of warp ", one->index / kWarpSize, " at barrier ", id);
    order(all);
    for (Thread* one : all) wake(*one);
  }
  yield();
}

// ---- registers -----------------------------------------------------------------------------------------------------

void set_registers(unsigned count, Site site) {
  collective("setmaxnreg", site, nullptr, [&](Warp& warp) { warp.registers = count; });
}

namespace {

// What the warps hold together cannot exceed what the block was launched with: as many as there can be for each thread.
void check_registers_at_end(const Block& block) {
  const unsigned threads = static_cast<unsigned>(block.threads.size()), launched = 65536 / threads / 8 * 8;
  unsigned sum = 0;
  bool set = false;
  for (size_t i = 0; i < block.warps.size(); ++i) {
    const unsigned registers = block.warps[i].registers;
    if (registers != block.warps[i - i % 4].registers)
      report("setmaxnreg", Site(), "the warps of a warpgroup have set ", block.warps[i - i % 4].registers, " and ",
             registers, " registers");
    sum += kWarpSize * (registers ? registers : launched);
    set |= registers != 0;
  }
  if (set && sum > launched * threads)
    report("setmaxnreg", Site(), "the warpgroups hold ", sum, " registers, there are ", launched * threads);
}

}  // namespace

// ---- grids ---------------------------------------------------------------------------------------------------------

namespace {

void run_thread() {
  Thread& thread = *t_thread;
  Block& block = *thread.block;
  block.body(block.body_context);
  check_copies_at_exit(thread);
  check_wgmma_at_exit(thread);
  thread.state = State::kDone;
  --block.alive;
  if (block.at_barrier) {
    report("barrier", block.barrier_site, "a thread exits while others wait at a __syncthreads");
    if (block.at_barrier == block.alive) release_barrier(block);
  }
  yield();
  __builtin_unreachable();
}

void make_threads(Block& block, unsigned count) {
  while (block.threads.size() > count) {
    munmap(block.threads.back().stack, kStackBytes);
    block.threads.pop_back();
  }
  while (block.threads.size() < count) {
    Thread& thread = block.threads.emplace_back();
    constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, kFlags, -1, 0);
    if (stack == MAP_FAILED) throw std::runtime_error("no memory for the stacks of a block's threads");
    thread.stack = static_cast<unsigned char*>(stack);
    mprotect(stack, getpagesize(), PROT_NONE);  // an overflow ends the process, and does not go unnoticed
  }
  block.all.clear();
  for (Thread& thread : block.threads) block.all.push_back(&thread);
}

void run_block(Block& block, uint32_t linear) {
  const Grid& grid = *block.grid;
  const dim3 blocks = grid.blocks, threads = grid.threads;
  block.number = g_first_block + linear;
  block.position = {linear % blocks.x, linear / blocks.x % blocks.y, linear / blocks.x / blocks.y};
  block.alive = static_cast<unsigned>(block.threads.size());
  block.at_barrier = 0;
  block.ready.clear();
  for (NamedBarrier& barrier : block.named_barriers) barrier = {};
  block.mbarriers.clear();
  block.loads.clear();
  block.agents.clear();
  block.random.seed(g_config.seed + linear);
  memset(block.shared.get(), 0xff, grid.shared_bytes);  // NaN in every format
  if constexpr (kChecked) {
    block.shadow.assign(grid.shared_bytes / 2 + 1, Cell());
    block.reads.clear();
  }
  block.warps.assign(block.threads.size() / kWarpSize, Warp());
  block.warpgroups.assign((block.warps.size() + 3) / 4, Warpgroup());
  for (unsigned i = 0; i < block.threads.size(); ++i) {
    Thread& thread = block.threads[i];
    thread = Thread{.block = &block, .index = i, .lane = i % kWarpSize, .stack = thread.stack};
    thread.position = {i % threads.x, i / threads.x % threads.y, i / threads.x / threads.y};
    start_on(thread.context, thread.stack, kStackBytes, run_thread);
    wake(thread);
  }
  t_thread = next_ready(block);
  change(block.main, t_thread->context);
  if (block.fatal_error.empty()) {
    check_copies_at_end(block);
    check_wgmma_at_end(block);
    check_registers_at_end(block);
  }
  t_thread = nullptr;
}

}  // namespace

void run_grid(const Grid& grid, void (*body)(void*), void* context) {
  const unsigned threads = grid.threads.x * grid.threads.y * grid.threads.z;
  const uint32_t blocks = grid.blocks.x * grid.blocks.y * grid.blocks.z;
  constexpr unsigned kMostThreads = 1024;
  constexpr size_t kMostShared = 227 << 10;  // bytes, of sm_90
  if (threads == 0 || threads > kMostThreads || threads % kWarpSize || blocks == 0 || grid.blocks.y > 65535 ||
      grid.blocks.z > 65535 || grid.shared_bytes > kMostShared)
    throw std::runtime_error(text(grid.kernel, ": cannot launch ", blocks, " blocks of ", threads,
                                  " threads (a multiple of 32 up to ", kMostThreads, ") with ", grid.shared_bytes,
                                  " bytes of shared memory (up to ", kMostShared, ")"));
  std::vector<uint32_t> order(blocks);
  std::iota(order.begin(), order.end(), 0);
  if (g_config.block_order == BlockOrder::kDescending)
    std::reverse(order.begin(), order.end());
  else if (g_config.block_order == BlockOrder::kRandom)
    std::shuffle(order.begin(), order.end(), std::mt19937(g_config.seed));

  const unsigned workers = kChecked ? 1 : std::min<unsigned>(std::max(1u, g_config.threads), blocks);
  while (g_workers.size() < workers) g_workers.push_back(std::make_unique<Block>());
  for (unsigned i = 0; i < workers; ++i) {
    Block& block = *g_workers[i];
    block.grid = &grid;
    block.body = body;
    block.body_context = context;
    block.fatal_error.clear();
    block.counters = {};
    make_threads(block, threads);
    block.shared.reset(static_cast<unsigned char*>(aligned_alloc(1024, (grid.shared_bytes + 2047) / 1024 * 1024)));
  }
  forget_atomics();
  std::atomic<uint32_t> next = 0;
  const auto work = [&](Block& block) {
    for (uint32_t i; block.fatal_error.empty() && (i = next++) < blocks;) run_block(block, order[i]);
  };
  std::vector<std::thread> others;
  for (unsigned i = 1; i < workers; ++i) others.emplace_back(work, std::ref(*g_workers[i]));
  work(*g_workers[0]);
  for (std::thread& other : others) other.join();

  std::vector<std::string> findings = take_findings();
  g_first_block += blocks;
  for (unsigned i = 0; i < workers; ++i) {
    const Counters& counters = g_workers[i]->counters;
    g_counters.ldmatrix_phases += counters.ldmatrix_phases;
    g_counters.ldmatrix_extra_wavefronts += counters.ldmatrix_extra_wavefronts;
    g_counters.stmatrix_phases += counters.stmatrix_phases;
    g_counters.stmatrix_extra_wavefronts += counters.stmatrix_extra_wavefronts;
    g_counters.mma += counters.mma;
    g_counters.wgmma += counters.wgmma;
    g_counters.cp_async += counters.cp_async;
    g_counters.cp_async_bytes += counters.cp_async_bytes;
    g_counters.tma_loads += counters.tma_loads;
    g_counters.tma_bytes += counters.tma_bytes;
    if (!g_workers[i]->fatal_error.empty()) findings.push_back(g_workers[i]->fatal_error);
  }
  if (findings.empty()) return;
  std::string message = grid.kernel;
  for (const std::string& finding : findings) message += "\n  " + finding;
  throw std::runtime_error(message);
}

}  // namespace abba::emulation
