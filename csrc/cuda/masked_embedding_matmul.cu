// x W^T against a whole masked table, and its gradients, CUDA.
//   output [B, V] = x [B, D] W^T    grad_input [B, D] = grad_output [B, V] W
//   grad of value (i, d) = sum_b grad_output[b, i] x[b, d]
// One tiled product, C[m, n] = sum_k A[m, k] B[k, n], in three roles. A tile of W is expanded into
// shared memory as it is needed, so that the dense table never exists.
#include <algorithm>

#include "masked_embedding.h"
#include "masked_embedding_rows.cuh"

namespace recsparse {
namespace {

constexpr int kTile = 64;      // rows and columns of C of a block, and terms of the sum at a time
constexpr int kDepth = 32;     // terms of the sum in shared memory
constexpr int kThreads = 256;  // each 4 x 4 elements of C
constexpr int kPad = 4;        // floats: keeps 16-byte alignment, spreads columns over the banks

enum class Role { kForward, kGradInput, kGradValues };

// The dense operands; those a role does not have are null.
template <class T>
struct Product {
  DeviceTable<T> table;
  const T* input;        // [B, D]
  const T* grad_output;  // [B, V]
  T* output;             // [B, V]; grad values: packed
  float* parts;          // grad input: [pieces, B, D]
  int64_t batch;
  int64_t piece;  // grad input: rows of the table of a block
};

// to[k][m] = from[m0 + m, k0 + k], where from is [rows, columns] row-major; 0 outside.
template <class T>
__device__ __forceinline__ void load_transposed(float (&to)[kDepth][kTile + kPad], const T* from,
                                                int64_t rows, int64_t columns, int64_t m0,
                                                int64_t k0) {
  for (int i = int(threadIdx.x); i < kTile * kDepth; i += kThreads) {
    const int m = i / kDepth, k = i % kDepth;
    const bool inside = m0 + m < rows && k0 + k < columns;
    to[k][m] = inside ? to_float(from[(m0 + m) * columns + k0 + k]) : 0.0f;
  }
}
// to[k][n] = from[k0 + k, n0 + n]
template <class T>
__device__ __forceinline__ void load_straight(float (&to)[kDepth][kTile + kPad], const T* from,
                                              int64_t rows, int64_t columns, int64_t k0,
                                              int64_t n0) {
  for (int i = int(threadIdx.x); i < kTile * kDepth; i += kThreads) {
    const int k = i / kTile, n = i % kTile;
    const bool inside = k0 + k < rows && n0 + n < columns;
    to[k][n] = inside ? to_float(from[(k0 + k) * columns + n0 + n]) : 0.0f;
  }
}

// Columns [column, column + 8) of row i of the table, `column` a multiple of 8.
template <class T>
__device__ __forceinline__ void expand_eight(const DeviceTable<T>& table, int64_t i, int64_t end,
                                             int64_t column, float (&out)[8]) {
  uint64_t bits[1];
  const int64_t start = read_row(table, i < end ? i : -1, column / 64, bits);
  const int shift = int(column & 63);
  int64_t at = start + __popcll(bits[0] & low_bits(shift));
#pragma unroll
  for (int c = 0; c < 8; ++c) {
    out[c] = 0.0f;
    if (bits[0] >> (shift + c) & 1) out[c] = to_float(table.values[at++]);
  }
}
// to[k][n] = W[n0 + n, k0 + k]: four threads a row of the table
template <class T>
__device__ __forceinline__ void expand_transposed(float (&to)[kDepth][kTile + kPad],
                                                  const DeviceTable<T>& table, int64_t n0,
                                                  int64_t k0) {
  const int n = int(threadIdx.x) % kTile, k = int(threadIdx.x) / kTile * 8;
  float row[8];
  expand_eight(table, n0 + n, table.num_embeddings, k0 + k, row);
#pragma unroll
  for (int c = 0; c < 8; ++c) to[k + c][n] = row[c];
}
// to[k][n] = W[k0 + k, n0 + n] for rows before `end`: eight threads a row
template <class T>
__device__ __forceinline__ void expand_straight(float (&to)[kDepth][kTile + kPad],
                                                const DeviceTable<T>& table, int64_t k0,
                                                int64_t end, int64_t n0) {
  const int k = int(threadIdx.x) / 8, n = int(threadIdx.x) % 8 * 8;
  float row[8];
  expand_eight(table, k0 + k, end, n0 + n, row);
#pragma unroll
  for (int c = 0; c < 8; ++c) to[k][n + c] = row[c];
}

// Blocks: x over the table's rows (grad input: over its pieces), y over tiles of the batch (grad
// values: of the columns), z over tiles of the columns (grad input).
template <class T, Role kRole>
__global__ void __launch_bounds__(kThreads, 2) product_kernel(const Product<T> p) {
  RS_SHARED(float, tile_a, [kDepth][kTile + kPad]);
  RS_SHARED(float, tile_b, [kDepth][kTile + kPad]);
  const int64_t rows = p.table.num_embeddings, dim = p.table.dim;
  const int64_t x = blockIdx.x, y = int64_t(blockIdx.y) * kTile, z = int64_t(blockIdx.z) * kTile;
  int64_t k_begin = 0, k_end = 0;
  if constexpr (kRole == Role::kForward) k_end = dim;
  if constexpr (kRole == Role::kGradInput) {
    k_begin = x * p.piece;
    k_end = k_begin + p.piece < rows ? k_begin + p.piece : rows;
  }
  if constexpr (kRole == Role::kGradValues) k_end = p.batch;
  const int tm = int(threadIdx.x) / 16 * 4, tn = int(threadIdx.x) % 16 * 4;  // of this thread
  float acc[4][4] = {};
  for (int64_t k0 = k_begin; k0 < k_end; k0 += kDepth) {
    __syncthreads();                          // the last tiles have been read
    if constexpr (kRole == Role::kForward) {  // m = batch, n = row, k = column
      load_transposed(tile_a, p.input, p.batch, dim, y, k0);
      expand_transposed(tile_b, p.table, x * kTile, k0);
    } else if constexpr (kRole == Role::kGradInput) {  // m = batch, n = column, k = row
      load_transposed(tile_a, p.grad_output, p.batch, rows, y, k0);
      expand_straight(tile_b, p.table, k0, k_end, z);
    } else {  // m = row, n = column, k = batch
      load_straight(tile_a, p.grad_output, p.batch, rows, k0, x * kTile);
      load_straight(tile_b, p.input, p.batch, dim, k0, y);
    }
    __syncthreads();
#pragma unroll 8
    for (int k = 0; k < kDepth; ++k) {
      const auto a = load_pack<float, 4>(&tile_a[k][tm]), b = load_pack<float, 4>(&tile_b[k][tn]);
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) acc[i][j] = __fmaf_rn(a.at[i], b.at[j], acc[i][j]);
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (kRole == Role::kGradValues) {
      const int64_t row = x * kTile + tm + i, column = y + tn;
      uint64_t bits[1];
      const int64_t start = read_row(p.table, column < dim ? row : -1, column / 64, bits);
      const int shift = int(column & 63);
      const Slice slice = {uint32_t(bits[0] >> shift) & 15u,
                           start + __popcll(bits[0] & low_bits(shift))};
      for_each_kept(slice, [&](int c, int64_t at) { p.output[at] = from_float<T>(acc[i][c]); });
    } else {
      const int64_t b = y + tm + i;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if constexpr (kRole == Role::kForward) {
          const int64_t row = x * kTile + tn + j;
          if (b < p.batch && row < rows) p.output[b * rows + row] = from_float<T>(acc[i][j]);
        } else {
          const int64_t column = z + tn + j;
          if (b < p.batch && column < dim) p.parts[(x * p.batch + b) * dim + column] = acc[i][j];
        }
      }
    }
  }
}

// grad[e] = sum of the pieces' parts, in order.
template <class T>
__global__ void sum_parts_kernel(const float* parts, int64_t pieces, int64_t size, T* grad) {
  const int64_t e = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (e >= size) return;
  float sum = 0.0f;
  for (int64_t p = 0; p < pieces; ++p) sum += parts[p * size + e];
  grad[e] = from_float<T>(sum);
}

Tensor matmul_t(const Tensor& input, const Tensor& values, const Tensor& rows,
                const MaybeTensor& bases, const MaybeTensor& starts, const MaybeTensor& columns,
                int64_t num_embeddings, int64_t embedding_dim) {
  const MaskedTableArgs args{values, rows, bases, starts, columns, num_embeddings, embedding_dim};
  check_masked_table(args);
  check_dim(input, 2, "input", "[B, D]");
  const int64_t batch = input.size(0);
  check_matrix(input, values, batch, embedding_dim, "input");
  const Stream stream(values);
  return with_float_type(values.scalar_type(), "values", [&](auto tag) {
    using T = typename decltype(tag)::type;
    Product<T> p = {};
    p.table = device_table<T>(stream, args);
    p.batch = batch;
    Tensor output = torch::stable::new_empty(values, {batch, num_embeddings});
    p.input = data<T>(stream, input);
    p.output = mutable_data<T>(stream, output);
    launch(stream, "masked_embedding_matmul_t", product_kernel<T, Role::kForward>,
           {ceil_div(num_embeddings, kTile), ceil_div(p.batch, kTile)}, {kThreads}, 0, p);
    return output;
  });
}

Tensor matmul_t_grad_input(const Tensor& grad_output, const Tensor& values, const Tensor& rows,
                           const MaybeTensor& bases, const MaybeTensor& starts,
                           const MaybeTensor& columns, int64_t num_embeddings,
                           int64_t embedding_dim) {
  // Fixed pieces of the table, each with its own sum, added in order: the same on any GPU.
  constexpr int64_t kPieces = 128, kLeastPiece = 512;
  const MaskedTableArgs args{values, rows, bases, starts, columns, num_embeddings, embedding_dim};
  check_masked_table(args);
  check_dim(grad_output, 2, "grad_output", "[B, V]");
  const int64_t batch = grad_output.size(0);
  check_matrix(grad_output, values, batch, num_embeddings, "grad_output");
  const Stream stream(values);
  return with_float_type(values.scalar_type(), "values", [&](auto tag) {
    using T = typename decltype(tag)::type;
    Product<T> p = {};
    p.table = device_table<T>(stream, args);
    p.batch = batch;
    p.grad_output = data<T>(stream, grad_output);
    // no more of them than keeps their sums within the size of grad_output
    const int64_t most =
        std::clamp<int64_t>(num_embeddings / std::max<int64_t>(1, embedding_dim), 1, kPieces);
    p.piece = std::max(kLeastPiece, ceil_div(ceil_div(num_embeddings, most), kDepth) * kDepth);
    const int64_t pieces = ceil_div(num_embeddings, p.piece), size = batch * embedding_dim;
    const Scratch<float> parts(stream, pieces * size);
    p.parts = parts.get();
    launch(stream, "masked_embedding_matmul_t_grad_input", product_kernel<T, Role::kGradInput>,
           {pieces, ceil_div(p.batch, kTile), ceil_div(embedding_dim, kTile)}, {kThreads}, 0, p);
    Tensor grad = torch::stable::new_empty(values, {batch, embedding_dim});
    launch(stream, "masked_embedding_matmul_t_grad_input_sum", sum_parts_kernel<T>,
           {ceil_div(size, kThreads)}, {kThreads}, 0, parts.get(), pieces, size,
           mutable_data<T>(stream, grad));
    return grad;
  });
}

Tensor matmul_t_grad_values(const Tensor& grad_output, const Tensor& input, const Tensor& values,
                            const Tensor& rows, const MaybeTensor& bases, const MaybeTensor& starts,
                            const MaybeTensor& columns, int64_t num_embeddings,
                            int64_t embedding_dim) {
  const MaskedTableArgs args{values, rows, bases, starts, columns, num_embeddings, embedding_dim};
  check_masked_table(args);
  check_dim(input, 2, "input", "[B, D]");
  check_matrix(input, values, input.size(0), embedding_dim, "input");
  check_matrix(grad_output, values, input.size(0), num_embeddings, "grad_output");
  const Stream stream(values);
  return with_float_type(values.scalar_type(), "values", [&](auto tag) {
    using T = typename decltype(tag)::type;
    Product<T> p = {};
    p.table = device_table<T>(stream, args);
    p.batch = input.size(0);
    p.input = data<T>(stream, input);
    p.grad_output = data<T>(stream, grad_output);
    Tensor grad = torch::stable::new_empty(values, shape_of(values));
    p.output = mutable_data<T>(stream, grad);
    launch(stream, "masked_embedding_matmul_t_grad_values", product_kernel<T, Role::kGradValues>,
           {ceil_div(num_embeddings, kTile), ceil_div(embedding_dim, kTile)}, {kThreads}, 0, p);
    return grad;
  });
}

}  // namespace

RS_CUDA_OPS(m) {
  m.impl("masked_embedding_matmul_t", TORCH_BOX(&matmul_t));
  m.impl("masked_embedding_matmul_t_grad_input", TORCH_BOX(&matmul_t_grad_input));
  m.impl("masked_embedding_matmul_t_grad_values", TORCH_BOX(&matmul_t_grad_values));
}

}  // namespace recsparse
