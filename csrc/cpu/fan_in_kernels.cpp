// Inner loops of the fixed fan-in ops; layouts and formulas in fan_in_kernels.h.
#include "fan_in_kernels.h"

#include "vec.h"
#include "vec_math.h"

namespace recsparse {
namespace RS_ISA {
namespace {

// Labels worked on together: their accumulators hide the latency of a multiply-add. Labels that
// share their inputs also share the loads, so more of them pay; AVX-512 has 32 registers for it,
// the others 16.
constexpr int kSeparate = 4;
#if defined(RS_ISA_AVX512)
constexpr int kShared = 8;
#else
constexpr int kShared = 4;
#endif
constexpr int64_t kLine = 64;  // bytes of a cache line

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- layout ----

template <class T>
void widen(const T* source, int64_t count, float* target) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(target + i, load(source + i));
  if (i < count) store_first(target + i, load_first(source + i, count - i), count - i);
}

template <class T>
void narrow(const float* source, int64_t count, T* target) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(target + i, load(source + i));
  if (i < count) store_first(target + i, load_first(source + i, count - i), count - i);
}

template <class T>
void pack(const T* source, int64_t stride, int64_t rows, int64_t columns, int64_t lanes,
          float* panel) {
  if (lanes == 1) return widen(source, columns, panel);
  const int64_t stored = smaller(lanes, kLanes);
  for (int64_t c = 0; c < columns; c += kLanes) {
    const int64_t width = smaller(kLanes, columns - c);
    for (int64_t lane = 0; lane < lanes; lane += kLanes) {
      Vec block[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const int64_t r = lane + i;
        block[i] = r >= rows        ? zero()
                   : width < kLanes ? load_first(source + r * stride + c, width)
                                    : load(source + r * stride + c);
      }
      transpose(block);
      float* out = panel + c * lanes + lane;
      if (stored == kLanes) {
        for (int64_t i = 0; i < width; ++i) store(out + i * lanes, block[i]);
      } else {
        for (int64_t i = 0; i < width; ++i) store_first(out + i * lanes, block[i], stored);
      }
    }
  }
}

template <class T>
void unpack(const float* panel, int64_t rows, int64_t columns, int64_t lanes, T* target,
            int64_t stride) {
  if (lanes == 1) return narrow(panel, columns, target);
  const int64_t stored = smaller(lanes, kLanes);
  for (int64_t lane = 0; lane < rows; lane += kLanes) {
    const int64_t height = smaller(kLanes, rows - lane);
    for (int64_t c = 0; c < columns; c += kLanes) {
      const int64_t width = smaller(kLanes, columns - c);
      Vec block[kLanes];
      const float* in = panel + c * lanes + lane;
      for (int i = 0; i < kLanes; ++i)
        block[i] = i >= width         ? zero()
                   : stored == kLanes ? load(in + i * lanes)
                                      : load_first(in + i * lanes, stored);
      transpose(block);
      T* out = target + lane * stride + c;
      if (width == kLanes) {
        for (int64_t i = 0; i < height; ++i) store(out + i * stride, block[i]);
      } else {
        for (int64_t i = 0; i < height; ++i) store_first(out + i * stride, block[i], width);
      }
    }
  }
}

void add(const float* source, int64_t count, float* target) {
  for (int64_t i = 0; i < count; ++i) target[i] += source[i];
}

template <class T>
void stream_rows(const T* source, int64_t pitch, int64_t rows, int64_t count, T* target,
                 int64_t stride) {
  constexpr int64_t kBytes = kLanes * sizeof(float), kStep = kBytes / sizeof(T);
  for (int64_t r = 0; r < rows; ++r) {
    const T* in = source + r * pitch;
    T* out = target + r * stride;
    const int64_t past = int64_t(reinterpret_cast<uintptr_t>(out) % kBytes / sizeof(T));
    int64_t i = smaller(past ? kStep - past : 0, count);
    std::memcpy(out, in, size_t(i) * sizeof(T));
    for (; i + kStep <= count; i += kStep)  // whichever bits they are
      stream(reinterpret_cast<float*>(out + i), load(reinterpret_cast<const float*>(in + i)));
    std::memcpy(out + i, in + i, size_t(count - i) * sizeof(T));
  }
  stream_end();
}

uint32_t mix(uint32_t x) {  // a 32-bit integer hash: multiply and xor-shift
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// 16 random bits are added below the last kept bit.
template <class T>
void narrow_stochastic(const float* source, int64_t count, int64_t first, uint64_t key, T* target) {
  if constexpr (sizeof(T) == 4)
    return narrow(source, count, target);  // nothing to round
  else
    for (int64_t i = 0; i < count; ++i) {
      const uint64_t element = uint64_t(first + i);
      const uint32_t low = mix(uint32_t(element) ^ uint32_t(key));
      const uint32_t random = mix(low + (uint32_t(element >> 32) ^ uint32_t(key >> 32)));
      const uint32_t bits = float_to_bits(source[i]);
      const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
      const uint32_t quiet = (bits & 0x007fffffu) ? 0x00400000u : 0u;  // NaN stays NaN
      target[i].bits = uint16_t((finite ? bits + (random >> 16) : bits | quiet) >> 16);
    }
}

// ---- indices ----

// indices of a tile as the type they are stored in
template <class F>
RS_INLINE void with_indices(const FanInTile& tile, F f) {
  if (tile.narrow) return f(static_cast<const int16_t*>(tile.indices));
  f(static_cast<const int32_t*>(tile.indices));
}

template <class Index, class Bits>
bool in_range(const Index* indices, int64_t count, int64_t limit) {
  Bits highest = 0;  // a negative index is above every other
  for (int64_t i = 0; i < count; ++i)
    highest = Bits(indices[i]) > highest ? Bits(indices[i]) : highest;
  const bool negative = highest >> (8 * sizeof(Bits) - 1);
  return count == 0 || (!negative && int64_t(highest) < limit);
}

// Four indices in one or two loads; all are known to be in range.
RS_INLINE void read_four(const int16_t* p, int64_t* at) {
  uint64_t bits;
  std::memcpy(&bits, p, sizeof(bits));
  at[0] = int64_t(bits & 0xffff);
  at[1] = int64_t(bits >> 16 & 0xffff);
  at[2] = int64_t(bits >> 32 & 0xffff);
  at[3] = int64_t(bits >> 48);
}
RS_INLINE void read_four(const int32_t* p, int64_t* at) {
  uint64_t bits[2];
  std::memcpy(bits, p, sizeof(bits));
  for (int i = 0; i < 2; ++i) {
    at[2 * i] = int64_t(bits[i] & 0xffffffff);
    at[2 * i + 1] = int64_t(bits[i] >> 32);
  }
}

// Bytes [begin, end) from base, which may lie past the tensor: only a hint to the cache.
RS_INLINE void prefetch(const char* base, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i += kLine) __builtin_prefetch(base + i, 0, 2);
}
// What a later pass reads in the place of labels [label, label + labels).
RS_INLINE void prefetch_ahead(const FanInTile& tile, int64_t label, int64_t labels) {
  for (const FanInAhead& a : tile.ahead)
    if (a.base) prefetch(a.base, label * a.bytes_per_label, (label + labels) * a.bytes_per_label);
}

// ---- logits ----

// Sums and bias. The bias comes last: small products added to a large bias would each be rounded.
template <int kLabels, int kVecs>
RS_INLINE void store_logits(const FanInTile& tile, int64_t label, const Vec (&sum)[kLabels][kVecs],
                            float* logits) {
  float* out = logits + label * kVecs * kLanes;
  for (int j = 0; j < kLabels; ++j) {
    const Vec bias = tile.bias ? broadcast(tile.bias[label + j]) : zero();
    for (int v = 0; v < kVecs; ++v) store(out + (j * kVecs + v) * kLanes, sum[j][v] + bias);
  }
}

// Labels with inputs of their own, against a panel of kVecs vectors.
template <int kLabels, int kVecs, class Index>
RS_INLINE void logits_separate(const FanInTile& tile, int64_t label, const Index* indices,
                               const float* panel, float* logits) {
  constexpr int64_t kRow = kVecs * kLanes;
  const int64_t fan_in = tile.fan_in;
  const float* weight = tile.weight + label * fan_in;
  Vec sum[kLabels][kVecs];
  for (int j = 0; j < kLabels; ++j)
    for (int v = 0; v < kVecs; ++v) sum[j][v] = zero();
  const auto add = [&](int j, Vec w, int64_t at) __attribute__((always_inline)) {
    for (int v = 0; v < kVecs; ++v)
      sum[j][v] = fmadd(w, load(panel + at * kRow + v * kLanes), sum[j][v]);
  };
  int64_t f = 0;
  for (; f + 4 <= fan_in; f += 4) {
    for (int j = 0; j < kLabels; ++j) {
      // a load of four weights and shuffles: the loads of x keep the load ports busy
      const Vec weights = load_quads(weight + j * fan_in + f);
      int64_t at[4];
      read_four(indices + j * fan_in + f, at);
      add(j, quad_lane<0>(weights), at[0]);
      add(j, quad_lane<1>(weights), at[1]);
      add(j, quad_lane<2>(weights), at[2]);
      add(j, quad_lane<3>(weights), at[3]);
    }
  }
  for (; f < fan_in; ++f)
    for (int j = 0; j < kLabels; ++j)
      add(j, broadcast(weight[j * fan_in + f]), int64_t(indices[j * fan_in + f]));
  store_logits<kLabels, kVecs>(tile, label, sum, logits);
}

// Labels that share their inputs.
template <int kLabels, int kVecs, class Index>
RS_INLINE void logits_shared(const FanInTile& tile, int64_t label, const Index* indices,
                             const float* panel, float* logits) {
  constexpr int64_t kRow = kVecs * kLanes;
  const int64_t fan_in = tile.fan_in;
  const float* weight = tile.weight + label * fan_in;
  Vec sum[kLabels][kVecs];
  for (int j = 0; j < kLabels; ++j)
    for (int v = 0; v < kVecs; ++v) sum[j][v] = zero();
  for (int64_t f = 0; f < fan_in; ++f) {
    const float* row = panel + int64_t(indices[f]) * kRow;
    Vec x[kVecs];
    for (int v = 0; v < kVecs; ++v) x[v] = load(row + v * kLanes);
    for (int j = 0; j < kLabels; ++j) {
      const Vec w = broadcast(weight[j * fan_in + f]);
      for (int v = 0; v < kVecs; ++v) sum[j][v] = fmadd(w, x[v], sum[j][v]);
    }
  }
  store_logits<kLabels, kVecs>(tile, label, sum, logits);
}

template <int kVecs, class Index>
void logits_of(const FanInTile& tile, const Index* all, const float* panel, float* logits) {
  int64_t label = 0;
  if (tile.group_size == 1) {
    const auto indices = [&] { return all + (tile.first + label) * tile.fan_in; };
    for (; label + kSeparate <= tile.labels; label += kSeparate) {
      prefetch_ahead(tile, label, kSeparate);
      logits_separate<kSeparate, kVecs>(tile, label, indices(), panel, logits);
    }
    for (; label < tile.labels; ++label)
      logits_separate<1, kVecs>(tile, label, indices(), panel, logits);
    return;
  }
  while (label < tile.labels) {
    const int64_t place = tile.first + label;
    const int64_t end = smaller(tile.labels, label + tile.group_size - place % tile.group_size);
    const Index* indices = all + place / tile.group_size * tile.fan_in;
    for (; label + kShared <= end; label += kShared) {
      prefetch_ahead(tile, label, kShared);
      logits_shared<kShared, kVecs>(tile, label, indices, panel, logits);
    }
    for (; label + 2 <= end; label += 2)
      logits_shared<2, kVecs>(tile, label, indices, panel, logits);
    for (; label < end; ++label) logits_shared<1, kVecs>(tile, label, indices, panel, logits);
  }
}

// Small batches: a panel of kRows rows, less than a vector. Memory is the limit here, and sharing
// does not matter.
template <int kLabels, int kRows, class Index>
RS_INLINE void logits_small(const FanInTile& tile, int64_t label, const Index* const* indices,
                            const float* panel, float* logits) {
  const int64_t fan_in = tile.fan_in;
  const float* weight = tile.weight + label * fan_in;
  Narrow<kRows> sum[kLabels] = {};
  int64_t f = 0;
  for (; f + 4 <= fan_in; f += 4) {
    for (int j = 0; j < kLabels; ++j) {
      int64_t at[4];
      read_four(indices[j] + f, at);
      for (int i = 0; i < 4; ++i)
        sum[j] += weight[j * fan_in + f + i] * load_narrow<kRows>(panel + at[i] * kRows);
    }
  }
  for (; f < fan_in; ++f)
    for (int j = 0; j < kLabels; ++j)
      sum[j] += weight[j * fan_in + f] * load_narrow<kRows>(panel + int64_t(indices[j][f]) * kRows);
  for (int j = 0; j < kLabels; ++j) {
    const float bias = tile.bias ? tile.bias[label + j] : 0.0f;
    store_narrow<kRows>(logits + (label + j) * kRows, sum[j] + bias);
  }
}

template <int kRows, class Index>
void logits_small_of(const FanInTile& tile, const Index* all, const float* panel, float* logits) {
  const auto indices = [&](int64_t label) {
    const int64_t place = tile.first + label;
    return all + (tile.group_size == 1 ? place : place / tile.group_size) * tile.fan_in;
  };
  int64_t label = 0;
  for (; label + kSeparate <= tile.labels; label += kSeparate) {
    prefetch_ahead(tile, label, kSeparate);
    const Index* own[kSeparate];
    for (int j = 0; j < kSeparate; ++j) own[j] = indices(label + j);
    logits_small<kSeparate, kRows>(tile, label, own, panel, logits);
  }
  for (; label < tile.labels; ++label) {
    const Index* own = indices(label);
    logits_small<1, kRows>(tile, label, &own, panel, logits);
  }
}

void logits(const FanInTile& tile, const float* panel, float* logits) {
  with_indices(tile, [&](const auto* indices) {
    if (tile.lanes == 1) return logits_small_of<1>(tile, indices, panel, logits);
    if (tile.lanes == 4) return logits_small_of<4>(tile, indices, panel, logits);
    if (tile.lanes == kLanes) return logits_of<1>(tile, indices, panel, logits);
    if (tile.lanes == 8) return logits_small_of<8>(tile, indices, panel, logits);
    logits_of<2>(tile, indices, panel, logits);
  });
}

// ---- gradients ----

RS_INLINE void write_sums(const FanInGradients& out, int64_t at, Vec sums, int64_t count) {
  float* target = out.weight + at;
  if (count == kLanes) return store(target, out.add ? sums + load(target) : sums);
  store_first(target, out.add ? sums + load_first(target, count) : sums, count);
}

// One label: a row of the weight gradient is `count` dot products over the batch, which are folded
// together; the panel gradient is added to row by row, so that repeated indices add up.
template <int kVecs, bool kInput, bool kWeight, class Index>
RS_INLINE void gradients_block(const FanInTile& tile, int64_t label, int64_t f, int64_t count,
                               const Index* indices, const float* panel, const Vec* grad,
                               const FanInGradients& out) {
  Vec products[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i >= count) {
      products[i] = zero();
      continue;
    }
    const int64_t offset = int64_t(indices[f + i]) * (kVecs * kLanes);
    if constexpr (kWeight) {
      products[i] = grad[0] * load(panel + offset);
      if constexpr (kVecs == 2)
        products[i] = fmadd(grad[1], load(panel + offset + kLanes), products[i]);
    }
    if constexpr (kInput) {
      const Vec w = broadcast(tile.weight[label * tile.fan_in + f + i]);
      float* row = out.input + offset;
      for (int v = 0; v < kVecs; ++v)
        store(row + v * kLanes, fmadd(w, grad[v], load(row + v * kLanes)));
    }
  }
  if constexpr (kWeight) write_sums(out, label * tile.fan_in + f, sum_each(products), count);
}

