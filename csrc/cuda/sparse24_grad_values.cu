// Gradient of the 2:4 linear to its kept values: of grad_sum^T input [O, I], what is kept.
#include "sparse24_product.h"

namespace recsparse::sparse24 {
namespace {

Tensor sparse24_linear_grad_values(const Tensor& grad_sum, const Tensor& input,
                                   const Tensor& metadata) {
  const Sparse24Sizes size = check_sparse24_grad_values(grad_sum, input, metadata);
  const Stream stream(grad_sum);
  return with_float_type(grad_sum.scalar_type(), "grad_sum", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Tensor grad = torch::stable::contiguous(grad_sum), x = torch::stable::contiguous(input);
    const Tensor m = torch::stable::contiguous(metadata);
    Tensor out = torch::stable::new_empty(input, {size.out_features, size.padded / 2});
    const GradValuesProduct<T> product = {
        matrix(data<T>(stream, grad), size.batch, size.out_features),
        matrix(data<T>(stream, x), size.batch, size.in_features),
        data<uint8_t>(stream, m),
        size.padded / 8,
        {mutable_data<T>(stream, out), size.out_features, size.padded / 2, true, {}}};
    run_product<T>(stream, "sparse24_grad_values", product, size.out_features, size.padded,
                   elements_of(size));
    return out;
  });
}

}  // namespace

RS_CUDA_OPS(m) { m.impl("sparse24_linear_grad_values", TORCH_BOX(&sparse24_linear_grad_values)); }

}  // namespace recsparse::sparse24
