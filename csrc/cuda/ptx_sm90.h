// Inline PTX of sm_90a, as ptx.h has that of every GPU: barriers that copies complete, bulk tensor
// copies, products of a warpgroup (four warps, the first a multiple of four). The models are in
// tests/native/cuda_on_cpu/ptx_sm90_model.h.
//
// wgmma.sp m64nNk32   D [64, N] += A [64, 32] B [N, 32]^T, A with 2 of each 4 along k kept
//   A, B   in shared memory, k along the rows, by descriptor; A as kept values [64, 16]
//   D      warp w has rows 16 w + g and 16 w + g + 8 as mma m16n8k16 has them: d[4 j..4 j + 3] are
//          columns 8 j..8 j + 7
//   metadata   of rows 16 w.. as mma.sp m16n8k32 has them
#pragma once

#include "ptx.h"

#ifdef RS_CUDA_ON_CPU
#include "ptx_sm90_model.h"
#else
#include <cuda.h>

namespace recsparse {

using TensorMap = CUtensorMap;

// ---- mbarrier: phases of so many arrivals, and of so many bytes that copies bring ----

__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}
// Makes the thread's mbarrier_init known to bulk copies; other threads know after a barrier.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}
// Arrives; the phase also lasts until copies have brought so many bytes.
__device__ __forceinline__ void mbarrier_arrive_expect_tx(uint64_t* barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}
// Waits for the end of the phase of this parity: 0 is the first phase. True at once for the parity
// of the phase before the one that runs, so for 1 on a new barrier.
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, int parity) {
  uint32_t done;
  do {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (!done);
}

// ---- bulk tensor copies; one thread issues a whole tile ----

// The map's box at (column, row) to shared memory; zeros outside the matrix. All bytes of the box
// count for the barrier.
__device__ __forceinline__ void bulk_load(void* shared, const TensorMap& map, int column, int row,
                                          uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, "
      "%4}], [%2];" ::"r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(barrier)), "r"(column), "r"(row)
      : "memory");
}
// The box in shared memory to (column, row); what is outside the matrix is left out.
__device__ __forceinline__ void bulk_store(const TensorMap& map, const void* shared, int column,
                                           int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&map),
      "r"(shared_address(shared)), "r"(column), "r"(row)
      : "memory");
}
// What the thread stored since its last commit becomes a group.
__device__ __forceinline__ void bulk_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// Waits until at most kPending of the thread's newest groups still read shared memory.
template <int kPending>
__device__ __forceinline__ void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
// Waits until all of the thread's groups are in global memory.
__device__ __forceinline__ void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}
// Orders the thread's own writes to shared memory before bulk copies and wgmma that read it.
__device__ __forceinline__ void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- within a block ----

