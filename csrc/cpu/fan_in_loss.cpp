// Multi-label losses over fixed fan-in logits, CPU: loss, gradients, and the fused optimizer step.
//   z[b, o] = sum_f weight[o, f] * input[b, indices[o / G, f]] + bias[o], t[b, o] = 1 at positives
//   BCE             sum log(1 + e^z) - t z
//   squared hinge   sum max(0, 1 - (2t - 1) z)^2
// A tile of logits becomes its loss terms and its gradient where it lies, in L1, and is used at
// once for the gradient to the input, the gradient to the weight and the update: [B, O] never
// exists.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <tuple>
#include <vector>

#include "../fan_in.h"
#include "fan_in_chunks.h"
#include "fan_in_update.h"

namespace recsparse {
namespace {

using torch::stable::contiguous;
using torch::stable::new_empty;
using torch::stable::new_zeros;

// The positives, as sorted distinct (panel, label, lane).
class Positives {
 public:
  Positives(const FanInPlan& plan, const Tensor& offsets, const Tensor& labels)
      : out_features_(plan.size.out_features), lanes_(plan.lanes) {
    const Tensor starts = contiguous(offsets), values = contiguous(labels);
    with_index_type(starts.scalar_type(), "offsets", [&](auto offset_tag) {
      with_index_type(values.scalar_type(), "labels", [&](auto label_tag) {
        fill(plan.size.batch, data<typename decltype(offset_tag)::type>(starts),
             data<typename decltype(label_tag)::type>(values), values.numel());
      });
    });
    std::sort(keys_.begin(), keys_.end());
    keys_.erase(std::unique(keys_.begin(), keys_.end()), keys_.end());
  }

  // f(label - first, lane) over the positives of a tile, in order.
  template <class F>
  void for_each(int64_t panel, int64_t first, int64_t labels, const F& f) const {
    const int64_t begin = (panel * out_features_ + first) * lanes_, end = begin + labels * lanes_;
    for (auto it = std::lower_bound(keys_.begin(), keys_.end(), begin);
         it != keys_.end() && *it < end; ++it)
      f((*it - begin) / lanes_, (*it - begin) % lanes_);
  }

 private:
  template <class Offset, class Label>
  void fill(int64_t batch, const Offset* offsets, const Label* labels, int64_t count) {
    bool ordered = offsets[0] == 0 && offsets[batch] == count;
    for (int64_t b = 0; b < batch; ++b) ordered &= offsets[b] <= offsets[b + 1];
    RS_CHECK_VALUE(ordered,
                   "offsets must start at 0, never decrease and end at the number of labels, ",
                   count, "; got offsets[0] = ", offsets[0], ", offsets[-1] = ", offsets[batch]);
    keys_.reserve(size_t(count));
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t i = offsets[b]; i < offsets[b + 1]; ++i) {
        const int64_t label = labels[i];
        RS_CHECK_INDEX(label >= 0 && label < out_features_, "labels must be in [0, ", out_features_,
                       "); got ", label);
        keys_.push_back((b / lanes_ * out_features_ + label) * lanes_ + b % lanes_);
      }
    }
  }

  const int64_t out_features_, lanes_;
  std::vector<int64_t> keys_;
};

void check_positives(const FanInSizes& size, const Tensor& offsets, const Tensor& labels) {
  RS_CHECK_VALUE(offsets.dim() == 1 && offsets.size(0) == size.batch + 1,
                 "offsets must have shape [B + 1] = [", size.batch + 1, "]; got shape ",
                 shape_text(offsets));
  check_dim(labels, 1, "labels", "[number of positives]");
}

double loss_scale(const FanInSizes& size, int64_t reduction) {
  RS_CHECK_VALUE(reduction >= 0 && reduction <= 2,
                 "reduction must be 0 (mean), 1 (sum) or 2 (batchmean); got ", reduction);
  const int64_t count = reduction == 0   ? size.batch * size.out_features
                        : reduction == 1 ? 1
                                         : size.batch;
  return count ? 1.0 / double(count) : std::numeric_limits<double>::quiet_NaN();
}

FanInLoss loss_kind(int64_t kind) {
  RS_CHECK_VALUE(kind == 0 || kind == 1, "kind must be 0 (BCE) or 1 (squared hinge); got ", kind);
  return FanInLoss(kind);
}

