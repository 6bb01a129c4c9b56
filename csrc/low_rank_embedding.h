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

inline void check_low_rank_fields(const Tensor& table, const Tensor& starts,
                                  const Tensor& projections, const std::optional<Tensor>& bias,
                                  const Tensor& indices) {
  check_dim(table, 2, "table", "[sum of V, R]");
  check_dim(projections, 3, "projections", "[F, R, D]");
  const int64_t fields = projections.size(0);
  RS_CHECK_VALUE(projections.size(1) == table.size(1),
                 "projections must be [F, R, D] with R = ", table.size(1),
                 ", the columns of table; got shape ", shape_text(projections));
  check_same_dtype(projections, "projections", table, "table");
  check_dim(starts, 1, "starts", "[F + 1]");
  check_dtype(starts, ScalarType::Long, "starts");
  RS_CHECK_VALUE(starts.size(0) == fields + 1, "starts must be [F + 1] = [", fields + 1,
                 "]; got shape ", shape_text(starts));
  if (bias) {
    RS_CHECK_VALUE(
        bias->dim() == 2 && bias->size(0) == fields && bias->size(1) == projections.size(2),
        "bias must be [F, D] = [", fields, ", ", projections.size(2), "]; got shape ",
        shape_text(*bias));
    check_same_dtype(*bias, "bias", table, "table");
  }
  check_dim(indices, 2, "indices", "[B, F]");
  RS_CHECK_VALUE(indices.size(1) == fields, "indices must be [B, F] with F = ", fields,
                 "; got shape ", shape_text(indices));
  RS_CHECK_TYPE(
      indices.scalar_type() == ScalarType::Long || indices.scalar_type() == ScalarType::Int,
      "indices must be int32 or int64; got ", dtype_text(indices.scalar_type()));
}

}  // namespace recsparse
