#pragma once

// Launches the kernel of this name in wrappers.cu with threads * blocks threads and waits for it. A pointer that the kernel
// does not use may be null. Returns a cudaError_t, or -1 if there is no such kernel.
extern "C" int run_wrapper(const char* name, const void* a, const void* b, void* out, int blocks, int threads);
