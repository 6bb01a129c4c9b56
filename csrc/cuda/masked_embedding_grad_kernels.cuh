// Gradient of the values of a masked table, from lookups sorted by row (stable: a row's lookups
// stay in their order, so that the sum is the same from run to run).
//   g[d] = sum over the row's lookups j of weights[j] bag_scale[bag(j)] grad_output[bag(j), d]
//          (with argmax: only where argmax[bag(j), d] is j's place in the bag)
// at the kept columns d, stored or consumed by an optimizer at once.
//
// The lookups of one row are a run. A run is cut where a chunk of kChunk sorted positions ends, so
// that a popular row is the work of many teams. A piece that is a whole run is done with by its
// team; of the others each chunk has at most two, one that came from before (slot 0 of `parts`) and
// one that begins in it and goes on (slot 1), which join_kernel adds up.
#pragma once

#include "masked_embedding_rows.cuh"

namespace recsparse {

constexpr int64_t kChunk = 128;

// Row numbers in 32 bits where they fit: half the bytes to sort.
struct Keys {
  const void* keys;
  bool wide;
  __device__ int64_t operator[](int64_t p) const {
    return wide ? int64_t(static_cast<const uint64_t*>(keys)[p])
                : int64_t(static_cast<const uint32_t*>(keys)[p]);
  }
};

template <class T>
struct GradJob {
  Keys keys;  // [count] sorted; num_embeddings and above: no lookup of a row
  int64_t count;
  const int32_t* payloads;  // by sorted position: the lookup where bag_of is given, else the bag
  const int32_t* bag_of;
  const float* weights;    // by lookup, or null
  const float* bag_scale;  // by bag, or null
  const T* grad_output;    // [bags, D]
  const int32_t* argmax;   // [bags, D], or null
  Bags in;
  bool by_frequency;  // divide by the number of lookups of the row
  bool by_four;
  float* parts;  // [2 chunks, D]

  // where the row's gradient goes: exactly one of these
  T* grad_values;  // at the row's start
  T* touched;      // of run r at touched_offset[r], or at r touched_stride where that is null
  int64_t* touched_position;
  const int32_t* run_of;  // 1 + run, by sorted position
  const int64_t* touched_offset;
  int64_t touched_stride;
  T* update_values;  // the optimizer below
  MaskedOptimizer optimizer;
  float* state;         // row Adagrad [V]; Adam: first moment, packed
  float* second_state;  // Adam: second moment, packed
  float lr, beta1, beta2, eps, correction1, correction2;
  float rest1, rest2;  // 1 - beta: from doubles, the float difference loses 5 digits at beta 0.999
};

// Every lookup's row and bag. Padding, rows out of range and lookups of no bag keep the key `none`,
// which fill_kernel gave them.
template <class Key>
__global__ void fill_kernel(Key* keys, int32_t* payloads, int64_t count, Key none) {
  for (int64_t j = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; j < count;
       j += int64_t(gridDim.x) * blockDim.x) {
    keys[j] = none;
    payloads[j] = 0;
  }
}
constexpr int kPrepareLanes = 8;
template <class Key>
__global__ void __launch_bounds__(kTeamThreads, 4)
    prepare_kernel(const Bags bags, int64_t num_embeddings, Key* keys, int32_t* payloads,
                   int32_t* bag_of, float* scales) {
  using Group = Team<kPrepareLanes>;
  const int64_t bag = Group::index();
  const Lookups own = lookups_of(bags, bag);
  const float scale = bag_scale<kPrepareLanes>(bags, own);
  if (scales && bag < bags.bags && Group::lane() == 0) scales[bag] = scale;
  for (int64_t j = own.begin + Group::lane(); j < own.end; j += kPrepareLanes) {
    const int64_t row = bags.index(j);
    if (bag_of) bag_of[j] = int32_t(bag);
    if (row < 0 || row >= num_embeddings || row == bags.padding_idx) continue;
    keys[j] = Key(row);
    payloads[j] = int32_t(bag_of ? j : bag);
  }
}

// Four columns of the sum over `length` sorted positions from p on. Every lane of the warp calls,
// with `longest` the largest length in it.
template <int kLanes, class T>
__device__ __forceinline__ void sum_lookups(const DeviceTable<T>& table, const GradJob<T>& job,
                                            int64_t p, int64_t length, int64_t longest,
                                            int64_t column, float (&acc)[kColumns]) {
  using Group = Team<kLanes>;
  constexpr int kInFlight = 4;
#pragma unroll
  for (int c = 0; c < kColumns; ++c) acc[c] = 0.0f;
  for (int64_t turn = 0; turn < longest; turn += kLanes) {
    const int64_t n = turn + Group::lane();
    int32_t bag = -1, place = 0;
    float scale = 0.0f;
    if (n < length) {
      const int32_t payload = job.payloads[p + n];
      bag = job.bag_of ? job.bag_of[payload] : payload;
      scale = job.weights ? job.weights[payload] : 1.0f;
      if (job.bag_scale) scale *= job.bag_scale[bag];
      if (job.argmax) place = int32_t(payload - job.in.begin(bag));
    }
    const int64_t left = longest - turn;
    const int lookups = int(left < kLanes ? left : kLanes);
    for (int l = 0; l < lookups; l += kInFlight) {
      float grads[kInFlight][kColumns], scales[kInFlight];
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) {
        const int32_t b = __shfl_sync(kAllLanes, bag, l + u, kLanes);
        const int32_t own_place = __shfl_sync(kAllLanes, place, l + u, kLanes);
        scales[u] = __shfl_sync(kAllLanes, scale, l + u, kLanes);
#pragma unroll
        for (int c = 0; c < kColumns; ++c) grads[u][c] = 0.0f;
        if (b < 0) continue;
        load_columns(job.grad_output + b * table.dim, column, table.dim, job.by_four, grads[u]);
        if (job.argmax)
#pragma unroll
          for (int c = 0; c < kColumns; ++c)
            if (column + c >= table.dim || job.argmax[b * table.dim + column + c] != own_place)
              grads[u][c] = 0.0f;
      }
#pragma unroll
      for (int u = 0; u < kInFlight; ++u)
#pragma unroll
        for (int c = 0; c < kColumns; ++c) acc[c] = __fmaf_rn(scales[u], grads[u][c], acc[c]);
    }
  }
}

