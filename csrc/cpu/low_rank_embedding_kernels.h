// Inner loops of the low-rank embeddings (low_rank_embedding.cpp, low_rank_rows.cpp).
#pragma once

#include <cstdint>

#include "isa.h"

namespace recsparse {

// Bag b looks up indices[starts[b]] to indices[starts[b + 1] - 1]; with starts null, "bag" b is the
// single lookup indices[b] of an embedding without pooling. Null where absent.
template <class T>
struct LowRankBags {
  int64_t bags, lookups, num_embeddings, rank, embedding_dim;
  const void* indices;  // int64 if wide, else int32
  bool wide;
  const int64_t* starts;
  const T* sample_weights;  // one a lookup
  bool mean_pooling;
  int64_t padding_idx;  // -1: none
  const T* table;       // [V, R]
  const T* mean;        // [D], added to each row looked up
  const float*
      up_panels;  // forward: of up^T, depth R, columns D. Gradients: of up, depth D, columns R
  T* pooled;      // [bags, R]
  T* output;      // [bags, D]
  const T* grad_output;    // [bags, D]
  const T* pooled_in;      // [bags, R]
  T* grad_pooled;          // [bags, R]
  T* grad_sample_weights;  // one a lookup
  int64_t* max_positions;  // max pooling: [bags, D], which lookup won; -1: bag is empty
};

// One lookup that contributes to a row's gradient: sorted by row, then by position.
struct RowEntry {
  uint32_t row, position;
};

// grad[row] = sum over its lookups of weight * grad_pooled[bag]
template <class T>
struct LowRankRows {
  int64_t rank;
  const T* grad_pooled;  // [bags, R]
  const uint32_t* bag;   // bag of a lookup; null: the lookup's own number
  const float* weight;   // of a lookup; null: 1
};

template <class T>
struct LowRankEmbeddingKernels {
  bool (*in_range)(const void* indices, bool wide, int64_t count, int64_t limit);
  int64_t (*forward_scratch)(const LowRankBags<T>&);
  void (*forward_bags)(const LowRankBags<T>&, int64_t begin, int64_t end, float* scratch);
  int64_t (*forward_max_scratch)(const LowRankBags<T>&);
  void (*forward_max)(const LowRankBags<T>&, int64_t begin, int64_t end, float* scratch);
  // grad_pooled, and this range's part of grad_up ([R, padded D], then one row for grad_mean)
  int64_t (*backward_scratch)(const LowRankBags<T>&);
  void (*backward_bags)(const LowRankBags<T>&, int64_t begin, int64_t end, float* part,
                        float* scratch);
  void (*grad_sample_weights)(const LowRankBags<T>&, int64_t begin, int64_t end);
  // weight of each lookup of bags [begin, end): sample weight, and 1 / size in mean pooling
  void (*lookup_weights)(const LowRankBags<T>&, int64_t begin, int64_t end, float* weights);
  // grad_up [D, R] and grad_mean [D] from the parts, in order; columns [first, last) of D
  void (*sum_parts)(const float* parts, int64_t count, int64_t rank, int64_t embedding_dim,
                    int64_t first, int64_t last, T* grad_up, T* grad_mean);
  // entries of whole rows; dense: out [V, R]; else out [n, R] and rows[n], n returned
  void (*rows_dense)(const LowRankRows<T>&, const RowEntry* entries, int64_t count, T* out);
  int64_t (*rows_sparse)(const LowRankRows<T>&, const RowEntry* entries, int64_t count, T* out,
                         int64_t* rows);
  // max pooling: dimensions [first, last) of grad_up [D, R] and grad_mean [D]; rows [first, last)
  // of the table's gradient
  void (*max_grad_up)(const LowRankBags<T>&, int64_t first, int64_t last, T* grad_up, T* grad_mean,
                      float* scratch);
  void (*max_grad_rows)(const LowRankBags<T>&, const T* up, int64_t first, int64_t last,
                        float* sums, T* grad_table);
};
RS_KERNEL_TABLE(LowRankEmbeddingKernels, low_rank_embedding_kernels)

}  // namespace recsparse
