// What kernels share: vectors of elements in memory, reductions over a warp and a block, bits.
#pragma once

#include <cstdint>

#include "launch.h"
#include "types.h"

namespace recsparse {

constexpr uint32_t kAllLanes = 0xffffffffu;

#ifndef RS_CUDA_ON_CPU
// The CPU harness checks the address; here a wrong one faults by itself.
__device__ __forceinline__ void check_aligned(const void*, int64_t) {}
#endif

// kCount elements that move as one access of up to 16 bytes.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
  static_assert(sizeof(T) * kCount <= 16, "at most 16 bytes an access");
  T at[kCount];
};
template <class T>
constexpr int kPackOf16Bytes = 16 / int(sizeof(T));

template <class T, int kCount>
__device__ __forceinline__ Pack<T, kCount> load_pack(const T* p) {
  check_aligned(p, sizeof(T) * kCount);
  return *reinterpret_cast<const Pack<T, kCount>*>(p);
}
template <class T, int kCount>
__device__ __forceinline__ void store_pack(T* p, const Pack<T, kCount>& values) {
  check_aligned(p, sizeof(T) * kCount);
  *reinterpret_cast<Pack<T, kCount>*>(p) = values;
}

// Whether p, and with it every multiple of `bytes` behind it, can be accessed `bytes` at a time.
inline bool is_aligned(const void* p, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % uint64_t(bytes) == 0;
}

// ---- bits ----

__device__ __forceinline__ uint64_t low_bits(int64_t count) {
  return count >= 64 ? ~uint64_t(0) : (uint64_t(1) << count) - 1;
}

// ---- a warp: every lane of it calls ----

__device__ __forceinline__ int lane_id() { return int(threadIdx.x % kWarp); }
__device__ __forceinline__ int warp_id() { return int(threadIdx.x / kWarp); }

// Sum over the kLanes lanes that share lane / kLanes, in all of them, in a fixed order.
template <int kLanes = kWarp, class T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}
template <int kLanes = kWarp, class T>
__device__ __forceinline__ T warp_max(T value) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) {
    const T other = __shfl_xor_sync(kAllLanes, value, step);
    value = other > value ? other : value;
  }
  return value;
}
// Of each lane the sum over the lanes before it.
template <class T>
__device__ __forceinline__ T warp_exclusive_sum(T value) {
  T sum = value;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const T other = __shfl_up_sync(kAllLanes, sum, step);
    if (lane_id() >= step) sum += other;
  }
  return sum - value;
}

// ---- a block of one dimension, whole warps: every thread of it calls ----

// Sum over the block, in all threads, in a fixed order.
template <class T>
__device__ __forceinline__ T block_sum(T value) {
  RS_SHARED(T, sums, [kWarp]);
  value = warp_sum(value);
  __syncthreads();  // the last call's sums have been read
  if (lane_id() == 0) sums[warp_id()] = value;
  __syncthreads();
  const int warps = int(blockDim.x / kWarp);
  return warp_sum(lane_id() < warps ? sums[lane_id()] : T(0));
}

}  // namespace recsparse
