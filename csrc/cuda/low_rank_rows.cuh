// What kernels share whose blocks own rows of the batch and hold their rank-R intermediate on the
// chip (R <= kMaxRank): sizes, and the projection of it by a weight.
#pragma once

#include "activation.cuh"
#include "mma_tile.cuh"

namespace recsparse::low_rank {

constexpr int kMaxRank = 128;
constexpr int kBlockColumns = 64;  // columns of an output that are made at a time

// kRank: R rounded up to 32, 64 or 128 (of mma work and shared memory only; memory holds R).
// kMany: rows enough to give every multiprocessor blocks of 64. A block of 32 reads each weight
// twice as often from L2, but fills a large GPU from 4096 rows on.
template <class T, int kRankOf, bool kManyOf>
struct RowsConfig {
  static constexpr int kRank = kRankOf;
  static constexpr int kRows = kManyOf ? 64 : 32;
  // 8 or 4 warps; each has 16 rows and 16 columns at least
  static constexpr int kWarpsM = kManyOf && kRank == 32 ? 4 : 2;
  static constexpr int kWarpsN = kManyOf && kRank != 32 ? 4 : 2;
  using MidGrid = WarpGrid<kRows, kRank, kWarpsM, kWarpsN>;
  using OutGrid = WarpGrid<kRows, kBlockColumns, kWarpsM, kWarpsN>;
  static constexpr int kThreads = MidGrid::kThreads;
  using MidTile = Tile<T, kRows, kRank>;
  using OutTile = Tile<T, kRows, kBlockColumns>;  // its pieces; the sums are float32:
  using OutSums = SumTile<kRows, kBlockColumns>;
  // A weight's part for kBlockColumns columns: of [columns, R] or of [R, columns].
  using AlongTile = Tile<T, kBlockColumns, kRank>;
  using AcrossTile = Tile<T, kRank, kBlockColumns>;
  static constexpr int64_t kProjectBytes =
      2 * (AlongTile::kBytes > AcrossTile::kBytes ? AlongTile::kBytes : AcrossTile::kBytes);
};

// Calls f(RowsConfig) for the rank, and for many rows or few.
template <class T, class F>
void with_rows_config(const Stream& stream, int64_t rows, int64_t rank, F f) {
  const auto with_rank = [&](auto many) {
    constexpr bool kMany = decltype(many)::value;
    if (rank <= 32) return f(RowsConfig<T, 32, kMany>());
    if (rank <= 64) return f(RowsConfig<T, 64, kMany>());
    return f(RowsConfig<T, 128, kMany>());
  };
  if constexpr (sizeof(T) == 2) {  // float32 tiles of 64 rows do not fit into shared memory
    if (rows >= 64 * int64_t(stream.multiprocessors())) return with_rank(std::true_type());
  }
  with_rank(std::false_type());
}

// sums[row, c] = mid[row, :] . weight(c, :) + bias[c] for all columns c of the weight, [C, R] along
// or [R, C] across: finish(row, column, count, float* sums) gets the pieces of this thread, row in
// the tile. `stages` has kProjectBytes that nobody reads or writes any more; `mid` may have been
// written just before.
template <class Config, Layout kWeight, int kUnroll, class T, class Finish>
__device__ __forceinline__ void project(const T* mid, T* stages, float* sums_tile,
                                        const Matrix<T>& weight, const T* bias, Finish finish) {
  using Grid = typename Config::OutGrid;
  using WeightTile = std::conditional_t<kWeight == Layout::kAlong, typename Config::AlongTile,
                                        typename Config::AcrossTile>;
  constexpr int kStride = Config::OutSums::kStride, kPiece = kPackOf16Bytes<T>;
  constexpr int kStage = WeightTile::kRows * WeightTile::kStride;
  const int64_t columns = kWeight == Layout::kAlong ? weight.rows : weight.columns;
  const auto fetch = [&](int64_t n0, int stage) {
    if (n0 < columns)
      load_tile<WeightTile, Config::kThreads>(stages + stage * kStage, weight,
                                              kWeight == Layout::kAlong ? n0 : 0,
                                              kWeight == Layout::kAlong ? 0 : n0);
    cp_async_commit();
  };
  fetch(0, 0);
  int stage = 0;
  for (int64_t n0 = 0; n0 < columns; n0 += kBlockColumns) {
    fetch(n0 + kBlockColumns, stage ^ 1);
    cp_async_wait<1>();
    __syncthreads();
    typename Grid::Sums sums;
    sums.clear();
    block_product<Grid, Layout::kAlong, kWeight, Config::kRank, Config::MidTile::kStride,
                  WeightTile::kStride>(sums, mid, stages + stage * kStage);
    block_store_sums<Grid, kStride>(sums_tile, sums);
    __syncthreads();
    each_piece<typename Config::OutTile, Config::kThreads, kUnroll>([&](PieceAt at, int) {
      const int64_t column = n0 + at.column;
      const int count = elements_inside<kPiece>(column, columns);
      if (!count) return;
      float* from = sums_tile + at.row * kStride + at.column;
      if (bias) {
#pragma unroll
        for (int e = 0; e < kPiece; ++e)
          if (e < count) from[e] += to_float(bias[column + e]);
      }
      finish(at.row, column, count, from);
    });
    stage ^= 1;
  }
  cp_async_wait<0>();
}

}  // namespace recsparse::low_rank
