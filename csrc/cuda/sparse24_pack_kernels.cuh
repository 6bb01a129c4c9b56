// 2:4 masks, compress, gather, decompress.
//   weight, dense [O, I]   mask [O, I] bool   values [O, P / 2]   metadata [O, P / 8] uint8
//   P = I rounded up to 16. Byte j of a row of metadata holds the places of four kept values:
//     bits 0-1, 2-3   first and second kept column of group 2 j (columns 8 j to 8 j + 3)
//     bits 4-5, 6-7   the same of group 2 j + 1        first < second
//
// A thread has one byte of metadata: eight columns, four values. These kernels move bytes and do
// little else, so neighbours in a warp take neighbouring bytes, and rows that are aligned to it go
// 16 bytes an access. Where rows and columns matter, a thread has a 4 x 4 tile.
#pragma once

#include <cassert>
#include <utility>

#include "primitives.h"

namespace recsparse::sparse24 {

constexpr int kPackThreads = 256;
constexpr int kTileThreads = 128;  // the sums of a tile take most of a thread's registers

struct PackSizes {
  int64_t rows, columns;  // O, I
  int64_t row_bytes;      // P / 8
};

// Which row, and which byte of it.
struct ByteAt {
  int64_t row, byte;
};
__device__ __forceinline__ ByteAt byte_at(int64_t index, int64_t in_row) {
  if (index >> 31 == 0 && in_row >> 31 == 0) {  // a 64-bit division costs as much as all the rest
    const auto row = uint32_t(index) / uint32_t(in_row);
    return {int64_t(row), int64_t(uint32_t(index) - row * uint32_t(in_row))};
  }
  return {index / in_row, index % in_row};
}

// Eight elements of a row from `column` on, in as few accesses as its alignment allows.
template <class T>
__device__ __forceinline__ void load_eight(T (&to)[8], const T* row, int64_t column,
                                           int64_t columns, bool aligned) {
  constexpr int kPack = sizeof(T) == 1 ? 8 : kPackOf16Bytes<T>;
  if (aligned && column + 8 <= columns) {
#pragma unroll
    for (int i = 0; i < 8; i += kPack) {
      const auto pack = load_pack<T, kPack>(row + column + i);
#pragma unroll
      for (int j = 0; j < kPack; ++j) to[i + j] = pack.at[j];
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) to[i] = column + i < columns ? row[column + i] : T{};
  }
}
template <class T>
__device__ __forceinline__ void store_eight(T* row, const T (&from)[8], int64_t column,
                                            int64_t columns, bool aligned) {
  constexpr int kPack = sizeof(T) == 1 ? 8 : kPackOf16Bytes<T>;
  if (aligned && column + 8 <= columns) {
#pragma unroll
    for (int i = 0; i < 8; i += kPack) {
      Pack<T, kPack> pack;
#pragma unroll
      for (int j = 0; j < kPack; ++j) pack.at[j] = from[i + j];
      store_pack(row + column + i, pack);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (column + i < columns) row[column + i] = from[i];
  }
}

// |x|; what is not a number is kept first.
template <class T>
__device__ __forceinline__ float magnitude(T x) {
  const float size = fabsf(to_float(x));
  return size == size ? size : __int_as_float(0x7f800000);
}

// ---- sets of kept columns: bit c of four ----

// The two largest, of equal ones the first.
__device__ __forceinline__ uint32_t largest_two(float a, float b, float c, float d) {
  const int ba = b > a, ca = c > a, da = d > a, cb = c > b, db = d > b, dc = d > c;
  return uint32_t(ba + ca + da < 2) | uint32_t(1 - ba + cb + db < 2) << 1 |
         uint32_t(2 - ca - cb + dc < 2) << 2 | uint32_t(3 - da - db - dc < 2) << 3;
}

// For each set the two places, first | second << 2: what is kept, then the highest others,
// ascending.
constexpr uint64_t places_of_sets() {
  uint64_t out = 0;
  for (uint32_t set = 0; set < 16; ++set) {
    uint32_t kept = set;
    int count = int(set & 1) + int(set >> 1 & 1) + int(set >> 2 & 1) + int(set >> 3 & 1);
    for (int c = 3; c >= 0 && count < 2; --c)
      if (!(kept >> c & 1)) {
        kept |= 1u << c;
        ++count;
      }
    uint64_t places = 0;
    int found = 0;
    for (uint32_t c = 0; c < 4; ++c)
      if ((kept >> c & 1) && found < 2) places |= uint64_t(c) << (2 * found++);
    out |= places << (4 * set);
  }
  return out;
}
__device__ __forceinline__ uint32_t places(uint32_t set) {
  constexpr uint64_t kPlaces = places_of_sets();
  return uint32_t(kPlaces >> (4 * set)) & 15;
}

// The element at a place (0 to 3) that is known when the kernel runs: an index would move the four
// to memory.
template <class T>
__device__ __forceinline__ T at_place(const T* four, uint32_t place) {
  return place < 2 ? (place == 0 ? four[0] : four[1]) : (place == 2 ? four[2] : four[3]);
}

// The values and the byte of metadata of eight columns whose kept ones are given.
template <class T>
__device__ __forceinline__ void pack_eight(const T (&columns)[8], uint32_t set, T* values,
                                           uint8_t* byte) {
  Pack<T, 4> kept;
  uint32_t code = 0;
#pragma unroll
  for (int q = 0; q < 2; ++q) {
    const uint32_t part = set >> (4 * q) & 15, pair = places(part);
    const uint32_t first = pair & 3, second = pair >> 2;
    kept.at[2 * q] = part >> first & 1 ? at_place(columns + 4 * q, first) : T{};
    kept.at[2 * q + 1] = part >> second & 1 ? at_place(columns + 4 * q, second) : T{};
    code |= pair << (4 * q);
  }
  store_pack(values, kept);
  *byte = uint8_t(code);
}

// ---- magnitude ----

// The kept ones of eight columns.
template <class T>
__device__ __forceinline__ uint32_t prune_eight(const T (&columns)[8], int64_t valid) {
  float size[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) size[i] = i < valid ? magnitude(columns[i]) : -1.0f;
  const uint32_t set = largest_two(size[0], size[1], size[2], size[3]) |
                       largest_two(size[4], size[5], size[6], size[7]) << 4;
  return set & uint32_t(low_bits(valid < 8 ? valid : 8));
}

template <class T>
__global__ void mask_kernel(const T* weight, bool* mask, PackSizes size, bool aligned,
                            bool mask_aligned) {
  const int64_t in_row = ceil_div(size.columns, 8);
  const int64_t index = int64_t(blockIdx.x) * kPackThreads + threadIdx.x;
  if (index >= size.rows * in_row) return;
  const auto [row, byte] = byte_at(index, in_row);
  T columns[8];
  load_eight(columns, weight + row * size.columns, 8 * byte, size.columns, aligned);
  const uint32_t set = prune_eight(columns, size.columns - 8 * byte);
  bool kept[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) kept[i] = set >> i & 1;
  store_eight(mask + row * size.columns, kept, 8 * byte, size.columns, mask_aligned);
}

// Mask and compress in one pass.
template <class T>
__global__ void prune_kernel(const T* weight, T* values, uint8_t* metadata, PackSizes size,
                             bool aligned) {
  const int64_t index = int64_t(blockIdx.x) * kPackThreads + threadIdx.x;
  if (index >= size.rows * size.row_bytes) return;
  const auto [row, byte] = byte_at(index, size.row_bytes);
  T columns[8];
  load_eight(columns, weight + row * size.columns, 8 * byte, size.columns, aligned);
  const int64_t left = size.columns - 8 * byte;
  pack_eight(columns, prune_eight(columns, left > 0 ? left : 0), values + 4 * index,
             metadata + index);
}

// ---- transposable: the best of the 90 patterns with two in every row and column ----

// A pattern as 16 bits, four a row; in lexicographic order of the rows, each row one of the pairs
// {0,1} {0,2} {0,3} {1,2} {1,3} {2,3}.
constexpr int kPatternCount = 90;
struct Patterns {
  uint8_t pair[kPatternCount][4];
  uint16_t bits[kPatternCount];
};
constexpr Patterns all_patterns() {
  constexpr uint16_t pairs[6] = {0b0011, 0b0101, 0b1001, 0b0110, 0b1010, 0b1100};
  Patterns out{};
  int n = 0;
  for (int code = 0; code < 6 * 6 * 6 * 6; ++code) {
    const int row[4] = {code / 216, code / 36 % 6, code / 6 % 6, code % 6};
    bool two_in_each_column = true;
    for (int c = 0; c < 4; ++c) {
      int kept = 0;
      for (int r = 0; r < 4; ++r) kept += pairs[row[r]] >> c & 1;
      two_in_each_column = two_in_each_column && kept == 2;
    }
    if (!two_in_each_column) continue;
    for (int r = 0; r < 4; ++r) {
      out.pair[n][r] = uint8_t(row[r]);
      out.bits[n] = uint16_t(out.bits[n] | pairs[row[r]] << (4 * r));
    }
    ++n;
  }
  return out;
}

// Sums of the magnitudes in double, so that rounding decides nothing that the weights do not.
template <int kPattern>
__device__ __forceinline__ void try_pattern(const double (&pairs)[4][6], double& best,
                                            uint32_t& chosen) {
  constexpr Patterns all = all_patterns();
  constexpr int a = all.pair[kPattern][0], b = all.pair[kPattern][1], c = all.pair[kPattern][2],
                d = all.pair[kPattern][3];
  constexpr uint32_t bits = all.bits[kPattern];
  const double score = (pairs[0][a] + pairs[1][b]) + (pairs[2][c] + pairs[3][d]);
  const bool better = score > best;  // of equal ones the first
  best = better ? score : best;
  chosen = better ? bits : chosen;
}
template <int... kPattern>
__device__ __forceinline__ uint32_t best_pattern(const double (&pairs)[4][6],
                                                 std::integer_sequence<int, kPattern...>) {
  double best = -1.0;
  uint32_t chosen = 0;
  (try_pattern<kPattern>(pairs, best, chosen), ...);
  return chosen;
}

template <class T>
__device__ __forceinline__ uint32_t best_pattern(const T (&tile)[4][4]) {
  double pairs[4][6];
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    double sizes[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) sizes[c] = double(magnitude(tile[r][c]));
    pairs[r][0] = sizes[0] + sizes[1];
    pairs[r][1] = sizes[0] + sizes[2];
    pairs[r][2] = sizes[0] + sizes[3];
    pairs[r][3] = sizes[1] + sizes[2];
    pairs[r][4] = sizes[1] + sizes[3];
    pairs[r][5] = sizes[2] + sizes[3];
  }
  return best_pattern(pairs, std::make_integer_sequence<int, kPatternCount>());
}

// ---- tiles: masks that are 2:4 in rows and in columns ----
//
// A lane has a 4 x 4 tile, a warp eight across and four down: four neighbours either way hold 16
// elements of four lines (rows or columns), and after an exchange each of them one whole line:
// eight kept values and two bytes of metadata, stored in 16 bytes and 2 an access.

constexpr int kTilesAcross = 8;
constexpr int kBlockColumns = 4 * kTilesAcross;
constexpr int kBlockRows = 4 * kTileThreads / kTilesAcross;  // warps lie one below the other

// Where packed lines go; values is null where they are not wanted.
template <class T>
struct PackedLines {
  T* values;          // [lines, 4 * row_bytes]
  uint8_t* metadata;  // [lines, row_bytes]
  int64_t lines, row_bytes;
};

// What is stored of four elements of a line.
template <class T>
struct PackedFour {
  uint32_t values[sizeof(T) / 2];  // two of T
  uint32_t places;
};

// four[i] = four[i ^ by]
template <class T>
__device__ __forceinline__ void exchange_places(PackedFour<T> (&four)[4], int by) {
#pragma unroll
  for (int bit = 1; bit < 4; bit *= 2) {
    const bool swapped = by & bit;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & bit) continue;
      const PackedFour<T> low = four[i], high = four[i | bit];
      four[i] = swapped ? high : low;
      four[i | bit] = swapped ? low : high;
    }
  }
}

