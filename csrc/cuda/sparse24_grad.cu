// Gradients of the 2:4 linear on CUDA: checks, choice of tiles, launches around
// sparse24_product_kernels.cuh.
#include "../sparse24.h"
#include "sparse24_product.h"
#include "sparse24_product_kernels.cuh"

namespace recsparse {
namespace {

//                          M    N   warps, depth, stages
template <class T>
using LargeShape = ProductShape<T, 128, 128, 2, 2, 32, 3>;
template <class T>
using SmallShape = ProductShape<T, 64, 64, 2, 2, 64 / int(sizeof(T)), 3>;

template <class Shape, class T, class Product>
void launch_product(const Stream& stream, const char* name, Product product, int64_t rows,
                    int64_t columns, int64_t depth, int64_t elements, LinearOutput<T> to) {
  const int64_t tiles_m = ceil_div(rows, Shape::kRows),
                tiles_n = ceil_div(columns, Shape::kColumns);
  const int64_t count = to.rows * to.columns;
  const Split split = split_depth(stream, tiles_m * tiles_n, ceil_div(depth, Shape::kDepth), 4,
                                  most_parts<T>(elements, count));
  with_parts<T>(stream, name, split, count, to, [&](Parts parts) {
    product.set_parts(parts);
    launch(stream, name, product_kernel<Shape, Product>, {tiles_m * tiles_n, split.parts},
           {Shape::kThreads}, ProductTiles<Shape, Product>::kSharedBytes, product, tiles_m, tiles_n,
           split.steps_each);
  });
}

// [rows, columns] sums of so many terms each.
template <class T, class Product>
void run_product(const Stream& stream, const char* name, const Product& product, int64_t rows,
                 int64_t columns, int64_t depth, int64_t elements, LinearOutput<T> to) {
  if constexpr (sizeof(T) == 2) {
    const int64_t large =
        ceil_div(rows, LargeShape<T>::kRows) * ceil_div(columns, LargeShape<T>::kColumns);
    if (large >= stream.multiprocessors())
      return launch_product<LargeShape<T>>(stream, name, product, rows, columns, depth, elements,
                                           to);
  }
  launch_product<SmallShape<T>>(stream, name, product, rows, columns, depth, elements, to);
}

Tensor sparse24_linear_grad_input(const Tensor& grad_sum, const Tensor& values,
                                  const Tensor& metadata, int64_t in_features) {
  const Sparse24Sizes size = check_sparse24_grad_input(grad_sum, values, metadata, in_features);
  const Stream stream(grad_sum);
  return with_float_type(grad_sum.scalar_type(), "grad_sum", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Tensor grad = torch::stable::contiguous(grad_sum);
    const Tensor v = torch::stable::contiguous(values), m = torch::stable::contiguous(metadata);
    Tensor out = torch::stable::new_empty(grad_sum, {size.batch, size.in_features});
    const auto to = plain_output(mutable_data<T>(stream, out), size.batch, size.in_features);
    const GradInputProduct<T> product = {
        matrix(data<T>(stream, grad), size.batch, size.out_features),
        sparse_weight(data<T>(stream, v), data<uint8_t>(stream, m), size.out_features,
                      size.padded / 8),
        to};
    run_product<T>(
        stream, "sparse24_grad_input", product, size.batch, size.in_features, size.out_features,
        size.batch * (size.in_features + size.out_features) + size.out_features * size.padded / 2,
        to);
    return out;
  });
}

Tensor sparse24_linear_grad_values(const Tensor& grad_sum, const Tensor& input,
                                   const Tensor& metadata) {
  const Sparse24Sizes size = check_sparse24_grad_values(grad_sum, input, metadata);
  const Stream stream(grad_sum);
  return with_float_type(grad_sum.scalar_type(), "grad_sum", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Tensor grad = torch::stable::contiguous(grad_sum), x = torch::stable::contiguous(input);
    const Tensor m = torch::stable::contiguous(metadata);
    Tensor out = torch::stable::new_empty(input, {size.out_features, size.padded / 2});
    T* at = mutable_data<T>(stream, out);
    const GradValuesProduct<T> product = {
        matrix(data<T>(stream, grad), size.batch, size.out_features),
        matrix(data<T>(stream, x), size.batch, size.in_features),
        data<uint8_t>(stream, m),
        size.out_features,
        size.padded / 8,
        at,
        {}};
    run_product<T>(
        stream, "sparse24_grad_values", product, size.out_features, size.padded, size.batch,
        size.batch * (size.in_features + size.out_features) + size.out_features * size.padded / 2,
        plain_output(at, size.out_features, size.padded / 2));
    return out;
  });
}

}  // namespace

RS_CUDA_OPS(m) {
  m.impl("sparse24_linear_grad_input", TORCH_BOX(&sparse24_linear_grad_input));
  m.impl("sparse24_linear_grad_values", TORCH_BOX(&sparse24_linear_grad_values));
}

}  // namespace recsparse