template <int kVecs, bool kInput, bool kWeight, class Index>
void gradients_label(const FanInTile& tile, int64_t label, const Index* indices, const float* panel,
                     const float* grad_logits, const FanInGradients& out) {
  Vec grad[kVecs];
  for (int v = 0; v < kVecs; ++v) grad[v] = load(grad_logits + (label * kVecs + v) * kLanes);
  int64_t f = 0;
  for (; f + kLanes <= tile.fan_in; f += kLanes)
    gradients_block<kVecs, kInput, kWeight>(tile, label, f, kLanes, indices, panel, grad, out);
  if (f < tile.fan_in)
    gradients_block<kVecs, kInput, kWeight>(tile, label, f, tile.fan_in - f, indices, panel, grad,
                                            out);
}

// Labels [begin, end) of one group: their products are summed in registers, and each row of the
// panel gradient is touched once.
template <int kInputs, int kVecs, class Index>
RS_INLINE void grad_panel_block(const FanInTile& tile, int64_t begin, int64_t end, int64_t f,
                                const Index* indices, const float* grad_logits,
                                const FanInGradients& out) {
  Vec sum[kInputs][kVecs];
  for (int i = 0; i < kInputs; ++i)
    for (int v = 0; v < kVecs; ++v) sum[i][v] = zero();
  for (int64_t label = begin; label < end; ++label) {
    const float* weight = tile.weight + label * tile.fan_in + f;
    Vec grad[kVecs];
    for (int v = 0; v < kVecs; ++v) grad[v] = load(grad_logits + (label * kVecs + v) * kLanes);
    for (int i = 0; i < kInputs; ++i) {
      const Vec w = broadcast(weight[i]);
      for (int v = 0; v < kVecs; ++v) sum[i][v] = fmadd(w, grad[v], sum[i][v]);
    }
  }
  for (int i = 0; i < kInputs; ++i) {
    float* row = out.input + int64_t(indices[f + i]) * (kVecs * kLanes);
    for (int v = 0; v < kVecs; ++v) store(row + v * kLanes, load(row + v * kLanes) + sum[i][v]);
  }
}

