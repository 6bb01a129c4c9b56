// Gradient to the rows of a low-rank table, CPU: dense, or over the rows that were looked up.
//
//   grad_table[v] = sum over lookups i of row v of weight[i] * grad_pooled[bag(i)]
//
// Lookups are sorted by row, so each row is summed once, in the order of positions.
#include <algorithm>
#include <tuple>

#include "low_rank_lookups.h"

namespace recsparse {
namespace {

template <class T>
struct RowInputs {
  Tensor grad_pooled, indices;
  std::optional<Tensor> sample_weights;
  std::vector<int64_t> starts;
  std::vector<uint32_t> bag;
  std::vector<float> weight;
  int64_t lookups;
  LowRankRows<T> p{};

  RowInputs(const Tensor& grad_pooled_, const Tensor& indices_,
            const std::optional<Tensor>& offsets, const std::optional<Tensor>& per_sample_weights,
            int64_t num_embeddings, int64_t pooling_mode, int64_t padding_idx,
            bool include_last_offset)
      : grad_pooled(torch::stable::contiguous(grad_pooled_)),
        indices(torch::stable::contiguous(indices_)),
        sample_weights(contiguous(per_sample_weights)),
        lookups(indices_.numel()) {
    check_dim(grad_pooled, 2, "grad_pooled", "[B, R]");
    check_index_vector(indices, "indices", "[N]");
    check_optional_vector(sample_weights, lookups, "per_sample_weights", "[N]", grad_pooled,
                          "grad_pooled");
    check_index_range(indices, "indices", num_embeddings);
    RS_CHECK_VALUE(offsets || !per_sample_weights, "per_sample_weights needs offsets");
    p.rank = grad_pooled.size(1);
    p.grad_pooled = data<T>(grad_pooled);
    int64_t bags = lookups;
    if (offsets) {
      check_index_vector(*offsets, "offsets", "[B]");
      const Tensor contiguous_offsets = torch::stable::contiguous(*offsets);
      bags = offsets->size(0) - (include_last_offset ? 1 : 0);
      starts = bag_starts(contiguous_offsets, bags, lookups);
      lookups = starts[bags];
      bag.resize(lookups);
      for (int64_t b = 0; b < bags; ++b)
        std::fill(bag.begin() + starts[b], bag.begin() + starts[b + 1], uint32_t(b));
      p.bag = bag.data();
    }
    RS_CHECK_VALUE(grad_pooled.size(0) == bags, "grad_pooled must have ", bags,
                   " rows, one a bag; got shape ", shape_text(grad_pooled));
    if (sample_weights || (offsets && pooling_mode == kPoolMean)) {
      weight.resize(lookups);
      LowRankBags<T> bag_view{};
      bag_view.bags = bags;
      bag_view.indices = indices.const_data_ptr();
      bag_view.wide = indices.scalar_type() == ScalarType::Long;
      bag_view.starts = starts.data();
      bag_view.sample_weights = optional_data<T>(sample_weights);
      bag_view.mean_pooling = pooling_mode == kPoolMean;
      bag_view.padding_idx = padding_idx;
      parallel_for(bags, kLookupsPerTask, [&](int64_t begin, int64_t end) {
        low_rank_embedding_kernels<T>().lookup_weights(bag_view, begin, end, weight.data());
      });
      p.weight = weight.data();
    }
  }
};

Tensor low_rank_rows_grad(const Tensor& grad_pooled, const Tensor& indices,
                          const std::optional<Tensor>& offsets,
                          const std::optional<Tensor>& per_sample_weights, int64_t num_embeddings,
                          int64_t pooling_mode, int64_t padding_idx, bool include_last_offset) {
  return with_float_type(grad_pooled.scalar_type(), "grad_pooled", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const RowInputs<T> in(grad_pooled, indices, offsets, per_sample_weights, num_embeddings,
                          pooling_mode, padding_idx, include_last_offset);
    const RowGroups groups(in.indices, in.lookups, num_embeddings, padding_idx);
    Tensor grad = torch::stable::new_zeros(grad_pooled, {num_embeddings, in.p.rank});
    parallel_for(groups.parts(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        low_rank_embedding_kernels<T>().rows_dense(
            in.p, groups.part(i).data(), int64_t(groups.part(i).size()), mutable_data<T>(grad));
    });
    return grad;
  });
}

// Rows in rising order and their gradients, then the number of them; the rest of both repeats the
// last row with a gradient of zero, so that the sizes depend on sizes alone.
std::tuple<Tensor, Tensor, Tensor> low_rank_rows_grad_sparse(
    const Tensor& grad_pooled, const Tensor& indices, const std::optional<Tensor>& offsets,
    const std::optional<Tensor>& per_sample_weights, int64_t num_embeddings, int64_t pooling_mode,
    int64_t padding_idx, bool include_last_offset) {
  return with_float_type(grad_pooled.scalar_type(), "grad_pooled", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const RowInputs<T> in(grad_pooled, indices, offsets, per_sample_weights, num_embeddings,
                          pooling_mode, padding_idx, include_last_offset);
    const RowGroups groups(in.indices, in.lookups, num_embeddings, padding_idx);
    const int64_t size = indices.numel();
    Tensor rows = torch::stable::new_empty(grad_pooled, {size}, ScalarType::Long);
    Tensor values = empty_2d(grad_pooled, size, in.p.rank);
    Tensor count = torch::stable::new_empty(grad_pooled, {1}, ScalarType::Long);
    // where each part begins: the number of different rows before it
    std::vector<int64_t> first(groups.parts() + 1);
    for (int64_t i = 0; i < groups.parts(); ++i) {
      const std::vector<RowEntry>& entries = groups.part(i);
      int64_t unique = 0;
      for (size_t e = 0; e < entries.size(); ++e)
        unique += e == 0 || entries[e].row != entries[e - 1].row;
      first[i + 1] = first[i] + unique;
    }
    int64_t* row = mutable_data<int64_t>(rows);
    T* value = mutable_data<T>(values);
    parallel_for(groups.parts(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        low_rank_embedding_kernels<T>().rows_sparse(in.p, groups.part(i).data(),
                                                    int64_t(groups.part(i).size()),
                                                    value + first[i] * in.p.rank, row + first[i]);
    });
    const int64_t unique = first[groups.parts()];
    std::fill(row + unique, row + size, unique ? row[unique - 1] : 0);
    std::fill(value + unique * in.p.rank, value + size * in.p.rank, T{});
    *mutable_data<int64_t>(count) = unique;
    return std::make_tuple(rows, values, count);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(recsparse, CPU, m) {
  m.impl("low_rank_rows_grad", TORCH_BOX(&low_rank_rows_grad));
  m.impl("low_rank_rows_grad_sparse", TORCH_BOX(&low_rank_rows_grad_sparse));
}

}  // namespace recsparse
