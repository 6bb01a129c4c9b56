// Inner loops of selection.cpp.
#pragma once

#include <cstdint>

#include "../selection_keys.h"
#include "isa.h"

namespace recsparse {

template <class T>
struct SelectionKernels {
  // of scores begin..end, added to counts [digits]
  void (*histogram)(const T* scores, int64_t begin, int64_t end, const Digits&, int64_t* counts);
  void (*mask)(const T* scores, int64_t begin, int64_t end, const Threshold&, bool* mask);
};
RS_KERNEL_TABLE(SelectionKernels, selection_kernels)

}  // namespace recsparse
