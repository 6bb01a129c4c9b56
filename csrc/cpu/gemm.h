// Small matrix products in float32, the pieces that fused kernels are made of:
//
//   c[m, n] (+)= sum_k a[m, k] * b[k, n]
//
// b is packed beforehand into panels of kPanel columns: panel p is [depth, kPanel] float32, column
// p * kPanel + j of b at [k][j], columns past n are zero. a and c are read and written in place,
// with any stride, so c must have room for whole panels. Callers block over m and k so that a slice
// of a panel (kDepthBlock x kPanel) stays in L1 and a block of a in L2, and run their epilogue on c
// while it is in cache. Each call sums its own depth in order and adds that to c: the rounding
// error of a long sum then grows with the length of its blocks, not with its own.
//
// For kernels compiled per instruction level (vec.h); float32, bfloat16 and float16 go in.
#pragma once

#include "vec.h"

namespace recsparse {
namespace RS_ISA {

constexpr int64_t kPanel = 2 * kLanes;
constexpr int64_t kDepthBlock = 256;  // x kPanel floats: 32 KiB at 16 lanes, one slice in L1

// Rows of c in registers: rows * 2 accumulators, 2 vectors of b and 1 of a.
#if defined(RS_ISA_AVX512)
constexpr int kTileRows = 12;  // 27 of 32 registers
#elif defined(RS_ISA_AVX2)
constexpr int kTileRows = 6;  // 15 of 16
#else
constexpr int kTileRows = 4;
#endif

RS_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
RS_INLINE int64_t panels_of(int64_t n) { return (n + kPanel - 1) / kPanel; }
RS_INLINE int64_t padded(int64_t n) { return panels_of(n) * kPanel; }

// c[0:kRows, 0:kVecs * kLanes] of one panel.
template <int kRows, int kVecs>
static void gemm_tile(const float* a, int64_t a_row, int64_t a_step, const float* panel,
                      int64_t depth, float* c, int64_t c_row, bool accumulate) {
  Vec sum[kRows][kVecs];
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kVecs; ++j) sum[i][j] = zero();
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vec b[kVecs];
#pragma GCC unroll 2
    for (int j = 0; j < kVecs; ++j) b[j] = load(panel + k * kPanel + j * kLanes);
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i) {
      const Vec ai = broadcast(a[i * a_row + k * a_step]);
#pragma GCC unroll 2
      for (int j = 0; j < kVecs; ++j) sum[i][j] = fmadd(ai, b[j], sum[i][j]);
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kVecs; ++j) {
      float* at = c + i * c_row + j * kLanes;
      store(at, accumulate ? load(at) + sum[i][j] : sum[i][j]);
    }
  }
}

// Tiles of kRows rows, then the rest by the next smaller tile.
template <int kRows, int kVecs>
static void gemm_panel(const float* a, int64_t a_row, int64_t a_step, int64_t rows,
                       const float* panel, int64_t depth, float* c, int64_t c_row,
                       bool accumulate) {
  while (rows >= kRows) {
    gemm_tile<kRows, kVecs>(a, a_row, a_step, panel, depth, c, c_row, accumulate);
    a += kRows * a_row;
    c += kRows * c_row;
    rows -= kRows;
  }
  if constexpr (kRows > 1) {
    if (rows > 0)
      gemm_panel<(kRows > 4 ? kRows / 3 * 2 : kRows - 1), kVecs>(a, a_row, a_step, rows, panel,
                                                                 depth, c, c_row, accumulate);
  }
}

// c[rows, n] (+)= a[rows, depth] * b[depth, n]; the panels are panel_stride floats apart (their
// whole depth times kPanel, of which this call may use a slice).
RS_INLINE void gemm(const float* a, int64_t a_row, int64_t a_step, int64_t rows,
                    const float* panels, int64_t panel_stride, int64_t n, int64_t depth, float* c,
                    int64_t c_row, bool accumulate) {
  for (int64_t begin = 0; begin < n; begin += kPanel) {
    if (n - begin > kLanes)
      gemm_panel<kTileRows, 2>(a, a_row, a_step, rows, panels, depth, c + begin, c_row, accumulate);
    else
      gemm_panel<kTileRows, 1>(a, a_row, a_step, rows, panels, depth, c + begin, c_row, accumulate);
    panels += panel_stride;
  }
}

// ---- rows by vectors --------------------------------------------------------------------------

// f(column, number of lanes) over [0, n) by vectors; the last may be partial.
template <class F>
RS_INLINE void for_each_vec(int64_t n, F f) {
  int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes) f(c, int64_t(kLanes));
  if (c < n) f(c, n - c);
}
template <class T>
RS_INLINE Vec load_lanes(const T* p, int64_t lanes) {
  return lanes == kLanes ? load(p) : load_first(p, lanes);
}
template <class T>
RS_INLINE void store_lanes(T* p, Vec v, int64_t lanes) {
  if (lanes == kLanes)
    store(p, v);
  else
    store_first(p, v, lanes);
}

// A block of rows as float32: the rows themselves, or widened into the buffer.
RS_INLINE const float* as_float(const float* rows, int64_t row, int64_t, int64_t, float*, int64_t,
                                int64_t* out_row) {
  *out_row = row;
  return rows;
}
template <class T>
RS_INLINE const float* as_float(const T* rows, int64_t row, int64_t count, int64_t n, float* buffer,
                                int64_t buffer_row, int64_t* out_row) {
  for (int64_t i = 0; i < count; ++i)
    for_each_vec(n, [&](int64_t c, int64_t lanes) {
      store_lanes(buffer + i * buffer_row + c, load_lanes(rows + i * row + c, lanes), lanes);
    });
  *out_row = buffer_row;
  return buffer;
}

