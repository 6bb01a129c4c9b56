// Low-rank embeddings, inner loops.
//
//   row(v)    = table[v] up^T + mean                                  [D]
//   sum, mean = pool(weight * row(index)) = pooled up^T + total * mean
//               pooled = pool(weight * table[index]) [R], total = pool(weight), pool = sum or mean
//   max       = elementwise maximum of row(index): does not commute with up, so rows are projected
//               a block at a time and compared in cache
//
// Rows of rank R are gathered (a cache line at R = 16 in float32, where a dense row of 128 has 8)
// and projected once for each bag.
#include "low_rank_embedding_kernels.h"

#include "gemm.h"

namespace recsparse::RS_ISA {

constexpr int64_t kRowBlock = 48;  // bags (or rows) projected at a time: 4 or 8 register tiles
constexpr int64_t kPrefetch = 32;  // lookups ahead: their latency over the few cycles one takes
constexpr int64_t kVecBlock = 4;   // vectors of a row pooled in registers at a time
constexpr int64_t kColumnBlock = 8 * kPanel;

// f(const Index*) with the type of the indices.
template <class T, class F>
RS_INLINE void with_indices(const LowRankBags<T>& p, F f) {
  if (p.wide)
    f(static_cast<const int64_t*>(p.indices));
  else
    f(static_cast<const int32_t*>(p.indices));
}

template <class Index>
RS_INLINE bool all_in_range(const Index* indices, int64_t count, int64_t limit) {
  Index low = 0, high = 0;
  for (int64_t i = 0; i < count; ++i) {
    low = indices[i] < low ? indices[i] : low;
    high = indices[i] > high ? indices[i] : high;
  }
  return low >= 0 && int64_t(high) < limit;
}
static bool in_range(const void* indices, bool wide, int64_t count, int64_t limit) {
  if (count == 0) return true;
  return wide ? all_in_range(static_cast<const int64_t*>(indices), count, limit)
              : all_in_range(static_cast<const int32_t*>(indices), count, limit);
}

template <class T>
RS_INLINE void prefetch_row(const T* row, int64_t rank) {
  const char* line = reinterpret_cast<const char*>(row);
  const int64_t bytes = rank * int64_t(sizeof(T));
  // to L2, which keeps more lines under way than L1: a fifth faster than to L1
  __builtin_prefetch(line, 0, 2);
  for (int64_t at = 64; at < bytes; at += 64) __builtin_prefetch(line + at, 0, 2);
  __builtin_prefetch(line + bytes - 1, 0, 2);  // rows that straddle a line
}

// The sum of weight * table[index][first : first + lanes] over the lookups of a bag, kVecs vectors.
template <int kVecs, class T, class Index>
RS_INLINE void pool_columns(const LowRankBags<T>& p, const Index* indices, int64_t begin,
                            int64_t end, int64_t first, int64_t count, bool prefetch, float* out) {
  Vec sum[kVecs];
  for (int j = 0; j < kVecs; ++j) sum[j] = zero();
  const int64_t tail = count - (kVecs - 1) * kLanes;
  for (int64_t i = begin; i < end; ++i) {
    if (prefetch && i + kPrefetch < p.lookups)
      prefetch_row(p.table + int64_t(indices[i + kPrefetch]) * p.rank, p.rank);
    const int64_t row = indices[i];
    if (row == p.padding_idx) continue;
    const T* values = p.table + row * p.rank + first;
    const Vec weight = broadcast(p.sample_weights ? to_float(p.sample_weights[i]) : 1.0f);
    for (int j = 0; j < kVecs; ++j) {
      const Vec v =
          j + 1 < kVecs ? load(values + j * kLanes) : load_lanes(values + j * kLanes, tail);
      sum[j] = fmadd(weight, v, sum[j]);
    }
  }
  for (int j = 0; j < kVecs; ++j) store(out + j * kLanes, sum[j]);
}

struct BagWeight {
  int64_t count;  // lookups that are not padding
  float total;    // sum of their weights
};
template <class T, class Index>
RS_INLINE BagWeight bag_weight(const LowRankBags<T>& p, const Index* indices, int64_t begin,
                               int64_t end) {
  BagWeight bag{end - begin, float(end - begin)};
  if (p.padding_idx < 0 && !p.sample_weights) return bag;
  bag = {0, 0.0f};
  for (int64_t i = begin; i < end; ++i) {
    if (indices[i] == p.padding_idx) continue;
    ++bag.count;
    bag.total += p.sample_weights ? to_float(p.sample_weights[i]) : 1.0f;
  }
  return bag;
}

// What the sums of a bag are multiplied by, and the multiple of `mean` in it.
struct BagScale {
  float scale, mean;
};
template <class T, class Index>
RS_INLINE BagScale bag_scale(const LowRankBags<T>& p, const Index* indices, int64_t bag) {
  if (!p.starts) return {1.0f, indices[bag] == p.padding_idx ? 0.0f : 1.0f};
  const BagWeight weight = bag_weight(p, indices, p.starts[bag], p.starts[bag + 1]);
  const float scale = p.mean_pooling && weight.count > 0 ? 1.0f / float(weight.count) : 1.0f;
  return {scale, scale * weight.total};
}

// Pooled rows of bags [begin, end) as float32 [*, padded R], and the multiple of `mean` in each.
template <class T, class Index>
RS_INLINE void pool(const LowRankBags<T>& p, const Index* indices, int64_t begin, int64_t end,
                    float* pooled, float* means) {
  const int64_t pooled_row = padded(p.rank);
  for (int64_t b = begin; b < end; ++b) {
    float* out = pooled + (b - begin) * pooled_row;
    const BagScale bag = bag_scale(p, indices, b);
    means[b - begin] = bag.mean;
    if (!p.starts) {
      if (b + kPrefetch < p.lookups)
        prefetch_row(p.table + int64_t(indices[b + kPrefetch]) * p.rank, p.rank);
      const T* row = p.table + int64_t(indices[b]) * p.rank;
      for_each_vec(p.rank,
                   [&](int64_t c, int64_t lanes) { store(out + c, load_lanes(row + c, lanes)); });
    } else {
      for (int64_t c = 0; c < p.rank; c += kVecBlock * kLanes) {
        const int64_t count = min_of(p.rank - c, kVecBlock * kLanes);
        const int64_t from = p.starts[b], to = p.starts[b + 1];
        switch ((count + kLanes - 1) / kLanes) {
          case 1: pool_columns<1>(p, indices, from, to, c, count, c == 0, out + c); break;
          case 2: pool_columns<2>(p, indices, from, to, c, count, c == 0, out + c); break;
          case 3: pool_columns<3>(p, indices, from, to, c, count, c == 0, out + c); break;
          default: pool_columns<4>(p, indices, from, to, c, count, c == 0, out + c);
        }
      }
      if (bag.scale != 1.0f)
        for (int64_t c = 0; c < p.rank; c += kLanes)
          store(out + c, load(out + c) * broadcast(bag.scale));
    }
    if (p.pooled)
      for_each_vec(p.rank, [&](int64_t c, int64_t lanes) {
        store_lanes(p.pooled + b * p.rank + c, load(out + c), lanes);
      });
  }
}

template <class T>
int64_t forward_scratch(const LowRankBags<T>& p) {
  return kRowBlock * (padded(p.rank) + kColumnBlock + 1);
}

template <class T>
void forward_bags(const LowRankBags<T>& p, int64_t begin, int64_t end, float* scratch) {
  const int64_t pooled_row = padded(p.rank);
  float* pooled = scratch;
  float* sums = pooled + kRowBlock * pooled_row;
  float* means = sums + kRowBlock * kColumnBlock;
  for (; begin < end; begin += kRowBlock) {
    const int64_t rows = min_of(end - begin, kRowBlock);
    with_indices(p, [&](auto indices) { pool(p, indices, begin, begin + rows, pooled, means); });
    for (int64_t n = 0; n < p.embedding_dim; n += kColumnBlock) {
      const int64_t columns = min_of(p.embedding_dim - n, kColumnBlock);
      gemm(pooled, pooled_row, 1, rows, p.up_panels + n * p.rank, p.rank * kPanel, columns, p.rank,
           sums, kColumnBlock, false);
      for (int64_t i = 0; i < rows; ++i) {
        const Vec times = broadcast(means[i]);
        T* out = p.output + (begin + i) * p.embedding_dim + n;
        for_each_vec(columns, [&](int64_t c, int64_t lanes) {
          Vec v = load(sums + i * kColumnBlock + c);
          if (p.mean) v = fmadd(times, load_lanes(p.mean + n + c, lanes), v);
          store_lanes(out + c, v, lanes);
        });
      }
    }
  }
}

// ---- max pooling ------------------------------------------------------------------------------

template <class T>
int64_t forward_max_scratch(const LowRankBags<T>& p) {
  return kRowBlock * (padded(p.rank) + kColumnBlock) + kColumnBlock;
}

template <class T, class Index>
RS_INLINE void max_bag(const LowRankBags<T>& p, const Index* indices, int64_t bag, float* scratch) {
  const int64_t row = padded(p.rank);
  float* rows = scratch;
  float* sums = rows + kRowBlock * row;
  float* best = sums + kRowBlock * kColumnBlock;
  const int64_t end = p.starts[bag + 1];
  for (int64_t n = 0; n < p.embedding_dim; n += kColumnBlock) {
    const int64_t columns = min_of(p.embedding_dim - n, kColumnBlock);
    int64_t* winners = p.max_positions + bag * p.embedding_dim + n;
    for (int64_t c = 0; c < columns; ++c) {
      best[c] = 0.0f;
      winners[c] = -1;
    }
    for (int64_t i = p.starts[bag]; i < end;) {
      int64_t positions[kRowBlock];
      int64_t count = 0;
      for (; i < end && count < kRowBlock; ++i) {
        if (indices[i] == p.padding_idx) continue;
        const T* values = p.table + int64_t(indices[i]) * p.rank;
        for_each_vec(p.rank, [&](int64_t c, int64_t lanes) {
          store(rows + count * row + c, load_lanes(values + c, lanes));
        });
        positions[count++] = i;
      }
      gemm(rows, row, 1, count, p.up_panels + n * p.rank, p.rank * kPanel, columns, p.rank, sums,
           kColumnBlock, false);
      for (int64_t k = 0; k < count; ++k)
        for (int64_t c = 0; c < columns; ++c) {
          const float value = sums[k * kColumnBlock + c];
          if (winners[c] < 0 || value > best[c]) {
            best[c] = value;
            winners[c] = positions[k];
          }
        }
    }
    T* out = p.output + bag * p.embedding_dim + n;
    for (int64_t c = 0; c < columns; ++c) {
      const float mean = p.mean && winners[c] >= 0 ? to_float(p.mean[n + c]) : 0.0f;
      out[c] = from_float<T>(best[c] + mean);
    }
  }
}

template <class T>
void forward_max(const LowRankBags<T>& p, int64_t begin, int64_t end, float* scratch) {
  with_indices(p, [&](auto indices) {
    for (int64_t b = begin; b < end; ++b) max_bag(p, indices, b, scratch);
  });
}

template <class T>
void max_grad_up(const LowRankBags<T>& p, int64_t first, int64_t last, T* grad_up, T* grad_mean,
                 float* scratch) {
  for (int64_t d = first; d < last; ++d) {
    double total = 0.0;
    for (int64_t c = 0; c < padded(p.rank); c += kLanes) store(scratch + c, zero());
    for (int64_t b = 0; b < p.bags; ++b) {
      const int64_t at = p.max_positions[b * p.embedding_dim + d];
      if (at < 0) continue;
      const float grad = to_float(p.grad_output[b * p.embedding_dim + d]);
      total += grad;
      int64_t row = 0;
      with_indices(p, [&](auto indices) { row = indices[at]; });
      for_each_vec(p.rank, [&](int64_t c, int64_t lanes) {
        const Vec v = load_lanes(p.table + row * p.rank + c, lanes);
        store(scratch + c, fmadd(broadcast(grad), v, load(scratch + c)));
      });
    }
    for_each_vec(p.rank, [&](int64_t c, int64_t lanes) {
      store_lanes(grad_up + d * p.rank + c, load(scratch + c), lanes);
    });
    if (grad_mean) grad_mean[d] = from_float<T>(float(total));
  }
}

// Looks at every winner and takes those of its own rows, in the order of bags. `sums` is float32
// [last - first, R], where T is narrower; grad_table itself where T is float32.
template <class T>
void max_grad_rows(const LowRankBags<T>& p, const T* up, int64_t first, int64_t last, float* sums,
                   T* grad_table) {
  for (int64_t i = 0; i < (last - first) * p.rank; ++i) sums[i] = 0.0f;
  with_indices(p, [&](auto indices) {
    for (int64_t b = 0; b < p.bags; ++b)
      for (int64_t d = 0; d < p.embedding_dim; ++d) {
        const int64_t at = p.max_positions[b * p.embedding_dim + d];
        if (at < 0 || indices[at] < first || indices[at] >= last) continue;
        const Vec grad = broadcast(to_float(p.grad_output[b * p.embedding_dim + d]));
        float* sum = sums + (indices[at] - first) * p.rank;
        for_each_vec(p.rank, [&](int64_t c, int64_t lanes) {
          const Vec v = load_lanes(up + d * p.rank + c, lanes);
          store_lanes(sum + c, fmadd(grad, v, load_lanes(sum + c, lanes)), lanes);
        });
      }
  });
  if constexpr (sizeof(T) != sizeof(float))
    for (int64_t i = 0; i < (last - first) * p.rank; ++i)
      grad_table[first * p.rank + i] = from_float<T>(sums[i]);
}

// ---- gradients of sum and mean ----------------------------------------------------------------

template <class T>
int64_t backward_scratch(const LowRankBags<T>& p) {
  return kRowBlock * (kDepthBlock + 3 * padded(p.rank) + kDepthBlock);
}

template <class T>
void backward_bags(const LowRankBags<T>& p, int64_t begin, int64_t end, float* part,
                   float* scratch) {
  const int64_t rank_row = padded(p.rank), dim_row = padded(p.embedding_dim);
  float* grads = scratch;                                 // [rows, depth block]
  float* panels = grads + kRowBlock * kDepthBlock;        // the same as panels
  float* grad_pooled = panels + kRowBlock * kDepthBlock;  // [rows, padded R]
  float* pooled = grad_pooled + kRowBlock * rank_row;
  float* part_mean = part + p.rank * dim_row;
  for (int64_t i = 0; i < (p.rank + 1) * dim_row; i += kLanes) store(part + i, zero());
  for (; begin < end; begin += kRowBlock) {
    const int64_t rows = min_of(end - begin, kRowBlock);
    float scales[kRowBlock];
    with_indices(p, [&](auto indices) {
      for (int64_t i = 0; i < rows; ++i) scales[i] = bag_scale(p, indices, begin + i).mean;
    });
    int64_t pooled_stride;
    const float* factor = as_float(p.pooled_in + begin * p.rank, p.rank, rows, p.rank, pooled,
                                   rank_row, &pooled_stride);
    for (int64_t n = 0; n < p.embedding_dim; n += kDepthBlock) {
      const int64_t depth = min_of(p.embedding_dim - n, kDepthBlock);
      float block_mean[kDepthBlock] = {};
      for (int64_t i = 0; i < rows; ++i) {
        // an unpooled lookup of padding_idx has no gradient at all
        const bool dropped = !p.starts && scales[i] == 0.0f;
        const T* grad = p.grad_output + (begin + i) * p.embedding_dim + n;
        const Vec scale = broadcast(scales[i]);
        for_each_vec(depth, [&](int64_t c, int64_t lanes) {
          const Vec v = dropped ? zero() : load_lanes(grad + c, lanes);
          store(grads + i * kDepthBlock + c, v);
          store(panels + (c / kPanel * kRowBlock + i) * kPanel + c % kPanel, v);
          store(block_mean + c, fmadd(scale, v, load(block_mean + c)));
        });
      }
      for (int64_t c = 0; c < depth; c += kLanes)
        store(part_mean + n + c, load(part_mean + n + c) + load(block_mean + c));
      gemm(grads, kDepthBlock, 1, rows, p.up_panels + n * kPanel, p.embedding_dim * kPanel, p.rank,
           depth, grad_pooled, rank_row, n > 0);
      gemm(factor, 1, pooled_stride, p.rank, panels, kRowBlock * kPanel, depth, rows, part + n,
           dim_row, true);
    }
    if (p.grad_pooled)
      for (int64_t i = 0; i < rows; ++i)
        for_each_vec(p.rank, [&](int64_t c, int64_t lanes) {
          store_lanes(p.grad_pooled + (begin + i) * p.rank + c,
                      load(grad_pooled + i * rank_row + c), lanes);
        });
  }
}

template <class T>
void sum_parts(const float* parts, int64_t count, int64_t rank, int64_t embedding_dim,
               int64_t first, int64_t last, T* grad_up, T* grad_mean) {
  const int64_t dim_row = padded(embedding_dim);
  for (int64_t d = first; d < last; ++d)
    for (int64_t r = 0; r <= rank; ++r) {
      float total = 0.0f;
      for (int64_t i = 0; i < count; ++i) total += parts[(i * (rank + 1) + r) * dim_row + d];
      if (r < rank)
        grad_up[d * rank + r] = from_float<T>(total);
      else if (grad_mean)
        grad_mean[d] = from_float<T>(total);
    }
}

// d output / d weight of a lookup = scale * (table[index] . grad_pooled + mean . grad_output)
template <class T>
void grad_sample_weights(const LowRankBags<T>& p, int64_t begin, int64_t end) {
  with_indices(p, [&](auto indices) {
    for (int64_t b = begin; b < end; ++b) {
      const float scale = bag_scale(p, indices, b).scale;
      float mean_part = 0.0f;
      if (p.mean) {
        Vec sum = zero();
        for_each_vec(p.embedding_dim, [&](int64_t c, int64_t lanes) {
          sum = fmadd(load_lanes(p.mean + c, lanes),
                      load_lanes(p.grad_output + b * p.embedding_dim + c, lanes), sum);
        });
        mean_part = sum_lanes(sum);
      }
      for (int64_t i = p.starts[b]; i < p.starts[b + 1]; ++i) {
        if (indices[i] == p.padding_idx) {
          p.grad_sample_weights[i] = from_float<T>(0.0f);
          continue;
        }
        const T* row = p.table + int64_t(indices[i]) * p.rank;
        Vec sum = zero();
        for_each_vec(p.rank, [&](int64_t c, int64_t lanes) {
          sum = fmadd(load_lanes(row + c, lanes), load_lanes(p.grad_pooled + b * p.rank + c, lanes),
                      sum);
        });
        p.grad_sample_weights[i] = from_float<T>(scale * (sum_lanes(sum) + mean_part));
      }
    }
  });
}

template <class T>
void lookup_weights(const LowRankBags<T>& p, int64_t begin, int64_t end, float* weights) {
  with_indices(p, [&](auto indices) {
    for (int64_t b = begin; b < end; ++b) {
      const float scale = p.mean_pooling ? bag_scale(p, indices, b).scale : 1.0f;
      for (int64_t i = p.starts[b]; i < p.starts[b + 1]; ++i)
        weights[i] = scale * (p.sample_weights ? to_float(p.sample_weights[i]) : 1.0f);
    }
  });
}

// The sum of one row's entries into out [R].
template <class T>
RS_INLINE void sum_row(const LowRankRows<T>& p, const RowEntry* entries, int64_t count, T* out) {
  for_each_vec(p.rank, [&](int64_t c, int64_t lanes) {
    Vec sum = zero();
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = entries[i].position;
      const int64_t bag = p.bag ? p.bag[at] : at;
      const Vec weight = broadcast(p.weight ? p.weight[at] : 1.0f);
      sum = fmadd(weight, load_lanes(p.grad_pooled + bag * p.rank + c, lanes), sum);
    }
    store_lanes(out + c, sum, lanes);
  });
}

