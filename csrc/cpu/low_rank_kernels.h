// Inner loops of the low-rank linear and cross layers (low_rank.cpp), one table per element type.
#pragma once

#include <cstdint>

#include "isa.h"

namespace recsparse {

// Shared by all tasks of one forward call; null where absent. "panels": gemm.h.
template <class T>
struct LowRankForward {
  int64_t batch, in_features, rank, out_features;
  const T* input;            // [B, I]
  const T* x0;               // [B, O], cross layer only
  const T* down;             // [R, I]
  const T* up;               // [O, R]
  const T* mid_bias;         // [R]
  const T* bias;             // [O]
  const float* down_panels;  // of down^T: depth I, columns R
  const float* up_panels;    // of up^T: depth R, columns O
  Activation mid_activation, activation;
  T* mid;     // [B, R], before its activation
  T* output;  // [B, O]
};

template <class T>
struct LowRankBackward {
  int64_t batch, in_features, rank, out_features;
  const T* grad_output;          // [B, O]
  const T* x0;                   // [B, O], cross layer only
  const T* mid;                  // [B, R], before its activation
  const T* bias;                 // [O]
  const T* output;               // [B, O], where the activation's derivative follows from it
  const float* up_panels;        // of up: depth O, columns R
  const float* up_panels_again;  // of up^T: depth R, columns O, to recompute the pre-activation
  const float* down_panels;      // of down: depth R, columns I
  Activation mid_activation, activation;
  T* grad_input;      // [B, I]
  T* grad_x0;         // [B, O]
  T* grad_pre;        // [B, O], grad_output times the activation's derivative
  float* mid_active;  // [B, padded R], after its activation
  float* grad_mid;    // [B, padded R], before its activation
};

// out[r, n] (or out[n, r]) = sum_b factor[b, r] * source[b, n] (* source_scale[b, n])
template <class T>
struct LowRankColumns {
  int64_t batch, rank, columns;
  const float* factor;    // [B, padded R]
  const T* source;        // [B, N]
  const T* source_scale;  // [B, N]
  bool out_by_column;     // out is [N, R]
  T* out;
  T* column_sum;  // [N]: sum_b source (* source_scale)
};

template <class T>
struct LowRankKernels {
  int64_t panel;         // columns of a panel; "padded R" is R rounded up to it
  int64_t row_block;     // rows that a task takes at a time
  int64_t column_block;  // columns that a task takes at a time
  void (*pack_panels)(const T* source, int64_t row, bool transposed, int64_t depth, int64_t n,
                      int64_t first, int64_t last, float* panels);
  int64_t (*forward_scratch)(const LowRankForward<T>&);
  void (*forward_rows)(const LowRankForward<T>&, int64_t begin, int64_t end, float* scratch);
  // few rows: [B, padded R] for some ranks, then the output for some columns
  void (*forward_few_mid)(const LowRankForward<T>&, int64_t first, int64_t last, float* mid_active);
  void (*forward_few_output)(const LowRankForward<T>&, int64_t first, int64_t last,
                             const float* mid_active, float* scratch);
  int64_t (*backward_scratch)(const LowRankBackward<T>&);
  void (*backward_rows)(const LowRankBackward<T>&, int64_t begin, int64_t end, float* scratch);
  int64_t (*columns_scratch)(const LowRankColumns<T>&);
  void (*columns)(const LowRankColumns<T>&, int64_t begin, int64_t end, float* scratch);
  // out[n] = sum over rows of matrix [rows, n], in order
  void (*sum_rows)(const float* matrix, int64_t row, int64_t rows, int64_t n, T* out);
};
RS_KERNEL_TABLE(LowRankKernels, low_rank_kernels)

}  // namespace recsparse
