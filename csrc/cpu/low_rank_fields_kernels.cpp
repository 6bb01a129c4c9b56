// Multi-field lookup with a projection of each field, and the factorisation-machine term.
//
//   z[b, k] = table[starts[k] + indices[b, k]]                            [R]
//   x[b, k] = z[b, k] projections[k] + bias[k]                            [D]
//   fm[b]   = 1/2 sum_d ((sum_k x[b, k, d])^2 - sum_k x[b, k, d]^2)
//
// R (2 to 24) is far below a matrix tile and D (16, 50, 128) a few vectors, so a projection is R
// multiply-adds a vector with the field's [R, D] matrix in L1: fields outside, a block of rows
// inside. The FM term needs one [block, D] sum; x itself is written only where it is asked for.
#include "low_rank_fields_kernels.h"

#include "gemm.h"

namespace recsparse::RS_ISA {

constexpr int64_t kRowBlock = 32;  // [32, D] sums (16 KiB at D = 128) stay in L1 over the fields

RS_INLINE int64_t whole_vecs(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

template <class T>
void widen(const T* source, int64_t rows, int64_t columns, float* out) {
  const int64_t row = whole_vecs(columns);
  for (int64_t i = 0; i < rows; ++i)
    for_each_vec(columns, [&](int64_t c, int64_t lanes) {
      store(out + i * row + c, load_lanes(source + i * columns + c, lanes));
    });
}

// x[d : d + lanes] of one row and field.
template <class T>
RS_INLINE Vec project(const T* z, int64_t rank, const float* projection, int64_t row, Vec bias) {
  Vec x = bias;
  for (int64_t r = 0; r < rank; ++r)
    x = fmadd(broadcast(to_float(z[r])), load(projection + r * row), x);
  return x;
}

template <class T, class Index>
RS_INLINE const T* lookup(const LowRankFields<T>& p, const Index* indices, int64_t b, int64_t k) {
  return p.table + (p.starts[k] + int64_t(indices[b * p.fields + k])) * p.rank;
}

template <class T>
int64_t forward_scratch(const LowRankFields<T>& p) {
  return 2 * kRowBlock * whole_vecs(p.dim);
}

template <class T, class Index>
RS_INLINE void forward_rows(const LowRankFields<T>& p, const Index* indices, int64_t begin,
                            int64_t end, float* scratch) {
  const int64_t row = whole_vecs(p.dim);
  float* sums = scratch;                     // sum_k x
  float* pairs = scratch + kRowBlock * row;  // sum of x_j x_k over j < k
  for (; begin < end; begin += kRowBlock) {
    const int64_t rows = min_of(end - begin, kRowBlock);
    if (p.interaction)
      for (int64_t c = 0; c < 2 * kRowBlock * row; c += kLanes) store(scratch + c, zero());
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t k = 0; k < p.fields; ++k) __builtin_prefetch(lookup(p, indices, begin + i, k));
    for (int64_t k = 0; k < p.fields; ++k) {
      const float* projection = p.projections + k * p.rank * row;
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t at = (begin + i) * p.fields + k;
        const T* z = lookup(p, indices, begin + i, k);
        if (p.mid)
          for (int64_t r = 0; r < p.rank; ++r) p.mid[at * p.rank + r] = z[r];
        if (!p.output && !p.interaction) continue;
        for_each_vec(p.dim, [&](int64_t c, int64_t lanes) {
          const Vec x = project(z, p.rank, projection + c, row, load(p.bias + k * row + c));
          if (p.output) store_lanes(p.output + at * p.dim + c, x, lanes);
          if (p.interaction) {
            float* sum = sums + i * row + c;
            float* pair = pairs + i * row + c;
            store(pair, fmadd(x, load(sum), load(pair)));
            store(sum, load(sum) + x);
          }
        });
      }
    }
    if (!p.interaction) continue;
    for (int64_t i = 0; i < rows; ++i) {
      Vec total = zero();  // columns past D are zero: so are their projections and bias
      for (int64_t c = 0; c < row; c += kLanes) total = total + load(pairs + i * row + c);
      p.interaction[begin + i] = from_float<T>(sum_lanes(total));
    }
  }
}

template <class T>
void forward(const LowRankFields<T>& p, int64_t begin, int64_t end, float* scratch) {
  if (p.wide)
    forward_rows(p, static_cast<const int64_t*>(p.indices), begin, end, scratch);
  else
    forward_rows(p, static_cast<const int32_t*>(p.indices), begin, end, scratch);
}

template <class T>
int64_t backward_scratch(const LowRankFields<T>& p) {
  return (kRowBlock + 1 + p.rank + 1) * whole_vecs(p.dim);
}

