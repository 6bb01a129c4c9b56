// Inference over fixed fan-in labels, CPU: the k best labels of each row, and the scores of chosen
// ones with their gradients.
//   topk    labels stream past; each row keeps its k best, [B, O] never exists
//   score   output[b, c] = sum_f weight[l, f] * input[b, indices[l / G, f]] + bias[l],
//           l = candidates[b, c]
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "../fan_in.h"
#include "fan_in_chunks.h"

namespace recsparse {
namespace {

using torch::stable::contiguous;
using torch::stable::new_empty;
using torch::stable::new_zeros;

constexpr int64_t kCandidateBlock = 256;  // candidates a task

// ---- top-k ----

struct Scored {
  float value;
  int64_t label;
};

bool is_better(float a, float b) { return a > b || (a != a && b == b); }  // NaN is the largest

// The k best so far, best first; of equal values the one that came first.
class BestList {
 public:
  BestList(Scored* entries, int64_t k) : entries_(entries), k_(k) {}
  int64_t count() const { return count_; }

  void scan(const FanInKernels<float>& kernels, const float* row, int64_t labels, int64_t first) {
    int64_t i = 0;
    for (; i < labels && count_ < k_; ++i) insert({row[i], first + i});
    while (i < labels) {
      i = kernels.first_above(row, i, labels, entries_[k_ - 1].value);
      if (i < labels && is_better(row[i], entries_[k_ - 1].value)) insert({row[i], first + i});
      ++i;
    }
  }

 private:
  void insert(Scored entry) {
    int64_t place = count_ < k_ ? count_++ : k_ - 1;
    for (; place > 0 && is_better(entry.value, entries_[place - 1].value); --place)
      entries_[place] = entries_[place - 1];
    entries_[place] = entry;
  }

