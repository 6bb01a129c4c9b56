// The one header that names an instruction set (with its three parts vec_portable.h, vec_avx2.h and
// vec_avx512.h).
//
// Every csrc/cpu/*_kernels.cpp is compiled once per level (CMakeLists.txt) with RS_ISA set to the
// namespace of that level: portable, avx2 (AVX2 + FMA + F16C + BMI2) or avx512 (F + BW + DQ + VL).
// Kernels are written against Vec, kLanes floats wide: 16 in avx512, 8 in the others.
// Everything here is internal to a translation unit, so that no AVX-512 copy of an inline function
// can be linked into code that runs on a machine without it.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(RS_ISA_AVX512) || defined(RS_ISA_AVX2)
#include <immintrin.h>
#endif

#include "types.h"

#define RS_INLINE static inline __attribute__((always_inline))

namespace recsparse {
namespace RS_ISA {

// ---- scalar conversions -----------------------------------------------------------------------

RS_INLINE float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
RS_INLINE uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

RS_INLINE float to_float(float value) { return value; }
RS_INLINE float to_float(bf16 value) { return bits_to_float(uint32_t(value.bits) << 16); }
RS_INLINE float to_float(f16 value) {
#if defined(RS_ISA_AVX512) || defined(RS_ISA_AVX2)
  return _cvtsh_ss(value.bits);
#else
  const uint32_t sign = uint32_t(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  if (magnitude >= 0x0400u) return bits_to_float(sign | ((magnitude << 13) + (112u << 23)));
  const float subnormal = float(magnitude) * 5.9604644775390625e-8f;  // 2^-24
  return bits_to_float(sign | float_to_bits(subnormal));
#endif
}

template <class T>
RS_INLINE T from_float(float value);
template <>
inline __attribute__((always_inline)) float from_float<float>(float value) {
  return value;
}
template <>
inline __attribute__((always_inline)) bf16 from_float<bf16>(float value) {  // round to nearest even
  const uint32_t bits = float_to_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return bf16{uint16_t((bits >> 16) | 0x40u)};  // quiet NaN
  return bf16{uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
template <>
inline __attribute__((always_inline)) f16 from_float<f16>(float value) {
#if defined(RS_ISA_AVX512) || defined(RS_ISA_AVX2)
  return f16{uint16_t(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT))};
#else
  const uint32_t bits = float_to_bits(value);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return f16{uint16_t(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return f16{uint16_t(sign | 0x7c00u)};  // rounds to infinity
  if (magnitude < 0x38800000u) {  // subnormal: let the adder round at 2^-24
    const float shifted = bits_to_float(magnitude) + 0.5f;
    return f16{uint16_t(sign | (float_to_bits(shifted) - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return f16{uint16_t(sign | ((rounded - (112u << 23)) >> 13))};
#endif
}

// ---- fewer lanes than Vec -----------------------------------------------------------------------

// kWidth floats as the compiler's own vector (1: a plain float); + - * work lane by lane.
template <int kWidth>
struct NarrowOf {
  typedef float type __attribute__((vector_size(4 * kWidth)));
};
template <>
struct NarrowOf<1> {
  typedef float type;
};
template <int kWidth>
using Narrow = typename NarrowOf<kWidth>::type;

template <int kWidth>
RS_INLINE Narrow<kWidth> load_narrow(const float* p) {
  Narrow<kWidth> a;
  std::memcpy(&a, p, sizeof(a));
  return a;
}
template <int kWidth>
RS_INLINE void store_narrow(float* p, Narrow<kWidth> a) {
  std::memcpy(p, &a, sizeof(a));
}

}  // namespace RS_ISA
}  // namespace recsparse

#if defined(RS_ISA_AVX512)
#include "vec_avx512.h"
#elif defined(RS_ISA_AVX2)
#include "vec_avx2.h"
#else
#include "vec_portable.h"
#endif
