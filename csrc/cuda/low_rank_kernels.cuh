// Low-rank linear and cross layers, CUDA, where a block owns rows of the batch (R <= kMaxRank):
//
//   mid = input down^T + mid_bias,  output = act(act_mid(mid) up^T + bias)
//   cross: output = x0 * (mid up^T + bias) + input
//
// mid is summed over I in registers, tiles of input and down coming through a ring of stages in
// shared memory; then it stays there, and up and the output stream past it.
#pragma once

#include "low_rank_rows.cuh"

namespace recsparse::low_rank {

template <class T>
struct ForwardArguments {
  Matrix<T> input, down, up;  // [B, I] [R, I] [O, R]
  const T *mid_bias, *bias;   // [R] [O], or null
  const T* x0;                // [B, O]: cross; null: linear
  T* mid;                     // [B, R] or null
  T* output;                  // [B, O]
  int mid_width, output_width;
  Activation mid_activation, activation;
};

template <class Config, class T>
struct ForwardStages {
  // 128 bytes of a row; for the largest rank 64, so that four stages fit
  static constexpr int kDepth = sizeof(T) == 4 || Config::kRank == 128 ? 32 : 64;
  static constexpr int kStages = sizeof(T) == 4 ? 3 : 4;
  using InputTile = Tile<T, Config::kRows, kDepth>;
  using DownTile = Tile<T, Config::kRank, kDepth>;
  static constexpr int64_t kStageBytes = InputTile::kBytes + DownTile::kBytes;
  static constexpr int64_t kRingBytes =
      kStages * kStageBytes > Config::kProjectBytes ? kStages* kStageBytes : Config::kProjectBytes;
  static constexpr int64_t kMidAt = kRingBytes, kSumsAt = kMidAt + Config::MidTile::kBytes;
  static constexpr int64_t kBytes = kSumsAt + Config::OutSums::kBytes;
  static_assert(kBytes <= 99 * 1024, "what every GPU from compute capability 8.0 on has");
};

template <class Config, class T>
__global__ void __launch_bounds__(Config::kThreads, 2) forward_kernel(const ForwardArguments<T> p) {
  using Stages = ForwardStages<Config, T>;
  using MidTile = typename Config::MidTile;
  constexpr int kThreads = Config::kThreads, kDepth = Stages::kDepth, kRing = Stages::kStages;
  constexpr int kPiece = kPackOf16Bytes<T>;
  const int64_t b0 = int64_t(blockIdx.x) * Config::kRows;
  const int64_t batch = p.input.rows, rank = p.down.rows;
  const int64_t steps = (p.input.columns + kDepth - 1) / kDepth;
  const auto input_of = [&](int64_t s) {
    return dynamic_shared<T>(s % kRing * Stages::kStageBytes);
  };
  const auto down_of = [&](int64_t s) {
    return dynamic_shared<T>(s % kRing * Stages::kStageBytes + Stages::InputTile::kBytes);
  };
  const auto fetch = [&](int64_t s) {
    if (s < steps) {
      load_tile<typename Stages::InputTile, kThreads>(input_of(s), p.input, b0, s * kDepth);
      load_tile<typename Stages::DownTile, kThreads>(down_of(s), p.down, 0, s * kDepth);
    }
    cp_async_commit();
  };
  typename Config::MidGrid::Sums sums;
  sums.clear();
  for (int s = 0; s < kRing - 1; ++s) fetch(s);
  for (int64_t s = 0; s < steps; ++s) {
    cp_async_wait<kRing - 2>();
    __syncthreads();
    fetch(s + kRing - 1);
    block_product<typename Config::MidGrid, Layout::kAlong, Layout::kAlong, kDepth,
                  Stages::InputTile::kStride, Stages::DownTile::kStride>(sums, input_of(s),
                                                                         down_of(s));
  }
  cp_async_wait<0>();

  // Columns from R on must be zero: an infinite input made them NaN.
  T* mid = dynamic_shared<T>(Stages::kMidAt);
  block_store_rounded<typename Config::MidGrid, MidTile::kStride>(
      mid, sums, [&](int, int r, float value) {
        if (r >= rank) return 0.0f;
        return p.mid_bias ? value + to_float(p.mid_bias[r]) : value;
      });
  __syncthreads();  // and the ring has been read
  if (p.mid || p.mid_activation != Activation::kNone)
    each_piece<MidTile, kThreads>([&](PieceAt at, int) {
      T* from = mid + at.row * MidTile::kStride + at.column;
      const int count = b0 + at.row < batch ? elements_inside<kPiece>(at.column, rank) : 0;
      if (p.mid && count)
        write_piece(p.mid + (b0 + at.row) * rank + at.column, read_piece(from), count, p.mid_width);
      if (p.mid_activation != Activation::kNone)  // some are not 0 at 0
        map_piece<kPiece>(from, [&](float x, int e) {
          return at.column + e < rank ? activate(x, p.mid_activation) : 0.0f;
        });
    });

  const int64_t columns = p.up.rows;
  project<Config, Layout::kAlong, 2>(
      mid, dynamic_shared<T>(), dynamic_shared<float>(Stages::kSumsAt), p.up, p.bias,
      [&](int row, int64_t column, int count, float* from) {
        if (b0 + row >= batch) return;
        const int64_t at = (b0 + row) * columns + column;
        if (p.activation != Activation::kNone)
          map_piece<kPiece>(from, [&](float x, int) { return activate(x, p.activation); });
        Piece<T> values = read_sums<T>(from);
        if (p.x0) {
          const Piece<T> x0 = read_piece(p.x0 + at, count, p.output_width);
          const Piece<T> x = read_piece(p.input.at + at, count, p.output_width);
#pragma unroll
          for (int e = 0; e < kPiece; ++e) values.at[e] = x0.at[e] * values.at[e] + x.at[e];
        }
        write_piece(p.output + at, values, count, p.output_width);
      });
}

}  // namespace recsparse::low_rank
