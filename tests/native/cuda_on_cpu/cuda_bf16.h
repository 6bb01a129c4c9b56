// __nv_bfloat16 and __nv_bfloat162 by torch's conversions.
#pragma once

#include <torch/headeronly/util/BFloat16.h>

#include <cstdint>

#include "cuda_runtime.h"

struct __nv_bfloat16 {
  uint16_t bits;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
struct __nv_bfloat16_raw {
  uint16_t x;
};

inline float __bfloat162float(__nv_bfloat16 x) {
  return torch::headeronly::detail::f32_from_bits(x.bits);
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  return {torch::headeronly::detail::round_to_nearest_even(x)};
}
inline __nv_bfloat16 __float2bfloat16(float x) { return __float2bfloat16_rn(x); }
inline float2 __bfloat1622float2(__nv_bfloat162 x) {
  return {__bfloat162float(x.x), __bfloat162float(x.y)};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short x) { return {x}; }
