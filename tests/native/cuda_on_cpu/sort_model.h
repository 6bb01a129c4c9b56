// What csrc/cuda/sort.cu takes from CUB, by the standard library.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

namespace recsparse {
class Stream;

template <class Key>
void radix_sort(const Stream&, const Key* keys, Key* sorted_keys, const int32_t* values,
                int32_t* sorted_values, int64_t count, int key_bits) {
  const Key mask = key_bits >= int(8 * sizeof(Key)) ? ~Key(0) : (Key(1) << key_bits) - 1;
  std::vector<int64_t> order(static_cast<size_t>(count));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return (keys[a] & mask) < (keys[b] & mask); });
  for (int64_t i = 0; i < count; ++i) {
    sorted_keys[i] = keys[order[size_t(i)]];
    sorted_values[i] = values[order[size_t(i)]];
  }
}
template <class T>
void scan_exclusive(const Stream&, const T* in, T* out, int64_t count) {
  std::exclusive_scan(in, in + count, out, T(0));
}
template <class T>
void scan_inclusive(const Stream&, const T* in, T* out, int64_t count) {
  std::inclusive_scan(in, in + count, out);
}

}  // namespace recsparse
