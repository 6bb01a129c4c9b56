// Conversions of masked embedding tables, CPU: to and from dense rows and to another mask; and
// renormalisation in place.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "huge_pages.h"
#include "masked_embedding.h"
#include "radix_sort.h"

namespace recsparse {
namespace {

constexpr int64_t kRowGrain = 512;  // table rows a task: some 10 us

Tensor unpack(const Tensor& values, const Tensor& rows, const MaybeTensor& bases,
              const MaybeTensor& starts, const MaybeTensor& columns, int64_t num_embeddings,
              int64_t embedding_dim) {
  const MaskedTableArgs args{values, rows, bases, starts, columns, num_embeddings, embedding_dim};
  return with_float_type(values.scalar_type(), "values", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const MaskedTable<T> table = masked_table<T>(args);
    Tensor dense = torch::stable::new_empty(values, {num_embeddings, embedding_dim});
    expect_first_touch(dense);
    T* out = mutable_data<T>(dense);
    run_over_rows(num_embeddings, kRowGrain, [&](int64_t begin, int64_t end) {
      return masked_pack_kernels<T>().unpack(table, begin, end, out + begin * embedding_dim);
    });
    return dense;
  });
}

std::vector<int64_t> shape_of(const Tensor& t) {
  std::vector<int64_t> shape;
  for (int64_t i = 0; i < t.dim(); ++i) shape.push_back(t.size(i));
  return shape;
}

Tensor unpack_grad_values(const Tensor& grad_output, const Tensor& values, const Tensor& rows,
                          const MaybeTensor& bases, const MaybeTensor& starts,
                          const MaybeTensor& columns, int64_t num_embeddings,
                          int64_t embedding_dim) {
  const MaskedTableArgs args{values, rows, bases, starts, columns, num_embeddings, embedding_dim};
  return with_float_type(values.scalar_type(), "values", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const MaskedTable<T> table = masked_table<T>(args);
    check_same_dtype(grad_output, "grad_output", values, "values");
    RS_CHECK_VALUE(grad_output.dim() == 2 && grad_output.size(0) == num_embeddings &&
                       grad_output.size(1) == embedding_dim && grad_output.is_contiguous(),
                   "grad_output must be contiguous of shape [", num_embeddings, ", ", embedding_dim,
                   "]; got ", shape_text(grad_output));
    Tensor grad = torch::stable::new_empty(values, shape_of(values));
    const T* dense = data<T>(grad_output);
    T* out = mutable_data<T>(grad);
    run_over_rows(num_embeddings, kRowGrain, [&](int64_t begin, int64_t end) {
      return masked_pack_kernels<T>().gather(table, begin, end, dense + begin * embedding_dim, out);
    });
    return grad;
  });
}

Tensor repack(const Tensor& values, const Tensor& rows, const MaybeTensor& bases,
              const MaybeTensor& starts, const MaybeTensor& columns, const Tensor& new_values,
              const Tensor& new_rows, const MaybeTensor& new_bases, const MaybeTensor& new_starts,
              const MaybeTensor& new_columns, int64_t num_embeddings, int64_t embedding_dim) {
  const MaskedTableArgs args{values, rows, bases, starts, columns, num_embeddings, embedding_dim};
  check_same_dtype(new_values, "new_values", values, "values");
  Tensor output = torch::stable::new_empty(values, shape_of(new_values));
  const MaskedTableArgs new_args{output,      new_rows,       new_bases,    new_starts,
                                 new_columns, num_embeddings, embedding_dim};
  with_float_type(values.scalar_type(), "values", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const MaskedTable<T> from = masked_table<T>(args);
    const MaskedTable<T> to = masked_table<T>(new_args);
    run_over_rows(num_embeddings, kRowGrain, [&](int64_t begin, int64_t end) {
      return masked_pack_kernels<T>().repack(from, to, begin, end, mutable_data<T>(output));
    });
  });
  return output;
}

void renorm(const Tensor& values, const Tensor& rows, const MaybeTensor& bases,
            const MaybeTensor& starts, const MaybeTensor& columns, const Tensor& indices,
            int64_t num_embeddings, int64_t embedding_dim, double max_norm, double norm_type) {
  const MaskedTableArgs args{values, rows, bases, starts, columns, num_embeddings, embedding_dim};
  with_float_type(values.scalar_type(), "values", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const MaskedTable<T> table = masked_table<T>(args);
    const Bags bags =
        check_bags(args, indices, std::nullopt, std::nullopt, int64_t(BagMode::kEach), -1, false);
    Scratch<uint64_t> keys(bags.count), other(bags.count);
    for (int64_t j = 0; j < bags.count; ++j) keys[j] = uint64_t(bags.index(j));
    const int bits = int(std::bit_width(uint64_t(num_embeddings)));
    uint64_t* sorted = radix_sort(keys.get(), other.get(), bags.count, 0, bits);
    const int64_t unique = std::unique(sorted, sorted + bags.count) - sorted;  // each row once
    run_over_rows(unique, kRowGrain, [&](int64_t begin, int64_t end) {
      return masked_pack_kernels<T>().renorm(table, reinterpret_cast<const int64_t*>(sorted), begin,
                                             end, float(max_norm), float(norm_type),
                                             mutable_data<T>(values));
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(recsparse, CPU, m) {
  m.impl("masked_embedding_unpack", TORCH_BOX(&unpack));
  m.impl("masked_embedding_unpack_grad_values", TORCH_BOX(&unpack_grad_values));
  m.impl("masked_embedding_repack", TORCH_BOX(&repack));
  m.impl("masked_embedding_renorm", TORCH_BOX(&renorm));
}

}  // namespace recsparse
