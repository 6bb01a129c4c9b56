// From torch tensors to the kernel tables: element types, threads, scratch memory.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>

#include "../check.h"
#include "types.h"

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

template <class T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// Uninitialised, 64-byte aligned, freed at the end of the scope.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count) {
    const size_t bytes = (size_t(count) * sizeof(T) + 63) / 64 * 64;
    data_ = static_cast<T*>(std::aligned_alloc(64, bytes ? bytes : 64));
    if (!data_) throw std::bad_alloc();
  }
  ~Scratch() { std::free(data_); }
  Scratch(Scratch&& other) noexcept : data_(std::exchange(other.data_, nullptr)) {}
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() { return data_; }
  T& operator[](int64_t i) { return data_[i]; }

 private:
  T* data_;
};

// Indices a thread scans at least when only their range is checked: a hand-off to another thread
// costs more than this many, and on a busy machine it can cost a scheduler's time slice.
constexpr int64_t kIndicesPerCheck = int64_t(1) << 18;

// body(begin, end) over [0, count) in parallel, at least `grain` a thread.
template <class F>
void parallel_for(int64_t count, int64_t grain, const F& body) {
  if (count > 0) torch::stable::parallel_for(0, count, grain, body);
}

}  // namespace recsparse
