#include "probe_kernels.h"

#include "cpu/vec_math.h"

namespace recsparse::RS_ISA {
namespace {

template <class From, class To, class F>
RS_INLINE void map(const From* input, To* output, int64_t n, F f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(output + i, f(load(input + i)));
  if (i < n) store_first(output + i, f(load_first(input + i, n - i)), n - i);
}

void apply(Function function, Activation activation, const float* input, float* output, int64_t n) {
  switch (function) {
    case Function::kIdentity: return map(input, output, n, [](Vec x) { return x; });
    case Function::kExp: return map(input, output, n, [](Vec x) { return exp(x); });
    case Function::kErf: return map(input, output, n, [](Vec x) { return erf(x); });
    case Function::kSoftplus: return map(input, output, n, [](Vec x) { return softplus(x); });
    case Function::kActivate:
      return with_activation(activation, [&](auto tag) {
        map(input, output, n, [](Vec x) { return activate<decltype(tag)::value>(x); });
      });
    case Function::kActivateGrad:
      return with_activation(activation, [&](auto tag) {
        map(input, output, n, [](Vec x) { return activate_grad<decltype(tag)::value>(x); });
      });
  }
}

template <class T>
void widen(const T* input, float* output, int64_t n) {
  map(input, output, n, [](Vec x) { return x; });
}
template <class T>
void narrow(const float* input, T* output, int64_t n) {
  map(input, output, n, [](Vec x) { return x; });
}
template <class T>
void narrow_scalar(const float* input, T* output, int64_t n) {
  for (int64_t i = 0; i < n; ++i) output[i] = from_float<T>(input[i]);
}
float sum(const float* input) { return sum_lanes(load(input)); }
float max(const float* input) { return max_lanes(load(input)); }

}  // namespace

template <class T>
const ProbeKernels<T>& probe_kernels() {
  static constexpr ProbeKernels<T> table = {
      kLanes, &apply, &widen<T>, &narrow<T>, &narrow_scalar<T>, &sum, &max};
  return table;
}
RS_INSTANTIATE_KERNEL_TABLE(ProbeKernels, probe_kernels)

}  // namespace recsparse::RS_ISA
