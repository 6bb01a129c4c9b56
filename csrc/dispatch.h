// From a dtype to a C++ type. Include after the backend's types.h, which says what bf16 and f16
// are.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>

#include "check.h"

namespace recsparse {

template <class T>
struct TypeTag {
  using type = T;
};

// Calls f(TypeTag<T>) with T = float, bf16 or f16 for the dtype.
template <class F>
auto with_float_type(ScalarType dtype, const char* name, F f) {
  RS_CHECK_TYPE(
      dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
      name, " must be float32, bfloat16 or float16; got ", dtype_text(dtype));
  if (dtype == ScalarType::BFloat16) return f(TypeTag<bf16>());
  if (dtype == ScalarType::Half) return f(TypeTag<f16>());
  return f(TypeTag<float>());
}

// Calls f(TypeTag<T>) with T = int32_t or int64_t for the dtype.
template <class F>
auto with_index_type(ScalarType dtype, const char* name, F f) {
  RS_CHECK_TYPE(dtype == ScalarType::Int || dtype == ScalarType::Long, name,
                " must be int32 or int64; got ", dtype_text(dtype));
  if (dtype == ScalarType::Int) return f(TypeTag<int32_t>());
  return f(TypeTag<int64_t>());
}

}  // namespace recsparse
