// Low-rank embeddings of many fields, CUDA:
//
//   z[b, k] = table[starts[k] + indices[b, k]]                        z [B, F, R]
//   x[b, k] = z[b, k] projections[k] + bias[k]                        projections [F, R, D]
//   fm[b] = 1/2 sum_d ((sum_k x)^2 - sum_k x^2)
//   grad_x = grad_output + grad_fm * (sum_k x - x)
//   grad_z = grad_x projections[k]^T + grad_mid,  grad_projections[k] = z[:, k]^T grad_x
//
// A block owns rows of the batch and passes over the fields, so that the sums over fields stay in
// registers. Backward makes x again, a tile at a time: it is never kept.
#pragma once

#include "low_rank_bag_kernels.cuh"

namespace recsparse::low_rank {

constexpr int kFieldRows = 32, kFieldBlock = 64;  // rows of the batch; columns of D, or of R
using FieldGrid = WarpGrid<kFieldRows, kFieldBlock, 2, 2>;
using ProjectionGrid = WarpGrid<kFieldBlock, kFieldBlock, 2, 2>;
constexpr int kFieldThreads = FieldGrid::kThreads;

template <class T>
struct FieldTiles {
  static constexpr int kPiece = kPackOf16Bytes<T>;
  using Rows = Tile<T, kFieldRows, kFieldBlock>;         // of z or of grad_x
  using Projection = Tile<T, kFieldBlock, kFieldBlock>;  // [R, D]
  using Sums = SumTile<kFieldRows, kFieldBlock>;
  static constexpr int kTurns = Rows::kPieces / kFieldThreads;
  static_assert(Rows::kPieces % kFieldThreads == 0, "each thread has as many pieces");
  static constexpr int64_t kStage = Rows::kBytes + Projection::kBytes;
  // forward: two stages, the sums, one float for each piece
  static constexpr int64_t kSumsAt = 2 * kStage, kTermsAt = kSumsAt + Sums::kBytes;
  static constexpr int64_t kForwardBytes = kTermsAt + 4 * Rows::kPieces;
  // backward: z, a projection, the sums, grad_x
  static constexpr int64_t kXSumsAt = kStage, kGradAt = kXSumsAt + Sums::kBytes;
  static constexpr int64_t kBackwardBytes = kGradAt + Rows::kBytes;
  static_assert(kForwardBytes <= 99 * 1024, "what every GPU from compute capability 8.0 on has");
  static_assert(SumTile<kFieldBlock, kFieldBlock>::kBytes <= kBackwardBytes, "taken by the result");
};

template <class T>
struct Fields {
  const T* mid;          // [B, F, R]
  const T* projections;  // [F, R, D]
  const T* bias;         // [F, D] or null
  int64_t batch, fields, rank, dim;
  int mid_width, projections_width, x_width;  // of rows of [B, F, R], [F, R, D] and [B, F, D]
  T* output;                                  // [B, F, D] or null
  T* interaction;                             // [B] or null
  float* totals;                              // [B, D]: sum_k x, or null
  // backward
  const T *grad_mid, *grad_output, *grad_interaction;  // [B, F, R] [B, F, D] [B] or null
  T* grad_rows;                                        // [B, F, R]
  float* parts;       // [S, F, R + 1, D]: of projections, and (last) of bias
  int64_t rows_each;  // rows of the batch a part sums

