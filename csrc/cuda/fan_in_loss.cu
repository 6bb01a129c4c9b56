// Multi-label losses of fixed fan-in layers on CUDA: loss, gradients, and the fused optimizer step.
// Labels go in chunks: a tile of logits becomes its loss terms and its gradient at once, and where
// labels share inputs the gradient of its weights too (fan_in_fused.h). The gradients of a chunk,
// [labels, B], are used while they are in L2. [B, O] never exists.
#include <cassert>
#include <limits>
#include <tuple>
#include <vector>

#include "../fan_in.h"
#include "fan_in_fused.h"

namespace recsparse {
namespace {

using torch::stable::contiguous;
using torch::stable::new_empty;

struct LossArguments {
  FanInSizes size;
  int kind;
  double factor;  // of the reduction
};

LossArguments check_loss(const Tensor& input, const Tensor& weight, const Tensor& indices,
                         const MaybeTensor& bias, const Tensor& offsets, const Tensor& labels,
                         int64_t kind, int64_t reduction, int64_t group_size) {
  const FanInSizes size = check_fan_in(input, weight, indices, bias, group_size);
  RS_CHECK_VALUE(offsets.dim() == 1 && offsets.size(0) == size.batch + 1,
                 "offsets must have shape [B + 1] = [", size.batch + 1, "]; got shape ",
                 shape_text(offsets));
  check_dim(labels, 1, "labels", "[number of positives]");
  RS_CHECK_VALUE(reduction >= 0 && reduction <= 2,
                 "reduction must be 0 (mean), 1 (sum) or 2 (batchmean); got ", reduction);
  RS_CHECK_VALUE(kind == kBce || kind == kSquaredHinge,
                 "kind must be 0 (BCE) or 1 (squared hinge); got ", kind);
  const int64_t count = reduction == 0   ? size.batch * size.out_features
                        : reduction == 1 ? 1
                                         : size.batch;
  return {size, int(kind), count ? 1.0 / double(count) : std::numeric_limits<double>::quiet_NaN()};
}

const float* scalar(const Stream& stream, const Tensor& t) {
  check_dtype(t, ScalarType::Float, "grad_loss");
  RS_CHECK_VALUE(t.numel() == 1, "grad_loss must be a scalar; got shape ", shape_text(t));
  return data<float>(stream, t);
}

// The positives of the batch; bits of a chunk.
class Positives {
 public:
  Positives(const Stream& stream, const FanInSizes& size, const Tensor& offsets,
            const Tensor& labels, int64_t most_labels)
      : stream_(stream),
        batch_(size.batch),
        words_(ceil_div(size.batch, 32)),
        offsets_(contiguous(offsets)),
        labels_(checked_indices(stream, "labels", contiguous(labels), size.out_features, "")),
        bits_(stream, most_labels * words_) {
    check_offsets_of_positives();
  }
  int64_t words() const { return words_; }

  const uint32_t* of(const FanInChunk& chunk) const {
    const int64_t count = chunk.labels * words_, positives = labels_.numel();
    launch(stream_, "fan_in_clear_positives", clear_words_kernel, {ceil_div(count, kLabelThreads)},
           {kLabelThreads}, 0, bits_.get(), count);
    with_index_type(offsets_.scalar_type(), "offsets", [&](auto offset_tag) {
      with_index_type(labels_.scalar_type(), "labels", [&](auto label_tag) {
        using Offset = typename decltype(offset_tag)::type;
        using Label = typename decltype(label_tag)::type;
        launch(stream_, "fan_in_mark_positives", mark_positives_kernel<Offset, Label>,
               {ceil_div(positives, kLabelThreads)}, {kLabelThreads}, 0,
               data<Offset>(stream_, offsets_), data<Label>(stream_, labels_), batch_, positives,
               chunk.first_label, chunk.labels, words_, bits_.get());
      });
    });
    return bits_.get();
  }

 private:
  void check_offsets_of_positives() const {
    if (check_indices_mode() == CheckIndices::kNone) return;
    with_index_type(offsets_.scalar_type(), "offsets", [&](auto tag) {
      using Offset = typename decltype(tag)::type;
      const Offset* p = data<Offset>(stream_, offsets_);
#ifdef RS_CUDA_ON_CPU
      bool ordered = p[0] == 0 && p[batch_] == labels_.numel();
      for (int64_t b = 0; b < batch_; ++b) ordered &= p[b] <= p[b + 1];
      RS_CHECK_VALUE(ordered,
                     "offsets must start at 0, never decrease and end at the number of labels, ",
                     labels_.numel(), "; got offsets[0] = ", int64_t(p[0]),
                     ", offsets[-1] = ", int64_t(p[batch_]));
#else
      launch(stream_, "fan_in_assert_positives", assert_positives_kernel<Offset>,
             {ceil_div(batch_ + 1, kLabelThreads)}, {kLabelThreads}, 0, p, batch_,
             labels_.numel());
#endif
    });
  }

