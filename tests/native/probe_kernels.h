// What the test module calls: vec.h and vec_math.h, one level at a time, on plain arrays.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace recsparse {

enum class Function : int { kIdentity, kExp, kErf, kSoftplus, kActivate, kActivateGrad };

template <class T>
struct ProbeKernels {
  int lanes;
  // output[i] = f(input[i]), whole vectors and then load_first / store_first for the rest
  void (*apply)(Function f, Activation a, const float* input, float* output, int64_t n);
  void (*widen)(const T* input, float* output, int64_t n);          // load, load_first
  void (*narrow)(const float* input, T* output, int64_t n);         // store, store_first
  void (*narrow_scalar)(const float* input, T* output, int64_t n);  // from_float
  float (*sum)(const float* input);                                 // sum_lanes
  float (*max)(const float* input);                                 // max_lanes
};
RS_KERNEL_TABLE(ProbeKernels, probe_kernels)

}  // namespace recsparse
