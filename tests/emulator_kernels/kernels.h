#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace abba {

// Runs the kernel of this name in kernels.cu. Throws std::out_of_range where there is none.
void run_kernel(const std::string& name, const std::vector<uintptr_t>& pointers, const std::vector<int>& sizes);

}  // namespace abba
