// Whole-table conversions of a masked table (masked_embedding_kernels.h): to and from dense rows,
// to another mask; and the in-place renormalisation of looked-up rows.
#include "glibc_pow.h"
#include "masked_embedding_rows.h"

namespace recsparse {
namespace RS_ISA {

constexpr int kWordVectors = 64 / kLanes;
constexpr uint64_t kLaneBits = (uint64_t(1) << kLanes) - 1;

// Expands row i to `dense` [D].
template <class Reader, class T>
RS_INLINE bool expand_row(const Reader& reader, int64_t i, T* dense) {
  const MaskedTable<T>& table = reader.table;
  for (int64_t column = 0; column < table.dim; column += 64) {
    uint64_t bits[1];
    int64_t start;
    if (!reader.template read<1>(i, column / 64, bits, &start)) return false;
    if (!for_each_vector<kWordVectors>(table, bits, start, [&](int v, Vec row) {
          store_columns(dense + column + v * kLanes, row, table.dim - column - v * kLanes);
        }))
      return false;
  }
  return true;
}

template <class T>
bool unpack(const MaskedTable<T>& table, int64_t begin, int64_t end, T* dense) {
  return with_reader(table, [&](const auto& reader) {
    for (int64_t i = begin; i < end; ++i)
      if (!expand_row(reader, i, dense + (i - begin) * table.dim)) return false;
    return true;
  });
}

// values of row i = dense [D] where kept
template <class Reader, class T>
RS_INLINE bool gather_row(const Reader& reader, int64_t i, const T* dense, T* values) {
  const MaskedTable<T>& table = reader.table;
  for (int64_t column = 0; column < table.dim; column += 64) {
    uint64_t bits[1];
    int64_t start;
    if (!reader.template read<1>(i, column / 64, bits, &start) ||
        !inside(table, start, popcount(bits[0])))
      return false;
    T* out = values + start;
    for (int v = 0; v < kWordVectors; ++v) {
      const uint32_t lanes = uint32_t(bits[0] >> (v * kLanes) & kLaneBits);
      if (!lanes) continue;
      const Vec row = load_columns(dense + column + v * kLanes, table.dim - column - v * kLanes);
      store_columns(out, compress_lanes(lanes, row), popcount(lanes));
      out += popcount(lanes);
    }
  }
  return true;
}

template <class T>
bool gather(const MaskedTable<T>& table, int64_t begin, int64_t end, const T* dense, T* values) {
  return with_reader(table, [&](const auto& reader) {
    for (int64_t i = begin; i < end; ++i)
      if (!gather_row(reader, i, dense + (i - begin) * table.dim, values)) return false;
    return true;
  });
}

template <class T>
bool repack(const MaskedTable<T>& from, const MaskedTable<T>& to, int64_t begin, int64_t end,
            T* values) {
  return with_reader(from, [&](const auto& reader) {
    T row[kMaxMaskedDim];
    for (int64_t i = begin; i < end; ++i) {
      if (!expand_row(reader, i, row)) return false;
      if (!gather(to, i, i + 1, row, values)) return false;
    }
    return true;
  });
}

// norm_type: 1, 2, infinity or any other positive p, as torch.norm
RS_INLINE float vector_norm(const float* x, int64_t count, float p) {
  double sum = 0.0;
  for (int64_t n = 0; n < count; ++n) {
    const double a = __builtin_fabs(double(x[n]));
    if (p == __builtin_inff())
      sum = a > sum ? a : sum;
    else
      sum += p == 2.0f ? a * a : p == 1.0f ? a : __builtin_pow(a, double(p));
  }
  if (p == 2.0f) return float(__builtin_sqrt(sum));
  return p == 1.0f || p == __builtin_inff() ? float(sum)
                                            : float(__builtin_pow(sum, 1.0 / double(p)));
}

template <class T>
bool renorm(const MaskedTable<T>& table, const int64_t* rows, int64_t begin, int64_t end,
            float max_norm, float norm_type, T* values) {
  return with_reader(table, [&](const auto& reader) {
    float kept[kMaxMaskedDim];
    for (int64_t n = begin; n < end; ++n) {
      int64_t count = 0, row_start = 0;
      for (int64_t word = 0; word * 64 < table.dim; ++word) {
        uint64_t bits[1];
        int64_t start;
        if (!reader.template read<1>(rows[n], word, bits, &start)) return false;
        if (word == 0) row_start = start;
        count += popcount(bits[0]);
      }
      if (!inside(table, row_start, count)) return false;
      for (int64_t c = 0; c < count; ++c) kept[c] = to_float(values[row_start + c]);
      const float norm = vector_norm(kept, count, norm_type);
      if (!(norm > max_norm)) continue;
      const float scale = max_norm / (norm + 1e-7f);  // the constant of torch.embedding_renorm_
      for (int64_t c = 0; c < count; ++c) values[row_start + c] = from_float<T>(kept[c] * scale);
    }
    return true;
  });
}

template <class T>
const MaskedPackKernels<T>& masked_pack_kernels() {
  static constexpr MaskedPackKernels<T> table = {&unpack<T>, &gather<T>, &repack<T>, &renorm<T>};
  return table;
}
RS_INSTANTIATE_KERNEL_TABLE(MaskedPackKernels, masked_pack_kernels)

}  // namespace RS_ISA
}  // namespace recsparse
