#include "fibers.h"

#if defined(__x86_64__) && !defined(ABBA_EMULATION_UCONTEXT)

// Saves the registers that a call preserves on the stack, and the stack pointer in *from; goes on at the one in to.
extern "C" void abba_switch_stack(void** from, void* to);
asm(R"(
.text
.globl abba_switch_stack
.hidden abba_switch_stack
.type abba_switch_stack, @function
abba_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size abba_switch_stack, . - abba_switch_stack
)");

namespace abba::emulation {

void start_on(Context& context, unsigned char* stack, size_t bytes, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + bytes - 64);
  *--top = nullptr;  // where entry's caller would be
  *--top = reinterpret_cast<void*>(entry);
  context = top - 6;  // the six registers
}

void change(Context& from, Context& to) { abba_switch_stack(&from, to); }

}  // namespace abba::emulation

#else

namespace abba::emulation {

void start_on(Context& context, unsigned char* stack, size_t bytes, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = bytes;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}

void change(Context& from, Context& to) { swapcontext(&from, &to); }

}  // namespace abba::emulation

#endif
