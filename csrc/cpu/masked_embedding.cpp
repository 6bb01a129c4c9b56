// Lookups in masked embedding tables, CPU: forward and the gradient of the sample weights.
#include "masked_embedding.h"

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "huge_pages.h"

namespace recsparse {
namespace {

std::tuple<Tensor, Tensor> masked_embedding_bag(
    const Tensor& values, const Tensor& rows, const MaybeTensor& bases, const MaybeTensor& starts,
    const MaybeTensor& columns, const Tensor& indices, const MaybeTensor& offsets,
    const MaybeTensor& per_sample_weights, int64_t num_embeddings, int64_t embedding_dim,
    int64_t mode, int64_t padding_idx, bool include_last_offset, bool /*scale_grad_by_freq*/,
    bool /*sparse*/) {
  const MaskedTableArgs args{values, rows, bases, starts, columns, num_embeddings, embedding_dim};
  return with_float_type(values.scalar_type(), "values", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const MaskedTable<T> table = masked_table<T>(args);
    const Bags bags = check_bags(args, indices, offsets, per_sample_weights, mode, padding_idx,
                                 include_last_offset);
    const bool max = BagMode(mode) == BagMode::kMax;
    Tensor output = torch::stable::new_empty(values, {bags.bags, embedding_dim});
    Tensor argmax =
        torch::stable::new_empty(values, {max ? bags.bags : 0, embedding_dim}, ScalarType::Int);
    const auto& kernels = masked_bag_kernels<T>();
    T* out = mutable_data<T>(output);
    int32_t* places = mutable_data<int32_t>(argmax);
    run_over_bags(bags, [&](int64_t begin, int64_t end) {
      return max ? kernels.max(table, bags, begin, end, out, places)
                 : kernels.sum(table, bags, begin, end, out);
    });
    return std::make_tuple(output, argmax);
  });
}

Tensor masked_embedding(const Tensor& values, const Tensor& rows, const MaybeTensor& bases,
                        const MaybeTensor& starts, const MaybeTensor& columns,
                        const Tensor& indices, int64_t num_embeddings, int64_t embedding_dim,
                        int64_t /*padding_idx*/, bool /*scale_grad_by_freq*/, bool /*sparse*/) {
  const MaskedTableArgs args{values, rows, bases, starts, columns, num_embeddings, embedding_dim};
  return with_float_type(values.scalar_type(), "values", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const MaskedTable<T> table = masked_table<T>(args);
    const Bags bags =
        check_bags(args, indices, std::nullopt, std::nullopt, int64_t(BagMode::kEach), -1, false);
    std::vector<int64_t> shape;
    for (int64_t i = 0; i < indices.dim(); ++i) shape.push_back(indices.size(i));
    shape.push_back(embedding_dim);
    Tensor output = torch::stable::new_empty(values, shape);
    expect_first_touch(output);
    T* out = mutable_data<T>(output);
    run_over_bags(bags, [&](int64_t begin, int64_t end) {
      return masked_bag_kernels<T>().sum(table, bags, begin, end, out);
    });
    return output;
  });
}

