// 2 MB pages, under Linux' usual setting ("madvise") only where they are asked for.
#pragma once

#include <sys/mman.h>

#include <atomic>
#include <cstdint>

#include "../check.h"

namespace recsparse {

constexpr uintptr_t kHugePage = uintptr_t(1) << 21;

struct PageRange {
  void* begin;
  uintptr_t bytes;  // 0: the tensor holds no whole page
};

// The huge pages that lie within the tensor.
inline PageRange huge_pages_of(const Tensor& tensor) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  const uintptr_t end = begin + uintptr_t(tensor.numel()) * uintptr_t(tensor.element_size());
  const uintptr_t first = (begin + kHugePage - 1) & ~(kHugePage - 1), last = end & ~(kHugePage - 1);
  if (!tensor.is_contiguous() || first >= last) return {nullptr, 0};
  return {reinterpret_cast<void*>(first), last - first};
}

// An output is often memory that malloc has just mapped, and touching that 4 KB at a time takes
// longer than computing what goes there. To be called before anything is written.
constexpr uintptr_t kLargeOutput = 2 * kHugePage;
extern std::atomic<bool> outputs_on_huge_pages;  // set_huge_pages
inline void expect_first_touch(const Tensor& output) {
  if (!outputs_on_huge_pages.load(std::memory_order_relaxed)) return;
  const PageRange pages = huge_pages_of(output);
  if (pages.bytes >= kLargeOutput) madvise(pages.begin, pages.bytes, MADV_HUGEPAGE);
}

}  // namespace recsparse
