// The random numbers of reference/fan_in.py: counters through a hash.
#pragma once

#include <cstdint>

#include "split_mix.h"

namespace recsparse {

constexpr uint64_t kGolden = 0x9e3779b97f4a7c15u;
constexpr uint64_t kRound = 0xd1b54a32d192ed03u;
constexpr int kDrawRounds = 64;  // then the next free input is taken

}  // namespace recsparse
