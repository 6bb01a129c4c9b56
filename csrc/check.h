// RS_CHECK_*: the second fence behind the Python checks. The message says which argument, what was
// wanted and what came; its first word is the Python exception type that ops/_backend.py raises
// from it (the stable ABI itself only carries a RuntimeError).
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#define RS_CHECK_VALUE(condition, ...) RS_CHECK(condition, "ValueError: ", __VA_ARGS__)
#define RS_CHECK_TYPE(condition, ...) RS_CHECK(condition, "TypeError: ", __VA_ARGS__)
#define RS_CHECK_INDEX(condition, ...) RS_CHECK(condition, "IndexError: ", __VA_ARGS__)
#define RS_CHECK(condition, ...) \
  if (!(condition)) [[unlikely]] \
  throw std::runtime_error(recsparse::concat(__VA_ARGS__))

namespace recsparse {

// Strings and integers, one after the other.
template <class... Parts>
std::string concat(const Parts&... parts) {
  std::string text;
  const auto append = [&text](const auto& part) {
    if constexpr (std::is_integral_v<std::remove_cvref_t<decltype(part)>>) {
      text += std::to_string(part);
    } else {
      text += part;
    }
  };
  (append(parts), ...);
  return text;
}

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_text(const Tensor& t) {
  std::string text = "[";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + "]";
}

inline const char* dtype_text(ScalarType dtype) { return torch::headeronly::toString(dtype); }

inline void check_dim(const Tensor& t, int64_t dim, const char* name, const char* wanted) {
  RS_CHECK_VALUE(t.dim() == dim, name, " must be ", wanted, "; got shape ", shape_text(t));
}

inline void check_same_dtype(const Tensor& t, const char* name, const Tensor& like,
                             const char* like_name) {
  RS_CHECK_TYPE(t.scalar_type() == like.scalar_type(), name, " must have the dtype of ", like_name,
                ", ", dtype_text(like.scalar_type()), "; got ", dtype_text(t.scalar_type()));
}

inline void check_dtype(const Tensor& t, ScalarType wanted, const char* name) {
  RS_CHECK_TYPE(t.scalar_type() == wanted, name, " must be ", dtype_text(wanted), "; got ",
                dtype_text(t.scalar_type()));
}

}  // namespace recsparse
