// Sorts and prefix sums over whole arrays on the device (CUB), behind plain functions. Nothing
// waits for the GPU; scratch memory comes from torch's allocator. Outputs must not overlap inputs.
#pragma once

#include <cstdint>

#include "launch.h"

namespace recsparse {

// Stable sort by bits [0, key_bits) of the keys; fewer bits, fewer passes. At most 2^31 - 1 pairs.
void sort_pairs(const Stream& stream, const uint32_t* keys, uint32_t* sorted_keys,
                const int32_t* values, int32_t* sorted_values, int64_t count, int key_bits);
void sort_pairs(const Stream& stream, const uint64_t* keys, uint64_t* sorted_keys,
                const int32_t* values, int32_t* sorted_values, int64_t count, int key_bits);

// out[i] = sum of in[0 .. i - 1] (exclusive) or in[0 .. i] (inclusive).
void exclusive_sum(const Stream& stream, const int32_t* in, int32_t* out, int64_t count);
void exclusive_sum(const Stream& stream, const int64_t* in, int64_t* out, int64_t count);
void inclusive_sum(const Stream& stream, const int32_t* in, int32_t* out, int64_t count);
void inclusive_sum(const Stream& stream, const int64_t* in, int64_t* out, int64_t count);

}  // namespace recsparse
