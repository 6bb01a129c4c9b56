// 2:4 linear for few rows in float32: the weight's bytes are the time.
//   output[b, o] = activation(sum_i W[o, i] input[b, i] + bias[o])
//   input [B, I]   W [O, I] as values [O, P / 2], metadata [O, P / 8]   output [B, O]
#pragma once

#include "sparse24_tiles.cuh"

namespace recsparse::sparse24 {

constexpr int kRowsOutputs = 4;  // of a warp: each input it reads serves as many
constexpr int kRowsWarps = 8;

// A lane has eight columns of four weight rows, and the same columns of every input row. `warps_k`
// warps of a block share outputs and split their columns.
template <int kRows>
__global__ void __launch_bounds__(kRowsWarps* kWarp)
    linear_rows_kernel(Matrix<float> input, SparseWeight<float> weight, LinearOutput<float> to,
                       int warps_k) {
  const int lane = lane_id(), warp = warp_id();
  const int64_t block_o = int64_t(blockIdx.x) * (kRowsWarps / warps_k) * kRowsOutputs;
  const int64_t o0 = block_o + warp / warps_k * kRowsOutputs;
  float sums[kRowsOutputs][kRows] = {};
  for (int64_t byte = int64_t(warp % warps_k) * kWarp + lane; byte < weight.row_bytes;
       byte += int64_t(warps_k) * kWarp) {
    float w[kRowsOutputs][8];
#pragma unroll
    for (int o = 0; o < kRowsOutputs; ++o) {
      const PackedEight<float> packed = load_packed(weight, o0 + o, byte);
      expand_eight(w[o], packed.kept, packed.code);
    }
#pragma unroll
    for (int b = 0; b < kRows; ++b) {
      if (b >= input.rows) break;
      float x[8];
      load_eight(x, input.at + b * input.stride, 8 * byte, input.columns, input.width == 16);
#pragma unroll
      for (int o = 0; o < kRowsOutputs; ++o)
#pragma unroll
        for (int i = 0; i < 8; ++i) sums[o][b] = fmaf(w[o][i], x[i], sums[o][b]);
    }
  }
  RS_SHARED(float, totals, [kRowsWarps][kRowsOutputs][kRows]);
#pragma unroll
  for (int o = 0; o < kRowsOutputs; ++o)
#pragma unroll
    for (int b = 0; b < kRows; ++b) {
      const float total = warp_sum(sums[o][b]);
      if (lane == 0) totals[warp][o][b] = total;
    }
  __syncthreads();
  const int outputs = kRowsWarps / warps_k * kRowsOutputs;
  for (int i = int(threadIdx.x); i < outputs * kRows; i += kRowsWarps * kWarp) {
    const int o = i % outputs, b = i / outputs;
    if (b >= to.rows || block_o + o >= to.columns) continue;
    float total = 0.0f;
    for (int k = 0; k < warps_k; ++k)
      total += totals[o / kRowsOutputs * warps_k + k][o % kRowsOutputs][b];
    to.write_total(b * to.columns + block_o + o, total);
  }
}

}  // namespace recsparse::sparse24
