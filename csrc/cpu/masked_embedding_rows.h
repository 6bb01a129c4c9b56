// Finding and expanding one row of a masked embedding table (masked_embedding_kernels.h).
#pragma once

#include "masked_embedding_kernels.h"
#include "vec.h"

namespace recsparse {
namespace RS_ISA {

RS_INLINE int popcount(uint64_t bits) { return __builtin_popcountll(bits); }

// The lowest n bits, n in [0, 64].
RS_INLINE uint64_t low_bits(int64_t n) { return n >= 64 ? ~uint64_t(0) : (uint64_t(1) << n) - 1; }

// Into the second cache level: it keeps more misses in flight than the first (48 against 24 on Zen
// 4). A function that only prefetches must be forced inline, or GCC takes it for pure and drops its
// calls.
RS_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

template <class T>
RS_INLINE T read_at(const uint8_t* p) {
  T value;
  std::memcpy(&value, p, sizeof(value));
  return value;
}

// Up to 8 mask bytes from p, of which only those before `end` may be read.
RS_INLINE uint64_t read_word(const uint8_t* p, const uint8_t* end) {
  if (end - p >= 8) [[likely]]
    return read_at<uint64_t>(p);
  uint64_t word = 0;
  if (p < end) std::memcpy(&word, p, size_t(end - p));
  return word;
}

template <class T, MaskedLayout kLayout>
struct RowReader {
  static constexpr bool kRecords =
      kLayout == MaskedLayout::kBitmaskRecords || kLayout == MaskedLayout::kFixedKRecords;
  const MaskedTable<T>& table;

  // Address of the record of row i; only for records.
  int64_t record(int64_t i) const {
    if constexpr (kLayout == MaskedLayout::kBitmaskRecords)
      return table.bases[i >> kBaseShift] + int64_t(table.starts[i] & ~kCrossesLine);
    return i * table.row_values;
  }

  // The first of the two memory accesses that a lookup makes one after the other.
  [[gnu::always_inline]] void prefetch_header(int64_t i) const {
    if constexpr (kLayout == MaskedLayout::kBitmaskRecords) {
      prefetch(table.starts + i);
    } else if constexpr (kLayout == MaskedLayout::kRowRemap) {
      prefetch(table.rows + (i >> 6) * kRemapBlockBytes);
    } else if constexpr (kLayout != MaskedLayout::kFixedKRecords) {
      prefetch(table.rows + i * table.row_bytes);
      prefetch(table.rows + (i + 1) * table.row_bytes - 1);
    }
  }

  // The second: needs the header. Its line of the first value and that of the last, and as many
  // between as a row has on average: a loop over a count read from the row would be a branch that
  // waits for memory.
  [[gnu::always_inline]] void prefetch_values(int64_t i) const {
    int64_t start, bytes = table.mean_bytes;
    if constexpr (kLayout == MaskedLayout::kBitmaskRecords) {
      start = record(i);
      bytes = table.starts[i] & kCrossesLine ? (bytes > 64 ? bytes : 65) : 1;
    } else if constexpr (kLayout == MaskedLayout::kFixedKRecords ||
                         kLayout == MaskedLayout::kFixedK) {
      start = i * table.row_values;
    } else if constexpr (kLayout == MaskedLayout::kBitmask) {
      const uint8_t* header = table.rows + i * table.row_bytes;
      start = table.bases[i >> kBaseShift] + int64_t(read_at<uint32_t>(header + table.mask_bytes));
      if (table.mask_bytes <= 16) {
        const uint8_t* end = table.rows + table.rows_size;
        bytes = popcount(read_word(header, end) & low_bits(table.dim));
        if (table.mask_bytes > 8)
          bytes += popcount(read_word(header + 8, end) & low_bits(table.dim - 64));
        bytes *= int64_t(sizeof(T));
      }
    } else {
      int64_t rank;
      if (occupied(i, &rank)) prefetch(table.starts + rank);
      return;
    }
    // an address, not a pointer: of an empty row it lies outside the values
    const uintptr_t p = reinterpret_cast<uintptr_t>(table.values) + uintptr_t(start) * sizeof(T);
    const auto fetch = [&](int64_t offset) __attribute__((always_inline)) {
      prefetch(reinterpret_cast<const void*>(p + uintptr_t(offset)));
    };
    fetch(0);
    fetch(bytes - 1);
    for (int64_t line = 64; line < table.mean_bytes; line += 64) fetch(line);
  }

