// __half and __half2 by torch's conversions.
#pragma once

#include <torch/headeronly/util/Half.h>

#include <cstdint>

#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};
struct alignas(4) __half2 {
  __half x, y;
};

inline float __half2float(__half x) {
  return torch::headeronly::detail::fp16_ieee_to_fp32_value(x.bits);
}
inline __half __float2half_rn(float x) {
  return {torch::headeronly::detail::fp16_ieee_from_fp32_value(x)};
}
inline __half __float2half(float x) { return __float2half_rn(x); }
inline float2 __half22float2(__half2 x) { return {__half2float(x.x), __half2float(x.y)}; }
inline __half2 __floats2half2_rn(float x, float y) {
  return {__float2half_rn(x), __float2half_rn(y)};
}
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }
inline __half __ushort_as_half(unsigned short x) { return {x}; }
