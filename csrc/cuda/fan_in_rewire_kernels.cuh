// Topology update of a fixed fan-in layer on CUDA, in place: drop the smallest connections, regrow
// as many at random inputs. Scores, ties and random numbers: reference/fan_in.py, bit for bit.
//   limit    "the n smallest of the layer": a radix select, 8 bits at a time, over the keys
//            score bits (31) | random tie (32); a float >= 0 orders as its bits do
//   drop     which connections go: below the threshold, before the limit, or the n smallest of a
//   row regrow   one block a row: draws in rounds until no two connections read the same input
//   reset    weights and moments of what was dropped
#pragma once

#include "../fan_in_random.h"
#include "primitives.h"

namespace recsparse {

constexpr int kRewireThreads = 256, kRowThreads = 128;

template <class T>
struct Connections {
  const T* weight;  // [O, F]
  int64_t rows, out_features, fan_in, group_size;
  uint64_t key;  // of all random numbers

  __device__ int64_t count() const { return rows * fan_in; }

  // Bits of the root mean square of a connection's weights over the labels of its group.
  __device__ uint32_t score_bits(int64_t position) const {
    if (group_size == 1) return __float_as_uint(to_float(weight[position])) & 0x7fffffffu;
    const int64_t row = position / fan_in, f = position % fan_in;
    const int64_t begin = row * group_size, end = min(begin + group_size, out_features);
    double sum = 0.0;
    for (int64_t label = begin; label < end; ++label) {
      const double w = double(to_float(weight[label * fan_in + f]));
      sum += w * w;
    }
    return __float_as_uint(float(sqrt(sum / double(end - begin)))) & 0x7fffffffu;
  }
  __device__ uint64_t order(int64_t position) const {
    const uint64_t tie = split_mix(key - uint64_t(position) * kGolden) >> 32;
    return uint64_t(score_bits(position)) << 32 | tie;
  }
};

// The limit so far: bits from the highest down, and the rank of the limit among the keys that have
// them.
struct RewireLimit {
  uint64_t key;
  int64_t rank;
};

static __global__ void begin_limit_kernel(int64_t rank, RewireLimit* limit,
                                          unsigned long long* bins) {
  bins[threadIdx.x] = 0;
  if (threadIdx.x == 0) *limit = {0, rank};
}

template <class T>
__global__ void __launch_bounds__(kRewireThreads)
    limit_histogram_kernel(Connections<T> connections, const RewireLimit* limit, int shift,
                           unsigned long long* bins) {  // [256]
  RS_SHARED(int, counts, [256]);
  counts[threadIdx.x] = 0;
  __syncthreads();
  const uint64_t prefix = limit->key;
  const int64_t count = connections.count();
  for (int64_t i = int64_t(blockIdx.x) * kRewireThreads + threadIdx.x; i < count;
       i += int64_t(gridDim.x) * kRewireThreads) {
    const uint64_t key = connections.order(i);
    if (shift == 56 || key >> (shift + 8) == prefix >> (shift + 8))
      atomicAdd(counts + (key >> shift & 255), 1);
  }
  __syncthreads();
  if (counts[threadIdx.x])  // whole numbers: atomics in any order give the same
    atomicAdd(bins + threadIdx.x, static_cast<unsigned long long>(counts[threadIdx.x]));
}

// The digit that holds the limit's rank; the bins are cleared. One block of 256.
static __global__ void limit_digit_kernel(RewireLimit* limit, unsigned long long* bins, int shift) {
  if (threadIdx.x == 0) {
    int64_t left = limit->rank;
    int digit = 0;
    while (digit < 255 && left > int64_t(bins[digit])) left -= int64_t(bins[digit++]);
    limit->key |= uint64_t(digit) << shift;
    limit->rank = left;
  }
  __syncthreads();
  bins[threadIdx.x] = 0;
}

// Keys at the limit in each block of 256 connections: they are told apart by position.
template <class T>
__global__ void __launch_bounds__(kRewireThreads)
    count_equal_kernel(Connections<T> connections, const RewireLimit* limit, int64_t* equal) {
  const int64_t i = int64_t(blockIdx.x) * kRewireThreads + threadIdx.x;
  const bool same = i < connections.count() && connections.order(i) == limit->key;
  const int count = __syncthreads_count(same);
  if (threadIdx.x == 0) equal[blockIdx.x] = count;
}

// dropped[i] = 1 for scores below the threshold, or where there is a limit for the keys before it
// and the first of those at it.
template <class T>
__global__ void __launch_bounds__(kRewireThreads)
    drop_kernel(Connections<T> connections, float threshold, const RewireLimit* limit,
                const int64_t* equal_before, int8_t* dropped) {
  RS_SHARED(int, of_warp, [kRewireThreads / kWarp]);
  const int64_t i = int64_t(blockIdx.x) * kRewireThreads + threadIdx.x;
  const bool live = i < connections.count();
  bool drop = false;
  if (limit) {
    const uint64_t key = live ? connections.order(i) : ~uint64_t(0);
    const bool same = live && key == limit->key;
    const uint32_t votes = __ballot_sync(kAllLanes, same);
    if (lane_id() == 0) of_warp[warp_id()] = __popc(votes);
    __syncthreads();
    int64_t before = equal_before[blockIdx.x] + __popc(votes & ((1u << lane_id()) - 1));
    for (int w = 0; w < warp_id(); ++w) before += of_warp[w];
    drop = key < limit->key || (same && before < limit->rank);
  } else if (live) {
    drop = __uint_as_float(connections.score_bits(i)) < threshold;
  }
  if (live) dropped[i] = drop;
}

// The `count` smallest of each row: a connection counts those before it. One block a row.
template <class T>
__global__ void __launch_bounds__(kRowThreads)
    drop_of_row_kernel(Connections<T> connections, int64_t count, int8_t* dropped) {
  RS_SHARED(uint64_t, keys, [kRowThreads]);
  const int64_t fan_in = connections.fan_in, first = int64_t(blockIdx.x) * fan_in;
  for (int64_t f0 = 0; f0 < fan_in; f0 += kRowThreads) {
    const int64_t f = f0 + threadIdx.x;
    const uint64_t own = f < fan_in ? connections.order(first + f) : 0;
    int64_t before = 0;
    for (int64_t e0 = 0; e0 < fan_in; e0 += kRowThreads) {
      __syncthreads();
      const int64_t e = e0 + threadIdx.x;
      keys[threadIdx.x] = e < fan_in ? connections.order(first + e) : ~uint64_t(0);
      __syncthreads();
      const int here = int(min(int64_t(kRowThreads), fan_in - e0));
      for (int j = 0; j < here; ++j) before += keys[j] < own || (keys[j] == own && e0 + j < f);
    }
    if (f < fan_in) dropped[first + f] = before < count;
  }
}

__device__ __forceinline__ int draw(uint64_t key, int64_t position, int attempt,
                                    int64_t in_features) {  // uniform in [0, I)
  const uint64_t bits =
      split_mix(key + uint64_t(position) * kGolden + uint64_t(attempt) * kRound) >> 32;
  return int(bits * uint64_t(in_features) >> 32);
}

template <class Index>
__global__ void __launch_bounds__(kRewireThreads)
    redraw_kernel(const int8_t* dropped, int64_t count, uint64_t key, int64_t in_features,
                  Index* indices) {
  const int64_t i = int64_t(blockIdx.x) * kRewireThreads + threadIdx.x;
  if (i < count && dropped[i]) indices[i] = Index(draw(key, i, 0, in_features));
}

// One block a row. In each round those still without an input draw one, and keep it if no other has
// it and none before them drew it too; in the end, the next free input above the last draw.
template <class Index>
__global__ void __launch_bounds__(kRowThreads)
    regrow_kernel(const int8_t* dropped, int64_t fan_in, uint64_t key, int64_t in_features,
                  Index* indices) {
  int32_t* columns = dynamic_shared<int32_t>();  // [F], -1: none yet
  int32_t* drawn = columns + fan_in;             // [F], -1: not waiting
  int32_t* kept = drawn + fan_in;                // [F]
  const int64_t first = int64_t(blockIdx.x) * fan_in;
  int waiting = 0;
  for (int64_t f = threadIdx.x; f < fan_in; f += kRowThreads) {
    const bool drop = dropped[first + f] != 0;
    columns[f] = drop ? -1 : int32_t(indices[first + f]);
    waiting += drop;
  }
  int left = __syncthreads_or(waiting);
  if (!left) return;
  for (int attempt = 0; attempt < kDrawRounds && left; ++attempt) {
    for (int64_t f = threadIdx.x; f < fan_in; f += kRowThreads)
      drawn[f] = columns[f] < 0 ? draw(key, first + f, attempt, in_features) : -1;
    __syncthreads();
    waiting = 0;
    for (int64_t f = threadIdx.x; f < fan_in; f += kRowThreads) {
      bool clash = false;
      for (int64_t e = 0; drawn[f] >= 0 && e < fan_in; ++e)
        clash |= columns[e] == drawn[f] || (e < f && drawn[e] == drawn[f]);
      kept[f] = drawn[f] >= 0 && !clash;
      waiting += clash;
    }
    left = __syncthreads_or(waiting);
    for (int64_t f = threadIdx.x; f < fan_in; f += kRowThreads)
      if (kept[f]) columns[f] = drawn[f];
  }
  __syncthreads();
  if (left && threadIdx.x == 0) {
    for (int64_t f = 0; f < fan_in; ++f) {
      if (columns[f] >= 0) continue;
      int column = draw(key, first + f, kDrawRounds - 1, in_features);
      for (int64_t e = 0; e < fan_in; ++e) {
        if (columns[e] != column) continue;
        column = column + 1 < in_features ? column + 1 : 0;
        e = -1;  // from the first again
      }
      columns[f] = column;
    }
  }
  __syncthreads();
  for (int64_t f = threadIdx.x; f < fan_in; f += kRowThreads)
    if (dropped[first + f]) indices[first + f] = Index(columns[f]);
}

// Zero, or uniform in (-scale, scale), where the connection was dropped.
template <class V>
__global__ void __launch_bounds__(kRewireThreads)
    reset_kernel(const int8_t* dropped, int64_t count, int64_t fan_in, int64_t group_size,
                 uint64_t key, float scale, V* values) {
  const int64_t i = int64_t(blockIdx.x) * kRewireThreads + threadIdx.x;
  if (i >= count) return;
  const int64_t label = i / fan_in;
  if (!dropped[label / group_size * fan_in + i % fan_in]) return;
  if constexpr (std::is_integral_v<V>) {  // moments, of any type: all bits 0
    values[i] = 0;
  } else {
    const uint64_t bits = split_mix(~key + uint64_t(i) * kGolden);
    const float uniform = float(bits >> 40) * 5.9604644775390625e-8f;  // 2^-24
    values[i] = from_float<V>(scale == 0.0f ? 0.0f : (2.0f * uniform - 1.0f) * scale);
  }
}

// total = how many were dropped. One block.
static __global__ void count_dropped_kernel(const int8_t* dropped, int64_t count, int64_t* total) {
  int64_t sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) sum += dropped[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) *total = sum;
}

}  // namespace recsparse
