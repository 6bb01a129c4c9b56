// Gradient to the rows of a low-rank table, CUDA: dense, or over the rows that were looked up; and
// the gradients of max pooling.
//
//   grad_table[v] = sum over lookups i of row v of weight[i] * grad_pooled[bag(i)]
//
// Lookups are sorted by row, so each row is summed once, in the order of positions.
#include <algorithm>
#include <bit>
#include <tuple>

#include "low_rank_lookups.h"
#include "low_rank_max_kernels.cuh"
#include "low_rank_segments_kernels.cuh"
#include "sort.h"

namespace recsparse {
using namespace low_rank;

namespace {

// Keys, and what the sort makes of them.
class SortedKeys {
 public:
  SortedKeys(const Stream& stream, int64_t count, int64_t limit)
      : count_(count),
        limit_(limit),
        keys_(stream, count),
        sorted_(stream, count),
        values_(stream, count),
        order_(stream, count) {
    RS_CHECK_VALUE(limit < int64_t(UINT32_MAX),
                   "table must have fewer than 2^32 - 1 rows for its gradient; got ", limit);
  }
  uint32_t* keys() const { return keys_.get(); }
  int32_t* values() const { return values_.get(); }
  void sort(const Stream& stream) {
    sort_pairs(stream, keys_.get(), sorted_.get(), values_.get(), order_.get(), count_,
               int(std::bit_width(uint64_t(limit_))));
  }
  const uint32_t* sorted() const { return sorted_.get(); }

  // Writes the sums to their rows of p.out, which is zero elsewhere.
  template <class T>
  void sum(const Stream& stream, Segments<T> p, int64_t out_rows) {
    const int64_t columns = p.source.columns;
    if (count_ == 0 || p.source.rows == 0 || columns == 0) return;
    const int64_t chunks = ceil_div(count_, kChunk), pieces = ceil_div(columns, kPackOf16Bytes<T>);
    const Scratch<float> parts(stream, 2 * chunks * columns);
    p.keys = sorted_.get();
    p.order = order_.get();
    p.count = count_;
    p.limit = limit_;
    p.parts = parts.get();
    p.out_width = matrix<T>(p.out, out_rows, columns).width;
    launch(stream, "low_rank_segments", segments_kernel<T>,
           {ceil_div(chunks * pieces, kLookupThreads)}, {kLookupThreads}, 0, p, pieces);
    if (chunks > 1)
      launch(stream, "low_rank_join_segments", join_segments_kernel<T>, {chunks},
             {kJoinWays * kWarp}, 0, p);
  }

