// What the float32 and the 16-bit 2:4 linear share on CUDA.
#pragma once

#include "sparse24_product.h"

namespace recsparse::sparse24 {

constexpr int64_t kFewRows = 16;  // up to which the weight's bytes are the time

template <class T>
struct LinearCall {
  const Stream& stream;
  Matrix<T> input;
  SparseWeight<T> weight;
  LinearOutput<T> to;
  int64_t elements;  // of operands and result
};

void run_linear(const LinearCall<float>& call);

}  // namespace recsparse::sparse24
