// Max pooling of low-rank rows, CUDA: elementwise maximum of table[index] up^T over a bag's
// lookups, and the lookup that won (the first of equal ones; NaN wins nothing, but shows), -1 if
// none.
#pragma once

#include "low_rank_bag_kernels.cuh"

namespace recsparse::low_rank {

constexpr int kMaxLookups = 16, kMaxColumns = 64;  // projected at a time
using MaxGrid = WarpGrid<kMaxLookups, kMaxColumns, 1, 4>;
constexpr int kMaxThreads = MaxGrid::kThreads;

template <class T>
struct MaxMemory {
  static constexpr int kDepth = 128 / int(sizeof(T));
  using RowTile = Tile<T, kMaxLookups, kDepth>;
  using UpTile = Tile<T, kMaxColumns, kDepth>;
  using Sums = SumTile<kMaxLookups, kMaxColumns>;
  static constexpr int64_t kUpAt = RowTile::kBytes, kSumsAt = kUpAt + UpTile::kBytes;
  static constexpr int64_t kBytes = kSumsAt + Sums::kBytes;
};

// One block: one bag x kMaxColumns columns.
template <class T>
__global__ void __launch_bounds__(kMaxThreads)
    max_kernel(const Bags<T> p, const Matrix<T> up, const T* mean, T* output, int64_t* winners) {
  using Memory = MaxMemory<T>;
  using RowTile = typename Memory::RowTile;
  using UpTile = typename Memory::UpTile;
  constexpr int kPiece = kPackOf16Bytes<T>;
  const int64_t bag = blockIdx.x, d0 = int64_t(blockIdx.y) * kMaxColumns;
  const int64_t rank = p.table.columns, column = d0 + threadIdx.x;
  const BagRange range = bag_range(p, bag);
  T* rows = dynamic_shared<T>();
  T* up_tile = dynamic_shared<T>(Memory::kUpAt);
  float* sums_tile = dynamic_shared<float>(Memory::kSumsAt);
  const auto index_of = [&](int64_t at) {  // -1: does not count
    const int64_t index = at < range.end ? p.indices[at] : -1;
    return index == p.padding_idx || uint64_t(index) >= uint64_t(p.table.rows) ? int64_t(-1)
                                                                               : index;
  };
  float best = 0.0f;
  int64_t winner = -1;
  bool has_nan = false;
  for (int64_t first = range.begin; first < range.end; first += kMaxLookups) {
    typename MaxGrid::Sums sums;
    sums.clear();
    for (int64_t r0 = 0; r0 < rank; r0 += Memory::kDepth) {
      each_piece<RowTile, kMaxThreads>([&](PieceAt at, int) {
        const int64_t index = index_of(first + at.row), r = r0 + at.column;
        const int count = index >= 0 ? elements_inside<kPiece>(r, rank) : 0;
        load_piece(rows + at.row * RowTile::kStride + at.column, p.table, index, r, count);
      });
      load_tile<UpTile, kMaxThreads>(up_tile, up, d0, r0);
      cp_async_commit();
      cp_async_wait<0>();
      __syncthreads();
      block_product<MaxGrid, Layout::kAlong, Layout::kAlong, Memory::kDepth, RowTile::kStride,
                    UpTile::kStride>(sums, rows, up_tile);
      __syncthreads();
    }
    block_store_sums<MaxGrid, Memory::Sums::kStride>(sums_tile, sums);
    __syncthreads();
    if (threadIdx.x < kMaxColumns)
      for (int i = 0; i < kMaxLookups; ++i) {
        if (index_of(first + i) < 0) continue;
        const float value = sums_tile[i * Memory::Sums::kStride + threadIdx.x];
        if (value != value) has_nan = true;
        if (value > best || (winner < 0 && value == value)) {
          best = value;
          winner = first + i;
        }
      }
    __syncthreads();
  }
  if (threadIdx.x >= kMaxColumns || column >= up.rows) return;
  if (has_nan) winner = -1;
  if (winner >= 0 && mean) best += to_float(mean[column]);
  if (winner < 0) best = has_nan ? nanf("") : 0.0f;
  output[bag * up.rows + column] = from_float<T>(best);
  winners[bag * up.rows + column] = winner;
}

// ---- gradients ----

constexpr int kMaxGradThreads = 64;
constexpr int64_t kMostMaxParts = 64;

template <class T>
struct MaxGrad {
  Bags<T> in;
  const T* grad_output;    // [B, D]
  const int64_t* winners;  // [B, D]
  int64_t bags, dim, bags_each;
  float* sums;  // [S, D, R + 1]: of up, and (last) of mean
};

// Row of the table that won (bag, column), or -1.
template <class T>
__device__ __forceinline__ int64_t winning_row(const Bags<T>& p, int64_t winner) {
  if (uint64_t(winner) >= uint64_t(p.lookups)) return -1;
  const int64_t index = p.indices[winner];
  return uint64_t(index) < uint64_t(p.table.rows) ? index : -1;
}

// One block: a part of the bags, one column of the output, columns of the table.
template <class T>
__global__ void __launch_bounds__(kMaxGradThreads) max_grad_up_kernel(const MaxGrad<T> p) {
  const int64_t d = blockIdx.x, part = blockIdx.z, rank = p.in.table.columns;
  const int64_t r = int64_t(blockIdx.y) * kMaxGradThreads + threadIdx.x;
  if (r > rank) return;
  const int64_t first = part * p.bags_each;
  const int64_t end = first + p.bags_each < p.bags ? first + p.bags_each : p.bags;
  float sum = 0.0f;
#pragma unroll 4
  for (int64_t b = first; b < end; ++b) {
    const int64_t row = winning_row(p.in, p.winners[b * p.dim + d]);
    if (row < 0) continue;
    const float grad = to_float(p.grad_output[b * p.dim + d]);
    sum += r < rank ? grad * to_float(p.in.table.at[row * rank + r]) : grad;
  }
  p.sums[(part * p.dim + d) * (rank + 1) + r] = sum;
}

template <class T>
__global__ void max_join_kernel(const MaxGrad<T> p, int64_t parts, T* grad_up, T* grad_mean) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t rank = p.in.table.columns, count = p.dim * (rank + 1);
  if (i >= count) return;
  float sum = 0.0f;
  for (int64_t s = 0; s < parts; ++s) sum += p.sums[s * count + i];
  const int64_t d = i / (rank + 1), r = i % (rank + 1);
  if (r < rank) {
    grad_up[d * rank + r] = from_float<T>(sum);
  } else if (grad_mean) {
    grad_mean[d] = from_float<T>(sum);
  }
}

// One thread: one (bag, column). The key is the row that won it.
template <class T>
__global__ void max_keys_kernel(const Bags<T> p, const int64_t* winners, int64_t count,
                                uint32_t* keys, int32_t* values) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const int64_t row = winning_row(p, winners[i]);
  keys[i] = uint32_t(row < 0 ? p.table.rows : row);
  values[i] = int32_t(i);
}

}  // namespace recsparse::low_rank