  const Stream& stream_;
  const int64_t batch_, words_;
  const Tensor offsets_, labels_;
  const Scratch<uint32_t> bits_;
};

// Slopes below 6e-5 lose digits in float16; those of the cross entropy are at most 1.
template <class T>
float grad_scale(int kind) {
  return std::is_same_v<T, f16> && kind == kBce ? 4096.0f : 1.0f;
}

template <class T>
struct LossOutputs {  // null: not wanted
  float* loss = nullptr;
  const Tensor* grad_input = nullptr;
  std::optional<Endings<T>> endings;
};

// One pass over the labels.
template <class T>
void loss_pass(const Stream& stream, const LossArguments& loss, const Tensor& input,
               const Tensor& weight, const Tensor& indices, const MaybeTensor& bias,
               const Tensor& offsets, const Tensor& labels, const float* grad_loss, float factor,
               int64_t budget, const LossOutputs<T>& out) {
  const FanInTiles<T> tiles(stream, loss.size, &input, &weight, indices, bias ? &*bias : nullptr);
  const std::optional<FusedSizes> fused =
      out.endings ? fused_sizes(stream, tiles) : std::optional<FusedSizes>();
  // an update must leave the weights to the gradient of the input
  const bool keeps = fused && out.grad_input && out.endings->weight.kind != kEndStore;
  const bool stores = fused ? bool(out.grad_input) : out.grad_input || out.endings;
  const int64_t kept = keeps ? tiles.layer().fan_in : 0;
  const auto chunks = tiles.chunks_within(budget, kept);
  const int64_t most = FanInTiles<T>::most_labels(chunks);
  const int64_t sums_of_tile = fused ? 1 : tiles.across(), all = tiles.count() * sums_of_tile;
  const Positives positives(stream, loss.size, offsets, labels, most);
  const Scratch<T> grad(stream, stores ? most * tiles.layer().pitch : 0);
  const Scratch<T> old(stream, most * kept);
  const Scratch<double> sums(stream, out.loss ? all : 0);
  std::optional<InputGradient<T>> total;
  if (out.grad_input) total.emplace(stream, tiles, chunks, budget);
  for (const FanInChunk& chunk : chunks) {
    LossTerms<T> terms;
    terms.positives = positives.of(chunk);
    terms.words = positives.words();
    terms.first_label = chunk.first_label;
    terms.kind = loss.kind;
    terms.grad_scale = grad_scale<T>(loss.kind);
    terms.grad = stores ? grad.get() : nullptr;
    terms.sums = out.loss ? sums.get() + chunk.first_tile * sums_of_tile : nullptr;
    if constexpr (sizeof(T) == 2) {
      if (fused) {
        fused_pass<T>(stream, tiles, *fused, chunk, terms, *out.endings,
                      keeps ? old.get() : nullptr);
        if (total) total->add(chunk, grad.get(), keeps ? old.get() : nullptr);
        continue;
      }
    }
    tiles.logits("fan_in_loss", chunk.first_tile, chunk.tiles, terms);
    if (total) total->add(chunk, grad.get());  // before the step changes the weights
    if (out.endings)
      end_gradients<T>(stream, tiles, chunk, grad.get(), out.endings->weight, out.endings->bias);
  }
  if (total) total->write(*out.grad_input, grad_loss, factor);
  if (out.loss)
    launch(stream, "fan_in_sum_losses", sum_losses_kernel, {1}, {1024}, 0,
           static_cast<const double*>(sums.get()), loss.size.batch ? all : int64_t(0), loss.factor,
           out.loss);
}

Tensor scalar_tensor(const Tensor& like) {
  return new_empty(like, std::vector<int64_t>{}, ScalarType::Float);
}

// Of the gradients; 0 where there is nothing to add up.
template <class T>
float grad_factor(const LossArguments& loss) {
  if (loss.size.batch * loss.size.out_features == 0) return 0.0f;
  return float(loss.factor / double(grad_scale<T>(loss.kind)));
}

Tensor fan_in_loss(const Tensor& input, const Tensor& weight, const Tensor& indices,
                   const MaybeTensor& bias, const Tensor& offsets, const Tensor& labels,
                   int64_t kind, int64_t reduction, int64_t group_size) {
  const LossArguments loss =
      check_loss(input, weight, indices, bias, offsets, labels, kind, reduction, group_size);
  const Stream stream(input);
  const Tensor x = contiguous(input), w = contiguous(weight);
  const Tensor columns =
      checked_indices(stream, "indices", contiguous(indices), loss.size.in_features, "");
  const MaybeTensor offset = contiguous_or_none(bias);
  Tensor result = scalar_tensor(input);
  with_float_type(input.scalar_type(), "input", [&](auto tag) {
    using T = typename decltype(tag)::type;
    LossOutputs<T> out;
    out.loss = mutable_data<float>(stream, result);
    loss_pass<T>(stream, loss, x, w, columns, offset, offsets, labels, nullptr, 1.0f,
                 bytes_of(x) + bytes_of(w) + bytes_of(columns), out);
  });
  return result;
}

std::tuple<Tensor, Tensor, Tensor> fan_in_loss_grad(const Tensor& grad_loss, const Tensor& input,
                                                    const Tensor& weight, const Tensor& indices,
                                                    const MaybeTensor& bias, const Tensor& offsets,
                                                    const Tensor& labels, int64_t kind,
                                                    int64_t reduction, int64_t group_size,
                                                    bool input_grad, bool weight_grad) {
  const LossArguments loss =
      check_loss(input, weight, indices, bias, offsets, labels, kind, reduction, group_size);
  const FanInSizes& size = loss.size;
  const Stream stream(input);
  const float* scale = scalar(stream, grad_loss);
  const Tensor x = contiguous(input), w = contiguous(weight);
  const Tensor columns =
      checked_indices(stream, "indices", contiguous(indices), size.in_features, "");
  const MaybeTensor offset = contiguous_or_none(bias);
  const bool bias_grad = weight_grad && bias;
  Tensor grad_input =
      input_grad ? new_empty(input, {size.batch, size.in_features}) : new_empty(input, {0});
  Tensor grad_weight =
      weight_grad ? new_empty(weight, {size.out_features, size.fan_in}) : new_empty(weight, {0});
  Tensor grad_bias = bias_grad ? new_empty(weight, {size.out_features}) : new_empty(weight, {0});
  with_float_type(input.scalar_type(), "input", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const float factor = grad_factor<T>(loss);
    LossOutputs<T> out;
    if (input_grad) out.grad_input = &grad_input;
    if (weight_grad) {
      Ending<T> ending;
      ending.grad_loss = scale;
      ending.factor = factor;
      out.endings.emplace(Endings<T>{ending, std::nullopt});
      out.endings->weight.out = mutable_data<T>(stream, grad_weight);
      if (bias_grad) {
        ending.out = mutable_data<T>(stream, grad_bias);
        out.endings->bias = ending;
      }
    }
    if (input_grad || weight_grad)
      loss_pass<T>(stream, loss, x, w, columns, offset, offsets, labels, scale, factor,
                   bytes_of(x) + bytes_of(w) + bytes_of(columns) + bytes_of(grad_weight), out);
  });
  return {grad_input, grad_weight, grad_bias};
}

std::tuple<Tensor, Tensor> fan_in_loss_step(
    const Tensor& grad_loss, const Tensor& input, const Tensor& weight, const Tensor& indices,
    const MaybeTensor& bias, const Tensor& offsets, const Tensor& labels,
    const std::vector<Tensor>& state, int64_t kind, int64_t reduction, int64_t group_size,
    bool input_grad, int64_t optimizer, double lr, double weight_decay, double beta1, double beta2,
    double eps, int64_t step, bool stochastic_rounding, int64_t seed) {
  const LossArguments loss =
      check_loss(input, weight, indices, bias, offsets, labels, kind, reduction, group_size);
  const FanInStep arguments{optimizer, lr,   weight_decay,        beta1, beta2,
                            eps,       step, stochastic_rounding, seed};
  check_step(arguments, weight, bias, state);
  const FanInSizes& size = loss.size;
  const Stream stream(input);
  const float* scale = scalar(stream, grad_loss);
  const Tensor x = contiguous(input);
  const Tensor columns =
      checked_indices(stream, "indices", contiguous(indices), size.in_features, "");
  Tensor result = scalar_tensor(input);
  Tensor grad_input =
      input_grad ? new_empty(input, {size.batch, size.in_features}) : new_empty(input, {0});
  with_float_type(input.scalar_type(), "input", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const float factor = grad_factor<T>(loss);
    LossOutputs<T> out;
    out.loss = mutable_data<float>(stream, result);
    if (input_grad) out.grad_input = &grad_input;
    out.endings.emplace(step_endings<T>(stream, arguments, weight, bias, state, scale, factor));
    loss_pass<T>(stream, loss, x, weight, columns, bias, offsets, labels, scale, factor,
                 bytes_of(x) + bytes_of(weight) + bytes_of(columns), out);
  });
  return {result, grad_input};
}

}  // namespace

RS_CUDA_OPS(m) {
  m.impl("fan_in_loss", TORCH_BOX(&fan_in_loss));
  m.impl("fan_in_loss_grad", TORCH_BOX(&fan_in_loss_grad));
  m.impl("fan_in_loss_step", TORCH_BOX(&fan_in_loss_step));
}

}  // namespace recsparse
