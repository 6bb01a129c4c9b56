// 2:4 linear, gradients; g [B, O] is the gradient before the activation.
//   grad_input[b, i]  = sum over o, k with column(o, k) = i of g[b, o] * values[o, k]
//   grad_values[o, k] = sum_b g[b, o] * x[b, column(o, k)]     only at kept positions
//
// Many rows: lanes are batch rows (panel.h). For grad_input the weights of a block of outputs are
// transposed into one list a column; for grad_values each kept value is a dot product of two panel
// rows. Few rows: lanes are columns, and values are expanded or inputs picked in registers.
#include "panel.h"
#include "sparse24_kernels.h"

namespace recsparse::RS_ISA {
namespace {

constexpr int kChunkBytes =
    24 * 1024;  // panel bytes per pass over the outputs: stays in a 32 KB L1

RS_INLINE uint32_t read_bits(const uint8_t* from, int64_t bytes) {
  uint32_t bits = 0;
  std::memcpy(&bits, from, size_t(bytes));
  return bits;
}

constexpr int log2_of(int64_t n) { return n <= 1 ? 0 : 1 + log2_of(n / 2); }

template <class T>
void build_lists(const T* values, const uint8_t* positions, int64_t I, int64_t outputs,
                 int32_t* starts, float* entries, uint8_t* rows, int32_t* cursor) {
  for (int64_t c = 0; c <= I; ++c) starts[c] = 0;
  int32_t* count = starts + 1;
  for (int64_t o = 0; o < outputs; ++o)
    for (int64_t byte = 0; byte < I / 8; ++byte) {
      const unsigned bits = positions[o * (I / 8) + byte];
      const int64_t c = byte * 8;
      ++count[c + (bits & 3)];
      ++count[c + (bits >> 2 & 3)];
      ++count[c + 4 + (bits >> 4 & 3)];
      ++count[c + 4 + (bits >> 6)];
    }
  for (int64_t c = 0; c < I; ++c) {
    cursor[c] = starts[c];
    starts[c + 1] += starts[c];
  }
  for (int64_t o = 0; o < outputs; ++o)  // rising o: the order of summation
    for (int64_t byte = 0; byte < I / 8; ++byte) {
      const unsigned bits = positions[o * (I / 8) + byte];
      const T* from = values + o * (I / 2) + byte * 4;
      for (int k = 0; k < 4; ++k) {
        const int32_t e = cursor[byte * 8 + k / 2 * 4 + (bits >> (2 * k) & 3)]++;
        entries[e] = to_float(from[k]);
        rows[e] = uint8_t(o);
      }
    }
}

template <int kVecs>
void accumulate_lists_vecs(const float* panel, const int32_t* starts, const float* entries,
                           const uint8_t* rows, int64_t columns, float* tile, bool first) {
  constexpr int64_t kRows = kVecs * kLanes;
  for (int64_t c = 0; c < columns; ++c) {
    Vec acc[kVecs];
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) acc[v] = zero();
    const int32_t end = starts[c + 1];
    for (int32_t e = starts[c]; e < end; ++e) {
      const float* from = panel + rows[e] * kRows;
      const Vec weight = broadcast(entries[e]);
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) acc[v] = fmadd(weight, load(from + v * kLanes), acc[v]);
    }
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) {
      float* to = tile + c * kRows + v * kLanes;
      store(to, first ? acc[v] : load(to) + acc[v]);  // a sum of sums rounds less
    }
  }
}

void accumulate_lists(const float* panel, int vecs, const int32_t* starts, const float* entries,
                      const uint8_t* rows, int64_t columns, float* tile, bool first) {
  with_panel_vecs(vecs, [&](auto tag) {
    accumulate_lists_vecs<decltype(tag)::value>(panel, starts, entries, rows, columns, tile, first);
  });
}

