// Sums of rows that share a key, in a fixed order, CUDA:
//
//   out[destination(key)] = sum over positions with that key of weight * source[row]
//
// Lookups come sorted by key. A few lanes own kChunk positions and the columns of a piece each; a
// run of equal keys that lies within its chunk is written at once. Of the others a chunk has at
// most two: one that came from before (slot 0 of its parts) and one that begins in it and goes on
// (slot 1); a second kernel adds them up, so that one popular row is the work of many.
#pragma once

#include "mma_tile.cuh"

namespace recsparse::low_rank {

constexpr int kChunk = 32;

template <class T>
struct Segments {
  const uint32_t* keys;  // [N] rising; those from `limit` on do not count
  const int32_t* order;  // [N] the lookup at each position
  int64_t count, limit;
  Matrix<T> source;          // [S, R]
  const int32_t* source_of;  // of a lookup its row of source, or null: the lookup's number modulo S
  const float* weights;      // of a lookup, or null
  const T* narrow_weights;   // likewise
  const int32_t* rank;       // [N] 1 + row of out, or null: the row is the key
  T* out;                    // [rows, R]
  int out_width;
  float* parts;  // [2 * chunks, R]
};

template <class T>
__device__ __forceinline__ int64_t destination(const Segments<T>& p, int64_t position,
                                               uint32_t key) {
  return p.rank ? int64_t(p.rank[position]) - 1 : int64_t(key);
}

// One thread: kChunk positions, the columns of one piece. pieces_in_row threads share a chunk.
template <class T>
__global__ void segments_kernel(const Segments<T> p, int64_t pieces_in_row) {
  constexpr int kPiece = kPackOf16Bytes<T>, kUnroll = 4;
  const int64_t thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t chunk = thread / pieces_in_row, column = thread % pieces_in_row * kPiece;
  const int64_t first = chunk * kChunk;
  if (first >= p.count) return;
  const int64_t end = first + kChunk < p.count ? first + kChunk : p.count;
  const int64_t columns = p.source.columns;
  const int count = elements_inside<kPiece>(column, columns);
  Piece<T> sum = {};
  uint32_t key = p.keys[first];
  bool from_before = first > 0 && p.keys[first - 1] == key;
  const auto flush = [&](int64_t position, bool goes_on) {
    if (int64_t(key) >= p.limit) return;
    if (from_before || goes_on) {
      float* to = p.parts + (2 * chunk + (from_before ? 0 : 1)) * columns + column;
#pragma unroll
      for (int e = 0; e < kPiece; ++e)
        if (e < count) to[e] = sum.at[e];
    } else {
      write_piece(p.out + destination(p, position, key) * columns + column, sum, count,
                  p.out_width);
    }
  };
  for (int64_t at = first; at < end; at += kUnroll) {
    uint32_t keys[kUnroll];
    Piece<T> rows[kUnroll];
    float weights[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const bool here = at + u < end;
      keys[u] = here ? p.keys[at + u] : key;
      const bool counts = here && int64_t(keys[u]) < p.limit;
      const int64_t n = counts ? p.order[at + u] : 0;
      const int64_t row = !counts ? 0 : p.source_of ? p.source_of[n] : n % p.source.rows;
      rows[u] = read_piece(p.source.at + row * p.source.stride + column, counts ? count : 0,
                           p.source.width);
      weights[u] = !counts            ? 0.0f
                   : p.weights        ? p.weights[n]
                   : p.narrow_weights ? to_float(p.narrow_weights[n])
                                      : 1.0f;
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (at + u >= end) break;
      if (keys[u] != key) {
        flush(at + u - 1, false);
        sum = {};
        key = keys[u];
        from_before = false;
      }
#pragma unroll
      for (int e = 0; e < kPiece; ++e) sum.at[e] += weights[u] * rows[u].at[e];
    }
  }
  flush(end - 1, end < p.count && p.keys[end] == key);
}

constexpr int kJoinWays = 8;  // warps that share the chunks of a run, 32 columns at a time

// One block: the run that begins in a chunk and goes on behind it, if there is one.
template <class T>
__global__ void __launch_bounds__(kJoinWays* kWarp) join_segments_kernel(const Segments<T> p) {
  RS_SHARED(float, sums, [kJoinWays][kWarp]);
  const int64_t chunk = blockIdx.x, first = chunk * kChunk, end = first + kChunk;
  if (end >= p.count) return;
  const uint32_t key = p.keys[end - 1];
  if (p.keys[end] != key || int64_t(key) >= p.limit || (first > 0 && p.keys[first - 1] == key))
    return;
  int64_t low = end, high = p.count;  // the first position behind the run
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (p.keys[middle] == key)
      low = middle + 1;
    else
      high = middle;
  }
  const int64_t last = (low - 1) / kChunk, columns = p.source.columns;
  for (int64_t c0 = 0; c0 < columns; c0 += kWarp) {
    const int64_t column = c0 + lane_id();
    float sum = 0.0f;
    if (column < columns) {
      if (warp_id() == 0) sum = p.parts[(2 * chunk + 1) * columns + column];
#pragma unroll 4
      for (int64_t c = chunk + 1 + warp_id(); c <= last; c += kJoinWays)
        sum += p.parts[2 * c * columns + column];
    }
    sums[warp_id()][lane_id()] = sum;
    __syncthreads();
    if (warp_id() == 0 && column < columns) {
      for (int way = 1; way < kJoinWays; ++way) sum += sums[way][lane_id()];
      p.out[destination(p, end - 1, key) * columns + column] = from_float<T>(sum);
    }
    __syncthreads();
  }
}

}  // namespace recsparse::low_rank
