// Pooled lookups in a masked table (masked_embedding_kernels.h).
//   sum, mean   output[b] = scale(b) sum_j weights[j] W[indices[j]],  scale 1 or 1 / lookups in the
//   bag max         output[b] = max_j W[indices[j]], the first of equal ones
// Padding is left out of all of them; an empty bag gives 0.
#include "masked_embedding_rows.h"

namespace recsparse {
namespace RS_ISA {

// Two accesses depend on each other, header then values, and each may miss every cache: the header
// is asked for twice as far ahead. 32 rows of 64 bytes to 1 KB stay within the second cache level.
constexpr int64_t kAhead = 32;

template <class Reader>
RS_INLINE void prefetch_ahead(const Reader& reader, const Bags& in, int64_t j, int64_t last) {
  if (j + 2 * kAhead < last) reader.prefetch_header(in.index(j + 2 * kAhead));
  if (j + kAhead < last) reader.prefetch_values(in.index(j + kAhead));
}

// What prefetch_ahead would have asked for before lookup `begin`.
template <class Reader>
RS_INLINE void prefetch_first(const Reader& reader, const Bags& in, int64_t begin, int64_t last) {
  const int64_t count = last - begin;
  for (int64_t j = 0; j < 2 * kAhead && j < count; ++j) reader.prefetch_header(in.index(begin + j));
  for (int64_t j = 0; j < kAhead && j < count; ++j) reader.prefetch_values(in.index(begin + j));
}

// Columns [column, column + kVectors kLanes) of bags [begin, end).
template <int kVectors, class T, class Reader>
bool sum_columns(const Reader& reader, const Bags& in, int64_t begin, int64_t end, int64_t column,
                 T* output) {
  const MaskedTable<T>& table = reader.table;
  constexpr int kWords = (kVectors * kLanes + 63) / 64;
  const int64_t last = in.begin(end);
  bool consistent = true;
  prefetch_first(reader, in, in.begin(begin), last);
  for (int64_t b = begin; b < end; ++b) {
    Vec acc[kVectors];
    for (int v = 0; v < kVectors; ++v) acc[v] = zero();
    int64_t pooled = 0;
    const int64_t bag_end = in.end(b);
    for (int64_t j = in.begin(b); j < bag_end; ++j) {
      prefetch_ahead(reader, in, j, last);
      const int64_t i = in.index(j);
      if (i == in.padding_idx) continue;
      ++pooled;
      uint64_t bits[kWords];
      int64_t start;
      if (!reader.template read<kWords>(i, column / 64, bits, &start)) {
        consistent = false;
      } else if (in.weights) {
        const Vec weight = broadcast(in.weights[j]);
        consistent &= for_each_vector<kVectors>(
            table, bits, start, [&](int v, Vec row) { acc[v] = fmadd(row, weight, acc[v]); });
      } else {
        consistent &= for_each_vector<kVectors>(table, bits, start,
                                                [&](int v, Vec row) { acc[v] = acc[v] + row; });
      }
    }
    if (in.mean && pooled > 1) {
      const Vec count = broadcast(float(pooled));
      for (int v = 0; v < kVectors; ++v) acc[v] = acc[v] / count;
    }
    T* out = output + b * table.dim + column;
    for (int v = 0; v < kVectors; ++v)
      store_columns(out + v * kLanes, acc[v], table.dim - column - v * kLanes);
  }
  return consistent;
}

template <class T>
bool bag_sum(const MaskedTable<T>& table, const Bags& in, int64_t begin, int64_t end, T* output) {
  return with_reader(table, [&](const auto& reader) {
    bool consistent = true;
    for (int64_t column = 0; column < table.dim; column += 8 * kLanes)
      with_vectors(table.dim - column, [&](auto n) {
        consistent &= sum_columns<n.value>(reader, in, begin, end, column, output);
      });
    return consistent;
  });
}

template <int kVectors, class T, class Reader>
bool max_columns(const Reader& reader, const Bags& in, int64_t begin, int64_t end, int64_t column,
                 T* output, int32_t* argmax) {
  const MaskedTable<T>& table = reader.table;
  constexpr int kWords = (kVectors * kLanes + 63) / 64;
  const int64_t last = in.begin(end);
  bool consistent = true;
  prefetch_first(reader, in, in.begin(begin), last);
  for (int64_t b = begin; b < end; ++b) {
    Vec best[kVectors];
    Vec place[kVectors];  // int32, only moved, never computed with
    bool empty = true;
    const int64_t bag_begin = in.begin(b), bag_end = in.end(b);
    for (int v = 0; v < kVectors; ++v) {
      best[v] = zero();
      place[v] = broadcast(bits_to_float(uint32_t(-1)));
    }
    for (int64_t j = bag_begin; j < bag_end; ++j) {
      prefetch_ahead(reader, in, j, last);
      const int64_t i = in.index(j);
      if (i == in.padding_idx) continue;
      uint64_t bits[kWords];
      int64_t start;
      if (!reader.template read<kWords>(i, column / 64, bits, &start)) {
        consistent = false;
        continue;
      }
      const Vec here = broadcast(bits_to_float(uint32_t(j - bag_begin)));
      consistent &= for_each_vector<kVectors>(table, bits, start, [&](int v, Vec row) {
        if (empty) {
          best[v] = row;
          place[v] = here;
        } else {
          const LaneMask better = less(best[v], row);
          best[v] = select(better, row, best[v]);
          place[v] = select(better, here, place[v]);
        }
      });
      empty = false;
    }
    const int64_t at = b * table.dim + column;
    for (int v = 0; v < kVectors; ++v) {
      const int64_t columns = table.dim - column - v * kLanes;
      store_columns(output + at + v * kLanes, best[v], columns);
      float lanes[kLanes];
      store(lanes, place[v]);
      const int64_t stored = columns < kLanes ? columns : kLanes;
      if (stored > 0) std::memcpy(argmax + at + v * kLanes, lanes, size_t(stored) * sizeof(float));
    }
  }
  return consistent;
}

template <class T>
bool bag_max(const MaskedTable<T>& table, const Bags& in, int64_t begin, int64_t end, T* output,
             int32_t* argmax) {
  return with_reader(table, [&](const auto& reader) {
    bool consistent = true;
    for (int64_t column = 0; column < table.dim;
         column += 64)  // half of sum's: two registers a vector
      with_vectors(table.dim - column < 64 ? table.dim - column : 64, [&](auto n) {
        if constexpr (n.value * kLanes <= 64)
          consistent &= max_columns<n.value>(reader, in, begin, end, column, output, argmax);
      });
    return consistent;
  });
}

template <int kVectors, class T, class Reader>
bool grad_weights_columns(const Reader& reader, const Bags& in, int64_t begin, int64_t end,
                          int64_t column, const T* grad_output, float* grad_weights) {
  const MaskedTable<T>& table = reader.table;
  constexpr int kWords = (kVectors * kLanes + 63) / 64;
  const int64_t last = in.begin(end);
  bool consistent = true;
  prefetch_first(reader, in, in.begin(begin), last);
  for (int64_t b = begin; b < end; ++b) {
    const int64_t bag_begin = in.begin(b), bag_end = in.end(b);
    float scale = 1.0f;
    if (in.mean) {
      int64_t pooled = 0;
      for (int64_t j = bag_begin; j < bag_end; ++j) pooled += in.index(j) != in.padding_idx;
      scale = 1.0f / float(pooled > 1 ? pooled : 1);
    }
    Vec grad[kVectors];
    const T* grad_row = grad_output + b * table.dim + column;
    for (int v = 0; v < kVectors; ++v)
      grad[v] =
          load_columns(grad_row + v * kLanes, table.dim - column - v * kLanes) * broadcast(scale);
    for (int64_t j = bag_begin; j < bag_end; ++j) {
      prefetch_ahead(reader, in, j, last);
      const int64_t i = in.index(j);
      float dot = 0.0f;
      uint64_t bits[kWords];
      int64_t start;
      if (i != in.padding_idx) {
        Vec acc = zero();
        if (!reader.template read<kWords>(i, column / 64, bits, &start))
          consistent = false;
        else
          consistent &= for_each_vector<kVectors>(
              table, bits, start, [&](int v, Vec row) { acc = fmadd(row, grad[v], acc); });
        dot = sum_lanes(acc);
      }
      grad_weights[j] = column ? grad_weights[j] + dot : dot;
    }
  }
  return consistent;
}

template <class T>
bool bag_grad_weights(const MaskedTable<T>& table, const Bags& in, int64_t begin, int64_t end,
                      const T* grad_output, float* grad_weights) {
  return with_reader(table, [&](const auto& reader) {
    bool consistent = true;
    for (int64_t column = 0; column < table.dim; column += 8 * kLanes)
      with_vectors(table.dim - column, [&](auto n) {
        consistent &= grad_weights_columns<n.value>(reader, in, begin, end, column, grad_output,
                                                    grad_weights);
      });
    return consistent;
  });
}

template <class T>
const MaskedBagKernels<T>& masked_bag_kernels() {
  static constexpr MaskedBagKernels<T> table = {&bag_sum<T>, &bag_max<T>, &bag_grad_weights<T>};
  return table;
}
RS_INSTANTIATE_KERNEL_TABLE(MaskedBagKernels, masked_bag_kernels)

}  // namespace RS_ISA
}  // namespace recsparse
