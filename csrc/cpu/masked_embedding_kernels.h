// Masked embedding tables, CPU: what the torch-facing files hand to the inner loops.
// Layouts: ../masked_embedding_layout.h.
#pragma once

#include <cstdint>

#include "../masked_embedding_layout.h"
#include "isa.h"

namespace recsparse {

template <class T>
struct MaskedTable {
  MaskedLayout layout;
  int64_t num_embeddings, dim;
  int64_t mask_bytes;     // ceil(D / 8)
  int64_t row_bytes;      // stride of `rows`
  int64_t rows_size;      // bytes in `rows`
  int64_t row_values;     // fixed_k: k; fixed_k records: elements from record to record
  int64_t mask_elements;  // records: elements taken by the mask
  int64_t nnz;            // elements in `values` (records: in the record buffer)
  int64_t mean_bytes;     // of a row in `values`: what is prefetched
  int64_t last_roomy;     // up to this row (records: element) a mask is read in whole 64-bit words
  int64_t kept_rows;      // row_remap: rows that are not empty
  const T* values;
  const uint8_t* rows;
  const int64_t* bases;
  const uint32_t* starts;
  const uint8_t* columns;
};

// All functions return false when the table contradicts itself (a start past the values); reads and
// writes stay inside the arrays in any case.
template <class T>
struct MaskedBagKernels {
  // output[b] = sum or mean of the bag's rows
  bool (*sum)(const MaskedTable<T>& table, const Bags& in, int64_t begin, int64_t end, T* output);
  // output[b] = their maximum, argmax[b] int32 = its place in the bag (-1: empty bag)
  bool (*max)(const MaskedTable<T>& table, const Bags& in, int64_t begin, int64_t end, T* output,
              int32_t* argmax);
  // grad_weights[j] = scale(b) <grad_output[b], row j>
  bool (*grad_weights)(const MaskedTable<T>& table, const Bags& in, int64_t begin, int64_t end,
                       const T* grad_output, float* grad_weights);
};
RS_KERNEL_TABLE(MaskedBagKernels, masked_bag_kernels)

// Lookups sorted by row: entry = row << payload_bits | payload, the payload being the lookup's
// place in `indices` when bag_of is given, else its bag.
template <class T>
struct MaskedSegments {
  const uint64_t* sorted;
  int payload_bits;
  const int64_t* segments;  // [S + 1] segment s is sorted[segments[s] : segments[s + 1]], one row
  const int32_t* bag_of;
  const float* weights;    // by lookup, or null
  const float* bag_scale;  // by bag, or null
  const T* grad_output;    // [bags, D]
  const int32_t* argmax;   // [bags, D], or null
  const Bags* in;
  bool by_frequency;  // divide by the number of lookups of the row

  // where the row's gradient goes: exactly one of these
  T* grad_values;             // at the row's start
  T* touched;                 // at touched_offset[s], with the start in touched_position
  int64_t* touched_position;  // one for each value; null: not wanted
  const int64_t* touched_offset;
  T* update_values;  // the optimizer below
  MaskedOptimizer optimizer;
  float* state;         // row Adagrad [V]; Adam: first moment, packed
  float* second_state;  // Adam: second moment, packed
  float lr, beta1, beta2, eps, correction1, correction2;
  float rest1, rest2;  // 1 - beta: from doubles, the float difference loses 5 digits at beta 0.999
};

template <class T>
struct MaskedGradKernels {
  // number of values kept in each segment's row
  bool (*count)(const MaskedTable<T>& table, const MaskedSegments<T>& job, int64_t begin,
                int64_t end, int64_t* counts);
  bool (*apply)(const MaskedTable<T>& table, const MaskedSegments<T>& job, int64_t begin,
                int64_t end);
};
RS_KERNEL_TABLE(MaskedGradKernels, masked_grad_kernels)

template <class T>
struct MaskedPackKernels {
  // dense[i - begin] = row i
  bool (*unpack)(const MaskedTable<T>& table, int64_t begin, int64_t end, T* dense);
  // values of row i = dense[i - begin] where kept
  bool (*gather)(const MaskedTable<T>& table, int64_t begin, int64_t end, const T* dense,
                 T* values);
  // values of `to` = those of `from` where both keep, else 0
  bool (*repack)(const MaskedTable<T>& from, const MaskedTable<T>& to, int64_t begin, int64_t end,
                 T* values);
  // rows scaled so that their norm is at most max_norm
  bool (*renorm)(const MaskedTable<T>& table, const int64_t* rows, int64_t begin, int64_t end,
                 float max_norm, float norm_type, T* values);
};
RS_KERNEL_TABLE(MaskedPackKernels, masked_pack_kernels)

// x [B, D] against the whole table. inputs_t [P / panel, D, panel] float32 is x in panels of batch
// rows, each transposed. P = B padded to a multiple of kMatmulPanel, or for small B to 16 or 32,
// and the panel is the smaller of the two; the padding is 0.
constexpr int64_t kMatmulPanel = 64;  // 4 registers of 16 floats: enough to hide the FMA latency
inline int64_t matmul_padded(int64_t batch) {
  if (batch <= kMatmulPanel / 2)
    return batch <= kMatmulPanel / 4 ? kMatmulPanel / 4 : kMatmulPanel / 2;
  return (batch + kMatmulPanel - 1) / kMatmulPanel * kMatmulPanel;
}
template <class T>
struct MaskedMatmulKernels {
  // inputs_t from x
  void (*transpose)(const T* input, int64_t batch, int64_t dim, int64_t padded, float* inputs_t);
  // grad [B, D] = the sum of `pieces` matrices laid out like inputs_t
  void (*sum_transposed)(const float* sums, int64_t pieces, int64_t batch, int64_t dim,
                         int64_t padded, T* grad);
  // output[b, i] = <x[b], row i> for rows begin..end
  bool (*forward)(const MaskedTable<T>& table, const float* inputs_t, int64_t batch, int64_t padded,
                  int64_t begin, int64_t end, T* output);
  // grad_inputs_t += sum over rows begin..end of row i times grad_output[:, i]; as inputs_t
  bool (*grad_input)(const MaskedTable<T>& table, const T* grad_output, int64_t batch,
                     int64_t padded, int64_t begin, int64_t end, float* grad_inputs_t);
  // value (i, d) = sum_b grad_output[b, i] x[b, d]
  bool (*grad_values)(const MaskedTable<T>& table, const float* inputs_t, const T* grad_output,
                      int64_t batch, int64_t padded, int64_t begin, int64_t end, T* grad_values);
};
RS_KERNEL_TABLE(MaskedMatmulKernels, masked_matmul_kernels)

}  // namespace recsparse
