// Histograms of score keys and selection masks on the CPU: threads around selection_kernels.cpp.
#include "../selection.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <mutex>
#include <vector>

#include "dispatch.h"
#include "selection_kernels.h"

namespace recsparse {
namespace {

constexpr int64_t kScoresPerThread = 1 << 16;  // hides a thread hand-off

Tensor selection_histogram(const Tensor& scores, std::optional<int64_t> ties_of,
                           int64_t first_position, int64_t shift, int64_t width, int64_t first) {
  const Digits digits =
      check_selection_histogram(scores, ties_of, first_position, shift, width, first);
  const Tensor from = torch::stable::contiguous(scores);
  Tensor counts = torch::stable::new_empty(scores, {digits.digits}, ScalarType::Long);
  int64_t* total = mutable_data<int64_t>(counts);
  std::fill_n(total, digits.digits, 0);
  std::mutex adding;
  with_float_type(scores.scalar_type(), "scores", [&](auto tag) {
    using T = typename decltype(tag)::type;
    parallel_for(from.numel(), kScoresPerThread, [&](int64_t begin, int64_t end) {
      std::vector<int64_t> part(size_t(digits.digits));
      selection_kernels<T>().histogram(data<T>(from), begin, end, digits, part.data());
      const std::lock_guard lock(adding);  // whole numbers: in any order the same
      for (int64_t d = 0; d < digits.digits; ++d) total[d] += part[size_t(d)];
    });
  });
  return counts;
}

Tensor selection_mask(const Tensor& scores, int64_t key, std::optional<int64_t> tie,
                      int64_t first_position) {
  const Threshold threshold = check_selection_mask(scores, key, tie, first_position);
  const Tensor from = torch::stable::contiguous(scores);
  Tensor mask = torch::stable::new_empty(scores, {from.numel()}, ScalarType::Bool);
  with_float_type(scores.scalar_type(), "scores", [&](auto tag) {
    using T = typename decltype(tag)::type;
    parallel_for(from.numel(), kScoresPerThread, [&](int64_t begin, int64_t end) {
      selection_kernels<T>().mask(data<T>(from), begin, end, threshold, mutable_data<bool>(mask));
    });
  });
  return mask;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(recsparse, CPU, m) {
  m.impl("selection_histogram", TORCH_BOX(&selection_histogram));
  m.impl("selection_mask", TORCH_BOX(&selection_mask));
}

}  // namespace recsparse
