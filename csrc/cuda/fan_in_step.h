// The optimizer step of fixed fan-in layers, host side: from the ops' arguments to Endings.
#pragma once

#include <optional>
#include <vector>

#include "../fan_in.h"
#include "../fan_in_random.h"
#include "fan_in_grad_kernels.cuh"

namespace recsparse {

struct FanInStep {  // the optimizer arguments of the ops, in their order
  int64_t optimizer;
  double lr, weight_decay, beta1, beta2, eps;
  int64_t step;
  bool stochastic_rounding;
  int64_t seed;

  int64_t moments() const {
    RS_CHECK_VALUE(optimizer >= 0 && optimizer <= 2,
                   "optimizer must be 0 (SGD), 1 (Adam) or 2 (AdamW); got ", optimizer);
    return optimizer != kEndSgd ? 2 : beta1 != 0.0 ? 1 : 0;
  }
};

// 1 - beta^step; by squaring, since pow would ask for a newer libm than manylinux_2_28
inline double bias_correction(double beta, int64_t step) {
  double power = 1.0;
  for (; step > 0; step >>= 1, beta *= beta)
    if (step & 1) power *= beta;
  return 1.0 - power;
}

// Checks what an update in place asks of the tensors.
inline void check_step(const FanInStep& step, const Tensor& weight, const MaybeTensor& bias,
                       const std::vector<Tensor>& state) {
  check_in_place(weight, "weight");
  if (bias) check_in_place(*bias, "bias");
  check_fan_in_state(state, step.moments(), weight, bias);
  RS_CHECK_TYPE(!step.stochastic_rounding || weight.scalar_type() == ScalarType::BFloat16,
                "stochastic_rounding needs a bfloat16 weight; got ",
                dtype_text(weight.scalar_type()));
}

template <class T>
struct Endings {
  Ending<T> weight;
  std::optional<Ending<T>> bias;
};

// The endings of a step that check_step has checked.
template <class T>
Endings<T> step_endings(const Stream& stream, const FanInStep& step, const Tensor& weight,
                        const MaybeTensor& bias, const std::vector<Tensor>& state,
                        const float* grad_loss, float factor) {
  const bool adam = step.optimizer != kEndSgd;
  const uint64_t key = split_mix(uint64_t(step.seed) + uint64_t(step.step) * kGolden);
  Ending<T> ending;
  ending.kind = int(step.optimizer);
  ending.moments = int(step.moments());
  ending.lr = float(adam ? step.lr / bias_correction(step.beta1, step.step) : step.lr);
  ending.decay =
      float(step.optimizer == kEndAdamW ? 1.0 - step.lr * step.weight_decay : step.weight_decay);
  ending.beta1 = float(step.beta1);
  ending.beta2 = float(step.beta2);
  ending.rest1 = float(1.0 - step.beta1);
  ending.rest2 = float(1.0 - step.beta2);
  ending.eps = float(step.eps);
  ending.correction = adam ? float(bias_correction(step.beta2, step.step)) : 1.0f;
  ending.decays = step.weight_decay != 0.0;
  ending.rounds = step.stochastic_rounding;
  ending.key_low = uint32_t(key);
  ending.key_high = uint32_t(key >> 32);
  ending.grad_loss = grad_loss;
  ending.factor = factor;
  Endings<T> both{ending, std::nullopt};
  const auto place = [&](Ending<T>& e, const Tensor& parameter, size_t first_state) {
    e.out = mutable_data<T>(stream, parameter);
    if (e.moments >= 1) e.first = mutable_data<float>(stream, state[first_state]);
    if (e.moments == 2) e.second = mutable_data<float>(stream, state[first_state + 1]);
  };
  place(both.weight, weight, 0);
  if (bias) {
    both.bias = ending;
    both.bias->number = weight.numel();  // its elements are numbered after the weight's
    place(*both.bias, *bias, size_t(ending.moments));
  }
  return both;
}

}  // namespace recsparse