// sums [b] columns of one step += kOutputs compressed rows times their gradients.
template <class T, int kOutputs>
RS_INLINE void add_expanded(const T* grad, int64_t grad_stride, int batch, const T* values,
                            int64_t value_stride, const uint8_t* positions, int64_t position_stride,
                            int64_t kept, float* sums, int64_t sums_stride) {
  for (int64_t k = 0; k < kept; k += kLanes) {
    const int64_t count = kept - k < kLanes ? kept - k : kLanes;
    Vec low[kOutputs], high[kOutputs];
#pragma GCC unroll 4
    for (int o = 0; o < kOutputs; ++o) {
      const T* from = values + o * value_stride + k;
      const Vec weights = count == kLanes ? load(from) : load_first(from, count);
      expand(weights, read_bits(positions + o * position_stride + k / 4, count / 4), low[o],
             high[o]);
    }
    for (int b = 0; b < batch; ++b) {
      float* to = sums + b * sums_stride + 2 * k;
      Vec sum_low = load(to), sum_high = load(to + kLanes);
#pragma GCC unroll 4
      for (int o = 0; o < kOutputs; ++o) {
        const Vec g = broadcast(to_float(grad[b * grad_stride + o]));
        sum_low = fmadd(g, low[o], sum_low);
        sum_high = fmadd(g, high[o], sum_high);
      }
      store(to, sum_low);
      store(to + kLanes, sum_high);
    }
  }
}

template <class T>
void grad_input_rows(const T* grad, int64_t grad_stride, int batch, const T* values,
                     const uint8_t* positions, int64_t I, int64_t outputs, int64_t begin,
                     int64_t end, float* sums, T* out, int64_t out_stride, int64_t columns) {
  constexpr int kOutputs = kLanes == 16 ? 4 : 2;
  const int64_t width = end - begin, sums_stride = width + 32;
  for (int64_t i = 0; i < batch * sums_stride; ++i) sums[i] = 0.0f;
  int64_t o = 0;
  for (; o + kOutputs <= outputs; o += kOutputs)
    add_expanded<T, kOutputs>(grad + o, grad_stride, batch, values + o * (I / 2) + begin / 2, I / 2,
                              positions + o * (I / 8) + begin / 8, I / 8, width / 2, sums,
                              sums_stride);
  for (; o < outputs; ++o)
    add_expanded<T, 1>(grad + o, grad_stride, batch, values + o * (I / 2) + begin / 2, I / 2,
                       positions + o * (I / 8) + begin / 8, I / 8, width / 2, sums, sums_stride);
  const int64_t last = end < columns ? end : columns;
  for (int b = 0; b < batch; ++b)
    for (int64_t c = begin; c < last; c += kLanes)
      store_first(out + b * out_stride + c, load(sums + b * sums_stride + c - begin),
                  last - c < kLanes ? last - c : kLanes);
}

// Dot products of the gradients of one output with the panel rows of kKept kept columns, in lanes.
template <int kVecs, int kKept>
RS_INLINE Vec dot_columns(const Vec (&g)[kVecs], const float* x, const uint8_t* positions) {
  constexpr int64_t kRows = kVecs * kLanes;
  constexpr int kShift = log2_of(kRows);
  const uint64_t bits = uint64_t(read_bits(positions, kKept / 4)) << kShift;
  Vec acc[kLanes];
#pragma GCC unroll 16
  for (int k = 0; k < kLanes; ++k) {
    acc[k] = zero();
    if (k >= kKept) continue;
    const float* column = x + ((bits >> (2 * k)) & (uint64_t(3) << kShift)) + k / 2 * 4 * kRows;
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) acc[k] = fmadd(g[v], load(column + v * kLanes), acc[k]);
  }
  return sum_each(acc);
}

