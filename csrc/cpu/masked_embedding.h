// From tensors to the structs of masked_embedding_kernels.h, with the checks that read data.
#pragma once

#include <algorithm>
#include <atomic>
#include <optional>

#include "../masked_embedding.h"
#include "dispatch.h"
#include "masked_embedding_kernels.h"

namespace recsparse {

// Bytes of a row's mask read as 64-bit words.
inline int64_t mask_word_bytes(int64_t dim) { return (dim + 63) / 64 * 8; }

template <class T>
MaskedTable<T> masked_table(const MaskedTableArgs& args) {
  check_masked_table(args);
  MaskedTable<T> table = {};
  table.num_embeddings = args.num_embeddings;
  table.dim = args.embedding_dim;
  table.mask_bytes = (args.embedding_dim + 7) / 8;
  table.row_bytes = args.rows.size(1);
  table.rows_size = args.rows.numel();
  table.rows = data<uint8_t>(args.rows);
  const int64_t room = table.rows_size - mask_word_bytes(table.dim);
  table.last_roomy = room < 0 ? -1 : room / std::max<int64_t>(1, table.row_bytes);
  table.nnz = args.values.numel();
  table.mean_bytes = table.nnz * int64_t(sizeof(T)) / std::max<int64_t>(1, args.num_embeddings);
  table.values = data<T>(args.values);
  table.bases = args.bases ? data<int64_t>(*args.bases) : nullptr;
  if (args.columns) {
    table.layout = MaskedLayout::kRowRemap;
    table.columns = data<uint8_t>(*args.columns);
    table.starts = data<uint32_t>(*args.starts);
    table.kept_rows = args.starts->numel() - 1;
  } else if (args.values.dim() == 2) {
    table.layout = MaskedLayout::kFixedK;
    table.row_values = args.values.size(1);
  } else {
    table.layout = MaskedLayout::kBitmask;
  }
  return table;
}

inline void check_consistent(bool consistent) {
  RS_CHECK_VALUE(
      consistent,
      "the table contradicts itself: a row's mask and start lie outside values; was it cut short?");
}

// Raises IndexError unless all of `indices` are in [0, num_embeddings).
inline void check_index_range(const Tensor& indices, int64_t num_embeddings) {
  with_index_type(indices.scalar_type(), "indices", [&](auto tag) {
    using Index = typename decltype(tag)::type;
    const Index* p = data<Index>(indices);
    std::atomic<bool> outside{false};
    parallel_for(indices.numel(), kIndicesPerCheck, [&](int64_t begin, int64_t end) {
      int64_t sign = 0;  // negative once any index or V - 1 - index is
      for (int64_t j = begin; j < end; ++j)
        sign |= int64_t(p[j]) | (num_embeddings - 1 - int64_t(p[j]));
      if (sign < 0) outside.store(true, std::memory_order_relaxed);
    });
    if (!outside.load()) return;
    int64_t j = 0;
    while (p[j] >= 0 && p[j] < num_embeddings) ++j;
    RS_CHECK_INDEX(false, "indices must be in [0, ", num_embeddings,
                   "), the rows of the table; got ", int64_t(p[j]), " at position ", j);
  });
}

// The bags that an op describes, checked: indices in range, offsets ascending from 0. The tensors
// must outlive the result.
inline Bags check_bags(const MaskedTableArgs& table, const Tensor& indices,
                       const MaybeTensor& offsets, const MaybeTensor& weights, int64_t mode,
                       int64_t padding_idx, bool last_offset) {
  Bags bags = describe_bags(indices, offsets, weights, mode, padding_idx, last_offset);
  const int64_t entries = offsets ? offsets->size(0) : 0;
  for (int64_t b = 0, before = 0; b < entries; ++b) {
    const int64_t here = bags.wide_offsets ? static_cast<const int64_t*>(bags.offsets)[b]
                                           : static_cast<const int32_t*>(bags.offsets)[b];
    RS_CHECK_VALUE(b || here == 0, "offsets must start at 0; got ", here);
    RS_CHECK_VALUE(here >= before, "offsets must not descend; got ", before, " then ", here, " at ",
                   b);
    RS_CHECK_VALUE(here <= bags.count, "offsets must not pass the number of indices, ", bags.count,
                   "; got ", here, " at ", b);
    before = here;
  }
  check_index_range(indices, table.num_embeddings);
  return bags;
}

// body(begin, end) over bags in parallel, split so that every thread gets about as many lookups.
template <class F>
void parallel_over_bags(const Bags& bags, const F& body) {
  constexpr int64_t kGrain = 2048;  // bags and lookups: about 20 us
  if (bags.bags == 0) return;
  const auto work_before = [&](int64_t b) { return bags.begin(b) + b; };
  const auto first_bag = [&](int64_t work) {  // the first bag whose work starts at `work` or later
    int64_t low = 0, high = bags.bags;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (work_before(middle) < work) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  };
  const int64_t total = work_before(bags.bags);
  parallel_for(total, kGrain, [&](int64_t begin, int64_t end) {
    const int64_t first = first_bag(begin), last = end == total ? bags.bags : first_bag(end);
    if (first < last) body(first, last);
  });
}

// Runs kernel(begin, end) -> consistent over bags, then raises if the table contradicted itself.
template <class F>
void run_over_bags(const Bags& bags, const F& kernel) {
  std::atomic<bool> consistent{true};
  parallel_over_bags(bags, [&](int64_t begin, int64_t end) {
    if (!kernel(begin, end)) consistent.store(false, std::memory_order_relaxed);
  });
  check_consistent(consistent.load());
}

template <class F>
void run_over_rows(int64_t rows, int64_t grain, const F& kernel) {
  std::atomic<bool> consistent{true};
  parallel_for(rows, grain, [&](int64_t begin, int64_t end) {
    if (!kernel(begin, end)) consistent.store(false, std::memory_order_relaxed);
  });
  check_consistent(consistent.load());
}

}  // namespace recsparse