//   grad_x[b, k] = grad_output[b, k] + grad_fm[b] (sum_j x[b, j] - x[b, k])
//   grad_z[b, k] = grad_mid[b, k] + projections[k] grad_x[b, k]
//   grad_projections[k] = sum_b z[b, k] grad_x[b, k]^T     grad_bias[k] = sum_b grad_x[b, k]
template <class T>
void backward(const LowRankFields<T>& p, int64_t begin, int64_t end, float* part, float* scratch) {
  const int64_t row = whole_vecs(p.dim);
  float* sums = scratch;                   // sum_k x, for the FM term
  float* grad_x = sums + kRowBlock * row;  // of one row and field
  float* block = grad_x + row;             // this block of rows' share of a field's part
  for (int64_t c = 0; c < p.fields * (p.rank + 1) * row; c += kLanes) store(part + c, zero());
  for (; begin < end; begin += kRowBlock) {
    const int64_t rows = min_of(end - begin, kRowBlock);
    if (p.grad_interaction) {
      for (int64_t c = 0; c < rows * row; c += kLanes) store(sums + c, zero());
      for (int64_t k = 0; k < p.fields; ++k)
        for (int64_t i = 0; i < rows; ++i) {
          const T* z = p.mid_in + ((begin + i) * p.fields + k) * p.rank;
          for (int64_t c = 0; c < row; c += kLanes) {
            float* sum = sums + i * row + c;
            store(sum, load(sum) + project(z, p.rank, p.projections + k * p.rank * row + c, row,
                                           load(p.bias + k * row + c)));
          }
        }
    }
    for (int64_t k = 0; k < p.fields; ++k) {
      const float* projection = p.projections + k * p.rank * row;
      for (int64_t c = 0; c < (p.rank + 1) * row; c += kLanes) store(block + c, zero());
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t at = (begin + i) * p.fields + k;
        const T* z = p.mid_in + at * p.rank;
        for_each_vec(p.dim, [&](int64_t c, int64_t lanes) {
          Vec grad = p.grad_output ? load_lanes(p.grad_output + at * p.dim + c, lanes) : zero();
          if (p.grad_interaction) {
            const Vec x = project(z, p.rank, projection + c, row, load(p.bias + k * row + c));
            grad = fmadd(broadcast(to_float(p.grad_interaction[begin + i])),
                         load(sums + i * row + c) - x, grad);
          }
          store(grad_x + c, grad);
          float* grad_bias = block + p.rank * row + c;
          store(grad_bias, load(grad_bias) + grad);
        });
        for (int64_t r = 0; r < p.rank; ++r) {
          const Vec zr = broadcast(to_float(z[r]));
          Vec dot = zero();
          for (int64_t c = 0; c < row; c += kLanes) {
            const Vec grad = load(grad_x + c);
            dot = fmadd(grad, load(projection + r * row + c), dot);
            float* to = block + r * row + c;
            store(to, fmadd(zr, grad, load(to)));
          }
          const float direct = p.grad_mid ? to_float(p.grad_mid[at * p.rank + r]) : 0.0f;
          p.grad_rows[at * p.rank + r] = from_float<T>(sum_lanes(dot) + direct);
        }
      }
      float* part_k = part + k * (p.rank + 1) * row;
      for (int64_t c = 0; c < (p.rank + 1) * row; c += kLanes)
        store(part_k + c, load(part_k + c) + load(block + c));
    }
  }
}

template <class T>
void sum_parts(const LowRankFields<T>& p, const float* parts, int64_t count, int64_t first_field,
               int64_t last_field, T* grad_projections, T* grad_bias) {
  const int64_t row = whole_vecs(p.dim);
  const int64_t part_size = p.fields * (p.rank + 1) * row;
  for (int64_t k = first_field; k < last_field; ++k)
    for (int64_t r = 0; r <= p.rank; ++r) {
      T* out = r < p.rank ? grad_projections + (k * p.rank + r) * p.dim
                          : (grad_bias ? grad_bias + k * p.dim : nullptr);
      if (!out) continue;
      for_each_vec(p.dim, [&](int64_t c, int64_t lanes) {
        Vec total = zero();
        for (int64_t i = 0; i < count; ++i)
          total = total + load(parts + i * part_size + (k * (p.rank + 1) + r) * row + c);
        store_lanes(out + c, total, lanes);
      });
    }
}

template <class T>
const LowRankFieldsKernels<T>& low_rank_fields_kernels() {
  static constexpr LowRankFieldsKernels<T> table = {
      kLanes,       &widen<T>,    &forward_scratch<T>, &forward<T>, &backward_scratch<T>,
      &backward<T>, &sum_parts<T>};
  return table;
}
RS_INSTANTIATE_KERNEL_TABLE(LowRankFieldsKernels, low_rank_fields_kernels)

}  // namespace recsparse::RS_ISA
