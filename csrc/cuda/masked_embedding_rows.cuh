// Finding and expanding rows of a masked table, on the device. Reads stay inside the arrays
// whatever the table holds: a row that is out of range or contradicts the table is empty.
#pragma once

#include "masked_embedding.h"
#include "primitives.h"

namespace recsparse {

constexpr int kColumns = 4;  // of a lane, side by side

// The aligned word at p, of which only the bytes in [begin, end) may be read.
__device__ __forceinline__ uint32_t word_at(const uint8_t* p, const uint8_t* begin,
                                            const uint8_t* end) {
  if (p >= begin && p + 4 <= end) return __ldg(reinterpret_cast<const uint32_t*>(p));
  uint32_t word = 0;
  for (int i = 0; i < 4; ++i)
    if (p + i >= begin && p + i < end) word |= uint32_t(p[i]) << (8 * i);
  return word;
}

// Four bytes from any address on, those outside [begin, end) as 0.
__device__ __forceinline__ uint32_t read_u32(const uint8_t* p, const uint8_t* begin,
                                             const uint8_t* end) {
  const auto low = uint32_t(reinterpret_cast<uintptr_t>(p) & 3);
  const uint32_t word = word_at(p - low, begin, end);
  if (low == 0) return word;
  return __funnelshift_r(word, word_at(p - low + 4, begin, end), 8 * low);
}

// Up to 64 mask bits, `columns` of them valid.
__device__ __forceinline__ uint64_t read_mask(const uint8_t* p, int64_t columns,
                                              const uint8_t* begin, const uint8_t* end) {
  if (columns <= 0) return 0;
  uint64_t bits = read_u32(p, begin, end);
  if (columns > 32) bits |= uint64_t(read_u32(p + 4, begin, end)) << 32;
  return bits & low_bits(columns);
}

// Mask words [first, first + kWords) of row i; returns where in `values` those of word `first`
// begin.
template <int kWords, class T>
__device__ __forceinline__ int64_t read_row(const DeviceTable<T>& table, int64_t i, int64_t first,
                                            uint64_t (&bits)[kWords]) {
#pragma unroll
  for (int w = 0; w < kWords; ++w) bits[w] = 0;
  if (i < 0 || i >= table.num_embeddings) return 0;
  int64_t start = 0, count = 0;
  if (table.layout == MaskedLayout::kRowRemap) {
    const uint8_t* end = table.rows + table.rows_size;
    const uint8_t* block = table.rows + (i >> 6) * kRemapBlockBytes;
    const uint64_t occupied = read_mask(block, 64, table.rows, end);
    if (!(occupied >> (i & 63) & 1)) return 0;
    const int64_t rank =
        int64_t(read_u32(block + 8, table.rows, end)) + __popcll(occupied & low_bits(i & 63));
    if (rank >= table.kept_rows) return 0;
    const int64_t from = table.bases[rank >> kBaseShift] + int64_t(table.starts[rank]);
    const int64_t to = table.bases[(rank + 1) >> kBaseShift] + int64_t(table.starts[rank + 1]);
    if (from < 0 || from > to || to > table.nnz) return 0;
    start = from;
    for (int64_t j = from; j < to; ++j) {
      const int column = table.columns[j], word = (column >> 6) - int(first);
      start += word < 0;
#pragma unroll
      for (int w = 0; w < kWords; ++w)
        if (w == word) bits[w] |= uint64_t(1) << (column & 63);
    }
#pragma unroll
    for (int w = 0; w < kWords; ++w) count += __popcll(bits[w]);
  } else {
    const uint8_t *mask, *begin, *end;
    if (table.layout == MaskedLayout::kBitmask || table.layout == MaskedLayout::kFixedK) {
      begin = table.rows;
      end = begin + table.rows_size;
      mask = begin + i * table.row_bytes;
      start = table.layout == MaskedLayout::kFixedK
                  ? i * table.row_values
                  : table.bases[i >> kBaseShift] +
                        int64_t(read_u32(mask + table.mask_bytes, begin, end));
    } else {
      const int64_t at =
          table.layout == MaskedLayout::kFixedKRecords
              ? i * table.row_values
              : table.bases[i >> kBaseShift] + int64_t(table.starts[i] & ~kCrossesLine);
      if (at < 0 || at > table.nnz - table.mask_elements) return 0;
      begin = reinterpret_cast<const uint8_t*>(table.values);
      end = reinterpret_cast<const uint8_t*>(table.values + table.nnz);
      mask = reinterpret_cast<const uint8_t*>(table.values + at);
      start = at + table.mask_elements;
    }
    for (int64_t w = 0; w < first; ++w) start += __popcll(read_mask(mask + 8 * w, 64, begin, end));
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      bits[w] = read_mask(mask + 8 * (first + w), table.dim - 64 * (first + w), begin, end);
      count += __popcll(bits[w]);
    }
  }
  if (start < 0 || start > table.nnz - count) {
#pragma unroll
    for (int w = 0; w < kWords; ++w) bits[w] = 0;
    return 0;
  }
  return start;
}

// ---- a team: kLanes lanes of a warp that work on one row, kColumns columns each ----

template <int kLanes>
struct Team {
  static constexpr int kWide = kLanes * kColumns;             // columns of one turn
  static constexpr int kWords = kWide > 64 ? kWide / 64 : 1;  // mask words of one turn
  static constexpr int kPerBlock = kTeamThreads / kLanes;