// Loss and gradient at the positives of a tile, on top of what the kernel made of it as negatives.
class PositiveTerms {
 public:
  PositiveTerms(const Positives& positives, FanInLoss kind, const float* scale)
      : positives_(positives), kind_(kind), scale_(scale) {}

  void remember(const float* logits, int64_t lanes, int64_t panel, int64_t first, int64_t labels) {
    logits_.clear();
    positives_.for_each(panel, first, labels, [&](int64_t label, int64_t lane) {
      logits_.push_back(logits[label * lanes + lane]);
    });
  }

  double correct(float* tile, int64_t lanes, int64_t panel, int64_t first, int64_t labels) const {
    double change = 0.0;
    size_t next = 0;
    positives_.for_each(panel, first, labels, [&](int64_t label, int64_t lane) {
      const float z = logits_[next++];
      float* grad = tile + label * lanes + lane;
      if (kind_ == FanInLoss::kBce) {
        change -= z;
        if (scale_) *grad -= *scale_;
      } else {
        const float wanted = margin(-z), counted = margin(z);
        change += double(wanted) * wanted - double(counted) * counted;
        if (scale_) *grad = -2.0f * wanted * *scale_;
      }
    });
    return change;
  }

 private:
  static float margin(float z) { return 1.0f + z <= 0.0f ? 0.0f : 1.0f + z; }  // NaN stays NaN

  const Positives& positives_;
  const FanInLoss kind_;
  const float* const scale_;
  std::vector<float> logits_;
};

template <class T>
struct LossOutputs {         // null: not wanted
  float* partial = nullptr;  // [slabs][panels][I][lanes]
  T* grad_weight = nullptr;
  T* grad_bias = nullptr;
  const FanInUpdate<T>* update = nullptr;
};

struct LossTask {
  FanInLoss kind;
  const float* scale;  // of the gradients, or null where there are none
  int64_t slabs;
};

// One pass over the labels; gives the sum of the loss terms.
template <class T>
double loss_pass(const FanInPlan& plan, const Tensor& input, const Tensor& weight,
                 const Tensor& indices, const std::optional<Tensor>& bias,
                 const Positives& positives, const LossTask& task, const LossOutputs<T>& out) {
  const auto& kernels = fan_in_kernels<T>();
  const FanInSizes& size = plan.size;
  const bool weight_grad = out.grad_weight || out.grad_bias || out.update;
  const bool gradients = weight_grad || out.partial;
  Scratch<float> panels = pack_panels<T>(plan, input);
  std::vector<double> loss(size_t(task.slabs), 0.0);
  std::atomic<bool> valid{true};
  parallel_for(task.slabs, 1, [&](int64_t first, int64_t last) {
    FanInChunk<T> chunk(plan, indices, data<T>(weight), data_or_null<T>(bias));
    Scratch<float> tile(kFanInTile * plan.lanes);
    FanInChunkSums<T> weight_sums(out.grad_weight, weight_grad ? plan.chunk * size.fan_in : 0);
    FanInChunkSums<T> bias_sums(out.grad_bias, weight_grad ? plan.chunk : 0);
    PositiveTerms terms(positives, task.kind, task.scale);
    for (int64_t slab = first; slab < last; ++slab) {
      float* sum = out.partial ? out.partial + slab * plan.input_elements() : nullptr;
      if (sum) std::memset(sum, 0, size_t(plan.input_elements()) * sizeof(float));
      const int64_t last_chunk = (slab + 1) * plan.chunks() / task.slabs;
      for (int64_t c = slab * plan.chunks() / task.slabs; c < last_chunk; ++c) {
        const int64_t begin = c * plan.chunk, end = plan.chunk_end(begin);
        if (!chunk.load(begin, end)) {
          valid = false;
          continue;
        }
        const int64_t place = begin * size.fan_in, elements = (end - begin) * size.fan_in;
        float* grad_weight = weight_sums.at(place);
        float* grad_bias = bias_sums.at(begin);
        if (weight_grad && plan.panels == 0) {
          std::memset(grad_weight, 0, size_t(elements) * sizeof(float));
          std::memset(grad_bias, 0, size_t(end - begin) * sizeof(float));
        }
        for (int64_t panel = 0; panel < plan.panels; ++panel) {
          const float* x = panels.get() + panel * plan.panel_elements();
          for_each_tile(begin, end, [&](int64_t label, int64_t labels) {
            const FanInTile at = chunk.tile(label, labels);
            kernels.logits(at, x, tile.get());
            terms.remember(tile.get(), plan.lanes, panel, label, labels);
            loss[size_t(slab)] += kernels.loss(task.kind, tile.get(), labels,
                                               plan.rows_of_panel(panel), plan.lanes, task.scale);
            loss[size_t(slab)] += terms.correct(tile.get(), plan.lanes, panel, label, labels);
            if (!gradients) return;
            kernels.gradients(at, x, tile.get(),
                              {sum ? sum + panel * plan.panel_elements() : nullptr,
                               weight_grad ? grad_weight + (label - begin) * size.fan_in : nullptr,
                               weight_grad ? grad_bias + (label - begin) : nullptr, panel > 0});
          });
        }
        if (out.update) out.update->apply(chunk, begin, end, grad_weight, grad_bias);
        weight_sums.write(place, elements);
        bias_sums.write(begin, end - begin);
      }
    }
  });
  if (!valid) raise_index_range(size.in_features);
  double total = 0.0;
  for (double part : loss) total += part;
  return total;
}

