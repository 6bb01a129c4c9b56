// What sm90.cpp needs of the machine, and gives to it. Kernels see neither.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#include "clocks.h"
#include "machine.h"

namespace cuda_on_cpu {

// What is known of one byte of shared memory.
struct Shadow {
  enum : uint8_t {
    kGapByte,
    kUninitialised,
    kCopyPending,
    kBulkPending,
    kBarrier,
    kInitialised
  } state = kGapByte;
  static constexpr int16_t kNobody = -1, kAtomics = -2, kManyInAWarp = -3, kMany = -4, kCopy = -5;
  int16_t writer = kNobody, reader = kNobody;
  int16_t reader_warp = 0;
  uint8_t barrier = 0;  // of a bulk copy that wrote it, in the phase write_time
  uint32_t write_epoch = 0, write_warp_epoch = 0, write_time = 0;
  uint32_t write_fences = 0;  // fence_proxy_async by the writer so far
  uint32_t read_epoch = 0, read_warp_epoch = 0, read_time = 0;
};

// ---- of the machine ----

// For the length of a call of the machine by a kernel: what is accessed in it is not checked.
class Inside {
 public:
  Inside();
  ~Inside();

 private:
  bool before_;
};

Clocks& clocks();
size_t self();           // the running thread
size_t block_threads();  // of the block
uint32_t block_epoch();
// Blocks the running thread until ready().
void wait_until(Site site, const char* what, std::function<bool()> ready);
size_t shared_offset(const void* shared);
std::byte* shared_at(size_t offset);
Shadow& shadow_at(size_t offset);

// ---- of sm90.cpp ----

void sm90_begin_block();
const char* sm90_end_thread(bool last);  // why the running thread may not end, or null
bool sm90_deliver(uint64_t which);       // ends one of the bulk copies under way, if there are any
uint32_t sm90_fences(size_t thread);     // fence_proxy_async so far
bool sm90_reads();                       // whether asynchronous reads are recorded
void sm90_check_write(size_t offset, size_t bytes);  // nothing asynchronous may still read it
bool sm90_is_sum(uintptr_t p, size_t bytes);         // of a product under way of the running thread

}  // namespace cuda_on_cpu