  __device__ static int lane() { return int(threadIdx.x % kLanes); }
  __device__ static int64_t index() {
    return int64_t(blockIdx.x) * kPerBlock + int64_t(threadIdx.x / kLanes);
  }
  __device__ static int column() { return lane() * kColumns; }  // of this lane, within the turn
  // Of a turn's votes (__ballot_sync of the warp) those of this team, lane 0 lowest.
  __device__ static uint32_t own(uint32_t votes) {
    const int shift = lane_id() / kLanes * kLanes;
    return kLanes == 32 ? votes : (votes >> shift) & ((1u << (kLanes % 32)) - 1);
  }
};

// What one lane needs of a row: which of its columns are kept, and where the first kept one is.
struct Slice {
  uint32_t kept;  // kColumns bits
  int64_t at;
};

// This lane's slice of the row whose mask words and start lane `source` of the team holds.
template <int kLanes>
__device__ __forceinline__ Slice slice_from(const uint64_t (&bits)[Team<kLanes>::kWords],
                                            int64_t start, int source) {
  using Group = Team<kLanes>;
  const int64_t begin = __shfl_sync(kAllLanes, start, source, kLanes);
  const int column = Group::column(), shift = column & 63;
  uint64_t word = __shfl_sync(kAllLanes, bits[0], source, kLanes);
  int64_t before = 0;
#pragma unroll
  for (int w = 1; w < Group::kWords; ++w) {
    const uint64_t next = __shfl_sync(kAllLanes, bits[w], source, kLanes);
    if (column >= 64 * w) {
      before += __popcll(word);
      word = next;
    }
  }
  return {uint32_t(word >> shift) & ((1u << kColumns) - 1),
          begin + before + __popcll(word & low_bits(shift))};
}

// The same of a row that every lane of the team holds.
template <int kLanes>
__device__ __forceinline__ Slice own_slice(const uint64_t (&bits)[Team<kLanes>::kWords],
                                           int64_t start) {
  const int column = Team<kLanes>::column(), shift = column & 63;
  uint64_t word = bits[0];
#pragma unroll
  for (int w = 1; w < Team<kLanes>::kWords; ++w)
    if (column >= 64 * w) {
      start += __popcll(word);
      word = bits[w];
    }
  return {uint32_t(word >> shift) & ((1u << kColumns) - 1),
          start + __popcll(word & low_bits(shift))};
}

// The slice's columns, 0 where nothing is kept.
template <class T>
__device__ __forceinline__ void load_slice(const T* values, const Slice& slice,
                                           float (&row)[kColumns]) {
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    row[c] = 0.0f;
    if (slice.kept >> c & 1)
      row[c] = to_float(values[slice.at + __popc(slice.kept & ((1u << c) - 1))]);
  }
}

// f(c, place in values) for each kept column of the slice.
template <class F>
__device__ __forceinline__ void for_each_kept(const Slice& slice, const F& f) {
#pragma unroll
  for (int c = 0; c < kColumns; ++c)
    if (slice.kept >> c & 1) f(c, slice.at + __popc(slice.kept & ((1u << c) - 1)));
}

// Four columns of a dense row of `dim`, from `column` on; 0 past its end.
template <class T>
__device__ __forceinline__ void load_columns(const T* row, int64_t column, int64_t dim,
                                             bool by_four, float (&out)[kColumns]) {
  if (by_four && column < dim) {
    const auto pack = load_pack<T, kColumns>(row + column);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) out[c] = to_float(pack.at[c]);
    return;
  }
#pragma unroll
  for (int c = 0; c < kColumns; ++c) out[c] = column + c < dim ? to_float(row[column + c]) : 0.0f;
}
template <class T>
__device__ __forceinline__ void store_columns(T* row, int64_t column, int64_t dim, bool by_four,
                                              const float (&in)[kColumns]) {
  if (by_four && column < dim) {
    Pack<T, kColumns> pack;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) pack.at[c] = from_float<T>(in[c]);
    store_pack(row + column, pack);
    return;
  }
#pragma unroll
  for (int c = 0; c < kColumns; ++c)
    if (column + c < dim) row[column + c] = from_float<T>(in[c]);
}

// Lookups of a bag, whatever the offsets hold: within [0, count].
struct Lookups {
  int64_t begin, end;
};
__device__ __forceinline__ Lookups lookups_of(const Bags& bags, int64_t bag) {
  if (bag >= bags.bags) return {0, 0};
  int64_t begin = bags.begin(bag), end = bags.end(bag);
  begin = begin < 0 ? 0 : begin;
  end = end > bags.count ? bags.count : end;
  return {begin, end < begin ? begin : end};
}

// 1, or for mean 1 / number of lookups of the team's bag that are not padding; every lane calls.
template <int kLanes>
__device__ __forceinline__ float bag_scale(const Bags& bags, const Lookups& own) {
  if (!bags.mean) return 1.0f;
  int pooled = 0;
  for (int64_t j = own.begin + Team<kLanes>::lane(); j < own.end; j += kLanes)
    pooled += bags.index(j) != bags.padding_idx;
  pooled = warp_sum<kLanes>(pooled);
  return 1.0f / float(pooled > 1 ? pooled : 1);
}

// The largest of a non-negative number over the warp: how often all its teams go round together, so
// that shuffles find every lane.
__device__ __forceinline__ int64_t most_turns(int64_t turns) {
  return int64_t(__reduce_max_sync(kAllLanes, uint32_t(turns)));
}

}  // namespace recsparse
