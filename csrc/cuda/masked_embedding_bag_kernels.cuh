// Lookups in a masked table.
//   output[b, d] = scale(b) sum over the bag's lookups j of weights[j] W[indices[j], d], or their
//   maximum
// A team owns a bag. Each of its lanes finds the row of another lookup (so that many headers are
// under way at once); then the team goes through these rows, every lane loading its own columns.
#pragma once

#include "masked_embedding_rows.cuh"

namespace recsparse {

constexpr int kRowsInFlight = 4;

// Calls body(l, slice) for lookups l in [0, count) of a turn, kRowsInFlight slices ahead of their
// use: load(l, slice, u) first for all, then use(l, u).
template <int kLanes, class Load, class Use>
__device__ __forceinline__ void for_rows_of_turn(const uint64_t (&bits)[Team<kLanes>::kWords],
                                                 int64_t start, int count, const Load& load,
                                                 const Use& use) {
  for (int l = 0; l < count; l += kRowsInFlight) {
#pragma unroll
    for (int u = 0; u < kRowsInFlight; ++u) load(l + u, slice_from<kLanes>(bits, start, l + u), u);
#pragma unroll
    for (int u = 0; u < kRowsInFlight; ++u) use(l + u, u);
  }
}

template <class T, int kLanes, bool kMax>
__global__ void __launch_bounds__(kTeamThreads, 4)
    bag_kernel(const DeviceTable<T> table, const Bags bags, T* output, int32_t* argmax,
               bool by_four) {
  using Group = Team<kLanes>;
  const int64_t bag = Group::index();
  const Lookups own = lookups_of(bags, bag);
  const int64_t length = own.end - own.begin;
  const int64_t longest = most_turns(length);
  const float scale = kMax ? 1.0f : bag_scale<kLanes>(bags, own);
  for (int64_t first = 0; first < table.dim; first += Group::kWide) {
    float acc[kColumns] = {};
    int32_t place[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) place[c] = -1;
    for (int64_t turn = 0; turn < longest; turn += kLanes) {
      const int64_t n = turn + Group::lane();
      int64_t row = n < length ? bags.index(own.begin + n) : -1;
      const bool counted = n < length && row != bags.padding_idx;
      if (!counted) row = -1;
      uint64_t bits[Group::kWords];
      const int64_t start = read_row(table, row, first / 64, bits);
      float weight = counted ? 1.0f : 0.0f;
      if (!kMax && bags.weights && counted) weight = bags.weights[own.begin + n];
      const uint32_t counted_lanes = Group::own(__ballot_sync(kAllLanes, counted));
      const int64_t left = longest - turn;
      float rows[kRowsInFlight][kColumns];
      for_rows_of_turn<kLanes>(
          bits, start, int(left < kLanes ? left : kLanes),
          [&](int, const Slice& slice, int u) { load_slice(table.values, slice, rows[u]); },
          [&](int l, int u) {
            if constexpr (kMax) {
              const bool real = counted_lanes >> l & 1;
              const bool is_first = real && (counted_lanes & ((1u << l) - 1)) == 0;
#pragma unroll
              for (int c = 0; c < kColumns; ++c)
                if (real && ((is_first && place[c] < 0) || rows[u][c] > acc[c])) {
                  acc[c] = rows[u][c];
                  place[c] = int32_t(turn + l);
                }
            } else {
              const float w = __shfl_sync(kAllLanes, weight, l, kLanes);
#pragma unroll
              for (int c = 0; c < kColumns; ++c) acc[c] += w * rows[u][c];
            }
          });
    }
    if (bag >= bags.bags) continue;
    const int64_t column = first + Group::column();
#pragma unroll
    for (int c = 0; c < kColumns; ++c) acc[c] *= scale;
    store_columns(output + bag * table.dim, column, table.dim, by_four, acc);
    if (kMax && argmax)
#pragma unroll
      for (int c = 0; c < kColumns; ++c)
        if (column + c < table.dim) argmax[bag * table.dim + column + c] = place[c];
  }
}

// grad_weights[j] = scale(b) <grad_output[b], W[indices[j]]>; 0 for padding. Lookups of no bag are
// left.
template <class T, int kLanes>
__global__ void __launch_bounds__(kTeamThreads, 4)
    grad_weights_kernel(const DeviceTable<T> table, const Bags bags, const T* grad_output,
                        float* grad_weights, bool by_four) {
  using Group = Team<kLanes>;
  const int64_t bag = Group::index();
  const Lookups own = lookups_of(bags, bag);
  const int64_t length = own.end - own.begin;
  const int64_t longest = most_turns(length);
  const float scale = bag_scale<kLanes>(bags, own);
  for (int64_t first = 0; first < table.dim; first += Group::kWide) {
    float grad[kColumns] = {};
    if (bag < bags.bags)
      load_columns(grad_output + bag * table.dim, first + Group::column(), table.dim, by_four,
                   grad);
    for (int64_t turn = 0; turn < longest; turn += kLanes) {
      const int64_t n = turn + Group::lane();
      int64_t row = n < length ? bags.index(own.begin + n) : -1;
      if (row == bags.padding_idx) row = -1;
      uint64_t bits[Group::kWords];
      const int64_t start = read_row(table, row, first / 64, bits);
      const int64_t left = longest - turn;
      float rows[kRowsInFlight][kColumns], mine = 0.0f;
      for_rows_of_turn<kLanes>(
          bits, start, int(left < kLanes ? left : kLanes),
          [&](int, const Slice& slice, int u) { load_slice(table.values, slice, rows[u]); },
          [&](int l, int u) {
            float dot = 0.0f;
#pragma unroll
            for (int c = 0; c < kColumns; ++c) dot += grad[c] * rows[u][c];
            dot = warp_sum<kLanes>(dot);
            if (l == Group::lane()) mine = row < 0 ? 0.0f : dot * scale;
          });
      if (n < length) {
        float* out = grad_weights + own.begin + n;
        *out = first ? *out + mine : mine;
      }
    }
  }
}

enum class RowsOp { kExpand, kGather, kRepack };

// Row by row, without pooling; a team goes through kLanes of them.
//   kExpand   dense[n] = W[indices[n]], or row n of the table where there are no indices
//   kGather   values of row n = dense[n] where kept
//   kRepack   values of row n of `to` = those of `table` where both keep, else 0
template <class T, int kLanes, RowsOp kOp>
__global__ void __launch_bounds__(kTeamThreads, 3)  // of two tables at once: more registers
    rows_kernel(const DeviceTable<T> table, const DeviceTable<T> to, const Bags bags, T* dense,
                T* values, bool by_four) {
  using Group = Team<kLanes>;
  const int64_t turn = Group::index() * kLanes;
  const int64_t n = turn + Group::lane();
  const int64_t row = n >= bags.count ? -1 : bags.indices ? bags.index(n) : n;
  for (int64_t first = 0; first < table.dim; first += Group::kWide) {
    uint64_t bits[Group::kWords], new_bits[Group::kWords];
    const int64_t start = read_row(table, row, first / 64, bits);
    int64_t new_start = 0;
    if constexpr (kOp == RowsOp::kRepack) new_start = read_row(to, row, first / 64, new_bits);
    const int64_t column = first + Group::column();
    float rows[kRowsInFlight][kColumns];
    Slice slices[kRowsInFlight];
    for_rows_of_turn<kLanes>(
        bits, start, kLanes,
        [&](int l, const Slice& slice, int u) {
          slices[u] = slice;
          if constexpr (kOp == RowsOp::kGather) {
            if (turn + l < bags.count)
              load_columns(dense + (turn + l) * table.dim, column, table.dim, by_four, rows[u]);
          } else {
            load_slice(table.values, slice, rows[u]);
          }
          if constexpr (kOp == RowsOp::kRepack)
            slices[u] = slice_from<kLanes>(new_bits, new_start, l);
        },
        [&](int l, int u) {
          if (turn + l >= bags.count) return;
          if constexpr (kOp == RowsOp::kExpand) {
            store_columns(dense + (turn + l) * table.dim, column, table.dim, by_four, rows[u]);
          } else {
            for_each_kept(slices[u],
                          [&](int c, int64_t at) { values[at] = from_float<T>(rows[u][c]); });
          }
        });
  }
}

}  // namespace recsparse
