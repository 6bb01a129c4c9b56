// Fixed fan-in on CUDA: the layer as kernels see it, and the logits of one tile.
//   z[o, b] = sum_f weight[o, f] * input[b, indices[o / G, f]] + bias[o]
// Tiles are labels x rows. The input is transposed first, x [I, pitch] with the rows innermost, so
// that what one index asks for is contiguous; rows [B, pitch) are zero. Two ways to a tile:
//   by label   G < 8: lanes hold 16 bytes of rows each, for one label; x lies in shared memory
//   where
//              it fits
//   by group   G >= 8: the inputs of a group are gathered into shared memory once, then multiplied
//              on tensor cores with [labels of the group, F] (float32 by fused multiply-adds)
// A tile ends in shared memory as [labels, rows] float32, where an Epilogue takes it from. An index
// out of range reads zero.
#pragma once

#include <cstdint>

#include "primitives.h"
#include "ptx.h"

namespace recsparse {

constexpr int64_t kGroupedFrom =
    8;  // labels of a group from which half-empty tiles of 16 still win

template <class T>
struct FanInLayer {
  const T* x;             // [I, pitch]
  const T* weight;        // [O, F]
  const T* bias;          // [O] or null
  const int16_t* narrow;  // indices [ceil(O / G), F], if they are int16
  const int32_t* wide;    // if they are int32; the branch is the same for all threads
  int64_t batch, pitch, in_features, out_features, fan_in, group_size;
  int64_t labels_of_tile, tiles_of_group;
  bool vectors;  // rows of weight and indices start at 16 bytes

  // The input that an entry reads, or -1 where it is out of range.
  __device__ int column(int64_t entry) const {
    const int64_t c = narrow ? int64_t(narrow[entry]) : int64_t(wide[entry]);
    return c >= 0 && c < in_features ? int(c) : -1;
  }
};

// The labels of a tile: `count` of them from `first`, which share an index row if by group.
struct TileLabels {
  int64_t first, row;
  int count;
};
template <class T>
__device__ __forceinline__ TileLabels labels_of(const FanInLayer<T>& layer, int64_t tile,
                                                bool grouped) {
  TileLabels at;
  int64_t end;
  if (grouped) {
    at.row = tile / layer.tiles_of_group;
    at.first = at.row * layer.group_size + tile % layer.tiles_of_group * layer.labels_of_tile;
    end = min((at.row + 1) * layer.group_size, layer.out_features);
  } else {
    at.row = -1;
    at.first = tile * layer.labels_of_tile;
    end = layer.out_features;
  }
  at.count = int(min(end - at.first, layer.labels_of_tile));
  return at;
}

// ---- products of tiles in shared memory ----

template <class T>
constexpr int kPad = 16 / int(sizeof(T));  // added to a row, so that eight rows hit all banks
template <class T>
constexpr int kStep = sizeof(T) == 2 ? 64 : 32;  // of the reduction, a stage of the pipeline

// acc[m][n] += A B, 16 steps deep. A(m, k) is a[m][k], or a[k][m] if transposed; B(k, n) is
// b[k][n], or b[n][k] if transposed. Fragments as mma m16n8k16 has them (ptx.h); float32 in the
// same places.
template <class T, bool kTransposedA, bool kTransposedB, int kM, int kN>
__device__ __forceinline__ void multiply_16(float (&acc)[kM][kN][4], const T* a, int a_pitch,
                                            const T* b, int b_pitch) {
  const int lane = lane_id();
  if constexpr (sizeof(T) == 2) {
    const int i = lane / 8, j = lane % 8;
    uint32_t fragments[kN][2];
    if constexpr (kN == 1) {
      uint32_t(&r)[2] = fragments[0];
      const int k = i % 2 * 8;
      if constexpr (kTransposedB) {
        ldmatrix_x2(r, b + j * b_pitch + k);
      } else {
        ldmatrix_x2_trans(r, b + (k + j) * b_pitch);
      }
    } else {
#pragma unroll
      for (int n = 0; n < kN; n += 2) {
        uint32_t r[4];
        const int k = i % 2 * 8, column = n * 8 + i / 2 * 8;
        if constexpr (kTransposedB) {
          ldmatrix_x4(r, b + (column + j) * b_pitch + k);
        } else {
          ldmatrix_x4_trans(r, b + (k + j) * b_pitch + column);
        }
        fragments[n][0] = r[0];
        fragments[n][1] = r[1];
        fragments[n + 1][0] = r[2];
        fragments[n + 1][1] = r[3];
      }
    }
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      uint32_t r[4];
      const int row = m * 16 + i % 2 * 8, k = i / 2 * 8;
      if constexpr (kTransposedA) {
        ldmatrix_x4_trans(r, a + (k + j) * a_pitch + row);
      } else {
        ldmatrix_x4(r, a + (row + j) * a_pitch + k);
      }
#pragma unroll
      for (int n = 0; n < kN; ++n) mma_m16n8k16<T>(acc[m][n], r, fragments[n]);
    }
  } else {
    const int g = lane / 4, t = lane % 4;
#pragma unroll 4
    for (int k = 0; k < 16; ++k) {
      float left[kM][2], right[kN][2];
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int row = m * 16 + h * 8 + g;
          left[m][h] = kTransposedA ? a[k * a_pitch + row] : a[row * a_pitch + k];
        }
      }
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        const int column = n * 8 + 2 * t;
        if constexpr (kTransposedB) {
          right[n][0] = b[column * b_pitch + k];
          right[n][1] = b[(column + 1) * b_pitch + k];
        } else {
          const Pack<float, 2> pair = load_pack<float, 2>(b + k * b_pitch + column);
          right[n][0] = pair.at[0];
          right[n][1] = pair.at[1];
        }
      }
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int n = 0; n < kN; ++n) {
#pragma unroll
          for (int d = 0; d < 4; ++d)
            acc[m][n][d] = fmaf(left[m][d / 2], right[n][d % 2], acc[m][n][d]);
        }
      }
    }
  }
}