// kLabels rows of a group's weight gradient, kWidth vectors of inputs:
//   [labels, inputs] = grad_logits [labels, lanes] * x [lanes, inputs]
template <int kLabels, int kWidth>
RS_INLINE void grad_weight_block(const FanInTile& tile, int64_t label, int64_t f, int64_t count,
                                 const float* x, const float* grad_logits,
                                 const FanInGradients& out) {
  Vec sum[kLabels][kWidth];
  for (int j = 0; j < kLabels; ++j)
    for (int v = 0; v < kWidth; ++v) sum[j][v] = zero();
  const float* grad = grad_logits + label * tile.lanes;
  for (int64_t b = 0; b < tile.lanes; ++b) {
    Vec inputs[kWidth];
    for (int v = 0; v < kWidth; ++v) inputs[v] = load(x + (b * kWidth + v) * kLanes);
    for (int j = 0; j < kLabels; ++j) {
      const Vec g = broadcast(grad[j * tile.lanes + b]);
      for (int v = 0; v < kWidth; ++v) sum[j][v] = fmadd(g, inputs[v], sum[j][v]);
    }
  }
  for (int j = 0; j < kLabels; ++j)
    for (int v = 0; v < kWidth; ++v)
      if (count > v * kLanes)
        write_sums(out, (label + j) * tile.fan_in + f + v * kLanes, sum[j][v],
                   smaller(kLanes, count - v * kLanes));
}

