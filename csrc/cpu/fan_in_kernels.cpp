// Inner loops of the fixed fan-in ops; layouts and formulas in fan_in_kernels.h.
#include "fan_in_kernels.h"

#include "vec.h"
#include "vec_math.h"

namespace recsparse {
namespace RS_ISA {
namespace {

// Labels worked on together: with two vectors each their accumulators hide the latency of a
// multiply-add. Labels that share their inputs also share the loads, so more of them pay; AVX-512
// has 32 registers for it, the others 16.
constexpr int kSeparate = 4;
#if defined(RS_ISA_AVX512)
constexpr int kShared = 8;
#else
constexpr int kShared = 4;
#endif

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- layout ----

template <class T>
void pack(const T* source, int64_t stride, int64_t rows, int64_t columns, int64_t lanes,
          float* panel) {
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
      for (int64_t i = 0; i < width; ++i) store(panel + (c + i) * lanes + lane, block[i]);
    }
  }
}

template <class T>
void unpack(const float* panel, int64_t rows, int64_t columns, int64_t lanes, T* target,
            int64_t stride) {
  for (int64_t lane = 0; lane < rows; lane += kLanes) {
    const int64_t height = smaller(kLanes, rows - lane);
    for (int64_t c = 0; c < columns; c += kLanes) {
      const int64_t width = smaller(kLanes, columns - c);
      Vec block[kLanes];
      for (int i = 0; i < kLanes; ++i)
        block[i] = i < width ? load(panel + (c + i) * lanes + lane) : zero();
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

void add(const float* source, int64_t count, float* target) {
  for (int64_t i = 0; i < count; ++i) target[i] += source[i];
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

template <class Index>
bool scale_indices(const Index* indices, int64_t count, int64_t limit, int64_t lanes,
                   int32_t* offsets) {
  const uint32_t bound = uint32_t(limit), factor = uint32_t(lanes);
  uint32_t outside = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t index = uint32_t(int32_t(indices[i]));
    outside |= uint32_t(index >= bound);
    offsets[i] = int32_t(index * factor);
  }
  return outside == 0;
}

// ---- logits ----

// kLabels labels against one panel; kPitch: their offsets are fan_in apart, or the same row.
template <int kLabels, int kVecs, bool kOwnInputs>
RS_INLINE void logits_block(const FanInTile& tile, int64_t label, const int32_t* offsets,
                            const float* panel, float* logits) {
  const int64_t fan_in = tile.fan_in;
  const float* weight = tile.weight + label * fan_in;
  Vec sum[kLabels][kVecs];
  for (int j = 0; j < kLabels; ++j)
    for (int v = 0; v < kVecs; ++v)
      sum[j][v] = tile.bias ? broadcast(tile.bias[label + j]) : zero();
  for (int64_t f = 0; f < fan_in; ++f) {
    if constexpr (kOwnInputs) {
      for (int j = 0; j < kLabels; ++j) {
        const Vec w = broadcast(weight[j * fan_in + f]);
        const float* x = panel + offsets[j * fan_in + f];
        for (int v = 0; v < kVecs; ++v) sum[j][v] = fmadd(w, load(x + v * kLanes), sum[j][v]);
      }
    } else {
      const float* row = panel + offsets[f];
      Vec x[kVecs];
      for (int v = 0; v < kVecs; ++v) x[v] = load(row + v * kLanes);
      for (int j = 0; j < kLabels; ++j) {
        const Vec w = broadcast(weight[j * fan_in + f]);
        for (int v = 0; v < kVecs; ++v) sum[j][v] = fmadd(w, x[v], sum[j][v]);
      }
    }
  }
  float* out = logits + label * kVecs * kLanes;
  for (int j = 0; j < kLabels; ++j)
    for (int v = 0; v < kVecs; ++v) store(out + (j * kVecs + v) * kLanes, sum[j][v]);
}

template <int kVecs>
void logits_of(const FanInTile& tile, const float* panel, float* logits) {
  int64_t label = 0;
  if (tile.group_size == 1) {
    const auto offsets = [&] { return tile.offsets + (tile.first + label) * tile.fan_in; };
    for (; label + kSeparate <= tile.labels; label += kSeparate)
      logits_block<kSeparate, kVecs, true>(tile, label, offsets(), panel, logits);
    for (; label < tile.labels; ++label)
      logits_block<1, kVecs, true>(tile, label, offsets(), panel, logits);
    return;
  }
  while (label < tile.labels) {
    const int64_t place = tile.first + label;
    const int64_t end = smaller(tile.labels, label + tile.group_size - place % tile.group_size);
    const int32_t* offsets = tile.offsets + place / tile.group_size * tile.fan_in;
    for (; label + kShared <= end; label += kShared)
      logits_block<kShared, kVecs, false>(tile, label, offsets, panel, logits);
    for (; label + 2 <= end; label += 2)
      logits_block<2, kVecs, false>(tile, label, offsets, panel, logits);
    for (; label < end; ++label) logits_block<1, kVecs, false>(tile, label, offsets, panel, logits);
  }
}

void logits(const FanInTile& tile, const float* panel, float* logits) {
  if (tile.lanes == kLanes) return logits_of<1>(tile, panel, logits);
  logits_of<2>(tile, panel, logits);
}

// ---- gradients ----

RS_INLINE void write_sums(const FanInGradients& out, int64_t at, Vec sums, int64_t count) {
  float* target = out.weight + at;
  if (out.add) sums = sums + load_first(target, count);
  store_first(target, sums, count);
}

// One label: a row of the weight gradient is `count` dot products over the batch, which are folded
// together; the panel gradient is added to row by row, so that repeated indices add up.
template <int kVecs, bool kInput, bool kWeight>
RS_INLINE void gradients_block(const FanInTile& tile, int64_t label, int64_t f, int64_t count,
                               const int32_t* offsets, const float* panel, const Vec* grad,
                               const FanInGradients& out) {
  Vec products[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i >= count) {
      products[i] = zero();
      continue;
    }
    const int32_t offset = offsets[f + i];
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

template <int kVecs, bool kInput, bool kWeight>
void gradients_label(const FanInTile& tile, int64_t label, const int32_t* offsets,
                     const float* panel, const float* grad_logits, const FanInGradients& out) {
  Vec grad[kVecs];
  for (int v = 0; v < kVecs; ++v) grad[v] = load(grad_logits + (label * kVecs + v) * kLanes);
  int64_t f = 0;
  for (; f + kLanes <= tile.fan_in; f += kLanes)
    gradients_block<kVecs, kInput, kWeight>(tile, label, f, kLanes, offsets, panel, grad, out);
  if (f < tile.fan_in)
    gradients_block<kVecs, kInput, kWeight>(tile, label, f, tile.fan_in - f, offsets, panel, grad,
                                            out);
}

// Labels [begin, end) of one group: their products are summed in registers, and each row of the
// panel gradient is touched once.
template <int kInputs, int kVecs>
RS_INLINE void grad_panel_block(const FanInTile& tile, int64_t begin, int64_t end, int64_t f,
                                const int32_t* offsets, const float* grad_logits,
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
    float* row = out.input + offsets[f + i];
    for (int v = 0; v < kVecs; ++v) store(row + v * kLanes, load(row + v * kLanes) + sum[i][v]);
  }
}

template <int kVecs>
void gradients_of(const FanInTile& tile, const float* panel, const float* grad_logits,
                  const FanInGradients& out) {
  int64_t label = 0;
  if (tile.group_size == 1) {
    for (; label < tile.labels; ++label) {
      const int32_t* offsets = tile.offsets + (tile.first + label) * tile.fan_in;
      if (out.input && out.weight)
        gradients_label<kVecs, true, true>(tile, label, offsets, panel, grad_logits, out);
      else if (out.input)
        gradients_label<kVecs, true, false>(tile, label, offsets, panel, grad_logits, out);
      else if (out.weight)
        gradients_label<kVecs, false, true>(tile, label, offsets, panel, grad_logits, out);
    }
    return;
  }
  while (label < tile.labels) {
    const int64_t place = tile.first + label;
    const int64_t end = smaller(tile.labels, label + tile.group_size - place % tile.group_size);
    const int32_t* offsets = tile.offsets + place / tile.group_size * tile.fan_in;
    if (out.input) {
      int64_t f = 0;
      for (; f + 4 <= tile.fan_in; f += 4)
        grad_panel_block<4, kVecs>(tile, label, end, f, offsets, grad_logits, out);
      for (; f < tile.fan_in; ++f)
        grad_panel_block<1, kVecs>(tile, label, end, f, offsets, grad_logits, out);
    }
    if (out.weight)
      for (int64_t l = label; l < end; ++l)
        gradients_label<kVecs, false, true>(tile, l, offsets, panel, grad_logits, out);
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
  if (tile.lanes == kLanes) return gradients_of<1>(tile, panel, grad_logits, out);
  gradients_of<2>(tile, panel, grad_logits, out);
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

// ---- small batches, candidates, top-k ----

template <class T, class Index>
void dots(const float* input, const T* weight, const Index* indices, const T* bias,
          const int64_t* labels, int64_t first, int64_t count, int64_t fan_in, int64_t group_size,
          float* out) {
  const int64_t vectors_end = fan_in / kLanes * kLanes;
  for (int64_t begin = 0; begin < count; begin += kLanes) {
    const int64_t width = smaller(kLanes, count - begin);
    Vec sums[kLanes];
    float rest[kLanes] = {};  // bias, and the last fan_in % kLanes products
    for (int i = 0; i < kLanes; ++i) {
      sums[i] = zero();
      if (i >= width) continue;
      const int64_t label = labels ? labels[begin + i] : first + begin + i;
      if (labels && begin + i + kLanes < count) {  // rows anywhere in memory
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
      &scale_indices<int16_t>,
      &scale_indices<int32_t>,
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
