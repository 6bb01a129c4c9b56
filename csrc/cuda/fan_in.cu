// Fixed fan-in linear on CUDA: the layer, its gradients, the optimizer step fused into the
// weight's.
//   output[b, o] = sum_f weight[o, f] * input[b, indices[o / G, f]] + bias[o]
//   input [B, I]   weight [O, F]   indices [ceil(O / G), F]   bias [O]   output [B, O]
#include "../fan_in.h"
#include "fan_in_launch.h"
#include "fan_in_step.h"

namespace recsparse {
namespace {

using torch::stable::contiguous;
using torch::stable::new_empty;

Tensor fan_in_linear(const Tensor& input, const Tensor& weight, const Tensor& indices,
                     const MaybeTensor& bias, int64_t group_size) {
  const FanInSizes size = check_fan_in(input, weight, indices, bias, group_size);
  const Stream stream(input);
  const Tensor x = contiguous(input), w = contiguous(weight);
  const MaybeTensor offset = contiguous_or_none(bias);
  const Tensor columns =
      checked_indices(stream, "indices", contiguous(indices), size.in_features, "");
  Tensor output = new_empty(input, {size.batch, size.out_features});
  if (output.numel() == 0) return output;
  with_float_type(input.scalar_type(), "input", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const FanInTiles<T> tiles(stream, size, &x, &w, columns, offset ? &*offset : nullptr);
    tiles.logits("fan_in_linear", 0, tiles.count(),
                 StoreLogits<T>{mutable_data<T>(stream, output)});
  });
  return output;
}

Tensor fan_in_linear_grad_input(const Tensor& grad_output, const Tensor& weight,
                                const Tensor& indices, int64_t in_features, int64_t group_size) {
  check_dim(grad_output, 2, "grad_output", "[B, O]");
  check_same_dtype(grad_output, "grad_output", weight, "weight");
  const FanInSizes size = check_fan_in_layer(grad_output.size(0), in_features, grad_output.size(1),
                                             indices, group_size);
  check_fan_in_weight(size, weight);
  const Stream stream(grad_output);
  const Tensor g = contiguous(grad_output), w = contiguous(weight);
  const Tensor columns = checked_indices(stream, "indices", contiguous(indices), in_features, "");
  Tensor grad_input = new_empty(grad_output, {size.batch, in_features});
  if (grad_input.numel() == 0) return grad_input;
  with_float_type(weight.scalar_type(), "weight", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const FanInTiles<T> tiles(stream, size, nullptr, &w, columns, nullptr);
    const int64_t budget = bytes_of(g) + bytes_of(w) + bytes_of(columns);
    const auto chunks = tiles.chunks_within(budget);
    const Scratch<T> grad(stream, FanInTiles<T>::most_labels(chunks) * tiles.layer().pitch);
    InputGradient<T> total(stream, tiles, chunks, budget);
    for (const FanInChunk& chunk : chunks) {
      transpose<T>(stream, g, chunk.first_label, chunk.labels, grad.get());
      total.add(chunk, grad.get());
    }
    total.write(grad_input, nullptr, 1.0f);
  });
  return grad_input;
}

// The gradient of weight (and bias) for a chunk after the other, from grad_output.
template <class T>
void grad_weight(const Stream& stream, const FanInTiles<T>& tiles, const Tensor& grad_output,
                 int64_t budget, const Endings<T>& endings) {
  const auto chunks = tiles.chunks_within(budget);
  const Scratch<T> grad(stream, FanInTiles<T>::most_labels(chunks) * tiles.layer().pitch);
  for (const FanInChunk& chunk : chunks) {
    transpose<T>(stream, grad_output, chunk.first_label, chunk.labels, grad.get());
    end_gradients<T>(stream, tiles, chunk, grad.get(), endings.weight, endings.bias);
  }
}

Tensor fan_in_linear_grad_weight(const Tensor& grad_output, const Tensor& input,
                                 const Tensor& indices, int64_t group_size) {
  check_dim(grad_output, 2, "grad_output", "[B, O]");
  check_dim(input, 2, "input", "[B, I]");
  check_same_dtype(grad_output, "grad_output", input, "input");
  RS_CHECK_VALUE(grad_output.size(0) == input.size(0), "grad_output must have ", input.size(0),
                 " rows, as input; got shape ", shape_text(grad_output));
  const FanInSizes size =
      check_fan_in_layer(input.size(0), input.size(1), grad_output.size(1), indices, group_size);
  const Stream stream(input);
  const Tensor g = contiguous(grad_output), x = contiguous(input);
  const Tensor columns =
      checked_indices(stream, "indices", contiguous(indices), size.in_features, "");
  Tensor result = new_empty(input, {size.out_features, size.fan_in});
  if (result.numel() == 0) return result;
  with_float_type(input.scalar_type(), "input", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const FanInTiles<T> tiles(stream, size, &x, nullptr, columns, nullptr);
    Endings<T> endings;
    endings.weight.out = mutable_data<T>(stream, result);
    grad_weight<T>(stream, tiles, g, bytes_of(g) + bytes_of(columns) + bytes_of(result), endings);
  });
  return result;
}

void fan_in_linear_update(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                          const Tensor& indices, const MaybeTensor& bias,
                          const std::vector<Tensor>& state, int64_t group_size, int64_t optimizer,
                          double lr, double weight_decay, double beta1, double beta2, double eps,
                          int64_t step, bool stochastic_rounding, int64_t seed) {
  const FanInSizes size = check_fan_in(input, weight, indices, bias, group_size);
  check_same_dtype(grad_output, "grad_output", weight, "weight");
  RS_CHECK_VALUE(grad_output.dim() == 2 && grad_output.size(0) == size.batch &&
                     grad_output.size(1) == size.out_features,
                 "grad_output must have shape [", size.batch, ", ", size.out_features, "]; got ",
                 shape_text(grad_output));
  const FanInStep arguments{optimizer, lr,   weight_decay,        beta1, beta2,
                            eps,       step, stochastic_rounding, seed};
  check_step(arguments, weight, bias, state);
  const Stream stream(weight);
  const Tensor g = contiguous(grad_output), x = contiguous(input);
  const Tensor columns =
      checked_indices(stream, "indices", contiguous(indices), size.in_features, "");
  with_float_type(weight.scalar_type(), "weight", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const FanInTiles<T> tiles(stream, size, &x, nullptr, columns, nullptr);
    const auto endings = step_endings<T>(stream, arguments, weight, bias, state, nullptr, 1.0f);
    grad_weight<T>(stream, tiles, g, bytes_of(g) + bytes_of(weight) + bytes_of(columns), endings);
  });
}

}  // namespace

RS_CUDA_OPS(m) {
  m.impl("fan_in_linear", TORCH_BOX(&fan_in_linear));
  m.impl("fan_in_linear_grad_input", TORCH_BOX(&fan_in_linear_grad_input));
  m.impl("fan_in_linear_grad_weight", TORCH_BOX(&fan_in_linear_grad_weight));
  m.impl("fan_in_linear_update", TORCH_BOX(&fan_in_linear_update));
}

}  // namespace recsparse