// Labels [begin, end) of one group: the inputs they share are gathered and transposed once, and
// the rest is a product of two small matrices.
template <int kVecs, class Index>
void grad_weight_group(const FanInTile& tile, int64_t begin, int64_t end, const Index* indices,
                       const float* panel, const float* grad_logits, const FanInGradients& out) {
  constexpr int kWidth = 2;
  constexpr int64_t kInputs = kWidth * kLanes;
  alignas(64) float x[kVecs * kLanes * kInputs];  // [lanes][kInputs]
  for (int64_t f = 0; f < tile.fan_in; f += kInputs) {
    const int64_t count = smaller(kInputs, tile.fan_in - f);
    for (int v = 0; v < kVecs; ++v) {
      for (int w = 0; w < kWidth; ++w) {
        Vec block[kLanes];
        for (int i = 0; i < kLanes; ++i) {
          const int64_t at = w * kLanes + i;
          block[i] =
              at < count ? load(panel + (int64_t(indices[f + at]) * kVecs + v) * kLanes) : zero();
        }
        transpose(block);
        for (int i = 0; i < kLanes; ++i)
          store(x + (v * kLanes + i) * kInputs + w * kLanes, block[i]);
      }
    }
    int64_t label = begin;
    for (; label + kShared <= end; label += kShared)
      grad_weight_block<kShared, kWidth>(tile, label, f, count, x, grad_logits, out);
    for (; label < end; ++label)
      grad_weight_block<1, kWidth>(tile, label, f, count, x, grad_logits, out);
  }
}

