// Histograms of score keys and selection masks on CUDA.
#include <algorithm>

#include "../selection.h"
#include "selection_kernels.cuh"

namespace recsparse {
namespace {

constexpr int64_t kBlocksEach = 8;  // on a multiprocessor at once

int64_t blocks_for(const Stream& stream, int64_t count) {
  return std::min(kBlocksEach * stream.multiprocessors(), ceil_div(count, kSelectionThreads));
}

Tensor selection_histogram(const Tensor& scores, std::optional<int64_t> ties_of,
                           int64_t first_position, int64_t shift, int64_t width, int64_t first) {
  const Digits digits =
      check_selection_histogram(scores, ties_of, first_position, shift, width, first);
  const Stream stream(scores);
  const Tensor from = torch::stable::contiguous(scores);
  const int64_t count = from.numel();
  Tensor counts = torch::stable::new_zeros(scores, {digits.digits}, ScalarType::Long);
  with_float_type(scores.scalar_type(), "scores", [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch(stream, "selection_histogram", selection_histogram_kernel<T>,
           {blocks_for(stream, count)}, {kSelectionThreads}, digits.digits * sizeof(int),
           data<T>(stream, from), count, digits,
           reinterpret_cast<unsigned long long*>(mutable_data<int64_t>(stream, counts)));
  });
  return counts;
}

Tensor selection_mask(const Tensor& scores, int64_t key, std::optional<int64_t> tie,
                      int64_t first_position) {
  const Threshold threshold = check_selection_mask(scores, key, tie, first_position);
  const Stream stream(scores);
  const Tensor from = torch::stable::contiguous(scores);
  const int64_t count = from.numel();
  Tensor mask = torch::stable::new_empty(scores, {count}, ScalarType::Bool);
  with_float_type(scores.scalar_type(), "scores", [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch(stream, "selection_mask", selection_mask_kernel<T>, {blocks_for(stream, count)},
           {kSelectionThreads}, 0, data<T>(stream, from), count, threshold,
           mutable_data<bool>(stream, mask));
  });
  return mask;
}

}  // namespace

RS_CUDA_OPS(m) {
  m.impl("selection_histogram", TORCH_BOX(&selection_histogram));
  m.impl("selection_mask", TORCH_BOX(&selection_mask));
}

}  // namespace recsparse
