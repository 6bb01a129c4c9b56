// Tensors of the low-rank ops: allocation, copies of strided ones.
#pragma once

#include "launch.h"

namespace recsparse::low_rank {

inline Tensor empty_2d(const Tensor& like, int64_t rows, int64_t columns) {
  return torch::stable::new_empty(like, {rows, columns});
}

inline MaybeTensor contiguous(const MaybeTensor& t) {
  if (!t) return std::nullopt;
  return torch::stable::contiguous(*t);
}

}  // namespace recsparse::low_rank
