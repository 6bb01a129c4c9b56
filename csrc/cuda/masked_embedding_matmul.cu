// x W^T against a whole masked table, and its gradients, CUDA.
//   output [B, V] = x [B, D] W^T    grad_input [B, D] = grad_output [B, V] W
//   grad of value (i, d) = sum_b grad_output[b, i] x[b, d]
// One tiled product, C[m, n] = sum_k A[m, k] B[k, n], in three roles, on tensor cores in 16 bits. A
// tile of W is expanded into shared memory as it is needed, so that the dense table never exists.
#include <algorithm>
#include <type_traits>

#include "masked_embedding.h"
#include "masked_embedding_rows.cuh"
#include "mma_tile.cuh"

namespace recsparse {
namespace {

constexpr int kTile = 64;   // rows and columns of C of a block
constexpr int kDepth = 32;  // terms of the sum in shared memory
using Grid = WarpGrid<kTile, kTile, 2, 2>;
using Sums = SumTile<kTile, kTile>;
constexpr int kThreads = Grid::kThreads;

enum class Role { kForward, kGradInput, kGradValues };

// The dense operands; those a role does not have are null.
template <class T>
struct Product {
  DeviceTable<T> table;
  Matrix<T> input;        // [B, D]
  Matrix<T> grad_output;  // [B, V]
  T* output;              // [B, V]; grad values: packed
  float* parts;           // grad input: [pieces, B, D]
  int64_t batch;
  int64_t piece;  // grad input: rows of the table of a block
};

// How A and B lie: [m][k], [n][k] (along), or [k][m], [k][n] (across).
//   forward       m = batch   n = row      k = column   A of the input, B of W
//   grad input    m = batch   n = column   k = row      A of grad_output, B of W
//   grad values   m = row     n = column   k = batch    A of grad_output, B of the input
template <class T, Role kRole>
struct Operands {
  static constexpr Layout kA = kRole == Role::kGradValues ? Layout::kAcross : Layout::kAlong;
  static constexpr Layout kB = kRole == Role::kForward ? Layout::kAlong : Layout::kAcross;
  template <Layout kLayout>
  using TileOf =
      std::conditional_t<kLayout == Layout::kAlong, Tile<T, kTile, kDepth>, Tile<T, kDepth, kTile>>;
  using A = TileOf<kA>;
  using B = TileOf<kB>;
  static constexpr int64_t kBytes =
      std::max(A::kBytes + B::kBytes, Sums::kBytes);  // sums at the end
};

// Columns [column, column + 8) of row i of the table, `column` a multiple of 8.
template <class T>
__device__ __forceinline__ void expand_eight(const DeviceTable<T>& table, int64_t i, int64_t column,
                                             T (&out)[8]) {
  uint64_t bits[1];
  const int64_t start =
      read_row(table, column < table.dim ? i : -1, column / 64, bits);  // past the end: nothing
  const int shift = int(column & 63);
  int64_t at = start + __popcll(bits[0] & low_bits(shift));
#pragma unroll
  for (int c = 0; c < 8; ++c) {
    out[c] = from_float<T>(0.0f);
    if (bits[0] >> (shift + c) & 1) out[c] = table.values[at++];
  }
}
// The tile of W at (row, column), rows before `end`.
template <class TileOf, class T>
__device__ __forceinline__ void expand_tile(T* tile, const DeviceTable<T>& table, int64_t row,
                                            int64_t end, int64_t column) {
  constexpr int kEights = TileOf::kColumns / 8, kPack = kPackOf16Bytes<T>;
  for (int i = int(threadIdx.x); i < TileOf::kRows * kEights; i += kThreads) {
    const int r = i / kEights, c = i % kEights * 8;
    T eight[8];
    expand_eight(table, row + r < end ? row + r : -1, column + c, eight);
#pragma unroll
    for (int e = 0; e < 8; e += kPack) {
      Pack<T, kPack> pack;
#pragma unroll
      for (int j = 0; j < kPack; ++j) pack.at[j] = eight[e + j];
      store_pack(tile + r * TileOf::kStride + c + e, pack);
    }
  }
}

// Blocks: x over the table's rows (grad input: over its pieces), y over tiles of the batch (grad
// values: of the columns), z over tiles of the columns (grad input).
template <class T, Role kRole>
__global__ void __launch_bounds__(kThreads, 4) matmul_kernel(const Product<T> p) {
  using Of = Operands<T, kRole>;
  using A = typename Of::A;
  using B = typename Of::B;
  T* tile_a = dynamic_shared<T>();
  T* tile_b = dynamic_shared<T>(A::kBytes);
  float* tile_sums = dynamic_shared<float>();
  const int64_t rows = p.table.num_embeddings, dim = p.table.dim;
  const int64_t x = blockIdx.x, y = int64_t(blockIdx.y) * kTile, z = int64_t(blockIdx.z) * kTile;
  int64_t k_begin = 0, k_end = 0;
  if constexpr (kRole == Role::kForward) k_end = dim;
  if constexpr (kRole == Role::kGradInput) {
    k_begin = x * p.piece;
    k_end = k_begin + p.piece < rows ? k_begin + p.piece : rows;
  }
  if constexpr (kRole == Role::kGradValues) k_end = p.batch;
  typename Grid::Sums sums;
  sums.clear();
  for (int64_t k0 = k_begin; k0 < k_end; k0 += kDepth) {
    __syncthreads();  // the last tiles have been read
    if constexpr (kRole == Role::kForward) {
      load_tile<A, kThreads>(tile_a, p.input, y, k0);
      expand_tile<B>(tile_b, p.table, x * kTile, rows, k0);
    } else if constexpr (kRole == Role::kGradInput) {  // pieces end at multiples of kDepth
      load_tile<A, kThreads>(tile_a, p.grad_output, y, k0);
      expand_tile<B>(tile_b, p.table, k0, k_end, z);
    } else {
      load_tile<A, kThreads>(tile_a, p.grad_output, k0, x * kTile);
      load_tile<B, kThreads>(tile_b, p.input, k0, y);
    }
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    block_product<Grid, Of::kA, Of::kB, kDepth, A::kStride, B::kStride>(sums, tile_a, tile_b);
  }
  __syncthreads();
  block_store_sums<Grid, Sums::kStride>(tile_sums, sums);
  __syncthreads();
  if constexpr (kRole == Role::kGradValues) {
    for (int i = int(threadIdx.x); i < kTile * kTile / kColumns; i += kThreads) {
      const int r = i / (kTile / kColumns), c = i % (kTile / kColumns) * kColumns;
      const int64_t row = x * kTile + r, column = y + c;
      uint64_t bits[1];
      const int64_t start = read_row(p.table, column < dim ? row : -1, column / 64, bits);
      const int shift = int(column & 63);
      const Slice slice = {uint32_t(bits[0] >> shift) & 15u,
                           start + __popcll(bits[0] & low_bits(shift))};
      const float* sum = tile_sums + r * Sums::kStride + c;
      for_each_kept(slice, [&](int e, int64_t at) { p.output[at] = from_float<T>(sum[e]); });
    }
  } else {
    for (int i = int(threadIdx.x); i < kTile * kTile; i += kThreads) {
      const int r = i / kTile, c = i % kTile;
      const int64_t b = y + r;
      const float sum = tile_sums[r * Sums::kStride + c];
      if constexpr (kRole == Role::kForward) {
        const int64_t row = x * kTile + c;
        if (b < p.batch && row < rows) p.output[b * rows + row] = from_float<T>(sum);
      } else {
        const int64_t column = z + c;
        if (b < p.batch && column < dim) p.parts[(x * p.batch + b) * dim + column] = sum;
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
    p.input = matrix(data<T>(stream, input), p.batch, embedding_dim);
    p.output = mutable_data<T>(stream, output);
    launch(stream, "masked_embedding_matmul_t", matmul_kernel<T, Role::kForward>,
           {ceil_div(num_embeddings, kTile), ceil_div(p.batch, kTile)}, {kThreads},
           Operands<T, Role::kForward>::kBytes, p);
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
    p.grad_output = matrix(data<T>(stream, grad_output), p.batch, num_embeddings);
    // no more of them than keeps their sums within the size of grad_output
    const int64_t most =
        std::clamp<int64_t>(num_embeddings / std::max<int64_t>(1, embedding_dim), 1, kPieces);
    p.piece = std::max(kLeastPiece, ceil_div(ceil_div(num_embeddings, most), kDepth) * kDepth);
    const int64_t pieces = ceil_div(num_embeddings, p.piece), size = batch * embedding_dim;
    const Scratch<float> parts(stream, pieces * size);
    p.parts = parts.get();
    launch(stream, "masked_embedding_matmul_t_grad_input", matmul_kernel<T, Role::kGradInput>,
           {pieces, ceil_div(p.batch, kTile), ceil_div(embedding_dim, kTile)}, {kThreads},
           Operands<T, Role::kGradInput>::kBytes, p);
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
    p.input = matrix(data<T>(stream, input), p.batch, embedding_dim);
    p.grad_output = matrix(data<T>(stream, grad_output), p.batch, num_embeddings);
    Tensor grad = torch::stable::new_empty(values, shape_of(values));
    p.output = mutable_data<T>(stream, grad);
    launch(stream, "masked_embedding_matmul_t_grad_values", matmul_kernel<T, Role::kGradValues>,
           {ceil_div(num_embeddings, kTile), ceil_div(embedding_dim, kTile)}, {kThreads},
           Operands<T, Role::kGradValues>::kBytes, p);
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
