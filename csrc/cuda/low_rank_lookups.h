// Lookups as the low-rank embedding ops take them: checked, bags as starts, everything they point
// to kept alive.
#pragma once

#include <algorithm>
#include <optional>

#include "../low_rank_embedding.h"
#include "indices.h"
#include "low_rank_bag_kernels.cuh"
#include "low_rank_tensors.h"

namespace recsparse::low_rank {

constexpr int kLookupThreads = 256;

inline Indices indices_of(const Stream& stream, const Tensor& t) {
  const bool wide = t.scalar_type() == ScalarType::Long;
  return {wide ? static_cast<const void*>(data<int64_t>(stream, t))
               : static_cast<const void*>(data<int32_t>(stream, t)),
          wide};
}

// starts [bags + 1] of checked offsets, or null.
class Starts {
 public:
  Starts(const Stream& stream, const MaybeTensor& offsets, int64_t bags, int64_t lookups) {
    if (!offsets) return;
    const Tensor given = torch::stable::contiguous(*offsets);
    check_offsets(stream, given, lookups);
    starts_.emplace(stream, bags + 1);
    with_index_type(given.scalar_type(), "offsets", [&](auto tag) {
      using Index = typename decltype(tag)::type;
      launch(stream, "low_rank_starts", starts_kernel<Index>, {ceil_div(bags + 1, kLookupThreads)},
             {kLookupThreads}, 0, data<Index>(stream, given), std::min(given.numel(), bags + 1),
             bags, lookups, starts_->get());
    });
  }
  const int64_t* get() const { return starts_ ? starts_->get() : nullptr; }

 private:
  std::optional<Scratch<int64_t>> starts_;
};

template <class T>
class BagInputs {
 public:
  BagInputs(const Stream& stream, const LowRankBagSizes& size, const Tensor& table,
            const Tensor& up, const MaybeTensor& mean, const Tensor& indices,
            const MaybeTensor& offsets, const MaybeTensor& weights, int64_t pooling_mode,
            int64_t padding_idx)
      : table_(torch::stable::contiguous(table)),
        up_(torch::stable::contiguous(up)),
        indices_(checked_indices(stream, "indices", torch::stable::contiguous(indices),
                                 size.num_embeddings)),
        mean_(contiguous(mean)),
        weights_(contiguous(weights)),
        starts_(stream, offsets, size.bags, size.lookups) {
    p.table = matrix(data<T>(stream, table_), size.num_embeddings, size.rank);
    p.indices = indices_of(stream, indices_);
    p.starts = starts_.get();
    p.weights = data<T>(stream, weights_);
    p.lookups = size.lookups;
    p.bags = size.bags;
    p.padding_idx = padding_idx;
    p.is_mean = pooling_mode == kPoolMean;
    this->up = matrix(data<T>(stream, up_), size.embedding_dim, size.rank);
    this->mean = data<T>(stream, mean_);
  }
  Bags<T> p{};
  Matrix<T> up{};
  const T* mean = nullptr;

 private:
  Tensor table_, up_, indices_;
  MaybeTensor mean_, weights_;
  Starts starts_;
};

// Totals of bags [B] (sum of weights, over their number in mode mean).
template <class T>
void bag_weights(const Stream& stream, const Bags<T>& bags, float* totals, float* inverses) {
  launch(stream, "low_rank_bag_weights", bag_weights_kernel<T>,
         {ceil_div(bags.bags * kLanesOfBag, kLookupThreads)}, {kLookupThreads}, 0, bags, totals,
         inverses);
}

}  // namespace recsparse::low_rank
