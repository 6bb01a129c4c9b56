// Batch panels: an input transposed piece by piece, so that one vector holds one column of kLanes
// batch rows and a weight is broadcast against it.
//   panel[c, r] = x[r, c]    r < kVecs * kLanes (zero past the last row), c in rows of that length
#pragma once

#include "vec_math.h"

namespace recsparse {
namespace RS_ISA {

constexpr int kPanelVecs = 8;  // accumulators of one output: hides the FMA latency on two pipes

// Calls f(tag) with tag.value = the vectors of a panel, 1, 2, 4 or 8.
template <int kValue>
struct IntTag {
  static constexpr int value = kValue;
};
template <class F>
RS_INLINE void with_panel_vecs(int vecs, F f) {
  switch (vecs) {
    case 1: return f(IntTag<1>());
    case 2: return f(IntTag<2>());
    case 4: return f(IntTag<4>());
    default: return f(IntTag<kPanelVecs>());
  }
}

// Columns [begin, end) of x [rows, columns] into the panel; zero from `columns` on.
// begin and end are multiples of kLanes.
template <class T>
void pack_panel(const T* x, int64_t stride, int64_t rows, int64_t columns, int64_t begin,
                int64_t end, int vecs, float* panel) {
  const int64_t panel_rows = int64_t(vecs) * kLanes;
  for (int64_t r = 0; r < panel_rows; r += kLanes) {
    for (int64_t c = begin; c < end; c += kLanes) {
      const int64_t valid = columns - c < kLanes ? columns - c : kLanes;
      Vec block[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        if (r + i >= rows || valid <= 0) {
          block[i] = zero();
        } else {
          const T* from = x + (r + i) * stride + c;
          block[i] = valid == kLanes ? load(from) : load_first(from, valid);
        }
      }
      transpose(block);
      for (int i = 0; i < kLanes; ++i) store(panel + (c + i) * panel_rows + r, block[i]);
    }
  }
}

// Bias, activation and the stores of up to kLanes outputs of one batch row; pre gets the value
// before the activation unless null.
template <class T, Activation kActivation>
RS_INLINE void finish_row(Vec sum, const T* bias, T* output, T* pre, int64_t count) {
  if (bias) sum = sum + (count == kLanes ? load(bias) : load_first(bias, count));
  const Vec y = activate<kActivation>(sum);
  if (count == kLanes) {
    store(output, y);
    if (pre) store(pre, sum);
  } else {
    store_first(output, y, count);
    if (pre) store_first(pre, sum, count);
  }
}

// output[r, o] = activation(tile[o, r] + bias[o]); tile holds a multiple of kLanes outputs.
template <class T>
void unpack_tile(const float* tile, int vecs, int64_t rows, int64_t outputs, const T* bias,
                 Activation activation, T* output, T* pre, int64_t stride) {
  const int64_t panel_rows = int64_t(vecs) * kLanes;
  with_activation(activation, [&](auto tag) {
    for (int64_t r = 0; r < rows; r += kLanes) {
      for (int64_t o = 0; o < outputs; o += kLanes) {
        Vec block[kLanes];
        for (int i = 0; i < kLanes; ++i) block[i] = load(tile + (o + i) * panel_rows + r);
        transpose(block);
        const int64_t count = outputs - o < kLanes ? outputs - o : kLanes;
        for (int i = 0; i < kLanes && r + i < rows; ++i) {
          const int64_t at = (r + i) * stride + o;
          finish_row<T, decltype(tag)::value>(block[i], bias ? bias + o : nullptr, output + at,
                                              pre ? pre + at : nullptr, count);
        }
      }
    }
  });
}

}  // namespace RS_ISA
}  // namespace recsparse