// Packs four lines, of which this lane has the elements 4 * group to 4 * group + 3 and its
// neighbours, `step` lanes apart, the others of the same 16. sets: the kept elements, four bits a
// line.
template <class T>
__device__ __forceinline__ void store_lines(const T (&tile)[4][4], uint32_t sets,
                                            const PackedLines<T>& to, int64_t first_line,
                                            int64_t group, int step) {
  const int own = lane_id() / step % 4;
  PackedFour<T> four[4];
#pragma unroll
  for (int line = 0; line < 4; ++line) {
    const uint32_t set = sets >> (4 * line) & 15, pair = places(set);
    const uint32_t first = pair & 3, second = pair >> 2;
    const T kept[2] = {set >> first & 1 ? at_place(tile[line], first) : T{},
                       set >> second & 1 ? at_place(tile[line], second) : T{}};
    memcpy(four[line].values, kept, sizeof kept);
    four[line].places = pair;
  }
  // to the lane i places from here (by xor) goes its line, from there comes ours
  exchange_places(four, own);
#pragma unroll
  for (int i = 1; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < int(sizeof(T) / 2); ++j)
      four[i].values[j] = __shfl_xor_sync(kAllLanes, four[i].values[j], i * step);
    four[i].places = __shfl_xor_sync(kAllLanes, four[i].places, i * step);
  }
  exchange_places(four, own);
  const int64_t line = first_line + own;
  if (line >= to.lines || group >= 2 * to.row_bytes) return;
  const int64_t byte = line * to.row_bytes + group / 4 * 2;
  constexpr int kPack = kPackOf16Bytes<T>;
