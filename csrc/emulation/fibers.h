// A stack and a place to go on, for as many threads as a block has on one OS thread.
#pragma once
#include <cstddef>
#if !defined(__x86_64__) || defined(ABBA_EMULATION_UCONTEXT)
#include <ucontext.h>
#endif

namespace abba::emulation {

#if defined(__x86_64__) && !defined(ABBA_EMULATION_UCONTEXT)
using Context = void*;  // the stack pointer; the registers are on the stack
#else
using Context = ucontext_t;  // thirty times slower: every change asks the system for the signal mask
#endif

// Makes a context that runs entry on this stack when it is changed to. It must never return.
void start_on(Context& context, unsigned char* stack, size_t bytes, void (*entry)());

// Leaves one context, to go on there when somebody changes to it, for another one.
void change(Context& from, Context& to);

}  // namespace abba::emulation
