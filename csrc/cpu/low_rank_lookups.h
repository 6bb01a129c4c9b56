// Lookups as the low-rank embedding kernels take them: checked indices, bags as starts, and lookups
// grouped by the table row they read.
#pragma once

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "../low_rank_embedding.h"
#include "dispatch.h"
#include "low_rank_common.h"
#include "low_rank_embedding_kernels.h"

namespace recsparse {

constexpr int64_t kLookupsPerTask = 4096;

inline int64_t index_at(const Tensor& indices, int64_t i) {
  return indices.scalar_type() == ScalarType::Long ? data<int64_t>(indices)[i]
                                                   : int64_t(data<int32_t>(indices)[i]);
}

// Raises IndexError when an index is not in [0, limit).
inline void check_index_range(const Tensor& indices, const char* name, int64_t limit) {
  const bool wide = indices.scalar_type() == ScalarType::Long;
  const char* base = static_cast<const char*>(indices.const_data_ptr());
  const int64_t width = wide ? 8 : 4;
  std::atomic<bool> good{true};
  parallel_for(indices.numel(), kIndicesPerCheck, [&](int64_t begin, int64_t end) {
    if (!low_rank_embedding_kernels<float>().in_range(base + begin * width, wide, end - begin,
                                                      limit))
      good = false;
  });
  for (int64_t i = 0; !good && i < indices.numel(); ++i) {
    const int64_t index = index_at(indices, i);
    RS_CHECK_INDEX(index >= 0 && index < limit, name, " must be in [0, ", limit, "); got ", index,
                   " at position ", i);
  }
}

// starts [bags + 1] from offsets; checks that they begin at 0, do not decrease and end within.
inline std::vector<int64_t> bag_starts(const Tensor& offsets, int64_t bags, int64_t lookups) {
  std::vector<int64_t> starts(size_t(bags + 1), lookups);
  const int64_t given = std::min(offsets.numel(), bags + 1);
  with_index_type(offsets.scalar_type(), "offsets", [&](auto tag) {
    const auto* values = data<typename decltype(tag)::type>(offsets);
    for (int64_t b = 0; b < given; ++b) starts[size_t(b)] = values[b];
  });
  RS_CHECK_VALUE(starts[0] == 0 || (bags == 0 && given == 0), "offsets must begin with 0; got ",
                 starts[0]);
  for (int64_t b = 0; b < bags; ++b)
    RS_CHECK_VALUE(starts[b] <= starts[b + 1], "offsets must not decrease or pass the end of ",
                   lookups, " indices; got ", starts[b], " at position ", b, " before ",
                   starts[b + 1]);
  RS_CHECK_VALUE(starts[bags] <= lookups, "offsets must not pass the end of ", lookups,
                 " indices; got ", starts[bags]);
  return starts;
}

// The lookups of a table sorted by row and, within a row, by position: sums over a row's lookups
// then have one order, whatever the number of threads. Each part holds whole rows.
class RowGroups {
 public:
  // `skip` is left out; lookups from `count` on do not exist.
  RowGroups(const Tensor& indices, int64_t count, int64_t num_rows, int64_t skip) {
    RS_CHECK_VALUE(num_rows < (int64_t(1) << 32) && count < (int64_t(1) << 32),
                   "table rows and lookups must each be fewer than 2^32; got ", num_rows, " and ",
                   count);
    const int64_t threads = torch::stable::get_num_threads();
    int64_t parts = count / kLookupsPerTask;
    parts = parts < 1 ? 1 : parts > threads ? threads : parts;
    parts_.resize(parts);
    with_index_type(indices.scalar_type(), "indices", [&](auto tag) {
      using Index = typename decltype(tag)::type;
      parallel_for(parts, 1, [&](int64_t begin, int64_t end) {
        for (int64_t part = begin; part < end; ++part)
          collect(data<Index>(indices), count, num_rows * part / parts,
                  num_rows * (part + 1) / parts, skip, parts_[part]);
      });
    });
  }

  int64_t parts() const { return int64_t(parts_.size()); }
  const std::vector<RowEntry>& part(int64_t i) const { return parts_[i]; }

 private:
  template <class Index>
  static void collect(const Index* indices, int64_t count, int64_t first, int64_t last,
                      int64_t skip, std::vector<RowEntry>& out) {
    int64_t kept = 0;
    for (int64_t i = 0; i < count; ++i)
      kept += indices[i] >= first && indices[i] < last && indices[i] != skip;
    std::vector<RowEntry> entries(kept), other(kept);
    kept = 0;
    for (int64_t i = 0; i < count; ++i)
      if (indices[i] >= first && indices[i] < last && indices[i] != skip)
        entries[kept++] = {uint32_t(indices[i] - first), uint32_t(i)};
    // stable radix sort by row, 11 bits at a time
    constexpr int kBits = 11;
    for (int shift = 0; shift < 32 && (uint64_t(last - first) >> shift) > 0; shift += kBits) {
      std::vector<int64_t> at((1 << kBits) + 1);
      const auto digit = [&](const RowEntry& e) { return (e.row >> shift) & ((1u << kBits) - 1); };
      for (const RowEntry& e : entries) ++at[digit(e) + 1];
      for (int64_t d = 0; d < (1 << kBits); ++d) at[d + 1] += at[d];
      for (const RowEntry& e : entries) other[at[digit(e)]++] = e;
      entries.swap(other);
    }
    for (RowEntry& e : entries) e.row += uint32_t(first);
    out = std::move(entries);
  }

  std::vector<std::vector<RowEntry>> parts_;
};

}  // namespace recsparse
