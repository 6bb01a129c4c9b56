// Masked embedding tables: what every backend's kernels agree on; free of torch.
//
//   W[i, d] = values[start(i) + rank(i, d)] if bit d of row i is set, else 0
//
//   layout            where row i is                                      bytes a row, besides
//   values bitmask           rows[i] = mask bytes, uint32 start                  ceil(D/8) + 4
//   fixed_k           rows[i] = mask bytes; start = i k                   ceil(D/8)
//   row_remap         rows[i / 64] = uint64 occupied, uint32 rank         12 / 64, and for a row
//   that is
//                     starts[rank], columns[start ...] uint8                not empty 4 + 1 a value
//   bitmask records   starts[i]: mask bytes and values side by side       ceil(D/8) + 4 and padding
//   fixed_k records   the same at a constant stride                       ceil(D/8) and padding
//
// A 32-bit start counts from bases[i / 65536], so that tables of more than 2^32 values cost no
// more. Mask bit d is bit d % 8 of byte d / 8. In row_remap i of starts is the row's rank among the
// rows that are not empty.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define RS_HOST_DEVICE __host__ __device__
#else
#define RS_HOST_DEVICE
#endif

namespace recsparse {

enum class MaskedLayout : int {
  kBitmask,
  kFixedK,
  kRowRemap,
  kBitmaskRecords,
  kFixedKRecords,
};

constexpr int kBaseShift = 16;  // rows that share a 64-bit base: 2^16, so starts fit 32 bits
// In a start of bitmask records: the record ends in another 64-byte line than it begins in.
constexpr uint32_t kCrossesLine = uint32_t(1) << 31;
constexpr int64_t kMaxMaskedDim = 32768;  // 2^16 rows of it, mask included, stay below 2^32
constexpr int64_t kRemapBlockBytes = 12;  // uint64 occupied, uint32 rank
constexpr int64_t kMaxRemapDim = 256;     // 8-bit column ids

// Values of the ops' `mode`; kEach: every index is a bag of its own, padding is looked up.
enum class BagMode : int64_t { kSum = 0, kMean = 1, kMax = 2, kEach = 3 };

// Values of the ops' `optimizer`.
enum class MaskedOptimizer : int64_t { kSgd = 0, kRowAdagrad = 1, kAdam = 2 };

// The looked-up rows, in bags: bag b is indices[offsets[b] : offsets[b + 1]], or without offsets
// indices[b L : (b + 1) L].
struct Bags {
  const void* indices;
  const void* offsets;  // null: fixed length
  bool wide_indices, wide_offsets;
  bool last_offset;  // the offsets have an entry for the end of the last bag
  int64_t count;     // N indices
  int64_t bags;
  int64_t length;       // without offsets
  int64_t padding_idx;  // -1: none
  bool mean;
  const float* weights;  // one for each index, or null

  RS_HOST_DEVICE int64_t index(int64_t j) const {
    return wide_indices ? static_cast<const int64_t*>(indices)[j]
                        : static_cast<const int32_t*>(indices)[j];
  }
  RS_HOST_DEVICE int64_t begin(int64_t b) const {
    if (!offsets) return b * length;
    if (b == bags && !last_offset) return count;
    return wide_offsets ? static_cast<const int64_t*>(offsets)[b]
                        : static_cast<const int32_t*>(offsets)[b];
  }
  RS_HOST_DEVICE int64_t end(int64_t b) const { return begin(b + 1); }
};

}  // namespace recsparse