RS_INLINE int64_t same_row(const RowEntry* entries, int64_t count) {
  int64_t n = 1;
  while (n < count && entries[n].row == entries[0].row) ++n;
  return n;
}

template <class T>
void rows_dense(const LowRankRows<T>& p, const RowEntry* entries, int64_t count, T* out) {
  for (int64_t i = 0; i < count;) {
    const int64_t n = same_row(entries + i, count - i);
    sum_row(p, entries + i, n, out + int64_t(entries[i].row) * p.rank);
    i += n;
  }
}

template <class T>
int64_t rows_sparse(const LowRankRows<T>& p, const RowEntry* entries, int64_t count, T* out,
                    int64_t* rows) {
  int64_t unique = 0;
  for (int64_t i = 0; i < count; ++unique) {
    const int64_t n = same_row(entries + i, count - i);
    sum_row(p, entries + i, n, out + unique * p.rank);
    rows[unique] = entries[i].row;
    i += n;
  }
  return unique;
}

template <class T>
const LowRankEmbeddingKernels<T>& low_rank_embedding_kernels() {
  static constexpr LowRankEmbeddingKernels<T> table = {
      &in_range,          &forward_scratch<T>,  &forward_bags<T>,  &forward_max_scratch<T>,
      &forward_max<T>,    &backward_scratch<T>, &backward_bags<T>, &grad_sample_weights<T>,
      &lookup_weights<T>, &sum_parts<T>,        &rows_dense<T>,    &rows_sparse<T>,
      &max_grad_up<T>,    &max_grad_rows<T>};
  return table;
}
RS_INSTANTIATE_KERNEL_TABLE(LowRankEmbeddingKernels, low_rank_embedding_kernels)

}  // namespace recsparse::RS_ISA
