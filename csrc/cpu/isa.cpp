// Detection and choice of the instruction level (isa.h).
#include "isa.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "../check.h"

namespace recsparse {
namespace {

CpuLevel highest_cpu_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return CpuLevel::kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2"))
    return CpuLevel::kAvx2;
#endif
  return CpuLevel::kPortable;
}

std::atomic<CpuLevel>& level_in_use() {
  static std::atomic<CpuLevel> level{highest_cpu_level()};
  return level;
}

int64_t get_cpu_level() { return static_cast<int64_t>(cpu_level()); }

int64_t get_highest_cpu_level() { return static_cast<int64_t>(highest_cpu_level()); }

void set_cpu_level(int64_t level) {
  RS_CHECK_VALUE(level >= 0 && level <= get_highest_cpu_level(), "level must be in [0, ",
                 get_highest_cpu_level(), "], the highest this machine runs; got ", level);
  level_in_use().store(static_cast<CpuLevel>(level));
}

}  // namespace

CpuLevel cpu_level() { return level_in_use().load(std::memory_order_relaxed); }

STABLE_TORCH_LIBRARY_IMPL(recsparse, CompositeExplicitAutograd, m) {
  m.impl("cpu_level", TORCH_BOX(&get_cpu_level));
  m.impl("highest_cpu_level", TORCH_BOX(&get_highest_cpu_level));
  m.impl("set_cpu_level", TORCH_BOX(&set_cpu_level));
}

}  // namespace recsparse
