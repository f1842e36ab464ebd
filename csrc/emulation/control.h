// What tests set and read: schedules, the buffers that kernels may access, and what was counted.
#pragma once
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>

namespace abba::emulation {

enum class Order { kFifo, kRandom, kLowestFirst, kHighestFirst };  // which of the threads that can run goes on
enum class BlockOrder { kAscending, kDescending, kRandom };
enum class Copy {
  kLate,  // cp.async copies at the wait for it; until then the target is NaN
  kEarly  // cp.async copies at once
};

struct Config {
  Order order = Order::kFifo;
  BlockOrder block_order = BlockOrder::kAscending;
  Copy copy = Copy::kLate;
  unsigned seed = 0;   // of the random orders
  unsigned threads = 1;  // OS threads that blocks are shared out to; the check build uses one
};
Config& config();

// A buffer in global memory that kernels may access: bytes from base on, of which only the first row_bytes in every
// row_stride count where row_stride is not 0. What was never written may not be read, unless it is initialised.
struct Buffer {
  std::string name;
  const char* base;
  size_t bytes;
  bool writable, initialised;
  size_t row_bytes = 0, row_stride = 0;
};
void register_buffer(Buffer buffer);
void clear_buffers();

std::map<std::string, int64_t> counters();  // since the last reset
void reset_counters();

}  // namespace abba::emulation
