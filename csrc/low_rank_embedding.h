// Sizes and checks of the low-rank embedding ops, shared by the backends.
#pragma once

#include <optional>

#include "low_rank.h"

namespace recsparse {

// pooling_mode of the ops
enum PoolingMode : int64_t { kPoolSum = 0, kPoolMean = 1, kPoolMax = 2 };

struct LowRankBagSizes {
  int64_t num_embeddings, rank, embedding_dim, lookups, bags;
};

inline void check_index_vector(const Tensor& t, const char* name, const char* wanted) {
  check_dim(t, 1, name, wanted);
  RS_CHECK_TYPE(t.scalar_type() == ScalarType::Long || t.scalar_type() == ScalarType::Int, name,
                " must be int32 or int64; got ", dtype_text(t.scalar_type()));
}

inline LowRankBagSizes check_low_rank_bag(const Tensor& table, const Tensor& up,
                                          const std::optional<Tensor>& mean, const Tensor& indices,
                                          const std::optional<Tensor>& offsets,
                                          const std::optional<Tensor>& per_sample_weights,
                                          int64_t padding_idx, bool include_last_offset) {
  check_dim(table, 2, "table", "[V, R]");
  check_dim(up, 2, "up", "[D, R]");
  RS_CHECK_VALUE(up.size(1) == table.size(1), "up must be [D, R] with R = ", table.size(1),
                 ", the columns of table; got shape ", shape_text(up));
  check_same_dtype(up, "up", table, "table");
  check_optional_vector(mean, up.size(0), "mean", "[D]", table, "table");
  check_index_vector(indices, "indices", "[N]");
  check_optional_vector(per_sample_weights, indices.size(0), "per_sample_weights", "[N]", table,
                        "table");
  RS_CHECK_VALUE(padding_idx >= -1 && padding_idx < table.size(0), "padding_idx must be in [0, ",
                 table.size(0), "), or -1 for none; got ", padding_idx);
  int64_t bags = indices.size(0);
  if (offsets) {
    check_index_vector(*offsets, "offsets", "[B]");
    RS_CHECK_VALUE(!include_last_offset || offsets->size(0) > 0,
                   "offsets must have at least one element with include_last_offset; got none");
    bags = offsets->size(0) - (include_last_offset ? 1 : 0);
  }
  return {table.size(0), table.size(1), up.size(0), indices.size(0), bags};
}

}  // namespace recsparse
