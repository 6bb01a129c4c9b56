// Inner loops of the fixed fan-in ops. One table for each instruction level and element type.
//
// The batch is cut into panels of `lanes` rows, held transposed and in float32:
//   input panel [I][lanes], logits or gradient tile [labels][lanes]
// so that one weight meets `lanes` rows at once and a gather is a plain load of one panel row.
// lanes is one or two vectors; for logits of small batches also 1, 4 or 8.
#pragma once

#include <cstdint>

#include "isa.h"

namespace recsparse {

// What a later pass will read in the place of a tile: fetched while the tile is worked on.
struct FanInAhead {
  const char* base;  // null: nothing
  int64_t bytes_per_label;
};

// Consecutive labels, ready for the kernels, against one panel.
struct FanInTile {
  const float* weight;  // [labels, fan_in]
  const float* bias;    // [labels] or null
  const void* indices;  // [rows, fan_in], checked; label l reads row (first + l) / group_size
  bool narrow;          // indices are int16, not int32
  int64_t first;        // place of the first label in the group of the first row of indices
  int64_t labels, fan_in, group_size, lanes;
  FanInAhead ahead[2];  // weights, indices
};

// Where the gradients of a tile go; null: not wanted.
struct FanInGradients {
  float* input;   // [I][lanes], added to
  float* weight;  // [labels, fan_in]
  float* bias;    // [labels]
  bool add;       // add to weight and bias, or write
};

enum class FanInLoss : int64_t { kBce = 0, kSquaredHinge = 1 };

struct FanInOptimizer {
  enum Kind : int64_t { kSgd = 0, kAdam = 1, kAdamW = 2 } kind;
  float lr, weight_decay, beta1, beta2, eps;
  float first_correction, second_correction;  // 1 / (1 - beta1^step), 1 / (1 - beta2^step)
};

template <class T>
struct FanInKernels {
  int64_t lanes;  // of one vector

  // panel[c][r] = source[r * stride + c], 0 for r in [rows, lanes)
  void (*pack)(const T* source, int64_t stride, int64_t rows, int64_t columns, int64_t lanes,
               float* panel);
  // target[r * stride + c] = panel[c][r], r < rows
  void (*unpack)(const float* panel, int64_t rows, int64_t columns, int64_t lanes, T* target,
                 int64_t stride);
  void (*widen)(const T* source, int64_t count, float* target);
  void (*narrow)(const float* source, int64_t count, T* target);
  // bfloat16 only: up or down with probability; random bits from the element's number and the key
  void (*narrow_stochastic)(const float* source, int64_t count, int64_t first, uint64_t key,
                            T* target);
  void (*add)(const float* source, int64_t count, float* target);

  // target[r * stride + c] = source[r * pitch + c], past the caches
  void (*stream_rows)(const T* source, int64_t pitch, int64_t rows, int64_t count, T* target,
                      int64_t stride);

  // whether all are in [0, limit)
  bool (*in_range16)(const int16_t* indices, int64_t count, int64_t limit);
  bool (*in_range32)(const int32_t* indices, int64_t count, int64_t limit);

  // logits[l][lane] = bias[l] + sum_f weight[l][f] * panel[indices[l][f]][lane]
  void (*logits)(const FanInTile& tile, const float* panel, float* logits);
  // panel gradient and weight gradient of the same
  void (*gradients)(const FanInTile& tile, const float* panel, const float* grad_logits,
                    const FanInGradients& out);
  // Sum of the loss terms of [labels][lanes] with no positives, over the first `rows` lanes; with
  // `scale` not null the tile becomes the terms' derivatives times *scale, 0 in the other lanes.
  double (*loss)(FanInLoss kind, float* tile, int64_t labels, int64_t rows, int64_t lanes,
                 const float* scale);
  // m, v: moments or null
  void (*update)(const FanInOptimizer& optimizer, const float* grad, int64_t count, float* weight,
                 float* m, float* v);

  // Candidates: lanes along the fan-in, weights and indices as they are stored.
  //   out[i] = bias[l] + sum_f weight[l][f] * input[indices[l / group_size][f]], l = labels[i]
  void (*dots16)(const float* input, const T* weight, const int16_t* indices, const T* bias,
                 const int64_t* labels, int64_t count, int64_t fan_in, int64_t group_size,
                 float* out);
  void (*dots32)(const float* input, const T* weight, const int32_t* indices, const T* bias,
                 const int64_t* labels, int64_t count, int64_t fan_in, int64_t group_size,
                 float* out);
  // first i >= begin with row[i] > threshold or NaN, else count
  int64_t (*first_above)(const float* row, int64_t begin, int64_t count, float threshold);
};
RS_KERNEL_TABLE(FanInKernels, fan_in_kernels)

}  // namespace recsparse
