// Inner loops of the 2:4 ops, one table for each element type and instruction level (isa.h).
// Sizes in elements; I is the padded in_features, a multiple of 16, except where said.
#pragma once

#include "isa.h"

namespace recsparse {

constexpr int kSmallBatch = 8;    // rows that the small-batch kernels take at once
constexpr int kPackBlock = 64;    // rows and columns packed both ways at once: they stay in L1
constexpr int kOutputBlock = 64;  // outputs of one task: a tile of kOutputBlock x panel rows in L2

template <class T>
struct Sparse24LinearKernels {
  int lanes;       // batch rows in a vector
  int panel_vecs;  // most vectors in a panel

  // x [rows, columns] -> panel columns [begin, end) (panel.h)
  void (*pack_panel)(const T* x, int64_t stride, int64_t rows, int64_t columns, int64_t begin,
                     int64_t end, int vecs, float* panel);
  // tile [outputs, panel rows] = values, positions [outputs, ...] times the panel [I, panel rows];
  // scratch: kOutputBlock * 256 floats
  void (*linear_panel)(const float* panel, int vecs, int64_t I, const T* values,
                       const uint8_t* positions, int64_t outputs, float* tile, float* scratch);
  // output [rows, outputs] from a tile: bias, activation, transpose
  void (*unpack_tile)(const float* tile, int vecs, int64_t rows, int64_t outputs, const T* bias,
                      Activation activation, T* output, T* pre, int64_t stride);
  // up to kSmallBatch rows of x, float, zero past I up to a multiple of 32; rows of zeros follow up
  // to a power of two
  void (*linear_rows)(const float* x, int64_t x_stride, int batch, int64_t I, const T* values,
                      const uint8_t* positions, int64_t outputs, const T* bias,
                      Activation activation, T* output, T* pre, int64_t stride);
  // x [columns] to float, zero up to `padded`
  void (*widen_row)(const T* x, int64_t columns, int64_t padded, float* out);
};

template <class T>
struct Sparse24GradKernels {
  // Transposes the weights of `outputs` rows into lists, one for each column: entry e of column c,
  // starts[c] <= e < starts[c + 1], is a kept value of output row rows[e].
  void (*build_lists)(const T* values, const uint8_t* positions, int64_t I, int64_t outputs,
                      int32_t* starts, float* entries, uint8_t* rows, int32_t* cursor);
  // tile [columns, panel rows] += the lists of those columns times a panel [outputs, panel rows]
  void (*accumulate_lists)(const float* panel, int vecs, const int32_t* starts,
                           const float* entries, const uint8_t* rows, int64_t columns, float* tile,
                           bool first);
  // grad_input columns [begin, end) of up to kSmallBatch rows; sums [kSmallBatch, end - begin + 32]
  void (*grad_input_rows)(const T* grad, int64_t grad_stride, int batch, const T* values,
                          const uint8_t* positions, int64_t I, int64_t outputs, int64_t begin,
                          int64_t end, float* sums, T* out, int64_t out_stride, int64_t columns);
  // sums [outputs, (end - begin) / 2] of columns [begin, end) += grad panel [outputs, rows] . x
  // panel [I, rows]
  void (*grad_values_panel)(const float* grad_panel, const float* x_panel, int vecs,
                            const uint8_t* positions, int64_t I, int64_t outputs, int64_t begin,
                            int64_t end, float* sums, int64_t sums_stride);
  // the same for up to kSmallBatch rows, x and grad as in linear_rows; writes values
  void (*grad_values_rows)(const float* grad, int64_t grad_stride, const float* x, int64_t x_stride,
                           int batch, const uint8_t* positions, int64_t I, int64_t outputs, T* out);
  // out = sums
  void (*narrow_row)(const float* sums, int64_t count, T* out);
};

// Where packed rows go: values 4 * row_bytes elements apart, positions row_bytes.
template <class T>
struct Sparse24Pack {
  T* values;
  uint8_t* positions;
  int64_t row_bytes;
};

template <class T>
struct Sparse24PackKernels {
  // mask of `rows` rows by magnitude in each group of 4 columns
  void (*mask_rows)(const T* weight, int64_t stride, int64_t rows, int64_t columns, bool* mask);
  // mask of up to 4 rows: the best 4 x 4 pattern with 2 in every row and column
  void (*mask_tiles)(const T* weight, int64_t stride, int64_t rows, int64_t columns, bool* mask);
  // one row; false where a group has more than 2 kept
  bool (*compress_row)(const T* weight, const bool* mask, int64_t columns, T* values,
                       uint8_t* positions);
  // the rows, and as rows of pack_t the columns, of at most kPackBlock x kPackBlock; without a mask
  // of the best 4 x 4 patterns; false where a group of either has more than 2 kept
  bool (*compress_block)(const T* weight, int64_t stride, const bool* mask, int64_t mask_stride,
                         int64_t rows, int64_t columns, const Sparse24Pack<T>& pack,
                         const Sparse24Pack<T>& pack_t);
  // as rows of pack_t the columns of at most kPackBlock x kPackBlock of a pack; of more than 2 in
  // a group the first two
  void (*transpose_block)(const T* values, const uint8_t* positions, int64_t row_bytes,
                          int64_t rows, int64_t columns, const Sparse24Pack<T>& pack_t);
  void (*gather_row)(const T* dense, const uint8_t* positions, int64_t columns, T* values);
  void (*decompress_row)(const T* values, const uint8_t* positions, int64_t columns, T* dense);
};

RS_KERNEL_TABLE(Sparse24LinearKernels, sparse24_linear_kernels)
RS_KERNEL_TABLE(Sparse24GradKernels, sparse24_grad_kernels)
RS_KERNEL_TABLE(Sparse24PackKernels, sparse24_pack_kernels)

}  // namespace recsparse
