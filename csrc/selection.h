// Checks of the selection ops.
#pragma once

#include <optional>

#include "check.h"
#include "selection_keys.h"

namespace recsparse {

inline Digits check_selection_histogram(const Tensor& scores, const std::optional<int64_t>& ties_of,
                                        int64_t first_position, int64_t shift, int64_t width,
                                        int64_t first) {
  check_dim(scores, 1, "scores", "[n], one-dimensional");
  RS_CHECK_VALUE(shift >= 0 && shift < 64, "shift must be in [0, 64); got ", shift);
  RS_CHECK_VALUE(width >= 1 && width <= kMostDigitBits, "width must be in [1, ", kMostDigitBits,
                 "]; got ", width);
  return {.of_ties = ties_of.has_value(),
          .ties_of = ties_of.value_or(0),
          .first_position = uint64_t(first_position),
          .shift = int(shift),
          .first = first,
          .digits = int64_t(1) << width};
}

inline Threshold check_selection_mask(const Tensor& scores, int64_t key,
                                      const std::optional<int64_t>& tie, int64_t first_position) {
  check_dim(scores, 1, "scores", "[n], one-dimensional");
  return {.key = key,
          .with_ties = tie.has_value(),
          .tie = tie.value_or(0),
          .first_position = uint64_t(first_position)};
}

}  // namespace recsparse
