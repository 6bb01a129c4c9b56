// The CUDA language for kernels that are compiled as C++ and run by machine.h. What is missing here
// (__activemask, inline PTX, clusters) does not compile; add it with its checks.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "machine.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

// ---- vectors ----
#define RS_VECTOR_TYPE(T, name, bytes)                               \
  struct name##2 {                                                   \
    alignas(2 * bytes) T x;                                          \
    T y;                                                             \
  };                                                                 \
  struct name##3 { T x, y, z; };                                     \
  struct name##4 {                                                   \
    alignas(4 * bytes > 16 ? 16 : 4 * bytes) T x;                    \
    T y, z, w;                                                       \
  };                                                                 \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }         \
  inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; } \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
RS_VECTOR_TYPE(int, int, 4)
RS_VECTOR_TYPE(unsigned, uint, 4)
RS_VECTOR_TYPE(float, float, 4)
RS_VECTOR_TYPE(short, short, 2)
RS_VECTOR_TYPE(unsigned short, ushort, 2)
RS_VECTOR_TYPE(double, double, 8)
RS_VECTOR_TYPE(long long, longlong, 8)
RS_VECTOR_TYPE(unsigned long long, ulonglong, 8)
#undef RS_VECTOR_TYPE

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;

// ---- barriers and warp collectives ----
inline void __syncthreads(cuda_on_cpu::Site site = cuda_on_cpu::Site::current()) {
  cuda_on_cpu::barrier(site, 0, 0);
}
inline int __syncthreads_count(int p, cuda_on_cpu::Site site = cuda_on_cpu::Site::current()) {
  return cuda_on_cpu::barrier(site, p, 0);
}
inline int __syncthreads_and(int p, cuda_on_cpu::Site site = cuda_on_cpu::Site::current()) {
  return cuda_on_cpu::barrier(site, p, 1);
}
inline int __syncthreads_or(int p, cuda_on_cpu::Site site = cuda_on_cpu::Site::current()) {
  return cuda_on_cpu::barrier(site, p, 2);
}
inline void __syncwarp(unsigned mask = 0xffffffffu,
                       cuda_on_cpu::Site site = cuda_on_cpu::Site::current()) {
  cuda_on_cpu::exchange(mask, "__syncwarp", site, nullptr, 0, nullptr);
}

namespace cuda_on_cpu {
// The value of another lane, which must be one of the mask's.
template <class T>
T shuffle(unsigned mask, const char* name, Site site, T value, int source) {
  T all[32];
  exchange(mask, name, site, &value, sizeof(T), all);
  check(mask >> source & 1, "a shuffle from a lane outside its mask");
  return all[source];
}
}  // namespace cuda_on_cpu

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32,
              cuda_on_cpu::Site site = cuda_on_cpu::Site::current()) {
  const int self = cuda_on_cpu::lane();
  return cuda_on_cpu::shuffle(mask, "__shfl_sync", site, value,
                              self / width * width + lane % width);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int step, int width = 32,
                  cuda_on_cpu::Site site = cuda_on_cpu::Site::current()) {
  const int self = cuda_on_cpu::lane(), source = self ^ step;
  return cuda_on_cpu::shuffle(mask, "__shfl_xor_sync", site, value,
                              source / width > self / width ? self : source);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned step, int width = 32,
                 cuda_on_cpu::Site site = cuda_on_cpu::Site::current()) {
  const int self = cuda_on_cpu::lane();
  return cuda_on_cpu::shuffle(mask, "__shfl_up_sync", site, value,
                              self % width < int(step) ? self : self - int(step));
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned step, int width = 32,
                   cuda_on_cpu::Site site = cuda_on_cpu::Site::current()) {
  const int self = cuda_on_cpu::lane();
  return cuda_on_cpu::shuffle(mask, "__shfl_down_sync", site, value,
                              self % width + int(step) >= width ? self : self + int(step));
}

namespace cuda_on_cpu {
template <class T, class F>
T reduce(unsigned mask, const char* name, Site site, T value, F combine) {
  T all[32], result = {};
  exchange(mask, name, site, &value, sizeof(T), all);
  bool first = true;
  for (int l = 0; l < 32; ++l)
    if (mask >> l & 1) {
      result = first ? all[l] : combine(result, all[l]);
      first = false;
    }
  return result;
}
}  // namespace cuda_on_cpu

