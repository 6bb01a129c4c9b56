// Fixed fan-in linear and its gradients, CPU.
//   output[b, o] = sum_f weight[o, f] * input[b, indices[o / G, f]] + bias[o]
//   input [B, I]   weight [O, F]   indices [ceil(O / G), F]   bias [O]   output [B, O]
#include "../fan_in.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <vector>

#include "fan_in_chunks.h"
#include "huge_pages.h"

namespace recsparse {
namespace {

using torch::stable::contiguous;
using torch::stable::new_empty;

// Outputs from here on are written past the caches: nothing of them would be left there for the
// next reader, and the lines need not be read before they are written.
constexpr int64_t kStreamedBytes = 8 * 1024 * 1024;

template <class T>
bool linear(const FanInPlan& plan, const Tensor& input, const Tensor& weight, const Tensor& indices,
            const std::optional<Tensor>& bias, T* output) {
  const auto& kernels = fan_in_kernels<T>();
  const FanInSizes& size = plan.size;
  const bool streamed =
      size.batch * size.out_features * int64_t(sizeof(T)) >= kStreamedBytes && plan.lanes > 1;
  // rows a power of two apart would share the same few places of the cache
  const int64_t pitch = plan.chunk + 32;
  Scratch<float> panels = pack_panels<T>(plan, input);
  std::atomic<bool> valid{true};
  parallel_for(plan.chunks(), 1, [&](int64_t first, int64_t last) {
    FanInChunk<T> chunk(plan, indices, data<T>(weight), data_or_null<T>(bias));
    Scratch<float> logits(kFanInTile * plan.lanes);
    Scratch<T> staged(streamed ? pitch * plan.lanes : 0);
    for (int64_t c = first; c < last; ++c) {
      const int64_t begin = c * plan.chunk, end = plan.chunk_end(begin);
      if (!chunk.load(begin, end)) {
        valid = false;
        continue;
      }
      for (int64_t panel = 0; panel < plan.panels; ++panel) {
        const float* x = panels.get() + panel * plan.panel_elements();
        const int64_t height = plan.rows_of_panel(panel);
        T* target = output + panel * plan.lanes * size.out_features + begin;
        T* rows = streamed ? staged.get() : target;
        const int64_t stride = streamed ? pitch : size.out_features;
        for_each_tile(begin, end, [&](int64_t label, int64_t labels) {
          kernels.logits(chunk.tile(label, labels, panel == 0), x, logits.get());
          kernels.unpack(logits.get(), height, labels, plan.lanes, rows + (label - begin), stride);
        });
        if (streamed)
          kernels.stream_rows(rows, pitch, height, end - begin, target, size.out_features);
      }
    }
  });
  return valid;
}

Tensor fan_in_linear(const Tensor& input, const Tensor& weight, const Tensor& indices,
                     const std::optional<Tensor>& bias, int64_t group_size) {
  const FanInSizes size = check_fan_in(input, weight, indices, bias, group_size);
  Tensor output = new_empty(input, {size.batch, size.out_features});
  if (output.numel() == 0) return output;
  expect_first_touch(output);
  const Tensor x = contiguous(input), w = contiguous(weight), columns = contiguous(indices);
  const std::optional<Tensor> offset = contiguous_or_none(bias);
  with_float_type(input.scalar_type(), "input", [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (!linear<T>(FanInPlan::for_logits(size, fan_in_kernels<T>().lanes), x, w, columns, offset,
                   mutable_data<T>(output)))
      raise_index_range(size.in_features);
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
  Tensor grad_input = torch::stable::new_zeros(grad_output, {size.batch, in_features});
  if (grad_input.numel() == 0 || size.out_features == 0) return grad_input;
  const Tensor g = contiguous(grad_output), w = contiguous(weight), columns = contiguous(indices);
  with_float_type(weight.scalar_type(), "weight", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto& kernels = fan_in_kernels<T>();
    const FanInPlan plan(size, kernels.lanes);
    const int64_t slabs = plan.slabs(bytes_of(g) + bytes_of(w) + bytes_of(columns));
    Scratch<float> partial(slabs * plan.input_elements());
    std::atomic<bool> valid{true};
    // a task is one slab and one panel: panels share nothing
    parallel_for(slabs * plan.panels, 1, [&](int64_t first, int64_t last) {
      FanInChunk<T> chunk(plan, columns, data<T>(w), nullptr);
      Scratch<float> tile(kFanInTile * plan.lanes);
      for (int64_t task = first; task < last; ++task) {
        const int64_t slab = task / plan.panels, panel = task % plan.panels;
        float* sum = partial.get() + slab * plan.input_elements() + panel * plan.panel_elements();
        std::memset(sum, 0, size_t(plan.panel_elements()) * sizeof(float));
        const T* rows = data<T>(g) + panel * plan.lanes * size.out_features;
        const int64_t last_chunk = (slab + 1) * plan.chunks() / slabs;
        for (int64_t c = slab * plan.chunks() / slabs; c < last_chunk; ++c) {
          const int64_t begin = c * plan.chunk, end = plan.chunk_end(begin);
          if (!chunk.load(begin, end)) {
            valid = false;
            continue;
          }
          for_each_tile(begin, end, [&](int64_t label, int64_t labels) {
            kernels.pack(rows + label, size.out_features, plan.rows_of_panel(panel), labels,
                         plan.lanes, tile.get());
            kernels.gradients(chunk.tile(label, labels), nullptr, tile.get(),
                              {sum, nullptr, nullptr, false});
          });
        }
      }
    });
    if (!valid) raise_index_range(in_features);
    unpack_slabs<T>(plan, partial.get(), slabs, grad_input);
  });
  return grad_input;
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
  const std::vector<int64_t> shape = {size.out_features, size.fan_in};
  if (size.batch == 0) return torch::stable::new_zeros(input, shape);
  Tensor grad_weight = new_empty(input, shape);
  expect_first_touch(grad_weight);
  if (grad_weight.numel() == 0) return grad_weight;
  const Tensor g = contiguous(grad_output), x = contiguous(input), columns = contiguous(indices);
  with_float_type(input.scalar_type(), "input", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto& kernels = fan_in_kernels<T>();
    const FanInPlan plan(size, kernels.lanes);
    Scratch<float> panels = pack_panels<T>(plan, x);
    std::atomic<bool> valid{true};
    parallel_for(plan.chunks(), 1, [&](int64_t first, int64_t last) {
      FanInChunk<T> chunk(plan, columns, nullptr, nullptr);
      Scratch<float> tile(kFanInTile * plan.lanes);
      FanInChunkSums<T> sums(mutable_data<T>(grad_weight), plan.chunk * size.fan_in);
      for (int64_t c = first; c < last; ++c) {
        const int64_t begin = c * plan.chunk, end = plan.chunk_end(begin);
        if (!chunk.load(begin, end)) {
          valid = false;
          continue;
        }
        for (int64_t panel = 0; panel < plan.panels; ++panel) {
          const T* rows = data<T>(g) + panel * plan.lanes * size.out_features;
          for_each_tile(begin, end, [&](int64_t label, int64_t labels) {
            kernels.pack(rows + label, size.out_features, plan.rows_of_panel(panel), labels,
                         plan.lanes, tile.get());
            float* out = sums.at(begin * size.fan_in) + (label - begin) * size.fan_in;
            kernels.gradients(chunk.tile(label, labels),
                              panels.get() + panel * plan.panel_elements(), tile.get(),
                              {nullptr, out, nullptr, panel > 0});
          });
        }
        sums.write(begin * size.fan_in, (end - begin) * size.fan_in);
      }
    });
    if (!valid) raise_index_range(size.in_features);
  });
  return grad_weight;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(recsparse, CPU, m) {
  m.impl("fan_in_linear", TORCH_BOX(&fan_in_linear));
  m.impl("fan_in_linear_grad_input", TORCH_BOX(&fan_in_linear_grad_input));
  m.impl("fan_in_linear_grad_weight", TORCH_BOX(&fan_in_linear_grad_weight));
}

}  // namespace recsparse
