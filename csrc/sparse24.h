// Sizes and checks of the 2:4 ops, shared by the CPU and CUDA implementations.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>

#include "check.h"

namespace recsparse {

constexpr int64_t kSparse24Padding = 16;  // I is stored padded to a multiple of this

inline int64_t sparse24_padded(int64_t in_features) {
  return (in_features + kSparse24Padding - 1) / kSparse24Padding * kSparse24Padding;
}

// Kept values of a row and bytes of metadata of a row fit each other and in_features.
inline void check_sparse24_metadata(const Tensor& metadata, int64_t in_features) {
  check_dim(metadata, 2, "metadata", "[O, I / 8], two-dimensional");
  check_dtype(metadata, ScalarType::Byte, "metadata");
  RS_CHECK_VALUE(metadata.size(1) == sparse24_padded(in_features) / 8, "metadata must have ",
                 sparse24_padded(in_features) / 8,
                 " columns, an eighth of in_features = ", in_features,
                 " padded to a multiple of 16; got shape ", shape_text(metadata));
}

inline void check_sparse24_packed(const Tensor& values, const Tensor& metadata,
                                  int64_t in_features) {
  check_sparse24_metadata(metadata, in_features);
  check_dim(values, 2, "values", "[O, I / 2], two-dimensional");
  RS_CHECK_VALUE(values.size(0) == metadata.size(0) && values.size(1) == 4 * metadata.size(1),
                 "values must have shape [", metadata.size(0), ", ", 4 * metadata.size(1),
                 "], four for each byte of metadata ", shape_text(metadata), "; got ",
                 shape_text(values));
}

inline void check_sparse24_pack(const Tensor& values, const Tensor& metadata, int64_t in_features) {
  RS_CHECK_VALUE(in_features >= 0, "in_features must not be negative; got ", in_features);
  check_sparse24_packed(values, metadata, in_features);
}

inline void check_sparse24_mask(const Tensor& weight, const Tensor& mask) {
  check_dim(weight, 2, "weight", "[O, I], two-dimensional");
  check_dim(mask, 2, "mask", "[O, I], two-dimensional");
  check_dtype(mask, ScalarType::Bool, "mask");
  RS_CHECK_VALUE(mask.size(0) == weight.size(0) && mask.size(1) == weight.size(1),
                 "mask must have the shape of weight, ", shape_text(weight), "; got ",
                 shape_text(mask));
}

// Every line (a row or a column of the mask) keeps at most two of four; reads the mask, which must
// be in the CPU's memory.
inline void check_sparse24_kept(const bool* mask, int64_t lines, int64_t line_stride,
                                int64_t length, int64_t stride, const char* line = "row",
                                const char* others = "columns") {
  for (int64_t at = 0; at < lines; ++at)
    for (int64_t first = 0; first < length; first += 4) {
      int count = 0;
      for (int64_t i = first; i < std::min(first + 4, length); ++i)
        count += mask[at * line_stride + i * stride];
      RS_CHECK_VALUE(count <= 2, "mask must keep at most 2 in each group of 4 ", others, "; ", line,
                     " ", at, " keeps ", count, " in ", others, " ", first, " to ", first + 3);
    }
}

struct Sparse24Sizes {
  int64_t batch, in_features, padded, out_features;
};

inline Sparse24Sizes check_sparse24_linear(const Tensor& input, const Tensor& values,
                                           const Tensor& metadata,
                                           const std::optional<Tensor>& bias, int64_t activation) {
  check_dim(input, 2, "input", "[B, I], two-dimensional");
  check_sparse24_packed(values, metadata, input.size(1));
  check_same_dtype(values, "values", input, "input");
  if (bias) {
    check_dim(*bias, 1, "bias", "[O], one-dimensional");
    check_same_dtype(*bias, "bias", input, "input");
    RS_CHECK_VALUE(bias->size(0) == values.size(0), "bias must have ", values.size(0),
                   " elements, one for each row of values; got shape ", shape_text(*bias));
  }
  RS_CHECK_VALUE(activation >= 0 && activation <= 5, "activation must be in [0, 5]; got ",
                 activation);
  return {input.size(0), input.size(1), sparse24_padded(input.size(1)), values.size(0)};
}

inline Sparse24Sizes check_sparse24_grad_input(const Tensor& grad_sum, const Tensor& values,
                                               const Tensor& metadata, int64_t in_features) {
  check_dim(grad_sum, 2, "grad_sum", "[B, O], two-dimensional");
  check_sparse24_pack(values, metadata, in_features);
  check_same_dtype(values, "values", grad_sum, "grad_sum");
  RS_CHECK_VALUE(grad_sum.size(1) == values.size(0), "grad_sum must have ", values.size(0),
                 " columns, one for each row of values; got shape ", shape_text(grad_sum));
  return {grad_sum.size(0), in_features, sparse24_padded(in_features), values.size(0)};
}

inline Sparse24Sizes check_sparse24_grad_values(const Tensor& grad_sum, const Tensor& input,
                                                const Tensor& metadata) {
  check_dim(grad_sum, 2, "grad_sum", "[B, O], two-dimensional");
  check_dim(input, 2, "input", "[B, I], two-dimensional");
  check_same_dtype(input, "input", grad_sum, "grad_sum");
  check_sparse24_metadata(metadata, input.size(1));
  RS_CHECK_VALUE(grad_sum.size(0) == input.size(0),
                 "grad_sum and input must have as many rows; got ", shape_text(grad_sum), " and ",
                 shape_text(input));
  RS_CHECK_VALUE(grad_sum.size(1) == metadata.size(0), "grad_sum must have ", metadata.size(0),
                 " columns, one for each row of metadata; got shape ", shape_text(grad_sum));
  return {input.size(0), input.size(1), sparse24_padded(input.size(1)), metadata.size(0)};
}

}  // namespace recsparse
