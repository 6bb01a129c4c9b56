// Exact selection of the largest of very many scores: floats as whole numbers in the same order,
// and what is counted and taken of them. For equal scores a hash of the position decides.
#pragma once

#include <cstdint>

#include "split_mix.h"

namespace recsparse {

constexpr int64_t kMostDigitBits = 12;  // a histogram of 4096 counters fits any shared memory

// The order of float32 bits: negative floats count down, -0 is 0.
constexpr int32_t score_key(uint32_t bits) {
  if (bits == 0x80000000u) bits = 0;
  return int32_t(bits >> 31 ? bits ^ 0x7fffffffu : bits);
}

// counts[d] = how many keys have key >> shift == first + d, for d in [0, digits).
struct Digits {
  bool of_ties;  // of the tie keys of scores whose key is `ties_of`; else of the keys
  int64_t ties_of;
  uint64_t first_position;  // scores[i] has the tie key split_mix(first_position + i)
  int shift;
  int64_t first, digits;

  // The digit of scores[i], whose key is given; outside [0, digits): not counted.
  constexpr uint64_t of(int32_t key, int64_t i) const {
    if (!of_ties) return uint64_t((int64_t(key) >> shift) - first);
    if (key != ties_of) return ~uint64_t(0);
    const int64_t tie = int64_t(split_mix(first_position + uint64_t(i)));
    return uint64_t(tie >> shift) - uint64_t(first);
  }
};

// Taken: keys above `key` and, of those equal to it, the ones whose tie key is at least `tie`.
struct Threshold {
  int64_t key;
  bool with_ties;
  int64_t tie;
  uint64_t first_position;

  constexpr bool takes(int32_t score, int64_t i) const {
    return score > key ||
           (with_ties && score == key && int64_t(split_mix(first_position + uint64_t(i))) >= tie);
  }
};

}  // namespace recsparse
