// Finding and expanding one row of a masked embedding table (masked_embedding_kernels.h).
#pragma once

#include "masked_embedding_kernels.h"
#include "vec.h"

namespace recsparse {
namespace RS_ISA {

RS_INLINE int popcount(uint64_t bits) { return __builtin_popcountll(bits); }

// The lowest n bits, n in [0, 64].
RS_INLINE uint64_t low_bits(int64_t n) { return n >= 64 ? ~uint64_t(0) : (uint64_t(1) << n) - 1; }

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
      return table.bases[i >> kBaseShift] + int64_t(table.starts[i]);
    return i * table.row_values;
  }

  // The first of the two memory accesses that a lookup makes one after the other.
  void prefetch_header(int64_t i) const {
    if constexpr (kLayout == MaskedLayout::kBitmaskRecords) {
      __builtin_prefetch(table.starts + i);
    } else if constexpr (kLayout == MaskedLayout::kRowRemap) {
      __builtin_prefetch(table.rows + (i >> 6) * kRemapBlockBytes);
    } else if constexpr (kLayout != MaskedLayout::kFixedKRecords) {
      __builtin_prefetch(table.rows + i * table.row_bytes);
    }
  }

  // The second: needs the header. As many lines as a row has on average: a count read from the row
  // would be a branch that waits for memory.
  void prefetch_values(int64_t i) const {
    int64_t start;
    if constexpr (kRecords) {
      start = record(i);
    } else if constexpr (kLayout == MaskedLayout::kFixedK) {
      start = i * table.row_values;
    } else if constexpr (kLayout == MaskedLayout::kBitmask) {
      const uint8_t* header = table.rows + i * table.row_bytes;
      start = table.bases[i >> kBaseShift] + int64_t(read_at<uint32_t>(header + table.mask_bytes));
    } else {
      int64_t rank;
      if (occupied(i, &rank)) __builtin_prefetch(table.starts + rank);
      return;
    }
    const char* p = reinterpret_cast<const char*>(table.values + start);
    __builtin_prefetch(p);
    for (int64_t line = 64; line < table.mean_bytes; line += 64) __builtin_prefetch(p + line);
    constexpr int64_t kLoadBytes =
        kLanes * int64_t(sizeof(T));  // the least that a row's loads touch
    __builtin_prefetch(p + (table.mean_bytes > kLoadBytes ? table.mean_bytes : kLoadBytes) - 1);
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
      if constexpr (kRecords) {
        const int64_t at = record(i);
        if (uint64_t(at) > uint64_t(table.nnz - table.mask_elements)) [[unlikely]]
          return false;
        mask = reinterpret_cast<const uint8_t*>(table.values + at);
        mask_end = reinterpret_cast<const uint8_t*>(table.values + table.nnz);
        *start = at + table.mask_elements;
      } else {
        mask = table.rows + i * table.row_bytes;
        mask_end = table.rows + table.rows_size;
        if constexpr (kLayout == MaskedLayout::kBitmask)
          *start =
              table.bases[i >> kBaseShift] + int64_t(read_at<uint32_t>(mask + table.mask_bytes));
        else
          *start = i * table.row_values;
      }
      for (int64_t w = 0; w < first; ++w) *start += popcount(read_at<uint64_t>(mask + 8 * w));
      for (int w = 0; w < kWords; ++w) {
        const int64_t columns = table.dim - 64 * (first + w);
        bits[w] = columns > 0 ? read_word(mask + 8 * (first + w), mask_end) & low_bits(columns) : 0;
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

// Calls body(v, lanes) for the kVectors vectors of a row whose mask words are `bits`: lanes holds
// the expanded values. Returns false, having called nothing, when they are not all in the table.
template <int kVectors, class T, int kWords, class F>
RS_INLINE bool for_each_vector(const MaskedTable<T>& table, const uint64_t (&bits)[kWords],
                               int64_t start, const F& body) {
  constexpr int kPerWord = 64 / kLanes;
  constexpr uint64_t kLaneBits = (uint64_t(1) << kLanes) - 1;
  const bool roomy = inside(table, start, int64_t(kVectors) * kLanes);  // whole loads stay inside
  if (!roomy) [[unlikely]] {
    int64_t count = 0;
    for (int w = 0; w < kWords; ++w) count += popcount(bits[w]);
    if (!inside(table, start, count)) return false;
  }
  const T* p = table.values + start;
  if (roomy) [[likely]] {
    // A whole load near the end of the row would touch a line past it, which nobody has prefetched:
    // a miss for values that are not used. So no load starts later than kLanes before the end (or
    // at the start of a shorter row); its lanes are shifted instead.
    int64_t count = 0;
    for (int w = 0; w < kWords; ++w) count += popcount(bits[w]);
    const T* last = p + (count > kLanes ? count - kLanes : 0);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const int shift = v % kPerWord * kLanes;
      if (v && shift == 0) p += popcount(bits[v / kPerWord - 1]);
      const uint64_t word = bits[v / kPerWord];
      const uint32_t lanes = uint32_t(word >> shift & kLaneBits);
      const T* packed = p + popcount(word & ((uint64_t(1) << shift) - 1));
      if (v == 0) {
        body(v, expand_lanes(lanes, load(packed)));
      } else {
        const T* from = packed < last ? packed : last;
        body(v, expand_lanes(lanes, shift_lanes(load(from), int(packed - from))));
      }
    }
  } else {
    for (int v = 0; v < kVectors; ++v) {
      const uint32_t lanes = uint32_t(bits[v / kPerWord] >> (v % kPerWord * kLanes) & kLaneBits);
      const int count = popcount(lanes);
      body(v, expand_lanes(lanes, load_first(p, count)));
      p += count;
    }
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
