// One pass over a tile of labels that share their inputs: logits, loss, gradient of weight and
// bias, and what an Ending makes of it. Weights, gathered inputs and the gradient of the logits are
// read and written once; the gradient to the input, which sums over all labels, follows from what
// is stored:
//   terms.grad [labels of the chunk, pitch]   old [labels of the chunk, F], the weights as they
//   were
// A block holds all rows of the batch and all inputs of the group. Its memory, rows padded by 16
// bytes:
//   columns [F]   x [F, B]   weight [labels, F]   z [labels, max(B, F)] float32   grad [labels, B]
// z is first the logits, then the gradient of the weight.
#pragma once

#include "fan_in_grad_kernels.cuh"
#include "fan_in_loss_kernels.cuh"

namespace recsparse {

// B and F as a block holds them: whole warps' parts of a product.
struct FusedSizes {
  int rows, inputs;
  int row_log, input_log;  // 2^log pieces of eight hold them

  __host__ __device__ int row_pitch() const { return rows + 8; }
  __host__ __device__ int input_pitch() const { return inputs + 8; }
  __host__ __device__ int result_pitch() const { return (rows > inputs ? rows : inputs) + 8; }

  // Where each part begins, and the end.
  struct Places {
    int64_t x, weight, z, grad, end;
  };
  __host__ __device__ Places places(int labels) const {
    Places at;
    at.x = int64_t(inputs) * 4;
    at.weight = at.x + int64_t(inputs) * row_pitch() * 2;
    at.z = at.weight + int64_t(labels) * input_pitch() * 2;
    at.grad = at.z + int64_t(labels) * result_pitch() * 4;
    at.end = at.grad + int64_t(labels) * row_pitch() * 2;
    return at;
  }
};

// f(row, first of eight columns) over `rows` rows of 2^log pieces, of which `columns` / 8 are
// there.
template <class F>
__device__ __forceinline__ void each_eight(int rows, int columns, int log, F f) {
  for (int i = int(threadIdx.x); i < rows << log; i += int(blockDim.x)) {
    const int column = (i & ((1 << log) - 1)) * 8;
    if (column < columns) f(i >> log, column);
  }
}
// f(row, column), neighbours by neighbouring threads.
template <class F>
__device__ __forceinline__ void each_element(int rows, int columns, int log, F f) {
  for (int i = int(threadIdx.x); i < rows << (log + 3); i += int(blockDim.x)) {
    const int column = i & ((8 << log) - 1);
    if (column < columns) f(i >> (log + 3), column);
  }
}

template <class T, int kM, int kN>
__global__ void __launch_bounds__(kGroupThreads, kGroupBlocks)
    group_fused_kernel(FanInLayer<T> layer, FusedSizes size, LossTerms<T> terms, int64_t first_tile,
                       Ending<T> weight_ending, Ending<T> bias_ending, bool with_bias, T* old) {
  static_assert(sizeof(T) == 2, "pieces of eight are 16 bytes");
  constexpr int kLabels = 16 * kM, kColumns = 8 * kN, kWarps = kGroupThreads / kWarp;
  const TileLabels at = labels_of(layer, first_tile + blockIdx.x, true);
  const FusedSizes::Places places = size.places(kLabels);
  const int row_pitch = size.row_pitch(), input_pitch = size.input_pitch();
  const int result_pitch = size.result_pitch(), fan_in = int(layer.fan_in);
  int32_t* columns = dynamic_shared<int32_t>();
  T* x = dynamic_shared<T>(places.x);
  T* weight = dynamic_shared<T>(places.weight);
  float* z = dynamic_shared<float>(places.z);
  T* grad = dynamic_shared<T>(places.grad);
  const int64_t first_weight = at.first * layer.fan_in;

  for (int f = int(threadIdx.x); f < size.inputs; f += kGroupThreads)
    columns[f] = f < fan_in ? layer.column(at.row * layer.fan_in + f) : -1;
  if (layer.vectors) {
    each_eight(kLabels, size.inputs, size.input_log, [&](int o, int f) {
      const bool valid = o < at.count && f < fan_in;
      cp_async_16(weight + o * input_pitch + f,
                  layer.weight + (valid ? first_weight + int64_t(o) * fan_in + f : 0), valid);
    });
  } else {
    each_element(kLabels, size.inputs, size.input_log, [&](int o, int f) {
      weight[o * input_pitch + f] = o < at.count && f < fan_in
                                        ? layer.weight[first_weight + int64_t(o) * fan_in + f]
                                        : from_float<T>(0.0f);
    });
  }
  __syncthreads();
  each_eight(size.inputs, size.rows, size.row_log, [&](int f, int b) {
    const int column = columns[f];
    const bool valid = column >= 0 && b < layer.pitch;
    cp_async_16(x + f * row_pitch + b, layer.x + (valid ? column * layer.pitch + b : 0), valid);
  });
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();

  for (int column = warp_id() * kColumns; column < size.rows; column += kWarps * kColumns) {
    float acc[kM][kN][4];
    clear(acc);
#pragma unroll 2
    for (int k = 0; k < size.inputs; k += 16)
      multiply_16<T, false, false, kM, kN>(acc, weight + k, input_pitch, x + k * row_pitch + column,
                                           row_pitch);
    store_fragments(acc, z + column, result_pitch);
  }
  __syncthreads();

  double sum = 0.0;
  each_element(kLabels, size.rows, size.row_log, [&](int o, int b) {
    float slope = 0.0f;
    if (o < at.count && b < layer.batch) {
      const LossTerm term = terms.term(layer, at.first + o, b, z[o * result_pitch + b]);
      sum += double(term.value);
      slope = term.slope * terms.grad_scale;
    }
    grad[o * row_pitch + b] = from_float<T>(slope);
  });
  if (terms.sums) {
    sum = block_sum(sum);
    if (threadIdx.x == 0) terms.sums[blockIdx.x] = sum;
  }
  __syncthreads();

  const int64_t first_local = at.first - terms.first_label;
  if (terms.grad) {
    each_eight(at.count, size.rows, size.row_log, [&](int o, int b) {
      if (b < layer.pitch)
        store_pack(terms.grad + (first_local + o) * layer.pitch + b,
                   load_pack<T, 8>(grad + o * row_pitch + b));
    });
  }
  if (old && layer.vectors) {
    each_eight(at.count, size.inputs, size.input_log, [&](int o, int f) {
      if (f < fan_in)
        store_pack(old + (first_local + o) * layer.fan_in + f,
                   load_pack<T, 8>(weight + o * input_pitch + f));
    });
  } else if (old) {
    each_element(at.count, size.inputs, size.input_log, [&](int o, int f) {
      if (f < fan_in) old[(first_local + o) * layer.fan_in + f] = weight[o * input_pitch + f];
    });
  }

  for (int column = warp_id() * kColumns; column < size.inputs; column += kWarps * kColumns) {
    float acc[kM][kN][4];
    clear(acc);
#pragma unroll 2
    for (int k = 0; k < size.rows; k += 16)
      multiply_16<T, false, true, kM, kN>(acc, grad + k, row_pitch, x + column * row_pitch + k,
                                          row_pitch);
    store_fragments(acc, z + column, result_pitch);
  }
  const float scale = weight_ending.scale();
  if (with_bias) {
    for (int o = warp_id(); o < at.count; o += kWarps) {
      float total = 0.0f;
      for (int b = lane_id(); b < size.rows; b += kWarp) total += to_float(grad[o * row_pitch + b]);
      total = warp_sum(total);
      if (lane_id() == 0) bias_ending(total * scale, at.first + o);
    }
  }
  __syncthreads();
  each_element(at.count, size.inputs, size.input_log, [&](int o, int f) {
    if (f < fan_in)
      weight_ending.apply(to_float(weight[o * input_pitch + f]),
                          columns[f] >= 0 ? z[o * result_pitch + f] * scale : 0.0f,
                          first_weight + int64_t(o) * fan_in + f);
  });
}

}  // namespace recsparse