// sum_k rows[k * row], one vector of columns: by sixteens, then those, so that the rounding error
// grows with neither count.
RS_INLINE Vec sum_column(const float* rows, int64_t row, int64_t depth) {
  Vec total = zero();
  for (int64_t k = 0; k < depth;) {
    Vec part = zero();
    for (const int64_t end = min_of(k + 16, depth); k < end; ++k)
      part = part + load(rows + k * row);
    total = total + part;
  }
  return total;
}

// ---- packing ----------------------------------------------------------------------------------

// b[k, n] = source[k * row + n] for k in [0, depth), n in [0, columns): one panel of at most kPanel
// columns, copied.
template <class T>
RS_INLINE void pack_panel(const T* source, int64_t row, int64_t depth, int64_t columns,
                          float* panel) {
  for (int64_t k = 0; k < depth; ++k) {
    if (columns >= kPanel) {
      store(panel, load(source));
      store(panel + kLanes, load(source + kLanes));
    } else {
      const int64_t first = min_of(columns, kLanes);
      store(panel, load_first(source, first));
      store(panel + kLanes,
            columns > kLanes ? load_first(source + kLanes, columns - kLanes) : zero());
    }
    source += row;
    panel += kPanel;
  }
}

// b[k, n] = source[n * row + k]: one panel, transposed in blocks of kLanes x kLanes.
template <class T>
RS_INLINE void pack_panel_transposed(const T* source, int64_t row, int64_t depth, int64_t columns,
                                     float* panel) {
  for (int64_t half = 0; half < kPanel; half += kLanes) {
    const int64_t count = columns <= half ? 0 : min_of(columns - half, kLanes);
    const T* from = source + (count ? half * row : 0);
    for (int64_t k = 0; k < depth; k += kLanes) {
      const int64_t steps = min_of(depth - k, kLanes);
      Vec block[kLanes];
      for (int64_t n = 0; n < kLanes; ++n) {
        if (n >= count)
          block[n] = zero();
        else
          block[n] =
              steps == kLanes ? load(from + n * row + k) : load_first(from + n * row + k, steps);
      }
      transpose(block);
      for (int64_t s = 0; s < steps; ++s) store(panel + (k + s) * kPanel + half, block[s]);
    }
  }
}

// Panels [first, last) of all; panels points to panel 0. `transposed`: b[k, n] = source[n * row +
// k].
template <class T>
static void pack_panels(const T* source, int64_t row, bool transposed, int64_t depth, int64_t n,
                        int64_t first, int64_t last, float* panels) {
  for (int64_t p = first; p < last; ++p) {
    const int64_t begin = p * kPanel;
    const int64_t columns = min_of(n - begin, kPanel);
    float* panel = panels + p * depth * kPanel;
    if (transposed)
      pack_panel_transposed(source + begin * row, row, depth, columns, panel);
    else
      pack_panel(source + begin, row, depth, columns, panel);
  }
}

// ---- few rows ---------------------------------------------------------------------------------

// out[m, n] = sum_k a[m, k] * b[n, k], both rows contiguous: for so few rows m that packing b would
// cost more than the products.
template <int kRows, int kColumns, class A, class B>
RS_INLINE void dot_tile(const A* a, int64_t a_row, const B* b, int64_t b_row, int64_t depth,
                        float* out, int64_t out_row) {
  Vec sum[kRows][kColumns];
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kColumns; ++j) sum[i][j] = zero();
  int64_t k = 0;
  for (; k + kLanes <= depth; k += kLanes) {
    Vec bj[kColumns];
    for (int j = 0; j < kColumns; ++j) bj[j] = load(b + j * b_row + k);
    for (int i = 0; i < kRows; ++i) {
      const Vec ai = load(a + i * a_row + k);
      for (int j = 0; j < kColumns; ++j) sum[i][j] = fmadd(ai, bj[j], sum[i][j]);
    }
  }
  if (k < depth) {
    Vec bj[kColumns];
    for (int j = 0; j < kColumns; ++j) bj[j] = load_first(b + j * b_row + k, depth - k);
    for (int i = 0; i < kRows; ++i) {
      const Vec ai = load_first(a + i * a_row + k, depth - k);
      for (int j = 0; j < kColumns; ++j) sum[i][j] = fmadd(ai, bj[j], sum[i][j]);
    }
  }
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kColumns; ++j) out[i * out_row + j] = sum_lanes(sum[i][j]);
}

// Columns [first, last) of out [rows, *].
template <class A, class B>
static void dots(const A* a, int64_t a_row, int64_t rows, const B* b, int64_t b_row, int64_t depth,
                 int64_t first, int64_t last, float* out, int64_t out_row) {
  int64_t n = first;
  for (; n + 4 <= last; n += 4) {
    int64_t m = 0;
    for (; m + 4 <= rows; m += 4)
      dot_tile<4, 4>(a + m * a_row, a_row, b + n * b_row, b_row, depth, out + m * out_row + n,
                     out_row);
    for (; m < rows; ++m)
      dot_tile<1, 4>(a + m * a_row, a_row, b + n * b_row, b_row, depth, out + m * out_row + n,
                     out_row);
  }
  for (; n < last; ++n)
    for (int64_t m = 0; m < rows; ++m)
      dot_tile<1, 1>(a + m * a_row, a_row, b + n * b_row, b_row, depth, out + m * out_row + n,
                     out_row);
}

}  // namespace RS_ISA
}  // namespace recsparse