// A barrier over some of the block's warps; 0 is __syncthreads's.
__device__ __forceinline__ void named_barrier_sync(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
// ldmatrix_x4_trans the other way: elements (2t, g) and (2t + 1, g) of matrix i from r[i].
__device__ __forceinline__ void stmatrix_x4_trans(void* shared, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                   shared_address(shared)),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

// ---- a warpgroup: all four warps call ----

// More or fewer registers a thread than the kernel began with, from what other warpgroups gave
// back.
template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---- wgmma: likewise ----

// Before the first product, and after other code has touched the sums.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
// The products since the last commit become a group.
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until at most kPending of the newest groups run. Sums of the others may be touched, and
// what they read overwritten.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Keeps the compiler from moving what it does with the sums over a fence or a wait.
template <int kCount>
__device__ __forceinline__ void wgmma_hold(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// D's registers as the instruction's text and as operands
#define RS_SUMS_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define RS_SUMS_16 \
  RS_SUMS_8        \
  ", %8, %9, %10, %11, %12, %13, %14, %15"
#define RS_SUMS_32 \
  RS_SUMS_16       \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define RS_SUMS_64                                                                   \
  RS_SUMS_32                                                                         \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define RS_SUMS_128                                                                              \
  RS_SUMS_64                                                                                     \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"             \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"             \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define RS_HOLD_8(i)                                                                          \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define RS_HOLD_16(i) RS_HOLD_8(i), RS_HOLD_8(i + 8)
#define RS_HOLD_32(i) RS_HOLD_16(i), RS_HOLD_16(i + 16)
#define RS_HOLD_64(i) RS_HOLD_32(i), RS_HOLD_32(i + 32)
#define RS_HOLD_128(i) RS_HOLD_64(i), RS_HOLD_64(i + 64)
// count: registers of D, followed by the operands' numbers
#define RS_WGMMA_SP(type, n, count, a, b, e, s)                                             \
  asm volatile("wgmma.mma_async.sp.sync.aligned.m64n" #n "k32.f32." type "." type           \
               " {" RS_SUMS_##count "}, %" #a ", %" #b ", %" #e ", %" #s ", 1, 1, 1, 0, 0;" \
               : RS_HOLD_##count(0)                                                         \
               : "l"(a_descriptor), "l"(b_descriptor), "r"(metadata), "n"(kSelector))
#define RS_WGMMA_SP_SHAPES(type)                                             \
  if constexpr (kColumns == 16) RS_WGMMA_SP(type, 16, 8, 8, 9, 10, 11);      \
  if constexpr (kColumns == 32) RS_WGMMA_SP(type, 32, 16, 16, 17, 18, 19);   \
  if constexpr (kColumns == 64) RS_WGMMA_SP(type, 64, 32, 32, 33, 34, 35);   \
  if constexpr (kColumns == 128) RS_WGMMA_SP(type, 128, 64, 64, 65, 66, 67); \
  if constexpr (kColumns == 256) RS_WGMMA_SP(type, 256, 128, 128, 129, 130, 131)

// kSelector as mma_sp_m16n8k32 has it. `metadata` stays as it is until the product has ended.
template <class T, int kColumns, int kSelector>
__device__ __forceinline__ void wgmma_sp(float (&d)[kColumns / 2], uint64_t a_descriptor,
                                         uint64_t b_descriptor, uint32_t metadata) {
  static_assert(kSelector == 0 || kSelector == 1, "two pairs of lanes in each four");
  static_assert(
      kColumns == 16 || kColumns == 32 || kColumns == 64 || kColumns == 128 || kColumns == 256,
      "shapes that are written out above");
  if constexpr (std::is_same_v<T, bf16>) {
    RS_WGMMA_SP_SHAPES("bf16");
  } else {
    static_assert(std::is_same_v<T, f16>, "bf16 or f16");
    RS_WGMMA_SP_SHAPES("f16");
  }
}
#undef RS_SUMS_8
#undef RS_HOLD_8
#undef RS_SUMS_16
#undef RS_HOLD_16
#undef RS_SUMS_32
#undef RS_HOLD_32
#undef RS_SUMS_64
#undef RS_HOLD_64
#undef RS_SUMS_128
#undef RS_HOLD_128
#undef RS_WGMMA_SP
#undef RS_WGMMA_SP_SHAPES

}  // namespace recsparse
#endif

namespace recsparse {

constexpr int kWarpgroup = 128;

// A tile in shared memory for wgmma, k along its rows of kRowBytes (64 or 128), the 16-byte pieces
// of which are swizzled as a bulk copy of that width leaves them: piece p of row r lies at p ^ (r %
// 8), or p ^ (r / 2 % 4) in rows of 64. Begins at a multiple of 8 kRowBytes in shared memory.
template <int kRowBytes>
__device__ __forceinline__ uint64_t wgmma_descriptor(const void* tile) {
  static_assert(kRowBytes == 64 || kRowBytes == 128, "swizzles in use");
  constexpr uint64_t kSwizzle = kRowBytes == 128 ? 1 : 2;
  constexpr uint64_t kEightRows = 8 * kRowBytes / 16;
  return uint64_t(shared_address(tile) / 16) | uint64_t(1) << 16 | kEightRows << 32 |
         kSwizzle << 62;
}
// So many bytes into the tile's rows.
__device__ __forceinline__ uint64_t advanced(uint64_t descriptor, int bytes) {
  return descriptor + uint64_t(bytes / 16);
}

}  // namespace recsparse
