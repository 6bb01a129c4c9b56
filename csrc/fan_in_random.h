// The random numbers of reference/fan_in.py: counters through a hash.
#pragma once

#include <cstdint>

namespace recsparse {

constexpr uint64_t kGolden = 0x9e3779b97f4a7c15u;
constexpr uint64_t kRound = 0xd1b54a32d192ed03u;
constexpr int kDrawRounds = 64;  // then the next free input is taken

// The finalizer of SplitMix64.
constexpr uint64_t split_mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

}  // namespace recsparse
