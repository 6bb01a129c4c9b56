// Fixed fan-in layers: sizes and checks shared by all devices.
//   input [B, I]   weight [O, F]   indices [ceil(O / G), F] int16 or int32   bias [O]
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "check.h"

namespace recsparse {

struct FanInSizes {
  int64_t batch, in_features, out_features, fan_in, rows, group_size;  // rows of indices
};

inline FanInSizes check_fan_in_layer(int64_t batch, int64_t in_features, int64_t out_features,
                                     const Tensor& indices, int64_t group_size) {
  RS_CHECK_VALUE(group_size >= 1, "group_size must be at least 1; got ", group_size);
  RS_CHECK_TYPE(
      indices.scalar_type() == ScalarType::Short || indices.scalar_type() == ScalarType::Int,
      "indices must be int16 or int32; got ", dtype_text(indices.scalar_type()));
  check_dim(indices, 2, "indices", "[ceil(O / group_size), F]");
  const int64_t rows = out_features / group_size + (out_features % group_size != 0);
  RS_CHECK_VALUE(indices.size(0) == rows, "indices must have ceil(O / group_size) = ", rows,
                 " rows; got shape ", shape_text(indices));
  return {batch, in_features, out_features, indices.size(1), rows, group_size};
}

inline void check_fan_in_weight(const FanInSizes& size, const Tensor& weight) {
  check_dim(weight, 2, "weight", "[O, F]");
  RS_CHECK_VALUE(weight.size(0) == size.out_features && weight.size(1) == size.fan_in,
                 "weight must have shape [", size.out_features, ", ", size.fan_in,
                 "], as many columns as indices; got ", shape_text(weight));
}

inline void check_fan_in_bias(const FanInSizes& size, const std::optional<Tensor>& bias,
                              const Tensor& weight) {
  if (!bias) return;
  check_same_dtype(*bias, "bias", weight, "weight");
  RS_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == size.out_features, "bias must have shape [",
                 size.out_features, "]; got ", shape_text(*bias));
}

inline FanInSizes check_fan_in(const Tensor& input, const Tensor& weight, const Tensor& indices,
                               const std::optional<Tensor>& bias, int64_t group_size) {
  check_dim(input, 2, "input", "[B, I]");
  check_dim(weight, 2, "weight", "[O, F]");
  check_same_dtype(input, "input", weight, "weight");
  const FanInSizes size =
      check_fan_in_layer(input.size(0), input.size(1), weight.size(0), indices, group_size);
  check_fan_in_weight(size, weight);
  check_fan_in_bias(size, bias, weight);
  return size;
}

// What an op that updates in place asks of the tensors: no copy could be written back.
inline void check_in_place(const Tensor& t, const char* name) {
  RS_CHECK_VALUE(t.is_contiguous(), name, " is updated in place and must be contiguous");
}

// What a topology update drops: below a threshold or a fraction, over the layer or row by row.
enum Criterion : int64_t { kThreshold = 0, kFraction = 1 };
enum Scope : int64_t { kLayer = 0, kRow = 1 };

inline FanInSizes check_fan_in_rewire(const Tensor& weight, const Tensor& indices,
                                      const std::vector<Tensor>& state, int64_t in_features,
                                      int64_t group_size, int64_t criterion, int64_t scope,
                                      double amount, bool allow_duplicates) {
  check_dim(weight, 2, "weight", "[O, F]");
  const FanInSizes size = check_fan_in_layer(0, in_features, weight.size(0), indices, group_size);
  check_fan_in_weight(size, weight);
  check_in_place(weight, "weight");
  check_in_place(indices, "indices");
  RS_CHECK_VALUE(criterion == kThreshold || criterion == kFraction,
                 "criterion must be 0 (threshold) or 1 (fraction); got ", criterion);
  RS_CHECK_VALUE(scope == kLayer || scope == kRow, "scope must be 0 (layer) or 1 (row); got ",
                 scope);
  RS_CHECK_VALUE(criterion == kThreshold || (amount >= 0.0 && amount <= 1.0),
                 "amount must be in [0, 1] for a fraction");
  RS_CHECK_VALUE(allow_duplicates || size.fan_in <= in_features, "a row of ", size.fan_in,
                 " distinct indices needs as many inputs; got ", in_features);
  const int64_t limit = indices.scalar_type() == ScalarType::Short ? INT16_MAX : INT32_MAX;
  RS_CHECK_VALUE(in_features <= limit + 1, "indices of this dtype end at ", limit,
                 "; in_features is ", in_features);
  for (const Tensor& moments : state) {
    RS_CHECK_VALUE(moments.sizes().equals(weight.sizes()), "state must have the shape of weight, ",
                   shape_text(weight), "; got ", shape_text(moments));
    check_in_place(moments, "state");
  }
  return size;
}

// Moments of the fused optimizer: those of the weight, then those of the bias.
inline void check_fan_in_state(const std::vector<Tensor>& state, int64_t moments,
                               const Tensor& weight, const std::optional<Tensor>& bias) {
  const int64_t wanted = moments * (bias ? 2 : 1);
  RS_CHECK_VALUE(int64_t(state.size()) == wanted, "state must hold ", wanted,
                 " tensors, the moments of weight and then of bias; got ", state.size());
  for (int64_t i = 0; i < wanted; ++i) {
    const Tensor& like = i < moments ? weight : *bias;
    check_dtype(state[i], ScalarType::Float, "state");
    RS_CHECK_VALUE(state[i].sizes().equals(like.sizes()), "state[", i, "] must have shape ",
                   shape_text(like), "; got ", shape_text(state[i]));
    check_in_place(state[i], "state");
  }
}

}  // namespace recsparse
