// Gradient of the 2:4 linear to its input: grad_input [B, I] = grad_sum [B, O] W.
#include "sparse24_product.h"

namespace recsparse::sparse24 {
namespace {

Tensor sparse24_linear_grad_input(const Tensor& grad_sum, const Tensor& values,
                                  const Tensor& metadata, int64_t in_features) {
  const Sparse24Sizes size = check_sparse24_grad_input(grad_sum, values, metadata, in_features);
  const Stream stream(grad_sum);
  return with_float_type(grad_sum.scalar_type(), "grad_sum", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Tensor grad = torch::stable::contiguous(grad_sum);
    const Tensor v = torch::stable::contiguous(values), m = torch::stable::contiguous(metadata);
    Tensor out = torch::stable::new_empty(grad_sum, {size.batch, size.in_features});
    const GradInputProduct<T> product = {
        matrix(data<T>(stream, grad), size.batch, size.out_features),
        sparse_weight(data<T>(stream, v), data<uint8_t>(stream, m), size.out_features,
                      size.padded / 8),
        {mutable_data<T>(stream, out),
         size.batch,
         size.in_features,
         pairs_aligned(size.in_features),
         {}}};
    run_product<T>(stream, "sparse24_grad_input", product, size.batch, size.in_features,
                   elements_of(size));
    return out;
  });
}

}  // namespace

RS_CUDA_OPS(m) { m.impl("sparse24_linear_grad_input", TORCH_BOX(&sparse24_linear_grad_input)); }

}  // namespace recsparse::sparse24
