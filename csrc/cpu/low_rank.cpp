// Low-rank linear and DCN-v2 cross layers, CPU: checks, allocation, packing and threads.
//
// Forward: pack both factors, then tasks own rows. Few rows: no packing, tasks own ranks and then
// output columns. Backward: tasks own rows for the gradients of the inputs and of mid, then columns
// of the weights for the sums over the batch, so that no sum depends on the number of threads.
#include "../low_rank.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "dispatch.h"
#include "huge_pages.h"
#include "low_rank_common.h"
#include "low_rank_kernels.h"

namespace recsparse {
namespace {

// Below this many rows, products straight from the row-major weights beat packing them first.
constexpr int64_t kFewRows = 8;
template <class T>
void run_forward(LowRankForward<T> p, const Tensor& down, const Tensor& up) {
  const LowRankKernels<T>& kernels = low_rank_kernels<T>();
  if (p.batch == 0) return;
  if (p.batch < kFewRows) {
    Scratch<float> mid(p.batch * round_up(p.rank, kernels.panel));
    parallel_for(p.rank, grain(p.batch * p.in_features), [&](int64_t begin, int64_t end) {
      kernels.forward_few_mid(p, begin, end, mid.get());
    });
    parallel_for(p.out_features, grain(p.batch * p.rank), [&](int64_t begin, int64_t end) {
      Scratch<float> sums(p.batch * kernels.column_block);
      kernels.forward_few_output(p, begin, end, mid.get(), sums.get());
    });
    return;
  }
  Panels<T> down_panels(down, true, p.in_features, p.rank);
  Panels<T> up_panels(up, true, p.rank, p.out_features);
  pack_all(kernels.panel * (p.in_features + p.rank), down_panels, up_panels);
  p.down_panels = down_panels.get();
  p.up_panels = up_panels.get();
  parallel_for(p.batch, grain(p.rank * (p.in_features + p.out_features)),
               [&](int64_t begin, int64_t end) {
                 Scratch<float> scratch(kernels.forward_scratch(p));
                 kernels.forward_rows(p, begin, end, scratch.get());
               });
}

std::tuple<Tensor, Tensor> low_rank_linear(const Tensor& input, const Tensor& down,
                                           const Tensor& up, const std::optional<Tensor>& mid_bias,
                                           const std::optional<Tensor>& bias,
                                           int64_t mid_activation, int64_t activation,
                                           bool keep_mid) {
  const LowRankSizes size = check_low_rank_linear(input, down, up, mid_bias, bias);
  check_activation(mid_activation, "mid_activation");
  check_activation(activation, "activation");
  return with_float_type(input.scalar_type(), "input", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Tensor x = torch::stable::contiguous(input), d = torch::stable::contiguous(down),
                 u = torch::stable::contiguous(up);
    const std::optional<Tensor> mb = contiguous(mid_bias), b = contiguous(bias);
    Tensor output = empty_2d(input, size.batch, size.out_features);
    expect_first_touch(output);
    Tensor mid = empty_2d(input, keep_mid ? size.batch : 0, size.rank);
    LowRankForward<T> p{.batch = size.batch,
                        .in_features = size.in_features,
                        .rank = size.rank,
                        .out_features = size.out_features,
                        .input = data<T>(x),
                        .x0 = nullptr,
                        .down = data<T>(d),
                        .up = data<T>(u),
                        .mid_bias = optional_data<T>(mb),
                        .bias = optional_data<T>(b),
                        .down_panels = nullptr,
                        .up_panels = nullptr,
                        .mid_activation = Activation(mid_activation),
                        .activation = Activation(activation),
                        .mid = keep_mid ? mutable_data<T>(mid) : nullptr,
                        .output = mutable_data<T>(output)};
    run_forward(p, d, u);
    return std::make_tuple(output, mid);
  });
}

std::tuple<Tensor, Tensor> low_rank_cross(const Tensor& x0, const Tensor& x, const Tensor& down,
                                          const Tensor& up, const std::optional<Tensor>& bias,
                                          bool keep_mid) {
  const LowRankSizes size = check_low_rank_cross(x0, x, down, up, bias);
  return with_float_type(x.scalar_type(), "x", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Tensor first = torch::stable::contiguous(x0), input = torch::stable::contiguous(x),
                 d = torch::stable::contiguous(down), u = torch::stable::contiguous(up);
    const std::optional<Tensor> b = contiguous(bias);
    Tensor output = empty_2d(x, size.batch, size.out_features);
    expect_first_touch(output);
    Tensor mid = empty_2d(x, keep_mid ? size.batch : 0, size.rank);
    LowRankForward<T> p{.batch = size.batch,
                        .in_features = size.in_features,
                        .rank = size.rank,
                        .out_features = size.out_features,
                        .input = data<T>(input),
                        .x0 = data<T>(first),
                        .down = data<T>(d),
                        .up = data<T>(u),
                        .mid_bias = nullptr,
                        .bias = optional_data<T>(b),
                        .down_panels = nullptr,
                        .up_panels = nullptr,
                        .mid_activation = Activation::kNone,
                        .activation = Activation::kNone,
                        .mid = keep_mid ? mutable_data<T>(mid) : nullptr,
                        .output = mutable_data<T>(output)};
    run_forward(p, d, u);
    return std::make_tuple(output, mid);
  });
}

