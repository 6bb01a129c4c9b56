// Histograms of score keys, and masks: one pass over the scores each.
#pragma once

#include "../selection_keys.h"
#include "primitives.h"

namespace recsparse {

constexpr int kSelectionThreads = 256;

template <class T>
__device__ __forceinline__ int32_t key_of(T score) {
  return score_key(__float_as_uint(to_float(score)));
}

// A block counts in shared memory [digits]. A thread adds a run of equal digits at once: scores
// that are mostly zero would otherwise wait for each other at one counter.
template <class T>
__global__ void __launch_bounds__(kSelectionThreads)
    selection_histogram_kernel(const T* scores, int64_t count, Digits digits,
                               unsigned long long* total) {
  int* counts = dynamic_shared<int>();
  for (int d = int(threadIdx.x); d < digits.digits; d += kSelectionThreads) counts[d] = 0;
  __syncthreads();
  const uint64_t size = uint64_t(digits.digits);
  uint64_t held = ~uint64_t(0);
  int run = 0;
  for (int64_t i = int64_t(blockIdx.x) * kSelectionThreads + threadIdx.x; i < count;
       i += int64_t(gridDim.x) * kSelectionThreads) {
    const uint64_t digit = digits.of(key_of(scores[i]), i);
    if (digit != held) {
      if (held < size) atomicAdd(counts + held, run);
      held = digit;
      run = 0;
    }
    ++run;
  }
  if (held < size) atomicAdd(counts + held, run);
  __syncthreads();
  for (int d = int(threadIdx.x); d < digits.digits; d += kSelectionThreads)
    if (counts[d])  // whole numbers: atomics in any order give the same
      atomicAdd(total + d, static_cast<unsigned long long>(counts[d]));
}

template <class T>
__global__ void __launch_bounds__(kSelectionThreads)
    selection_mask_kernel(const T* scores, int64_t count, Threshold threshold, bool* mask) {
  for (int64_t i = int64_t(blockIdx.x) * kSelectionThreads + threadIdx.x; i < count;
       i += int64_t(gridDim.x) * kSelectionThreads)
    mask[i] = threshold.takes(key_of(scores[i]), i);
}

}  // namespace recsparse
