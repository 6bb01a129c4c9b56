// x W^T against a whole masked table, and its gradients, CPU.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "huge_pages.h"
#include "masked_embedding.h"

namespace recsparse {
namespace {

constexpr int64_t kRowGrain = 256;

void check_matrix(const Tensor& t, const Tensor& values, int64_t rows, int64_t columns,
                  const char* name) {
  check_same_dtype(t, name, values, "values");
  RS_CHECK_VALUE(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns && t.is_contiguous(),
                 name, " must be contiguous of shape [", rows, ", ", columns, "]; got ",
                 shape_text(t));
}

Tensor matmul_t(const Tensor& input, const Tensor& values, const Tensor& rows,
                const MaybeTensor& bases, const MaybeTensor& starts, const MaybeTensor& columns,
                int64_t num_embeddings, int64_t embedding_dim) {
  const MaskedTableArgs args{values, rows, bases, starts, columns, num_embeddings, embedding_dim};
  return with_float_type(values.scalar_type(), "values", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const MaskedTable<T> table = masked_table<T>(args);
    check_dim(input, 2, "input", "[B, D]");
    const int64_t batch = input.size(0), padded = matmul_padded(batch);
    check_matrix(input, values, batch, embedding_dim, "input");
    Tensor output = torch::stable::new_empty(values, {batch, num_embeddings});
    expect_first_touch(output);
    Scratch<float> inputs_t(embedding_dim * padded);
    masked_matmul_kernels<T>().transpose(data<T>(input), batch, embedding_dim, padded,
                                         inputs_t.get());
    run_over_rows(num_embeddings, kRowGrain, [&](int64_t begin, int64_t end) {
      return masked_matmul_kernels<T>().forward(table, inputs_t.get(), batch, padded, begin, end,
                                                mutable_data<T>(output));
    });
    return output;
  });
}

Tensor matmul_t_grad_input(const Tensor& grad_output, const Tensor& values, const Tensor& rows,
                           const MaybeTensor& bases, const MaybeTensor& starts,
                           const MaybeTensor& columns, int64_t num_embeddings,
                           int64_t embedding_dim) {
  // Fixed pieces of the table, each with its own sum, added in order: the same for any thread
  // count.
  constexpr int64_t kPieces = 16;
  const MaskedTableArgs args{values, rows, bases, starts, columns, num_embeddings, embedding_dim};
  return with_float_type(values.scalar_type(), "values", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const MaskedTable<T> table = masked_table<T>(args);
    check_dim(grad_output, 2, "grad_output", "[B, V]");
    const int64_t batch = grad_output.size(0), padded = matmul_padded(batch);
    check_matrix(grad_output, values, batch, num_embeddings, "grad_output");
    const int64_t pieces = std::clamp<int64_t>(num_embeddings / 4096, 1, kPieces);
    const int64_t size = embedding_dim * padded;
    Scratch<float> sums(pieces * size);
    run_over_rows(pieces, 1, [&](int64_t begin, int64_t end) {
      bool consistent = true;
      for (int64_t p = begin; p < end; ++p) {
        std::fill(sums.get() + p * size, sums.get() + (p + 1) * size, 0.0f);
        consistent &= masked_matmul_kernels<T>().grad_input(
            table, data<T>(grad_output), batch, padded, num_embeddings * p / pieces,
            num_embeddings * (p + 1) / pieces, sums.get() + p * size);
      }
      return consistent;
    });
    Tensor grad = torch::stable::new_empty(values, {batch, embedding_dim});
    masked_matmul_kernels<T>().sum_transposed(sums.get(), pieces, batch, embedding_dim, padded,
                                              mutable_data<T>(grad));
    return grad;
  });
}

Tensor matmul_t_grad_values(const Tensor& grad_output, const Tensor& input, const Tensor& values,
                            const Tensor& rows, const MaybeTensor& bases, const MaybeTensor& starts,
                            const MaybeTensor& columns, int64_t num_embeddings,
                            int64_t embedding_dim) {
  const MaskedTableArgs args{values, rows, bases, starts, columns, num_embeddings, embedding_dim};
  return with_float_type(values.scalar_type(), "values", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const MaskedTable<T> table = masked_table<T>(args);
    check_dim(input, 2, "input", "[B, D]");
    const int64_t batch = input.size(0), padded = matmul_padded(batch);
    check_matrix(input, values, batch, embedding_dim, "input");
    check_matrix(grad_output, values, batch, num_embeddings, "grad_output");
    std::vector<int64_t> shape{values.size(0)};
    if (values.dim() == 2) shape.push_back(values.size(1));
    Tensor grad = torch::stable::new_empty(values, shape);
    Scratch<float> inputs_t(embedding_dim * padded);
    masked_matmul_kernels<T>().transpose(data<T>(input), batch, embedding_dim, padded,
                                         inputs_t.get());
    run_over_rows(num_embeddings, kRowGrain, [&](int64_t begin, int64_t end) {
      return masked_matmul_kernels<T>().grad_values(table, inputs_t.get(), data<T>(grad_output),
                                                    batch, padded, begin, end,
                                                    mutable_data<T>(grad));
    });
    return grad;
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(recsparse, CPU, m) {
  m.impl("masked_embedding_matmul_t", TORCH_BOX(&matmul_t));
  m.impl("masked_embedding_matmul_t_grad_input", TORCH_BOX(&matmul_t_grad_input));
  m.impl("masked_embedding_matmul_t_grad_values", TORCH_BOX(&matmul_t_grad_values));
}

}  // namespace recsparse
