// Every piece of inline PTX, behind functions named after the instruction (PTX ISA); sm_90a's are
// in ptx_sm90.h. Kernels hold none. Each has a functional model in
// tests/native/cuda_on_cpu/ptx_model.h, which runs instead when kernels are executed on the CPU:
// keep the two side by side.
//
// Fragments: lane = 4 g + t (g = lane / 4, t = lane % 4); a register holds two 16-bit elements, the
// one with the lower column (A) or row (B) in its low half.
//   mma m16n8k16   A  a[0] = (g, 2t..2t+1)  a[1] = (g + 8, 2t..)  a[2] = (g, 2t + 8..)  a[3] = (g +
//   8, 2t + 8..)
//                  B  b[0] = (2t..2t+1, g)  b[1] = (2t + 8.., g)
//                  D  d[0], d[1] = (g, 2t), (g, 2t + 1)    d[2], d[3] = (g + 8, 2t), (g + 8, 2t +
//                  1)
//   mma m16n8k8 tf32   A  (g, t) (g + 8, t) (g, t + 4) (g + 8, t + 4)   B  (t, g) (t + 4, g)   D as
//   above mma.sp m16n8k32   A as m16n8k16, of the kept values [16, 16]   D as above
//                     B  b[i] = (2t + 8i..2t + 8i + 1, g)
//                     metadata of lanes t = 2 s and 2 s + 1 (selector s): lane t - 2 s = h has row
//                     g, columns 16 h..16 h + 15 in bits 0-15, and row g + 8 in bits 16-31; two
//                     bits for each kept value, its place in its group of four, ascending, the
//                     first lowest
#pragma once

#include <cstdint>
#include <type_traits>

#include "types.h"

#ifdef RS_CUDA_ON_CPU
#include "ptx_model.h"
#else

namespace recsparse {

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// ---- cp.async: global to shared memory, behind the thread's back ----

// 16 bytes, past L1; both pointers 16-byte aligned. Not valid: zeros, and `global` is not read.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool valid = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}
// 4 or 8 bytes, aligned to as many.
template <int kBytes>
__device__ __forceinline__ void cp_async_small(void* shared, const void* global,
                                               bool valid = true) {
  static_assert(kBytes == 4 || kBytes == 8, "cp.async.ca copies 4, 8 or 16 bytes");
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)),
               "l"(global), "n"(kBytes), "r"(valid ? kBytes : 0)
               : "memory");
}
// What was issued since the last commit becomes a group.
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most kPending of the newest groups are under way. Other threads see the data after
// a barrier that follows.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- ldmatrix: 8 x 8 matrices of 16-bit elements, one row address (16 bytes) a lane ----

// r[i] = elements (g, 2t) and (g, 2t + 1) of matrix i, whose row j is at the address of lane 8 i +
// j.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(shared))
               : "memory");
}
// Transposed: r[i] = elements (2t, g) and (2t + 1, g).
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&r)[2], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(shared))
               : "memory");
}

// ---- mma: D += A B in float32 ----

// T = bf16 or f16.
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, bf16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    static_assert(std::is_same_v<T, f16>, "bf16 or f16");
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// float32 rounded to tf32 (10 bits of mantissa), as bits.
__device__ __forceinline__ uint32_t cvt_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4],
                                                 const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// A with 2 of each 4 along k kept. kSelector: which pair of lanes of each four holds the metadata.
template <class T, int kSelector>
__device__ __forceinline__ void mma_sp_m16n8k32(float (&d)[4], const uint32_t (&a)[4],
                                                const uint32_t (&b)[4], uint32_t metadata) {
  static_assert(kSelector == 0 || kSelector == 1, "two pairs of lanes in each four");
  if constexpr (std::is_same_v<T, bf16>) {
    asm volatile(
        "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]),
          "r"(metadata), "n"(kSelector));
  } else {
    static_assert(std::is_same_v<T, f16>, "bf16 or f16");
    asm volatile(
        "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]),
          "r"(metadata), "n"(kSelector));
  }
}

// ---- loads and stores with a cache policy; 16-byte aligned ----

// Read once: not kept in L1.
__device__ __forceinline__ uint4 ld_nc_no_allocate(const void* global) {
  uint4 r;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w)
               : "l"(global));
  return r;
}

}  // namespace recsparse
#endif
