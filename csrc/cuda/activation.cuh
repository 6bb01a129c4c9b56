// The fused activations on float32 (csrc/activation.h), and their slopes. NaN passes through all.
#pragma once

#include <cmath>
#include <cstdint>

#include "../activation.h"
#include "types.h"

namespace recsparse {

__device__ __forceinline__ float logistic(float x) { return 1.0f / (1.0f + expf(-x)); }

__device__ __forceinline__ float activate(float x, Activation activation) {
  switch (activation) {
    case Activation::kRelu: return x <= 0.0f ? 0.0f : x;
    case Activation::kGelu: return 0.5f * x * (1.0f + erff(x * 0.7071067811865476f));
    case Activation::kSilu: return x * logistic(x);
    case Activation::kSigmoid: return logistic(x);
    case Activation::kTanh: return tanhf(x);
    default: return x;
  }
}

// d activate(x) / dx
__device__ __forceinline__ float slope(float x, Activation activation) {
  switch (activation) {
    case Activation::kRelu: return x > 0.0f ? 1.0f : 0.0f;
    case Activation::kGelu:
      return 0.5f * (1.0f + erff(x * 0.7071067811865476f)) +
             x * expf(-0.5f * x * x) * 0.3989422804014327f;
    case Activation::kSilu: {
      const float s = logistic(x);
      return s * (1.0f + x * (1.0f - s));
    }
    case Activation::kSigmoid: {
      const float s = logistic(x);
      return s * (1.0f - s);
    }
    case Activation::kTanh: {
      const float y = tanhf(x);
      return 1.0f - y * y;
    }
    default: return 1.0f;
  }
}

// The same from y = activate(x): ReLU, sigmoid and tanh.
__device__ __forceinline__ float slope_of_output(float y, Activation activation) {
  switch (activation) {
    case Activation::kRelu: return y > 0.0f ? 1.0f : 0.0f;
    case Activation::kSigmoid: return y * (1.0f - y);
    case Activation::kTanh: return 1.0f - y * y;
    default: return 1.0f;
  }
}

// Over the elements of an array; the choice is made once for all of them.
template <int kCount, class F>
__device__ __forceinline__ void each_with(Activation activation, F f) {
#define RS_EACH(code)                                        \
  case Activation::code:                                     \
    for (int i = 0; i < kCount; ++i) f(i, Activation::code); \
    break;
  switch (activation) {
    RS_EACH(kRelu)
    RS_EACH(kGelu)
    RS_EACH(kSilu)
    RS_EACH(kSigmoid)
    RS_EACH(kTanh)
    default:
      for (int i = 0; i < kCount; ++i) f(i, Activation::kNone);
  }
#undef RS_EACH
}

}  // namespace recsparse
