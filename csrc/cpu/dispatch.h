// From torch tensors to the kernel tables: element types (../dispatch.h), threads, scratch memory.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>

#include "types.h"
// after the types
#include "../dispatch.h"

namespace recsparse {

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
