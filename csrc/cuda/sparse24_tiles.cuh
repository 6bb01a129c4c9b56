// What the products with a 2:4 weight share: where the weight lies, tiles of it expanded, where
// sums go, and which tile a block has.
#pragma once

#include "activation.cuh"
#include "mma_tile.cuh"
#include "sparse24_pack_kernels.cuh"

namespace recsparse::sparse24 {

constexpr int kSumThreads = 256;

// values [O, P / 2] and metadata [O, P / 8] of a weight [O, I].
template <class T>
struct SparseWeight {
  const T* values;
  const uint8_t* metadata;
  int64_t rows, row_bytes;  // O, P / 8
  bool values_aligned;      // to four values, which a byte of metadata describes
};
template <class T>
SparseWeight<T> sparse_weight(const T* values, const uint8_t* metadata, int64_t rows,
                              int64_t row_bytes) {
  return {values, metadata, rows, row_bytes, is_aligned(values, 4 * int64_t(sizeof(T)))};
}

// Eight columns as they are stored.
template <class T>
struct PackedEight {
  T kept[4];
  uint32_t code;
};
template <class T>
__device__ __forceinline__ PackedEight<T> load_packed(const SparseWeight<T>& weight, int64_t row,
                                                      int64_t byte) {
  PackedEight<T> packed = {{}, 0x44};  // zeros: which places they have does not matter
  if (row < weight.rows && byte < weight.row_bytes) {
    const int64_t at = row * weight.row_bytes + byte;
    packed.code = weight.metadata[at];
    if (weight.values_aligned) {
      const auto pack = load_pack<T, 4>(weight.values + 4 * at);
#pragma unroll
      for (int i = 0; i < 4; ++i) packed.kept[i] = pack.at[i];
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) packed.kept[i] = weight.values[4 * at + i];
    }
  }
  return packed;
}

// A tile of W [rows o][columns i], dense in shared memory, on the way in a thread's registers.
template <class TileOf, int kThreads, class T>
struct ExpandedTile {
  static constexpr int kInRow = TileOf::kColumns / 8;
  static constexpr int kTurns = TileOf::kRows * kInRow / kThreads;
  static_assert(TileOf::kRows * kInRow % kThreads == 0, "every thread has as many bytes");
  PackedEight<T> packed[kTurns];

  __device__ __forceinline__ void fetch(const SparseWeight<T>& weight, int64_t row,
                                        int64_t column) {
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
      const int at = int(threadIdx.x) + i * kThreads;
      packed[i] = load_packed(weight, row + at / kInRow, column / 8 + at % kInRow);
    }
  }
  __device__ __forceinline__ void expand(T* tile) const {
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
      const int at = int(threadIdx.x) + i * kThreads;
      T columns[8];
      expand_eight(columns, packed[i].kept, packed[i].code);
      store_eight(tile + at / kInRow * TileOf::kStride, columns, at % kInRow * 8,
                  int64_t(TileOf::kColumns), true);
    }
  }
};

// ---- where sums go ----

// The sums of part p of the depth, float32 [rows, columns] each; sum_parts_kernel adds them up, in
// order.
struct Parts {
  float* at;  // null: there is one part, and it goes to its place
  int64_t count;
};

// Two neighbours of a row, as a thread writes them: lanes beside each other fill whole sectors of
// rows of any alignment, and what is computed on the way is compiled twice, not once for each of
// the elements of a 16-byte store.
constexpr int kPair = 2;
template <class T>
__device__ __forceinline__ void write_pair(T* to, const float (&values)[kPair], int count,
                                           bool aligned) {
  if (aligned && count == kPair) {
    store_pack<T, kPair>(to, {{from_float<T>(values[0]), from_float<T>(values[1])}});
  } else {
#pragma unroll
    for (int e = 0; e < kPair; ++e)
      if (e < count) to[e] = from_float<T>(values[e]);
  }
}

// output [rows, columns] = sum
template <class T>
struct PlainOutput {
  T* output;
  int64_t rows, columns;
  bool aligned;  // pairs of every row
  Parts parts;

  // `count` elements of a row from a column on
  __device__ __forceinline__ void write(int64_t row, int64_t column, int count,
                                        float (&values)[kPair], int64_t part) const {
    const int64_t at = row * columns + column;
    if (parts.at) return write_pair(parts.at + part * parts.count + at, values, count, aligned);
    write_pair(output + at, values, count, aligned);
  }
  __device__ __forceinline__ void write_total(int64_t at, float total) const {
    output[at] = from_float<T>(total);
  }
};

// output [rows, columns] = activation(sum + bias), and the sum where it is kept.
template <class T>
struct LinearOutput {
  T* output;
  T* sum;         // null: not kept
  const T* bias;  // or null
  int64_t rows, columns;
  Activation activation;
  bool aligned;  // pairs of every row of output and sum
  Parts parts;

  __device__ __forceinline__ void write(int64_t row, int64_t column, int count,
                                        float (&values)[kPair], int64_t part) const {
    const int64_t at = row * columns + column;
    if (parts.at) return write_pair(parts.at + part * parts.count + at, values, count, aligned);
    if (bias) {
#pragma unroll
      for (int e = 0; e < kPair; ++e)
        if (e < count) values[e] += to_float(bias[column + e]);
    }
    if (sum) write_pair(sum + at, values, count, aligned);
#pragma unroll
    for (int e = 0; e < kPair; ++e) values[e] = activate(values[e], activation);
    write_pair(output + at, values, count, aligned);
  }
  __device__ __forceinline__ void write_total(int64_t at, float total) const {
    if (bias) total += to_float(bias[at % columns]);
    if (sum) sum[at] = from_float<T>(total);
    output[at] = from_float<T>(activate(total, activation));
  }
};

// The output's element i is made of the sum over p of parts[p][i].
template <class Output>
__global__ void sum_parts_kernel(Parts parts, int64_t part_count, Output to) {
  const int64_t at = int64_t(blockIdx.x) * kSumThreads + threadIdx.x;
  if (at >= parts.count) return;
  float total = 0.0f;
  for (int64_t p = 0; p < part_count; ++p) total += parts.at[p * parts.count + at];
  to.write_total(at, total);
}

// ---- which tile a block has ----

struct TileAt {
  int64_t m, n;
};

// Blocks that run together share rows and columns: eight tiles down, then the next ones across.
__device__ __forceinline__ TileAt tile_of_block(int64_t block, int64_t tiles_m, int64_t tiles_n) {
  constexpr int64_t kDown = 8;
  const int64_t group = block / (kDown * tiles_n), first = group * kDown;
  const int64_t down = tiles_m - first < kDown ? tiles_m - first : kDown;
  const int64_t in_group = block - group * kDown * tiles_n;
  return {first + in_group % down, in_group / down};
}

}  // namespace recsparse::sparse24