#pragma unroll
  for (int i = 0; i < 8; i += kPack) {
    Pack<T, kPack> kept;
#pragma unroll
    for (int j = 0; j < kPack; j += 2) memcpy(kept.at + j, four[(i + j) / 2].values, 2 * sizeof(T));
    store_pack(to.values + 4 * byte + i, kept);
  }
  store_pack(to.metadata + byte, Pack<uint8_t, 2>{{uint8_t(four[0].places | four[1].places << 4),
                                                   uint8_t(four[2].places | four[3].places << 4)}});
}

__device__ __forceinline__ int valid_of_four(int64_t left) {
  return left < 0 ? 0 : left > 4 ? 4 : int(left);
}
template <class T>
__device__ __forceinline__ void load_four(T (&to)[4], const T* from, int valid, bool aligned) {
  if (aligned && valid == 4) {
    const auto four = load_pack<T, 4>(from);
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = four.at[i];
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = i < valid ? from[i] : T{};
  }
}

// Where the tile of this thread begins.
struct PackTile {
  int64_t row, column;
};
__device__ __forceinline__ PackTile pack_tile(int64_t columns) {
  const auto [block_row, block_column] = byte_at(blockIdx.x, ceil_div(columns, kBlockColumns));
  return {block_row * kBlockRows + int(threadIdx.x) / kTilesAcross * 4,
          block_column * kBlockColumns + int(threadIdx.x) % kTilesAcross * 4};
}

