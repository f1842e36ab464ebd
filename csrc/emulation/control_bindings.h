// control.h for Python, shared by the module of the operators and that of the emulator's own tests.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "control.h"

namespace abba::emulation {

// The value of the enumerator that the name stands for.
template <typename Enum>
Enum choose(const char* what, const std::string& name, const std::vector<std::pair<std::string, Enum>>& choices) {
  std::string known;
  for (const auto& [choice, value] : choices) {
    if (choice == name) return value;
    known += (known.empty() ? "" : ", ") + choice;
  }
  throw std::invalid_argument(std::string(what) + " must be one of " + known + ", got '" + name + "'");
}

inline void bind_control(pybind11::module_& module) {
  using namespace pybind11::literals;
  module.def(
      "configure",
      [](const std::string& order, unsigned seed, const std::string& copy, unsigned threads,
         const std::string& block_order) {
        Config& c = config();
        c.order = choose<Order>("order", order,
                                {{"fifo", Order::kFifo},
                                 {"random", Order::kRandom},
                                 {"lowest", Order::kLowestFirst},
                                 {"highest", Order::kHighestFirst}});
        c.seed = seed;
        c.copy = choose<Copy>("copy", copy, {{"late", Copy::kLate}, {"early", Copy::kEarly}});
        c.threads = threads;
        c.block_order = choose<BlockOrder>("block_order", block_order,
                                           {{"ascending", BlockOrder::kAscending},
                                            {"descending", BlockOrder::kDescending},
                                            {"random", BlockOrder::kRandom}});
      },
      pybind11::kw_only(), "order"_a = "fifo", "seed"_a = 0, "copy"_a = "late", "threads"_a = 1,
      "block_order"_a = "ascending");
  module.def(
      "register_buffer",
      [](uintptr_t pointer, size_t bytes, std::string name, bool writable, bool initialised, size_t row_bytes,
         size_t row_stride) {
        const char* base = reinterpret_cast<const char*>(pointer);
        register_buffer({std::move(name), base, bytes, writable, initialised, row_bytes, row_stride});
      },
      "pointer"_a, "bytes"_a, "name"_a, "writable"_a = false, "initialised"_a = true, "row_bytes"_a = 0,
      "row_stride"_a = 0);
  module.def("clear_buffers", clear_buffers);
  module.def("counters", counters);
  module.def("reset_counters", reset_counters);
}

}  // namespace abba::emulation
