// Runs CUDA kernels on the CPU, for tests: the threads of a block are fibres, blocks run one after
// the other. Kernels are the same source, compiled as C++ against cuda_runtime.h of this folder.
//
// They are compiled with -fsanitize=thread, of which only the calls that the compiler puts before
// each memory access are used (machine.cpp has its own functions for them): every access of a
// kernel is checked. An error ends the launch and is raised by it:
//   - an access outside every tensor and scratch array of the op, or a write to one it may only
//   read;
//   - a shared-memory access outside its array, of bytes nobody has written, or of bytes that a
//     cp.async under way is going to write;
//   - two threads that touch the same shared memory, one of them writing, with no barrier between
//   them;
//   - two blocks that write the same byte of a tensor, other than by atomics;
//   - a misaligned access; an index past the end of an array whose size is known, row by row;
//   - a barrier that not all live threads reach, or reach at different places;
//   - a warp collective in which not all lanes of its mask take part;
//   - a kernel that ends with copies under way.
//
// This header is all that kernels see of the machine; its state is out of their sight.
#pragma once

#include <cstddef>
#include <cstdint>
#include <source_location>
#include <string>

namespace cuda_on_cpu {

using Site = std::source_location;  // of the call in the kernel

struct Launch {
  const char* name;
  int64_t grid[3];
  int64_t block[3];
  int64_t shared_bytes;
  void (*body)(void* arguments);  // one thread
  void* arguments;
  size_t arguments_bytes;
};

// ---- the host side ----

void run(const Launch& launch);

// Memory of the op that runs: known until close_scope of the open_scope before it.
int open_scope();
void close_scope(int scope);
void register_memory(const void* begin, size_t bytes, bool writable);

enum class Order : int { kForward, kReversed, kRandom };
void set_order(Order order, uint64_t seed);  // in which order threads that can run do
void set_architecture(int architecture);     // that host code sees: 80, 90
int architecture();
std::string launched();  // names of the kernels run since the last call, each with a space after it

// ---- inside a kernel ----

[[noreturn]] void fail(const std::string& message);
void check(bool good, const char* message);
void check_alignment(const void* p, size_t bytes);

// Barrier over the block; combines the threads' values: 0 counts those that are not 0, 1 and, 2 or.
int barrier(Site site, int value, int combine);
// Gives value (bytes <= 64) to the other lanes of the mask: all[lane] for each of them on return.
void exchange(uint32_t mask, const char* name, Site site, const void* value, size_t bytes,
              void* all);
inline constexpr size_t kMaxExchange = 64;
int lane();

void* shared_array(const void* key, size_t bytes, size_t alignment);
void* dynamic_shared(size_t byte);
bool is_shared(const void* p);

enum class Access { kRead, kWrite, kAtomic };
void check_access(const void* p, size_t bytes, Access access);

// cp.async: `valid` bytes from global memory, then zeros, land in shared memory when they are
// waited for.
void copy_async(void* shared, const void* global, size_t bytes, size_t valid);
void copy_commit();
void copy_wait(int pending);

}  // namespace cuda_on_cpu
