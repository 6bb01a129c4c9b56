// Conversions of masked embedding tables, CUDA: from dense rows and to another mask; and
// renormalisation in place.
#include <bit>
#include <cmath>

#include "masked_embedding.h"
#include "masked_embedding_bag_kernels.cuh"
#include "sort.h"

namespace recsparse {
namespace {

Tensor unpack_grad_values(const Tensor& grad_output, const Tensor& values, const Tensor& rows,
                          const MaybeTensor& bases, const MaybeTensor& starts,
                          const MaybeTensor& columns, int64_t num_embeddings,
                          int64_t embedding_dim) {
  const MaskedTableArgs args{values, rows, bases, starts, columns, num_embeddings, embedding_dim};
  check_masked_table(args);
  check_matrix(grad_output, values, num_embeddings, embedding_dim, "grad_output");
  const Stream stream(values);
  return with_float_type(values.scalar_type(), "values", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto table = device_table<T>(stream, args);
    Tensor grad = torch::stable::new_empty(values, shape_of(values));
    Bags every = {};
    every.count = num_embeddings;
    const T* dense = data<T>(stream, grad_output);
    with_team(table.dim, [&](auto lanes) {
      constexpr int kLanes = lanes.value;
      launch(stream, "masked_embedding_unpack_grad_values", rows_kernel<T, kLanes, RowsOp::kGather>,
             team_grid(ceil_div(num_embeddings, kLanes), kLanes), {kTeamThreads}, 0, table, table,
             every, const_cast<T*>(dense), mutable_data<T>(stream, grad),
             by_four(dense, table.dim));
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
  check_masked_table(args);
  check_masked_table(new_args);
  const Stream stream(values);
  with_float_type(values.scalar_type(), "values", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto from = device_table<T>(stream, args);
    const auto to = device_table<T>(stream, new_args);
    Bags every = {};
    every.count = num_embeddings;
    with_team(from.dim, [&](auto lanes) {
      constexpr int kLanes = lanes.value;
      launch(stream, "masked_embedding_repack", rows_kernel<T, kLanes, RowsOp::kRepack>,
             team_grid(ceil_div(num_embeddings, kLanes), kLanes), {kTeamThreads}, 0, from, to,
             every, static_cast<T*>(nullptr), mutable_data<T>(stream, output), false);
    });
  });
  return output;
}

// ---- renormalisation ----

constexpr int kThreads = 256;
constexpr int kRenormLanes = 8;

template <class Key>
__global__ void row_keys_kernel(const Bags bags, int64_t num_embeddings, Key* keys,
                                int32_t* payloads) {
  const int64_t j = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (j >= bags.count) return;
  const int64_t row = bags.index(j);
  keys[j] = Key(row < 0 || row >= num_embeddings ? num_embeddings : row);
  payloads[j] = int32_t(j);
}

// A team for each sorted lookup; the first of a row scales it so that its norm is at most max_norm.
// norm_type: 1, 2, infinity or any other positive p, as torch.norm.
template <class T, class Key>
__global__ void __launch_bounds__(kTeamThreads)
    renorm_kernel(const DeviceTable<T> table, const Key* keys, int64_t count, float max_norm,
                  float norm_type, T* values) {
  using Group = Team<kRenormLanes>;
  const int64_t p = Group::index();
  const int64_t row = p < count && (p == 0 || keys[p - 1] != keys[p]) ? int64_t(keys[p]) : -1;
  int64_t start = 0, kept = 0;
  for (int64_t word = 0; 64 * word < table.dim; ++word) {
    uint64_t bits[1];
    const int64_t at = read_row(table, row, word, bits);
    if (word == 0) start = at;
    kept += __popcll(bits[0]);
  }
  double sum = 0.0;
  for (int64_t n = Group::lane(); n < kept; n += kRenormLanes) {
    const double a = fabs(double(to_float(values[start + n])));
    if (isinf(norm_type)) {
      sum = a > sum || isnan(a) ? a : sum;
    } else {
      sum += norm_type == 2.0f ? a * a : norm_type == 1.0f ? a : pow(a, double(norm_type));
    }
  }
  if (isinf(norm_type)) {
    sum = warp_max<kRenormLanes>(sum);
  } else {
    sum = warp_sum<kRenormLanes>(sum);
  }
  float norm = float(sum);
  if (norm_type == 2.0f) {
    norm = float(sqrt(sum));
  } else if (norm_type != 1.0f && !isinf(norm_type)) {
    norm = float(pow(sum, 1.0 / double(norm_type)));
  }
  if (!(norm > max_norm)) return;
  const float scale = max_norm / (norm + 1e-7f);  // the constant of torch.embedding_renorm_
  for (int64_t n = Group::lane(); n < kept; n += kRenormLanes)
    values[start + n] = from_float<T>(to_float(values[start + n]) * scale);
}

template <class T, class Key>
void renorm_rows(const Stream& stream, const DeviceTable<T>& table, const Bags& bags,
                 float max_norm, float norm_type, T* values) {
  const int64_t count = bags.count;
  Scratch<Key> keys(stream, count), sorted(stream, count);
  Scratch<int32_t> payloads(stream, count), sorted_payloads(stream, count);
  launch(stream, "masked_embedding_row_keys", row_keys_kernel<Key>, {ceil_div(count, kThreads)},
         {kThreads}, 0, bags, table.num_embeddings, keys.get(), payloads.get());
  sort_pairs(stream, keys.get(), sorted.get(), payloads.get(), sorted_payloads.get(), count,
             std::max(1, int(std::bit_width(uint64_t(table.num_embeddings)))));
  launch(stream, "masked_embedding_renorm", renorm_kernel<T, Key>, team_grid(count, kRenormLanes),
         {kTeamThreads}, 0, table, sorted.get(), count, max_norm, norm_type, values);
}

void renorm(const Tensor& values, const Tensor& rows, const MaybeTensor& bases,
            const MaybeTensor& starts, const MaybeTensor& columns, const Tensor& indices,
            int64_t num_embeddings, int64_t embedding_dim, double max_norm, double norm_type) {
  const MaskedTableArgs args{values, rows, bases, starts, columns, num_embeddings, embedding_dim};
  check_masked_table(args);
  const Stream stream(values);
  with_float_type(values.scalar_type(), "values", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto table = device_table<T>(stream, args);
    const DeviceBags in(stream, indices, num_embeddings, std::nullopt, std::nullopt,
                        int64_t(BagMode::kEach), -1, false);
    T* out = mutable_data<T>(stream, values);
    if (uint64_t(num_embeddings) >= UINT32_MAX) {
      renorm_rows<T, uint64_t>(stream, table, in.bags, float(max_norm), float(norm_type), out);
    } else {
      renorm_rows<T, uint32_t>(stream, table, in.bags, float(max_norm), float(norm_type), out);
    }
  });
}

}  // namespace

RS_CUDA_OPS(m) {
  m.impl("masked_embedding_unpack_grad_values", TORCH_BOX(&unpack_grad_values));
  m.impl("masked_embedding_repack", TORCH_BOX(&repack));
  m.impl("masked_embedding_renorm", TORCH_BOX(&renorm));
}

}  // namespace recsparse
