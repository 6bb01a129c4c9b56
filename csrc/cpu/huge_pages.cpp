// Random lookups in a large table miss the TLB as often as the cache; 2 MB pages make those misses
// rare.
#include "huge_pages.h"

#include <torch/csrc/stable/library.h>

namespace recsparse {

std::atomic<bool> outputs_on_huge_pages{true};

namespace {

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25  // Linux 6.1
#endif

// Asks for huge pages under the tensor, and where the kernel can, moves what is there already onto
// them. Values stay as they are. Returns the bytes asked for; 0 when the system declines.
int64_t use_huge_pages(const Tensor& tensor) {
  const PageRange pages = huge_pages_of(tensor);
  if (!pages.bytes || madvise(pages.begin, pages.bytes, MADV_HUGEPAGE) != 0) return 0;
  madvise(pages.begin, pages.bytes, MADV_COLLAPSE);  // refused by older kernels: new pages only
  return int64_t(pages.bytes);
}

void set_huge_pages(bool outputs) { outputs_on_huge_pages = outputs; }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(recsparse, CPU, m) {
  m.impl("use_huge_pages", TORCH_BOX(&use_huge_pages));
}

STABLE_TORCH_LIBRARY_IMPL(recsparse, CompositeExplicitAutograd, m) {
  m.impl("set_huge_pages", TORCH_BOX(&set_huge_pages));
}

}  // namespace recsparse