Tensor masked_embedding_bag_grad_per_sample_weights(
    const Tensor& grad_output, const Tensor& values, const Tensor& rows, const MaybeTensor& bases,
    const MaybeTensor& starts, const MaybeTensor& columns, const Tensor& indices,
    const MaybeTensor& offsets, int64_t num_embeddings, int64_t embedding_dim, int64_t mode,
    int64_t padding_idx, bool include_last_offset) {
  const MaskedTableArgs args{values, rows, bases, starts, columns, num_embeddings, embedding_dim};
  return with_float_type(values.scalar_type(), "values", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const MaskedTable<T> table = masked_table<T>(args);
    const Bags bags =
        check_bags(args, indices, offsets, std::nullopt, mode, padding_idx, include_last_offset);
    check_same_dtype(grad_output, "grad_output", values, "values");
    RS_CHECK_VALUE(grad_output.dim() == 2 && grad_output.size(0) == bags.bags &&
                       grad_output.size(1) == embedding_dim && grad_output.is_contiguous(),
                   "grad_output must be contiguous of shape [", bags.bags, ", ", embedding_dim,
                   "]; got ", shape_text(grad_output));
    std::vector<int64_t> shape;
    for (int64_t i = 0; i < indices.dim(); ++i) shape.push_back(indices.size(i));
    Tensor grad = torch::stable::new_empty(values, shape, ScalarType::Float);
    float* out = mutable_data<float>(grad);
    std::fill(out + (bags.bags ? bags.begin(bags.bags) : 0), out + bags.count, 0.0f);  // in no bag
    run_over_bags(bags, [&](int64_t begin, int64_t end) {
      return masked_bag_kernels<T>().grad_weights(table, bags, begin, end, data<T>(grad_output),
                                                  out);
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
  return with_float_type(like.scalar_type(), "like", [&](auto tag) {
    using T = typename decltype(tag)::type;
    RS_CHECK_VALUE(num_embeddings >= 0 && embedding_dim >= 1 && embedding_dim <= kMaxMaskedDim,
                   "num_embeddings must not be negative and embedding_dim in [1, 32768]; got ",
                   num_embeddings, " and ", embedding_dim);
    check_dtype(records, sizeof(T) == 4 ? ScalarType::Int : ScalarType::Short, "records");
    check_vector(records, records.scalar_type(), records.numel(), "records");
    check_vector(starts, ScalarType::Int, kept < 0 ? num_embeddings : 0, "starts");
    check_vector(bases, ScalarType::Long, kept < 0 ? base_count(num_embeddings) : 0, "bases");
    MaskedTable<T> table = {};
    table.layout = kept < 0 ? MaskedLayout::kBitmaskRecords : MaskedLayout::kFixedKRecords;
    table.num_embeddings = num_embeddings;
    table.dim = embedding_dim;
    table.mask_bytes = (embedding_dim + 7) / 8;
    table.mask_elements = (table.mask_bytes + int64_t(sizeof(T)) - 1) / int64_t(sizeof(T));
    table.row_values = table.mask_elements + kept;
    table.nnz = records.numel();
    table.last_roomy = table.nnz - mask_word_bytes(embedding_dim) / int64_t(sizeof(T));
    table.mean_bytes = table.nnz * int64_t(sizeof(T)) / std::max<int64_t>(1, num_embeddings);
    table.values = data<T>(records);
    table.starts = data<uint32_t>(starts);
    table.bases = data<int64_t>(bases);
    RS_CHECK_VALUE(kept < 0 || table.nnz == num_embeddings * table.row_values, "records must have ",
                   num_embeddings * table.row_values, " elements; got ", table.nnz);
    const MaskedTableArgs args{like,         records,        bases,        starts,
                               std::nullopt, num_embeddings, embedding_dim};
    const Bags bags = check_bags(args, indices, offsets, per_sample_weights, mode, padding_idx,
                                 include_last_offset);
    Tensor output = torch::stable::new_empty(like, {bags.bags, embedding_dim});
    T* out = mutable_data<T>(output);
    const auto& kernels = masked_bag_kernels<T>();
    if (BagMode(mode) == BagMode::kMax) {
      Scratch<int32_t> places(bags.bags * embedding_dim);
      run_over_bags(bags, [&](int64_t begin, int64_t end) {
        return kernels.max(table, bags, begin, end, out, places.get());
      });
    } else {
      run_over_bags(bags, [&](int64_t begin, int64_t end) {
        return kernels.sum(table, bags, begin, end, out);
      });
    }
    return output;
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(recsparse, CPU, m) {
  m.impl("masked_embedding", TORCH_BOX(&masked_embedding));
  m.impl("masked_embedding_records", TORCH_BOX(&masked_embedding_records));
  m.impl("masked_embedding_bag", TORCH_BOX(&masked_embedding_bag));
  m.impl("masked_embedding_bag_grad_per_sample_weights",
         TORCH_BOX(&masked_embedding_bag_grad_per_sample_weights));
}

}  // namespace recsparse
