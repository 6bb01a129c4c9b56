// Gradients of fixed fan-in layers on CUDA, from that of the logits of a chunk of labels,
// grad [labels, pitch] with the rows of the batch innermost, zeros from B on.
//   grad_weight[o, f] = sum_b grad[o, b] * input[b, indices[o / G, f]]    grad_bias[o] = sum_b
//   grad[o, b] grad_input[b, i] = sum over (o, f) with indices[o / G, f] = i of grad[o, b] *
//   weight[o, f]
// One thread owns each sum, in an order that the sizes alone decide; nothing is added atomically.
// A gradient of the weight is stored, or used at once by an optimizer (Ending).
#pragma once

#include "fan_in_tiles_kernels.cuh"

namespace recsparse {

// ---- what becomes of a gradient of weight or bias ----

enum EndingKind : int { kEndSgd = 0, kEndAdam = 1, kEndAdamW = 2, kEndStore = 3 };

__device__ __forceinline__ uint32_t mix_32(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

template <class T>
struct Ending {
  T* out = nullptr;        // the parameter, or where its gradient is stored
  float* first = nullptr;  // moments
  float* second = nullptr;
  int64_t number = 0;  // of the tensor's first element, in the stochastic rounding
  int kind = kEndStore, moments = 0;
  float lr = 0, decay = 0, beta1 = 0, beta2 = 0, rest1 = 0, rest2 = 0, eps = 0, correction = 1;
  bool decays = false, rounds = false;
  uint32_t key_low = 0, key_high = 0;
  const float* grad_loss = nullptr;  // the gradient is multiplied by *grad_loss * factor
  float factor = 1;

  __device__ float scale() const { return grad_loss ? *grad_loss * factor : factor; }

  // Formulas: _update of reference/fan_in.py.
  __device__ void operator()(float grad, int64_t element) const {
    apply(kind == kEndStore ? 0.0f : to_float(out[element]), grad, element);
  }
  // w: the parameter's element, which the caller has read.
  __device__ void apply(float w, float grad, int64_t element) const {
    if (kind == kEndStore) {
      out[element] = from_float<T>(grad);
      return;
    }
    if (decays) {
      if (kind == kEndAdamW) {
        w *= decay;  // 1 - lr * weight_decay
      } else {
        grad += decay * w;
      }
    }
    if (moments == 0) {
      w -= lr * grad;
    } else {
      float m = first[element] * beta1;
      if (moments == 1) {
        m += grad;
        w -= lr * m;
      } else {
        m += rest1 * grad;
        const float v = second[element] * beta2 + rest2 * grad * grad;
        second[element] = v;
        w -= lr * m / (sqrtf(v / correction) + eps);
      }
      first[element] = m;
    }
    out[element] = from_float<T>(rounds ? round_stochastically(w, number + element) : w);
  }

  // A float32 whose low 16 bits are 0: up with the probability of the distance.
  __device__ float round_stochastically(float w, int64_t element) const {
    const uint32_t bits = __float_as_uint(w);
    if ((bits & 0x7f800000u) == 0x7f800000u) return w;
    const uint32_t x = mix_32(mix_32(uint32_t(element) ^ key_low) +
                              (uint32_t(uint64_t(element) >> 32) ^ key_high));
    return __uint_as_float((bits + (x >> 16)) & 0xffff0000u);
  }
};

// ---- weight and bias ----

// One block: one tile of labels x 32 kN inputs of the group, over all rows.
template <class T, int kM, int kN>
__global__ void __launch_bounds__(kGroupThreads)
    group_grad_weight_kernel(FanInLayer<T> layer, const T* grad, int64_t first_label,
                             int64_t first_tile, int across, Ending<T> ending) {
  constexpr int kLabels = 16 * kM, kInputs = 32 * kN, kPitch = kStep<T> + kPad<T>;
  constexpr int kResultPitch = kInputs + 4;
  static_assert(kLabels * kResultPitch * 4 <= 2 * (kLabels + kInputs) * kPitch * int(sizeof(T)));
  const TileLabels at = labels_of(layer, first_tile + blockIdx.x / across, true);
  const int64_t first_f = int64_t(blockIdx.x % across) * kInputs;
  T* memory = dynamic_shared<T>();
  const auto inputs = [&](int stage) { return memory + stage * (kLabels + kInputs) * kPitch; };
  const auto fetch = [&](int64_t b0, int stage) {
    if (b0 < layer.pitch) {
      gather_inputs<T, kInputs, kStep<T>>(inputs(stage), kPitch, layer, at.row, first_f, b0);
      fetch_tile<T, kLabels, kStep<T>>(inputs(stage) + kInputs * kPitch, kPitch,
                                       grad + (at.first - first_label) * layer.pitch + b0,
                                       layer.pitch, at.count, layer.pitch - b0, true);
    }
    cp_async_commit();
  };
  float acc[kM][kN][4];
  clear(acc);
  const int column = warp_id() * 8 * kN;
  fetch(0, 0);
  int stage = 0;
  for (int64_t b0 = 0; b0 < layer.pitch; b0 += kStep<T>, stage ^= 1) {
    fetch(b0 + kStep<T>, stage ^ 1);
    cp_async_wait<1>();
    __syncthreads();
    const T* x = inputs(stage) + column * kPitch;
    const T* g = inputs(stage) + kInputs * kPitch;
#pragma unroll
    for (int k = 0; k < kStep<T>; k += 16)
      multiply_16<T, false, true, kM, kN>(acc, g + k, kPitch, x + k, kPitch);
    __syncthreads();
  }
  cp_async_wait<0>();
  float* result = dynamic_shared<float>();
  store_fragments(acc, result + column, kResultPitch);
  __syncthreads();
  const float scale = ending.scale();
  for (int i = int(threadIdx.x); i < kLabels * kInputs; i += kGroupThreads) {
    const int o = i / kInputs, f = i % kInputs;
    if (o < at.count && first_f + f < layer.fan_in) {
      const int64_t element = (at.first + o) * layer.fan_in + first_f + f;
      const bool read = layer.column(at.row * layer.fan_in + first_f + f) >= 0;
      ending(read ? result[o * kResultPitch + f] * scale : 0.0f, element);
    }
  }
}

// `lanes` (a power of two up to 32) share eight successive weights of a label, over all rows.
template <class T>
__global__ void __launch_bounds__(kLabelThreads)
    label_grad_weight_kernel(FanInLayer<T> layer, const T* grad, int64_t first_label,
                             int64_t labels, int lanes, Ending<T> ending) {
  constexpr int kVector = kPackOf16Bytes<T>;
  const int64_t steps = ceil_div(layer.fan_in, kEntries);
  const int64_t task = (int64_t(blockIdx.x) * kLabelThreads + threadIdx.x) / lanes;
  const int part = int(threadIdx.x) % lanes;
  const int64_t local = task / steps, f = task % steps * kEntries, label = first_label + local;
  const bool live = local < labels;
  Entries<T> entries;
  float acc[kEntries];
#pragma unroll
  for (int i = 0; i < kEntries; ++i) acc[i] = 0.0f;
  if (live) {
    entries.load(layer, label, label / layer.group_size, f, false);
    for (int64_t b = part * kVector; b < layer.pitch; b += lanes * kVector) {
      const Pack<T, kVector> g = load_pack<T, kVector>(grad + local * layer.pitch + b);
#pragma unroll
      for (int i = 0; i < kEntries; ++i) {
        if (entries.column[i] >= 0) {
          const Pack<T, kVector> x =
              load_pack<T, kVector>(layer.x + entries.column[i] * layer.pitch + b);
#pragma unroll
          for (int v = 0; v < kVector; ++v)
            acc[i] = fmaf(to_float(g.at[v]), to_float(x.at[v]), acc[i]);
        }
      }
    }
  }
  for (int step = lanes / 2; step > 0; step /= 2) {
#pragma unroll
    for (int i = 0; i < kEntries; ++i) acc[i] += __shfl_xor_sync(kAllLanes, acc[i], step);
  }
  const float scale = ending.scale();
  for (int i = part; i < kEntries; i += lanes) {
    float own = 0.0f;
#pragma unroll
    for (int j = 0; j < kEntries; ++j)
      if (j == i) own = acc[j];
    if (live && f + i < layer.fan_in) ending(own * scale, label * layer.fan_in + f + i);
  }
}

// A warp a label.
template <class T>
__global__ void grad_bias_kernel(const T* grad, int64_t pitch, int64_t first_label, int64_t labels,
                                 Ending<T> ending) {
  const int64_t label = int64_t(blockIdx.x) * (kLabelThreads / kWarp) + warp_id();
  if (label >= labels) return;  // a whole warp
  float sum = 0.0f;
  for (int64_t b = lane_id(); b < pitch; b += kWarp) sum += to_float(grad[label * pitch + b]);
  sum = warp_sum(sum);
  if (lane_id() == 0) ending(sum * ending.scale(), first_label + label);
}

// ---- input, by group: sums in shared memory ----
//
// A block keeps the sums of one slice of rows over all inputs, and goes through a range of tiles. A
// warp owns eight rows (of the batch), so that no other touches its sums. Products of a tile:
//   shared[f, b] = sum over labels of weight[label, f] * grad[label, b]
// which the warp adds to the sums of input indices[group, f], eight inputs at once if all eight are
// different, else one after the other.

constexpr int kInputChunk = 128;  // inputs of the group held at once

template <class T, int kM>
struct GroupInputStage {
  static constexpr int kLabels = 16 * kM, kWeightPitch = kInputChunk + kPad<T>;
  static constexpr int64_t grad_pitch(int64_t slice) { return slice + kPad<T>; }
  static constexpr int64_t bytes(int64_t slice) {  // multiples of 16
    return kInputChunk * 4 + kLabels * (kWeightPitch + grad_pitch(slice)) * int64_t(sizeof(T));
  }
};

template <class T, int kM>
__global__ void group_grad_input_kernel(FanInLayer<T> layer, int64_t first_weight, const T* grad,
                                        int64_t first_label, int64_t first_tile, int64_t tiles,
                                        int slices, int slice, bool fresh,
                                        float* partial) {  // [slabs, I, pitch]
  using Stage = GroupInputStage<T, kM>;
  const int64_t slab = blockIdx.x / slices, slabs = gridDim.x / slices;
  const int64_t first_row = int64_t(blockIdx.x % slices) * slice;
  const int64_t begin = slab * tiles / slabs, end = (slab + 1) * tiles / slabs;
  const int64_t steps = ceil_div(layer.fan_in, kInputChunk);
  const int grad_pitch = int(Stage::grad_pitch(slice)), turn = slice / 8 - 1;
  float* sums = dynamic_shared<float>();  // [I, slice], eights of a row turned by the input
  const int64_t after_sums = layer.in_features * slice * int64_t(sizeof(float));
  const auto at_stage = [&](int stage, int64_t byte) {
    return after_sums + stage * Stage::bytes(slice) + byte;
  };
  const auto columns = [&](int stage) { return dynamic_shared<int32_t>(at_stage(stage, 0)); };
  const auto weights = [&](int stage) {
    return dynamic_shared<T>(at_stage(stage, kInputChunk * 4));
  };
  const auto grads = [&](int stage) {
    return weights(stage) + Stage::kLabels * Stage::kWeightPitch;
  };
  for (int64_t i = threadIdx.x; i < layer.in_features * slice; i += blockDim.x) sums[i] = 0.0f;
  const auto fetch = [&](int64_t item, int stage) {
    if (item < (end - begin) * steps) {
      const TileLabels at = labels_of(layer, first_tile + begin + item / steps, true);
      const int64_t f0 = item % steps * kInputChunk;
      // twice the column, plus one if another of its eight is the same
      for (int f = int(threadIdx.x); f < kInputChunk; f += int(blockDim.x)) {
        const int column =
            f0 + f < layer.fan_in ? layer.column(at.row * layer.fan_in + f0 + f) : -1;
        bool same = false;
#pragma unroll
        for (int s = 1; s < 8; ++s) same |= __shfl_xor_sync(kAllLanes, column, s) == column;
        const uint32_t any = __ballot_sync(kAllLanes, same && column >= 0);
        columns(stage)[f] = 2 * column + (any >> (lane_id() / 8 * 8) & 0xff ? 1 : 0);
      }
      fetch_tile<T, Stage::kLabels, kInputChunk>(
          weights(stage), Stage::kWeightPitch,
          layer.weight + (at.first - first_weight) * layer.fan_in + f0, layer.fan_in, at.count,
          layer.fan_in - f0, layer.vectors);
      constexpr int kVector = kPackOf16Bytes<T>;
      const int across = slice / kVector;
      for (int i = int(threadIdx.x); i < Stage::kLabels * across; i += int(blockDim.x)) {
        const int o = i / across, b = i % across * kVector;
        const bool valid = o < at.count && first_row + b < layer.pitch;
        const int64_t where = (at.first - first_label + o) * layer.pitch + first_row + b;
        cp_async_16(grads(stage) + o * grad_pitch + b, valid ? grad + where : grad, valid);
      }
    }
    cp_async_commit();
  };
  const int g = lane_id() / 4, t = lane_id() % 4, own = warp_id() * 8;
  const auto add = [&](int column, float first, float second) {
    float* p = sums + column * slice + ((own + 2 * t) ^ ((column & turn) * 8));
    Pack<float, 2> pair = load_pack<float, 2>(p);
    pair.at[0] += first;
    pair.at[1] += second;
    store_pack(p, pair);
  };
  int stage = 0;
  fetch(0, 0);
  for (int64_t item = 0; item < (end - begin) * steps; ++item, stage ^= 1) {
    fetch(item + 1, stage ^ 1);
    cp_async_wait<1>();
    __syncthreads();
    const int inputs = int(min(int64_t(kInputChunk), layer.fan_in - item % steps * kInputChunk));
    for (int f = 0; f < inputs; f += 16) {
      float acc[1][1][4];
      clear(acc);
#pragma unroll
      for (int k = 0; k < kM; ++k)
        multiply_16<T, true, false, 1, 1>(acc, weights(stage) + k * 16 * Stage::kWeightPitch + f,
                                          Stage::kWeightPitch,
                                          grads(stage) + k * 16 * grad_pitch + own, grad_pitch);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int entry = columns(stage)[f + h * 8 + g], column = entry >> 1;
        if (!__any_sync(kAllLanes, entry & 1 && column >= 0)) {
          if (column >= 0) add(column, acc[0][0][2 * h], acc[0][0][2 * h + 1]);
          __syncwarp();
        } else {
          for (int one = 0; one < 8; ++one) {
            if (one == g && column >= 0) add(column, acc[0][0][2 * h], acc[0][0][2 * h + 1]);
            __syncwarp();
          }
        }
      }
    }
    __syncthreads();
  }
  cp_async_wait<0>();
  __syncthreads();
  for (int64_t i = threadIdx.x; i < layer.in_features * slice; i += blockDim.x) {
    const int column = int(i / slice), b = int(i % slice);
    if (first_row + b >= layer.pitch) continue;
    float* target = partial + (slab * layer.in_features + column) * layer.pitch + first_row + b;
    const float sum = sums[column * slice + (b ^ ((column & turn) * 8))];
    *target = fresh ? sum : *target + sum;
  }
}

// ---- input, by label: entries sorted by input ----

constexpr int kSumThreads = 128;
constexpr int kSumBlocks = 6;  // 80 registers each: for more blocks ptxas would spill

// keys[e] = the input of entry e, in_features where there is none; positions[e] = e.
template <class T>
__global__ void entry_keys_kernel(FanInLayer<T> layer, int64_t first_entry, int64_t entries,
                                  uint32_t* keys, int32_t* positions) {
  const int64_t e = int64_t(blockIdx.x) * kLabelThreads + threadIdx.x;
  if (e >= entries) return;
  const int column = layer.column(first_entry + e);
  keys[e] = column >= 0 ? uint32_t(column) : uint32_t(layer.in_features);
  positions[e] = int32_t(e);
}

// The first of the sorted keys that is not below `key`.
template <class Key>
__device__ __forceinline__ int64_t lower_bound(const Key* keys, int64_t count, Key key) {
  int64_t low = 0, high = count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (keys[middle] < key) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// One block: an input x a part of its entries x a slice of rows. Threads that hold the same rows
// take every so-manieth entry, and are summed in the end.
template <class T>
__global__ void __launch_bounds__(kSumThreads, kSumBlocks)
    sum_by_input_kernel(FanInLayer<T> layer, int64_t first_weight, const T* grad,
                        int64_t first_label, int64_t labels, const uint32_t* keys,
                        const int32_t* positions, int64_t entries, int64_t parts, int lanes,
                        int across, bool fresh, float* partial) {
  constexpr int kVector = kPackOf16Bytes<T>;
  const int64_t first_row = int64_t(blockIdx.x % across) * lanes * kVector;
  const int64_t part = blockIdx.x / across % parts;
  const uint32_t column = uint32_t(blockIdx.x / across / parts);
  const int64_t from = lower_bound(keys, entries, column);
  const int64_t upto = lower_bound(keys, entries, column + 1);
  const int64_t size = ceil_div(upto - from, parts), begin = from + part * size;
  const int64_t end = min(upto, begin + size);
  const int slot = int(threadIdx.x) / lanes, slots = kSumThreads / lanes;
  const int64_t b = first_row + int64_t(threadIdx.x) % lanes * kVector;
  const int64_t first_index_row = first_label / layer.group_size;
  float acc[kVector];
#pragma unroll
  for (int v = 0; v < kVector; ++v) acc[v] = 0.0f;
  if (b < layer.pitch) {
    for (int64_t e = begin + slot; e < end; e += slots) {
      const int64_t position = positions[e];
      const int64_t row = first_index_row + position / layer.fan_in, f = position % layer.fan_in;
      const int64_t last = min((row + 1) * layer.group_size, first_label + labels);
      for (int64_t label = max(row * layer.group_size, first_label); label < last; ++label) {
        const float w = to_float(layer.weight[(label - first_weight) * layer.fan_in + f]);
        const Pack<T, kVector> g =
            load_pack<T, kVector>(grad + (label - first_label) * layer.pitch + b);
#pragma unroll
        for (int v = 0; v < kVector; ++v) acc[v] = fmaf(w, to_float(g.at[v]), acc[v]);
      }
    }
  }
  RS_SHARED(float, sums, [kSumThreads * 8]);
#pragma unroll
  for (int v = 0; v < kVector; ++v) sums[threadIdx.x * kVector + v] = acc[v];
  __syncthreads();
  const int rows = lanes * kVector;
  for (int r = int(threadIdx.x); r < rows; r += kSumThreads) {
    if (first_row + r >= layer.pitch) continue;
    float sum = 0.0f;
    for (int s = 0; s < slots; ++s) sum += sums[s * rows + r];
    float* target = partial + (part * layer.in_features + column) * layer.pitch + first_row + r;
    *target = fresh ? sum : *target + sum;
  }
}

// grad_input[b, i] = scale * the sum over the slabs of partial[slab, i, b].
template <class T>
__global__ void reduce_slabs_kernel(const float* partial, int64_t slabs, int64_t in_features,
                                    int64_t pitch, int64_t batch, const float* grad_loss,
                                    float factor, T* grad_input) {
  RS_SHARED(float, tile, [kTransposeTile][kTransposeTile + 1]);
  const int64_t across = ceil_div(batch, kTransposeTile);
  const int64_t b0 = blockIdx.x % across * kTransposeTile,
                i0 = blockIdx.x / across * kTransposeTile;
  const int x = int(threadIdx.x), y = int(threadIdx.y);
  const float scale = grad_loss ? *grad_loss * factor : factor;
  for (int j = y; j < kTransposeTile; j += kTransposeRows) {
    float sum = 0.0f;
    if (i0 + j < in_features && b0 + x < batch)
      for (int64_t s = 0; s < slabs; ++s)
        sum += partial[(s * in_features + i0 + j) * pitch + b0 + x];
    tile[j][x] = sum * scale;
  }
  __syncthreads();
  for (int j = y; j < kTransposeTile; j += kTransposeRows)
    if (b0 + j < batch && i0 + x < in_features)
      grad_input[(b0 + j) * in_features + i0 + x] = from_float<T>(tile[x][j]);
}

}  // namespace recsparse
