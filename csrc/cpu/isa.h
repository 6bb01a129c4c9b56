// Which instruction level runs: the highest that the library and the machine have, or a lower one
// asked for.
//
// A family keeps its inner loops in csrc/cpu/<family>_kernels.cpp, which CMakeLists.txt compiles
// once per level with RS_ISA naming the level's namespace, as one table of function pointers for
// each element type:
//
//   // <family>_kernels.h
//   template <class T> struct FanInKernels { void (*gather_dot)(const T* input, ...); };
//   RS_KERNEL_TABLE(FanInKernels, fan_in_kernels)
//
//   // <family>_kernels.cpp
//   namespace recsparse::RS_ISA {
//   template <class T> const FanInKernels<T>& fan_in_kernels() {
//     static constexpr FanInKernels<T> table = {&gather_dot<T>};
//     return table;
//   }
//   RS_INSTANTIATE_KERNEL_TABLE(FanInKernels, fan_in_kernels)
//   }
//
//   // <family>.cpp
//   fan_in_kernels<float>().gather_dot(...);
#pragma once

#include "types.h"

namespace recsparse {

enum class CpuLevel : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

// In use now: one that the library was built for. Throws where this machine runs none of them.
CpuLevel cpu_level();

#define RS_DECLARE_KERNEL_TABLE(level, Table, table) \
  namespace level {                                  \
  template <class T>                                 \
  const Table<T>& table();                           \
  }

// Which levels are in the library (CMakeLists.txt). A kernel file sees its own alone, so that it is
// compiled the same whichever others there are.
#if defined(RS_ISA)
#define RS_KERNEL_TABLE(Table, table) RS_DECLARE_KERNEL_TABLE(RS_ISA, Table, table)
#else
#if defined(RS_BUILDS_PORTABLE)
#define RS_IF_PORTABLE(...) __VA_ARGS__
#else
#define RS_IF_PORTABLE(...)
#endif
#if defined(RS_BUILDS_AVX2)
#define RS_IF_AVX2(...) __VA_ARGS__
#else
#define RS_IF_AVX2(...)
#endif
#if defined(RS_BUILDS_AVX512)
#define RS_IF_AVX512(...) __VA_ARGS__
#else
#define RS_IF_AVX512(...)
#endif
#define RS_KERNEL_TABLE(Table, table)                                              \
  RS_IF_PORTABLE(RS_DECLARE_KERNEL_TABLE(portable, Table, table))                  \
  RS_IF_AVX2(RS_DECLARE_KERNEL_TABLE(avx2, Table, table))                          \
  RS_IF_AVX512(RS_DECLARE_KERNEL_TABLE(avx512, Table, table))                      \
  template <class T>                                                               \
  const Table<T>& table() {                                                        \
    const CpuLevel level = cpu_level();                                            \
    RS_IF_AVX512(if (level == CpuLevel::kAvx512) return avx512::table<T>();)       \
    RS_IF_AVX2(if (level == CpuLevel::kAvx2) return avx2::table<T>();)             \
    RS_IF_PORTABLE(if (level == CpuLevel::kPortable) return portable::table<T>();) \
    __builtin_unreachable();                                                       \
  }
#endif

#define RS_INSTANTIATE_KERNEL_TABLE(Table, table) \
  template const Table<float>& table<float>();    \
  template const Table<bf16>& table<bf16>();      \
  template const Table<f16>& table<f16>();

}  // namespace recsparse
