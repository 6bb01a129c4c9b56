// The hash behind random numbers and the order of ties: the finalizer of SplitMix64.
#pragma once

#include <cstdint>

namespace recsparse {

constexpr uint64_t split_mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

}  // namespace recsparse
