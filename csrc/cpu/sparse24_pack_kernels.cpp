// 2:4 masks, compress, decompress.
//   positions: 2 bits for each kept value, low bits first: byte j of a row holds
//     bits 0-1, 2-3   first and second kept column of group 2 j
//     bits 4-5, 6-7   the same of group 2 j + 1        first < second
#include "sparse24_kernels.h"
#include "vec.h"

namespace recsparse::RS_ISA {
namespace {

constexpr int kGroup = 4;
constexpr int kPadding = 16;  // I is padded to a multiple of this many columns

constexpr int64_t padded(int64_t columns) { return (columns + kPadding - 1) / kPadding * kPadding; }

// |x|, NaN as infinity: what is not a number is kept first.
template <class T>
RS_INLINE double magnitude(T x) {
  const float a = __builtin_fabsf(to_float(x));
  return a == a ? double(a) : __builtin_huge_val();
}

template <class T>
void mask_rows(const T* weight, int64_t stride, int64_t rows, int64_t columns, bool* mask) {
  for (int64_t r = 0; r < rows; ++r) {
    const T* row = weight + r * stride;
    for (int64_t c = 0; c < columns; c += kGroup) {
      double size[kGroup];
      for (int i = 0; i < kGroup; ++i) size[i] = c + i < columns ? magnitude(row[c + i]) : -1.0;
      for (int i = 0; i < kGroup && c + i < columns; ++i) {
        int larger = 0;  // of two equal ones the first is kept
        for (int j = 0; j < kGroup; ++j)
          larger += size[j] > size[i] || (size[j] == size[i] && j < i);
        mask[r * columns + c + i] = larger < 2;
      }
    }
  }
}

// The 90 patterns: in lexicographic order of the four rows, each row one of the pairs
// {0,1} {0,2} {0,3} {1,2} {1,3} {2,3}.
constexpr uint8_t kPairs[6] = {0b0011, 0b0101, 0b1001, 0b0110, 0b1010, 0b1100};  // bit c: column c
struct Patterns {
  uint8_t pair[90][4];
};
constexpr Patterns all_patterns() {
  Patterns out{};
  int n = 0;
  for (uint8_t a = 0; a < 6; ++a)
    for (uint8_t b = 0; b < 6; ++b)
      for (uint8_t c = 0; c < 6; ++c)
        for (uint8_t d = 0; d < 6; ++d) {
          bool two_in_each_column = true;
          for (int column = 0; column < 4; ++column) {
            const int in_column = (kPairs[a] >> column & 1) + (kPairs[b] >> column & 1) +
                                  (kPairs[c] >> column & 1) + (kPairs[d] >> column & 1);
            two_in_each_column = two_in_each_column && in_column == 2;
          }
          if (!two_in_each_column) continue;
          const uint8_t rows[4] = {a, b, c, d};
          for (int r = 0; r < 4; ++r) out.pair[n][r] = rows[r];
          ++n;
        }
  return out;
}
constexpr Patterns kPatterns = all_patterns();

// Scores are sums of float32 magnitudes in double, so that rounding decides nothing that the
// weights do not; lanes are tiles.
template <class T>
void mask_tiles(const T* weight, int64_t stride, int64_t rows, int64_t columns, bool* mask) {
  constexpr int kTiles = 8;
  for (int64_t begin = 0; begin < columns; begin += kTiles * kGroup) {
    double size[4][kGroup][kTiles], pair[4][6][kTiles], best[kTiles];
    int64_t chosen[kTiles];
    for (int r = 0; r < 4; ++r) {
      for (int t = 0; t < kTiles; ++t)
        for (int i = 0; i < kGroup; ++i) {
          const int64_t c = begin + t * kGroup + i;
          size[r][i][t] = r < rows && c < columns ? magnitude(weight[r * stride + c]) : 0.0;
        }
      int p = 0;
      for (int i = 0; i < kGroup; ++i)  // pairs in the order of kPairs
        for (int j = i + 1; j < kGroup; ++j, ++p)
          for (int t = 0; t < kTiles; ++t) pair[r][p][t] = size[r][i][t] + size[r][j][t];
    }
    for (int t = 0; t < kTiles; ++t) {
      best[t] = -1.0;
      chosen[t] = 0;
    }
    for (int n = 0; n < 90; ++n) {
      const uint8_t* rows_of = kPatterns.pair[n];
      for (int t = 0; t < kTiles; ++t) {
        const double score = (pair[0][rows_of[0]][t] + pair[1][rows_of[1]][t]) +
                             (pair[2][rows_of[2]][t] + pair[3][rows_of[3]][t]);
        const bool better = score > best[t];  // of equal ones the first
        best[t] = better ? score : best[t];
        chosen[t] = better ? n : chosen[t];
      }
    }
    for (int64_t r = 0; r < rows; ++r)
      for (int t = 0; t < kTiles; ++t)
        for (int i = 0; i < kGroup; ++i) {
          const int64_t c = begin + t * kGroup + i;
          if (c < columns) mask[r * columns + c] = kPairs[kPatterns.pair[chosen[t]][r]] >> i & 1;
        }
  }
}

// For each set of kept columns (bit c: column c), the two positions: what is kept, then the highest
// others, in increasing order. Sets of more than two are refused before.
struct Encoding {
  uint8_t positions[16];  // first | second << 2
};
constexpr Encoding encode_sets() {
  Encoding out{};
  for (int set = 0; set < 16; ++set) {
    int kept = set;
    const int count = (set & 1) + (set >> 1 & 1) + (set >> 2 & 1) + (set >> 3 & 1);
    int missing = 2 - count;
    for (int c = 3; c >= 0 && missing > 0; --c)
      if (!(kept >> c & 1)) {
        kept |= 1 << c;
        --missing;
      }
    int first = -1, second = -1;
    for (int c = 0; c < 4; ++c)
      if (kept >> c & 1) {
        if (first < 0) {
          first = c;
        } else if (second < 0) {
          second = c;
        }
      }
    out.positions[set] = uint8_t(first | second << 2);
  }
  return out;
}
constexpr Encoding kEncoding = encode_sets();

template <class T>
bool compress_row(const T* weight, const bool* mask, int64_t columns, T* values,
                  uint8_t* positions) {
  const T nothing = from_float<T>(0.0f);
  for (int64_t group = 0; group < padded(columns) / kGroup; ++group) {
    const int64_t c = group * kGroup;
    int set = 0;
    for (int i = 0; i < kGroup && c + i < columns; ++i) set |= int(mask[c + i]) << i;
    if (__builtin_popcount(unsigned(set)) > 2) return false;
    const int code = kEncoding.positions[set];
    const int first = code & 3, second = code >> 2;
    values[2 * group] = set >> first & 1 ? weight[c + first] : nothing;
    values[2 * group + 1] = set >> second & 1 ? weight[c + second] : nothing;
    uint8_t& byte = positions[group / 2];
    byte = group % 2 ? uint8_t(byte | code << 4) : uint8_t(code);
  }
  return true;
}

// A block's lines are short pieces of rows, too short for the processor to fetch ahead by itself.
constexpr int64_t kLinesAhead = 8;

template <int kForWriting>
RS_INLINE void prefetch_piece(const void* p, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64)
    __builtin_prefetch(static_cast<const char*>(p) + at, kForWriting, 2);
}

template <class T>
RS_INLINE void prefetch_packed(const Sparse24Pack<T>& pack, int64_t line, int64_t elements) {
  prefetch_piece<1>(pack.values + 4 * line * pack.row_bytes, elements / 2 * int64_t(sizeof(T)));
  prefetch_piece<1>(pack.positions + line * pack.row_bytes, 1);
}

// Packs the first `rows` elements of `columns` lines, kPackBlock apart.
template <class T>
bool compress_columns(const T* weight_t, const bool* kept_t, int64_t rows, int64_t columns,
                      const Sparse24Pack<T>& pack_t) {
  bool fits = true;
  for (int64_t c = 0; c < columns; ++c) {
    if (c + kLinesAhead < columns) prefetch_packed(pack_t, c + kLinesAhead, rows);
    fits &= compress_row(weight_t + c * kPackBlock, kept_t + c * kPackBlock, rows,
                         pack_t.values + 4 * c * pack_t.row_bytes,
                         pack_t.positions + c * pack_t.row_bytes);
  }
  return fits;
}

template <class T>
bool compress_block(const T* weight, int64_t stride, const bool* mask, int64_t mask_stride,
                    int64_t rows, int64_t columns, const Sparse24Pack<T>& pack,
                    const Sparse24Pack<T>& pack_t) {
  bool chosen[kPackBlock * kPackBlock], kept_t[kPackBlock * kPackBlock];
  T weight_t[kPackBlock * kPackBlock];
  const int64_t piece = columns * int64_t(sizeof(T));
  if (!mask) {
    for (int64_t r = 0; r < rows; ++r) prefetch_piece<0>(weight + r * stride, piece);
    for (int64_t r = 0; r < rows; r += 4)
      mask_tiles(weight + r * stride, stride, rows - r < 4 ? rows - r : 4, columns,
                 chosen + r * columns);
    mask = chosen;
    mask_stride = columns;
  }
  bool fits = true;
  for (int64_t r = 0; r < rows; ++r) {
    const T* row = weight + r * stride;
    const bool* kept = mask + r * mask_stride;
    if (r + kLinesAhead < rows) {
      prefetch_piece<0>(row + kLinesAhead * stride, piece);
      prefetch_packed(pack, r + kLinesAhead, columns);
    }
    fits &= compress_row(row, kept, columns, pack.values + 4 * r * pack.row_bytes,
                         pack.positions + r * pack.row_bytes);
    for (int64_t c = 0; c < columns; ++c) {
      weight_t[c * kPackBlock + r] = row[c];
      kept_t[c * kPackBlock + r] = kept[c];
    }
  }
  return compress_columns(weight_t, kept_t, rows, columns, pack_t) && fits;
}

template <class T>
void transpose_block(const T* values, const uint8_t* positions, int64_t row_bytes, int64_t rows,
                     int64_t columns, const Sparse24Pack<T>& pack_t) {
  bool kept_t[kPackBlock * kPackBlock] = {};
  T weight_t[kPackBlock * kPackBlock];  // only what is kept is written and read
  uint8_t in_group[kPackBlock];         // how many of four rows a column keeps
  for (int64_t r = 0; r < rows; ++r) {
    if (r % kGroup == 0) std::memset(in_group, 0, sizeof in_group);
    const T* row = values + 4 * r * row_bytes;
    const uint8_t* bytes = positions + r * row_bytes;
    for (int64_t k = 0; k / 2 * kGroup < columns; ++k) {
      const int64_t c = k / 2 * kGroup + (bytes[k / 4] >> k % 4 * 2 & 3);
      if (c >= columns) continue;
      bool& kept = kept_t[c * kPackBlock + r];
      if (!kept && in_group[c] < 2) {
        kept = true;
        ++in_group[c];
      }
      weight_t[c * kPackBlock + r] = row[k];
    }
  }
  compress_columns(weight_t, kept_t, rows, columns, pack_t);
}

template <class T>
RS_INLINE Vec load_valid(const T* row, int64_t from, int64_t columns) {
  const int64_t valid = columns - from;
  return valid >= kLanes ? load(row + from) : valid > 0 ? load_first(row + from, valid) : zero();
}

RS_INLINE uint32_t read_positions(const uint8_t* positions, int64_t bytes) {
  uint32_t bits = 0;
  std::memcpy(&bits, positions, size_t(bytes));
  return bits;
}

template <class T>
void gather_row(const T* dense, const uint8_t* positions, int64_t columns, T* values) {
  const int64_t kept = padded(columns) / 2;
  for (int64_t k = 0; k < kept; k += kLanes) {
    const int64_t count = kept - k < kLanes ? kept - k : kLanes;
    const Picks from = kept_columns(read_positions(positions + k / 4, count / 4));
    const Vec low = load_valid(dense, 2 * k, columns);
    const Vec high = load_valid(dense, 2 * k + kLanes, columns);
    store_first(values + k, pick(from, low, high), count);
  }
}

template <class T>
RS_INLINE void store_valid(T* row, Vec x, int64_t from, int64_t columns) {
  const int64_t valid = columns - from;
  if (valid >= kLanes) {
    store(row + from, x);
  } else if (valid > 0) {
    store_first(row + from, x, valid);
  }
}

template <class T>
void decompress_row(const T* values, const uint8_t* positions, int64_t columns, T* dense) {
  const int64_t kept = padded(columns) / 2;
  for (int64_t k = 0; k < kept; k += kLanes) {
    const int64_t count = kept - k < kLanes ? kept - k : kLanes;
    Vec low, high;
    expand(load_first(values + k, count), read_positions(positions + k / 4, count / 4), low, high);
    store_valid(dense, low, 2 * k, columns);
    store_valid(dense, high, 2 * k + kLanes, columns);
  }
}

}  // namespace

template <class T>
const Sparse24PackKernels<T>& sparse24_pack_kernels() {
  static constexpr Sparse24PackKernels<T> table = {
      &mask_rows<T>,       &mask_tiles<T>, &compress_row<T>,  &compress_block<T>,
      &transpose_block<T>, &gather_row<T>, &decompress_row<T>};
  return table;
}
RS_INSTANTIATE_KERNEL_TABLE(Sparse24PackKernels, sparse24_pack_kernels)

}  // namespace recsparse::RS_ISA