 private:
  int64_t count_, limit_;
  Scratch<uint32_t> keys_, sorted_;
  Scratch<int32_t> values_, order_;
};

// One thread: one lookup. Its key (num_embeddings: does not count), bag and weight.
template <class T>
__global__ void lookups_kernel(const Bags<T> p, const float* inverses, uint32_t* keys,
                               int32_t* values, int32_t* bag_of, float* weights) {
  const int64_t n = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (n >= p.lookups) return;
  int64_t bag = n;
  if (p.starts) {  // the last bag that begins at n or before
    int64_t low = 0, high = p.bags;
    while (low < high) {
      const int64_t middle = (low + high + 1) / 2;
      if (p.starts[middle] <= n)
        low = middle;
      else
        high = middle - 1;
    }
    bag = low;
  }
  const int64_t index = p.indices[n];
  const bool counts =
      bag < p.bags && index != p.padding_idx && uint64_t(index) < uint64_t(p.table.rows);
  keys[n] = uint32_t(counts ? index : p.table.rows);
  values[n] = int32_t(n);
  bag_of[n] = int32_t(counts ? bag : 0);
  if (weights && counts)
    weights[n] = (p.weights ? to_float(p.weights[n]) : 1.0f) * (inverses ? inverses[bag] : 1.0f);
}

// Everything that either form of the gradient needs, sorted.
template <class T>
class RowInputs {
 public:
  RowInputs(const Stream& stream, const Tensor& grad_pooled, const Tensor& indices,
            const MaybeTensor& offsets, const MaybeTensor& weights, int64_t num_embeddings,
            int64_t pooling_mode, int64_t padding_idx, bool include_last_offset)
      : grad_(torch::stable::contiguous(grad_pooled)),
        indices_(torch::stable::contiguous(indices)),
        weights_(contiguous(weights)),
        bags_(count_bags(indices, offsets, include_last_offset)),
        starts_(stream, offsets, bags_, indices.numel()),
        sorted(stream, indices.numel(), num_embeddings),
        bag_of_(stream, indices.numel()) {
    check_dim(grad_, 2, "grad_pooled", "[B, R]");
    check_optional_vector(weights_, indices.numel(), "per_sample_weights", "[N]", grad_,
                          "grad_pooled");
    RS_CHECK_VALUE(offsets || !weights, "per_sample_weights needs offsets");
    RS_CHECK_VALUE(grad_.size(0) == bags_ && bags_ < (int64_t(1) << 31), "grad_pooled must have ",
                   bags_, " rows, one a bag, fewer than 2^31; got shape ", shape_text(grad_));
    indices_ = checked_indices(stream, "indices", indices_, num_embeddings);
    const int64_t count = indices.numel(), rank = grad_.size(1);
    Bags<T> p{};
    p.table.rows = num_embeddings;
    p.indices = indices_of(stream, indices_);
    p.starts = starts_.get();
    p.weights = data<T>(stream, weights_);
    p.lookups = count;
    p.bags = bags_;
    p.padding_idx = padding_idx;
    p.is_mean = offsets && pooling_mode == kPoolMean;
    if (p.is_mean) bag_weights(stream, p, nullptr, inverses_.emplace(stream, bags_).get());
    if (p.is_mean || weights_) lookup_weights_.emplace(stream, count);
    segments.source = matrix(data<T>(stream, grad_), bags_, rank);
    segments.source_of = bag_of_.get();
    segments.weights = lookup_weights_ ? lookup_weights_->get() : nullptr;
    launch(stream, "low_rank_lookups", lookups_kernel<T>, {ceil_div(count, kLookupThreads)},
           {kLookupThreads}, 0, p, inverses_ ? inverses_->get() : nullptr, sorted.keys(),
           sorted.values(), bag_of_.get(), lookup_weights_ ? lookup_weights_->get() : nullptr);
    sorted.sort(stream);
  }

 private:
  static int64_t count_bags(const Tensor& indices, const MaybeTensor& offsets, bool last) {
    check_index_vector(indices, "indices", "[N]");
    if (!offsets) return indices.size(0);
    check_index_vector(*offsets, "offsets", "[B]");
    RS_CHECK_VALUE(!last || offsets->size(0) > 0,
                   "offsets must have at least one element with include_last_offset; got none");
    return offsets->size(0) - (last ? 1 : 0);
  }
  Tensor grad_, indices_;
  MaybeTensor weights_;
  int64_t bags_;
  Starts starts_;

 public:
  SortedKeys sorted;
  Segments<T> segments{};

 private:
  Scratch<int32_t> bag_of_;
  std::optional<Scratch<float>> inverses_, lookup_weights_;
};

Tensor low_rank_rows_grad(const Tensor& grad_pooled, const Tensor& indices,
                          const MaybeTensor& offsets, const MaybeTensor& per_sample_weights,
                          int64_t num_embeddings, int64_t pooling_mode, int64_t padding_idx,
                          bool include_last_offset) {
  const Stream stream(grad_pooled);
  return with_float_type(grad_pooled.scalar_type(), "grad_pooled", [&](auto tag) {
    using T = typename decltype(tag)::type;
    RowInputs<T> in(stream, grad_pooled, indices, offsets, per_sample_weights, num_embeddings,
                    pooling_mode, padding_idx, include_last_offset);
    Tensor grad = torch::stable::new_zeros(grad_pooled, {num_embeddings, grad_pooled.size(1)});
    Segments<T> p = in.segments;
    p.out = mutable_data<T>(stream, grad);
    in.sorted.sum(stream, p, num_embeddings);
    return grad;
  });
}

// begins[i]: whether a counting row begins at sorted position i.
__global__ void begins_kernel(const uint32_t* keys, int64_t count, int64_t limit, int32_t* begins) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < count) begins[i] = int64_t(keys[i]) < limit && (i == 0 || keys[i] != keys[i - 1]);
}

