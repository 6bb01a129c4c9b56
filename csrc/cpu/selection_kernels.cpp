// Histograms of score keys, and masks: one pass over the scores each.
#include "selection_kernels.h"

#include "vec.h"

namespace recsparse::RS_ISA {

template <class T>
RS_INLINE int32_t key_of(T score) {
  return score_key(float_to_bits(to_float(score)));
}

template <class T>
void histogram(const T* scores, int64_t begin, int64_t end, const Digits& digits, int64_t* counts) {
  const uint64_t size = uint64_t(digits.digits);
  if (digits.of_ties) {
    for (int64_t i = begin; i < end; ++i) {
      const uint64_t digit = digits.of(key_of(scores[i]), i);
      if (digit < size) ++counts[digit];
    }
    return;
  }
  // keys first, a run at a time: that loop the compiler makes of vectors
  constexpr int64_t kRun = 256;
  int32_t keys[kRun];
  for (int64_t at = begin; at < end; at += kRun) {
    const int64_t count = end - at < kRun ? end - at : kRun;
    for (int64_t i = 0; i < count; ++i) keys[i] = key_of(scores[at + i]);
    for (int64_t i = 0; i < count; ++i) {
      const uint64_t digit = uint64_t((int64_t(keys[i]) >> digits.shift) - digits.first);
      if (digit < size) ++counts[digit];
    }
  }
}

template <class T>
void mask(const T* scores, int64_t begin, int64_t end, const Threshold& threshold, bool* mask) {
  if (!threshold.with_ties) {
    for (int64_t i = begin; i < end; ++i) mask[i] = key_of(scores[i]) > threshold.key;
    return;
  }
  for (int64_t i = begin; i < end; ++i) mask[i] = threshold.takes(key_of(scores[i]), i);
}

template <class T>
const SelectionKernels<T>& selection_kernels() {
  static constexpr SelectionKernels<T> table = {&histogram<T>, &mask<T>};
  return table;
}
RS_INSTANTIATE_KERNEL_TABLE(SelectionKernels, selection_kernels)

}  // namespace recsparse::RS_ISA