template <int kM, int kN>
__device__ __forceinline__ void clear(float (&acc)[kM][kN][4]) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int d = 0; d < 4; ++d) acc[m][n][d] = 0.0f;
    }
  }
}

// The fragments of a warp to target[row][column], from `column` on.
template <int kM, int kN>
__device__ __forceinline__ void store_fragments(const float (&acc)[kM][kN][4], float* target,
                                                int pitch) {
  const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int d = 0; d < 4; ++d)
        target[(m * 16 + d / 2 * 8 + g) * pitch + n * 8 + 2 * t + d % 2] = acc[m][n][d];
    }
  }
}

// tile[r][c] = source[r * pitch + c], c < kColumns; zero from `rows` and `columns` on. Asynchronous
// where rows start at 16 bytes (and `columns` is a multiple of as many).
template <class T, int kRows, int kColumns>
__device__ __forceinline__ void fetch_tile(T* tile, int tile_pitch, const T* source, int64_t pitch,
                                           int64_t rows, int64_t columns, bool vectors) {
  if (vectors) {
    constexpr int kVector = kPackOf16Bytes<T>, kAcross = kColumns / kVector;
    for (int i = int(threadIdx.x); i < kRows * kAcross; i += int(blockDim.x)) {
      const int r = i / kAcross, c = i % kAcross * kVector;
      const bool valid = r < rows && c < columns;
      cp_async_16(tile + r * tile_pitch + c, valid ? source + r * pitch + c : source, valid);
    }
  } else {
    for (int i = int(threadIdx.x); i < kRows * kColumns; i += int(blockDim.x)) {
      const int r = i / kColumns, c = i % kColumns;
      tile[r * tile_pitch + c] =
          r < rows && c < columns ? source[r * pitch + c] : from_float<T>(0.0f);
    }
  }
}

