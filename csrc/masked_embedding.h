// Sizes and checks of masked embedding tables, shared by the backends.
#pragma once

#include <cstdint>
#include <optional>

#include "check.h"
#include "masked_embedding_layout.h"

namespace recsparse {

using MaybeTensor = std::optional<Tensor>;

// The tensors of a packed table as every op takes them.
struct MaskedTableArgs {
  const Tensor& values;
  const Tensor& rows;
  const MaybeTensor& bases;
  const MaybeTensor& starts;
  const MaybeTensor& columns;
  int64_t num_embeddings;
  int64_t embedding_dim;
};

inline void check_vector(const Tensor& t, ScalarType dtype, int64_t size, const char* name) {
  check_dtype(t, dtype, name);
  check_dim(t, 1, name, "a vector");
  RS_CHECK_VALUE(t.size(0) == size, name, " must have ", size, " elements; got ", t.size(0));
  RS_CHECK_VALUE(t.is_contiguous(), name, " must be contiguous");
}

inline int64_t base_count(int64_t rows) { return ((rows > 0 ? rows : 1) + 65535) / 65536; }

// What the layouts have in common; the layout follows from which tensors are there.
inline void check_masked_table(const MaskedTableArgs& table) {
  const int64_t V = table.num_embeddings, D = table.embedding_dim;
  RS_CHECK_VALUE(V >= 0, "num_embeddings must not be negative; got ", V);
  RS_CHECK_VALUE(D >= 1 && D <= 32768, "embedding_dim must be in [1, 32768]; got ", D);
  RS_CHECK_VALUE(table.values.is_contiguous() && table.rows.is_contiguous(),
                 "values and rows must be contiguous");
  check_dtype(table.rows, ScalarType::Byte, "rows");
  check_dim(table.rows, 2, "rows", "a matrix");
  const bool remap = table.columns.has_value();
  const bool fixed = table.values.dim() == 2;
  int64_t rows = V, bytes = (D + 7) / 8;
  if (remap) {
    RS_CHECK_VALUE(D <= 256, "embedding_dim must be at most 256 in layout row_remap; got ", D);
    RS_CHECK_VALUE(table.starts.has_value() && table.bases.has_value(),
                   "layout row_remap needs starts and bases");
    RS_CHECK_VALUE(table.starts->dim() == 1 && table.starts->size(0) >= 1,
                   "starts must be a vector with an entry past the last row; got shape ",
                   shape_text(*table.starts));
    check_vector(*table.starts, ScalarType::Int, table.starts->size(0), "starts");
    check_vector(*table.bases, ScalarType::Long, base_count(table.starts->size(0)), "bases");
    check_dim(table.values, 1, "values", "a vector in layout row_remap");
    check_vector(*table.columns, ScalarType::Byte, table.values.size(0), "columns");
    rows = (V + 63) / 64;
    bytes = 12;
  } else if (fixed) {
    RS_CHECK_VALUE(table.values.size(0) == V && table.values.size(1) <= D,
                   "values must have shape [num_embeddings, kept] in layout fixed_k; got ",
                   shape_text(table.values));
  } else {
    check_dim(table.values, 1, "values", "a vector in layout bitmask");
    RS_CHECK_VALUE(table.bases.has_value(), "layout bitmask needs bases");
    check_vector(*table.bases, ScalarType::Long, base_count(V), "bases");
    bytes += 4;
  }
  RS_CHECK_VALUE(table.rows.size(0) == rows && table.rows.size(1) == bytes,
                 "rows must have shape [", rows, ", ", bytes, "]; got ", shape_text(table.rows));
}

inline void check_index_dtype(const Tensor& t, const char* name) {
  RS_CHECK_TYPE(t.scalar_type() == ScalarType::Int || t.scalar_type() == ScalarType::Long, name,
                " must be int32 or int64; got ", dtype_text(t.scalar_type()));
}

// The bags that an op describes, all checked but what indices and offsets hold. The tensors must
// outlive the result.
inline Bags describe_bags(const Tensor& indices, const MaybeTensor& offsets,
                          const MaybeTensor& weights, int64_t mode, int64_t padding_idx,
                          bool last_offset) {
  RS_CHECK_VALUE(mode >= 0 && mode <= 3,
                 "mode must be 0 (sum), 1 (mean), 2 (max) or 3 (each); got ", mode);
  check_index_dtype(indices, "indices");
  RS_CHECK_VALUE(indices.is_contiguous(), "indices must be contiguous");
  Bags bags = {};
  bags.indices = indices.const_data_ptr();
  bags.wide_indices = indices.scalar_type() == ScalarType::Long;
  bags.count = indices.numel();
  bags.padding_idx = padding_idx;
  bags.mean = BagMode(mode) == BagMode::kMean;
  if (BagMode(mode) == BagMode::kEach) {
    RS_CHECK_VALUE(!offsets, "offsets must be None for unpooled lookups");
    bags.bags = bags.count;
    bags.length = 1;
  } else if (offsets) {
    check_index_dtype(*offsets, "offsets");
    check_dim(indices, 1, "indices", "a vector when offsets are given");
    check_dim(*offsets, 1, "offsets", "a vector");
    RS_CHECK_VALUE(offsets->is_contiguous(), "offsets must be contiguous");
    const int64_t entries = offsets->size(0);
    RS_CHECK_VALUE(!last_offset || entries > 0,
                   "offsets must have at least one entry with include_last_offset");
    bags.offsets = offsets->const_data_ptr();
    bags.wide_offsets = offsets->scalar_type() == ScalarType::Long;
    bags.last_offset = last_offset;
    bags.bags = entries - last_offset;
  } else {
    check_dim(indices, 2, "indices", "[bags, length] without offsets");
    bags.bags = indices.size(0);
    bags.length = indices.size(1);
  }
  if (weights) {
    RS_CHECK_VALUE(BagMode(mode) == BagMode::kSum || BagMode(mode) == BagMode::kMean,
                   "per_sample_weights must be None unless mode is sum or mean");
    check_dtype(*weights, ScalarType::Float, "per_sample_weights");
    RS_CHECK_VALUE(weights->numel() == bags.count && weights->is_contiguous(),
                   "per_sample_weights must be contiguous with one weight for each of ", bags.count,
                   " indices; got shape ", shape_text(*weights));
    bags.weights = static_cast<const float*>(weights->const_data_ptr());
  }
  return bags;
}

}  // namespace recsparse
