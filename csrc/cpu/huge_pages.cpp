// Random lookups in a large table miss the TLB as often as the cache; 2 MB pages make those misses
// rare. Under Linux' usual setting ("madvise") memory gets them only where it was asked for.
#include <sys/mman.h>
#include <torch/csrc/stable/library.h>

#include <cstdint>

#include "../check.h"

namespace recsparse {
namespace {

constexpr uintptr_t kHugePage = uintptr_t(1) << 21;
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25  // Linux 6.1
#endif

// Asks for huge pages under the tensor, and where the kernel can, moves what is there already onto
// them. Values stay as they are. Returns the bytes asked for; 0 when the system declines.
int64_t use_huge_pages(const Tensor& tensor) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  const uintptr_t end = begin + uintptr_t(tensor.numel()) * uintptr_t(tensor.element_size());
  const uintptr_t first = (begin + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t last = end & ~(kHugePage - 1);
  if (!tensor.is_contiguous() || first >= last) return 0;
  void* pages = reinterpret_cast<void*>(first);
  if (madvise(pages, last - first, MADV_HUGEPAGE) != 0) return 0;
  madvise(pages, last - first, MADV_COLLAPSE);  // refused by older kernels: new pages only
  return int64_t(last - first);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(recsparse, CPU, m) {
  m.impl("use_huge_pages", TORCH_BOX(&use_huge_pages));
}

}  // namespace recsparse
