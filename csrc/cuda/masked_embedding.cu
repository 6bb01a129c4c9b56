// Lookups in masked embedding tables, CUDA: forward and the gradient of the sample weights.
#include <tuple>

#include "masked_embedding.h"
#include "masked_embedding_bag_kernels.cuh"

namespace recsparse {
namespace {

template <class T>
void run_bags(const Stream& stream, const DeviceTable<T>& table, const Bags& bags, bool max,
              T* output, int32_t* argmax) {
  with_team(table.dim, [&](auto lanes) {
    constexpr int kLanes = lanes.value;
    const Extent grid = team_grid(bags.bags, kLanes);
    const bool four = by_four(output, table.dim);
    if (max) {
      launch(stream, "masked_embedding_bag", bag_kernel<T, kLanes, true>, grid, {kTeamThreads}, 0,
             table, bags, output, argmax, four);
    } else {
      launch(stream, "masked_embedding_bag", bag_kernel<T, kLanes, false>, grid, {kTeamThreads}, 0,
             table, bags, output, argmax, four);
    }
  });
}

template <class T>
void run_expand(const Stream& stream, const DeviceTable<T>& table, const Bags& bags, T* output) {
  with_team(table.dim, [&](auto lanes) {
    constexpr int kLanes = lanes.value;
    launch(stream, "masked_embedding", rows_kernel<T, kLanes, RowsOp::kExpand>,
           team_grid(ceil_div(bags.count, kLanes), kLanes), {kTeamThreads}, 0, table, table, bags,
           output, static_cast<T*>(nullptr), by_four(output, table.dim));
  });
}

std::tuple<Tensor, Tensor> masked_embedding_bag(
    const Tensor& values, const Tensor& rows, const MaybeTensor& bases, const MaybeTensor& starts,
    const MaybeTensor& columns, const Tensor& indices, const MaybeTensor& offsets,
    const MaybeTensor& per_sample_weights, int64_t num_embeddings, int64_t embedding_dim,
    int64_t mode, int64_t padding_idx, bool include_last_offset, bool /*scale_grad_by_freq*/,
    bool /*sparse*/) {
  const MaskedTableArgs args{values, rows, bases, starts, columns, num_embeddings, embedding_dim};
  check_masked_table(args);
  const Stream stream(values);
  return with_float_type(values.scalar_type(), "values", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto table = device_table<T>(stream, args);
    const DeviceBags in(stream, indices, num_embeddings, offsets, per_sample_weights, mode,
                        padding_idx, include_last_offset);
    const bool max = BagMode(mode) == BagMode::kMax;
    Tensor output = torch::stable::new_empty(values, {in.bags.bags, embedding_dim});
    Tensor argmax =
        torch::stable::new_empty(values, {max ? in.bags.bags : 0, embedding_dim}, ScalarType::Int);
    run_bags(stream, table, in.bags, max, mutable_data<T>(stream, output),
             mutable_data<int32_t>(stream, argmax));
    return std::make_tuple(output, argmax);
  });
}

Tensor masked_embedding(const Tensor& values, const Tensor& rows, const MaybeTensor& bases,
                        const MaybeTensor& starts, const MaybeTensor& columns,
                        const Tensor& indices, int64_t num_embeddings, int64_t embedding_dim,
                        int64_t /*padding_idx*/, bool /*scale_grad_by_freq*/, bool /*sparse*/) {
  const MaskedTableArgs args{values, rows, bases, starts, columns, num_embeddings, embedding_dim};
  check_masked_table(args);
  const Stream stream(values);
  return with_float_type(values.scalar_type(), "values", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto table = device_table<T>(stream, args);
    const DeviceBags in(stream, indices, num_embeddings, std::nullopt, std::nullopt,
                        int64_t(BagMode::kEach), -1, false);
    std::vector<int64_t> shape = shape_of(indices);
    shape.push_back(embedding_dim);
    Tensor output = torch::stable::new_empty(values, shape);
    run_expand(stream, table, in.bags, mutable_data<T>(stream, output));
    return output;
  });
}

Tensor unpack(const Tensor& values, const Tensor& rows, const MaybeTensor& bases,
              const MaybeTensor& starts, const MaybeTensor& columns, int64_t num_embeddings,
              int64_t embedding_dim) {
  const MaskedTableArgs args{values, rows, bases, starts, columns, num_embeddings, embedding_dim};
  check_masked_table(args);
  const Stream stream(values);
  return with_float_type(values.scalar_type(), "values", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto table = device_table<T>(stream, args);
    Bags every = {};
    every.count = num_embeddings;
    Tensor dense = torch::stable::new_empty(values, {num_embeddings, embedding_dim});
    run_expand(stream, table, every, mutable_data<T>(stream, dense));
    return dense;
  });
}

