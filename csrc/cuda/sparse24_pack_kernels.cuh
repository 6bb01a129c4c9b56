// 2:4 masks, compress, gather, decompress.
//   weight, dense [O, I]   mask [O, I] bool   values [O, P / 2]   metadata [O, P / 8] uint8
//   P = I rounded up to 16. Byte j of a row of metadata holds the places of four kept values:
//     bits 0-1, 2-3   first and second kept column of group 2 j (columns 8 j to 8 j + 3)
//     bits 4-5, 6-7   the same of group 2 j + 1        first < second
//
// A thread has one byte of metadata: eight columns, four values. These kernels move bytes and do
// little else, so neighbours in a warp take neighbouring bytes, and rows that are aligned to it go
// 16 bytes an access. The transposable mask has a thread for each 4 x 4 tile.
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

// For each set the two places, first | second << 2: what is kept, then the lowest others,
// ascending.
constexpr uint64_t places_of_sets() {
  uint64_t out = 0;
  for (uint32_t set = 0; set < 16; ++set) {
    uint32_t kept = set;
    int count = int(set & 1) + int(set >> 1 & 1) + int(set >> 2 & 1) + int(set >> 3 & 1);
    for (int c = 0; c < 4 && count < 2; ++c)
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

// To a mask, or (mask null) packed. A thread has a tile; P is a multiple of 16, so two neighbours
// share a byte of metadata.
template <class T>
__global__ void __launch_bounds__(kTileThreads)
    transposable_kernel(const T* weight, bool* mask, T* values, uint8_t* metadata, PackSizes size) {
  const int64_t across = 2 * size.row_bytes, down = ceil_div(size.rows, 4);
  const int64_t index = int64_t(blockIdx.x) * kTileThreads + threadIdx.x;
  const bool inside = index < across * down;  // all lanes stay: the shuffle below needs them
  const auto [tile_row, tile] = byte_at(inside ? index : 0, across);
  const int64_t column = 4 * tile;
  T elements[4][4];
  double pairs[4][6];
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const int64_t row = 4 * tile_row + r;
    double sizes[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const bool valid = inside && row < size.rows && column + c < size.columns;
      elements[r][c] = valid ? weight[row * size.columns + column + c] : T{};
      sizes[c] = double(magnitude(elements[r][c]));
    }
    pairs[r][0] = sizes[0] + sizes[1];
    pairs[r][1] = sizes[0] + sizes[2];
    pairs[r][2] = sizes[0] + sizes[3];
    pairs[r][3] = sizes[1] + sizes[2];
    pairs[r][4] = sizes[1] + sizes[3];
    pairs[r][5] = sizes[2] + sizes[3];
  }
  const uint32_t bits = best_pattern(pairs, std::make_integer_sequence<int, kPatternCount>());
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const int64_t row = 4 * tile_row + r;
    const bool valid = inside && row < size.rows;
    uint32_t set = bits >> (4 * r) & 15;
    if (mask) {
#pragma unroll
      for (int c = 0; c < 4; ++c)
        if (valid && column + c < size.columns)
          mask[row * size.columns + column + c] = set >> c & 1;
      continue;
    }
    const int64_t left = size.columns - column;
    set &= uint32_t(low_bits(left < 0 ? 0 : left > 4 ? 4 : left));
    const uint32_t pair = places(set), first = pair & 3, second = pair >> 2;
    const uint32_t next = __shfl_down_sync(kAllLanes, pair, 1);
    if (!valid) continue;
    store_pack(values + 2 * (row * across + tile),
               Pack<T, 2>{{set >> first & 1 ? at_place(elements[r], first) : T{},
                           set >> second & 1 ? at_place(elements[r], second) : T{}}});
    if (tile % 2 == 0) metadata[(row * across + tile) / 2] = uint8_t(pair | next << 4);
  }
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

// Eight columns of the dense row: of two values at one place (which no mask gives) the second.
template <class T>
__device__ __forceinline__ void expand_eight(T (&columns)[8], const T (&kept)[4], uint32_t code) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int q = i / 4;
    const uint32_t first = code >> (4 * q) & 3, second = code >> (4 * q + 2) & 3;
    const uint32_t place = uint32_t(i % 4);
    columns[i] = second == place ? kept[2 * q + 1] : first == place ? kept[2 * q] : T{};
  }
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
