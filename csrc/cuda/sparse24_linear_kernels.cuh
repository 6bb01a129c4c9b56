// 2:4 linear on sparse tensor cores (bf16, f16).
//   output[b, o] = activation(sum_i W[o, i] input[b, i] + bias[o])
//   input [B, I]   W [O, I] as values [O, P / 2], metadata [O, P / 8]   output [B, O]
//
// The weight is the sparse operand A of mma.sp m16n8k32 (M = O, N = B); a lane's metadata register
// is two 16-bit words of the stored rows g and g + 8 side by side, the word at byte 2 t of each
// eight: lanes t = 0, 1 describe the first 32 columns (selector 0), t = 2, 3 the next (selector 1).
// So the stored order needs no rearranging, and no copy of it that could be out of date.
//
// Tiles of values, metadata and input stream through kStages of shared memory by cp.async. Warps
// may also split the depth of a stage (kWarpsK): for few rows a block then reads long pieces of
// weight rows, and blocks enough to fill the GPU need no sums in global memory.
#pragma once

#include "sparse24_tiles.cuh"

namespace recsparse::sparse24 {

template <class T, int kRowsO, int kRowsB, int kWarpsOOf, int kWarpsBOf, int kWarpsKOf,
          int kStagesOf>
struct SparseShape {
  static constexpr int kBlockO = kRowsO, kBlockB = kRowsB, kStages = kStagesOf;
  static constexpr int kWarpsO = kWarpsOOf, kWarpsB = kWarpsBOf, kWarpsK = kWarpsKOf;
  static constexpr int kThreads = kWarp * kWarpsO * kWarpsB * kWarpsK;
  static constexpr int kSlice = 64;  // columns that one metadata register describes, two mma.sp
  static constexpr int kDepth = kSlice * kWarpsK;  // columns of a stage
  static constexpr int kWarpO = kBlockO / kWarpsO, kWarpB = kBlockB / kWarpsB;
  static_assert(kWarpO % 16 == 0 && kWarpB % 8 == 0, "mma.sp makes 16 x 8 sums");
  using Values = Tile<T, kBlockO, kDepth / 2>;
  using Input = Tile<T, kBlockB, kDepth>;
  static constexpr int64_t kMetadataBytes = int64_t(kBlockO) * kDepth / 8;  // [kWarpsK][O][8]
  static constexpr int64_t kStageBytes = Values::kBytes + Input::kBytes + kMetadataBytes;
  // Sums [kWarpsK][b][o]; four floats of padding keep the 32 stores of a fragment in 32 banks.
  static constexpr int kSumStride = kBlockO + 4;
  static constexpr int64_t kSumBytes = int64_t(kWarpsK) * kBlockB * kSumStride * 4;
  static constexpr int64_t kSharedBytes =
      kStages * kStageBytes > kSumBytes ? kStages* kStageBytes : kSumBytes;
  static_assert(kSharedBytes <= 99 * 1024, "what every GPU from sm_80 on can give a block");
  using Sums = WarpSums<kWarpO / 16, kWarpB / 8>;
  // What shared memory lets run at once on sm_90: without it the compiler aims at more, and spills.
  static constexpr int kMinBlocks = int(227 * 1024 / kSharedBytes);
};

// Eight bytes of metadata a row, [kWarpsK][O][8]. Rows past the weight repeat its last: their sums
// are not used, but places must ascend.
template <class Shape>
__device__ __forceinline__ void load_metadata(uint8_t* tile, const uint8_t* metadata, int64_t rows,
                                              int64_t row_bytes, int width, int64_t row0,
                                              int64_t byte0) {
  constexpr int kPieces = Shape::kBlockO * Shape::kWarpsK;
  for (int i = int(threadIdx.x); i < kPieces; i += Shape::kThreads) {
    const int r = i / Shape::kWarpsK, k = i % Shape::kWarpsK;
    const int64_t row = row0 + r < rows ? row0 + r : rows - 1, byte = byte0 + 8 * k;
    const uint8_t* from = metadata + row * row_bytes + byte;
    uint8_t* to = tile + (k * Shape::kBlockO + r) * 8;
    const int count = elements_inside<8>(byte, row_bytes);
    if (count == 8 && width >= 8) {
      cp_async_small<8>(to, from);
    } else if (count == 8 && width >= 4) {
      cp_async_small<4>(to, from);
      cp_async_small<4>(to + 4, from + 4);
    } else {
      uint64_t bytes = 0x4444444444444444u;  // places 0, 1 of every group
      for (int j = 0; j < count; ++j)
        bytes = (bytes & ~(uint64_t(0xff) << (8 * j))) | uint64_t(from[j]) << (8 * j);
      *reinterpret_cast<uint64_t*>(to) = bytes;
    }
  }
}

// Half a slice: 32 columns of input, 16 kept values.
template <class Shape, int kSelector, class T>
__device__ __forceinline__ void sparse_product(typename Shape::Sums& sums, const T* values,
                                               const T* input, const uint32_t* places) {
  constexpr int kTilesO = Shape::kWarpO / 16, kTilesB = Shape::kWarpB / 8;
  const int lane = lane_id();
  const T* value_row = values + lane % 16 * Shape::Values::kStride + 16 * kSelector + lane / 16 * 8;
  const T* input_row = input + lane % 8 * Shape::Input::kStride + 32 * kSelector + lane / 8 * 8;
  uint32_t a[kTilesO][4];
#pragma unroll
  for (int m = 0; m < kTilesO; ++m) ldmatrix_x4(a[m], value_row + 16 * m * Shape::Values::kStride);
#pragma unroll
  for (int n = 0; n < kTilesB; ++n) {
    uint32_t b[4];
    ldmatrix_x4(b, input_row + 8 * n * Shape::Input::kStride);
#pragma unroll
    for (int m = 0; m < kTilesO; ++m)
      mma_sp_m16n8k32<T, kSelector>(sums.at[m][n], a[m], b, places[m]);
  }
}

template <class Shape, class T>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kMinBlocks)
    sparse_linear_kernel(Matrix<T> input, Matrix<T> values, const uint8_t* metadata,
                         int64_t row_bytes, int metadata_width, LinearOutput<T> to, int64_t tiles_b,
                         int64_t tiles_o, int64_t steps_each) {
  constexpr int kStages = Shape::kStages, kTilesO = Shape::kWarpO / 16;
  const TileAt tile = tile_of_block(blockIdx.x, tiles_b, tiles_o);
  const int64_t b0 = tile.m * Shape::kBlockB, o0 = tile.n * Shape::kBlockO;
  const int64_t all_steps = ceil_div(8 * row_bytes, Shape::kDepth);
  const int64_t first = int64_t(blockIdx.y) * steps_each;
  const int64_t left = all_steps - first, steps = left < steps_each ? left : steps_each;
  const auto values_of = [&](int64_t stage) {
    return dynamic_shared<T>(stage * Shape::kStageBytes);
  };
  const auto input_of = [&](int64_t stage) {
    return dynamic_shared<T>(stage * Shape::kStageBytes + Shape::Values::kBytes);
  };
  const auto metadata_of = [&](int64_t stage) {
    return dynamic_shared<uint8_t>(stage * Shape::kStageBytes + Shape::Values::kBytes +
                                   Shape::Input::kBytes);
  };
  const auto load = [&](int64_t step) {
    if (step < steps) {
      const int64_t column = (first + step) * Shape::kDepth, stage = step % kStages;
      load_tile<typename Shape::Values, Shape::kThreads>(values_of(stage), values, o0, column / 2);
      load_tile<typename Shape::Input, Shape::kThreads>(input_of(stage), input, b0, column);
      load_metadata<Shape>(metadata_of(stage), metadata, to.columns, row_bytes, metadata_width, o0,
                           column / 8);
    }
    cp_async_commit();
  };

  const int warp = warp_id(), g = lane_id() / 4, t = lane_id() % 4;
  const int slice = warp % Shape::kWarpsK;
  const int warp_b = warp / Shape::kWarpsK % Shape::kWarpsB * Shape::kWarpB;
  const int warp_o = warp / Shape::kWarpsK / Shape::kWarpsB * Shape::kWarpO;
  typename Shape::Sums sums;
  sums.clear();
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) load(step);
  for (int64_t step = 0; step < steps; ++step) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // the stage is there, and the one before it has been read by all
    load(step + kStages - 1);
    const int64_t stage = step % kStages;
    const uint8_t* row = metadata_of(stage) + (slice * Shape::kBlockO + warp_o + g) * 8 + 2 * t;
    uint32_t places[kTilesO];
