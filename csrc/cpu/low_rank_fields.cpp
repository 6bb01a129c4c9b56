// Multi-field lookup with up-projection and FM term, CPU: checks, allocation, threads.
#include <algorithm>
#include <tuple>

#include "low_rank_fields_kernels.h"
#include "low_rank_lookups.h"

namespace recsparse {
namespace {

// Rows whose share of the gradients to projections and bias is summed on its own; the parts are
// then added in order, so that the result does not depend on the number of threads.
constexpr int64_t kRowsPerPart = 512;
constexpr int64_t kMaxParts = 32;

template <class T>
struct FieldInputs {
  Tensor indices, starts, projections, table;
  std::optional<Tensor> bias;
  Scratch<float> wide_projections, wide_bias;
  LowRankFields<T> p{};

  static int64_t row(const Tensor& projections) {
    return round_up(projections.size(2), low_rank_fields_kernels<T>().lanes);
  }

  FieldInputs(const Tensor& table_, const Tensor& starts_, const Tensor& projections_,
              const std::optional<Tensor>& bias_, const Tensor& indices_)
      : indices(torch::stable::contiguous(indices_)),
        starts(torch::stable::contiguous(starts_)),
        projections(torch::stable::contiguous(projections_)),
        table(torch::stable::contiguous(table_)),
        bias(contiguous(bias_)),
        wide_projections(projections_.size(0) * projections_.size(1) * row(projections_)),
        wide_bias(projections_.size(0) * row(projections_)) {
    p.batch = indices.size(0);
    p.fields = projections.size(0);
    p.rank = projections.size(1);
    p.dim = projections.size(2);
    const LowRankFieldsKernels<T>& kernels = low_rank_fields_kernels<T>();
    kernels.widen(data<T>(projections), p.fields * p.rank, p.dim, wide_projections.get());
    if (bias)
      kernels.widen(data<T>(*bias), p.fields, p.dim, wide_bias.get());
    else
      std::fill_n(wide_bias.get(), p.fields * row(projections), 0.0f);
    p.starts = data<int64_t>(starts);
    p.indices = indices.const_data_ptr();
    p.wide = indices.scalar_type() == ScalarType::Long;
    p.table = data<T>(table);
    p.projections = wide_projections.get();
    p.bias = wide_bias.get();
  }
};

// Each index within its field's rows, and the fields within the table.
template <class Index>
void check_fields(const Index* indices, int64_t batch, int64_t fields, const int64_t* starts,
                  int64_t num_rows) {
  RS_CHECK_VALUE(starts[0] == 0 && starts[fields] <= num_rows, "starts must go from 0 to at most ",
                 num_rows, ", the rows of table; got ", starts[0], " to ", starts[fields]);
  for (int64_t k = 0; k < fields; ++k)
    RS_CHECK_VALUE(starts[k] <= starts[k + 1], "starts must not decrease; got ", starts[k],
                   " before ", starts[k + 1]);
  std::atomic<bool> good{true};
  parallel_for(batch, kLookupsPerTask / (fields + 1) + 1, [&](int64_t begin, int64_t end) {
    bool mine = true;
    for (int64_t b = begin; b < end; ++b)
      for (int64_t k = 0; k < fields; ++k)
        mine &= uint64_t(int64_t(indices[b * fields + k])) < uint64_t(starts[k + 1] - starts[k]);
    if (!mine) good = false;
  });
  for (int64_t b = 0; !good && b < batch; ++b)
    for (int64_t k = 0; k < fields; ++k) {
      const int64_t index = indices[b * fields + k], rows = starts[k + 1] - starts[k];
      RS_CHECK_INDEX(index >= 0 && index < rows, "indices of field ", k, " must be in [0, ", rows,
                     "); got ", index, " in row ", b);
    }
}

std::tuple<Tensor, Tensor, Tensor> low_rank_fields(const Tensor& table, const Tensor& starts,
                                                   const Tensor& projections,
                                                   const std::optional<Tensor>& bias,
                                                   const Tensor& indices, bool with_output,
                                                   bool with_interaction, bool /*sparse*/) {
  check_low_rank_fields(table, starts, projections, bias, indices);
  return with_float_type(table.scalar_type(), "table", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const LowRankFieldsKernels<T>& kernels = low_rank_fields_kernels<T>();
    FieldInputs<T> in(table, starts, projections, bias, indices);
    LowRankFields<T> p = in.p;
    with_index_type(indices.scalar_type(), "indices", [&](auto index_tag) {
      using Index = typename decltype(index_tag)::type;
      check_fields(data<Index>(in.indices), p.batch, p.fields, p.starts, table.size(0));
    });
    Tensor mid = torch::stable::new_empty(table, {p.batch, p.fields, p.rank});
    Tensor output = torch::stable::new_empty(table, {with_output ? p.batch : 0, p.fields, p.dim});
    Tensor interaction = empty_2d(table, with_interaction ? p.batch : 0, 1);
    p.mid = mutable_data<T>(mid);
    p.output = with_output ? mutable_data<T>(output) : nullptr;
    p.interaction = with_interaction ? mutable_data<T>(interaction) : nullptr;
    parallel_for(p.batch, grain(p.fields * (p.rank + 4) * p.dim), [&](int64_t begin, int64_t end) {
      Scratch<float> scratch(kernels.forward_scratch(p));
      kernels.forward(p, begin, end, scratch.get());
    });
    return std::make_tuple(mid, output, interaction);
  });
}

std::tuple<Tensor, Tensor, Tensor> low_rank_fields_grad(
    const std::optional<Tensor>& grad_mid, const std::optional<Tensor>& grad_output,
    const std::optional<Tensor>& grad_interaction, const Tensor& mid, const Tensor& projections,
    const std::optional<Tensor>& bias) {
  check_dim(mid, 3, "mid", "[B, F, R]");
  check_dim(projections, 3, "projections", "[F, R, D]");
  const int64_t batch = mid.size(0), fields = projections.size(0), rank = projections.size(1),
                dim = projections.size(2);
  const auto check_3d = [&](const Tensor& t, const char* name, int64_t last) {
    RS_CHECK_VALUE(t.dim() == 3 && t.size(0) == batch && t.size(1) == fields && t.size(2) == last,
                   name, " must be [", batch, ", ", fields, ", ", last, "]; got shape ",
                   shape_text(t));
    check_same_dtype(t, name, projections, "projections");
  };
  check_3d(mid, "mid", rank);
  if (grad_mid) check_3d(*grad_mid, "grad_mid", rank);
  if (grad_output) check_3d(*grad_output, "grad_output", dim);
  if (grad_interaction)
    check_same_shape(*grad_interaction, "grad_interaction", batch, 1, projections);
  if (bias) check_same_shape(*bias, "bias", fields, dim, projections);
  return with_float_type(projections.scalar_type(), "projections", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const LowRankFieldsKernels<T>& kernels = low_rank_fields_kernels<T>();
    const Tensor no_lookups = torch::stable::new_empty(projections, {0, fields}, ScalarType::Long);
    const Tensor no_rows = empty_2d(projections, 0, rank);
    FieldInputs<T> in(no_rows, no_lookups, projections, bias, no_lookups);
    const Tensor z = torch::stable::contiguous(mid);
    const std::optional<Tensor> gz = contiguous(grad_mid), gx = contiguous(grad_output),
                                gi = contiguous(grad_interaction);
    Tensor grad_rows = torch::stable::new_empty(mid, {batch, fields, rank});
    Tensor grad_projections = torch::stable::new_empty(mid, {fields, rank, dim});
    Tensor grad_bias = empty_2d(mid, bias ? fields : 0, dim);
    LowRankFields<T> p = in.p;
    p.batch = batch;
    p.mid_in = data<T>(z);
    p.grad_mid = optional_data<T>(gz);
    p.grad_output = optional_data<T>(gx);
    p.grad_interaction = optional_data<T>(gi);
    p.grad_rows = mutable_data<T>(grad_rows);
    int64_t parts = batch / kRowsPerPart;
    parts = parts < 1 ? 1 : parts > kMaxParts ? kMaxParts : parts;
    const int64_t part_size = fields * (rank + 1) * round_up(dim, kernels.lanes);
    Scratch<float> sums(parts * part_size);
    parallel_for(parts, 1, [&](int64_t begin, int64_t end) {
      Scratch<float> scratch(kernels.backward_scratch(p));
      for (int64_t i = begin; i < end; ++i)
        kernels.backward(p, batch * i / parts, batch * (i + 1) / parts, sums.get() + i * part_size,
                         scratch.get());
    });
    parallel_for(fields, grain(parts * rank * dim), [&](int64_t begin, int64_t end) {
      kernels.sum_parts(p, sums.get(), parts, begin, end, mutable_data<T>(grad_projections),
                        bias ? mutable_data<T>(grad_bias) : nullptr);
    });
    return std::make_tuple(grad_rows, grad_projections, grad_bias);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(recsparse, CPU, m) {
  m.impl("low_rank_fields", TORCH_BOX(&low_rank_fields));
  m.impl("low_rank_fields_grad", TORCH_BOX(&low_rank_fields_grad));
}

}  // namespace recsparse
