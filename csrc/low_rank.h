// Sizes and checks of the low-rank ops, shared by the backends.
#pragma once

#include <optional>

#include "check.h"

namespace recsparse {

struct LowRankSizes {
  int64_t batch, in_features, rank, out_features;
};

// Bits of the `needs` argument of the gradient ops: which gradients to compute.
enum LowRankNeeds : int64_t {
  kNeedsInput = 1,
  kNeedsDown = 2,
  kNeedsUp = 4,
  kNeedsMidBias = 8,
  kNeedsBias = 16,
  kNeedsX0 = 32,
};

inline void check_optional_vector(const std::optional<Tensor>& t, int64_t size, const char* name,
                                  const char* wanted, const Tensor& like, const char* like_name) {
  if (!t) return;
  RS_CHECK_VALUE(t->dim() == 1 && t->size(0) == size, name, " must be ", wanted, " = [", size,
                 "]; got shape ", shape_text(*t));
  check_same_dtype(*t, name, like, like_name);
}

inline LowRankSizes check_low_rank_linear(const Tensor& input, const Tensor& down, const Tensor& up,
                                          const std::optional<Tensor>& mid_bias,
                                          const std::optional<Tensor>& bias) {
  check_dim(input, 2, "input", "[B, I]");
  check_dim(down, 2, "down", "[R, I]");
  check_dim(up, 2, "up", "[O, R]");
  const LowRankSizes size{input.size(0), input.size(1), down.size(0), up.size(0)};
  RS_CHECK_VALUE(down.size(1) == size.in_features,
                 "down must be [R, I] with I = ", size.in_features,
                 ", the columns of input; got shape ", shape_text(down));
  RS_CHECK_VALUE(up.size(1) == size.rank, "up must be [O, R] with R = ", size.rank,
                 ", the rows of down; got shape ", shape_text(up));
  check_same_dtype(down, "down", input, "input");
  check_same_dtype(up, "up", input, "input");
  check_optional_vector(mid_bias, size.rank, "mid_bias", "[R]", input, "input");
  check_optional_vector(bias, size.out_features, "bias", "[O]", input, "input");
  return size;
}

inline LowRankSizes check_low_rank_cross(const Tensor& x0, const Tensor& x, const Tensor& down,
                                         const Tensor& up, const std::optional<Tensor>& bias) {
  const LowRankSizes size = check_low_rank_linear(x, down, up, std::nullopt, bias);
  RS_CHECK_VALUE(size.out_features == size.in_features,
                 "up must be [I, R] with I = ", size.in_features, ", the columns of x; got shape ",
                 shape_text(up));
  RS_CHECK_VALUE(x0.dim() == 2 && x0.size(0) == size.batch && x0.size(1) == size.in_features,
                 "x0 must have the shape of x, ", shape_text(x), "; got ", shape_text(x0));
  check_same_dtype(x0, "x0", x, "x");
  return size;
}

inline void check_same_shape(const Tensor& t, const char* name, int64_t rows, int64_t columns,
                             const Tensor& like) {
  RS_CHECK_VALUE(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns, name, " must be [",
                 rows, ", ", columns, "]; got shape ", shape_text(t));
  check_same_dtype(t, name, like, "input");
}

inline void check_activation(int64_t activation, const char* name) {
  RS_CHECK_VALUE(activation >= 0 && activation <= 5, name, " must be in [0, 5]; got ", activation);
}

}  // namespace recsparse