float scalar(const Tensor& t) {
  check_dtype(t, ScalarType::Float, "grad_loss");
  RS_CHECK_VALUE(t.numel() == 1, "grad_loss must be a scalar; got shape ", shape_text(t));
  return *data<float>(t);
}

Tensor scalar_tensor(const Tensor& like, double value) {
  Tensor t = new_empty(like, std::vector<int64_t>{}, ScalarType::Float);
  *mutable_data<float>(t) = float(value);
  return t;
}

Tensor fan_in_loss(const Tensor& input, const Tensor& weight, const Tensor& indices,
                   const std::optional<Tensor>& bias, const Tensor& offsets, const Tensor& labels,
                   int64_t kind, int64_t reduction, int64_t group_size) {
  const FanInSizes size = check_fan_in(input, weight, indices, bias, group_size);
  check_positives(size, offsets, labels);
  const double factor = loss_scale(size, reduction);
  const FanInLoss loss = loss_kind(kind);
  return with_float_type(input.scalar_type(), "input", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const FanInPlan plan(size, fan_in_kernels<T>().lanes);
    const Positives positives(plan, offsets, labels);
    const LossTask task{loss, nullptr, plan.slabs(std::numeric_limits<int64_t>::max())};
    const double total =
        loss_pass<T>(plan, contiguous(input), contiguous(weight), contiguous(indices),
                     contiguous_or_none(bias), positives, task, {});
    return scalar_tensor(input, total * factor);
  });
}

std::tuple<Tensor, Tensor, Tensor> fan_in_loss_grad(
    const Tensor& grad_loss, const Tensor& input, const Tensor& weight, const Tensor& indices,
    const std::optional<Tensor>& bias, const Tensor& offsets, const Tensor& labels, int64_t kind,
    int64_t reduction, int64_t group_size, bool input_grad, bool weight_grad) {
  const FanInSizes size = check_fan_in(input, weight, indices, bias, group_size);
  check_positives(size, offsets, labels);
  const float scale = float(scalar(grad_loss) * loss_scale(size, reduction));
  const bool bias_grad = weight_grad && bias;
  Tensor grad_input =
      input_grad ? new_zeros(input, {size.batch, size.in_features}) : new_empty(input, {0});
  Tensor grad_weight =
      weight_grad ? new_empty(weight, {size.out_features, size.fan_in}) : new_empty(weight, {0});
  Tensor grad_bias = bias_grad ? new_empty(weight, {size.out_features}) : new_empty(weight, {0});
  with_float_type(input.scalar_type(), "input", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const FanInPlan plan(size, fan_in_kernels<T>().lanes);
    const Positives positives(plan, offsets, labels);
    const LossTask task{loss_kind(kind), &scale,
                        plan.slabs(bytes_of(weight) + bytes_of(indices) + bytes_of(grad_weight))};
    Scratch<float> partial(input_grad ? task.slabs * plan.input_elements() : 0);
    LossOutputs<T> out;
    if (input_grad) out.partial = partial.get();
    if (weight_grad) out.grad_weight = mutable_data<T>(grad_weight);
    if (bias_grad) out.grad_bias = mutable_data<T>(grad_bias);
    loss_pass<T>(plan, contiguous(input), contiguous(weight), contiguous(indices),
                 contiguous_or_none(bias), positives, task, out);
    if (input_grad) unpack_slabs<T>(plan, partial.get(), task.slabs, grad_input);
  });
  return {grad_input, grad_weight, grad_bias};
}