  __device__ Matrix<T> z_of(int64_t field, int64_t rows) const {
    return {mid + field * rank, rows, rank, fields * rank, mid_width};
  }
  __device__ Matrix<T> projection_of(int64_t field) const {
    return {projections + field * rank * dim, rank, dim, dim, projections_width};
  }
};

// One thread: one piece of a looked-up row. Indices outside their field's rows are clamped to them
// or (else) read as zeros.
template <class T>
__global__ void field_lookup_kernel(const Matrix<T> table, const int64_t* starts, Indices indices,
                                    int64_t lookups, int64_t fields, int64_t pieces_in_row,
                                    bool clamp, T* mid, int width) {
  constexpr int kPiece = kPackOf16Bytes<T>;
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t n = i / pieces_in_row, column = i % pieces_in_row * kPiece;
  if (n >= lookups) return;
  const int64_t start = starts[n % fields], rows = starts[n % fields + 1] - start;
  int64_t index = indices[n];
  if (clamp) index = index < 0 ? 0 : index < rows ? index : rows - 1;
  const int64_t row = start + index;
  const bool exists = uint64_t(index) < uint64_t(rows) && uint64_t(row) < uint64_t(table.rows);
  const int count = elements_inside<kPiece>(column, table.columns);
  const Piece<T> values =
      read_piece(table.at + (exists ? row * table.stride + column : 0), exists ? count : 0, width);
  write_piece(mid + n * table.columns + column, values, count, width);
}

// Starts to load what x of one field needs at the columns d0: rows of z and of the projection from
// r0 on.
template <class T>
__device__ __forceinline__ void load_field(T* stage, const Fields<T>& p, int64_t field, int64_t b0,
                                           int64_t r0, int64_t d0) {
  using Tiles = FieldTiles<T>;
  load_tile<typename Tiles::Rows, kFieldThreads>(stage, p.z_of(field, p.batch), b0, r0);
  load_tile<typename Tiles::Projection, kFieldThreads>(
      stage + Tiles::Rows::kBytes / int64_t(sizeof(T)), p.projection_of(field), r0, d0);
}
template <class T>
__device__ __forceinline__ void add_field(FieldGrid::Sums& sums, const T* stage) {
  using Tiles = FieldTiles<T>;
  block_product<FieldGrid, Layout::kAlong, Layout::kAcross, kFieldBlock, Tiles::Rows::kStride,
                Tiles::Projection::kStride>(sums, stage,
                                            stage + Tiles::Rows::kBytes / int64_t(sizeof(T)));
}

// One block: kFieldRows rows of the batch, all fields, all columns (or, for totals alone, those of
// blockIdx.y).
template <class T>
__global__ void __launch_bounds__(kFieldThreads) fields_kernel(const Fields<T> p) {
  using Tiles = FieldTiles<T>;
  using Rows = typename Tiles::Rows;
  constexpr int kPiece = Tiles::kPiece, kTurns = Tiles::kTurns, kStride = Tiles::Sums::kStride;
  const int64_t b0 = int64_t(blockIdx.x) * kFieldRows;
  const int64_t r_blocks = (p.rank + kFieldBlock - 1) / kFieldBlock;
  const int64_t steps = p.fields * r_blocks;
  float* sums_tile = dynamic_shared<float>(Tiles::kSumsAt);
  const bool reduces = p.interaction || p.totals;
  float terms[kTurns];
#pragma unroll
  for (int i = 0; i < kTurns; ++i) terms[i] = 0.0f;
  for (int64_t d0 = int64_t(blockIdx.y) * kFieldBlock; d0 < p.dim;
       d0 += int64_t(gridDim.y) * kFieldBlock) {
    Piece<T> total[kTurns] = {}, squares[kTurns] = {};
    const auto fetch = [&](int64_t s) {
      if (s < steps)
        load_field(dynamic_shared<T>(s % 2 * Tiles::kStage), p, s / r_blocks, b0,
                   s % r_blocks * kFieldBlock, d0);
      cp_async_commit();
    };
    __syncthreads();  // the last columns' stages have been read
    fetch(0);
    FieldGrid::Sums sums;
    sums.clear();
    for (int64_t s = 0; s < steps; ++s) {
      fetch(s + 1);
      cp_async_wait<1>();
      __syncthreads();
      add_field(sums, dynamic_shared<T>(s % 2 * Tiles::kStage));
      if (s % r_blocks + 1 < r_blocks) {
        __syncthreads();
        continue;
      }
      const int64_t field = s / r_blocks;
      block_store_sums<FieldGrid, kStride>(sums_tile, sums);
      sums.clear();
      __syncthreads();
      each_piece<Rows, kFieldThreads, kTurns>([&](PieceAt at, int i) {
        const int64_t row = b0 + at.row, column = d0 + at.column;
        const int count = row < p.batch ? elements_inside<kPiece>(column, p.dim) : 0;
        Piece<T> x = read_sums<T>(sums_tile + at.row * kStride + at.column);
#pragma unroll
        for (int e = 0; e < kPiece; ++e) {
          if (p.bias && e < count) x.at[e] += to_float(p.bias[field * p.dim + column + e]);
          if (e >= count) x.at[e] = 0.0f;
        }
        if (p.output && count)
          write_piece(p.output + (row * p.fields + field) * p.dim + column, x, count, p.x_width);
        if (reduces) {
#pragma unroll
          for (int e = 0; e < kPiece; ++e) {
            total[i].at[e] += x.at[e];
            squares[i].at[e] += x.at[e] * x.at[e];
          }
        }
      });
    }
    cp_async_wait<0>();
    each_piece<Rows, kFieldThreads, kTurns>([&](PieceAt at, int i) {
      const int64_t row = b0 + at.row, column = d0 + at.column;
#pragma unroll
      for (int e = 0; e < kPiece; ++e) {
        terms[i] += total[i].at[e] * total[i].at[e] - squares[i].at[e];
        if (p.totals && row < p.batch && column + e < p.dim)
          p.totals[row * p.dim + column + e] = total[i].at[e];
      }
    });
  }
  if (!p.interaction) return;
  float* all_terms = dynamic_shared<float>(Tiles::kTermsAt);
  each_piece<Rows, kFieldThreads, kTurns>([&](PieceAt at, int i) {
    all_terms[at.row * Rows::kPiecesInRow + at.column / kPiece] = terms[i];
  });
  __syncthreads();
  if (threadIdx.x < kFieldRows && b0 + threadIdx.x < p.batch) {
    float term = 0.0f;
    for (int i = 0; i < Rows::kPiecesInRow; ++i)
      term += all_terms[threadIdx.x * Rows::kPiecesInRow + i];
    p.interaction[b0 + threadIdx.x] = from_float<T>(0.5f * term);
  }
}

// grad_x of one field, rows [b0, end) and columns from d0 on, zeros elsewhere, to the block's tile
// (kGradAt). Begins and ends with a barrier.
template <class T>
__device__ __forceinline__ void make_grad_x(const Fields<T>& p, int64_t field, int64_t b0,
                                            int64_t end, int64_t d0) {
  using Tiles = FieldTiles<T>;
  using Rows = typename Tiles::Rows;
  constexpr int kPiece = Tiles::kPiece, kStride = Tiles::Sums::kStride;
  float* sums_tile = dynamic_shared<float>(Tiles::kXSumsAt);
  T* grad_tile = dynamic_shared<T>(Tiles::kGradAt);
  __syncthreads();
  if (p.grad_interaction) {
    FieldGrid::Sums sums;
    sums.clear();
    for (int64_t r0 = 0; r0 < p.rank; r0 += kFieldBlock) {
      load_field(dynamic_shared<T>(), p, field, b0, r0, d0);
      cp_async_commit();
      cp_async_wait<0>();
      __syncthreads();
      add_field(sums, dynamic_shared<T>());
      __syncthreads();
    }
    block_store_sums<FieldGrid, kStride>(sums_tile, sums);
    __syncthreads();
  }
  each_piece<Rows, kFieldThreads>([&](PieceAt at, int) {
    const int64_t row = b0 + at.row, column = d0 + at.column;
    const int count = row < end ? elements_inside<kPiece>(column, p.dim) : 0;
    Piece<T> grad = {};
    if (p.grad_output && count)
      grad =
          read_piece(p.grad_output + (row * p.fields + field) * p.dim + column, count, p.x_width);
    if (p.grad_interaction && count) {
      const float factor = to_float(p.grad_interaction[row]);
      const Piece<T> x = read_sums<T>(sums_tile + at.row * kStride + at.column);
#pragma unroll
      for (int e = 0; e < kPiece; ++e)
        if (e < count) {
          const float bias = p.bias ? to_float(p.bias[field * p.dim + column + e]) : 0.0f;
          grad.at[e] += factor * (p.totals[row * p.dim + column + e] - (x.at[e] + bias));
        }
    }
    write_piece(grad_tile + at.row * Rows::kStride + at.column, grad);
  });
  __syncthreads();
}

// One block: kFieldRows rows x kFieldBlock of R of one field.
template <class T>
__global__ void __launch_bounds__(kFieldThreads) field_grad_rows_kernel(const Fields<T> p) {
  using Tiles = FieldTiles<T>;
  using Rows = typename Tiles::Rows;
  constexpr int kPiece = Tiles::kPiece, kStride = Tiles::Sums::kStride;
  const int64_t b0 = int64_t(blockIdx.x) * kFieldRows, field = blockIdx.y;
  const int64_t r0 = int64_t(blockIdx.z) * kFieldBlock;
  T* projection = dynamic_shared<T>(Rows::kBytes);
  float* sums_tile = dynamic_shared<float>(Tiles::kXSumsAt);
  const T* grad_tile = dynamic_shared<T>(Tiles::kGradAt);
  FieldGrid::Sums sums;
  sums.clear();
  for (int64_t d0 = 0; d0 < p.dim; d0 += kFieldBlock) {
    make_grad_x(p, field, b0, p.batch, d0);
    load_tile<typename Tiles::Projection, kFieldThreads>(projection, p.projection_of(field), r0,
                                                         d0);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    block_product<FieldGrid, Layout::kAlong, Layout::kAlong, kFieldBlock, Rows::kStride,
                  Tiles::Projection::kStride>(sums, grad_tile, projection);
  }
  __syncthreads();
  block_store_sums<FieldGrid, kStride>(sums_tile, sums);
  __syncthreads();
  each_piece<Rows, kFieldThreads>([&](PieceAt at, int) {
    const int64_t row = b0 + at.row, r = r0 + at.column;
    const int count = row < p.batch ? elements_inside<kPiece>(r, p.rank) : 0;
    if (!count) return;
    const int64_t to = (row * p.fields + field) * p.rank + r;
    Piece<T> values = read_sums<T>(sums_tile + at.row * kStride + at.column);
    if (p.grad_mid) {
      const Piece<T> given = read_piece(p.grad_mid + to, count, p.mid_width);
#pragma unroll
      for (int e = 0; e < kPiece; ++e) values.at[e] += given.at[e];
    }
    write_piece(p.grad_rows + to, values, count, p.mid_width);
  });
}

// One block: kFieldBlock of R x kFieldBlock of D of one field, over one part of the batch.
// blockIdx.x: field and columns of D, blockIdx.y: of R, blockIdx.z: the part.
template <class T>
__global__ void __launch_bounds__(kFieldThreads)
    field_grad_projections_kernel(const Fields<T> p, int64_t d_blocks) {
  using Tiles = FieldTiles<T>;
  using Rows = typename Tiles::Rows;
  constexpr int kStride = SumTile<kFieldBlock, kFieldBlock>::kStride;
  const int64_t field = blockIdx.x / d_blocks, d0 = blockIdx.x % d_blocks * kFieldBlock;
  const int64_t r0 = int64_t(blockIdx.y) * kFieldBlock, part = blockIdx.z;
  const int64_t first = part * p.rows_each;
  const int64_t end = first + p.rows_each < p.batch ? first + p.rows_each : p.batch;
  T* z = dynamic_shared<T>();
  const T* grad_tile = dynamic_shared<T>(Tiles::kGradAt);
  ProjectionGrid::Sums sums;
  sums.clear();
  float bias_sum = 0.0f;
  for (int64_t b0 = first; b0 < end; b0 += kFieldRows) {
    make_grad_x(p, field, b0, end, d0);
    load_tile<Rows, kFieldThreads>(z, p.z_of(field, end), b0, r0);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    block_product<ProjectionGrid, Layout::kAcross, Layout::kAcross, kFieldRows, Rows::kStride,
                  Rows::kStride>(sums, z, grad_tile);
    if (threadIdx.x < kFieldBlock) {
      float sum = 0.0f;
      for (int i = 0; i < kFieldRows; ++i)
        sum += to_float(grad_tile[i * Rows::kStride + threadIdx.x]);
      bias_sum += sum;
    }
  }
  float* to = p.parts + (part * p.fields + field) * (p.rank + 1) * p.dim;
  if (blockIdx.y == 0 && threadIdx.x < kFieldBlock && d0 + threadIdx.x < p.dim)
    to[p.rank * p.dim + d0 + threadIdx.x] = bias_sum;
  __syncthreads();
  float* tile = dynamic_shared<float>();
  block_store_sums<ProjectionGrid, kStride>(tile, sums);
  __syncthreads();
  for (int i = int(threadIdx.x); i < kFieldBlock * kFieldBlock; i += kFieldThreads) {
    const int64_t r = r0 + i / kFieldBlock, d = d0 + i % kFieldBlock;
    if (r < p.rank && d < p.dim)
      to[r * p.dim + d] = tile[i / kFieldBlock * kStride + i % kFieldBlock];
  }
}

// One thread: one element of grad_projections or of grad_bias, its parts added in order.
template <class T>
__global__ void field_join_kernel(const float* parts, int64_t count, int64_t fields, int64_t rank,
                                  int64_t dim, T* grad_projections, T* grad_bias) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t elements = fields * (rank + 1) * dim;
  if (i >= elements) return;
  float sum = 0.0f;
#pragma unroll 4
  for (int64_t s = 0; s < count; ++s) sum += parts[s * elements + i];
  const int64_t field = i / ((rank + 1) * dim), r = i / dim % (rank + 1), d = i % dim;
  if (r < rank) {
    grad_projections[(field * rank + r) * dim + d] = from_float<T>(sum);
  } else if (grad_bias) {
    grad_bias[field * dim + d] = from_float<T>(sum);
  }
}

}  // namespace recsparse::low_rank