// tile[f][b] = x[indices[row, first_f + f]][first_b + b]: f < kRows, b < kColumns; zero outside.
template <class T, int kRows, int kColumns>
__device__ __forceinline__ void gather_inputs(T* tile, int tile_pitch, const FanInLayer<T>& layer,
                                              int64_t row, int64_t first_f, int64_t first_b) {
  constexpr int kVector = kPackOf16Bytes<T>, kAcross = kColumns / kVector;
  for (int i = int(threadIdx.x); i < kRows * kAcross; i += int(blockDim.x)) {
    const int f = i / kAcross, b = i % kAcross * kVector;
    const bool inside = first_f + f < layer.fan_in && first_b + b < layer.pitch;
    const int column = inside ? layer.column(row * layer.fan_in + first_f + f) : -1;
    const T* source = column >= 0 ? layer.x + column * layer.pitch + first_b + b : layer.x;
    cp_async_16(tile + f * tile_pitch + b, source, column >= 0);
  }
}

// ---- logits by group ----

constexpr int kGroupThreads = 128;  // four warps, side by side along the rows
constexpr int kGroupBlocks = 4;     // 128 registers each: for more blocks ptxas would spill

template <class T, int kM, int kN>
struct GroupTile {
  static constexpr int kLabels = 16 * kM, kRows = 32 * kN;
  static constexpr int kRowPitch = kRows + kPad<T>, kStepPitch = kStep<T> + kPad<T>;
  static constexpr int kInputs = kStep<T> * kRowPitch, kWeights = kLabels * kStepPitch;
  static constexpr int kResultPitch = kRows + 1;  // read along rows and along labels
  static constexpr int64_t kStages = 2 * (kInputs + kWeights) * int64_t(sizeof(T));
  static constexpr int64_t kResult = kLabels * kResultPitch * int64_t(sizeof(float));
  static constexpr int64_t kBytes = kStages > kResult ? kStages : kResult;
  static_assert(kBytes <= 48 * 1024, "several blocks share a multiprocessor");
};

// One block: one tile of labels x kRows rows; the rows of a tile run side by side.
template <class T, int kM, int kN, class Epilogue>
__global__ void __launch_bounds__(kGroupThreads, kGroupBlocks)
    group_logits_kernel(FanInLayer<T> layer, int64_t first_tile, int across, Epilogue epilogue) {
  using Tile = GroupTile<T, kM, kN>;
  const int64_t tile = first_tile + blockIdx.x / across;
  const int64_t first_row = int64_t(blockIdx.x % across) * Tile::kRows;
  const TileLabels at = labels_of(layer, tile, true);
  T* memory = dynamic_shared<T>();
  const auto inputs = [&](int stage) { return memory + stage * (Tile::kInputs + Tile::kWeights); };
  const auto fetch = [&](int64_t f0, int stage) {
    if (f0 < layer.fan_in) {
      gather_inputs<T, kStep<T>, Tile::kRows>(inputs(stage), Tile::kRowPitch, layer, at.row, f0,
                                              first_row);
      fetch_tile<T, Tile::kLabels, kStep<T>>(inputs(stage) + Tile::kInputs, Tile::kStepPitch,
                                             layer.weight + at.first * layer.fan_in + f0,
                                             layer.fan_in, at.count, layer.fan_in - f0,
                                             layer.vectors);
    }
    cp_async_commit();
  };
  float acc[kM][kN][4];
  clear(acc);
  const int column = warp_id() * 8 * kN;
  fetch(0, 0);
  int stage = 0;
  for (int64_t f0 = 0; f0 < layer.fan_in; f0 += kStep<T>, stage ^= 1) {
    fetch(f0 + kStep<T>, stage ^ 1);
    cp_async_wait<1>();
    __syncthreads();
    if (first_row + column < layer.pitch) {  // the same for a whole warp
      const T* x = inputs(stage) + column;
      const T* w = inputs(stage) + Tile::kInputs;
#pragma unroll
      for (int k = 0; k < kStep<T>; k += 16)
        multiply_16<T, false, false, kM, kN>(acc, w + k, Tile::kStepPitch, x + k * Tile::kRowPitch,
                                             Tile::kRowPitch);
    }
    __syncthreads();
  }
  cp_async_wait<0>();
  float* z = dynamic_shared<float>();
  store_fragments(acc, z + column, Tile::kResultPitch);
  __syncthreads();
  epilogue(layer, at, first_row, int(min(int64_t(Tile::kRows), layer.batch - first_row)), z,
           Tile::kResultPitch, int64_t(blockIdx.x));
}