inline unsigned __ballot_sync(unsigned mask, int p,
                              cuda_on_cpu::Site site = cuda_on_cpu::Site::current()) {
  const unsigned bit = p ? 1u << cuda_on_cpu::lane() : 0u;
  return cuda_on_cpu::reduce(mask, "__ballot_sync", site, bit,
                             [](unsigned a, unsigned b) { return a | b; });
}
inline int __any_sync(unsigned mask, int p, cuda_on_cpu::Site site = cuda_on_cpu::Site::current()) {
  return cuda_on_cpu::reduce(mask, "__any_sync", site, int(p != 0),
                             [](int a, int b) { return a | b; });
}
inline int __all_sync(unsigned mask, int p, cuda_on_cpu::Site site = cuda_on_cpu::Site::current()) {
  return cuda_on_cpu::reduce(mask, "__all_sync", site, int(p != 0),
                             [](int a, int b) { return a & b; });
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value,
                          cuda_on_cpu::Site site = cuda_on_cpu::Site::current()) {
  T all[32];
  cuda_on_cpu::exchange(mask, "__match_any_sync", site, &value, sizeof(T), all);
  unsigned same = 0;
  for (int l = 0; l < 32; ++l)
    if ((mask >> l & 1) && all[l] == value) same |= 1u << l;
  return same;
}
#define RS_REDUCE(name, T, expression)                                                            \
  inline T name(unsigned mask, T value, cuda_on_cpu::Site site = cuda_on_cpu::Site::current()) {  \
    return cuda_on_cpu::reduce(mask, #name, site, value, [](T a, T b) { return T(expression); }); \
  }
RS_REDUCE(__reduce_add_sync, unsigned, a + b)
RS_REDUCE(__reduce_add_sync, int, a + b)
RS_REDUCE(__reduce_min_sync, unsigned, std::min(a, b))
RS_REDUCE(__reduce_min_sync, int, std::min(a, b))
RS_REDUCE(__reduce_max_sync, unsigned, std::max(a, b))
RS_REDUCE(__reduce_max_sync, int, std::max(a, b))
RS_REDUCE(__reduce_or_sync, unsigned, a | b)
RS_REDUCE(__reduce_and_sync, unsigned, a& b)
RS_REDUCE(__reduce_xor_sync, unsigned, a ^ b)
#undef RS_REDUCE

inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __nanosleep(unsigned) {}
[[noreturn]] inline void __trap() { cuda_on_cpu::fail("__trap"); }

// ---- memory ----
template <class T>
T __ldg(const T* p) {
  cuda_on_cpu::check_alignment(p, sizeof(T));
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return __ldg(p);
}
template <class T>
T __ldcg(const T* p) {
  return __ldg(p);
}
template <class T>
void __stcs(T* p, T value) {
  cuda_on_cpu::check_alignment(p, sizeof(T));
  *p = value;
}

#define RS_DECLARE_ATOMICS(T)  \
  T atomicAdd(T* p, T value);  \
  T atomicExch(T* p, T value); \
  T atomicMin(T* p, T value);  \
  T atomicMax(T* p, T value);  \
  T atomicOr(T* p, T value);   \
  T atomicAnd(T* p, T value);  \
  T atomicXor(T* p, T value);  \
  T atomicCAS(T* p, T expected, T value);
RS_DECLARE_ATOMICS(int)
RS_DECLARE_ATOMICS(unsigned)
RS_DECLARE_ATOMICS(unsigned long long)
#undef RS_DECLARE_ATOMICS
float atomicAdd(float* p, float value);
double atomicAdd(double* p, double value);
float atomicExch(float* p, float value);

// ---- bits ----
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(unsigned(x)); }
inline int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return x ? std::countr_zero(unsigned(x)) + 1 : 0; }
inline int __ffsll(long long x) {
  return x ? std::countr_zero(static_cast<unsigned long long>(x)) + 1 : 0;
}
inline unsigned __brev(unsigned x) {
  unsigned r = 0;
  for (int i = 0; i < 32; ++i) r |= (x >> i & 1u) << (31 - i);
  return r;
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const unsigned long long bytes = static_cast<unsigned long long>(b) << 32 | a;
  unsigned r = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned s = selector >> (4 * i) & 0xf;
    unsigned byte = unsigned(bytes >> (8 * (s & 7)) & 0xff);
    if (s & 8) byte = byte & 0x80 ? 0xff : 0;
    r |= byte << (8 * i);
  }
  return r;
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return unsigned((static_cast<unsigned long long>(high) << 32 | low) >> (shift & 31));
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return unsigned((static_cast<unsigned long long>(high) << 32 | low) << (shift & 31) >> 32);
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return unsigned(static_cast<unsigned long long>(a) * b >> 32);
}
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }

// ---- arithmetic ----
using std::isinf;
using std::isnan;
using std::max;
using std::min;
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
inline long long __float2ll_rd(float x) { return static_cast<long long>(std::floor(x)); }
inline int __float2int_rn(float x) { return int(std::nearbyint(x)); }
inline float __int2float_rn(int x) { return float(x); }
inline float __uint2float_rn(unsigned x) { return float(x); }
