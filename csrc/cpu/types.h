// Types shared by the torch-facing files and the kernels; free of torch and of instruction sets.
#pragma once

#include <cstdint>

namespace recsparse {

// Storage only: arithmetic is done in float32.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// Values of the `activation` argument of the ops (recsparse_kernels/ops/_activation.py).
enum class Activation : int64_t {
  kNone = 0,
  kRelu = 1,
  kGelu = 2,
  kSilu = 3,
  kSigmoid = 4,
  kTanh = 5,
};

}  // namespace recsparse
