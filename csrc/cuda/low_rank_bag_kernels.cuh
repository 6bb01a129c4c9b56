// Low-rank embedding bags, CUDA:
//
//   row(v) = table[v] up^T + mean                            table [V, R]  up [D, R]  mean [D]
//   bag:   sum or mean of weight * row(index) = pooled up^T + total * mean
//   grad_weight = (table[index] . grad_pooled[bag] + grad_output[bag] . mean) / count in mode mean
//
// A few lanes own a bag and walk its lookups, kUnroll rows in flight each, so that bags of one
// lookup keep a warp as busy as long ones. Up to rank kMaxRank a block's bags are pooled into
// shared memory and projected from there (low_rank_rows.cuh): bags never leave the chip at rank R.
#pragma once

#include "low_rank_rows.cuh"

namespace recsparse::low_rank {

// Indices of either type.
struct Indices {
  const void* at;
  bool wide;
  __device__ int64_t operator[](int64_t i) const {
    return wide ? static_cast<const int64_t*>(at)[i] : int64_t(static_cast<const int32_t*>(at)[i]);
  }
};

template <class T>
struct Bags {
  Matrix<T> table;        // [V, R]
  Indices indices;        // [N]
  const int64_t* starts;  // [B + 1], in [0, N]; null: bag b is lookup b
  const T* weights;       // [N] or null
  int64_t lookups, bags, padding_idx;
  bool is_mean;
};

struct BagRange {
  int64_t begin, end;
};
template <class T>
__device__ __forceinline__ BagRange bag_range(const Bags<T>& p, int64_t bag) {
  if (bag >= p.bags) return {0, 0};
  return p.starts ? BagRange{p.starts[bag], p.starts[bag + 1]} : BagRange{bag, bag + 1};
}

// starts[b]: the offsets, kept within the lookups whatever they are.
template <class Index>
__global__ void starts_kernel(const Index* offsets, int64_t given, int64_t bags, int64_t lookups,
                              int64_t* starts) {
  const int64_t b = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (b > bags) return;
  const int64_t start = b < given ? int64_t(offsets[b]) : lookups;
  starts[b] = start < 0 ? 0 : start > lookups ? lookups : start;
}

template <class T>
struct Pooled {
  Piece<T> sum;
  float total;
};

// Columns [column, column + kPiece) of the pooled bag, and the sum of its weights.
template <class T>
__device__ __forceinline__ Pooled<T> pool_piece(const Bags<T>& p, int64_t bag, int64_t column) {
  constexpr int kPiece = kPackOf16Bytes<T>, kUnroll = 4;
  const int count = elements_inside<kPiece>(column, p.table.columns);
  const BagRange range = bag_range(p, bag);
  Pooled<T> pooled = {};
  float kept = 0.0f;
  for (int64_t first = range.begin; first < range.end; first += kUnroll) {
    Piece<T> rows[kUnroll];
    float weights[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t at = first + u;
      const int64_t index = at < range.end ? p.indices[at] : -1;
      const bool exists = uint64_t(index) < uint64_t(p.table.rows);
      const bool counts = exists && index != p.padding_idx;
      // without offsets the padding row is looked up, but has no mean and no gradient
      const bool fetched = p.starts ? counts : exists;
      weights[u] = counts ? p.weights ? to_float(p.weights[at]) : 1.0f : 0.0f;
      kept += counts ? 1.0f : 0.0f;
      rows[u] = read_piece(p.table.at + (fetched && count ? index * p.table.stride + column : 0),
                           fetched ? count : 0, p.table.width);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      pooled.total += weights[u];
#pragma unroll
      for (int e = 0; e < kPiece; ++e)
        pooled.sum.at[e] += p.weights ? weights[u] * rows[u].at[e] : rows[u].at[e];
    }
  }
  if (p.is_mean) {
    const float inverse = 1.0f / fmaxf(kept, 1.0f);
    pooled.total *= inverse;
#pragma unroll
    for (int e = 0; e < kPiece; ++e) pooled.sum.at[e] *= inverse;
  }
  return pooled;
}

template <class T>
struct BagArguments {
  Bags<T> in;
  Matrix<T> up;   // [D, R]
  const T* mean;  // [D] or null
  T* pooled;      // [B, R] or null
  T* output;      // [B, D]
  int pooled_width, output_width;
};

template <class Config>
struct BagMemory {
  static constexpr int64_t kMidAt = Config::kProjectBytes;
  static constexpr int64_t kSumsAt = kMidAt + Config::MidTile::kBytes;
  static constexpr int64_t kTotalsAt = kSumsAt + Config::OutSums::kBytes;
  static constexpr int64_t kBytes = kTotalsAt + Config::kRows * 4;
  static_assert(kBytes <= 99 * 1024, "what every GPU from compute capability 8.0 on has");
};

// One block: kRows bags, pooled and projected.
template <class Config, class T>
__global__ void __launch_bounds__(Config::kThreads, 2) bag_kernel(const BagArguments<T> p) {
  using Memory = BagMemory<Config>;
  using MidTile = typename Config::MidTile;
  constexpr int kPiece = kPackOf16Bytes<T>;
  const int64_t b0 = int64_t(blockIdx.x) * Config::kRows;
  const int64_t rank = p.in.table.columns, bags = p.in.bags, columns = p.up.rows;
  T* pooled = dynamic_shared<T>(Memory::kMidAt);
  float* totals = dynamic_shared<float>(Memory::kTotalsAt);
  each_piece<MidTile, Config::kThreads>([&](PieceAt at, int) {
    const int64_t bag = b0 + at.row;
    const Pooled<T> values = pool_piece(p.in, bag, at.column);
    write_piece(pooled + at.row * MidTile::kStride + at.column, values.sum);
    const int count = bag < bags ? elements_inside<kPiece>(at.column, rank) : 0;
    if (p.pooled && count)
      write_piece(p.pooled + bag * rank + at.column, values.sum, count, p.pooled_width);
    if (at.column == 0) totals[at.row] = values.total;
  });
  project<Config, Layout::kAlong, 1>(
      pooled, dynamic_shared<T>(), dynamic_shared<float>(Memory::kSumsAt), p.up,
      static_cast<const T*>(nullptr), [&](int row, int64_t column, int count, float* from) {
        if (b0 + row >= bags) return;
        Piece<T> values = read_sums<T>(from);
        if (p.mean) {
#pragma unroll
          for (int e = 0; e < kPiece; ++e)
            if (e < count) values.at[e] += totals[row] * to_float(p.mean[column + e]);
        }
        write_piece(p.output + (b0 + row) * columns + column, values, count, p.output_width);
      });
}

// One thread: one piece of a pooled bag.
template <class T>
__global__ void pool_kernel(const Bags<T> p, int64_t pieces_in_row, T* pooled, int width) {
  constexpr int kPiece = kPackOf16Bytes<T>;
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t bag = i / pieces_in_row, column = i % pieces_in_row * kPiece;
  if (bag >= p.bags) return;
  write_piece(pooled + bag * p.table.columns + column, pool_piece(p, bag, column).sum,
              elements_inside<kPiece>(column, p.table.columns), width);
}

constexpr int kLanesOfBag = 8;  // that share a bag's lookups

// totals[b] = sum of the bag's weights, over their number in mode mean; inverses[b] = 1 / number.
template <class T>
__global__ void bag_weights_kernel(const Bags<T> p, float* totals, float* inverses) {
  const int64_t thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t bag = thread / kLanesOfBag;
  const BagRange range = bag_range(p, bag);
  float total = 0.0f, count = 0.0f;
  for (int64_t at = range.begin + thread % kLanesOfBag; at < range.end; at += kLanesOfBag) {
    const int64_t index = p.indices[at];
    if (index == p.padding_idx || uint64_t(index) >= uint64_t(p.table.rows)) continue;
    total += p.weights ? to_float(p.weights[at]) : 1.0f;
    count += 1.0f;
  }
  total = warp_sum<kLanesOfBag>(total);
  const float inverse = 1.0f / fmaxf(warp_sum<kLanesOfBag>(count), 1.0f);
  if (bag >= p.bags || thread % kLanesOfBag) return;
  if (totals) totals[bag] = p.is_mean ? total * inverse : total;
  if (inverses) inverses[bag] = inverse;
}

// One warp: one bag.
template <class T>
__global__ void grad_weights_kernel(const Bags<T> p, Matrix<T> grad_output, Matrix<T> grad_pooled,
                                    const T* mean, T* grad_weights) {
  constexpr int kPiece = kPackOf16Bytes<T>;
  const int64_t bag = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp;
  if (bag >= p.bags) return;
  const int lane = lane_id(), part = lane / kLanesOfBag;
  const BagRange range = bag_range(p, bag);
  float same = 0.0f;  // what all lookups of the bag have in common
  if (mean)
    for (int64_t d = lane; d < grad_output.columns; d += kWarp)
      same += to_float(grad_output.at[bag * grad_output.stride + d]) * to_float(mean[d]);
  same = warp_sum(same);
  float count = 0.0f;
  if (p.is_mean)
    for (int64_t at = range.begin + lane; at < range.end; at += kWarp)
      count += p.indices[at] != p.padding_idx ? 1.0f : 0.0f;
  count = p.is_mean ? fmaxf(warp_sum(count), 1.0f) : 1.0f;
  const T* grad = grad_pooled.at + bag * grad_pooled.stride;
  const int64_t rank = p.table.columns;
  for (int64_t first = range.begin; first < range.end; first += kWarp / kLanesOfBag) {
    const int64_t at = first + part;
    const int64_t index = at < range.end ? p.indices[at] : p.padding_idx;
    const bool counts =
        at < range.end && index != p.padding_idx && uint64_t(index) < uint64_t(p.table.rows);
    float sum = 0.0f;
    if (counts)
      for (int64_t r = lane % kLanesOfBag * kPiece; r < rank; r += kLanesOfBag * kPiece) {
        const int here = elements_inside<kPiece>(r, rank);
        const Piece<T> x = read_piece(p.table.at + index * p.table.stride + r, here, p.table.width);
        const Piece<T> y = read_piece(grad + r, here, grad_pooled.width);
#pragma unroll
        for (int e = 0; e < kPiece; ++e) sum += x.at[e] * y.at[e];
      }
    sum = warp_sum<kLanesOfBag>(sum);
    if (counts && lane % kLanesOfBag == 0) grad_weights[at] = from_float<T>((sum + same) / count);
  }
}

}  // namespace recsparse::low_rank
