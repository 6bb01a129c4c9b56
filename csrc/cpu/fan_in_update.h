// The optimizer step of one chunk of labels, right after its gradient is known.
#pragma once

#include <vector>

#include "../fan_in_random.h"
#include "fan_in_chunks.h"

namespace recsparse {

struct FanInStep {  // the optimizer arguments of the ops, in their order
  int64_t optimizer;
  double lr, weight_decay, beta1, beta2, eps;
  int64_t step;
  bool stochastic_rounding;
  int64_t seed;
};

// 1 / (1 - beta^step); by squaring, since pow would ask for a newer libm than manylinux_2_28
inline float bias_correction(double beta, int64_t step) {
  double power = 1.0;
  for (; step > 0; step >>= 1, beta *= beta)
    if (step & 1) power *= beta;
  return float(1.0 / (1.0 - power));
}

inline int64_t moments_of(const FanInStep& step) {
  RS_CHECK_VALUE(step.optimizer >= 0 && step.optimizer <= 2,
                 "optimizer must be 0 (SGD), 1 (Adam) or 2 (AdamW); got ", step.optimizer);
  if (step.optimizer != FanInOptimizer::kSgd) return 2;
  return step.beta1 != 0.0 ? 1 : 0;
}

template <class T>
class FanInUpdate {
 public:
  FanInUpdate(const FanInSizes& size, const FanInStep& step, const Tensor& weight,
              const std::optional<Tensor>& bias, const std::vector<Tensor>& state)
      : size_(size),
        optimizer_{FanInOptimizer::Kind(step.optimizer),
                   float(step.lr),
                   float(step.weight_decay),
                   float(step.beta1),
                   float(step.beta2),
                   float(step.eps),
                   bias_correction(step.beta1, step.step),
                   bias_correction(step.beta2, step.step)},
        weight_(mutable_data<T>(weight)),
        bias_(bias ? mutable_data<T>(*bias) : nullptr),
        stochastic_(step.stochastic_rounding),
        key_(split_mix(uint64_t(step.seed) + uint64_t(step.step) * kGolden)) {
    check_in_place(weight, "weight");
    if (bias) check_in_place(*bias, "bias");
    const int64_t moments = moments_of(step);
    check_fan_in_state(state, moments, weight, bias);
    RS_CHECK_TYPE(!stochastic_ || weight.scalar_type() == ScalarType::BFloat16,
                  "stochastic_rounding needs a bfloat16 weight; got ",
                  dtype_text(weight.scalar_type()));
    for (int64_t i = 0; i < moments; ++i) {
      weight_state_[i] = mutable_data<float>(state[i]);
      if (bias) bias_state_[i] = mutable_data<float>(state[moments + i]);
    }
  }

  // `chunk` holds labels [begin, end); the gradients are [labels, F] and [labels].
  void apply(FanInChunk<T>& chunk, int64_t begin, int64_t end, const float* grad_weight,
             const float* grad_bias) const {
    const int64_t first = begin * size_.fan_in;
    apply_to(chunk.weight(), grad_weight, (end - begin) * size_.fan_in, first, weight_ + first,
             weight_state_, first);
    if (bias_)  // its elements are numbered after the weight's
      apply_to(chunk.bias(), grad_bias, end - begin, begin, bias_ + begin, bias_state_,
               size_.out_features * size_.fan_in + begin);
  }

 private:
  void apply_to(float* values, const float* grad, int64_t count, int64_t at, T* target,
                float* const* state, int64_t number) const {
    const auto& kernels = fan_in_kernels<T>();
    kernels.update(optimizer_, grad, count, values, state[0] ? state[0] + at : nullptr,
                   state[1] ? state[1] + at : nullptr);
    if (static_cast<void*>(values) == static_cast<void*>(target)) return;
    if (stochastic_)
      kernels.narrow_stochastic(values, count, number, key_, target);
    else
      kernels.narrow(values, count, target);
  }

  const FanInSizes size_;
  const FanInOptimizer optimizer_;
  T* const weight_;
  T* const bias_;
  float* weight_state_[2] = {};
  float* bias_state_[2] = {};
  const bool stochastic_;
  const uint64_t key_;
};

}  // namespace recsparse
