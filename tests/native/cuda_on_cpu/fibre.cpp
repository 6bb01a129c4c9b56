#include "fibre.h"

#include <cstdint>

#if defined(__x86_64__)
// Saves the registers that a call must keep on the stack, exchanges stacks, restores. The frame of
// a fibre that has not begun is laid out by prepare() to look the same.
extern "C" void recsparse_switch_stack(void** save, void* load);
asm(R"(
.text
.p2align 4
.hidden recsparse_switch_stack
.globl recsparse_switch_stack
.type recsparse_switch_stack, @function
recsparse_switch_stack:
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
.size recsparse_switch_stack, .-recsparse_switch_stack
)");
#endif

namespace cuda_on_cpu {

#if defined(__x86_64__)

void Fibre::prepare(std::byte* stack, size_t bytes, void (*entry)()) {
  auto* top = reinterpret_cast<uintptr_t*>((reinterpret_cast<uintptr_t>(stack) + bytes) & ~15ull);
  *--top = 0;  // where entry would return to; a function begins 8 past a multiple of 16
  *--top = reinterpret_cast<uintptr_t>(entry);
  for (int i = 0; i < 6; ++i) *--top = 0;  // rbp, rbx, r12 - r15
  stack_pointer = top;
}

void switch_fibre(Fibre& from, Fibre& to) {
  recsparse_switch_stack(&from.stack_pointer, to.stack_pointer);
}

#else

void Fibre::prepare(std::byte* stack, size_t bytes, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = bytes;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}

void switch_fibre(Fibre& from, Fibre& to) { swapcontext(&from.context, &to.context); }

#endif

}  // namespace cuda_on_cpu