template <int kVecs>
void grad_values_panel_vecs(const float* grad_panel, const float* x_panel, const uint8_t* positions,
                            int64_t I, int64_t outputs, int64_t begin, int64_t end, float* sums,
                            int64_t sums_stride) {
  constexpr int64_t kRows = kVecs * kLanes;
  constexpr int64_t kStep = 2 * kLanes;  // columns of kLanes kept values
  constexpr int64_t kChunk = kChunkBytes / 4 / kRows / kStep * kStep;  // columns
  for (int64_t chunk = begin; chunk < end; chunk += kChunk) {
    const int64_t chunk_end = end - chunk < kChunk ? end : chunk + kChunk;
    for (int64_t o = 0; o < outputs; ++o) {
      Vec g[kVecs];
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) g[v] = load(grad_panel + o * kRows + v * kLanes);
      const uint8_t* from = positions + o * (I / 8);
      float* to = sums + o * sums_stride - begin / 2;
      int64_t c = chunk;
      for (; c + kStep <= chunk_end; c += kStep) {
        const Vec dots = dot_columns<kVecs, kLanes>(g, x_panel + c * kRows, from + c / 8);
        store(to + c / 2, dots + load(to + c / 2));
      }
      if (c < chunk_end) {
        const Vec dots = dot_columns<kVecs, 8>(g, x_panel + c * kRows, from + c / 8);
        store_first(to + c / 2, dots + load_first(to + c / 2, 8), 8);
      }
    }
  }
}

void grad_values_panel(const float* grad_panel, const float* x_panel, int vecs,
                       const uint8_t* positions, int64_t I, int64_t outputs, int64_t begin,
                       int64_t end, float* sums, int64_t sums_stride) {
  with_panel_vecs(vecs, [&](auto tag) {
    grad_values_panel_vecs<decltype(tag)::value>(grad_panel, x_panel, positions, I, outputs, begin,
                                                 end, sums, sums_stride);
  });
}

template <class T, int kBatch>
void grad_values_rows_batch(const float* grad, int64_t grad_stride, const float* x,
                            int64_t x_stride, const uint8_t* positions, int64_t I, int64_t outputs,
                            T* out) {
  const int64_t kept = I / 2;
  for (int64_t o = 0; o < outputs; ++o) {
    Vec g[kBatch];
#pragma GCC unroll 8
    for (int b = 0; b < kBatch; ++b) g[b] = broadcast(grad[b * grad_stride + o]);
    for (int64_t k = 0; k < kept; k += kLanes) {
      const int64_t count = kept - k < kLanes ? kept - k : kLanes;
      const Picks from = kept_columns(read_bits(positions + o * (I / 8) + k / 4, count / 4));
      Vec sum = zero();
#pragma GCC unroll 8
      for (int b = 0; b < kBatch; ++b) {
        const float* row = x + b * x_stride + 2 * k;
        sum = fmadd(g[b], pick(from, load(row), load(row + kLanes)), sum);
      }
      if (count == kLanes) {
        store(out + o * kept + k, sum);
      } else {
        store_first(out + o * kept + k, sum, count);
      }
    }
  }
}

template <class T>
void grad_values_rows(const float* grad, int64_t grad_stride, const float* x, int64_t x_stride,
                      int batch, const uint8_t* positions, int64_t I, int64_t outputs, T* out) {
  const auto run = [&](auto tag) {
    grad_values_rows_batch<T, decltype(tag)::value>(grad, grad_stride, x, x_stride, positions, I,
                                                    outputs, out);
  };
  if (batch <= 1) return run(IntTag<1>());
  if (batch <= 2) return run(IntTag<2>());
  if (batch <= 4) return run(IntTag<4>());
  run(IntTag<kSmallBatch>());
}

template <class T>
void narrow_row(const float* sums, int64_t count, T* out) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t lanes = count - i < kLanes ? count - i : kLanes;
    store_first(out + i, load_first(sums + i, lanes), lanes);
  }
}

}  // namespace

template <class T>
const Sparse24GradKernels<T>& sparse24_grad_kernels() {
  static constexpr Sparse24GradKernels<T> table = {&build_lists<T>,      &accumulate_lists,
                                                   &grad_input_rows<T>,  &grad_values_panel,
                                                   &grad_values_rows<T>, &narrow_row<T>};
  return table;
}
RS_INSTANTIATE_KERNEL_TABLE(Sparse24GradKernels, sparse24_grad_kernels)

}  // namespace recsparse::RS_ISA