template <int kVecs, class Index>
void gradients_of(const FanInTile& tile, const Index* all, const float* panel,
                  const float* grad_logits, const FanInGradients& out) {
  int64_t label = 0;
  if (tile.group_size == 1) {
    for (; label < tile.labels; ++label) {
      const Index* indices = all + (tile.first + label) * tile.fan_in;
      if (out.input && out.weight)
        gradients_label<kVecs, true, true>(tile, label, indices, panel, grad_logits, out);
      else if (out.input)
        gradients_label<kVecs, true, false>(tile, label, indices, panel, grad_logits, out);
      else if (out.weight)
        gradients_label<kVecs, false, true>(tile, label, indices, panel, grad_logits, out);
    }
    return;
  }
  while (label < tile.labels) {
    const int64_t place = tile.first + label;
    const int64_t end = smaller(tile.labels, label + tile.group_size - place % tile.group_size);
    const Index* indices = all + place / tile.group_size * tile.fan_in;
    if (out.input) {
      int64_t f = 0;
      for (; f + 4 <= tile.fan_in; f += 4)
        grad_panel_block<4, kVecs>(tile, label, end, f, indices, grad_logits, out);
      for (; f < tile.fan_in; ++f)
        grad_panel_block<1, kVecs>(tile, label, end, f, indices, grad_logits, out);
    }
    if (out.weight) {
      if (end - label >= kShared) {
        grad_weight_group<kVecs>(tile, label, end, indices, panel, grad_logits, out);
      } else {
        for (int64_t l = label; l < end; ++l)
          gradients_label<kVecs, false, true>(tile, l, indices, panel, grad_logits, out);
      }
    }
    label = end;
  }
}

