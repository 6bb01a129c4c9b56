// Gradient of the values of a masked table, one segment (all lookups of one row) at a time.
//   g[d] = sum over the row's lookups j of weights[j] bag_scale[bag(j)] grad_output[bag(j), d]
//          (with argmax: only where argmax[bag(j), d] is j's place in the bag)
// at the kept columns d only; it is summed in registers at full width, then moved together once,
// and either stored or consumed by the optimizer at once.
#include "masked_embedding_rows.h"

namespace recsparse {
namespace RS_ISA {

constexpr int64_t kAhead = 6;  // lookups; a row of grad_output and of values each

// One row's gradient, dense to packed: 64 columns a pass, lanes past the kept ones overwritten by
// the next.
constexpr int64_t kRowBuffer = kMaxMaskedDim + 64;

template <int kVectors, class T>
RS_INLINE void segment_columns(const MaskedTable<T>& table, const MaskedSegments<T>& job,
                               int64_t first, int64_t last, int64_t column, Vec (&acc)[kVectors]) {
  const uint64_t payload_mask = low_bits(job.payload_bits);
  for (int v = 0; v < kVectors; ++v) acc[v] = zero();
  for (int64_t e = first; e < last; ++e) {
    const int64_t payload = int64_t(job.sorted[e] & payload_mask);
    const int64_t bag = job.bag_of ? job.bag_of[payload] : payload;
    float scale = job.weights ? job.weights[payload] : 1.0f;
    if (job.bag_scale) scale *= job.bag_scale[bag];
    const int64_t at = bag * table.dim + column;
    const bool scaled = job.weights || job.bag_scale;
    const int32_t place = job.argmax ? int32_t(payload - job.in->begin(bag)) : 0;
    for (int v = 0; v < kVectors; ++v) {
      const int64_t columns = table.dim - column - v * kLanes;
      Vec grad = load_columns(job.grad_output + at + v * kLanes, columns);
      if (job.argmax) {
        float chosen[kLanes];
        for (int lane = 0; lane < kLanes; ++lane)
          chosen[lane] =
              lane < columns && job.argmax[at + v * kLanes + lane] == place ? 1.0f : 0.0f;
        grad = select(less(zero(), load(chosen)), grad, zero());
      }
      acc[v] = scaled ? fmadd(grad, broadcast(scale), acc[v]) : acc[v] + grad;
    }
  }
}

RS_INLINE void sgd_update(float* g, int64_t count, float lr) {  // g becomes the step
  for (int64_t n = 0; n < count; n += kLanes) store(g + n, load(g + n) * broadcast(lr));
}

RS_INLINE float sum_of_squares(const float* g, int64_t count) {
  Vec acc = zero();
  for (int64_t n = 0; n < count; n += kLanes) {
    const Vec part = load_columns(g + n, count - n);
    acc = fmadd(part, part, acc);
  }
  return sum_lanes(acc);
}

template <class T>
RS_INLINE void adam_update(const MaskedSegments<T>& job, float* g, int64_t count, int64_t start) {
  const Vec beta1 = broadcast(job.beta1), beta2 = broadcast(job.beta2);
  const Vec rest1 = broadcast(job.rest1), rest2 = broadcast(job.rest2);
  const Vec step = broadcast(job.lr / job.correction1);
  const Vec root = broadcast(1.0f / job.correction2), eps = broadcast(job.eps);
  for (int64_t n = 0; n < count; n += kLanes) {
    const int64_t lanes = count - n;
    const Vec grad = load(g + n);
    const Vec m = fmadd(rest1, grad, beta1 * load_columns(job.state + start + n, lanes));
    const Vec v =
        fmadd(rest2 * grad, grad, beta2 * load_columns(job.second_state + start + n, lanes));
    store_columns(job.state + start + n, m, lanes);
    store_columns(job.second_state + start + n, v, lanes);
    store(g + n, step * m / fmadd(sqrt(v), root, eps));
  }
}

template <class T>
RS_INLINE void consume(const MaskedTable<T>& table, const MaskedSegments<T>& job, int64_t s,
                       int64_t row, int64_t start, int64_t count, float* g) {
  if (job.grad_values || job.touched) {
    T* out = job.grad_values ? job.grad_values + start : job.touched + job.touched_offset[s];
    for (int64_t n = 0; n < count; n += kLanes) store_columns(out + n, load(g + n), count - n);
    if (job.touched_position)
      for (int64_t n = 0; n < count; ++n)
        job.touched_position[job.touched_offset[s] + n] = start + n;
    return;
  }
  if (job.optimizer == MaskedOptimizer::kAdam) {
    adam_update(job, g, count, start);
  } else if (job.optimizer == MaskedOptimizer::kRowAdagrad) {
    const float sum = job.state[row] + sum_of_squares(g, count) / float(table.dim);
    job.state[row] = sum;
    sgd_update(g, count, job.lr / (__builtin_sqrtf(sum) + job.eps));
  } else {
    sgd_update(g, count, job.lr);
  }
  T* values = job.update_values + start;
  for (int64_t n = 0; n < count; n += kLanes) {
    const Vec updated = load_columns(values + n, count - n) - load(g + n);
    store_columns(values + n, updated, count - n);
  }
}

// kVectors: of one pass over the columns; 64 columns unless D is smaller.
template <int kVectors, class T, class Reader>
bool apply_segments(const Reader& reader, const MaskedSegments<T>& job, int64_t begin,
                    int64_t end) {
  const MaskedTable<T>& table = reader.table;
  constexpr uint64_t kLaneBits = (uint64_t(1) << kLanes) - 1;
  const uint64_t payload_mask = low_bits(job.payload_bits);
  const int64_t last_entry = job.segments[end];
  alignas(64) float packed[kRowBuffer];
  bool consistent = true;
  for (int64_t s = begin; s < end; ++s) {
    const int64_t first = job.segments[s], last = job.segments[s + 1];
    const int64_t row = int64_t(job.sorted[first] >> job.payload_bits);
    if (first + 2 * kAhead < last_entry)
      reader.prefetch_header(int64_t(job.sorted[first + 2 * kAhead] >> job.payload_bits));
    if (first + kAhead < last_entry) {
      const uint64_t ahead = job.sorted[first + kAhead];
      reader.prefetch_values(int64_t(ahead >> job.payload_bits));
      if (!job.bag_of) {
        const char* grad =
            reinterpret_cast<const char*>(job.grad_output + (ahead & payload_mask) * table.dim);
        for (int64_t line = 0; line < int64_t(sizeof(T)) * kVectors * kLanes; line += 64)
          __builtin_prefetch(grad + line);
      }
    }
    int64_t count = 0, row_start = 0;
    for (int64_t column = 0; column < table.dim; column += 64) {
      uint64_t bits[1];
      int64_t start;
      if (!reader.template read<1>(row, column / 64, bits, &start) ||
          !inside(table, start, popcount(bits[0]))) {
        consistent = false;
        count = 0;
        break;
      }
      if (column == 0) row_start = start;
      if (bits[0] == 0) continue;
      Vec acc[kVectors];
      segment_columns(table, job, first, last, column, acc);
      if (job.by_frequency) {
        const Vec frequency = broadcast(float(last - first));
        for (int v = 0; v < kVectors; ++v) acc[v] = acc[v] / frequency;
      }
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        const uint32_t lanes = uint32_t(bits[0] >> (v * kLanes) & kLaneBits);
        store(packed + count, compress_lanes(lanes, acc[v]));
        count += popcount(lanes);
      }
    }
    if (count) consume(table, job, s, row, row_start, count, packed);
  }
  return consistent;
}

template <class T>
bool apply(const MaskedTable<T>& table, const MaskedSegments<T>& job, int64_t begin, int64_t end) {
  return with_reader(table, [&](const auto& reader) {
    bool consistent = true;
    with_vectors(table.dim < 64 ? table.dim : 64, [&](auto n) {
      if constexpr (n.value * kLanes <= 64)
        consistent = apply_segments<n.value>(reader, job, begin, end);
    });
    return consistent;
  });
}

template <class T>
bool count_kept(const MaskedTable<T>& table, const MaskedSegments<T>& job, int64_t begin,
                int64_t end, int64_t* counts) {
  return with_reader(table, [&](const auto& reader) {
    bool consistent = true;
    for (int64_t s = begin; s < end; ++s) {
      const int64_t first = job.segments[s];
      if (first + 2 * kAhead < job.segments[end])
        reader.prefetch_header(int64_t(job.sorted[first + 2 * kAhead] >> job.payload_bits));
      counts[s] = 0;
      for (int64_t word = 0; word * 64 < table.dim; ++word) {
        uint64_t bits[1];
        int64_t start;
        if (reader.template read<1>(int64_t(job.sorted[first] >> job.payload_bits), word, bits,
                                    &start))
          counts[s] += popcount(bits[0]);
        else
          consistent = false;
      }
    }
    return consistent;
  });
}

template <class T>
const MaskedGradKernels<T>& masked_grad_kernels() {
  static constexpr MaskedGradKernels<T> table = {&count_kept<T>, &apply<T>};
  return table;
}
RS_INSTANTIATE_KERNEL_TABLE(MaskedGradKernels, masked_grad_kernels)

}  // namespace RS_ISA
}  // namespace recsparse