// rows[rank - 1] of each row, then the last one repeated (0 if none counts); count[0] of them.
__global__ void unique_rows_kernel(const uint32_t* keys, const int32_t* rank, int64_t count,
                                   int64_t limit, int64_t* rows, int64_t* unique) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const int64_t total = rank[count - 1];
  if (i == 0) unique[0] = total;
  if (int64_t(keys[i]) < limit && (i == 0 || keys[i] != keys[i - 1]))
    rows[rank[i] - 1] = int64_t(keys[i]);
  if (i < total) return;
  int64_t low = 0, high = count;  // the first position that does not count
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (int64_t(keys[middle]) < limit)
      low = middle + 1;
    else
      high = middle;
  }
  rows[i] = low ? int64_t(keys[low - 1]) : 0;
}

std::tuple<Tensor, Tensor, Tensor> low_rank_rows_grad_sparse(
    const Tensor& grad_pooled, const Tensor& indices, const MaybeTensor& offsets,
    const MaybeTensor& per_sample_weights, int64_t num_embeddings, int64_t pooling_mode,
    int64_t padding_idx, bool include_last_offset) {
  const Stream stream(grad_pooled);
  return with_float_type(grad_pooled.scalar_type(), "grad_pooled", [&](auto tag) {
    using T = typename decltype(tag)::type;
    RowInputs<T> in(stream, grad_pooled, indices, offsets, per_sample_weights, num_embeddings,
                    pooling_mode, padding_idx, include_last_offset);
    const int64_t count = indices.numel();
    Tensor rows = torch::stable::new_empty(grad_pooled, {count}, ScalarType::Long);
    Tensor values = torch::stable::new_zeros(grad_pooled, {count, grad_pooled.size(1)});
    Tensor unique = torch::stable::new_zeros(grad_pooled, {1}, ScalarType::Long);
    const Scratch<int32_t> begins(stream, count), rank(stream, count);
    const Extent grid{ceil_div(count, kLookupThreads)};
    launch(stream, "low_rank_begins", begins_kernel, grid, {kLookupThreads}, 0, in.sorted.sorted(),
           count, num_embeddings, begins.get());
    inclusive_sum(stream, begins.get(), rank.get(), count);
    launch(stream, "low_rank_unique_rows", unique_rows_kernel, grid, {kLookupThreads}, 0,
           in.sorted.sorted(), rank.get(), count, num_embeddings,
           mutable_data<int64_t>(stream, rows), mutable_data<int64_t>(stream, unique));
    Segments<T> p = in.segments;
    p.rank = rank.get();
    p.out = mutable_data<T>(stream, values);
    in.sorted.sum(stream, p, count);
    return std::make_tuple(rows, values, unique);
  });
}

// ---- max pooling ----

std::tuple<Tensor, Tensor> low_rank_embedding_bag_max(const Tensor& table, const Tensor& up,
                                                      const MaybeTensor& mean,
                                                      const Tensor& indices, const Tensor& offsets,
                                                      int64_t padding_idx,
                                                      bool include_last_offset) {
  const LowRankBagSizes size = check_low_rank_bag(table, up, mean, indices, offsets, std::nullopt,
                                                  padding_idx, include_last_offset);
  const Stream stream(table);
  return with_float_type(table.scalar_type(), "table", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const BagInputs<T> in(stream, size, table, up, mean, indices, offsets, std::nullopt, kPoolMax,
                          padding_idx);
    Tensor output = torch::stable::new_empty(table, {size.bags, size.embedding_dim});
    Tensor winners =
        torch::stable::new_empty(table, {size.bags, size.embedding_dim}, ScalarType::Long);
    launch(stream, "low_rank_max", max_kernel<T>,
           {size.bags, ceil_div(size.embedding_dim, kMaxColumns)}, {kMaxThreads},
           MaxMemory<T>::kBytes, in.p, in.up, in.mean, mutable_data<T>(stream, output),
           mutable_data<int64_t>(stream, winners));
    return std::make_tuple(output, winners);
  });
}