// ---- logits by label ----

constexpr int kLabelThreads = 256;
template <class Epilogue>
inline constexpr int kLabelBlocks = 2;  // 128 registers each, likewise
constexpr int kEntries = 8;             // of a label, whose loads are in flight at once

// The weights and columns of entries [f, f + 8) of a label.
template <class T>
struct Entries {
  int column[kEntries];  // -1: none
  float weight[kEntries];

  __device__ __forceinline__ void load(const FanInLayer<T>& layer, int64_t label, int64_t row,
                                       int64_t f, bool with_weight) {
    const int64_t w = label * layer.fan_in + f, c = row * layer.fan_in + f;
    if (layer.vectors && f + kEntries <= layer.fan_in) {
      constexpr int kVector = kPackOf16Bytes<T>;
      if (with_weight) {
#pragma unroll
        for (int i = 0; i < kEntries; i += kVector) {
          const Pack<T, kVector> pack = load_pack<T, kVector>(layer.weight + w + i);
#pragma unroll
          for (int j = 0; j < kVector; ++j) weight[i + j] = to_float(pack.at[j]);
        }
      }
      if (layer.narrow) {
        const Pack<int16_t, 8> pack = load_pack<int16_t, 8>(layer.narrow + c);
#pragma unroll
        for (int i = 0; i < kEntries; ++i) column[i] = pack.at[i];
      } else {
#pragma unroll
        for (int i = 0; i < kEntries; i += 4) {
          const Pack<int32_t, 4> pack = load_pack<int32_t, 4>(layer.wide + c + i);
#pragma unroll
          for (int j = 0; j < 4; ++j) column[i + j] = pack.at[j];
        }
      }
#pragma unroll
      for (int i = 0; i < kEntries; ++i)
        if (column[i] < 0 || column[i] >= layer.in_features) column[i] = -1;
    } else {
#pragma unroll
      for (int i = 0; i < kEntries; ++i) {
        const bool live = f + i < layer.fan_in;
        column[i] = live ? layer.column(c + i) : -1;
        weight[i] = live && with_weight ? to_float(layer.weight[w + i]) : 0.0f;
      }
    }
  }
};