  Scored* entries_;
  int64_t k_;
  int64_t count_ = 0;
};

template <class T>
void topk(const FanInSizes& size, const Tensor& input, const Tensor& weight, const Tensor& indices,
          const std::optional<Tensor>& bias, int64_t k, const Tensor& values,
          const Tensor& labels) {
  const auto& kernels = fan_in_kernels<T>();
  const auto& row_kernels = fan_in_kernels<float>();
  const FanInPlan plan = FanInPlan::for_logits(size, kernels.lanes);
  const int64_t budget = bytes_of(weight) + bytes_of(indices) + bytes_of(values) + bytes_of(labels);
  const int64_t slabs = plan.slabs(budget, size.batch * k * int64_t(sizeof(Scored)));
  Scratch<Scored> best(slabs * size.batch * k);
  Scratch<int64_t> counts(slabs * size.batch);
  Scratch<float> panels = pack_panels<T>(plan, input);
  std::atomic<bool> valid{true};
  parallel_for(slabs, 1, [&](int64_t first, int64_t last) {
    FanInChunk<T> chunk(plan, indices, data<T>(weight), data_or_null<T>(bias));
    Scratch<float> tile(kFanInTile * plan.lanes), rows(kFanInTile * plan.lanes);
    for (int64_t slab = first; slab < last; ++slab) {
      std::vector<BestList> lists;
      for (int64_t b = 0; b < size.batch; ++b)
        lists.emplace_back(best.get() + (slab * size.batch + b) * k, k);
      const int64_t last_chunk = (slab + 1) * plan.chunks() / slabs;
      for (int64_t c = slab * plan.chunks() / slabs; c < last_chunk; ++c) {
        const int64_t begin = c * plan.chunk, end = plan.chunk_end(begin);
        if (!chunk.load(begin, end)) {
          valid = false;
          continue;
        }
        for (int64_t panel = 0; panel < plan.panels; ++panel) {
          const int64_t height = plan.rows_of_panel(panel), row = panel * plan.lanes;
          for_each_tile(begin, end, [&](int64_t label, int64_t width) {
            kernels.logits(chunk.tile(label, width, panel == 0),
                           panels.get() + panel * plan.panel_elements(), tile.get());
            row_kernels.unpack(tile.get(), height, width, plan.lanes, rows.get(), kFanInTile);
            for (int64_t b = 0; b < height; ++b)
              lists[size_t(row + b)].scan(row_kernels, rows.get() + b * kFanInTile, width, label);
          });
        }
      }
      for (int64_t b = 0; b < size.batch; ++b)
        counts[slab * size.batch + b] = lists[size_t(b)].count();
    }
  });
  if (!valid) raise_index_range(size.in_features);
  T* value_rows = mutable_data<T>(values);
  int64_t* label_rows = mutable_data<int64_t>(labels);
  parallel_for(size.batch, 1, [&](int64_t first, int64_t last) {
    std::vector<Scored> all;
    for (int64_t b = first; b < last; ++b) {
      all.clear();
      for (int64_t slab = 0; slab < slabs; ++slab) {
        const Scored* list = best.get() + (slab * size.batch + b) * k;
        all.insert(all.end(), list, list + counts[slab * size.batch + b]);
      }
      std::stable_sort(all.begin(), all.end(), [](const Scored& x, const Scored& y) {
        return is_better(x.value, y.value);
      });
      for (int64_t i = 0; i < k; ++i) {
        kernels.narrow(&all[size_t(i)].value, 1, value_rows + b * k + i);
        label_rows[b * k + i] = all[size_t(i)].label;
      }
    }
  });
}

std::tuple<Tensor, Tensor> fan_in_topk(const Tensor& input, const Tensor& weight,
                                       const Tensor& indices, const std::optional<Tensor>& bias,
                                       int64_t k, int64_t group_size) {
  const FanInSizes size = check_fan_in(input, weight, indices, bias, group_size);
  RS_CHECK_VALUE(k >= 0 && k <= size.out_features, "k must be in [0, ", size.out_features,
                 "], the number of labels; got ", k);
  Tensor values = new_empty(input, {size.batch, k});
  Tensor labels = new_empty(input, {size.batch, k}, ScalarType::Long);
  if (values.numel() == 0) return {values, labels};
  with_float_type(input.scalar_type(), "input", [&](auto tag) {
    topk<typename decltype(tag)::type>(size, contiguous(input), contiguous(weight),
                                       contiguous(indices), contiguous_or_none(bias), k, values,
                                       labels);
  });
  return {values, labels};
}

// ---- scores of candidates ----

// As int64, in range.
Scratch<int64_t> read_candidates(const Tensor& candidates, int64_t batch, int64_t out_features) {
  RS_CHECK_VALUE(candidates.dim() == 2 && candidates.size(0) == batch,
                 "candidates must have shape [B, C], B = ", batch, "; got shape ",
                 shape_text(candidates));
  const int64_t count = candidates.numel();
  Scratch<int64_t> labels(count);
  const Tensor source = contiguous(candidates);
  with_index_type(candidates.scalar_type(), "candidates", [&](auto tag) {
    const auto* values = data<typename decltype(tag)::type>(source);
    for (int64_t i = 0; i < count; ++i) {
      labels[i] = values[i];
      RS_CHECK_INDEX(labels[i] >= 0 && labels[i] < out_features, "candidates must be in [0, ",
                     out_features, "); got ", labels[i]);
    }
  });
  return labels;
}

Tensor fan_in_score(const Tensor& input, const Tensor& weight, const Tensor& indices,
                    const std::optional<Tensor>& bias, const Tensor& candidates,
                    int64_t group_size) {
  const FanInSizes size = check_fan_in(input, weight, indices, bias, group_size);
  Scratch<int64_t> labels = read_candidates(candidates, size.batch, size.out_features);
  const int64_t count = candidates.size(1);
  Tensor output = new_empty(input, {size.batch, count});
  if (output.numel() == 0) return output;
  const Tensor x = contiguous(input), w = contiguous(weight), columns = contiguous(indices);
  const std::optional<Tensor> offset = contiguous_or_none(bias);
  with_float_type(input.scalar_type(), "input", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto& kernels = fan_in_kernels<T>();
    Scratch<float> rows(size.batch * size.in_features);
    kernels.widen(data<T>(x), size.batch * size.in_features, rows.get());
    const FanInIndices source(columns);
    T* out = mutable_data<T>(output);
    const int64_t blocks = (count + kCandidateBlock - 1) / kCandidateBlock;
    std::atomic<bool> valid{true};
    parallel_for(size.batch * blocks, 1, [&](int64_t first, int64_t last) {
      float scores[kCandidateBlock];
      for (int64_t task = first; task < last; ++task) {
        const int64_t b = task / blocks, begin = task % blocks * kCandidateBlock;
        const int64_t width = std::min(kCandidateBlock, count - begin);
        const int64_t* chosen = labels.get() + b * count + begin;
        bool inside = true;
        for (int64_t i = 0; i < width; ++i)
          inside &= source.in_range(kernels, chosen[i] / group_size * size.fan_in, size.fan_in,
                                    size.in_features);
        if (!inside) {
          valid = false;
          continue;
        }
        source.dots(kernels, rows.get() + b * size.in_features, data<T>(w), data_or_null<T>(offset),
                    chosen, width, size, scores);
        kernels.narrow(scores, width, out + b * count + begin);
      }
    });
    if (!valid) raise_index_range(size.in_features);
  });
  return output;
}

Tensor fan_in_score_grad_input(const Tensor& grad_output, const Tensor& weight,
                               const Tensor& indices, const Tensor& candidates, int64_t in_features,
                               int64_t group_size) {
  check_dim(grad_output, 2, "grad_output", "[B, C]");
  check_dim(weight, 2, "weight", "[O, F]");
  check_same_dtype(grad_output, "grad_output", weight, "weight");
  const FanInSizes size =
      check_fan_in_layer(grad_output.size(0), in_features, weight.size(0), indices, group_size);
  check_fan_in_weight(size, weight);
  Scratch<int64_t> labels = read_candidates(candidates, size.batch, size.out_features);
  const int64_t count = candidates.size(1);
  Tensor grad_input = new_zeros(grad_output, {size.batch, in_features});
  const Tensor g = contiguous(grad_output), w = contiguous(weight), columns = contiguous(indices);
  with_float_type(weight.scalar_type(), "weight", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto& kernels = fan_in_kernels<T>();
    const FanInIndices source(columns);
    std::atomic<bool> valid{true};
    parallel_for(size.batch, 1, [&](int64_t first, int64_t last) {  // a row has one writer
      Scratch<float> sum(in_features), row(size.fan_in), grad(count);
      for (int64_t b = first; b < last; ++b) {
        std::memset(sum.get(), 0, size_t(in_features) * sizeof(float));
        kernels.widen(data<T>(g) + b * count, count, grad.get());
        for (int64_t c = 0; c < count; ++c) {
          const int64_t label = labels.get()[b * count + c];
          const int64_t at = label / group_size * size.fan_in;
          if (!source.in_range(kernels, at, size.fan_in, in_features)) {
            valid = false;
            continue;
          }
          kernels.widen(data<T>(w) + label * size.fan_in, size.fan_in, row.get());
          for (int64_t f = 0; f < size.fan_in; ++f) sum[source.column(at + f)] += grad[c] * row[f];
        }
        kernels.narrow(sum.get(), in_features, mutable_data<T>(grad_input) + b * in_features);
      }
    });
    if (!valid) raise_index_range(in_features);
  });
  return grad_input;
}