// Transposes a tile and its kept elements, whose new places are given back.
template <class T>
__device__ __forceinline__ uint32_t transpose_tile(T (&to)[4][4], const T (&tile)[4][4],
                                                   uint32_t bits) {
  uint32_t bits_t = 0;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      to[c][r] = tile[r][c];
      bits_t |= (bits >> (4 * r + c) & 1) << (4 * c + r);
    }
  }
  return bits_t;
}

// kGiven: packs what `mask` keeps; otherwise chooses the best pattern, and writes it to `mask`
// unless that is null. rows: pack of the weight; columns: of its transpose.
template <class T, bool kGiven>
__global__ void __launch_bounds__(kTileThreads)
    tiles_kernel(const T* weight, std::conditional_t<kGiven, const bool*, bool*> mask,
                 PackedLines<T> rows, PackedLines<T> columns, bool aligned, bool mask_aligned) {
  const auto [row, column] = pack_tile(columns.lines);
  T tile[4][4];
  uint32_t inside = 0, bits = 0;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const int64_t at = (row + r) * columns.lines + column;
    const int valid = row + r < rows.lines ? valid_of_four(columns.lines - column) : 0;
    inside |= uint32_t(low_bits(valid)) << (4 * r);
    load_four(tile[r], weight + at, valid, aligned);
    if constexpr (kGiven) {
      bool kept[4];
      load_four(kept, mask + at, valid, mask_aligned);
#pragma unroll
      for (int c = 0; c < 4; ++c) bits |= uint32_t(kept[c]) << (4 * r + c);
    }
  }
  if constexpr (!kGiven) bits = best_pattern(tile) & inside;
  T tile_t[4][4];
  const uint32_t bits_t = transpose_tile(tile_t, tile, bits);
  if constexpr (kGiven) {
#pragma unroll
    for (int i = 0; i < 16; i += 4)
      assert(
          __popc(bits >> i & 15) <= 2 && __popc(bits_t >> i & 15) <= 2 &&
          "recsparse_kernels: mask must keep at most 2 in each group of 4 columns and of 4 rows");
  } else if (mask) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const uint32_t kept = bits >> (4 * r);
      const Pack<bool, 4> four = {{bool(kept & 1), bool(kept & 2), bool(kept & 4), bool(kept & 8)}};
      bool* const at = mask + (row + r) * columns.lines + column;
      const int valid = row + r < rows.lines ? valid_of_four(columns.lines - column) : 0;
      if (mask_aligned && valid == 4) {
        store_pack(at, four);
      } else {
#pragma unroll
        for (int c = 0; c < 4; ++c)
          if (c < valid) at[c] = four.at[c];
      }
    }
  }
  if (rows.values) store_lines(tile, bits, rows, row, column / 4, 1);
  if (columns.values) store_lines(tile_t, bits_t, columns, column, row / 4, kTilesAcross);
}

// Four columns of the dense row: of two values at one place (which no mask gives) the second.
template <class T>
__device__ __forceinline__ void expand_four(T* columns, const T* kept, uint32_t pair) {
#pragma unroll
  for (uint32_t place = 0; place < 4; ++place)
    columns[place] = pair >> 2 == place ? kept[1] : (pair & 3) == place ? kept[0] : T{};
}

