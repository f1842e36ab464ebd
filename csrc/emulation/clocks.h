// Who comes before whom: vector clocks.
//
// Everything that accesses memory is an agent with a time of its own: the block's threads, and behind them those that act
// by themselves: the TMA loads of an mbarrier (time: its phase), the wgmma of a warp and the TMA stores of a thread (time:
// the group). A clock says up to which time of every agent things have happened. Threads share what they know: after a
// __syncthreads all have one clock, so that a barrier costs the block one new clock.
//
// Shared memory has two proxies. What a thread wrote, TMA and wgmma see after a fence.proxy.async on the way to them: so
// there is a second clock of what the async proxy sees, which that fence sets and which goes the same ways.
//
// Blocks are unordered, except that a __threadfence takes a Snapshot of what precedes it, the thread's next atomic
// publishes that, and who sees the atomic knows it from its own next __threadfence on.
#pragma once
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

namespace abba::emulation {

struct Access {
  uint32_t time = 0;   // of the agent; 0: no access yet
  uint32_t block = 0;  // counted over all launches
  uint16_t agent = 0;
};

struct Snapshot;
using Snapshots = std::vector<std::shared_ptr<const Snapshot>>;  // sorted, of other blocks

struct Clock {
  std::vector<uint32_t> times = {};
  Snapshots others = {};

  uint32_t operator[](size_t agent) const { return agent < times.size() ? times[agent] : 0; }
  bool covers(const Access& access, uint32_t block) const {
    return access.block == block ? (*this)[access.agent] >= access.time : covers_other_block(access);
  }
  bool covers_other_block(const Access& access) const;
};
using SharedClock = std::shared_ptr<const Clock>;

struct Snapshot {
  uint32_t block;
  SharedClock clock;
};

extern const SharedClock kNothing;

// A clock of all that is added.
class Join {
 public:
  void add(const SharedClock& clock);
  void add(unsigned agent, uint32_t time);
  SharedClock take();  // and begin anew

 private:
  std::vector<SharedClock> clocks_;  // different ones
  std::vector<std::pair<unsigned, uint32_t>> times_;
};

// What one agent knows.
struct Knowledge {
  SharedClock generic = kNothing, async = kNothing;
};

// What is released to those who acquire it. Remembers the last join, as many come with one clock.
class Release {
 public:
  void publish(Knowledge knowledge);
  void acquire(Knowledge& by);

 private:
  Knowledge published_, from_, joined_;
};

}  // namespace abba::emulation
