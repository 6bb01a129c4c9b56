// 2:4 linear on Hopper's sparse tensor cores (bf16, f16).
//   output[b, o] = activation(sum_i W[o, i] input[b, i] + bias[o])
//   input [B, I]   W [O, I] as values [O, P / 2], metadata [O, P / 8]   output [B, O]
//
// The weight is the sparse operand A of wgmma.sp (M = O, N = B). A block has kGroups consumer
// warpgroups, each with the sums of 64 rows of W and kBlockB of input in registers, and one more
// warp, the producer, one thread of which keeps kStages of shared memory filled by bulk tensor
// copies: kDepth columns of input and the kept values of them, swizzled as wgmma reads them. A
// stage has two mbarriers: full, which the copies complete, and empty, at which the consumers'
// warps arrive when their products have read it. A warpgroup waits for its products before it reads
// the metadata of the next ones: nothing documents when a product has read that register. The
// others keep the tensor cores busy meanwhile.
//
// Metadata has a ring of its own, 16 bytes a row (kMetadataColumns), filled with the first of the
// stages it describes: a bulk copy's rows are at least 16 bytes. As for mma.sp a lane's register is
// two 16-bit words of the stored rows g and g + 8; wgmma has the same layout for each of its warps.
//
// Blocks are persistent: while the consumers write one tile out, the producer fills stages for the
// next. A tile goes through shared memory, transposed by stmatrix, and out by bulk stores where
// these fit the rows of the output, else from the registers. Sums that are split in depth go to
// global memory in float32.
//
// Not yet run on such a GPU: what it computes is checked against models of the instructions, after
// the PTX ISA; tiles and stages are chosen by counting bytes and products, not by time.
#pragma once

#include "ptx_sm90.h"
#include "sparse24_linear_sm90.h"
#include "sparse24_tiles.cuh"

namespace recsparse::sparse24 {

template <int kRowsB, int kGroupsOf, int kDepthOf, int kStagesOf, int kRoundOf, int kSlotsOf>
struct WarpgroupShape {
  static constexpr int kBlockB = kRowsB, kGroups = kGroupsOf, kDepth = kDepthOf;
  static constexpr int kStages = kStagesOf;
  static constexpr int kBlockO = 64 * kGroups;
  // Sums of 256 rows take 128 registers a thread, more in all than the block's threads could begin
  // with: a whole producer warpgroup then gives up its own.
  static constexpr bool kManySums = kBlockB > 128;
  static constexpr int kThreads = kWarpgroup * kGroups + (kManySums ? kWarpgroup : kWarp);
  // Stages that a row's 16 bytes of metadata describe.
  static constexpr int kStagesOfMetadata = kMetadataColumns / kDepth;
  static_assert(kDepth == 64 || kDepth == 128, "a stage's kept values fill a swizzled row");
  static_assert(kStages % kStagesOfMetadata == 0, "metadata describes neighbours in the ring");
  // In bytes. Input comes 64 columns (128 bytes) at a time.
  static constexpr int kValueBytes = kBlockO * kDepth, kInputBox = kBlockB * 128;
  static constexpr int kInputBoxes = kDepth / 64;
  static constexpr int kStageBytes = kValueBytes + kInputBoxes * kInputBox;
  static constexpr int kMetadataBytes = kBlockO * 16;
  static constexpr int kMetadataAt = kStages * kStageBytes;
  // A warpgroup's sums go out kRound rows of B at a time, [b][64 o] in one of kSlots slots.
  static constexpr int kRound = kRoundOf, kRounds = kBlockB / kRound, kSlots = kSlotsOf;
  static_assert(kRound % 16 == 0 && kBlockB % kRound == 0, "stmatrix stores 16 rows");
  static constexpr int kSlotBytes = kRound * 128;
  static constexpr int kSlotsAt = kMetadataAt + kStages / kStagesOfMetadata * kMetadataBytes;
  static constexpr int kBarriersAt = kSlotsAt + kGroups * kSlots * kSlotBytes;
  static_assert(kStageBytes % 1024 == 0 && kMetadataBytes % 1024 == 0 && kSlotBytes % 1024 == 0,
                "swizzles repeat after 1024 bytes");
  // To a multiple of 1024 bytes, which dynamic shared memory need not begin at.
  static constexpr int64_t kSharedBytes = 1024 + kBarriersAt + 2 * 8 * kStages;
  static_assert(kSharedBytes <= 226 * 1024,
                "what sm_90 can give a block, and 1 KB of the system's");
};

// Position in a ring of stages, and the parity of the phase that fills it.
template <int kStages>
struct Ring {
  int stage = 0, parity = 0;
  __device__ __forceinline__ void next() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

// A tile of the output, and the part of the depth that is summed.
struct WarpgroupWork {
  int64_t b0, o0, part;
  int first, last;  // in units of kMetadataColumns
};
template <class Shape>
__device__ __forceinline__ WarpgroupWork work_at(const WarpgroupPlan& plan, int64_t index) {
  const int64_t tiles = plan.tiles_b * plan.tiles_o, part = index / tiles;
  const TileAt tile = tile_of_block(index - part * tiles, plan.tiles_b, plan.tiles_o);
  const int first = int(part * plan.split.steps_each);
  const int last = first + int(plan.split.steps_each);
  return {tile.m * Shape::kBlockB, tile.n * Shape::kBlockO, part, first,
          last < plan.steps ? last : plan.steps};
}

template <class Shape>
struct WarpgroupShared {
  uint8_t* base;
  uint64_t* full;
  uint64_t* empty;

