// Stable parallel least-significant-digit radix sort of 64-bit keys by some of their bits. Being
// stable, the result does not depend on the number of threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "dispatch.h"

namespace recsparse {

// Sorts `keys` by bits [low_bit, high_bit), using `other` of the same length; returns whichever of
// the two then holds the result.
inline uint64_t* radix_sort(uint64_t* keys, uint64_t* other, int64_t count, int low_bit,
                            int high_bit) {
  constexpr int kDigitBits = 11;  // 2048 counters of 8 bytes: half of L1
  constexpr int64_t kBuckets = int64_t(1) << kDigitBits;
  constexpr int64_t kBlock = 1 << 15;  // keys a task
  constexpr int64_t kMaxBlocks = 64;   // bounds the counters to 1 MB
  const int64_t blocks = std::clamp<int64_t>(count / kBlock, 1, kMaxBlocks);
  const auto block_begin = [&](int64_t b) { return count * b / blocks; };
  Scratch<int64_t> counters(blocks * kBuckets);
  const int passes = (high_bit - low_bit + kDigitBits - 1) / kDigitBits;
  for (int pass = 0; pass < passes; ++pass) {
    // the digits of one sort are equally wide: two of 10 bits rather than 11 and 9
    const int begin_bit = low_bit + (high_bit - low_bit) * pass / passes;
    const int end_bit = low_bit + (high_bit - low_bit) * (pass + 1) / passes;
    const int64_t buckets = int64_t(1) << (end_bit - begin_bit);
    const auto digit = [&](uint64_t key) { return int64_t(key >> begin_bit) & (buckets - 1); };
    parallel_for(blocks, 1, [&](int64_t first, int64_t last) {
      for (int64_t b = first; b < last; ++b) {
        int64_t* counts = counters.get() + b * kBuckets;
        std::fill(counts, counts + buckets, 0);
        for (int64_t i = block_begin(b); i < block_begin(b + 1); ++i) ++counts[digit(keys[i])];
      }
    });
    int64_t next = 0;
    for (int64_t d = 0; d < buckets; ++d)
      for (int64_t b = 0; b < blocks; ++b) {
        int64_t& counter = counters[b * kBuckets + d];
        const int64_t here = counter;
        counter = next;
        next += here;
      }
    parallel_for(blocks, 1, [&](int64_t first, int64_t last) {
      for (int64_t b = first; b < last; ++b) {
        int64_t* place = counters.get() + b * kBuckets;
        for (int64_t i = block_begin(b); i < block_begin(b + 1); ++i)
          other[place[digit(keys[i])]++] = keys[i];
      }
    });
    std::swap(keys, other);
  }
  return keys;
}

}  // namespace recsparse