std::tuple<Tensor, Tensor> fan_in_loss_step(
    const Tensor& grad_loss, const Tensor& input, const Tensor& weight, const Tensor& indices,
    const std::optional<Tensor>& bias, const Tensor& offsets, const Tensor& labels,
    const std::vector<Tensor>& state, int64_t kind, int64_t reduction, int64_t group_size,
    bool input_grad, int64_t optimizer, double lr, double weight_decay, double beta1, double beta2,
    double eps, int64_t step, bool stochastic_rounding, int64_t seed) {
  const FanInSizes size = check_fan_in(input, weight, indices, bias, group_size);
  check_positives(size, offsets, labels);
  const double factor = loss_scale(size, reduction);
  const float scale = float(scalar(grad_loss) * factor);
  const FanInStep arguments{optimizer, lr,   weight_decay,        beta1, beta2,
                            eps,       step, stochastic_rounding, seed};
  Tensor grad_input =
      input_grad ? new_zeros(input, {size.batch, size.in_features}) : new_empty(input, {0});
  double total = 0.0;
  with_float_type(input.scalar_type(), "input", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const FanInPlan plan(size, fan_in_kernels<T>().lanes);
    const FanInUpdate<T> update(size, arguments, weight, bias, state);
    const Positives positives(plan, offsets, labels);
    const Tensor columns = contiguous(indices);
    check_index_range<T>(size, columns);
    const LossTask task{loss_kind(kind), &scale, plan.slabs(bytes_of(weight) + bytes_of(indices))};
    Scratch<float> partial(input_grad ? task.slabs * plan.input_elements() : 0);
    LossOutputs<T> out;
    if (input_grad) out.partial = partial.get();
    out.update = &update;
    total = loss_pass<T>(plan, contiguous(input), weight, columns, bias, positives, task, out);
    if (input_grad) unpack_slabs<T>(plan, partial.get(), task.slabs, grad_input);
  });
  return {scalar_tensor(input, total * factor), grad_input};
}

void fan_in_linear_update(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                          const Tensor& indices, const std::optional<Tensor>& bias,
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
  const Tensor g = contiguous(grad_output), x = contiguous(input), columns = contiguous(indices);
  with_float_type(weight.scalar_type(), "weight", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto& kernels = fan_in_kernels<T>();
    const FanInPlan plan(size, kernels.lanes);
    const FanInUpdate<T> update(size, arguments, weight, bias, state);
    check_index_range<T>(size, columns);
    Scratch<float> panels = pack_panels<T>(plan, x);
    parallel_for(plan.chunks(), 1, [&](int64_t first, int64_t last) {
      FanInChunk<T> chunk(plan, columns, data<T>(weight), data_or_null<T>(bias));
      Scratch<float> tile(kFanInTile * plan.lanes);
      Scratch<float> weight_sums(plan.chunk * size.fan_in), bias_sums(plan.chunk);
      for (int64_t c = first; c < last; ++c) {
        const int64_t begin = c * plan.chunk, end = plan.chunk_end(begin);
        chunk.load(begin, end);
        std::memset(weight_sums.get(), 0, size_t((end - begin) * size.fan_in) * sizeof(float));
        std::memset(bias_sums.get(), 0, size_t(end - begin) * sizeof(float));
        for (int64_t panel = 0; panel < plan.panels; ++panel) {
          const T* rows = data<T>(g) + panel * plan.lanes * size.out_features;
          for_each_tile(begin, end, [&](int64_t label, int64_t labels) {
            kernels.pack(rows + label, size.out_features, plan.rows_of_panel(panel), labels,
                         plan.lanes, tile.get());
            kernels.gradients(chunk.tile(label, labels),
                              panels.get() + panel * plan.panel_elements(), tile.get(),
                              {nullptr, weight_sums.get() + (label - begin) * size.fan_in,
                               bias_sums.get() + (label - begin), true});
          });
        }
        update.apply(chunk, begin, end, weight_sums.get(), bias_sums.get());
      }
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(recsparse, CPU, m) {
  m.impl("fan_in_loss", TORCH_BOX(&fan_in_loss));
  m.impl("fan_in_loss_grad", TORCH_BOX(&fan_in_loss_grad));
  m.impl("fan_in_loss_step", TORCH_BOX(&fan_in_loss_step));
  m.impl("fan_in_linear_update", TORCH_BOX(&fan_in_linear_update));
}

}  // namespace recsparse
