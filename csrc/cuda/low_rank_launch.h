// Host side of the low-rank kernels: which path a size takes, and the launches.
#pragma once

#include "../low_rank.h"
#include "low_rank_grad_kernels.cuh"
#include "low_rank_kernels.cuh"
#include "low_rank_product.h"
#include "low_rank_tensors.h"

namespace recsparse::low_rank {

constexpr int64_t kMostParts = 8;  // of a product into mid or from it: they take memory

// Whether one kernel does both factors: its blocks own rows, and too few of them leave a GPU idle
// unless the weights are small anyway.
inline bool rows_on_chip(const Stream& stream, const LowRankSizes& size) {
  constexpr int64_t kSmall = 1024;  // I + O up to which one launch beats two whatever the batch
  return size.rank <= kMaxRank && (size.in_features + size.out_features <= kSmall ||
                                   size.batch >= 16 * int64_t(stream.multiprocessors()));
}

template <class T>
void run_forward(const Stream& stream, ForwardArguments<T> p);
template <class T>
void run_backward(const Stream& stream, BackwardArguments<T> p);

}  // namespace recsparse::low_rank
