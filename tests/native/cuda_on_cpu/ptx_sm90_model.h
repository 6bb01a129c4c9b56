// csrc/cuda/ptx_sm90.h where kernels run on the CPU: each instruction as the PTX ISA describes it.
#pragma once

#include <cstdint>

#include "ptx_model.h"
#include "sm90.h"

namespace recsparse {

using cuda_on_cpu::TensorMap;

inline TensorMap encode_tensor_map(const void* at, int element_bytes, const auto& shape) {
  return cuda_on_cpu::encode_tensor_map({at, element_bytes, shape.rows, shape.columns,
                                         shape.row_bytes, shape.box_rows, shape.box_columns,
                                         shape.swizzle});
}

inline uint32_t shared_address(const void* shared) { return cuda_on_cpu::shared_address(shared); }

inline void mbarrier_init(uint64_t* barrier, int arrivals) {
  cuda_on_cpu::mbarrier_init(barrier, arrivals);
}
inline void fence_mbarrier_init() { cuda_on_cpu::fence_mbarrier_init(); }
inline void mbarrier_arrive(uint64_t* barrier) { cuda_on_cpu::mbarrier_arrive(barrier, 0); }
inline void mbarrier_arrive_expect_tx(uint64_t* barrier, int bytes) {
  cuda_on_cpu::mbarrier_arrive(barrier, bytes);
}
inline void mbarrier_wait(uint64_t* barrier, int parity, Site site = Site::current()) {
  cuda_on_cpu::mbarrier_wait(barrier, parity, site);
}

inline void bulk_load(void* shared, const TensorMap& map, int column, int row, uint64_t* barrier) {
  cuda_on_cpu::load_box(shared, map, column, row, barrier);
}
inline void bulk_store(const TensorMap& map, const void* shared, int column, int row) {
  cuda_on_cpu::store_box(map, shared, column, row);
}
inline void bulk_commit() { cuda_on_cpu::bulk_commit(); }
template <int kPending>
void bulk_wait_read() {
  cuda_on_cpu::bulk_wait(kPending);
}
inline void bulk_wait() { cuda_on_cpu::bulk_wait(0); }
inline void fence_proxy_async() { cuda_on_cpu::fence_proxy_async(); }

inline void named_barrier_sync(int barrier, int threads, Site site = Site::current()) {
  cuda_on_cpu::named_barrier_sync(barrier, threads, site);
}
inline void stmatrix_x4_trans(void* shared, const uint32_t (&r)[4], Site site = Site::current()) {
  cuda_on_cpu::stmatrix_x4_trans(shared, r, site);
}

template <int kRegisters>
void setmaxnreg_inc() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
}
template <int kRegisters>
void setmaxnreg_dec() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
}

inline void wgmma_fence() { cuda_on_cpu::wgmma_fence(); }
inline void wgmma_commit() { cuda_on_cpu::wgmma_commit(); }
template <int kPending>
void wgmma_wait(Site site = Site::current()) {
  cuda_on_cpu::wgmma_wait(kPending, site);
}
template <int kCount>
void wgmma_hold(float (&)[kCount]) {}
template <class T, int kColumns, int kSelector>
void wgmma_sp(float (&d)[kColumns / 2], uint64_t a_descriptor, uint64_t b_descriptor,
              uint32_t metadata) {
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, f16>, "bf16 or f16");
  static_assert(kSelector == 0 || kSelector == 1, "two pairs of lanes in each four");
  static_assert(kColumns % 8 == 0 && kColumns <= 256, "multiples of 8");
  cuda_on_cpu::wgmma_sp(
      d, {kColumns, a_descriptor, b_descriptor, kSelector, std::is_same_v<T, bf16>}, metadata);
}

}  // namespace recsparse