Tensor fan_in_score_grad_weight(const Tensor& grad_output, const Tensor& input,
                                const Tensor& indices, const Tensor& candidates,
                                int64_t out_features, int64_t group_size) {
  check_dim(grad_output, 2, "grad_output", "[B, C]");
  check_dim(input, 2, "input", "[B, I]");
  check_same_dtype(grad_output, "grad_output", input, "input");
  const FanInSizes size =
      check_fan_in_layer(input.size(0), input.size(1), out_features, indices, group_size);
  Scratch<int64_t> labels = read_candidates(candidates, size.batch, out_features);
  const int64_t count = candidates.size(1), pairs = candidates.numel();
  Tensor grad_weight = new_zeros(input, {out_features, size.fan_in});
  // pairs (b, c) by label, so that each row of the gradient has one writer, in a fixed order
  std::vector<int64_t> order(static_cast<size_t>(pairs));
  for (int64_t i = 0; i < pairs; ++i) order[size_t(i)] = labels.get()[i] * pairs + i;
  std::sort(order.begin(), order.end());
  std::vector<int64_t> runs;  // where a new label begins
  for (int64_t i = 0; i < pairs; ++i)
    if (i == 0 || order[size_t(i)] / pairs != order[size_t(i - 1)] / pairs) runs.push_back(i);
  runs.push_back(pairs);
  const Tensor g = contiguous(grad_output), x = contiguous(input), columns = contiguous(indices);
  with_float_type(input.scalar_type(), "input", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto& kernels = fan_in_kernels<T>();
    const FanInIndices source(columns);
    Scratch<float> rows(size.batch * size.in_features), grad(pairs);
    kernels.widen(data<T>(x), size.batch * size.in_features, rows.get());
    kernels.widen(data<T>(g), pairs, grad.get());
    std::atomic<bool> valid{true};
    parallel_for(int64_t(runs.size()) - 1, 64, [&](int64_t first, int64_t last) {
      Scratch<float> sum(size.fan_in);
      for (int64_t run = first; run < last; ++run) {
        const int64_t label = order[size_t(runs[size_t(run)])] / pairs;
        const int64_t at = label / group_size * size.fan_in;
        if (!source.in_range(kernels, at, size.fan_in, size.in_features)) {
          valid = false;
          continue;
        }
        std::memset(sum.get(), 0, size_t(size.fan_in) * sizeof(float));
        for (int64_t i = runs[size_t(run)]; i < runs[size_t(run) + 1]; ++i) {
          const int64_t pair = order[size_t(i)] % pairs;
          const float* row = rows.get() + pair / count * size.in_features;
          for (int64_t f = 0; f < size.fan_in; ++f)
            sum[f] += grad[pair] * row[source.column(at + f)];
        }
        kernels.narrow(sum.get(), size.fan_in, mutable_data<T>(grad_weight) + label * size.fan_in);
      }
    });
    if (!valid) raise_index_range(size.in_features);
  });
  return grad_weight;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(recsparse, CPU, m) {
  m.impl("fan_in_topk", TORCH_BOX(&fan_in_topk));
  m.impl("fan_in_score", TORCH_BOX(&fan_in_score));
  m.impl("fan_in_score_grad_input", TORCH_BOX(&fan_in_score_grad_input));
  m.impl("fan_in_score_grad_weight", TORCH_BOX(&fan_in_score_grad_weight));
}

}  // namespace recsparse
