// Types shared by the torch-facing files and the kernels; free of torch and of instruction sets.
#pragma once

#include <cstdint>

#include "../activation.h"

namespace recsparse {

// Storage only: arithmetic is done in float32.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

}  // namespace recsparse
