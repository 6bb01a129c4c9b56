// Gradients of low-rank linear and cross layers to what has rows of the batch, CUDA (R <=
// kMaxRank):
//
//   sum = act_mid(mid) up^T + bias                     only where its slope or grad_x0 needs it
//   grad_sum = grad_output * slope(sum)                cross: grad_output * x0
//   grad_mid = (grad_sum up) * slope_mid(mid)
//   grad_input = grad_mid down                         cross: + grad_output
//   grad_x0 = grad_output * sum                        cross
//
// A block owns rows. Tiles of grad_output, what it is multiplied by, and up come through a ring of
// stages; grad_sum replaces grad_output in its stage, and the same tile of up serves both products.
#pragma once

#include "low_rank_rows.cuh"

namespace recsparse::low_rank {

template <class T>
struct BackwardArguments {
  Matrix<T> grad_output, down, up, mid;  // [B, O] [R, I] [O, R] [B, R]
  const T* bias;                         // [O] or null
  const T* factor;                       // [B, O]: x0, or the output that the slope follows from
  bool is_cross;
  T *grad_x0, *grad_sum;  // [B, O] or null
  T* grad_mid;            // [B, R]
  T* grad_input;          // [B, I] or null
  int factor_width, mid_width, input_width, output_width;
  Activation mid_activation, activation;
};

template <class Config, class T>
struct BackwardStages {
  static constexpr int kDepth = 32;  // columns of O a stage
  static constexpr int kStages =
      sizeof(T) == 4 ? (Config::kRank == 128 ? 2 : 3) : (Config::kRank == 128 ? 3 : 4);
  using GradTile = Tile<T, Config::kRows, kDepth>;
  using UpTile = Tile<T, kDepth, Config::kRank>;
  using SumGrid = WarpGrid<Config::kRows, kDepth, Config::kRows / 16, 2>;
  using Sums = SumTile<Config::kRows, kDepth>;
  static_assert(SumGrid::kThreads == Config::kThreads, "all warps make the sums");
  static constexpr int64_t kUpAt = 2 * GradTile::kBytes;  // behind grad_output and the factor
  static constexpr int64_t kStageBytes = kUpAt + UpTile::kBytes;
  static constexpr int64_t kRingBytes =
      kStages * kStageBytes > Config::kProjectBytes ? kStages* kStageBytes : Config::kProjectBytes;
  static constexpr int64_t kMidAt = kRingBytes, kSumsAt = kMidAt + Config::MidTile::kBytes;
  static constexpr int64_t kBytes = kSumsAt + Config::OutSums::kBytes;
  static_assert(kBytes <= 99 * 1024, "what every GPU from compute capability 8.0 on has");
};

template <class Config, class T>
__global__ void __launch_bounds__(Config::kThreads, 2)
    backward_kernel(const BackwardArguments<T> p) {
  using Stages = BackwardStages<Config, T>;
  using MidTile = typename Config::MidTile;
  using GradTile = typename Stages::GradTile;
  using UpTile = typename Stages::UpTile;
  constexpr int kThreads = Config::kThreads, kDepth = Stages::kDepth, kRing = Stages::kStages;
  constexpr int kPiece = kPackOf16Bytes<T>;
  const int64_t b0 = int64_t(blockIdx.x) * Config::kRows;
  const int64_t batch = p.grad_output.rows, columns = p.grad_output.columns, rank = p.up.columns;
  const int64_t steps = (columns + kDepth - 1) / kDepth;
  const bool acts = p.activation != Activation::kNone;
  const bool needs_sum = p.grad_x0 || (acts && !p.factor);
  const Matrix<T> factor{p.factor, batch, columns, columns, p.factor_width};
  T* mid = dynamic_shared<T>(Stages::kMidAt);
  float* sums_tile = dynamic_shared<float>(Stages::kSumsAt);

  const auto tile_of = [&](int64_t s, int64_t at) {
    return dynamic_shared<T>(s % kRing * Stages::kStageBytes + at);
  };
  const auto fetch = [&](int64_t s) {
    if (s < steps) {
      load_tile<GradTile, kThreads>(tile_of(s, 0), p.grad_output, b0, s * kDepth);
      if (p.factor)
        load_tile<GradTile, kThreads>(tile_of(s, GradTile::kBytes), factor, b0, s * kDepth);
      load_tile<UpTile, kThreads>(tile_of(s, Stages::kUpAt), p.up, s * kDepth, 0);
    }
    cp_async_commit();
  };
  for (int s = 0; s < kRing - 1; ++s) fetch(s);
  if (needs_sum)  // visible after the first barrier of the loop
    each_piece<MidTile, kThreads>([&](PieceAt at, int) {
      const int count = b0 + at.row < batch ? elements_inside<kPiece>(at.column, rank) : 0;
      T* to = mid + at.row * MidTile::kStride + at.column;
      const int64_t from = count ? (b0 + at.row) * rank + at.column : 0;
      write_piece(to, read_piece(p.mid.at + from, count, p.mid_width));
      if (p.mid_activation != Activation::kNone)
        map_piece<kPiece>(
            to, [&](float x, int e) { return e < count ? activate(x, p.mid_activation) : 0.0f; });
    });

  typename Config::MidGrid::Sums grad_mid;
  grad_mid.clear();
  for (int64_t s = 0; s < steps; ++s) {
    cp_async_wait<kRing - 2>();
    __syncthreads();
    fetch(s + kRing - 1);
    T* grad_tile = tile_of(s, 0);
    const T* up_tile = tile_of(s, Stages::kUpAt);
    if (needs_sum) {
      typename Stages::SumGrid::Sums sums;
      sums.clear();
      block_product<typename Stages::SumGrid, Layout::kAlong, Layout::kAlong, Config::kRank,
                    MidTile::kStride, UpTile::kStride>(sums, mid, up_tile);
      block_store_sums<typename Stages::SumGrid, Stages::Sums::kStride>(sums_tile, sums);
      __syncthreads();
    }
    if (p.factor || needs_sum) {
      each_piece<GradTile, kThreads>([&](PieceAt at, int) {
        const int64_t row = b0 + at.row, column = s * kDepth + at.column;
        const int count = row < batch ? elements_inside<kPiece>(column, columns) : 0;
        T* to = grad_tile + at.row * GradTile::kStride + at.column;
        const T* other = to + GradTile::kBytes / int64_t(sizeof(T));
        float* sum = sums_tile + at.row * Stages::Sums::kStride + at.column;
        Piece<T> grad = read_piece(to);
        if (needs_sum && p.bias) {
#pragma unroll
          for (int e = 0; e < kPiece; ++e)
            if (e < count) sum[e] += to_float(p.bias[column + e]);
        }
        if (p.is_cross) {
          if (p.grad_x0 && count) {
            Piece<T> values = read_sums<T>(sum);
#pragma unroll
            for (int e = 0; e < kPiece; ++e) values.at[e] *= grad.at[e];
            write_piece(p.grad_x0 + row * columns + column, values, count, p.output_width);
          }
          const Piece<T> x0 = read_piece(other);
#pragma unroll
          for (int e = 0; e < kPiece; ++e) grad.at[e] *= x0.at[e];
          write_piece(to, grad);
        } else if (p.factor) {
          map_piece<kPiece>(to, [&](float x, int e) {
            return x * slope_of_output(to_float(other[e]), p.activation);
          });
        } else {  // outside the matrix mid may be such that the slope is NaN
          map_piece<kPiece>(to, [&](float x, int e) {
            return e < count ? x * slope(sum[e], p.activation) : 0.0f;
          });
          if (p.grad_sum && count)
            write_piece(p.grad_sum + row * columns + column, read_piece(to), count, p.output_width);
        }
      });
      __syncthreads();
    }
    block_product<typename Config::MidGrid, Layout::kAlong, Layout::kAcross, kDepth,
                  GradTile::kStride, UpTile::kStride>(grad_mid, grad_tile, up_tile);
  }
  cp_async_wait<0>();
  __syncthreads();  // the ring and mid have been read

  block_store_rounded<typename Config::MidGrid, MidTile::kStride>(
      mid, grad_mid, [&](int row, int r, float value) {
        if (r >= rank || b0 + row >= batch) return 0.0f;
        return value;
      });
  __syncthreads();
  each_piece<MidTile, kThreads>([&](PieceAt at, int) {
    const int count = b0 + at.row < batch ? elements_inside<kPiece>(at.column, rank) : 0;
    if (!count) return;
    T* from = mid + at.row * MidTile::kStride + at.column;
    const int64_t to = (b0 + at.row) * rank + at.column;
    if (p.mid_activation != Activation::kNone)
      map_piece<kPiece>(from, [&](float x, int e) {
        return e < count ? x * slope(to_float(p.mid.at[to + e]), p.mid_activation) : 0.0f;
      });
    write_piece(p.grad_mid + to, read_piece(from), count, p.mid_width);
  });
  if (!p.grad_input) return;
  const int64_t inputs = p.down.columns;
  project<Config, Layout::kAcross, 2>(
      mid, dynamic_shared<T>(), sums_tile, p.down, static_cast<const T*>(nullptr),
      [&](int row, int64_t column, int count, float* from) {
        if (b0 + row >= batch) return;
        const int64_t at = (b0 + row) * inputs + column;
        Piece<T> values = read_sums<T>(from);
        if (p.is_cross) {
          const Piece<T> grad = read_piece(p.grad_output.at + at, count, p.input_width);
#pragma unroll
          for (int e = 0; e < kPiece; ++e) values.at[e] += grad.at[e];
        }
        write_piece(p.grad_input + at, values, count, p.input_width);
      });
}

}  // namespace recsparse::low_rank