std::tuple<Tensor, Tensor, Tensor> low_rank_embedding_bag_max_grad(
    const Tensor& grad_output_, const Tensor& table, const Tensor& up, const Tensor& indices,
    const Tensor& positions, bool needs_mean) {
  LowRankBagSizes size =
      check_low_rank_bag(table, up, std::nullopt, indices, std::nullopt, std::nullopt, -1, false);
  const int64_t bags = grad_output_.size(0), dim = size.embedding_dim;
  check_same_shape(grad_output_, "grad_output", bags, dim, table);
  check_dim(positions, 2, "positions", "[B, D]");
  check_dtype(positions, ScalarType::Long, "positions");
  RS_CHECK_VALUE(positions.size(0) == bags && positions.size(1) == dim,
                 "positions must have the shape of grad_output, ", shape_text(grad_output_),
                 "; got ", shape_text(positions));
  const Stream stream(table);
  return with_float_type(table.scalar_type(), "table", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const BagInputs<T> in(stream, size, table, up, std::nullopt, indices, std::nullopt,
                          std::nullopt, kPoolMax, -1);
    const Tensor grad_output = torch::stable::contiguous(grad_output_),
                 winners = torch::stable::contiguous(positions);
    const T* grad = data<T>(stream, grad_output);
    const int64_t* winner = data<int64_t>(stream, winners);
    Tensor grad_table = torch::stable::new_zeros(table, {size.num_embeddings, size.rank});
    Tensor grad_up = torch::stable::new_empty(table, {dim, size.rank});
    Tensor grad_mean = torch::stable::new_empty(table, {needs_mean ? dim : 0});
    // parts of the bags are summed apart, then added in order
    const int64_t parts = std::clamp<int64_t>(
        std::min(bags / 32, bags / std::max<int64_t>(size.rank, 1)), 1, kMostMaxParts);
    const Scratch<float> sums(stream, parts * dim * (size.rank + 1));
    const MaxGrad<T> p{in.p, grad, winner, bags, dim, ceil_div(bags, parts), sums.get()};
    launch(stream, "low_rank_max_grad_up", max_grad_up_kernel<T>,
           {dim, ceil_div(size.rank + 1, kMaxGradThreads), parts}, {kMaxGradThreads}, 0, p);
    launch(stream, "low_rank_max_join", max_join_kernel<T>,
           {ceil_div(dim * (size.rank + 1), kLookupThreads)}, {kLookupThreads}, 0, p, parts,
           mutable_data<T>(stream, grad_up),
           needs_mean ? mutable_data<T>(stream, grad_mean) : nullptr);
    const int64_t pairs = bags * dim;
    if (size.lookups && pairs) {
      // each pair (bag, column) adds grad_output * up[column] to the row that won it
      SortedKeys sorted(stream, pairs, size.num_embeddings);
      launch(stream, "low_rank_max_keys", max_keys_kernel<T>, {ceil_div(pairs, kLookupThreads)},
             {kLookupThreads}, 0, in.p, winner, pairs, sorted.keys(), sorted.values());
      sorted.sort(stream);
      Segments<T> segments{};
      segments.source = in.up;
      segments.narrow_weights = grad;
      segments.out = mutable_data<T>(stream, grad_table);
      sorted.sum(stream, segments, size.num_embeddings);
    }
    return std::make_tuple(grad_table, grad_up, grad_mean);
  });
}

}  // namespace

RS_CUDA_OPS(m) {
  m.impl("low_rank_rows_grad", TORCH_BOX(&low_rank_rows_grad));
  m.impl("low_rank_rows_grad_sparse", TORCH_BOX(&low_rank_rows_grad_sparse));
  m.impl("low_rank_embedding_bag_max", TORCH_BOX(&low_rank_embedding_bag_max));
  m.impl("low_rank_embedding_bag_max_grad", TORCH_BOX(&low_rank_embedding_bag_max_grad));
}

}  // namespace recsparse
