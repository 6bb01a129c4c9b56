// csrc/cuda/ptx.h where kernels run on the CPU: each instruction as the PTX ISA describes it.
#pragma once

#include <cstdint>

#include "machine.h"
#include "tensor_cores.h"

namespace recsparse {

using cuda_on_cpu::Site;

inline void cp_async_16(void* shared, const void* global, bool valid = true) {
  cuda_on_cpu::copy_async(shared, global, 16, valid ? 16 : 0);
}
template <int kBytes>
void cp_async_small(void* shared, const void* global, bool valid = true) {
  static_assert(kBytes == 4 || kBytes == 8, "cp.async.ca copies 4, 8 or 16 bytes");
  cuda_on_cpu::copy_async(shared, global, kBytes, valid ? kBytes : 0);
}
inline void cp_async_commit() { cuda_on_cpu::copy_commit(); }
template <int kPending>
void cp_async_wait() {
  cuda_on_cpu::copy_wait(kPending);
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* shared, Site site = Site::current()) {
  cuda_on_cpu::ldmatrix(r, 4, shared, false, site);
}
inline void ldmatrix_x2(uint32_t (&r)[2], const void* shared, Site site = Site::current()) {
  cuda_on_cpu::ldmatrix(r, 2, shared, false, site);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared, Site site = Site::current()) {
  cuda_on_cpu::ldmatrix(r, 4, shared, true, site);
}
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* shared, Site site = Site::current()) {
  cuda_on_cpu::ldmatrix(r, 2, shared, true, site);
}

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                  Site site = Site::current()) {
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, f16>, "bf16 or f16");
  cuda_on_cpu::mma_m16n8k16(d, a, b, std::is_same_v<T, bf16>, site);
}
inline uint32_t cvt_tf32(float x) { return cuda_on_cpu::cvt_tf32(x); }
inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             Site site = Site::current()) {
  cuda_on_cpu::mma_m16n8k8_tf32(d, a, b, site);
}
template <class T, int kSelector>
void mma_sp_m16n8k32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                     uint32_t metadata, Site site = Site::current()) {
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, f16>, "bf16 or f16");
  static_assert(kSelector == 0 || kSelector == 1, "two pairs of lanes in each four");
  cuda_on_cpu::mma_sp_m16n8k32(d, a, b, metadata, kSelector, std::is_same_v<T, bf16>, site);
}

inline uint4 ld_nc_no_allocate(const void* global) {
  return __ldg(static_cast<const uint4*>(global));
}

}  // namespace recsparse
