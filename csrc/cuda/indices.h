// What kernels do about indices out of range (recsparse_kernels.set_check_indices), without a host
// sync.
#pragma once

#include <cstdint>

#include "launch.h"

namespace recsparse {

// raise: a device-side assertion, as torch's own embedding has (where kernels run on the CPU: an
// IndexError). clamp: the nearest valid index. none: used as they are. Kernels must be memory-safe
// in any case: an index out of range reads nothing and writes nothing.
enum class CheckIndices : int64_t { kRaise = 0, kClamp = 1, kNone = 2 };
CheckIndices check_indices_mode();

// The indices (int16, int32 or int64, contiguous) to use, each in [0, size) unless the mode is
// none. `what` follows the range in the message.
Tensor checked_indices(const Stream& stream, const char* name, const Tensor& indices, int64_t size,
                       const char* what = ", the rows of the table");

// Raises likewise unless the offsets of bags begin at 0, do not descend and do not pass `count`.
void check_offsets(const Stream& stream, const Tensor& offsets, int64_t count);

}  // namespace recsparse