void gradients(const FanInTile& tile, const float* panel, const float* grad_logits,
               const FanInGradients& out) {
  if (out.bias) {
    for (int64_t label = 0; label < tile.labels; ++label) {
      Vec sum = zero();
      for (int64_t lane = 0; lane < tile.lanes; lane += kLanes)
        sum = sum + load(grad_logits + label * tile.lanes + lane);
      out.bias[label] = sum_lanes(sum) + (out.add ? out.bias[label] : 0.0f);
    }
  }
  with_indices(tile, [&](const auto* indices) {
    if (tile.lanes == kLanes) return gradients_of<1>(tile, indices, panel, grad_logits, out);
    gradients_of<2>(tile, indices, panel, grad_logits, out);
  });
}

// ---- loss ----

// Terms of the loss at t = 0 and their derivatives; positives are put right by the caller.
template <FanInLoss kKind, bool kGradient>
double loss_of(float* tile, int64_t labels, int64_t rows, int64_t lanes, float scale) {
  const Vec one = broadcast(1.0f), factor = broadcast(scale);
  Vec total = zero();
  for (int64_t label = 0; label < labels; ++label) {
    for (int64_t lane = 0; lane < lanes; lane += kLanes) {
      float* at = tile + label * lanes + lane;
      const Vec z = load(at);
      Vec term, grad;
      if constexpr (kKind == FanInLoss::kBce) {
        const Vec e = exp(zero() - abs(z));
        term = max(zero(), z) + log1p_unit(e);
        if constexpr (kGradient) {
          const Vec right = one / (one + e);  // sigmoid(|z|)
          grad = select(less(z, zero()), e * right, right);
        }
      } else {
        const Vec margin = max(zero(), one + z);
        term = margin * margin;
        grad = margin + margin;
      }
      if (lane + kLanes > rows) {
        const LaneMask real = first_lanes(rows > lane ? rows - lane : 0);
        term = select(real, term, zero());
        if constexpr (kGradient) grad = select(real, grad, zero());
      }
      total = total + term;
      if constexpr (kGradient) store(at, grad * factor);
    }
  }
  return sum_lanes(total);
}