// The pack of the transpose (`columns`) from the pack of the weight. Of more than two stored in
// four rows of a column the first two stay: `places` finds no more.
template <class T>
__global__ void __launch_bounds__(kTileThreads)
    transpose_pack_kernel(const T* values, const uint8_t* metadata, PackSizes size,
                          PackedLines<T> columns, bool aligned) {
  const auto [row, column] = pack_tile(size.columns);
  const int valid = valid_of_four(size.columns - column);
  T tile[4][4], tile_t[4][4];
  uint32_t bits = 0;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    T kept[2] = {};
    uint32_t pair = 0;
    if (row + r < size.rows && valid > 0) {
      const int64_t byte = (row + r) * size.row_bytes + column / 8;
      const int64_t at = 4 * byte + column % 8 / 2;
      pair = metadata[byte] >> (column % 8) & 15;
      if (aligned) {
        const auto two = load_pack<T, 2>(values + at);
        kept[0] = two.at[0];
        kept[1] = two.at[1];
      } else {
        kept[0] = values[at];
        kept[1] = values[at + 1];
      }
      const uint32_t stored = 1u << (pair & 3) | 1u << (pair >> 2);
      bits |= (stored & uint32_t(low_bits(valid))) << (4 * r);
    }
    expand_four(tile[r], kept, pair);
  }
  const uint32_t bits_t = transpose_tile(tile_t, tile, bits);
  store_lines(tile_t, bits_t, columns, column, row / 4, kTilesAcross);
}

// ---- compress, gather, decompress ----

template <class T>
__global__ void compress_kernel(const T* weight, const bool* mask, T* values, uint8_t* metadata,
                                PackSizes size, bool aligned, bool mask_aligned) {
  const int64_t index = int64_t(blockIdx.x) * kPackThreads + threadIdx.x;
  if (index >= size.rows * size.row_bytes) return;
  const auto [row, byte] = byte_at(index, size.row_bytes);
  T columns[8];
  bool kept[8];
  load_eight(columns, weight + row * size.columns, 8 * byte, size.columns, aligned);
  load_eight(kept, mask + row * size.columns, 8 * byte, size.columns, mask_aligned);
  uint32_t set = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) set |= uint32_t(kept[i]) << i;
  assert(__popc(set & 15) <= 2 && __popc(set >> 4) <= 2 &&
         "recsparse_kernels: mask must keep at most 2 in each group of 4 columns");
  pack_eight(columns, set, values + 4 * index, metadata + index);
}

template <class T>
__global__ void gather_kernel(const T* dense, const uint8_t* metadata, T* values, PackSizes size,
                              bool aligned) {
  const int64_t index = int64_t(blockIdx.x) * kPackThreads + threadIdx.x;
  if (index >= size.rows * size.row_bytes) return;
  const auto [row, byte] = byte_at(index, size.row_bytes);
  T columns[8];
  load_eight(columns, dense + row * size.columns, 8 * byte, size.columns, aligned);
  const uint32_t code = metadata[index];
  Pack<T, 4> kept;
#pragma unroll
  for (int i = 0; i < 4; ++i) kept.at[i] = at_place(columns + i / 2 * 4, code >> (2 * i) & 3);
  store_pack(values + 4 * index, kept);
}

template <class T>
__device__ __forceinline__ void expand_eight(T (&columns)[8], const T (&kept)[4], uint32_t code) {
  expand_four(columns, kept, code & 15);
  expand_four(columns + 4, kept + 2, code >> 4 & 15);
}

template <class T>
__global__ void decompress_kernel(const T* values, const uint8_t* metadata, T* dense,
                                  PackSizes size, bool values_aligned, bool aligned) {
  const int64_t in_row = ceil_div(size.columns, 8);
  const int64_t index = int64_t(blockIdx.x) * kPackThreads + threadIdx.x;
  if (index >= size.rows * in_row) return;
  const auto [row, byte] = byte_at(index, in_row);
  const int64_t at = row * size.row_bytes + byte;
  T kept[4], columns[8];
  if (values_aligned) {
    const auto pack = load_pack<T, 4>(values + 4 * at);
#pragma unroll
    for (int i = 0; i < 4; ++i) kept[i] = pack.at[i];
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) kept[i] = values[4 * at + i];
  }
  expand_eight(columns, kept, metadata[at]);
  store_eight(dense + row * size.columns, columns, 8 * byte, size.columns, aligned);
}

}  // namespace recsparse::sparse24
