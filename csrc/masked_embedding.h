// Sizes and checks of masked embedding tables, shared by the backends (layouts: see
// csrc/cpu/masked_embedding_kernels.h).
#pragma once

#include <cstdint>
#include <optional>

#include "check.h"

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

}  // namespace recsparse
