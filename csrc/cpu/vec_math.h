// exp, log1p, erf and the activations on Vec, written once for every instruction level.
#pragma once

#include "vec.h"

namespace recsparse {
namespace RS_ISA {

// e^x: x = n ln2 + r, |r| <= ln2/2, Taylor of degree 7 in r (relative error under 1e-8, below
// float32 rounding). Overflows to infinity, underflows through subnormals to 0, NaN stays NaN.
RS_INLINE Vec exp(Vec x) {
  const Vec clamped = min(broadcast(128.0f), max(broadcast(-150.0f), x * broadcast(1.44269504f)));
  const Vec n = round_to_int(clamped);
  Vec r =
      fnmadd(n, broadcast(0.693359375f), x);  // ln2 in two parts, the first exact for |n| < 2^13
  r = fnmadd(n, broadcast(-2.12194440e-4f), r);
  r = min(broadcast(0.4f), max(broadcast(-0.4f), r));  // only matters where the result saturates
  Vec p = broadcast(1.98412698e-4f);
  p = fmadd(p, r, broadcast(1.38888889e-3f));
  p = fmadd(p, r, broadcast(8.33333333e-3f));
  p = fmadd(p, r, broadcast(4.16666667e-2f));
  p = fmadd(p, r, broadcast(1.66666667e-1f));
  p = fmadd(p, r, broadcast(0.5f));
  p = fmadd(p * r, r, r) + broadcast(1.0f);
  return select(is_nan(x), x, scale_by_power(p, n));
}

RS_INLINE Vec sigmoid(Vec x) { return broadcast(1.0f) / (broadcast(1.0f) + exp(zero() - x)); }

// log(1 + u) for u in [0, 1], as in log1p(e^-|x|): 2 atanh(s), s = u / (2 + u) <= 1/3, odd series
// to s^15 (truncation under 1e-9).
RS_INLINE Vec log1p_unit(Vec u) {
  const Vec s = u / (broadcast(2.0f) + u);
  const Vec s2 = s * s;
  Vec p = broadcast(1.0f / 15.0f);
  p = fmadd(p, s2, broadcast(1.0f / 13.0f));
  p = fmadd(p, s2, broadcast(1.0f / 11.0f));
  p = fmadd(p, s2, broadcast(1.0f / 9.0f));
  p = fmadd(p, s2, broadcast(1.0f / 7.0f));
  p = fmadd(p, s2, broadcast(1.0f / 5.0f));
  p = fmadd(p, s2, broadcast(1.0f / 3.0f));
  const Vec two_s = s + s;
  return fmadd(p * s2, two_s, two_s);
}

RS_INLINE Vec abs(Vec x) { return max(x, zero() - x); }

// softplus(x) = log(1 + e^x) = max(x, 0) + log1p(e^-|x|)
RS_INLINE Vec softplus(Vec x) { return max(zero(), x) + log1p_unit(exp(zero() - abs(x))); }

// tanh(x): a minimax polynomial in x^2 for |x| < 0.625 (coefficients of Cephes' tanhf), else
// sign(x) (1 - 2 / (e^{2|x|} + 1)), whose cancellation is harmless from there on.
RS_INLINE Vec tanh(Vec x) {
  const Vec a = abs(x);
  const Vec x2 = x * x;
  Vec p = broadcast(-5.70498872745e-3f);
  p = fmadd(p, x2, broadcast(2.06390887954e-2f));
  p = fmadd(p, x2, broadcast(-5.37397155531e-2f));
  p = fmadd(p, x2, broadcast(1.33314422036e-1f));
  p = fmadd(p, x2, broadcast(-3.33332819422e-1f));
  const Vec small = fmadd(p * x2, x, x);
  const Vec big = broadcast(1.0f) - broadcast(2.0f) / (exp(a + a) + broadcast(1.0f));
  const Vec signed_big = select(less(x, zero()), zero() - big, big);
  return select(less(a, broadcast(0.625f)), small, select(is_nan(x), x, signed_big));
}

// erf by Abramowitz & Stegun 7.1.26 is only 1.5e-7 absolute, too coarse near 0; so |x| < 1 uses
// the Taylor series (to x^19) and the rest 1 - e^{-x^2} P(t), 7.1.26.
RS_INLINE Vec erf(Vec x) {
  const Vec a = abs(x);
  const Vec x2 = x * x;
  Vec p = broadcast(-1.4503852223e-7f);
  p = fmadd(p, x2, broadcast(1.4589169000931e-6f));
  p = fmadd(p, x2, broadcast(-1.3227513227513e-5f));
  p = fmadd(p, x2, broadcast(1.0683760683760e-4f));
  p = fmadd(p, x2, broadcast(-7.5757575757576e-4f));
  p = fmadd(p, x2, broadcast(4.6296296296296e-3f));
  p = fmadd(p, x2, broadcast(-2.3809523809524e-2f));
  p = fmadd(p, x2, broadcast(0.1f));
  p = fmadd(p, x2, broadcast(-0.333333333333f));
  const Vec two_over_sqrt_pi = broadcast(1.1283791670955f);
  const Vec small = two_over_sqrt_pi * fmadd(p * x2, x, x);
  const Vec t = broadcast(1.0f) / fmadd(broadcast(0.3275911f), a, broadcast(1.0f));
  Vec q = broadcast(1.061405429f);
  q = fmadd(q, t, broadcast(-1.453152027f));
  q = fmadd(q, t, broadcast(1.421413741f));
  q = fmadd(q, t, broadcast(-0.284496736f));
  q = fmadd(q, t, broadcast(0.254829592f));
  const Vec big = fnmadd(q * t, exp(zero() - x2), broadcast(1.0f));
  const Vec signed_big = select(less(x, zero()), zero() - big, big);
  return select(less(a, broadcast(1.0f)), small, select(is_nan(x), x, signed_big));
}

template <Activation kActivation>
RS_INLINE Vec activate(Vec x) {
  if constexpr (kActivation == Activation::kRelu) return max(zero(), x);  // NaN stays NaN
  if constexpr (kActivation == Activation::kGelu)
    return broadcast(0.5f) * x * (broadcast(1.0f) + erf(x * broadcast(0.70710678118655f)));
  if constexpr (kActivation == Activation::kSilu) return x * sigmoid(x);
  if constexpr (kActivation == Activation::kSigmoid) return sigmoid(x);
  if constexpr (kActivation == Activation::kTanh) return tanh(x);
  return x;
}

// d activate(x) / dx, x the pre-activation.
template <Activation kActivation>
RS_INLINE Vec activate_grad(Vec x) {
  const Vec one = broadcast(1.0f);
  if constexpr (kActivation == Activation::kRelu) return select(less(zero(), x), one, zero());
  if constexpr (kActivation == Activation::kGelu) {
    const Vec cdf = broadcast(0.5f) * (one + erf(x * broadcast(0.70710678118655f)));
    const Vec pdf = broadcast(0.39894228040143f) * exp(broadcast(-0.5f) * x * x);
    return fmadd(x, pdf, cdf);
  }
  if constexpr (kActivation == Activation::kSilu) {
    const Vec s = sigmoid(x);
    return s * fmadd(x, one - s, one);
  }
  if constexpr (kActivation == Activation::kSigmoid) {
    const Vec s = sigmoid(x);
    return s * (one - s);
  }
  if constexpr (kActivation == Activation::kTanh) {
    const Vec t = tanh(x);
    return fnmadd(t, t, one);
  }
  return one;
}

// Calls f(std::integral_constant-like tag) with the activation as a template argument.
template <Activation kActivation>
struct ActivationTag {
  static constexpr Activation value = kActivation;
};
template <class F>
RS_INLINE void with_activation(Activation activation, F f) {
  switch (activation) {
    case Activation::kNone: return f(ActivationTag<Activation::kNone>());
    case Activation::kRelu: return f(ActivationTag<Activation::kRelu>());
    case Activation::kGelu: return f(ActivationTag<Activation::kGelu>());
    case Activation::kSilu: return f(ActivationTag<Activation::kSilu>());
    case Activation::kSigmoid: return f(ActivationTag<Activation::kSigmoid>());
    case Activation::kTanh: return f(ActivationTag<Activation::kTanh>());
  }
}

}  // namespace RS_ISA
}  // namespace recsparse
