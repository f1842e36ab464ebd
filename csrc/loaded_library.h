// Functions of libraries that this module is not linked to.
#pragma once
#include <dlfcn.h>

namespace abba {

// A function of a library that the process has loaded, RTLD_LOCAL or not; null without that library or function.
inline void* find_loaded(const char* library, const char* function) {
  void* const handle = dlopen(library, RTLD_LAZY | RTLD_NOLOAD);
  return handle ? dlsym(handle, function) : nullptr;
}

}  // namespace abba
