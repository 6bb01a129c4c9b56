// What the torch-facing low-rank files share: allocation, packing, size of tasks.
#pragma once

#include <optional>

#include "dispatch.h"
#include "low_rank_kernels.h"

namespace recsparse {

inline constexpr int64_t kGrainOperations = 1 << 17;  // multiply-adds a task should have at least

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

inline int64_t grain(int64_t operations_each) {
  return kGrainOperations / (operations_each + 1) + 1;
}

inline Tensor empty_2d(const Tensor& like, int64_t rows, int64_t columns) {
  return torch::stable::new_empty(like, {rows, columns});
}

template <class T>
const T* optional_data(const std::optional<Tensor>& t) {
  return t ? data<T>(*t) : nullptr;
}

inline std::optional<Tensor> contiguous(const std::optional<Tensor>& t) {
  if (!t) return std::nullopt;
  return torch::stable::contiguous(*t);
}

// A weight as panels of float32 (gemm.h).
template <class T>
class Panels {
 public:
  Panels(const Tensor& weight, bool transposed, int64_t depth, int64_t columns, bool wanted = true)
      : source_(data<T>(weight)),
        row_(weight.size(1)),
        depth_(depth),
        columns_(columns),
        transposed_(transposed),
        count_(wanted ? round_up(columns, panel()) / panel() : 0),
        panels_(count_ * panel() * depth) {}

  int64_t count() const { return count_; }
  const float* get() { return count_ ? panels_.get() : nullptr; }
  // Packs those of [first, last) that are its own, in a numbering that starts at `start`.
  void pack(int64_t first, int64_t last, int64_t start) {
    first = first > start ? first - start : 0;
    last = last - start < count_ ? last - start : count_;
    if (first < last)
      low_rank_kernels<T>().pack_panels(source_, row_, transposed_, depth_, columns_, first, last,
                                        panels_.get());
  }

 private:
  static int64_t panel() { return low_rank_kernels<T>().panel; }
  const T* source_;
  int64_t row_, depth_, columns_;
  bool transposed_;
  int64_t count_;
  Scratch<float> panels_;
};

// Packs them all in one parallel region.
template <class... P>
void pack_all(int64_t operations_each, P&... panels) {
  const int64_t total = (panels.count() + ...);
  parallel_for(total, grain(operations_each), [&](int64_t begin, int64_t end) {
    int64_t start = 0;
    ((panels.pack(begin, end, start), start += panels.count()), ...);
  });
}

}  // namespace recsparse
