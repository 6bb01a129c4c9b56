// sort.h by CUB; where kernels run on the CPU, by the standard library.
#include "sort.h"

#ifdef RS_CUDA_ON_CPU
#include "sort_model.h"
#else
#include <cub/device/device_radix_sort.cuh>
#include <cub/device/device_scan.cuh>
#endif

namespace recsparse {
namespace {

void check_count(int64_t count) {
  RS_CHECK(count < (int64_t(1) << 31), "recsparse: at most 2^31 - 1 elements can be sorted; got ",
           count);
}

#ifndef RS_CUDA_ON_CPU
// Runs a CUB function twice, as CUB wants it: it says how much memory it needs, then it works.
template <class F>
void run_cub(const Stream& stream, const char* name, const F& call) {
  size_t bytes = 0;
  check_cuda(call(nullptr, bytes), name);
  const Scratch<unsigned char> memory(stream, int64_t(bytes));
  check_cuda(call(memory.get(), bytes), name);
}

template <class Key>
void radix_sort(const Stream& stream, const Key* keys, Key* sorted_keys, const int32_t* values,
                int32_t* sorted_values, int64_t count, int key_bits) {
  run_cub(stream, "radix sort", [&](void* memory, size_t& bytes) {
    return cub::DeviceRadixSort::SortPairs(memory, bytes, keys, sorted_keys, values, sorted_values,
                                           int32_t(count), 0, key_bits, stream.get());
  });
}
template <class T>
void scan_exclusive(const Stream& stream, const T* in, T* out, int64_t count) {
  run_cub(stream, "exclusive sum", [&](void* memory, size_t& bytes) {
    return cub::DeviceScan::ExclusiveSum(memory, bytes, in, out, int32_t(count), stream.get());
  });
}
template <class T>
void scan_inclusive(const Stream& stream, const T* in, T* out, int64_t count) {
  run_cub(stream, "inclusive sum", [&](void* memory, size_t& bytes) {
    return cub::DeviceScan::InclusiveSum(memory, bytes, in, out, int32_t(count), stream.get());
  });
}
#endif

template <class Key>
void sort_checked(const Stream& stream, const Key* keys, Key* sorted_keys, const int32_t* values,
                  int32_t* sorted_values, int64_t count, int key_bits) {
  check_count(count);
  if (count) radix_sort(stream, keys, sorted_keys, values, sorted_values, count, key_bits);
}

}  // namespace

void sort_pairs(const Stream& stream, const uint32_t* keys, uint32_t* sorted_keys,
                const int32_t* values, int32_t* sorted_values, int64_t count, int key_bits) {
  sort_checked(stream, keys, sorted_keys, values, sorted_values, count, key_bits);
}
void sort_pairs(const Stream& stream, const uint64_t* keys, uint64_t* sorted_keys,
                const int32_t* values, int32_t* sorted_values, int64_t count, int key_bits) {
  sort_checked(stream, keys, sorted_keys, values, sorted_values, count, key_bits);
}

void exclusive_sum(const Stream& stream, const int32_t* in, int32_t* out, int64_t count) {
  check_count(count);
  if (count) scan_exclusive(stream, in, out, count);
}
void exclusive_sum(const Stream& stream, const int64_t* in, int64_t* out, int64_t count) {
  check_count(count);
  if (count) scan_exclusive(stream, in, out, count);
}
void inclusive_sum(const Stream& stream, const int32_t* in, int32_t* out, int64_t count) {
  check_count(count);
  if (count) scan_inclusive(stream, in, out, count);
}
void inclusive_sum(const Stream& stream, const int64_t* in, int64_t* out, int64_t count) {
  check_count(count);
  if (count) scan_inclusive(stream, in, out, count);
}

}  // namespace recsparse
