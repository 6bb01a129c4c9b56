// Low-rank linear and DCN-v2 cross layers, CUDA: checks, allocation, and which kernels run.
#include <algorithm>

#include "../low_rank.h"
#include "low_rank_launch.h"

namespace recsparse {
using namespace low_rank;

namespace {

// Linear, or cross where x0 is given.
std::tuple<Tensor, Tensor> forward(const LowRankSizes& size, const Tensor& input_,
                                   const Tensor& down_, const Tensor& up_,
                                   const MaybeTensor& mid_bias_, const MaybeTensor& bias_,
                                   const MaybeTensor& x0_, Activation mid_activation,
                                   Activation activation, bool keep_mid) {
  const Stream stream(input_);
  return with_float_type(input_.scalar_type(), "input", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Tensor input = torch::stable::contiguous(input_), down = torch::stable::contiguous(down_),
                 up = torch::stable::contiguous(up_);
    const MaybeTensor mid_bias = contiguous(mid_bias_), bias = contiguous(bias_),
                      x0 = contiguous(x0_);
    const bool on_chip = rows_on_chip(stream, size);
    Tensor output = empty_2d(input, size.batch, size.out_features);
    Tensor mid = empty_2d(input, keep_mid || !on_chip ? size.batch : 0, size.rank);
    ForwardArguments<T> p{};
    p.input = matrix(data<T>(stream, input), size.batch, size.in_features);
    p.down = matrix(data<T>(stream, down), size.rank, size.in_features);
    p.up = matrix(data<T>(stream, up), size.out_features, size.rank);
    p.mid_bias = data<T>(stream, mid_bias);
    p.bias = data<T>(stream, bias);
    p.x0 = data<T>(stream, x0);
    p.mid = mid.numel() ? mutable_data<T>(stream, mid) : nullptr;
    p.output = mutable_data<T>(stream, output);
    p.mid_activation = mid_activation;
    p.activation = activation;
    if (on_chip) {
      run_forward(stream, p);
    } else {
      Product<T> first;
      first.a = p.input;
      first.b = p.down;
      first.bias = p.mid_bias;
      first.out = p.mid;
      run_product<Layout::kAlong, Layout::kAlong>(stream, first, kMostParts);
      Product<T> second;
      second.a = matrix<T>(p.mid, size.batch, size.rank);
      second.b = p.up;
      second.bias = p.bias;
      second.load = mid_activation == Activation::kNone ? Load::kPlain : Load::kActivated;
      second.load_activation = mid_activation;
      second.activation = activation;
      second.out = p.output;
      if (x0) {
        second.finish = Finish::kCross;
        second.e = p.x0;
        second.f = p.input.at;
      }
      run_product<Layout::kAlong, Layout::kAlong>(stream, second, 1);
    }
    return std::make_tuple(output, keep_mid ? mid : empty_2d(input, 0, size.rank));
  });
}

std::tuple<Tensor, Tensor> low_rank_linear(const Tensor& input, const Tensor& down,
                                           const Tensor& up, const MaybeTensor& mid_bias,
                                           const MaybeTensor& bias, int64_t mid_activation,
                                           int64_t activation, bool keep_mid) {
  const LowRankSizes size = check_low_rank_linear(input, down, up, mid_bias, bias);
  check_activation(mid_activation, "mid_activation");
  check_activation(activation, "activation");
  return forward(size, input, down, up, mid_bias, bias, std::nullopt, Activation(mid_activation),
                 Activation(activation), keep_mid);
}

std::tuple<Tensor, Tensor> low_rank_cross(const Tensor& x0, const Tensor& x, const Tensor& down,
                                          const Tensor& up, const MaybeTensor& bias,
                                          bool keep_mid) {
  const LowRankSizes size = check_low_rank_cross(x0, x, down, up, bias);
  return forward(size, x, down, up, std::nullopt, bias, x0, Activation::kNone, Activation::kNone,
                 keep_mid);
}

}  // namespace

RS_CUDA_OPS(m) {
  m.impl("low_rank_linear", TORCH_BOX(&low_rank_linear));
  m.impl("low_rank_cross", TORCH_BOX(&low_rank_cross));
}

}  // namespace recsparse
