#include "clocks.h"

#include <algorithm>
#include <atomic>
#include <iterator>
#include <unordered_map>

#include "runtime.h"

namespace abba::emulation {

const SharedClock kNothing = std::make_shared<const Clock>();

namespace {

std::unordered_map<const unsigned*, Snapshots> g_published;  // by the atomics on this address

Snapshots unite(const Snapshots& a, const Snapshots& b) {
  Snapshots both;
  std::set_union(a.begin(), a.end(), b.begin(), b.end(), std::back_inserter(both));
  return both;
}

SharedClock join(const SharedClock& a, const SharedClock& b) {
  Join both;
  both.add(a);
  both.add(b);
  return both.take();
}

}  // namespace

bool Clock::covers_other_block(const Access& access) const {
  return std::any_of(others.begin(), others.end(), [&](const auto& snapshot) {
    return snapshot->block == access.block && (*snapshot->clock)[access.agent] >= access.time;
  });
}

void Join::add(const SharedClock& clock) {
  if (clock != kNothing && std::find(clocks_.rbegin(), clocks_.rend(), clock) == clocks_.rend()) clocks_.push_back(clock);
}

void Join::add(unsigned agent, uint32_t time) {
  if (time) times_.emplace_back(agent, time);
}

SharedClock Join::take() {
  if (times_.empty() && clocks_.size() < 2) {
    const SharedClock only = clocks_.empty() ? kNothing : clocks_[0];
    clocks_.clear();
    return only;
  }
  const auto all = std::make_shared<Clock>();
  std::vector<uint32_t>& times = all->times;
  for (const SharedClock& clock : clocks_) {
    times.resize(std::max(times.size(), clock->times.size()));
    std::transform(clock->times.begin(), clock->times.end(), times.begin(), times.begin(),
                   [](uint32_t a, uint32_t b) { return std::max(a, b); });
    if (all->others.empty()) all->others = clock->others;
    else if (!clock->others.empty()) all->others = unite(all->others, clock->others);
  }
  for (const auto& [agent, time] : times_) {
    if (agent >= times.size()) times.resize(agent + 1);
    times[agent] = std::max(times[agent], time);
  }
  clocks_.clear();
  times_.clear();
  return all;
}

void Release::publish(Knowledge knowledge) {
  published_ = std::move(knowledge);
  from_ = {nullptr, nullptr};
}

void Release::acquire(Knowledge& by) {
  if (by.generic != from_.generic) from_.generic = by.generic, joined_.generic = join(by.generic, published_.generic);
  if (by.async != from_.async) from_.async = by.async, joined_.async = join(by.async, published_.async);
  by = joined_;
}

// ---- threads -------------------------------------------------------------------------------------------------------

void release(Thread& thread, Join& generic, Join& async) {
  if constexpr (!kChecked) return;
  generic.add(thread.knows.generic);
  generic.add(thread.index, thread.time);
  async.add(thread.knows.async);
  async.add(thread.index, thread.time_for_async);
  ++thread.time;
  thread.fence_time = 0;
}

void order(std::span<Thread* const> threads) {
  if constexpr (!kChecked) return;
  Join generic, async;
  uint32_t time = 0;
  for (Thread* thread : threads) {
    release(*thread, generic, async);
    time = std::max(time, thread->time);
  }
  const Knowledge all{generic.take(), async.take()};
  for (Thread* thread : threads) {
    thread->knows = all;
    thread->time = time;  // threads with one time need less room where they read the same
    thread->time_for_async = 0;
  }
}

void learn(std::span<Thread* const> threads, unsigned agent, uint32_t time) {
  if constexpr (!kChecked) return;
  Join one;
  one.add(agent, time);
  Release completed;
  completed.publish({one.take(), kNothing});
  for (Thread* thread : threads) completed.acquire(thread->knows);
}

void order_proxies(Thread& thread) {
  if constexpr (!kChecked) return;
  thread.knows.async = thread.knows.generic;
  thread.time_for_async = thread.time++;
}

unsigned new_agent(Block& block, std::string name) {
  block.agents.push_back(std::move(name));
  return static_cast<unsigned>(block.threads.size() + block.agents.size() - 1);
}

// ---- blocks --------------------------------------------------------------------------------------------------------

void forget_atomics() { g_published.clear(); }

void thread_fence() {
  std::atomic_thread_fence(std::memory_order_seq_cst);
  if constexpr (!kChecked) return;
  Thread& thread = *t_thread;
  if (!thread.observed.empty()) {
    const SharedClock observed = std::make_shared<const Clock>(Clock{{}, std::move(thread.observed)});
    thread.observed.clear();
    thread.knows.generic = join(thread.knows.generic, observed);
  }
  Join before;
  before.add(thread.knows.generic);
  before.add(thread.index, thread.time);
  const SharedClock clock = before.take();
  thread.fenced = unite({std::make_shared<const Snapshot>(Snapshot{thread.block->number, clock})}, clock->others);
  thread.fence_time = thread.time++;  // what follows is later than the snapshot
}

unsigned atomic_add(unsigned* address, unsigned value, Site site) {
  if (buffers_matter() && !check_global(address, sizeof *address, Kind::kAtomic, site, "atomicAdd"))
    fatal(site, "atomicAdd at ", address, ", not in a registered buffer");
  if constexpr (kChecked) {
    Snapshots& published = g_published[address];
    t_thread->observed = unite(t_thread->observed, published);
    published = unite(published, t_thread->fenced);
  }
  return __atomic_fetch_add(address, value, __ATOMIC_SEQ_CST);
}

}  // namespace abba::emulation
