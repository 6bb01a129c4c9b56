// Cooperating fibres: each has a stack of its own, and runs until it switches to another.
#pragma once

#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace cuda_on_cpu {

class Fibre {
 public:
  // On x86-64 a switch is a dozen instructions; swapcontext makes two system calls.
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  // Begins at entry(), on the given stack, when first switched to. entry must never return.
  void prepare(std::byte* stack, size_t bytes, void (*entry)());
};

// Stores where the running fibre is in `from` and continues `to`.
void switch_fibre(Fibre& from, Fibre& to);

}  // namespace cuda_on_cpu
