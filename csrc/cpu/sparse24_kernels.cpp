// 2:4 linear, forward.
//   output[b, o] = activation(sum_k values[o, k] * x[b, 4 (k / 2) + position(o, k)] + bias[o])
//   values [O, I / 2]   positions [O, I / 8]: 2 bits for each kept value, low bits first
//
// Two kernels, each with half the multiply-adds of the dense product:
//   linear_panel  many rows: lanes are batch rows. A weight is broadcast, its position picks one of
//                 four neighbouring panel rows by address; metadata costs two integer operations.
//   linear_rows   few rows: lanes are kept values. Their positions become a register index, once
//   for
//                 all rows, that picks the inputs in registers; reads half the weight bytes.
#include "sparse24_kernels.h"

#include "panel.h"

namespace recsparse::RS_ISA {
namespace {

constexpr int kStep = 16;  // columns of one unrolled step: 8 kept, 16 position bits
constexpr int kChunkBytes =
    24 * 1024;                    // panel bytes per pass over the outputs: stays in a 32 KB L1
constexpr int kOutputsAhead = 4;  // weight rows prefetched: their stride defeats the hardware

template <class T>
RS_INLINE uint32_t read_bits(const T* from, int bytes) {
  uint32_t bits = 0;
  std::memcpy(&bits, from, size_t(bytes));
  return bits;
}

constexpr int log2_of(int64_t n) { return n <= 1 ? 0 : 1 + log2_of(n / 2); }

// tile[o] += weights[o] times `steps` * kStep panel rows, for kOutputs outputs.
template <int kVecs, int kOutputs>
__attribute__((noinline)) void accumulate(const float* panel, int64_t steps, const float* weights,
                                          int64_t weight_stride, const uint8_t* positions,
                                          int64_t position_stride, float* tile, bool first) {
  constexpr int64_t kRows = kVecs * kLanes;
  constexpr int kShift = log2_of(kRows);
  static_assert((int64_t(1) << kShift) == kRows, "a position is shifted into a panel offset");
  Vec acc[kOutputs][kVecs];
#pragma GCC unroll 8
  for (int o = 0; o < kOutputs; ++o)
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) acc[o][v] = zero();
  for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 8
    for (int o = 0; o < kOutputs; ++o) {
      const uint64_t bits = uint64_t(read_bits(positions + o * position_stride, 2)) << kShift;
#pragma GCC unroll 8
      for (int k = 0; k < kStep / 2; ++k) {
        const float* column =
            panel + ((bits >> (2 * k)) & (uint64_t(3) << kShift)) + k / 2 * 4 * kRows;
        const Vec weight = broadcast(weights[o * weight_stride + k]);
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; ++v)
          acc[o][v] = fmadd(weight, load(column + v * kLanes), acc[o][v]);
      }
    }
    panel += kStep * kRows;
    weights += kStep / 2;
    positions += kStep / 8;
  }
#pragma GCC unroll 8
  for (int o = 0; o < kOutputs; ++o)
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) {
      float* to = tile + o * kRows + v * kLanes;
      store(to, first ? acc[o][v] : load(to) + acc[o][v]);  // a sum of sums rounds less
    }
}

template <class T>
void widen(const T* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i += 8) {  // counts here are multiples of 8
    if (kLanes == 16 && i + 16 <= count) {
      store(to + i, load(from + i));
      i += 8;
    } else {
      store_first(to + i, load_first(from + i, 8), 8);
    }
  }
}

template <class T, int kVecs>
void linear_panel_vecs(const float* panel, int64_t I, const T* values, const uint8_t* positions,
                       int64_t outputs, float* tile, float* scratch) {
  constexpr int64_t kRows = kVecs * kLanes;
  constexpr int64_t kChunk = kChunkBytes / 4 / kRows / kStep * kStep;  // columns
  constexpr int kOutputs = kVecs >= 8 ? 1 : kVecs == 4 ? 2 : 4;  // enough independent accumulators
  for (int64_t begin = 0; begin < I; begin += kChunk) {
    const int64_t width = I - begin < kChunk ? I - begin : kChunk;
    const float* weights;
    int64_t weight_stride;
    if constexpr (sizeof(T) == 4) {
      weights = values + begin / 2;
      weight_stride = I / 2;
    } else {
      for (int64_t o = 0; o < outputs; ++o)
        widen(values + o * (I / 2) + begin / 2, width / 2, scratch + o * (width / 2));
      weights = scratch;
      weight_stride = width / 2;
    }
    const uint8_t* bits = positions + begin / 8;
    int64_t o = 0;
    for (; o + kOutputs <= outputs; o += kOutputs) {
      const float* ahead = weights + (o + kOutputsAhead) * weight_stride;
      for (int64_t i = 0; i < width / 2; i += 16) __builtin_prefetch(ahead + i);
      __builtin_prefetch(bits + (o + kOutputsAhead) * (I / 8));
      accumulate<kVecs, kOutputs>(panel + begin * kRows, width / kStep, weights + o * weight_stride,
                                  weight_stride, bits + o * (I / 8), I / 8, tile + o * kRows,
                                  begin == 0);
    }
    for (; o < outputs; ++o)
      accumulate<kVecs, 1>(panel + begin * kRows, width / kStep, weights + o * weight_stride,
                           weight_stride, bits + o * (I / 8), I / 8, tile + o * kRows, begin == 0);
  }
}

template <class T>
void linear_panel(const float* panel, int vecs, int64_t I, const T* values,
                  const uint8_t* positions, int64_t outputs, float* tile, float* scratch) {
  with_panel_vecs(vecs, [&](auto tag) {
    linear_panel_vecs<T, decltype(tag)::value>(panel, I, values, positions, outputs, tile, scratch);
  });
}