double loss(FanInLoss kind, float* tile, int64_t labels, int64_t rows, int64_t lanes,
            const float* scale) {
  if (kind == FanInLoss::kBce) {
    if (scale) return loss_of<FanInLoss::kBce, true>(tile, labels, rows, lanes, *scale);
    return loss_of<FanInLoss::kBce, false>(tile, labels, rows, lanes, 0.0f);
  }
  if (scale) return loss_of<FanInLoss::kSquaredHinge, true>(tile, labels, rows, lanes, *scale);
  return loss_of<FanInLoss::kSquaredHinge, false>(tile, labels, rows, lanes, 0.0f);
}

// ---- optimizers ----

template <FanInOptimizer::Kind kKind, bool kMomentum>
RS_INLINE void update_block(const FanInOptimizer& o, const float* grad, int64_t count,
                            float* weight, float* m, float* v) {
  Vec w = load_first(weight, count);
  Vec g = load_first(grad, count);
  if constexpr (kKind == FanInOptimizer::kAdamW)
    w = w * broadcast(1.0f - o.lr * o.weight_decay);
  else if (o.weight_decay != 0.0f)
    g = fmadd(broadcast(o.weight_decay), w, g);
  if constexpr (kKind == FanInOptimizer::kSgd) {
    if constexpr (kMomentum) {
      g = fmadd(broadcast(o.beta1), load_first(m, count), g);
      store_first(m, g, count);
    }
    w = fnmadd(broadcast(o.lr), g, w);
  } else {
    const Vec first =
        fmadd(broadcast(o.beta1), load_first(m, count), broadcast(1.0f - o.beta1) * g);
    const Vec second =
        fmadd(broadcast(o.beta2), load_first(v, count), broadcast(1.0f - o.beta2) * g * g);
    store_first(m, first, count);
    store_first(v, second, count);
    const Vec root = sqrt(second * broadcast(o.second_correction)) + broadcast(o.eps);
    w = w - broadcast(o.lr * o.first_correction) * first / root;
  }
  store_first(weight, w, count);
}