#pragma unroll
    for (int m = 0; m < kTilesO; ++m)
      places[m] = uint32_t(*reinterpret_cast<const uint16_t*>(row + 16 * 8 * m)) |
                  uint32_t(*reinterpret_cast<const uint16_t*>(row + 16 * 8 * m + 8 * 8)) << 16;
    const T* a = values_of(stage) + warp_o * Shape::Values::kStride + slice * (Shape::kSlice / 2);
    const T* b = input_of(stage) + warp_b * Shape::Input::kStride + slice * Shape::kSlice;
    sparse_product<Shape, 0>(sums, a, b, places);
    sparse_product<Shape, 1>(sums, a, b, places);
  }
  cp_async_wait<0>();
  __syncthreads();  // the stages are free: the sums take their place

  float* tile_sums = dynamic_shared<float>();
#pragma unroll
  for (int m = 0; m < kTilesO; ++m)
#pragma unroll
    for (int n = 0; n < Shape::kWarpB / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int o = warp_o + 16 * m + g + i / 2 * 8, b = warp_b + 8 * n + 2 * t + i % 2;
        tile_sums[(slice * Shape::kBlockB + b) * Shape::kSumStride + o] = sums.at[m][n][i];
      }
  __syncthreads();
  constexpr int kInRow = Shape::kBlockO / kPair;
#pragma unroll 1
  for (int i = int(threadIdx.x); i < Shape::kBlockB * kInRow; i += Shape::kThreads) {
    const int64_t b = b0 + i / kInRow, o = o0 + i % kInRow * kPair;
    const int count = b < to.rows ? elements_inside<kPair>(o, to.columns) : 0;
    if (count == 0) continue;
    const float* at = tile_sums + i / kInRow * Shape::kSumStride + i % kInRow * kPair;
    float total[kPair] = {at[0], at[1]};
#pragma unroll
    for (int k = 1; k < Shape::kWarpsK; ++k) {
      at += Shape::kBlockB * Shape::kSumStride;
      total[0] += at[0];
      total[1] += at[1];
    }
    to.write(b, o, count, total, int64_t(blockIdx.y));
  }
}

}  // namespace recsparse::sparse24
