// Instructions of sm_90a: mbarrier, bulk tensor copies, wgmma. See csrc/cuda/ptx_sm90.h.
//
// All that is asynchronous ends as late as it can: a bulk copy when no thread can go on, the
// products of a warpgroup when they are waited for. An error, besides those of machine.h:
//   - shared memory read before the copy that fills it has been waited for, by that thread or one
//     it has synchronised with; filled or written while something still reads it;
//   - a phase of an mbarrier that ends with copies for it under way, gets bytes it does not expect,
//     or more arrivals than it has; an mbarrier used by threads that cannot know it is initialised;
//   - bulk stores and products of what threads wrote with no fence_proxy_async;
//   - products that not all four warps issue, or not the same; without wgmma_fence before; sums
//     touched before they are waited for; tiles that are not where a swizzle begins.
#pragma once

#include <cstdint>

#include "machine.h"

namespace cuda_on_cpu {

struct TensorMap {
  const void* at = nullptr;
  int element_bytes = 0;
  int64_t rows = 0, columns = 0, row_bytes = 0;
  int box_rows = 0, box_columns = 0, swizzle = 0;
};
// Checks what the driver's encoder checks.
TensorMap encode_tensor_map(const TensorMap& map);

uint32_t shared_address(const void* shared);

void mbarrier_init(uint64_t* barrier, int arrivals);
void fence_mbarrier_init();
void mbarrier_arrive(uint64_t* barrier, int expected_bytes);
void mbarrier_wait(uint64_t* barrier, int parity, Site site);

void load_box(void* shared, const TensorMap& map, int column, int row, uint64_t* barrier);
void store_box(const TensorMap& map, const void* shared, int column, int row);
void bulk_commit();
void bulk_wait(int pending);
void fence_proxy_async();

void named_barrier_sync(int barrier, int threads, Site site);

// One product of a warpgroup: D [64, columns] += A B^T, A [64, 32] with 2 of 4 kept.
struct SparseProduct {
  int columns;
  uint64_t a, b;  // descriptors
  int selector;
  bool brain;
  bool operator==(const SparseProduct&) const = default;
};
void wgmma_fence();
void wgmma_sp(float* d, const SparseProduct& product, uint32_t metadata);
void wgmma_commit();
void wgmma_wait(int pending, Site site);

}  // namespace cuda_on_cpu
