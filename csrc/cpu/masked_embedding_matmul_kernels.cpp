// x [B, D] against a whole masked table, one multiply-add for each kept value and batch row:
//   output[b, i]        = sum_d x[b, d] W[i, d]
//   grad_inputs_t[d, b] = sum_i W[i, d] grad_output[b, i]
//   grad_values(i, d)   = sum_b grad_output[b, i] x[b, d]
// inputs_t is x in panels of batch rows, each transposed, [padded / panel, D, panel]: one column of
// a panel is a few registers, and a panel is contiguous, so that it stays in the second-level
// cache. At density p this does p times the multiply-adds of the dense product.
#include "masked_embedding_rows.h"

namespace recsparse {
namespace RS_ISA {

constexpr int64_t kRowTile = 16;  // rows of the table whose results are transposed together
// Rows of the table that go over one panel before the next: their values stay in the cache beside
// it.
constexpr int64_t kRowBlock = 128;

// Calls f(column, value index) for the kept columns of row i, in order.
template <class Reader, class F>
RS_INLINE bool for_each_kept(const Reader& reader, int64_t i, const F& f) {
  for (int64_t word = 0; word * 64 < reader.table.dim; ++word) {
    uint64_t bits[1];
    int64_t start;
    if (!reader.template read<1>(i, word, bits, &start) ||
        !inside(reader.table, start, popcount(bits[0])))
      return false;
    for (uint64_t rest = bits[0]; rest; rest &= rest - 1)
      f(word * 64 + __builtin_ctzll(rest), start++);
  }
  return true;
}

// Calls f with the panel width, a constant: 16, 32 or 64 batch rows.
template <class F>
RS_INLINE auto with_panel(int64_t padded, const F& f) {
  if (padded == 16) return f(VectorCount<16>());
  if (padded == 32) return f(VectorCount<32>());
  return f(VectorCount<64>());
}

template <class T>
bool matmul(const MaskedTable<T>& table, const float* inputs_t, int64_t batch, int64_t padded,
            int64_t begin, int64_t end, T* output) {
  return with_reader(table, [&](const auto& reader) {
    return with_panel(padded, [&](auto panel) {
      constexpr int64_t kPanel = panel.value;
      constexpr int kPanelVectors = kPanel / kLanes;
      alignas(64) float tile[kRowTile * kPanel];
      for (int64_t block = begin; block < end; block += kRowBlock) {
        const int64_t block_end = end - block < kRowBlock ? end : block + kRowBlock;
        for (int64_t b0 = 0; b0 < batch; b0 += kPanel) {
          const int64_t columns = batch - b0 < kPanel ? batch - b0 : kPanel;
          for (int64_t i0 = block; i0 < block_end; i0 += kRowTile) {
            const int64_t rows = block_end - i0 < kRowTile ? block_end - i0 : kRowTile;
            for (int64_t r = 0; b0 == 0 && r < rows; ++r)
              if (i0 + r + kRowTile < table.num_embeddings)
                reader.prefetch_values(i0 + r + kRowTile);
            for (int64_t r = 0; r < rows; ++r) {
              Vec acc[kPanelVectors];
              for (int v = 0; v < kPanelVectors; ++v) acc[v] = zero();
              const bool consistent = for_each_kept(reader, i0 + r, [&](int64_t d, int64_t n) {
                const Vec value = broadcast(to_float(table.values[n]));
                const float* input = inputs_t + b0 * table.dim + d * kPanel;
#pragma GCC unroll 8
                for (int v = 0; v < kPanelVectors; ++v)
                  acc[v] = fmadd(value, load(input + v * kLanes), acc[v]);
              });
              if (!consistent) return false;
              for (int v = 0; v < kPanelVectors; ++v) store(tile + r * kPanel + v * kLanes, acc[v]);
            }
            for (int64_t b = 0; b < columns; ++b) {
              T* out = output + (b0 + b) * table.num_embeddings + i0;
              for (int64_t r = 0; r < rows; ++r) out[r] = from_float<T>(tile[r * kPanel + b]);
            }
          }
        }
      }
      return true;
    });
  });
}

// The panel of grad_output[b0 : b0 + kPanel, i0 : i0 + rows], transposed, padding 0.
template <int64_t kPanel, class T>
RS_INLINE void transpose_panel(const MaskedTable<T>& table, const T* grad_output, int64_t batch,
                               int64_t b0, int64_t i0, int64_t rows, float* tile) {
  for (int64_t b = 0; b < kPanel; ++b)
    for (int64_t r = 0; r < rows; ++r)
      tile[r * kPanel + b] =
          b0 + b < batch ? to_float(grad_output[(b0 + b) * table.num_embeddings + i0 + r]) : 0.0f;
}

template <class T>
bool matmul_grad_input(const MaskedTable<T>& table, const T* grad_output, int64_t batch,
                       int64_t padded, int64_t begin, int64_t end, float* grad_inputs_t) {
  return with_reader(table, [&](const auto& reader) {
    return with_panel(padded, [&](auto panel) {
      constexpr int64_t kPanel = panel.value;
      constexpr int kPanelVectors = kPanel / kLanes;
      alignas(64) float tile[kRowTile * kPanel];
      for (int64_t block = begin; block < end; block += kRowBlock) {
        const int64_t block_end = end - block < kRowBlock ? end : block + kRowBlock;
        for (int64_t b0 = 0; b0 < batch; b0 += kPanel) {
          for (int64_t i0 = block; i0 < block_end; i0 += kRowTile) {
            const int64_t rows = block_end - i0 < kRowTile ? block_end - i0 : kRowTile;
            transpose_panel<kPanel>(table, grad_output, batch, b0, i0, rows, tile);
            for (int64_t r = 0; r < rows; ++r) {
              Vec grad[kPanelVectors];
              for (int v = 0; v < kPanelVectors; ++v)
                grad[v] = load(tile + r * kPanel + v * kLanes);
              const bool consistent = for_each_kept(reader, i0 + r, [&](int64_t d, int64_t n) {
                const Vec value = broadcast(to_float(table.values[n]));
                float* out = grad_inputs_t + b0 * table.dim + d * kPanel;
#pragma GCC unroll 8
                for (int v = 0; v < kPanelVectors; ++v)
                  store(out + v * kLanes, fmadd(value, grad[v], load(out + v * kLanes)));
              });
              if (!consistent) return false;
            }
          }
        }
      }
      return true;
    });
  });
}

template <class T>
bool matmul_grad_values(const MaskedTable<T>& table, const float* inputs_t, const T* grad_output,
                        int64_t batch, int64_t padded, int64_t begin, int64_t end, T* grad_values) {
  return with_reader(table, [&](const auto& reader) {
    return with_panel(padded, [&](auto panel) {
      constexpr int64_t kPanel = panel.value;
      constexpr int kPanelVectors = kPanel / kLanes;
      alignas(64) float tile[kRowTile * kPanel];
      float sums[kMaxMaskedDim];  // [tile rows, D]
      const int64_t tile_rows =
          kMaxMaskedDim / table.dim < kRowTile ? kMaxMaskedDim / table.dim : kRowTile;
      for (int64_t i0 = begin; i0 < end; i0 += tile_rows) {
        const int64_t rows = end - i0 < tile_rows ? end - i0 : tile_rows;
        for (int64_t n = 0; n < rows * table.dim; ++n) sums[n] = 0.0f;
        for (int64_t b0 = 0; b0 < batch; b0 += kPanel) {
          transpose_panel<kPanel>(table, grad_output, batch, b0, i0, rows, tile);
          for (int64_t r = 0; r < rows; ++r) {
            Vec grad[kPanelVectors];
            for (int v = 0; v < kPanelVectors; ++v) grad[v] = load(tile + r * kPanel + v * kLanes);
            const bool consistent = for_each_kept(reader, i0 + r, [&](int64_t d, int64_t) {
              Vec acc = zero();
              const float* input = inputs_t + b0 * table.dim + d * kPanel;
              for (int v = 0; v < kPanelVectors; ++v)
                acc = fmadd(grad[v], load(input + v * kLanes), acc);
              sums[r * table.dim + d] += sum_lanes(acc);
            });
            if (!consistent) return false;
          }
        }
        for (int64_t r = 0; r < rows; ++r)
          for_each_kept(reader, i0 + r, [&](int64_t d, int64_t n) {
            grad_values[n] = from_float<T>(sums[r * table.dim + d]);
          });
      }
      return true;
    });
  });
}

template <class T>
void transpose(const T* input, int64_t batch, int64_t dim, int64_t padded, float* inputs_t) {
  with_panel(padded, [&](auto panel) {
    constexpr int64_t kPanel = panel.value;
    constexpr int64_t kLine = 16;  // columns at a time: a cache line of each row is read once
    for (int64_t b0 = 0; b0 < padded; b0 += kPanel)
      for (int64_t d0 = 0; d0 < dim; d0 += kLine) {
        const int64_t d1 = d0 + kLine < dim ? d0 + kLine : dim;
        float* out = inputs_t + b0 * dim;
        for (int64_t b = 0; b < kPanel; ++b)
          for (int64_t d = d0; d < d1; ++d)
            out[d * kPanel + b] = b0 + b < batch ? to_float(input[(b0 + b) * dim + d]) : 0.0f;
      }
  });
}

template <class T>
void sum_transposed(const float* sums, int64_t pieces, int64_t batch, int64_t dim, int64_t padded,
                    T* grad) {
  with_panel(padded, [&](auto panel) {
    constexpr int64_t kPanel = panel.value;
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t d = 0; d < dim; ++d) {
        const int64_t at = b / kPanel * kPanel * dim + d * kPanel + b % kPanel;
        float sum = 0.0f;
        for (int64_t p = 0; p < pieces; ++p) sum += sums[p * dim * padded + at];
        grad[b * dim + d] = from_float<T>(sum);
      }
  });
}

template <class T>
const MaskedMatmulKernels<T>& masked_matmul_kernels() {
  static constexpr MaskedMatmulKernels<T> table = {&transpose<T>, &sum_transposed<T>, &matmul<T>,
                                                   &matmul_grad_input<T>, &matmul_grad_values<T>};
  return table;
}
RS_INSTANTIATE_KERNEL_TABLE(MaskedMatmulKernels, masked_matmul_kernels)

}  // namespace RS_ISA
}  // namespace recsparse