template <class T>
__device__ __forceinline__ void apply_value(const GradJob<T>& job, int64_t at, float g,
                                            float row_rate) {
  float step;
  if (job.optimizer == MaskedOptimizer::kAdam) {
    const float m = __fmaf_rn(job.rest1, g, job.beta1 * job.state[at]);
    const float v = __fmaf_rn(job.rest2 * g, g, job.beta2 * job.second_state[at]);
    job.state[at] = m;
    job.second_state[at] = v;
    step = job.lr / job.correction1 * m / (sqrtf(v) / job.correction2 + job.eps);
  } else {
    step = row_rate * g;
  }
  job.update_values[at] = from_float<T>(to_float(job.update_values[at]) - step);
}

// Every lane of the warp calls. sum(column, acc) gives four columns of the row's gradient. `whole`:
// the row is done with here; else its sums go to `part`, when there is one.
template <int kLanes, class T, class Sum>
__device__ __forceinline__ void reduce_row(const DeviceTable<T>& table, const GradJob<T>& job,
                                           int64_t row, int64_t position, float frequency,
                                           bool whole, float* part, const Sum& sum) {
  using Group = Team<kLanes>;
  const int64_t shown = whole ? row : -1;
  const bool one_turn = table.dim <= Group::kWide;
  uint64_t bits[Group::kWords];
  float acc[kColumns];
  float rate = job.lr;
  if (job.update_values && job.optimizer == MaskedOptimizer::kRowAdagrad) {
    float squares = 0.0f;
    for (int64_t first = 0; first < table.dim; first += Group::kWide) {
      sum(first + Group::column(), acc);
      const int64_t start = read_row(table, shown, first / 64, bits);
      for_each_kept(own_slice<kLanes>(bits, start), [&](int c, int64_t) {
        const float g = acc[c] / frequency;
        squares = __fmaf_rn(g, g, squares);
      });
    }
    squares = warp_sum<kLanes>(squares);
    const bool writer = whole && Group::lane() == 0;
    float state = writer ? job.state[row] + squares / float(table.dim) : 0.0f;
    if (writer) job.state[row] = state;
    state = __shfl_sync(kAllLanes, state, 0, kLanes);
    rate = job.lr / (sqrtf(state) + job.eps);
    if (!one_turn) acc[0] = 0.0f;
  }
  const bool have_sums =
      one_turn && job.update_values && job.optimizer == MaskedOptimizer::kRowAdagrad;
  int64_t row_start = 0;
  for (int64_t first = 0; first < table.dim; first += Group::kWide) {
    const int64_t column = first + Group::column();
    if (!have_sums) sum(column, acc);
    if (part)
#pragma unroll
      for (int c = 0; c < kColumns; ++c)
        if (column + c < table.dim) part[column + c] = acc[c];
    const int64_t start = read_row(table, shown, first / 64, bits);
    if (first == 0) row_start = start;
    int64_t offset = 0;  // from the row's place in `values` to that in `touched`
    if (job.touched && whole) {
      const int64_t run = job.run_of[position] - 1;
      offset =
          (job.touched_offset ? job.touched_offset[run] : run * job.touched_stride) - row_start;
    }
    for_each_kept(own_slice<kLanes>(bits, start), [&](int c, int64_t at) {
      const float g = acc[c] / frequency;
      if (job.grad_values) {
        job.grad_values[at] = from_float<T>(g);
      } else if (job.touched) {
        job.touched[offset + at] = from_float<T>(g);
        if (job.touched_position) job.touched_position[offset + at] = at;
      } else {
        apply_value(job, at, g, rate);
      }
    });
  }
}

