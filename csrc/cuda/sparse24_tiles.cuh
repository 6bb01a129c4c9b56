// What the products with a 2:4 weight share: where the weight lies, tiles of it expanded, where
// sums go, and which tile a block has.
#pragma once

#include "activation.cuh"
#include "mma_tile.cuh"
#include "sparse24_pack_kernels.cuh"

namespace recsparse {

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
  PackedEight<T> packed = {{}, 0x44};  // zeros at the places that every row's end has
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

template <int kCount>
__device__ __forceinline__ void write_floats(float* to, const float (&values)[kCount], int count,
                                             bool aligned) {
  if (aligned && count == kCount) {
#pragma unroll
    for (int e = 0; e < kCount; e += 4)
      store_pack<float, 4>(to + e, {{values[e], values[e + 1], values[e + 2], values[e + 3]}});
  } else {
#pragma unroll
    for (int e = 0; e < kCount; ++e)
      if (e < count) to[e] = values[e];
  }
}

// output [B, O] = activation(sum + bias), and the sum where it is kept.
template <class T>
struct LinearOutput {
  T* output;
  T* sum;         // null: not kept
  const T* bias;  // or null
  int64_t rows, columns;
  Activation activation;
  int width;  // of output and sum (`Matrix`)
  Parts parts;

  // `count` elements of row b from column o on
  __device__ __forceinline__ void write(int64_t b, int64_t o, int count, Piece<T> piece,
                                        int64_t part) const {
    constexpr int kPiece = kPackOf16Bytes<T>;
    const int64_t at = b * columns + o;
    if (parts.at)
      return write_floats(parts.at + part * parts.count + at, piece.at, count, columns % 4 == 0);
    if (bias) {
#pragma unroll
      for (int e = 0; e < kPiece; ++e)
        if (e < count) piece.at[e] += to_float(bias[o + e]);
    }
    if (sum) write_piece(sum + at, piece, count, width);
    if (activation != Activation::kNone) {
#pragma unroll
      for (int e = 0; e < kPiece; ++e) piece.at[e] = activate(piece.at[e], activation);
    }
    write_piece(output + at, piece, count, width);
  }
};

// output[i] = activation(sum over p of parts[p][i], + bias[i % columns])
template <class T>
__global__ void sum_parts_kernel(Parts parts, int64_t part_count, LinearOutput<T> to) {
  const int64_t at = int64_t(blockIdx.x) * kSumThreads + threadIdx.x;
  if (at >= parts.count) return;
  float total = 0.0f;
  for (int64_t p = 0; p < part_count; ++p) total += parts.at[p * parts.count + at];
  if (to.bias) total += to_float(to.bias[at % to.columns]);
  if (to.sum) to.sum[at] = from_float<T>(total);
  to.output[at] = from_float<T>(activate(total, to.activation));
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

}  // namespace recsparse
