// Inference over fixed fan-in labels on CUDA: the k best labels of each row, and the scores of
// chosen ones with their gradients.
//   score   output[b, c] = sum_f weight[l, f] * input[b, indices[l / G, f]] + bias[l],
//           l = candidates[b, c]
#include <tuple>

#include "../fan_in.h"
#include "fan_in_launch.h"
#include "fan_in_topk_kernels.cuh"

namespace recsparse {
namespace {

using torch::stable::contiguous;
using torch::stable::new_empty;

constexpr int64_t kMaxKeys = 1 << 23;  // of one step of the selection, 8 bytes each

template <class T>
void topk(const Stream& stream, const FanInSizes& size, const Tensor& input, const Tensor& weight,
          const Tensor& indices, const MaybeTensor& bias, int64_t k, const Tensor& values,
          const Tensor& labels) {
  const FanInTiles<T> tiles(stream, size, &input, &weight, indices, bias ? &*bias : nullptr);
  const FanInLayer<T>& layer = tiles.layer();
  const int64_t count = tiles.count(), wanted = std::min(k, count), batch = size.batch;
  // the best tiles so far, then those of the step
  const int64_t step = std::min(count, std::max<int64_t>(1, kMaxKeys / batch));
  const int64_t columns = wanted + step;
  const Scratch<uint64_t> keys(stream, batch * columns), chosen(stream, batch * wanted);
  const auto select = [&](const uint64_t* from, int64_t rows, int64_t of_row, int64_t here,
                          int64_t best, uint64_t* to, int64_t to_pitch) {
    launch(stream, "fan_in_select_keys", select_keys_kernel, {rows}, {kSelectThreads}, 0, from,
           of_row, here, best, to, to_pitch);
  };
  int64_t kept = 0;
  for (int64_t first = 0; first < count; first += step) {
    const int64_t here = std::min(step, count - first), next = std::min(wanted, kept + here);
    tiles.logits("fan_in_best_of_tiles", first, here,
                 BestOfTile<T>{keys.get(), columns, kept, int(tiles.across())});
    const bool last = first + here == count;
    select(keys.get(), batch, columns, kept + here, next, chosen.get(), wanted);
    if (!last)
      launch(stream, "fan_in_keep_keys", copy_rows_kernel, {ceil_div(batch * next, kLabelThreads)},
             {kLabelThreads}, 0, static_cast<const uint64_t*>(chosen.get()), wanted, next,
             batch * next, keys.get(), columns);
    kept = next;
  }
  const int64_t of_row = wanted * layer.labels_of_tile;
  const int64_t rows = std::clamp<int64_t>(kMaxKeys / of_row, 1, batch);
  const Scratch<uint64_t> candidates(stream, rows * of_row), best(stream, batch * k);
  for (int64_t begin = 0; begin < batch; begin += rows) {
    const int64_t here = std::min(rows, batch - begin), pairs = here * wanted;
    launch(stream, "fan_in_tile_keys", tile_keys_kernel<T>,
           {ceil_div(pairs, kLabelThreads / kWarp)}, {kLabelThreads}, 0, layer,
           data<T>(stream, input) + begin * size.in_features,
           static_cast<const uint64_t*>(chosen.get() + begin * wanted), wanted, pairs,
           tiles.grouped(), candidates.get());
    select(candidates.get(), here, of_row, of_row, k, best.get() + begin * k, k);
  }
  launch(stream, "fan_in_rank_keys", rank_keys_kernel<T>, {batch * ceil_div(k, kLabelThreads)},
         {kLabelThreads}, 0, static_cast<const uint64_t*>(best.get()), k,
         mutable_data<T>(stream, values), mutable_data<int64_t>(stream, labels));
}

std::tuple<Tensor, Tensor> fan_in_topk(const Tensor& input, const Tensor& weight,
                                       const Tensor& indices, const MaybeTensor& bias, int64_t k,
                                       int64_t group_size) {
  const FanInSizes size = check_fan_in(input, weight, indices, bias, group_size);
  RS_CHECK_VALUE(k >= 0 && k <= size.out_features, "k must be in [0, ", size.out_features,
                 "], the number of labels; got ", k);
  RS_CHECK_VALUE(size.out_features < (int64_t(1) << 32), "top-k numbers labels in 32 bits; got ",
                 size.out_features, " labels");
  const Stream stream(input);
  const Tensor x = contiguous(input), w = contiguous(weight);
  const Tensor columns =
      checked_indices(stream, "indices", contiguous(indices), size.in_features, "");
  const MaybeTensor offset = contiguous_or_none(bias);
  Tensor values = new_empty(input, {size.batch, k});
  Tensor labels = new_empty(input, {size.batch, k}, ScalarType::Long);
  if (values.numel() == 0) return {values, labels};
  with_float_type(input.scalar_type(), "input", [&](auto tag) {
    topk<typename decltype(tag)::type>(stream, size, x, w, columns, offset, k, values, labels);
  });
  return {values, labels};
}

// ---- scores of candidates ----

void check_candidates(const Tensor& candidates, int64_t batch) {
  RS_CHECK_VALUE(candidates.dim() == 2 && candidates.size(0) == batch,
                 "candidates must have shape [B, C], B = ", batch, "; got shape ",
                 shape_text(candidates));
}

Tensor fan_in_score(const Tensor& input, const Tensor& weight, const Tensor& indices,
                    const MaybeTensor& bias, const Tensor& candidates, int64_t group_size) {
  const FanInSizes size = check_fan_in(input, weight, indices, bias, group_size);
  check_candidates(candidates, size.batch);
  const Stream stream(input);
  const Tensor x = contiguous(input), w = contiguous(weight);
  const Tensor columns =
      checked_indices(stream, "indices", contiguous(indices), size.in_features, "");
  const Tensor labels =
      checked_indices(stream, "candidates", contiguous(candidates), size.out_features, "");
  const MaybeTensor offset = contiguous_or_none(bias);
  const int64_t pairs = labels.numel();
  Tensor output = new_empty(input, {size.batch, labels.size(1)});
  with_float_type(input.scalar_type(), "input", [&](auto tag) {
    using T = typename decltype(tag)::type;
    with_index_type(labels.scalar_type(), "candidates", [&](auto label_tag) {
      using Label = typename decltype(label_tag)::type;
      const FanInTiles<T> tiles(stream, size, nullptr, &w, columns, offset ? &*offset : nullptr);
      launch(stream, "fan_in_score", score_kernel<T, Label>,
             {ceil_div(pairs, kLabelThreads / kWarp)}, {kLabelThreads}, 0, tiles.layer(),
             data<T>(stream, x), data<Label>(stream, labels), labels.size(1), pairs,
             mutable_data<T>(stream, output));
    });
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
  check_candidates(candidates, size.batch);
  const Stream stream(grad_output);
  const Tensor g = contiguous(grad_output), w = contiguous(weight);
  const Tensor columns = checked_indices(stream, "indices", contiguous(indices), in_features, "");
  const Tensor labels =
      checked_indices(stream, "candidates", contiguous(candidates), size.out_features, "");
  const int64_t of_row = labels.size(1), of_row_entries = of_row * size.fan_in;
  Tensor grad_input = new_empty(grad_output, {size.batch, in_features});
  if (grad_input.numel() == 0) return grad_input;
  // rows of the batch at once: their entries are sorted by (row, input)
  const int64_t rows =
      std::clamp<int64_t>(std::min(kMaxSortedEntries / std::max<int64_t>(1, of_row_entries),
                                   (int64_t(1) << 31) / in_features),
                          1, size.batch);
  with_float_type(weight.scalar_type(), "weight", [&](auto tag) {
    using T = typename decltype(tag)::type;
    with_index_type(labels.scalar_type(), "candidates", [&](auto label_tag) {
      using Label = typename decltype(label_tag)::type;
      const FanInTiles<T> tiles(stream, size, nullptr, &w, columns, nullptr);
      const int64_t most = rows * of_row_entries;
      const Scratch<uint32_t> keys(stream, most), sorted_keys(stream, most);
      const Scratch<int32_t> positions(stream, most), sorted(stream, most);
      const T* grad = data<T>(stream, g);
      const Label* chosen = data<Label>(stream, labels);
      T* out = mutable_data<T>(stream, grad_input);
      for (int64_t begin = 0; begin < size.batch; begin += rows) {
        const int64_t here = std::min(rows, size.batch - begin), entries = here * of_row_entries;
        const int64_t sums = here * in_features;
        launch(stream, "fan_in_score_entry_keys", score_entry_keys_kernel<T, Label>,
               {ceil_div(entries, kLabelThreads)}, {kLabelThreads}, 0, tiles.layer(),
               chosen + begin * of_row, of_row, here, entries, keys.get(), positions.get());
        sort_pairs(stream, keys.get(), sorted_keys.get(), positions.get(), sorted.get(), entries,
                   int(std::bit_width(uint64_t(sums))));
        launch(stream, "fan_in_sum_score_entries", sum_score_entries_kernel<T, Label>,
               {ceil_div(sums, kLabelThreads)}, {kLabelThreads}, 0, tiles.layer(),
               grad + begin * of_row, chosen + begin * of_row,
               static_cast<const uint32_t*>(sorted_keys.get()),
               static_cast<const int32_t*>(sorted.get()), entries, sums, out + begin * in_features);
      }
    });
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
  check_candidates(candidates, size.batch);
  const Stream stream(input);
  const Tensor g = contiguous(grad_output), x = contiguous(input);
  const Tensor columns =
      checked_indices(stream, "indices", contiguous(indices), size.in_features, "");
  const Tensor labels =
      checked_indices(stream, "candidates", contiguous(candidates), out_features, "");
  const int64_t pairs = labels.numel();
  Tensor grad_weight = new_empty(input, {out_features, size.fan_in});
  if (grad_weight.numel() == 0) return grad_weight;
  with_float_type(input.scalar_type(), "input", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const FanInTiles<T> tiles(stream, size, nullptr, nullptr, columns, nullptr);
    const Scratch<uint32_t> keys(stream, pairs), sorted_keys(stream, pairs);
    const Scratch<int32_t> positions(stream, pairs), sorted(stream, pairs);
    with_index_type(labels.scalar_type(), "candidates", [&](auto label_tag) {
      using Label = typename decltype(label_tag)::type;
      launch(stream, "fan_in_candidate_keys", candidate_keys_kernel<Label>,
             {ceil_div(pairs, kLabelThreads)}, {kLabelThreads}, 0, data<Label>(stream, labels),
             pairs, out_features, keys.get(), positions.get());
    });
    sort_pairs(stream, keys.get(), sorted_keys.get(), positions.get(), sorted.get(), pairs,
               int(std::bit_width(uint64_t(out_features))));
    launch(stream, "fan_in_score_grad_weight", score_grad_weight_kernel<T>,
           {ceil_div(out_features, kLabelThreads / kWarp)}, {kLabelThreads}, 0, tiles.layer(),
           data<T>(stream, g), data<T>(stream, x), labels.size(1),
           static_cast<const uint32_t*>(sorted_keys.get()),
           static_cast<const int32_t*>(sorted.get()), pairs, mutable_data<T>(stream, grad_weight));
  });
  return grad_weight;
}

}  // namespace

RS_CUDA_OPS(m) {
  m.impl("fan_in_topk", TORCH_BOX(&fan_in_topk));
  m.impl("fan_in_score", TORCH_BOX(&fan_in_score));
  m.impl("fan_in_score_grad_input", TORCH_BOX(&fan_in_score_grad_input));
  m.impl("fan_in_score_grad_weight", TORCH_BOX(&fan_in_score_grad_weight));
}

}  // namespace recsparse
