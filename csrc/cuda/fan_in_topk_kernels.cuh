// Best labels, and scores of given labels, of fixed fan-in layers on CUDA.
//
// Top-k without the [B, O] logits: of each tile of labels and each row only the best logit is kept.
// The k best tiles of a row hold its k best labels, since each of those is beaten by fewer than k
// others, and so is its tile; the logits of these tiles are computed again. Logits compare as keys
//   value in an order that integers have (32 bits), 2^32 - 1 - label (32 bits)
// all different, so that equal logits come lowest label first, and any way of selecting gives the
// same. 0 is no label.
#pragma once

#include "fan_in_grad_kernels.cuh"
#include "fan_in_tiles_kernels.cuh"

namespace recsparse {

__device__ __forceinline__ uint64_t key_of(float z, int64_t label) {  // NaN above all
  uint32_t bits = z == 0.0f ? 0u : __float_as_uint(z);                // -0 equals 0
  bits = z != z ? 0xffffffffu : (bits & 0x80000000u ? ~bits : bits | 0x80000000u);
  return uint64_t(bits) << 32 | (0xffffffffu - uint32_t(label));
}
__device__ __forceinline__ float value_of(uint64_t key) {
  const uint32_t bits = uint32_t(key >> 32);
  return __uint_as_float(bits & 0x80000000u ? bits & 0x7fffffffu : ~bits);
}

// Epilogue: the best key of each row in a tile, to one column.
template <class T>
struct BestOfTile {
  uint64_t* keys;  // [B, columns]
  int64_t columns, first_column;
  int across;