// sums[b, o] = dot product of kOutputs compressed rows and kBatch inputs.
template <class T, int kBatch, int kOutputs>
RS_INLINE void dot_rows(const float* x, int64_t x_stride, int64_t kept, const T* values,
                        const uint8_t* positions, float* sums, int64_t sums_stride) {
  Vec acc[kOutputs][kBatch];
#pragma GCC unroll 8
  for (int o = 0; o < kOutputs; ++o)
#pragma GCC unroll 8
    for (int b = 0; b < kBatch; ++b) acc[o][b] = zero();
  constexpr int64_t kAhead =
      1024 / int64_t(sizeof(T));  // prefetched: into the next rows at the end
  const auto step = [&](int64_t k, auto load_values, int position_bytes)
      __attribute__((always_inline)) {
    Vec weight[kOutputs];
    Picks columns[kOutputs];
    const T* ahead = values + k + kAhead + (k + kAhead < kept ? 0 : (kOutputs - 1) * kept);
#pragma GCC unroll 8
    for (int o = 0; o < kOutputs; ++o) {
      __builtin_prefetch(ahead + o * kept);
      weight[o] = load_values(values + o * kept + k);
      columns[o] = kept_columns(read_bits(positions + o * (kept / 4) + k / 4, position_bytes));
    }
#pragma GCC unroll 8
    for (int b = 0; b < kBatch; ++b) {
      const Vec low = load(x + b * x_stride + 2 * k);
      const Vec high = load(x + b * x_stride + 2 * k + kLanes);
#pragma GCC unroll 8
      for (int o = 0; o < kOutputs; ++o)
        acc[o][b] = fmadd(weight[o], pick(columns[o], low, high), acc[o][b]);
    }
  };
  int64_t k = 0;
  for (; k + kLanes <= kept; k += kLanes) step(k, [](const T* p) { return load(p); }, kLanes / 4);
  if (k < kept) step(k, [](const T* p) { return load_first(p, 8); }, 2);
#pragma GCC unroll 8
  for (int o = 0; o < kOutputs; ++o)
#pragma GCC unroll 8
    for (int b = 0; b < kBatch; ++b) sums[b * sums_stride + o] = sum_lanes(acc[o][b]);
}

template <class T, int kBatch>
void linear_rows_batch(const float* x, int64_t x_stride, int batch, int64_t I, const T* values,
                       const uint8_t* positions, int64_t outputs, const T* bias,
                       Activation activation, T* output, T* pre, int64_t stride) {
  constexpr int kRegisters = kLanes == 16 ? 16 : 8;  // accumulators that leave room for the rest
  constexpr int kOutputs = kRegisters / kBatch >= 4 ? 4 : kRegisters / kBatch >= 2 ? 2 : 1;
  const int64_t kept = I / 2;
  alignas(64) float sums[kBatch * kOutputBlock];
  for (int64_t block = 0; block < outputs; block += kOutputBlock) {
    const int64_t count = outputs - block < kOutputBlock ? outputs - block : kOutputBlock;
    int64_t o = 0;
    for (; o + kOutputs <= count; o += kOutputs)
      dot_rows<T, kBatch, kOutputs>(x, x_stride, kept, values + (block + o) * kept,
                                    positions + (block + o) * (kept / 4), sums + o, kOutputBlock);
    for (; o < count; ++o)
      dot_rows<T, kBatch, 1>(x, x_stride, kept, values + (block + o) * kept,
                             positions + (block + o) * (kept / 4), sums + o, kOutputBlock);
    with_activation(activation, [&](auto tag) {
      for (int b = 0; b < batch; ++b)
        for (int64_t at = 0; at < count; at += kLanes) {
          const int64_t lanes = count - at < kLanes ? count - at : kLanes;
          const int64_t to = b * stride + block + at;
          finish_row<T, decltype(tag)::value>(load_first(sums + b * kOutputBlock + at, lanes),
                                              bias ? bias + block + at : nullptr, output + to,
                                              pre ? pre + to : nullptr, lanes);
        }
    });
  }
}

// Other batches than 1, 2, 4, 8 compute rows of zeros (x has them) and do not store those.
template <class T>
void linear_rows(const float* x, int64_t x_stride, int batch, int64_t I, const T* values,
                 const uint8_t* positions, int64_t outputs, const T* bias, Activation activation,
                 T* output, T* pre, int64_t stride) {
  const auto run = [&](auto tag) {
    linear_rows_batch<T, decltype(tag)::value>(x, x_stride, batch, I, values, positions, outputs,
                                               bias, activation, output, pre, stride);
  };
  if (batch <= 1) return run(IntTag<1>());
  if (batch <= 2) return run(IntTag<2>());
  if (batch <= 4) return run(IntTag<4>());
  run(IntTag<kSmallBatch>());
}

template <class T>
void widen_row(const T* x, int64_t columns, int64_t padded, float* out) {
  for (int64_t c = 0; c < padded; c += kLanes) {
    const int64_t valid = columns - c;
    store(out + c, valid >= kLanes ? load(x + c) : valid > 0 ? load_first(x + c, valid) : zero());
  }
}

}  // namespace

template <class T>
const Sparse24LinearKernels<T>& sparse24_linear_kernels() {
  static constexpr Sparse24LinearKernels<T> table = {
      kLanes,          kPanelVecs,      &pack_panel<T>, &linear_panel<T>,
      &unpack_tile<T>, &linear_rows<T>, &widen_row<T>};
  return table;
}
RS_INSTANTIATE_KERNEL_TABLE(Sparse24LinearKernels, sparse24_linear_kernels)

}  // namespace recsparse::RS_ISA