// One block: tiles of labels, `stride` apart, of one slice of rows. `lanes` hold the slice's rows,
// 16 bytes each, for one label.
template <class T, bool kInShared, class Epilogue>
__global__ void __launch_bounds__(kLabelThreads, kLabelBlocks<Epilogue>)
    label_logits_kernel(FanInLayer<T> layer, int64_t first_tile, int64_t tiles, int lanes,
                        int across, Epilogue epilogue) {
  constexpr int kVector = kPackOf16Bytes<T>;
  const int rows = lanes * kVector, pitch = rows + 1;
  const int64_t first_row = int64_t(blockIdx.x % across) * rows, stride = gridDim.x / across;
  float* z = dynamic_shared<float>();
  T* slice = dynamic_shared<T>(ceil_div(int64_t(layer.labels_of_tile) * pitch * 4, 128) * 128);
  if constexpr (kInShared) {
    for (int64_t i = threadIdx.x; i < layer.in_features * lanes; i += kLabelThreads) {
      const int64_t b = first_row + i % lanes * kVector;
      const bool valid = b < layer.pitch;
      cp_async_16(slice + i * kVector, valid ? layer.x + i / lanes * layer.pitch + b : layer.x,
                  valid);
    }
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
  }
  const int own = int(threadIdx.x) / lanes, part = int(threadIdx.x) % lanes * kVector;
  const bool live = first_row + part < layer.pitch;
  const T* x = kInShared ? slice + part : layer.x + first_row + part;
  const int64_t x_pitch = kInShared ? int64_t(rows) : layer.pitch;
  for (int64_t tile = blockIdx.x / across; tile < tiles; tile += stride) {
    const TileLabels at = labels_of(layer, first_tile + tile, false);
    const int64_t label = at.first + own, row = label / layer.group_size;
    float acc[kVector];
#pragma unroll
    for (int v = 0; v < kVector; ++v) acc[v] = 0.0f;
    if (own < at.count && live) {
      for (int64_t f = 0; f < layer.fan_in; f += kEntries) {
        Entries<T> entries;
        entries.load(layer, label, row, f, true);
        Pack<T, kVector> pack[kEntries];
#pragma unroll
        for (int i = 0; i < kEntries; ++i)
          if (entries.column[i] >= 0)
            pack[i] = load_pack<T, kVector>(x + entries.column[i] * x_pitch);
#pragma unroll
        for (int i = 0; i < kEntries; ++i) {
          if (entries.column[i] >= 0) {
#pragma unroll
            for (int v = 0; v < kVector; ++v)
              acc[v] = fmaf(entries.weight[i], to_float(pack[i].at[v]), acc[v]);
          }
        }
      }
    }
#pragma unroll
    for (int v = 0; v < kVector; ++v) z[own * pitch + part + v] = acc[v];
    __syncthreads();
    epilogue(layer, at, first_row, int(min(int64_t(rows), layer.batch - first_row)), z, pitch,
             tile * across + blockIdx.x % across);
    __syncthreads();
  }
}

// ---- epilogues: what becomes of a tile ----

template <class T>
__device__ __forceinline__ float bias_of(const FanInLayer<T>& layer, int64_t label) {
  return layer.bias ? to_float(layer.bias[label]) : 0.0f;
}

// output[b, o], successive labels by successive threads.
template <class T>
struct StoreLogits {
  T* output;  // [B, O]

  __device__ void operator()(const FanInLayer<T>& layer, const TileLabels& at, int64_t first_row,
                             int rows, const float* z, int pitch, int64_t) const {
    for (int i = int(threadIdx.x); i < rows * at.count; i += int(blockDim.x)) {
      const int b = i / at.count, o = i % at.count;
      output[(first_row + b) * layer.out_features + at.first + o] =
          from_float<T>(z[o * pitch + b] + bias_of(layer, at.first + o));
    }
  }
};

// ---- transposes ----

constexpr int kTransposeTile = 32, kTransposeRows = 8;

// out[c][r] = in[r][first + c] for c < columns, r < pitch; zero from `rows` on.
template <class T>
__global__ void transpose_kernel(const T* in, int64_t rows, int64_t in_pitch, int64_t first,
                                 int64_t columns, T* out, int64_t pitch) {
  RS_SHARED(T, tile, [kTransposeTile][kTransposeTile + 1]);
  const int64_t across = ceil_div(pitch, kTransposeTile);
  const int64_t r0 = blockIdx.x % across * kTransposeTile,
                c0 = blockIdx.x / across * kTransposeTile;
  const int x = int(threadIdx.x), y = int(threadIdx.y);
  for (int j = y; j < kTransposeTile; j += kTransposeRows) {
    const int64_t r = r0 + j, c = c0 + x;
    tile[j][x] = r < rows && c < columns ? in[r * in_pitch + first + c] : from_float<T>(0.0f);
  }
  __syncthreads();
  for (int j = y; j < kTransposeTile; j += kTransposeRows)
    if (c0 + j < columns && r0 + x < pitch) out[(c0 + j) * pitch + r0 + x] = tile[x][j];
}

}  // namespace recsparse