  __device__ void operator()(const FanInLayer<T>& layer, const TileLabels& at, int64_t first_row,
                             int rows, const float* z, int pitch, int64_t tile) const {
    for (int b = int(threadIdx.x); b < rows; b += int(blockDim.x)) {
      uint64_t best = 0;
      for (int o = 0; o < at.count; ++o)
        best = max(best, key_of(z[o * pitch + b] + bias_of(layer, at.first + o), at.first + o));
      keys[(first_row + b) * columns + first_column + tile / across] = best;
    }
  }
};

// A few more registers than two blocks can have.
template <>
inline constexpr int kLabelBlocks<BestOfTile<bf16>> = 1;

// ---- the k largest of a row of keys ----

constexpr int kSelectThreads = 512;

// One block: a row. Radix select from the highest byte down, then the keys from the limit on, in no
// order. At least k keys are not 0.
static __global__ void __launch_bounds__(kSelectThreads)
    select_keys_kernel(const uint64_t* keys, int64_t columns, int64_t count, int64_t k,
                       uint64_t* selected, int64_t selected_pitch) {
  RS_SHARED(int, bins, [256]);
  RS_SHARED(uint64_t, limit, [1]);
  RS_SHARED(int64_t, rank, [1]);
  RS_SHARED(int, found, [1]);
  const uint64_t* row = keys + blockIdx.x * columns;
  const int thread = int(threadIdx.x);
  if (thread == 0) {
    limit[0] = 0;
    rank[0] = k;
    found[0] = 0;
  }
  for (int shift = 56; shift >= 0; shift -= 8) {
    if (thread < 256) bins[thread] = 0;
    __syncthreads();
    const uint64_t prefix = limit[0];
    for (int64_t i = thread; i < count; i += kSelectThreads) {
      const uint64_t key = row[i];
      if (shift == 56 || key >> (shift + 8) == prefix >> (shift + 8))
        atomicAdd(bins + (key >> shift & 255), 1);
    }
    __syncthreads();
    if (thread == 0) {
      int64_t left = rank[0];
      int digit = 255;
      while (digit > 0 && left > bins[digit]) left -= bins[digit--];
      rank[0] = left;
      limit[0] = prefix | uint64_t(digit) << shift;
    }
    __syncthreads();
  }
  const uint64_t least = limit[0];
  for (int64_t i = thread; i < count; i += kSelectThreads) {
    const uint64_t key = row[i];
    if (key >= least && key) {
      const int place = atomicAdd(found, 1);
      if (place < k) selected[blockIdx.x * selected_pitch + place] = key;
    }
  }
}

// to[row][i] = from[row][i], i < columns.
static __global__ void copy_rows_kernel(const uint64_t* from, int64_t from_pitch, int64_t columns,
                                        int64_t count, uint64_t* to, int64_t to_pitch) {
  const int64_t i = int64_t(blockIdx.x) * kLabelThreads + threadIdx.x;
  if (i < count)
    to[i / columns * to_pitch + i % columns] = from[i / columns * from_pitch + i % columns];
}

// values, labels[rank] = those of each key, whose rank is how many are larger. One block: 256 keys
// of a row.
template <class T>
__global__ void rank_keys_kernel(const uint64_t* selected, int64_t k, T* values, int64_t* labels) {
  RS_SHARED(uint64_t, others, [kLabelThreads]);
  const int64_t steps = ceil_div(k, kLabelThreads);
  const uint64_t* row = selected + blockIdx.x / steps * k;
  const int64_t i = blockIdx.x % steps * kLabelThreads + threadIdx.x;
  const uint64_t key = i < k ? row[i] : 0;
  int64_t rank = 0;
  for (int64_t first = 0; first < k; first += kLabelThreads) {
    __syncthreads();
    others[threadIdx.x] = first + threadIdx.x < k ? row[first + threadIdx.x] : 0;
    __syncthreads();
    const int here = int(min(int64_t(kLabelThreads), k - first));
    for (int j = 0; j < here; ++j) rank += others[j] > key;
  }
  if (i < k) {
    values[blockIdx.x / steps * k + rank] = from_float<T>(value_of(key));
    labels[blockIdx.x / steps * k + rank] = int64_t(0xffffffffu - uint32_t(key));
  }
}

// ---- logits of single labels: a warp each ----

template <class T>
__device__ __forceinline__ float logit(const FanInLayer<T>& layer, const T* row, int64_t label) {
  const int64_t w = label * layer.fan_in, c = label / layer.group_size * layer.fan_in;
  float sum = 0.0f;
  for (int64_t f = lane_id(); f < layer.fan_in; f += kWarp) {
    const int column = layer.column(c + f);
    if (column >= 0) sum = fmaf(to_float(layer.weight[w + f]), to_float(row[column]), sum);
  }
  return warp_sum(sum) + bias_of(layer, label);
}

// Keys of the labels of the selected tiles of each row.
template <class T>
__global__ void __launch_bounds__(kLabelThreads)
    tile_keys_kernel(FanInLayer<T> layer, const T* input, const uint64_t* selected, int64_t tiles,
                     int64_t pairs, bool grouped, uint64_t* keys) {  // [rows, tiles, labels]
  const int64_t pair = int64_t(blockIdx.x) * (kLabelThreads / kWarp) + warp_id();
  if (pair >= pairs) return;  // a whole warp
  const int64_t best = int64_t(0xffffffffu - uint32_t(selected[pair]));
  int64_t tile = best / layer.labels_of_tile;
  if (grouped)
    tile = best / layer.group_size * layer.tiles_of_group +
           best % layer.group_size / layer.labels_of_tile;
  const TileLabels at = labels_of(layer, tile, grouped);
  const T* row = input + pair / tiles * layer.in_features;
  for (int o = 0; o < int(layer.labels_of_tile); ++o) {
    uint64_t key = 0;
    if (o < at.count) key = key_of(logit(layer, row, at.first + o), at.first + o);
    if (lane_id() == 0) keys[pair * layer.labels_of_tile + o] = key;
  }
}

// output[b, c] = the logit of row b for label candidates[b, c]; 0 where that is no label.
template <class T, class Label>
__global__ void __launch_bounds__(kLabelThreads)
    score_kernel(FanInLayer<T> layer, const T* input, const Label* candidates, int64_t of_row,
                 int64_t pairs, T* output) {
  const int64_t pair = int64_t(blockIdx.x) * (kLabelThreads / kWarp) + warp_id();
  if (pair >= pairs) return;  // a whole warp
  const int64_t label = int64_t(candidates[pair]);
  const bool inside = label >= 0 && label < layer.out_features;
  const float z = inside ? logit(layer, input + pair / of_row * layer.in_features, label) : 0.0f;
  if (lane_id() == 0) output[pair] = from_float<T>(z);
}

// ---- gradients of scores: entries and candidates sorted, so that each sum has one owner ----

// keys[(b, c, f)] = row * I + the input that the entry reads; rows * I where there is none.
template <class T, class Label>
__global__ void score_entry_keys_kernel(FanInLayer<T> layer, const Label* candidates,
                                        int64_t of_row, int64_t rows, int64_t entries,
                                        uint32_t* keys, int32_t* positions) {
  const int64_t e = int64_t(blockIdx.x) * kLabelThreads + threadIdx.x;
  if (e >= entries) return;
  const int64_t pair = e / layer.fan_in, label = int64_t(candidates[pair]);
  int column = -1;
  if (label >= 0 && label < layer.out_features)
    column = layer.column(label / layer.group_size * layer.fan_in + e % layer.fan_in);
  keys[e] =
      uint32_t(column < 0 ? rows * layer.in_features : pair / of_row * layer.in_features + column);
  positions[e] = int32_t(e);
}

// grad_input[b, i] = sum of grad[b, c] * weight[label, f] over its entries. A thread each.
template <class T, class Label>
__global__ void sum_score_entries_kernel(FanInLayer<T> layer, const T* grad,
                                         const Label* candidates, const uint32_t* keys,
                                         const int32_t* positions, int64_t entries, int64_t sums,
                                         T* grad_input) {
  const int64_t i = int64_t(blockIdx.x) * kLabelThreads + threadIdx.x;
  if (i >= sums) return;
  float sum = 0.0f;
  for (int64_t e = lower_bound(keys, entries, uint32_t(i)); e < entries && keys[e] == uint32_t(i);
       ++e) {
    const int64_t pair = positions[e] / layer.fan_in, f = positions[e] % layer.fan_in;
    const int64_t label = int64_t(candidates[pair]);
    sum = fmaf(to_float(grad[pair]), to_float(layer.weight[label * layer.fan_in + f]), sum);
  }
  grad_input[i] = from_float<T>(sum);
}

template <class Label>
__global__ void candidate_keys_kernel(const Label* candidates, int64_t pairs, int64_t out_features,
                                      uint32_t* keys, int32_t* positions) {
  const int64_t p = int64_t(blockIdx.x) * kLabelThreads + threadIdx.x;
  if (p >= pairs) return;
  const int64_t label = int64_t(candidates[p]);
  keys[p] = uint32_t(label >= 0 && label < out_features ? label : out_features);
  positions[p] = int32_t(p);
}

// grad_weight[o, f] = sum over the pairs that ask for label o, in order. A warp a label.
template <class T>
__global__ void __launch_bounds__(kLabelThreads)
    score_grad_weight_kernel(FanInLayer<T> layer, const T* grad, const T* input, int64_t of_row,
                             const uint32_t* keys, const int32_t* positions, int64_t pairs,
                             T* grad_weight) {
  const int64_t label = int64_t(blockIdx.x) * (kLabelThreads / kWarp) + warp_id();
  if (label >= layer.out_features) return;  // a whole warp
  const int64_t begin = lower_bound(keys, pairs, uint32_t(label));
  const int64_t end = lower_bound(keys, pairs, uint32_t(label) + 1);
  for (int64_t f = lane_id(); f < layer.fan_in; f += kWarp) {
    const int column = begin < end ? layer.column(label / layer.group_size * layer.fan_in + f) : -1;
    float sum = 0.0f;
    if (column >= 0) {
      for (int64_t p = begin; p < end; ++p) {
        const int64_t pair = positions[p];
        sum = fmaf(to_float(grad[pair]),
                   to_float(input[pair / of_row * layer.in_features + column]), sum);
      }
    }
    grad_weight[label * layer.fan_in + f] = from_float<T>(sum);
  }
}

}  // namespace recsparse