template <FanInOptimizer::Kind kKind, bool kMomentum>
void update_of(const FanInOptimizer& o, const float* grad, int64_t count, float* weight, float* m,
               float* v) {
  for (int64_t i = 0; i < count; i += kLanes)
    update_block<kKind, kMomentum>(o, grad + i, smaller(kLanes, count - i), weight + i,
                                   m ? m + i : m, v ? v + i : v);
}

void update(const FanInOptimizer& o, const float* grad, int64_t count, float* weight, float* m,
            float* v) {
  switch (o.kind) {
    case FanInOptimizer::kAdam:
      return update_of<FanInOptimizer::kAdam, true>(o, grad, count, weight, m, v);
    case FanInOptimizer::kAdamW:
      return update_of<FanInOptimizer::kAdamW, true>(o, grad, count, weight, m, v);
    case FanInOptimizer::kSgd:
      if (m) return update_of<FanInOptimizer::kSgd, true>(o, grad, count, weight, m, v);
      return update_of<FanInOptimizer::kSgd, false>(o, grad, count, weight, m, v);
  }
}

// ---- candidates, top-k ----

template <class T, class Index>
void dots(const float* input, const T* weight, const Index* indices, const T* bias,
          const int64_t* labels, int64_t count, int64_t fan_in, int64_t group_size, float* out) {
  const int64_t vectors_end = fan_in / kLanes * kLanes;
  for (int64_t begin = 0; begin < count; begin += kLanes) {
    const int64_t width = smaller(kLanes, count - begin);
    Vec sums[kLanes];
    float rest[kLanes] = {};  // bias, and the last fan_in % kLanes products
    for (int i = 0; i < kLanes; ++i) {
      sums[i] = zero();
      if (i >= width) continue;
      const int64_t label = labels[begin + i];
      if (begin + i + kLanes < count) {  // rows anywhere in memory
        const int64_t next = labels[begin + i + kLanes];
        for (int64_t f = 0; f < fan_in; f += 64 / sizeof(T))
          __builtin_prefetch(weight + next * fan_in + f);
        for (int64_t f = 0; f < fan_in; f += 64 / sizeof(Index))
          __builtin_prefetch(indices + next / group_size * fan_in + f);
      }
      const T* w = weight + label * fan_in;
      const Index* columns = indices + (group_size == 1 ? label : label / group_size) * fan_in;
      for (int64_t f = 0; f < vectors_end; f += kLanes)
        sums[i] = fmadd(load(w + f), gather(input, columns + f), sums[i]);
      for (int64_t f = vectors_end; f < fan_in; ++f) rest[i] += to_float(w[f]) * input[columns[f]];
      if (bias) rest[i] += to_float(bias[label]);
    }
    store_first(out + begin, sum_each(sums) + load(rest), width);
  }
}

int64_t first_above(const float* row, int64_t begin, int64_t count, float threshold) {
  const Vec bar = broadcast(threshold);
  int64_t i = begin;
  for (; i + kLanes <= count; i += kLanes) {
    const Vec x = load(row + i);
    if (any(less(bar, x)) || any(is_nan(x))) break;
  }
  for (; i < count; ++i)
    if (!(row[i] <= threshold)) return i;
  return count;
}

}  // namespace

template <class T>
const FanInKernels<T>& fan_in_kernels() {
  static constexpr FanInKernels<T> table = {
      kLanes,
      &pack<T>,
      &unpack<T>,
      &widen<T>,
      &narrow<T>,
      &narrow_stochastic<T>,
      &add,
      &stream_rows<T>,
      &in_range<int16_t, uint16_t>,
      &in_range<int32_t, uint32_t>,
      &logits,
      &gradients,
      &loss,
      &update,
      &dots<T, int16_t>,
      &dots<T, int32_t>,
      &first_above,
  };
  return table;
}
RS_INSTANTIATE_KERNEL_TABLE(FanInKernels, fan_in_kernels)

}  // namespace RS_ISA
}  // namespace recsparse
