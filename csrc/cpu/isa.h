// Which instruction level runs: the highest the machine has, or a lower one asked for.
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

CpuLevel cpu_level();  // in use now

#if defined(__x86_64__)
#define RS_KERNEL_TABLE(Table, table)                    \
  namespace portable {                                   \
  template <class T>                                     \
  const Table<T>& table();                               \
  }                                                      \
  namespace avx2 {                                       \
  template <class T>                                     \
  const Table<T>& table();                               \
  }                                                      \
  namespace avx512 {                                     \
  template <class T>                                     \
  const Table<T>& table();                               \
  }                                                      \
  template <class T>                                     \
  const Table<T>& table() {                              \
    switch (cpu_level()) {                               \
      case CpuLevel::kAvx512: return avx512::table<T>(); \
      case CpuLevel::kAvx2: return avx2::table<T>();     \
      default: return portable::table<T>();              \
    }                                                    \
  }
#else
#define RS_KERNEL_TABLE(Table, table) \
  namespace portable {                \
  template <class T>                  \
  const Table<T>& table();            \
  }                                   \
  template <class T>                  \
  const Table<T>& table() {           \
    return portable::table<T>();      \
  }
#endif

#define RS_INSTANTIATE_KERNEL_TABLE(Table, table) \
  template const Table<float>& table<float>();    \
  template const Table<bf16>& table<bf16>();      \
  template const Table<f16>& table<f16>();

}  // namespace recsparse
