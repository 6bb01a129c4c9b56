// From tensors to what the kernels of masked embedding tables take.
#pragma once

#include <cstdint>
#include <vector>

#include "../masked_embedding.h"
#include "indices.h"
#include "launch.h"

namespace recsparse {

// A table, by value in the kernels' arguments.
template <class T>
struct DeviceTable {
  MaskedLayout layout;
  int64_t num_embeddings, dim;
  int64_t mask_bytes;     // ceil(D / 8)
  int64_t row_bytes;      // stride of `rows`
  int64_t rows_size;      // bytes in `rows`
  int64_t row_values;     // fixed_k: k; fixed_k records: elements from record to record
  int64_t mask_elements;  // records: elements taken by the mask
  int64_t nnz;            // elements in `values` (records: in the record buffer)
  int64_t kept_rows;      // row_remap: rows that are not empty
  const T* values;
  const uint8_t* rows;
  const int64_t* bases;
  const uint32_t* starts;
  const uint8_t* columns;
};

// Checked but for what the tensors hold.
template <class T>
DeviceTable<T> device_table(const Stream& stream, const MaskedTableArgs& args) {
  DeviceTable<T> table = {};
  table.num_embeddings = args.num_embeddings;
  table.dim = args.embedding_dim;
  table.mask_bytes = (args.embedding_dim + 7) / 8;
  table.row_bytes = args.rows.size(1);
  table.rows_size = args.rows.numel();
  table.nnz = args.values.numel();
  table.values = data<T>(stream, args.values);
  table.rows = data<uint8_t>(stream, args.rows);
  table.bases = data<int64_t>(stream, args.bases);
  if (args.columns) {
    table.layout = MaskedLayout::kRowRemap;
    table.columns = data<uint8_t>(stream, args.columns);
    table.starts = data<uint32_t>(stream, args.starts);
    table.kept_rows = args.starts->numel() - 1;
  } else if (args.values.dim() == 2) {
    table.layout = MaskedLayout::kFixedK;
    table.row_values = args.values.size(1);
  } else {
    table.layout = MaskedLayout::kBitmask;
  }
  return table;
}

// The bags of an op on the device; keeps the indices that are used alive.
struct DeviceBags {
  Tensor indices;
  Bags bags;

  DeviceBags(const Stream& stream, const Tensor& given, int64_t num_embeddings,
             const MaybeTensor& offsets, const MaybeTensor& weights, int64_t mode,
             int64_t padding_idx, bool last_offset)
      : indices(given),
        bags(describe_bags(given, offsets, weights, mode, padding_idx, last_offset)) {
    if (offsets) {
      check_offsets(stream, *offsets, bags.count);
      bags.offsets = data<uint8_t>(stream, *offsets);
    }
    indices = checked_indices(stream, "indices", given, num_embeddings);
    bags.indices = data<uint8_t>(stream, indices);
    bags.weights = data<float>(stream, weights);
  }
};

inline std::vector<int64_t> shape_of(const Tensor& t) {
  std::vector<int64_t> shape;
  for (int64_t i = 0; i < t.dim(); ++i) shape.push_back(t.size(i));
  return shape;
}

// A contiguous matrix of the table's dtype.
inline void check_matrix(const Tensor& t, const Tensor& values, int64_t rows, int64_t columns,
                         const char* name) {
  check_same_dtype(t, name, values, "values");
  RS_CHECK_VALUE(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns && t.is_contiguous(),
                 name, " must be contiguous of shape [", rows, ", ", columns, "]; got ",
                 shape_text(t));
}

// Lanes that share a row: four columns each, so that a dense row moves 16 (or 8) bytes a lane.
// Wider rows take several turns. Calls f(TypeTag<std::integral_constant<int, lanes>>).
template <class F>
void with_team(int64_t dim, const F& f) {
  if (dim <= 16) {
    f(std::integral_constant<int, 4>());
  } else if (dim <= 32) {
    f(std::integral_constant<int, 8>());
  } else if (dim <= 64) {
    f(std::integral_constant<int, 16>());
  } else {
    f(std::integral_constant<int, 32>());
  }
}

constexpr int kTeamThreads = 128;  // of a block of teams

inline Extent team_grid(int64_t teams, int lanes) {
  return {ceil_div(teams * lanes, kTeamThreads)};
}

// Whether rows of `dim` elements from p on can be accessed four elements at a time.
template <class T>
bool by_four(const T* p, int64_t dim) {
  return dim % 4 == 0 && reinterpret_cast<uintptr_t>(p) % (4 * sizeof(T)) == 0;
}

}  // namespace recsparse
