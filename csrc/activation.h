// Values of the `activation` argument of the ops (recsparse_kernels/ops/_activation.py).
#pragma once

#include <cstdint>

namespace recsparse {

enum class Activation : int64_t {
  kNone = 0,
  kRelu = 1,
  kGelu = 2,
  kSilu = 3,
  kSigmoid = 4,
  kTanh = 5,
};

}  // namespace recsparse
