// Low-rank embeddings and embedding bags, CUDA: forward, and the gradients to the projection, the
// mean row and the sample weights. The gradient to the table is in low_rank_table_grad.cu.
#include <algorithm>
#include <tuple>

#include "low_rank_lookups.h"
#include "low_rank_product.h"

namespace recsparse {
using namespace low_rank;

namespace {

// mask[n]: whether lookup n is not padding.
__global__ void not_padding_kernel(Indices indices, int64_t count, int64_t padding_idx,
                                   uint8_t* mask) {
  const int64_t n = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (n < count) mask[n] = indices[n] != padding_idx;
}

// [B] float32 where there is a mean row to add: how often each output takes it.
template <class T>
std::optional<Scratch<float>> totals_of(const Stream& stream, const BagInputs<T>& in) {
  std::optional<Scratch<float>> totals;
  if (in.mean) bag_weights(stream, in.p, totals.emplace(stream, in.p.bags).get(), nullptr);
  return totals;
}

std::tuple<Tensor, Tensor> low_rank_embedding_bag(
    const Tensor& table, const Tensor& up, const MaybeTensor& mean, const Tensor& indices,
    const MaybeTensor& offsets, const MaybeTensor& per_sample_weights, int64_t pooling_mode,
    int64_t padding_idx, bool include_last_offset, bool /*scale_grad_by_freq*/, bool /*sparse*/,
    bool keep_pooled) {
  const LowRankBagSizes size = check_low_rank_bag(
      table, up, mean, indices, offsets, per_sample_weights, padding_idx, include_last_offset);
  RS_CHECK_VALUE(pooling_mode == kPoolSum || pooling_mode == kPoolMean,
                 "pooling_mode must be 0 (sum) or 1 (mean); got ", pooling_mode);
  RS_CHECK_VALUE(offsets || !per_sample_weights, "per_sample_weights needs offsets");
  const Stream stream(table);
  return with_float_type(table.scalar_type(), "table", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const BagInputs<T> in(stream, size, table, up, mean, indices, offsets, per_sample_weights,
                          pooling_mode, padding_idx);
    const bool fused = size.rank <= kMaxRank;
    Tensor output = empty_2d(table, size.bags, size.embedding_dim);
    Tensor pooled = empty_2d(table, keep_pooled || !fused ? size.bags : 0, size.rank);
    BagArguments<T> p{};
    p.in = in.p;
    p.up = in.up;
    p.mean = in.mean;
    p.pooled = pooled.numel() ? mutable_data<T>(stream, pooled) : nullptr;
    p.output = mutable_data<T>(stream, output);
    p.pooled_width = matrix<T>(p.pooled, size.bags, size.rank).width;
    p.output_width = matrix<T>(p.output, size.bags, size.embedding_dim).width;
    if (fused) {
      with_rows_config<T>(stream, size.bags, size.rank, [&](auto config) {
        using Config = decltype(config);
        launch(stream, "low_rank_bag", bag_kernel<Config, T>, {ceil_div(size.bags, Config::kRows)},
               {Config::kThreads}, BagMemory<Config>::kBytes, p);
      });
    } else {
      const int64_t pieces = ceil_div(size.rank, kPackOf16Bytes<T>);
      launch(stream, "low_rank_pool", pool_kernel<T>,
             {ceil_div(size.bags * pieces, kLookupThreads)}, {kLookupThreads}, 0, in.p, pieces,
             p.pooled, p.pooled_width);
      const auto totals = totals_of(stream, in);
      Product<T> product;
      product.a = matrix<T>(p.pooled, size.bags, size.rank);
      product.b = in.up;
      product.bias = in.mean;
      product.bias_scale = totals ? totals->get() : nullptr;
      product.out = p.output;
      run_product<Layout::kAlong, Layout::kAlong>(stream, product, 1);
    }
    return std::make_tuple(output, keep_pooled ? pooled : empty_2d(table, 0, size.rank));
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> low_rank_embedding_bag_grad(
    const Tensor& grad_output_, const Tensor& table, const Tensor& up, const MaybeTensor& mean,
    const Tensor& indices, const MaybeTensor& offsets, const MaybeTensor& per_sample_weights,
    const Tensor& pooled_, int64_t pooling_mode, int64_t padding_idx, bool include_last_offset,
    bool needs_sample_weights) {
  const LowRankBagSizes size = check_low_rank_bag(
      table, up, mean, indices, offsets, per_sample_weights, padding_idx, include_last_offset);
  RS_CHECK_VALUE(!needs_sample_weights || offsets, "a gradient to sample weights needs offsets");
  check_same_shape(grad_output_, "grad_output", size.bags, size.embedding_dim, table);
  check_same_shape(pooled_, "pooled", size.bags, size.rank, table);
  const Stream stream(table);
  return with_float_type(table.scalar_type(), "table", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const BagInputs<T> in(stream, size, table, up, mean, indices, offsets, per_sample_weights,
                          pooling_mode, padding_idx);
    const Tensor grad_output = torch::stable::contiguous(grad_output_),
                 pooled = torch::stable::contiguous(pooled_);
    Tensor grad_pooled = empty_2d(table, size.bags, size.rank);
    // zeros: without bags there is nothing to sum
    Tensor grad_up = torch::stable::new_zeros(table, {size.embedding_dim, size.rank});
    Tensor grad_mean = torch::stable::new_empty(table, {mean ? size.embedding_dim : 0});
    // lookups that are padding, or in no bag, have no effect
    Tensor grad_weights =
        torch::stable::new_zeros(table, {needs_sample_weights ? size.lookups : 0});
    const Matrix<T> grad = matrix(data<T>(stream, grad_output), size.bags, size.embedding_dim);
    std::optional<Scratch<uint8_t>> mask;
    if (!offsets && padding_idx >= 0)
      launch(stream, "low_rank_not_padding", not_padding_kernel,
             {ceil_div(size.lookups, kLookupThreads)}, {kLookupThreads}, 0, in.p.indices,
             size.lookups, padding_idx, mask.emplace(stream, size.lookups).get());
    const auto totals = offsets ? totals_of(stream, in) : std::nullopt;

    Product<T> to_pooled;
    to_pooled.a = grad;
    to_pooled.b = in.up;
    to_pooled.row_mask = mask ? mask->get() : nullptr;
    to_pooled.out = mutable_data<T>(stream, grad_pooled);
    run_product<Layout::kAlong, Layout::kAcross>(stream, to_pooled, 1);
    Product<T> to_up;
    to_up.a = grad;
    to_up.b = matrix(data<T>(stream, pooled), size.bags, size.rank);
    to_up.row_mask = to_pooled.row_mask;
    to_up.out = mutable_data<T>(stream, grad_up);
    to_up.sums = mean ? mutable_data<T>(stream, grad_mean) : nullptr;
    to_up.sum_scale = totals ? totals->get() : nullptr;
    run_product<Layout::kAcross, Layout::kAcross>(stream, to_up,
                                                  size.rank ? size.bags / size.rank : 1);
    if (needs_sample_weights)
      launch(stream, "low_rank_grad_weights", grad_weights_kernel<T>,
             {ceil_div(size.bags * kWarp, kLookupThreads)}, {kLookupThreads}, 0, in.p, grad,
             matrix(data<T>(stream, grad_pooled), size.bags, size.rank), in.mean,
             mutable_data<T>(stream, grad_weights));
    return std::make_tuple(grad_pooled, grad_up, grad_mean, grad_weights);
  });
}

}  // namespace

RS_CUDA_OPS(m) {
  m.impl("low_rank_embedding_bag", TORCH_BOX(&low_rank_embedding_bag));
  m.impl("low_rank_embedding_bag_grad", TORCH_BOX(&low_rank_embedding_bag_grad));
}

}  // namespace recsparse
