// Detection and choice of the instruction level (isa.h).
#include "isa.h"

#include <torch/csrc/stable/library.h>

#include <atomic>
#include <bit>
#include <cstdint>

#include "../check.h"

namespace recsparse {
namespace {

bool runs_here(CpuLevel level) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (level == CpuLevel::kAvx512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (level == CpuLevel::kAvx2)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2");
#endif
  return level == CpuLevel::kPortable;
}

// Bit i: level i was built and runs on this machine.
int64_t get_cpu_levels() {
  int64_t levels = 0;
  for (const CpuLevel level : {RS_IF_PORTABLE(CpuLevel::kPortable, ) RS_IF_AVX2(CpuLevel::kAvx2, )
                                   RS_IF_AVX512(CpuLevel::kAvx512, )})
    if (runs_here(level)) levels |= int64_t{1} << static_cast<int>(level);
  return levels;
}

CpuLevel highest_cpu_level() {
  const auto levels = static_cast<uint64_t>(get_cpu_levels());
  RS_CHECK_VALUE(levels != 0,
                 "_native_cpu.so was built for instructions that this machine does not have");
  return static_cast<CpuLevel>(std::bit_width(levels) - 1);
}

std::atomic<CpuLevel>& level_in_use() {
  static std::atomic<CpuLevel> level{highest_cpu_level()};
  return level;
}

int64_t get_cpu_level() { return static_cast<int64_t>(cpu_level()); }

void set_cpu_level(int64_t level) {
  RS_CHECK_VALUE(level >= 0 && level < 63 && (get_cpu_levels() >> level & 1), "level ", level,
                 " was not built or does not run on this machine");
  level_in_use().store(static_cast<CpuLevel>(level));
}

}  // namespace

CpuLevel cpu_level() { return level_in_use().load(std::memory_order_relaxed); }

STABLE_TORCH_LIBRARY_IMPL(recsparse, CompositeExplicitAutograd, m) {
  m.impl("cpu_levels", TORCH_BOX(&get_cpu_levels));
  m.impl("cpu_level", TORCH_BOX(&get_cpu_level));
  m.impl("set_cpu_level", TORCH_BOX(&set_cpu_level));
}

}  // namespace recsparse
