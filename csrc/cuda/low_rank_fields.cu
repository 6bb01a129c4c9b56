// Low-rank embeddings of many fields with their interaction term, CUDA: checks, allocation,
// launches.
#include <algorithm>
#include <cassert>
#include <tuple>

#include "low_rank_fields_kernels.cuh"
#include "low_rank_lookups.h"

namespace recsparse {
using namespace low_rank;

namespace {

// Raises (on a GPU: a device-side assertion) unless each index is within its field's rows.
#ifndef RS_CUDA_ON_CPU
__global__ void assert_fields_kernel(Indices indices, const int64_t* starts, int64_t lookups,
                                     int64_t fields) {
  const int64_t n = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (n >= lookups) return;
  const int64_t k = n % fields;
  assert(indices[n] >= 0 && indices[n] < starts[k + 1] - starts[k] &&
         "recsparse_kernels: indices must be within the rows of their field");
}
#endif
void check_fields(const Stream& stream, const Indices& indices, const int64_t* starts,
                  int64_t lookups, int64_t fields) {
  if (check_indices_mode() != CheckIndices::kRaise || lookups == 0) return;
#ifdef RS_CUDA_ON_CPU
  for (int64_t n = 0; n < lookups; ++n) {
    const int64_t k = n % fields, rows = starts[k + 1] - starts[k];
    RS_CHECK_INDEX(indices[n] >= 0 && indices[n] < rows, "indices of field ", k, " must be in [0, ",
                   rows, "); got ", indices[n], " in row ", n / fields);
  }
#else
  launch(stream, "low_rank_assert_fields", assert_fields_kernel,
         {ceil_div(lookups, kLookupThreads)}, {kLookupThreads}, 0, indices, starts, lookups,
         fields);
#endif
}

// Sizes, the projections, and how wide rows of each shape can be accessed.
template <class T>
Fields<T> fields_of(const Stream& stream, int64_t batch, const Tensor& projections,
                    const MaybeTensor& bias) {
  Fields<T> p{};
  p.projections = data<T>(stream, projections);
  p.bias = data<T>(stream, bias);
  p.batch = batch;
  p.fields = projections.size(0);
  p.rank = projections.size(1);
  p.dim = projections.size(2);
  p.projections_width = matrix(p.projections, p.rank, p.dim).width;
  p.mid_width = p.x_width = 16;
  return p;
}
template <class T>
int narrower(int width, const T* at, int64_t columns) {
  return at ? std::min(width, matrix(at, 1, columns).width) : width;
}

template <class T>
void run_fields(const Stream& stream, const Fields<T>& p, bool columns_apart) {
  launch(stream, "low_rank_fields", fields_kernel<T>,
         {ceil_div(p.batch, kFieldRows), columns_apart ? ceil_div(p.dim, kFieldBlock) : 1},
         {kFieldThreads}, FieldTiles<T>::kForwardBytes, p);
}

std::tuple<Tensor, Tensor, Tensor> low_rank_fields(const Tensor& table_, const Tensor& starts_,
                                                   const Tensor& projections_,
                                                   const MaybeTensor& bias_, const Tensor& indices_,
                                                   bool with_output, bool with_interaction,
                                                   bool /*sparse*/) {
  check_low_rank_fields(table_, starts_, projections_, bias_, indices_);
  const int64_t batch = indices_.size(0), fields = projections_.size(0),
                rank = projections_.size(1), dim = projections_.size(2), lookups = batch * fields;
  const Stream stream(table_);
  return with_float_type(table_.scalar_type(), "table", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Tensor table = torch::stable::contiguous(table_),
                 starts = torch::stable::contiguous(starts_),
                 projections = torch::stable::contiguous(projections_),
                 indices = torch::stable::contiguous(indices_);
    const MaybeTensor bias = contiguous(bias_);
    Fields<T> p = fields_of<T>(stream, batch, projections, bias);
    const int64_t* first = data<int64_t>(stream, starts);
    const Indices at = indices_of(stream, indices);
    check_fields(stream, at, first, lookups, fields);
    Tensor mid = torch::stable::new_empty(table, {batch, fields, rank});
    Tensor output = torch::stable::new_empty(table, {with_output ? batch : 0, fields, dim});
    Tensor interaction = torch::stable::new_empty(table, {with_interaction ? batch : 0, 1});
    T* rows = mutable_data<T>(stream, mid);
    const auto from = matrix(data<T>(stream, table), table.size(0), rank);
    const int64_t pieces = ceil_div(p.rank, kPackOf16Bytes<T>);
    launch(stream, "low_rank_field_lookup", field_lookup_kernel<T>,
           {ceil_div(lookups * pieces, kLookupThreads)}, {kLookupThreads}, 0, from, first, at,
           lookups, fields, pieces, check_indices_mode() == CheckIndices::kClamp, rows,
           narrower(from.width, rows, rank));
    p.mid = rows;
    p.mid_width = narrower(p.mid_width, p.mid, rank);
    p.output = with_output ? mutable_data<T>(stream, output) : nullptr;
    p.interaction = with_interaction ? mutable_data<T>(stream, interaction) : nullptr;
    p.x_width = narrower<T>(p.x_width, p.output, dim);
    if (with_output || with_interaction) run_fields(stream, p, !with_interaction);
    return std::make_tuple(mid, output, interaction);
  });
}

std::tuple<Tensor, Tensor, Tensor> low_rank_fields_grad(const MaybeTensor& grad_mid_,
                                                        const MaybeTensor& grad_output_,
                                                        const MaybeTensor& grad_interaction_,
                                                        const Tensor& mid_,
                                                        const Tensor& projections_,
                                                        const MaybeTensor& bias_) {
  check_dim(mid_, 3, "mid", "[B, F, R]");
  check_dim(projections_, 3, "projections", "[F, R, D]");
  const int64_t batch = mid_.size(0), fields = projections_.size(0), rank = projections_.size(1),
                dim = projections_.size(2);
  const auto check_3d = [&](const Tensor& t, const char* name, int64_t last) {
    RS_CHECK_VALUE(t.dim() == 3 && t.size(0) == batch && t.size(1) == fields && t.size(2) == last,
                   name, " must be [", batch, ", ", fields, ", ", last, "]; got shape ",
                   shape_text(t));
    check_same_dtype(t, name, projections_, "projections");
  };
  check_3d(mid_, "mid", rank);
  if (grad_mid_) check_3d(*grad_mid_, "grad_mid", rank);
  if (grad_output_) check_3d(*grad_output_, "grad_output", dim);
  if (grad_interaction_)
    check_same_shape(*grad_interaction_, "grad_interaction", batch, 1, projections_);
  if (bias_) check_same_shape(*bias_, "bias", fields, dim, projections_);
  const Stream stream(projections_);
  return with_float_type(projections_.scalar_type(), "projections", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Tensor mid = torch::stable::contiguous(mid_),
                 projections = torch::stable::contiguous(projections_);
    const MaybeTensor bias = contiguous(bias_), grad_mid = contiguous(grad_mid_),
                      grad_output = contiguous(grad_output_),
                      grad_interaction = contiguous(grad_interaction_);
    Tensor grad_rows = torch::stable::new_empty(mid, {batch, fields, rank});
    Tensor grad_projections = torch::stable::new_empty(mid, {fields, rank, dim});
    Tensor grad_bias = torch::stable::new_empty(mid, {bias ? fields : 0, dim});
    Fields<T> p = fields_of<T>(stream, batch, projections, bias);
    p.mid = data<T>(stream, mid);
    p.grad_mid = data<T>(stream, grad_mid);
    p.grad_output = data<T>(stream, grad_output);
    p.grad_interaction = data<T>(stream, grad_interaction);
    p.grad_rows = mutable_data<T>(stream, grad_rows);
    p.mid_width = narrower(narrower(p.mid_width, p.mid, rank), p.grad_mid, rank);
    p.mid_width = narrower<T>(p.mid_width, p.grad_rows, rank);
    p.x_width = narrower(p.x_width, p.grad_output, dim);
    std::optional<Scratch<float>> totals;
    if (p.grad_interaction) {
      p.totals = totals.emplace(stream, batch * dim).get();
      run_fields(stream, p, true);
    }
    const int64_t r_blocks = ceil_div(rank, kFieldBlock), d_blocks = ceil_div(dim, kFieldBlock);
    launch(stream, "low_rank_field_grad_rows", field_grad_rows_kernel<T>,
           {ceil_div(batch, kFieldRows), fields, r_blocks}, {kFieldThreads},
           FieldTiles<T>::kBackwardBytes, p);
    // two blocks for each multiprocessor; parts take [S, F, R, D] float32: no more than [B, F, D]
    const int64_t wanted = ceil_div(2 * int64_t(stream.multiprocessors()),
                                    std::max<int64_t>(fields * r_blocks * d_blocks, 1));
    const int64_t steps = std::max<int64_t>(ceil_div(batch, kFieldRows), 1);
    int64_t parts =
        std::max<int64_t>(std::min({wanted, steps / 4, batch / std::max<int64_t>(rank, 1)}), 1);
    p.rows_each = ceil_div(steps, parts) * kFieldRows;
    parts = std::max<int64_t>(ceil_div(batch, p.rows_each), 1);
    const int64_t elements = fields * (rank + 1) * dim;
    const Scratch<float> sums(stream, parts * elements);
    p.parts = sums.get();
    launch(stream, "low_rank_field_grad_projections", field_grad_projections_kernel<T>,
           {fields * d_blocks, r_blocks, parts}, {kFieldThreads}, FieldTiles<T>::kBackwardBytes, p,
           d_blocks);
    launch(stream, "low_rank_field_join", field_join_kernel<T>,
           {ceil_div(elements, kLookupThreads)}, {kLookupThreads}, 0, p.parts, parts, fields, rank,
           dim, mutable_data<T>(stream, grad_projections),
           bias ? mutable_data<T>(stream, grad_bias) : nullptr);
    return std::make_tuple(grad_rows, grad_projections, grad_bias);
  });
}

}  // namespace

RS_CUDA_OPS(m) {
  m.impl("low_rank_fields", TORCH_BOX(&low_rank_fields));
  m.impl("low_rank_fields_grad", TORCH_BOX(&low_rank_fields_grad));
}

}  // namespace recsparse
