// Inner loops of the multi-field lookup with up-projection (low_rank_fields.cpp).
#pragma once

#include <cstdint>

#include "isa.h"

namespace recsparse {

// Null where absent or not wanted.
template <class T>
struct LowRankFields {
  int64_t batch, fields, rank, dim;
  const int64_t* starts;  // [F + 1], first table row of each field
  const void* indices;    // [B, F], int64 if wide, else int32
  bool wide;
  const T* table;             // [sum of V_k, R]
  const float* projections;   // [F, R, padded D], padded with zeros
  const float* bias;          // [F, padded D], zeros where there is none
  T* mid;                     // [B, F, R]: z
  T* output;                  // [B, F, D]: x
  T* interaction;             // [B]: FM term
  const T* mid_in;            // gradients: z
  const T* grad_mid;          // [B, F, R]
  const T* grad_output;       // [B, F, D]
  const T* grad_interaction;  // [B]
  T* grad_rows;               // [B, F, R]: gradient at the rows looked up
};

template <class T>
struct LowRankFieldsKernels {
  int64_t lanes;  // "padded D" is D rounded up to it
  void (*widen)(const T* source, int64_t rows, int64_t columns, float* out);
  int64_t (*forward_scratch)(const LowRankFields<T>&);
  void (*forward)(const LowRankFields<T>&, int64_t begin, int64_t end, float* scratch);
  int64_t (*backward_scratch)(const LowRankFields<T>&);
  // also this range's part of the gradients to projections and bias: [F, R + 1, padded D]
  void (*backward)(const LowRankFields<T>&, int64_t begin, int64_t end, float* part,
                   float* scratch);
  void (*sum_parts)(const LowRankFields<T>&, const float* parts, int64_t count, int64_t first_field,
                    int64_t last_field, T* grad_projections, T* grad_bias);
};
RS_KERNEL_TABLE(LowRankFieldsKernels, low_rank_fields_kernels)

}  // namespace recsparse