// First sorted position whose key is `key` or larger.
__device__ __forceinline__ int64_t lower_bound(const Keys& keys, int64_t count, int64_t key) {
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

// A team for each sorted position; those where a piece begins work.
template <class T, int kLanes>
__global__ void __launch_bounds__(kTeamThreads, 4)
    pieces_kernel(const DeviceTable<T> table, const GradJob<T> job) {
  using Group = Team<kLanes>;
  const int64_t p = Group::index();
  const int64_t key = p < job.count ? job.keys[p] : table.num_embeddings;
  const bool before = p > 0 && p < job.count && job.keys[p - 1] == key;
  const bool begins = key < table.num_embeddings && (!before || p % kChunk == 0);
  int64_t length = 0;
  if (begins) {
    const int64_t chunk_end = (p / kChunk + 1) * kChunk;
    const int64_t last = chunk_end < job.count ? chunk_end : job.count;
    length = 1;
    while (p + length < last && job.keys[p + length] == key) ++length;
  }
  const int64_t longest = most_turns(length);
  if (longest == 0) return;  // of the whole warp
  const bool after = begins && p + length < job.count && job.keys[p + length] == key;
  const bool whole = begins && !before && !after;
  float* part = nullptr;
  if (begins && !whole) part = job.parts + (p / kChunk * 2 + (before ? 0 : 1)) * table.dim;
  const float frequency = job.by_frequency && whole ? float(length) : 1.0f;
  reduce_row<kLanes>(table, job, key, p, frequency, whole, part,
                     [&](int64_t column, float(&acc)[kColumns]) {
                       sum_lookups<kLanes>(table, job, p, length, longest, column, acc);
                     });
}

// A team for each chunk: the run that begins in it and goes on behind it, if there is one.
template <class T, int kLanes>
__global__ void __launch_bounds__(kTeamThreads, 4)
    join_kernel(const DeviceTable<T> table, const GradJob<T> job) {
  const int64_t chunk = Team<kLanes>::index(), end = (chunk + 1) * kChunk;
  const int64_t key = end < job.count ? job.keys[end] : table.num_embeddings;
  const bool mine = key < table.num_embeddings && job.keys[end - 1] == key &&
                    !(chunk > 0 && job.keys[end - kChunk - 1] == key);
  if (!__any_sync(kAllLanes, mine)) return;
  int64_t first = 0, last = 0;
  if (mine) {
    first = lower_bound(job.keys, job.count, key);
    last = lower_bound(job.keys, job.count, key + 1);
  }
  const int64_t followers = mine ? (last - 1) / kChunk - chunk : 0;
  reduce_row<kLanes>(
      table, job, key, end - 1, job.by_frequency && mine ? float(last - first) : 1.0f, mine,
      static_cast<float*>(nullptr), [&](int64_t column, float(&acc)[kColumns]) {
#pragma unroll
        for (int c = 0; c < kColumns; ++c) acc[c] = 0.0f;
        if (!mine) return;
        const float* begun = job.parts + (chunk * 2 + 1) * table.dim;
        load_columns(begun, column, table.dim, false, acc);
        for (int64_t f = 1; f <= followers; ++f) {
          float more[kColumns];
          load_columns(job.parts + (chunk + f) * 2 * table.dim, column, table.dim, false, more);
#pragma unroll
          for (int c = 0; c < kColumns; ++c) acc[c] += more[c];
        }
      });
}

// 1 where a run of the table's rows begins.
static __global__ void run_begins_kernel(const Keys keys, int64_t count, int64_t num_embeddings,
                                         int32_t* begins) {
  const int64_t p = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (p < count) begins[p] = keys[p] < num_embeddings && (p == 0 || keys[p - 1] != keys[p]) ? 1 : 0;
}

// Of each run its row, and how many values the row keeps; counts[runs] = 0.
template <class T>
__global__ void run_rows_kernel(const DeviceTable<T> table, const Keys keys, int64_t count,
                                const int32_t* run_of, int64_t runs, int64_t* run_rows,
                                int64_t* counts) {
  const int64_t p = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (p == 0 && counts) counts[runs] = 0;
  if (p >= count || keys[p] >= table.num_embeddings || (p > 0 && keys[p - 1] == keys[p])) return;
  const int64_t run = run_of[p] - 1;
  if (run_rows) run_rows[run] = keys[p];
  if (!counts) return;
  int64_t kept = 0;
  for (int64_t word = 0; 64 * word < table.dim; ++word) {
    uint64_t bits[1];
    read_row(table, keys[p], word, bits);
    kept += __popcll(bits[0]);
  }
  counts[run] = kept;
}

}  // namespace recsparse