  __device__ __forceinline__ uint8_t* values(int stage) const {
    return base + stage * Shape::kStageBytes;
  }
  __device__ __forceinline__ uint8_t* input(int stage, int box) const {
    return values(stage) + Shape::kValueBytes + box * Shape::kInputBox;
  }
  __device__ __forceinline__ uint8_t* metadata(int stage) const {
    return base + Shape::kMetadataAt + stage / Shape::kStagesOfMetadata * Shape::kMetadataBytes;
  }
  __device__ __forceinline__ uint8_t* slot(int group, int slot) const {
    return base + Shape::kSlotsAt + (group * Shape::kSlots + slot) * Shape::kSlotBytes;
  }
};

template <class Shape>
__device__ __forceinline__ void produce(const WarpgroupShared<Shape>& shared,
                                        const TensorMap& values, const TensorMap& input,
                                        const TensorMap& metadata, const WarpgroupPlan& plan) {
  Ring<Shape::kStages> ring;
  for (int64_t index = blockIdx.x; index < plan.count(); index += gridDim.x) {
    const WarpgroupWork work = work_at<Shape>(plan, index);
    for (int step = work.first; step < work.last; ++step)
      for (int part = 0; part < Shape::kStagesOfMetadata; ++part, ring.next()) {
        uint64_t* full = shared.full + ring.stage;
        const int column = step * kMetadataColumns + part * Shape::kDepth;
        mbarrier_wait(shared.empty + ring.stage, ring.parity ^ 1);
        mbarrier_arrive_expect_tx(full,
                                  Shape::kStageBytes + (part == 0 ? Shape::kMetadataBytes : 0));
        bulk_load(shared.values(ring.stage), values, column / 2, int(work.o0), full);
        for (int box = 0; box < Shape::kInputBoxes; ++box)
          bulk_load(shared.input(ring.stage, box), input, column + 64 * box, int(work.b0), full);
        if (part == 0)
          bulk_load(shared.metadata(ring.stage), metadata, column / 8, int(work.o0), full);
      }
  }
}

// A warpgroup's place, uniform over each warp as the compiler can see.
struct Consumer {
  int group, warp, g, t;
};
__device__ __forceinline__ Consumer this_consumer() {
  const int warp = __shfl_sync(kAllLanes, warp_id(), 0);
  return {warp / 4, warp % 4, lane_id() / 4, lane_id() % 4};
}

// sums[4 j + 2 h + e] = (o 8 h.., b 8 j + 2 t + e) of the warp's 16 rows of W.
template <class Shape>
using WarpgroupSums = float[Shape::kBlockB / 2];

// The sums of one tile; waits for their end, and gives every stage back.
template <class Shape, class T>
__device__ __forceinline__ void consume(WarpgroupSums<Shape>& sums,
                                        const WarpgroupShared<Shape>& shared, const Consumer& me,
                                        const WarpgroupWork& work, int64_t rows_o,
                                        Ring<Shape::kStages>& ring) {
#pragma unroll
  for (int i = 0; i < Shape::kBlockB / 2; ++i) sums[i] = 0.0f;
  // Rows past the weight came as zeros: their sums are not used, but places must ascend.
  const int row = 64 * me.group + 16 * me.warp + me.g;
  const uint32_t fill =
      (work.o0 + row < rows_o ? 0u : 0x4444u) | (work.o0 + row + 8 < rows_o ? 0u : 0x44440000u);
  const auto release = [&](int stage) {
    __syncwarp();  // every lane has read its metadata
    if (lane_id() == 0) mbarrier_arrive(shared.empty + stage);
  };
  wgmma_hold(sums);
  for (int step = work.first; step < work.last; ++step) {
    uint32_t places[2];
    const int stage = ring.stage;
#pragma unroll
    for (int part = 0; part < Shape::kStagesOfMetadata; ++part) {
      mbarrier_wait(shared.full + ring.stage, ring.parity);
      if (part == 0) {
        const uint8_t* from = shared.metadata(ring.stage) + row * 16 + 2 * me.t;
#pragma unroll
        for (int i = 0; i < 2; ++i)
          places[i] = uint32_t(*reinterpret_cast<const uint16_t*>(from + 8 * i)) |
                      uint32_t(*reinterpret_cast<const uint16_t*>(from + 8 * i + 8 * 16)) << 16 |
                      fill;
      }
      wgmma_fence();
      const uint64_t a = wgmma_descriptor<Shape::kDepth>(shared.values(ring.stage) +
                                                         me.group * 64 * Shape::kDepth);
#pragma unroll
      for (int box = 0; box < Shape::kInputBoxes; ++box) {
        const uint64_t b = wgmma_descriptor<128>(shared.input(ring.stage, box));
        const uint32_t places_of_box = places[part * Shape::kInputBoxes + box];
        // 32 columns: 32 bytes of kept values, 64 bytes of input
        wgmma_sp<T, Shape::kBlockB, 0>(sums, advanced(a, 64 * box), b, places_of_box);
        wgmma_sp<T, Shape::kBlockB, 1>(sums, advanced(a, 64 * box + 32), advanced(b, 64),
                                       places_of_box);
      }
      wgmma_commit();
      ring.next();
    }
    if constexpr (Shape::kStagesOfMetadata == 2) {
      wgmma_wait<1>();
      release(stage);
    }
    wgmma_wait<0>();
    release(stage + Shape::kStagesOfMetadata - 1);
  }
  wgmma_hold(sums);
}

// Round `round` of the sums is in front.
template <class Shape>
__device__ __forceinline__ void next_round(WarpgroupSums<Shape>& sums) {
#pragma unroll
  for (int i = 0; i + Shape::kRound / 2 < Shape::kBlockB / 2; ++i)
    sums[i] = sums[i + Shape::kRound / 2];
}

// kRound rows of the output, 64 columns, by a bulk store.
template <class Shape, class T>
__device__ __forceinline__ void store_round(const WarpgroupSums<Shape>& sums, uint8_t* slot,
                                            const Consumer& me, const TensorMap& to, int64_t o0,
                                            int64_t b0) {
  const bool issues = me.warp == 0 && lane_id() == 0;
  if (issues) bulk_wait_read<Shape::kSlots - 1>();
  named_barrier_sync(1 + me.group, kWarpgroup);  // the slot has been read
  // lane 8 i + r addresses row r of matrix i: eight o of b row 8 (i / 2) + r
  const int matrix = lane_id() / 8, row = 8 * (matrix / 2) + lane_id() % 8;
  uint8_t* at = slot + row * 128 + ((2 * me.warp + matrix % 2) ^ (row % 8)) * 16;
#pragma unroll
  for (int i = 0; i < Shape::kRound / 16; ++i) {
    uint32_t r[4];
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      const float* from = sums + 8 * i + 4 * (m / 2) + 2 * (m % 2);
      r[m] = pair_bits<T>(from[0], from[1]);
    }
    stmatrix_x4_trans(at + i * 16 * 128, r);
  }
  fence_proxy_async();
  named_barrier_sync(1 + me.group, kWarpgroup);
  if (issues) {
    bulk_store(to, slot, int(o0), int(b0));
    bulk_commit();
  }
}

// The same from the registers, masked: f(where in the output, which of the round's sums).
template <class Shape, class F>
__device__ __forceinline__ void for_round(const Consumer& me, int64_t o0, int64_t b0, int64_t rows,
                                          int64_t columns, F f) {
#pragma unroll
  for (int i = 0; i < Shape::kRound / 2; ++i) {
    const int64_t o = o0 + 16 * me.warp + me.g + i % 4 / 2 * 8;
    const int64_t b = b0 + i / 4 * 8 + 2 * me.t + i % 2;
    if (o < columns && b < rows) f(b * columns + o, i);
  }
}

template <class Shape, class T>
__device__ __forceinline__ void write_tile(WarpgroupSums<Shape>& sums,
                                           const WarpgroupShared<Shape>& shared, const Consumer& me,
                                           const WarpgroupWork& work, const LinearOutput<T>& to,
                                           const TensorMap& output, const TensorMap& sum, bool bulk,
                                           int& slot) {
  const int64_t o0 = work.o0 + 64 * me.group, o = o0 + 16 * me.warp + me.g;
  float bias[2] = {};
  if (to.bias && !to.parts.at)
#pragma unroll
    for (int h = 0; h < 2; ++h)
      if (o + 8 * h < to.columns) bias[h] = to_float(to.bias[o + 8 * h]);
  if (o0 >= to.columns) return;
  const auto store = [&](const TensorMap& map, int64_t b0) {
    store_round<Shape, T>(sums, shared.slot(me.group, slot), me, map, o0, b0);
    slot = (slot + 1) % Shape::kSlots;
  };
#pragma unroll 1
  for (int round = 0; round < Shape::kRounds; ++round) {
    const int64_t b0 = work.b0 + round * Shape::kRound;
    if (b0 >= to.rows) break;
    const auto each = [&](auto f) { for_round<Shape>(me, o0, b0, to.rows, to.columns, f); };
    if (to.parts.at) {
      float* part = to.parts.at + work.part * to.parts.count;
      each([&](int64_t at, int i) { part[at] = sums[i]; });
    } else {
#pragma unroll
      for (int i = 0; i < Shape::kRound / 2; ++i) sums[i] += bias[i % 4 / 2];
      if (to.sum) {
        if (bulk) {
          store(sum, b0);
        } else {
          each([&](int64_t at, int i) { to.sum[at] = from_float<T>(sums[i]); });
        }
      }
#pragma unroll
      for (int i = 0; i < Shape::kRound / 2; ++i) sums[i] = activate(sums[i], to.activation);
      if (bulk) {
        store(output, b0);
      } else {
        each([&](int64_t at, int i) { to.output[at] = from_float<T>(sums[i]); });
      }
    }
    next_round<Shape>(sums);
  }
}

template <class Shape, class T>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    sparse_linear_sm90_kernel(const __grid_constant__ TensorMap values,
                              const __grid_constant__ TensorMap input,
                              const __grid_constant__ TensorMap metadata,
                              const __grid_constant__ TensorMap output,
                              const __grid_constant__ TensorMap sum, LinearOutput<T> to,
                              bool bulk_output, WarpgroupPlan plan) {
  WarpgroupShared<Shape> shared;
  uint8_t* begin = dynamic_shared<uint8_t>();
  shared.base = begin + (1024 - shared_address(begin) % 1024) % 1024;
  shared.full = reinterpret_cast<uint64_t*>(shared.base + Shape::kBarriersAt);
  shared.empty = shared.full + Shape::kStages;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < Shape::kStages; ++stage) {
      mbarrier_init(shared.full + stage, 1);
      mbarrier_init(shared.empty + stage, 4 * Shape::kGroups);
    }
    fence_mbarrier_init();
  }
  __syncthreads();

  if (warp_id() >= 4 * Shape::kGroups) {
    if constexpr (Shape::kManySums) setmaxnreg_dec<40>();
    if (threadIdx.x == kWarpgroup * Shape::kGroups)
      produce<Shape>(shared, values, input, metadata, plan);
  } else {
    if constexpr (Shape::kManySums) setmaxnreg_inc<232>();
    const Consumer me = this_consumer();
    Ring<Shape::kStages> ring;
    int slot = 0;
    for (int64_t index = blockIdx.x; index < plan.count(); index += gridDim.x) {
      const WarpgroupWork work = work_at<Shape>(plan, index);
      WarpgroupSums<Shape> sums;
      consume<Shape, T>(sums, shared, me, work, to.columns, ring);
      write_tile<Shape, T>(sums, shared, me, work, to, output, sum, bulk_output, slot);
    }
    if (bulk_output && me.warp == 0 && lane_id() == 0) bulk_wait();
  }
}

}  // namespace recsparse::sparse24
