#include <algorithm>
#include <atomic>
#include <cassert>
#include <vector>

#include "indices.h"
#include "primitives.h"

namespace recsparse {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 1024;  // enough to fill any GPU: the rest is a loop

std::atomic<int64_t> mode_in_use{0};

void set_check_indices(int64_t mode) {
  RS_CHECK_VALUE(mode >= 0 && mode <= 2, "mode must be 0, 1 or 2; got ", mode);
  mode_in_use.store(mode);
}

template <class Index>
__global__ void clamp_kernel(const Index* indices, int64_t count, int64_t size, Index* clamped) {
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < count;
       i += int64_t(gridDim.x) * kThreads) {
    const int64_t index = int64_t(indices[i]);
    clamped[i] = Index(index < 0 || size == 0 ? 0 : index >= size ? size - 1 : index);
  }
}

#ifndef RS_CUDA_ON_CPU
template <class Index>
__global__ void assert_indices_kernel(const Index* indices, int64_t count, int64_t size) {
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < count;
       i += int64_t(gridDim.x) * kThreads)
    assert(int64_t(indices[i]) >= 0 && int64_t(indices[i]) < size &&
           "recsparse_kernels: indices must be in range");
}

template <class Index>
__global__ void assert_offsets_kernel(const Index* offsets, int64_t entries, int64_t count) {
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < entries;
       i += int64_t(gridDim.x) * kThreads) {
    assert((i > 0 || offsets[i] == 0) && "recsparse_kernels: offsets must start at 0");
    assert((i == 0 || offsets[i] >= offsets[i - 1]) &&
           "recsparse_kernels: offsets must not descend");
    assert(int64_t(offsets[i]) <= count && "recsparse_kernels: offsets must not pass the indices");
  }
}
#endif

int64_t blocks_for(int64_t count) { return std::min(kMaxBlocks, ceil_div(count, kThreads)); }

}  // namespace

CheckIndices check_indices_mode() { return CheckIndices(mode_in_use.load()); }

Tensor checked_indices(const Stream& stream, const char* name, const Tensor& indices, int64_t size,
                       [[maybe_unused]] const char* what) {
  const int64_t count = indices.numel();
  const CheckIndices mode = check_indices_mode();
  if (count == 0 || mode == CheckIndices::kNone) return indices;
  const auto check = [&](auto tag) -> Tensor {
    using Index = typename decltype(tag)::type;
    const Index* p = data<Index>(stream, indices);
    if (mode == CheckIndices::kClamp) {
      std::vector<int64_t> shape;
      for (int64_t i = 0; i < indices.dim(); ++i) shape.push_back(indices.size(i));
      Tensor clamped = torch::stable::new_empty(indices, shape);
      launch(stream, "clamp_indices", clamp_kernel<Index>, {blocks_for(count)}, {kThreads}, 0, p,
             count, size, mutable_data<Index>(stream, clamped));
      return clamped;
    }
#ifdef RS_CUDA_ON_CPU
    for (int64_t j = 0; j < count; ++j)
      RS_CHECK_INDEX(p[j] >= 0 && int64_t(p[j]) < size, name, " must be in [0, ", size, ")", what,
                     "; got ", int64_t(p[j]), " at position ", j);
#else
    launch(stream, "assert_indices", assert_indices_kernel<Index>, {blocks_for(count)}, {kThreads},
           0, p, count, size);
#endif
    return indices;
  };
  if (indices.scalar_type() == ScalarType::Short) return check(TypeTag<int16_t>());
  return with_index_type(indices.scalar_type(), name, check);
}

void check_offsets(const Stream& stream, const Tensor& offsets, int64_t count) {
  const int64_t entries = offsets.numel();
  if (entries == 0 || check_indices_mode() != CheckIndices::kRaise) return;
  with_index_type(offsets.scalar_type(), "offsets", [&](auto tag) {
    using Index = typename decltype(tag)::type;
    const Index* p = data<Index>(stream, offsets);
#ifdef RS_CUDA_ON_CPU
    for (int64_t b = 0; b < entries; ++b) {
      RS_CHECK_VALUE(b || p[b] == 0, "offsets must start at 0; got ", int64_t(p[b]));
      RS_CHECK_VALUE(!b || p[b] >= p[b - 1], "offsets must not descend; got ", int64_t(p[b - 1]),
                     " then ", int64_t(p[b]), " at ", b);
      RS_CHECK_VALUE(int64_t(p[b]) <= count, "offsets must not pass the number of indices, ", count,
                     "; got ", int64_t(p[b]), " at ", b);
    }
#else
    launch(stream, "assert_offsets", assert_offsets_kernel<Index>, {blocks_for(entries)},
           {kThreads}, 0, p, entries, count);
#endif
  });
}

RS_CUDA_DEFINITIONS(m) { m.def("set_check_indices(int mode) -> ()"); }
RS_CUDA_SETTINGS(m) { m.impl("set_check_indices", TORCH_BOX(&set_check_indices)); }

}  // namespace recsparse