struct LowRankGrads {
  Tensor x0, input, down, up, mid_bias, bias;
};

// The gradients that `needs` names, the others empty. `p` comes with sizes, inputs and activations.
template <class T>
LowRankGrads run_backward(LowRankBackward<T> p, const T* input, const Tensor& down,
                          const Tensor& up, int64_t needs, const Tensor& like) {
  const LowRankKernels<T>& kernels = low_rank_kernels<T>();
  const auto empty = [&](int64_t bit, int64_t rows, int64_t columns) {
    return (needs & bit) ? empty_2d(like, rows, columns) : torch::stable::new_empty(like, {0});
  };
  const auto empty_vector = [&](int64_t bit, int64_t n) {
    return torch::stable::new_empty(like, {(needs & bit) ? n : 0});
  };
  LowRankGrads grads{
      empty(kNeedsX0, p.batch, p.out_features), empty(kNeedsInput, p.batch, p.in_features),
      empty(kNeedsDown, p.rank, p.in_features), empty(kNeedsUp, p.out_features, p.rank),
      empty_vector(kNeedsMidBias, p.rank),      empty_vector(kNeedsBias, p.out_features)};
  const bool cross = p.x0 != nullptr;
  const bool again = cross ? (needs & kNeedsX0) != 0
                           : p.activation == Activation::kGelu || p.activation == Activation::kSilu;
  const bool wants_up = (needs & (kNeedsUp | kNeedsBias)) != 0;

  Panels<T> up_panels(up, false, p.out_features, p.rank);
  Panels<T> up_again(up, true, p.rank, p.out_features, again);
  Panels<T> down_panels(down, false, p.rank, p.in_features, (needs & kNeedsInput) != 0);
  pack_all(kernels.panel * p.rank, up_panels, up_again, down_panels);

  const int64_t mid_row = round_up(p.rank, kernels.panel);
  Scratch<float> mid_active(p.batch * mid_row), grad_mid(p.batch * mid_row);
  // What the second pass reads: grad_output itself, or (cross) times x0, or a copy times act'.
  const bool keeps_pre = wants_up && !cross && p.activation != Activation::kNone;
  Tensor grad_pre = empty_2d(like, keeps_pre ? p.batch : 0, p.out_features);
  p.up_panels = up_panels.get();
  p.up_panels_again = up_again.get();
  p.down_panels = down_panels.get();
  p.grad_input = (needs & kNeedsInput) ? mutable_data<T>(grads.input) : nullptr;
  p.grad_x0 = (needs & kNeedsX0) ? mutable_data<T>(grads.x0) : nullptr;
  p.grad_pre = keeps_pre ? mutable_data<T>(grad_pre) : nullptr;
  p.mid_active = mid_active.get();
  p.grad_mid = grad_mid.get();
  parallel_for(p.batch, grain(p.rank * (p.in_features + p.out_features)),
               [&](int64_t begin, int64_t end) {
                 Scratch<float> scratch(kernels.backward_scratch(p));
                 kernels.backward_rows(p, begin, end, scratch.get());
               });

  const LowRankColumns<T> up_columns{
      .batch = p.batch,
      .rank = p.rank,
      .columns = p.out_features,
      .factor = p.mid_active,
      .source = keeps_pre ? p.grad_pre : p.grad_output,
      .source_scale = p.x0,
      .out_by_column = true,
      .out = (needs & kNeedsUp) ? mutable_data<T>(grads.up) : nullptr,
      .column_sum = (needs & kNeedsBias) ? mutable_data<T>(grads.bias) : nullptr};
  const LowRankColumns<T> down_columns{
      .batch = p.batch,
      .rank = p.rank,
      .columns = p.in_features,
      .factor = p.grad_mid,
      .source = input,
      .source_scale = nullptr,
      .out_by_column = false,
      .out = (needs & kNeedsDown) ? mutable_data<T>(grads.down) : nullptr,
      .column_sum = nullptr};
  const auto blocks = [&](bool wanted, int64_t n) {
    return wanted ? round_up(n, kernels.column_block) / kernels.column_block : 0;
  };
  const int64_t up_blocks = blocks(wants_up, p.out_features);
  const int64_t down_blocks = blocks((needs & kNeedsDown) != 0, p.in_features);
  parallel_for(up_blocks + down_blocks, grain(p.rank * p.batch * kernels.column_block),
               [&](int64_t begin, int64_t end) {
                 Scratch<float> scratch(kernels.columns_scratch(up_columns));
                 for (int64_t i = begin; i < end; ++i) {
                   const LowRankColumns<T>& part = i < up_blocks ? up_columns : down_columns;
                   const int64_t first = (i < up_blocks ? i : i - up_blocks) * kernels.column_block;
                   const int64_t last = first + kernels.column_block;
                   kernels.columns(part, first, last < part.columns ? last : part.columns,
                                   scratch.get());
                 }
               });
  if (needs & kNeedsMidBias)
    kernels.sum_rows(grad_mid.get(), mid_row, p.batch, p.rank, mutable_data<T>(grads.mid_bias));
  return grads;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> low_rank_linear_grad(
    const Tensor& grad_output, const Tensor& input, const Tensor& down, const Tensor& up,
    const Tensor& mid, const std::optional<Tensor>& bias, const std::optional<Tensor>& output,
    int64_t mid_activation, int64_t activation, int64_t needs) {
  const LowRankSizes size = check_low_rank_linear(input, down, up, std::nullopt, bias);
  check_activation(mid_activation, "mid_activation");
  check_activation(activation, "activation");
  check_same_shape(grad_output, "grad_output", size.batch, size.out_features, input);
  check_same_shape(mid, "mid", size.batch, size.rank, input);
  const bool from_output = Activation(activation) == Activation::kRelu ||
                           Activation(activation) == Activation::kSigmoid ||
                           Activation(activation) == Activation::kTanh;
  RS_CHECK_VALUE(!from_output || output,
                 "output must be given for ReLU, sigmoid and tanh; got None");
  if (output) check_same_shape(*output, "output", size.batch, size.out_features, input);
  return with_float_type(input.scalar_type(), "input", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Tensor g = torch::stable::contiguous(grad_output), x = torch::stable::contiguous(input),
                 d = torch::stable::contiguous(down), u = torch::stable::contiguous(up),
                 m = torch::stable::contiguous(mid);
    const std::optional<Tensor> b = contiguous(bias), y = contiguous(output);
    LowRankBackward<T> p{};
    p.batch = size.batch;
    p.in_features = size.in_features;
    p.rank = size.rank;
    p.out_features = size.out_features;
    p.grad_output = data<T>(g);
    p.mid = data<T>(m);
    p.bias = optional_data<T>(b);
    p.output = optional_data<T>(y);
    p.mid_activation = Activation(mid_activation);
    p.activation = Activation(activation);
    LowRankGrads grads = run_backward<T>(p, data<T>(x), d, u, needs & ~int64_t(kNeedsX0), input);
    return std::make_tuple(grads.input, grads.down, grads.up, grads.mid_bias, grads.bias);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> low_rank_cross_grad(
    const Tensor& grad_output, const Tensor& x0, const Tensor& x, const Tensor& down,
    const Tensor& up, const Tensor& mid, const std::optional<Tensor>& bias, int64_t needs) {
  const LowRankSizes size = check_low_rank_cross(x0, x, down, up, bias);
  check_same_shape(grad_output, "grad_output", size.batch, size.out_features, x);
  check_same_shape(mid, "mid", size.batch, size.rank, x);
  return with_float_type(x.scalar_type(), "x", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Tensor g = torch::stable::contiguous(grad_output), input = torch::stable::contiguous(x),
                 first = torch::stable::contiguous(x0), d = torch::stable::contiguous(down),
                 u = torch::stable::contiguous(up), m = torch::stable::contiguous(mid);
    const std::optional<Tensor> b = contiguous(bias);
    LowRankBackward<T> p{};
    p.batch = size.batch;
    p.in_features = size.in_features;
    p.rank = size.rank;
    p.out_features = size.out_features;
    p.grad_output = data<T>(g);
    p.x0 = data<T>(first);
    p.mid = data<T>(m);
    p.bias = optional_data<T>(b);
    LowRankGrads grads =
        run_backward<T>(p, data<T>(input), d, u, needs & ~int64_t(kNeedsMidBias), x);
    return std::make_tuple(grads.x0, grads.input, grads.down, grads.up, grads.bias);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(recsparse, CPU, m) {
  m.impl("low_rank_linear", TORCH_BOX(&low_rank_linear));
  m.impl("low_rank_linear_grad", TORCH_BOX(&low_rank_linear_grad));
  m.impl("low_rank_cross", TORCH_BOX(&low_rank_cross));
  m.impl("low_rank_cross_grad", TORCH_BOX(&low_rank_cross_grad));
}

}  // namespace recsparse
