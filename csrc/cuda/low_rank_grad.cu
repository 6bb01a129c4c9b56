// Gradients of low-rank linear and cross layers, CUDA: checks, allocation, and which kernels run.
#include <algorithm>

#include "low_rank_launch.h"

namespace recsparse {
using namespace low_rank;

namespace {

struct Grads {
  Tensor x0, input, down, up, mid_bias, bias;
};

// grad_mid, grad_input and grad_x0 by products of their own; grad_sum is written where it is given.
template <class T>
void backward_by_products(const Stream& stream, const BackwardArguments<T>& p, int64_t rank) {
  const int64_t batch = p.grad_output.rows, columns = p.grad_output.columns;
  const auto from_mid = [&] {  // sum = act_mid(mid) up^T + bias
    Product<T> again;
    again.a = p.mid;
    again.b = p.up;
    again.bias = p.bias;
    again.load = p.mid_activation == Activation::kNone ? Load::kPlain : Load::kActivated;
    again.load_activation = p.mid_activation;
    again.e = p.grad_output.at;
    return again;
  };
  Product<T> to_mid;
  to_mid.a = p.grad_output;
  if (p.is_cross) {
    if (p.grad_x0) {
      Product<T> again = from_mid();
      again.finish = Finish::kProduct;
      again.out = p.grad_x0;
      run_product<Layout::kAlong, Layout::kAlong>(stream, again, 1);
    }
    to_mid.load = Load::kTimes;
    to_mid.factor = p.factor;
  } else if (p.factor) {
    to_mid.load = Load::kSlopeOfOutput;
    to_mid.factor = p.factor;
    to_mid.load_activation = p.activation;
  } else if (p.grad_sum) {
    Product<T> again = from_mid();
    again.finish = Finish::kGradSum;
    again.activation = p.activation;
    again.out = p.grad_sum;
    run_product<Layout::kAlong, Layout::kAlong>(stream, again, 1);
    to_mid.a = matrix<T>(p.grad_sum, batch, columns);
  }
  to_mid.b = p.up;
  to_mid.out = p.grad_mid;
  if (p.mid_activation != Activation::kNone) {
    to_mid.finish = Finish::kTimesSlope;
    to_mid.activation = p.mid_activation;
    to_mid.e = p.mid.at;
  }
  run_product<Layout::kAlong, Layout::kAcross>(stream, to_mid, kMostParts);
  if (!p.grad_input) return;
  Product<T> to_input;
  to_input.a = matrix<T>(p.grad_mid, batch, rank);
  to_input.b = p.down;
  to_input.out = p.grad_input;
  if (p.is_cross) {
    to_input.finish = Finish::kPlus;
    to_input.e = p.grad_output.at;
  }
  run_product<Layout::kAlong, Layout::kAcross>(stream, to_input, 1);
}

// The gradients that `needs` names, the others empty: of the linear layer, or of cross where x0 is
// given.
Grads backward(const LowRankSizes& size, const Tensor& grad_output_, const MaybeTensor& x0_,
               const Tensor& input_, const Tensor& down_, const Tensor& up_, const Tensor& mid_,
               const MaybeTensor& bias_, const MaybeTensor& output_, Activation mid_activation,
               Activation activation, int64_t needs) {
  const Stream stream(input_);
  return with_float_type(input_.scalar_type(), "input", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Tensor grad_output = torch::stable::contiguous(grad_output_),
                 input = torch::stable::contiguous(input_), down = torch::stable::contiguous(down_),
                 up = torch::stable::contiguous(up_), mid = torch::stable::contiguous(mid_);
    const MaybeTensor bias = contiguous(bias_), x0 = contiguous(x0_),
                      output =
                          activation == Activation::kNone ? MaybeTensor() : contiguous(output_);
    const auto wanted_2d = [&](int64_t bit, int64_t rows, int64_t columns) {
      return needs & bit ? empty_2d(input, rows, columns) : torch::stable::new_empty(input, {0});
    };
    const auto wanted = [&](int64_t bit, int64_t count) {
      return torch::stable::new_empty(input, {needs & bit ? count : 0});
    };
    Grads grads{wanted_2d(kNeedsX0, size.batch, size.out_features),
                wanted_2d(kNeedsInput, size.batch, size.in_features),
                wanted_2d(kNeedsDown, size.rank, size.in_features),
                wanted_2d(kNeedsUp, size.out_features, size.rank),
                wanted(kNeedsMidBias, size.rank),
                wanted(kNeedsBias, size.out_features)};
    const auto target = [&](int64_t bit, Tensor& grad) {
      return needs & bit ? mutable_data<T>(stream, grad) : nullptr;
    };
    const bool recomputes = activation != Activation::kNone && !output;
    const bool wants_up = needs & (kNeedsUp | kNeedsBias);
    const bool wants_down = needs & (kNeedsDown | kNeedsMidBias);
    const bool on_chip = rows_on_chip(stream, size);
    // Only where the slope follows from the sum alone: else it is taken again from its factors.
    Tensor grad_sum =
        empty_2d(input, recomputes && (wants_up || !on_chip) ? size.batch : 0, size.out_features);
    Tensor grad_mid = empty_2d(input, size.batch, size.rank);

    BackwardArguments<T> p{};
    p.grad_output = matrix(data<T>(stream, grad_output), size.batch, size.out_features);
    p.down = matrix(data<T>(stream, down), size.rank, size.in_features);
    p.up = matrix(data<T>(stream, up), size.out_features, size.rank);
    p.mid = matrix(data<T>(stream, mid), size.batch, size.rank);
    p.bias = data<T>(stream, bias);
    p.is_cross = x0.has_value();
    p.factor = data<T>(stream, p.is_cross ? x0 : output);
    p.grad_x0 = target(kNeedsX0, grads.x0);
    p.grad_input = target(kNeedsInput, grads.input);
    p.grad_sum = grad_sum.numel() ? mutable_data<T>(stream, grad_sum) : nullptr;
    p.grad_mid = mutable_data<T>(stream, grad_mid);
    p.mid_activation = mid_activation;
    p.activation = activation;
    const bool by_rows = needs & (kNeedsInput | kNeedsX0);
    if (by_rows || wants_down || p.grad_sum) {
      if (on_chip) {
        run_backward(stream, p);
      } else {
        backward_by_products(stream, p, size.rank);
      }
    }
    // Parts of a weight gradient take [S, O, R] float32: no more than [B, O] would.
    const int64_t most_parts = size.rank ? size.batch / size.rank : 1;
    if (wants_up) {
      Product<T> product;
      product.a = p.grad_sum ? matrix<T>(p.grad_sum, size.batch, size.out_features) : p.grad_output;
      if (!p.grad_sum && p.factor) {
        product.load = p.is_cross ? Load::kTimes : Load::kSlopeOfOutput;
        product.factor = p.factor;
        product.load_activation = activation;
      }
      product.b = p.mid;
      product.b_activation = mid_activation;
      product.out = target(kNeedsUp, grads.up);
      product.sums = target(kNeedsBias, grads.bias);
      run_product<Layout::kAcross, Layout::kAcross>(stream, product, most_parts);
    }
    if (wants_down) {
      Product<T> product;
      product.a = matrix<T>(p.grad_mid, size.batch, size.rank);
      product.b = matrix(data<T>(stream, input), size.batch, size.in_features);
      product.out = target(kNeedsDown, grads.down);
      product.sums = target(kNeedsMidBias, grads.mid_bias);
      run_product<Layout::kAcross, Layout::kAcross>(stream, product, most_parts);
    }
    return grads;
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> low_rank_linear_grad(
    const Tensor& grad_output, const Tensor& input, const Tensor& down, const Tensor& up,
    const Tensor& mid, const MaybeTensor& bias, const MaybeTensor& output, int64_t mid_activation,
    int64_t activation, int64_t needs) {
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
  const Grads grads = backward(size, grad_output, std::nullopt, input, down, up, mid, bias,
                               from_output ? output : MaybeTensor(), Activation(mid_activation),
                               Activation(activation), needs & ~int64_t(kNeedsX0));
  return {grads.input, grads.down, grads.up, grads.mid_bias, grads.bias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> low_rank_cross_grad(
    const Tensor& grad_output, const Tensor& x0, const Tensor& x, const Tensor& down,
    const Tensor& up, const Tensor& mid, const MaybeTensor& bias, int64_t needs) {
  const LowRankSizes size = check_low_rank_cross(x0, x, down, up, bias);
  check_same_shape(grad_output, "grad_output", size.batch, size.out_features, x);
  check_same_shape(mid, "mid", size.batch, size.rank, x);
  const Grads grads =
      backward(size, grad_output, x0, x, down, up, mid, bias, std::nullopt, Activation::kNone,
               Activation::kNone, needs & ~int64_t(kNeedsMidBias));
  return {grads.x0, grads.input, grads.down, grads.up, grads.bias};
}

}  // namespace

RS_CUDA_OPS(m) {
  m.impl("low_rank_linear_grad", TORCH_BOX(&low_rank_linear_grad));
  m.impl("low_rank_cross_grad", TORCH_BOX(&low_rank_cross_grad));
}

}  // namespace recsparse