  // row_remap: whether row i holds anything, and its rank among the rows that do.
  bool occupied(int64_t i, int64_t* rank) const {
    const uint8_t* block = table.rows + (i >> 6) * kRemapBlockBytes;
    const uint64_t bits = read_at<uint64_t>(block);
    *rank = int64_t(read_at<uint32_t>(block + 8)) + popcount(bits & low_bits(i & 63));
    return bits >> (i & 63) & 1;
  }

  // Mask words [first, first + kWords) of row i, and the element of `values` where the values of
  // word `first` begin. False when the header contradicts the table.
  template <int kWords>
  bool read(int64_t i, int64_t first, uint64_t (&bits)[kWords], int64_t* start) const {
    if constexpr (kLayout == MaskedLayout::kRowRemap) {
      for (int w = 0; w < kWords; ++w) bits[w] = 0;
      *start = 0;
      int64_t rank;
      if (!occupied(i, &rank)) return true;
      if (rank >= table.kept_rows) return false;
      const int64_t begin = table.bases[rank >> kBaseShift] + int64_t(table.starts[rank]);
      const int64_t end = table.bases[(rank + 1) >> kBaseShift] + int64_t(table.starts[rank + 1]);
      if (begin < 0 || begin > end || end > table.nnz) return false;
      *start = begin;
      for (int64_t j = begin; j < end; ++j) {
        const int64_t word = (table.columns[j] >> 6) - first;
        if (word < 0) ++*start;
        if (word >= 0 && word < kWords) bits[word] |= uint64_t(1) << (table.columns[j] & 63);
      }
      return true;
    } else {
      const uint8_t* mask;
      const uint8_t* mask_end;
      bool roomy;  // whole words may be read
      if constexpr (kRecords) {
        const int64_t at = record(i);
        if (uint64_t(at) > uint64_t(table.nnz - table.mask_elements)) [[unlikely]]
          return false;
        roomy = at <= table.last_roomy;
        mask = reinterpret_cast<const uint8_t*>(table.values + at);
        mask_end = reinterpret_cast<const uint8_t*>(table.values + table.nnz);
        *start = at + table.mask_elements;
      } else {
        roomy = i <= table.last_roomy;
        mask = table.rows + i * table.row_bytes;
        mask_end = table.rows + table.rows_size;
        if constexpr (kLayout == MaskedLayout::kBitmask)
          *start =
              table.bases[i >> kBaseShift] + int64_t(read_at<uint32_t>(mask + table.mask_bytes));
        else
          *start = i * table.row_values;
      }
      if (first) [[unlikely]]
        for (int64_t w = 0; w < first; ++w) *start += popcount(read_at<uint64_t>(mask + 8 * w));
      for (int w = 0; w < kWords; ++w) {
        const int64_t columns = table.dim - 64 * (first + w);
        const uint8_t* word = mask + 8 * (first + w);
        bits[w] = 0;
        if (columns > 0)
          bits[w] =
              (roomy ? read_at<uint64_t>(word) : read_word(word, mask_end)) & low_bits(columns);
      }
      return true;
    }
  }
};

// True when `count` elements may be read at `start`.
template <class T>
RS_INLINE bool inside(const MaskedTable<T>& table, int64_t start, int64_t count) {
  return start >= 0 && count <= table.nnz - start;
}

// The run of kLanes elements, at an address that is a multiple of its size, in which p lies. A run
// never crosses a cache line.
template <class T>
RS_INLINE const T* run_of(const T* p) {
  return reinterpret_cast<const T*>(reinterpret_cast<uintptr_t>(p) &
                                    ~uintptr_t(kLanes * sizeof(T) - 1));
}

// Calls body(v, lanes) for the kVectors vectors of a row whose mask words are `bits`: lanes holds
// the expanded values. Returns false, having called nothing, when they are not all in the table.
//
// Only runs that hold values of the row are loaded. A load from the row's start or from a vector's
// would often touch a line past the row's end that nobody has prefetched: a miss for nothing. (Nor
// does a masked load help: Zen 4 fetches the line all the same.)
template <int kVectors, class T, int kWords, class F>
RS_INLINE bool for_each_vector(const MaskedTable<T>& table, const uint64_t (&bits)[kWords],
                               int64_t start, const F& body) {
  constexpr int kPerWord = 64 / kLanes;
  constexpr uint64_t kLaneBits = (uint64_t(1) << kLanes) - 1;
  int64_t count = 0;
  for (int w = 0; w < kWords; ++w) count += popcount(bits[w]);
  // Not near an end of the table: all runs that hold values of the row lie in it.
  const bool whole = uint64_t(start - kLanes) <= uint64_t(table.nnz - 64 * kWords - 3 * kLanes) &&
                     table.nnz >= 64 * kWords + 3 * kLanes;
  if (!whole && !inside(table, start, count)) [[unlikely]]
    return false;
  const T* p = table.values + start;
  const auto lanes_of = [&](int v) {
    return uint32_t(bits[v / kPerWord] >> (v % kPerWord * kLanes) & kLaneBits);
  };
  constexpr int kGroup = kVectors < 4 ? kVectors : 4;  // vectors that may share a pair of runs
#pragma GCC unroll 4
  for (int g = 0; g < kVectors; g += kGroup) {
    const uint64_t group =
        bits[g / kPerWord] >> (g % kPerWord * kLanes) & low_bits(kGroup * kLanes);
    const int values = popcount(group);
    const auto values_before = [&](int v) { return popcount(group & low_bits((v - g) * kLanes)); };
    const T* first = run_of(p);
    const int offset = int(p - first);
    if (whole && values + offset <= 2 * kLanes) [[likely]] {  // all in two runs
      const Vec low = load(first);
      const Vec high = load(first + (values + offset > kLanes ? kLanes : 0));
#pragma GCC unroll 4
      for (int v = g; v < g + kGroup; ++v)
        body(v, expand_lanes(lanes_of(v), window_lanes(low, high, offset + values_before(v))));
    } else if (whole) [[likely]] {  // each vector in two runs
#pragma GCC unroll 4
      for (int v = g; v < g + kGroup; ++v) {
        const uint32_t lanes = lanes_of(v);
        const T* here = p + values_before(v);
        const T* low = run_of(here);
        const T* high = run_of(here + (lanes ? popcount(lanes) - 1 : 0));
        body(v, expand_lanes(lanes, window_lanes(load(low), load(high), int(here - low))));
      }
    } else {
      for (int v = g; v < g + kGroup; ++v) {
        const uint32_t lanes = lanes_of(v);
        body(v, expand_lanes(lanes, load_first(p + values_before(v), popcount(lanes))));
      }
    }
    p += values;
  }
  return true;
}

// Calls f(RowReader) for the table's layout.
template <class T, class F>
RS_INLINE auto with_reader(const MaskedTable<T>& table, const F& f) {
  switch (table.layout) {
    case MaskedLayout::kFixedK: return f(RowReader<T, MaskedLayout::kFixedK>{table});
    case MaskedLayout::kRowRemap: return f(RowReader<T, MaskedLayout::kRowRemap>{table});
    case MaskedLayout::kBitmaskRecords:
      return f(RowReader<T, MaskedLayout::kBitmaskRecords>{table});
    case MaskedLayout::kFixedKRecords: return f(RowReader<T, MaskedLayout::kFixedKRecords>{table});
    default: return f(RowReader<T, MaskedLayout::kBitmask>{table});
  }
}

template <int kCount>
struct VectorCount {
  static constexpr int value = kCount;
};
// Calls f(VectorCount<n>) with the smallest n in {1, 2, 4, 8} that holds `columns`, at most 8.
template <class F>
RS_INLINE auto with_vectors(int64_t columns, const F& f) {
  if (columns <= kLanes) return f(VectorCount<1>());
  if (columns <= 2 * kLanes) return f(VectorCount<2>());
  if (columns <= 4 * kLanes) return f(VectorCount<4>());
  return f(VectorCount<8>());
}

// Stores the first `columns` of a vector that starts at column 0 of p.
template <class T>
RS_INLINE void store_columns(T* p, Vec a, int64_t columns) {
  if (columns >= kLanes) return store(p, a);
  if (columns > 0) store_first(p, a, columns);
}
template <class T>
RS_INLINE Vec load_columns(const T* p, int64_t columns) {
  if (columns >= kLanes) return load(p);
  return columns > 0 ? load_first(p, columns) : zero();
}

}  // namespace RS_ISA
}  // namespace recsparse