Tensor masked_embedding_bag_grad_per_sample_weights(
    const Tensor& grad_output, const Tensor& values, const Tensor& rows, const MaybeTensor& bases,
    const MaybeTensor& starts, const MaybeTensor& columns, const Tensor& indices,
    const MaybeTensor& offsets, int64_t num_embeddings, int64_t embedding_dim, int64_t mode,
    int64_t padding_idx, bool include_last_offset) {
  const MaskedTableArgs args{values, rows, bases, starts, columns, num_embeddings, embedding_dim};
  check_masked_table(args);
  const Stream stream(values);
  return with_float_type(values.scalar_type(), "values", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto table = device_table<T>(stream, args);
    const DeviceBags in(stream, indices, num_embeddings, offsets, std::nullopt, mode, padding_idx,
                        include_last_offset);
    check_matrix(grad_output, values, in.bags.bags, embedding_dim, "grad_output");
    Tensor grad = torch::stable::new_zeros(values, shape_of(indices), ScalarType::Float);
    const T* grads = data<T>(stream, grad_output);
    with_team(table.dim, [&](auto lanes) {
      constexpr int kLanes = lanes.value;
      launch(stream, "masked_embedding_bag_grad_per_sample_weights", grad_weights_kernel<T, kLanes>,
             team_grid(in.bags.bags, kLanes), {kTeamThreads}, 0, table, in.bags, grads,
             mutable_data<float>(stream, grad), by_four(grads, table.dim));
    });
    return grad;
  });
}

// Lookups in records: each row's mask beside its values
// (recsparse_kernels/ops/masked_embedding_records.py). `like` gives the dtype of what the records
// hold; kept is k of layout fixed_k, else -1.
Tensor masked_embedding_records(const Tensor& like, const Tensor& records, const Tensor& starts,
                                const Tensor& bases, const Tensor& indices,
                                const MaybeTensor& offsets, const MaybeTensor& per_sample_weights,
                                int64_t num_embeddings, int64_t embedding_dim, int64_t kept,
                                int64_t mode, int64_t padding_idx, bool include_last_offset) {
  const Stream stream(records);
  return with_float_type(like.scalar_type(), "like", [&](auto tag) {
    using T = typename decltype(tag)::type;
    RS_CHECK_VALUE(num_embeddings >= 0 && embedding_dim >= 1 && embedding_dim <= kMaxMaskedDim,
                   "num_embeddings must not be negative and embedding_dim in [1, 32768]; got ",
                   num_embeddings, " and ", embedding_dim);
    check_dtype(records, sizeof(T) == 4 ? ScalarType::Int : ScalarType::Short, "records");
    check_vector(records, records.scalar_type(), records.numel(), "records");
    check_vector(starts, ScalarType::Int, kept < 0 ? num_embeddings : 0, "starts");
    check_vector(bases, ScalarType::Long, kept < 0 ? base_count(num_embeddings) : 0, "bases");
    DeviceTable<T> table = {};
    table.layout = kept < 0 ? MaskedLayout::kBitmaskRecords : MaskedLayout::kFixedKRecords;
    table.num_embeddings = num_embeddings;
    table.dim = embedding_dim;
    table.mask_bytes = (embedding_dim + 7) / 8;
    table.mask_elements = ceil_div(table.mask_bytes, sizeof(T));
    table.row_values = table.mask_elements + kept;
    table.nnz = records.numel();
    table.values = data<T>(stream, records);
    table.starts = data<uint32_t>(stream, starts);
    table.bases = data<int64_t>(stream, bases);
    RS_CHECK_VALUE(kept < 0 || table.nnz == num_embeddings * table.row_values, "records must have ",
                   num_embeddings * table.row_values, " elements; got ", table.nnz);
    const DeviceBags in(stream, indices, num_embeddings, offsets, per_sample_weights, mode,
                        padding_idx, include_last_offset);
    Tensor output = torch::stable::new_empty(like, {in.bags.bags, embedding_dim});
    T* out = mutable_data<T>(stream, output);
    if (BagMode(mode) == BagMode::kEach) {
      run_expand(stream, table, in.bags, out);
    } else {
      run_bags(stream, table, in.bags, BagMode(mode) == BagMode::kMax, out,
               static_cast<int32_t*>(nullptr));
    }
    return output;
  });
}

}  // namespace

RS_CUDA_OPS(m) {
  m.impl("masked_embedding", TORCH_BOX(&masked_embedding));
  m.impl("masked_embedding_bag", TORCH_BOX(&masked_embedding_bag));
  m.impl("masked_embedding_records", TORCH_BOX(&masked_embedding_records));
  m.impl("masked_embedding_unpack", TORCH_BOX(&unpack));
  m.impl("masked_embedding_bag_grad_per_sample_weights",
         TORCH_BOX(&masked_embedding_bag_grad_per_sample_weights));
}

}  // namespace recsparse
