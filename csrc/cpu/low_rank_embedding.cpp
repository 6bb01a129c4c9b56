// Low-rank embeddings and embedding bags, CPU: forward, and the gradients to the projection.
// The gradient to the table is in low_rank_rows.cpp.
#include <tuple>

#include "low_rank_lookups.h"

namespace recsparse {
namespace {

// Bags whose share of grad_up is summed on its own: the parts are then added in order, so that the
// result does not depend on the number of threads.
constexpr int64_t kBagsPerPart = 512;
constexpr int64_t kMaxParts = 64;

// Everything the kernels read, kept alive.
template <class T>
struct BagInputs {
  Tensor table, up, indices;
  std::optional<Tensor> mean, sample_weights;
  std::vector<int64_t> starts;
  LowRankBags<T> p{};

  BagInputs(const LowRankBagSizes& size, const Tensor& table_, const Tensor& up_,
            const std::optional<Tensor>& mean_, const Tensor& indices_,
            const std::optional<Tensor>& offsets, const std::optional<Tensor>& per_sample_weights,
            int64_t pooling_mode, int64_t padding_idx)
      : table(torch::stable::contiguous(table_)),
        up(torch::stable::contiguous(up_)),
        indices(torch::stable::contiguous(indices_)),
        mean(contiguous(mean_)),
        sample_weights(contiguous(per_sample_weights)) {
    check_index_range(indices, "indices", size.num_embeddings);
    if (offsets) {
      const Tensor contiguous_offsets = torch::stable::contiguous(*offsets);
      starts = bag_starts(contiguous_offsets, size.bags, size.lookups);
    }
    p.bags = size.bags;
    p.lookups = size.lookups;
    p.num_embeddings = size.num_embeddings;
    p.rank = size.rank;
    p.embedding_dim = size.embedding_dim;
    p.indices = indices.const_data_ptr();
    p.wide = indices.scalar_type() == ScalarType::Long;
    p.starts = offsets ? starts.data() : nullptr;
    p.sample_weights = optional_data<T>(sample_weights);
    p.mean_pooling = pooling_mode == kPoolMean;
    p.padding_idx = padding_idx;
    p.table = data<T>(table);
    p.mean = optional_data<T>(mean);
  }
};

int64_t bag_grain(const LowRankBagSizes& size) {
  const int64_t lookups = size.bags ? size.lookups / size.bags + 1 : 1;
  return grain(size.rank * (size.embedding_dim + 4 * lookups));
}

std::tuple<Tensor, Tensor> low_rank_embedding_bag(
    const Tensor& table, const Tensor& up, const std::optional<Tensor>& mean, const Tensor& indices,
    const std::optional<Tensor>& offsets, const std::optional<Tensor>& per_sample_weights,
    int64_t pooling_mode, int64_t padding_idx, bool include_last_offset,
    bool /*scale_grad_by_freq*/, bool /*sparse*/, bool keep_pooled) {
  const LowRankBagSizes size = check_low_rank_bag(
      table, up, mean, indices, offsets, per_sample_weights, padding_idx, include_last_offset);
  RS_CHECK_VALUE(pooling_mode == kPoolSum || pooling_mode == kPoolMean,
                 "pooling_mode must be 0 (sum) or 1 (mean); got ", pooling_mode);
  RS_CHECK_VALUE(offsets || !per_sample_weights, "per_sample_weights needs offsets");
  return with_float_type(table.scalar_type(), "table", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const LowRankEmbeddingKernels<T>& kernels = low_rank_embedding_kernels<T>();
    BagInputs<T> in(size, table, up, mean, indices, offsets, per_sample_weights, pooling_mode,
                    padding_idx);
    Tensor output = empty_2d(table, size.bags, size.embedding_dim);
    Tensor pooled = empty_2d(table, keep_pooled ? size.bags : 0, size.rank);
    if (size.bags == 0) return std::make_tuple(output, pooled);
    Panels<T> panels(in.up, true, size.rank, size.embedding_dim);
    pack_all(low_rank_kernels<T>().panel * size.rank, panels);
    LowRankBags<T> p = in.p;
    p.up_panels = panels.get();
    p.pooled = keep_pooled ? mutable_data<T>(pooled) : nullptr;
    p.output = mutable_data<T>(output);
    parallel_for(size.bags, bag_grain(size), [&](int64_t begin, int64_t end) {
      Scratch<float> scratch(kernels.forward_scratch(p));
      kernels.forward_bags(p, begin, end, scratch.get());
    });
    return std::make_tuple(output, pooled);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> low_rank_embedding_bag_grad(
    const Tensor& grad_output, const Tensor& table, const Tensor& up,
    const std::optional<Tensor>& mean, const Tensor& indices, const std::optional<Tensor>& offsets,
    const std::optional<Tensor>& per_sample_weights, const Tensor& pooled, int64_t pooling_mode,
    int64_t padding_idx, bool include_last_offset, bool needs_sample_weights) {
  const LowRankBagSizes size = check_low_rank_bag(
      table, up, mean, indices, offsets, per_sample_weights, padding_idx, include_last_offset);
  RS_CHECK_VALUE(!needs_sample_weights || offsets, "a gradient to sample weights needs offsets");
  check_same_shape(grad_output, "grad_output", size.bags, size.embedding_dim, table);
  check_same_shape(pooled, "pooled", size.bags, size.rank, table);
  return with_float_type(table.scalar_type(), "table", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const LowRankEmbeddingKernels<T>& kernels = low_rank_embedding_kernels<T>();
    BagInputs<T> in(size, table, up, mean, indices, offsets, per_sample_weights, pooling_mode,
                    padding_idx);
    const Tensor g = torch::stable::contiguous(grad_output), z = torch::stable::contiguous(pooled);
    Tensor grad_pooled = empty_2d(table, size.bags, size.rank);
    Tensor grad_up = empty_2d(table, size.embedding_dim, size.rank);
    Tensor grad_mean = torch::stable::new_empty(table, {mean ? size.embedding_dim : 0});
    Tensor grad_weights =
        torch::stable::new_empty(table, {needs_sample_weights ? size.lookups : 0});
    Panels<T> panels(in.up, false, size.embedding_dim, size.rank);
    pack_all(low_rank_kernels<T>().panel * size.embedding_dim, panels);
    LowRankBags<T> p = in.p;
    p.up_panels = panels.get();
    p.grad_output = data<T>(g);
    p.pooled_in = data<T>(z);
    p.grad_pooled = mutable_data<T>(grad_pooled);
    int64_t parts = size.bags / kBagsPerPart;
    parts = parts < 1 ? 1 : parts > kMaxParts ? kMaxParts : parts;
    const int64_t part_size =
        (size.rank + 1) * round_up(size.embedding_dim, low_rank_kernels<T>().panel);
    Scratch<float> sums(parts * part_size);
    parallel_for(parts, 1, [&](int64_t begin, int64_t end) {
      Scratch<float> scratch(kernels.backward_scratch(p));
      for (int64_t i = begin; i < end; ++i)
        kernels.backward_bags(p, size.bags * i / parts, size.bags * (i + 1) / parts,
                              sums.get() + i * part_size, scratch.get());
    });
    parallel_for(size.embedding_dim, grain(parts * size.rank), [&](int64_t begin, int64_t end) {
      kernels.sum_parts(sums.get(), parts, size.rank, size.embedding_dim, begin, end,
                        mutable_data<T>(grad_up), mean ? mutable_data<T>(grad_mean) : nullptr);
    });
    if (needs_sample_weights) {
      p.grad_sample_weights = mutable_data<T>(grad_weights);
      // indices before the first and after the last bag have no effect
      torch::stable::zero_(grad_weights);
      parallel_for(size.bags, bag_grain(size),
                   [&](int64_t begin, int64_t end) { kernels.grad_sample_weights(p, begin, end); });
    }
    return std::make_tuple(grad_pooled, grad_up, grad_mean, grad_weights);
  });
}

std::tuple<Tensor, Tensor> low_rank_embedding_bag_max(const Tensor& table, const Tensor& up,
                                                      const std::optional<Tensor>& mean,
                                                      const Tensor& indices, const Tensor& offsets,
                                                      int64_t padding_idx,
                                                      bool include_last_offset) {
  const LowRankBagSizes size = check_low_rank_bag(table, up, mean, indices, offsets, std::nullopt,
                                                  padding_idx, include_last_offset);
  return with_float_type(table.scalar_type(), "table", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const LowRankEmbeddingKernels<T>& kernels = low_rank_embedding_kernels<T>();
    BagInputs<T> in(size, table, up, mean, indices, offsets, std::nullopt, kPoolMax, padding_idx);
    Tensor output = empty_2d(table, size.bags, size.embedding_dim);
    Tensor positions =
        torch::stable::new_empty(table, {size.bags, size.embedding_dim}, ScalarType::Long);
    Panels<T> panels(in.up, true, size.rank, size.embedding_dim);
    pack_all(low_rank_kernels<T>().panel * size.rank, panels);
    LowRankBags<T> p = in.p;
    p.up_panels = panels.get();
    p.output = mutable_data<T>(output);
    p.max_positions = mutable_data<int64_t>(positions);
    const int64_t lookups = size.bags ? size.lookups / size.bags + 1 : 1;
    parallel_for(size.bags, grain(size.rank * size.embedding_dim * lookups),
                 [&](int64_t begin, int64_t end) {
                   Scratch<float> scratch(kernels.forward_max_scratch(p));
                   kernels.forward_max(p, begin, end, scratch.get());
                 });
    return std::make_tuple(output, positions);
  });
}

std::tuple<Tensor, Tensor, Tensor> low_rank_embedding_bag_max_grad(
    const Tensor& grad_output, const Tensor& table, const Tensor& up, const Tensor& indices,
    const Tensor& positions, bool needs_mean) {
  const LowRankBagSizes size =
      check_low_rank_bag(table, up, std::nullopt, indices, std::nullopt, std::nullopt, -1, false);
  const int64_t bags = grad_output.size(0);
  check_same_shape(grad_output, "grad_output", bags, size.embedding_dim, table);
  check_dim(positions, 2, "positions", "[B, D]");
  check_dtype(positions, ScalarType::Long, "positions");
  RS_CHECK_VALUE(positions.size(0) == bags && positions.size(1) == size.embedding_dim,
                 "positions must have the shape of grad_output, ", shape_text(grad_output),
                 "; got ", shape_text(positions));
  return with_float_type(table.scalar_type(), "table", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const LowRankEmbeddingKernels<T>& kernels = low_rank_embedding_kernels<T>();
    BagInputs<T> in(size, table, up, std::nullopt, indices, std::nullopt, std::nullopt, kPoolMax,
                    -1);
    const Tensor g = torch::stable::contiguous(grad_output);
    const Tensor winners = torch::stable::contiguous(positions);
    const int64_t* winner = data<int64_t>(winners);
    for (int64_t i = 0; i < winners.numel(); ++i)
      RS_CHECK_INDEX(winner[i] >= -1 && winner[i] < size.lookups, "positions must be in [-1, ",
                     size.lookups, "); got ", winner[i]);
    Tensor grad_table = empty_2d(table, size.num_embeddings, size.rank);
    Tensor grad_up = empty_2d(table, size.embedding_dim, size.rank);
    Tensor grad_mean = torch::stable::new_empty(table, {needs_mean ? size.embedding_dim : 0});
    LowRankBags<T> p = in.p;
    p.bags = bags;
    p.grad_output = data<T>(g);
    p.max_positions = const_cast<int64_t*>(winner);
    parallel_for(size.embedding_dim, grain(bags * size.rank), [&](int64_t begin, int64_t end) {
      Scratch<float> scratch(round_up(size.rank, low_rank_kernels<T>().panel));
      kernels.max_grad_up(p, begin, end, mutable_data<T>(grad_up),
                          needs_mean ? mutable_data<T>(grad_mean) : nullptr, scratch.get());
    });
    // each task owns rows, and passes over all winners: few and large tasks
    const int64_t threads = torch::stable::get_num_threads();
    parallel_for(
        size.num_embeddings, size.num_embeddings / threads + 1, [&](int64_t begin, int64_t end) {
          T* grad = mutable_data<T>(grad_table);
          if constexpr (sizeof(T) == sizeof(float)) {
            kernels.max_grad_rows(p, data<T>(in.up), begin, end, grad + begin * size.rank, grad);
          } else {
            Scratch<float> sums((end - begin) * size.rank);
            kernels.max_grad_rows(p, data<T>(in.up), begin, end, sums.get(), grad);
          }
        });
    return std::make_tuple(grad_table, grad_up, grad_mean);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(recsparse, CPU, m) {
  m.impl("low_rank_embedding_bag", TORCH_BOX(&low_rank_embedding_bag));
  m.impl("low_rank_embedding_bag_grad", TORCH_BOX(&low_rank_embedding_bag_grad));
  m.impl("low_rank_embedding_bag_max", TORCH_BOX(&low_rank_embedding_bag_max));
  m.impl("low_rank_embedding_bag_max_grad", TORCH_BOX(&low_rank_embedding_bag_max_grad));
}

}  // namespace recsparse
