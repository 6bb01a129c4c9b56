// Kernels that test the models of sm_90a's instructions, as probes.cu does: each `bug` is a mistake
// that must be caught or change the result, 0 is none.
#include "primitives.h"
#include "tensor_map.h"

namespace recsparse {
namespace {

// Dynamic shared memory from a multiple of 1024 bytes on.
template <class T>
__device__ T* at_swizzle(int64_t byte) {
  uint8_t* begin = dynamic_shared<uint8_t>();
  return reinterpret_cast<T*>(begin + (1024 - shared_address(begin) % 1024) % 1024 + byte);
}

constexpr int kBoxRows = 8, kBoxColumns = 64, kBoxBytes = 1024;
constexpr int kReaders = 64;

// output [boxes, 8, 64] = the boxes along the columns of the map's matrix, from its row `row`: a
// producer warp and two warps of readers, two stages.
__global__ void ring_kernel(const __grid_constant__ TensorMap map, int16_t* output, int boxes,
                            int row, int64_t bug) {
  auto* full = at_swizzle<uint64_t>(2 * kBoxBytes);
  uint64_t* empty = full + 2;
  if (threadIdx.x == 0) {
    for (int s = 0; s < 2; ++s) {
      mbarrier_init(full + s, 1);
      mbarrier_init(empty + s, kReaders / kWarp);
    }
    if (bug != 1) fence_mbarrier_init();  // 1: none
  }
  if (bug != 2) __syncthreads();  // 2: none
  if (warp_id() == kReaders / kWarp) {
    if (lane_id() > 0) return;
    for (int i = 0; i < boxes; ++i) {
      const int stage = i % 2, parity = i / 2 % 2;
      if (bug != 3)
        mbarrier_wait(empty + stage, parity ^ 1);  // 3: fills a stage that is being read
      // 4, 5: more or fewer bytes than come
      mbarrier_arrive_expect_tx(full + stage, kBoxBytes + (bug == 4) * 16 - (bug == 5) * 16);
      bulk_load(at_swizzle<void>(stage * kBoxBytes), map, i * kBoxColumns, row,
                full + (bug == 6 ? 1 - stage : stage));  // 6: the other stage's barrier
    }
    return;
  }
  for (int i = 0; i < boxes; ++i) {
    const int stage = i % 2, parity = i / 2 % 2;
    if (bug != 7) mbarrier_wait(full + stage, bug == 8 ? parity ^ 1 : parity);  // 7: none, 8: which
    const int r = int(threadIdx.x) / 8, piece = int(threadIdx.x) % 8;
    const int place = bug == 9 ? piece : piece ^ r;  // 9: as if there were no swizzle
    const auto* from = at_swizzle<const int16_t>(stage * kBoxBytes) + r * kBoxColumns + 8 * place;
    store_pack(output + (i * kBoxRows + r) * kBoxColumns + 8 * piece, load_pack<int16_t, 8>(from));
    if (bug != 10) __syncwarp();  // 10: a lane gives the stage back for others that still read
    if (lane_id() == 0) mbarrier_arrive(empty + stage);
    if (bug == 11 && lane_id() == 0) mbarrier_arrive(empty + stage);  // 11: too many arrivals
  }
}

// The matrix from input [8 n, 64] by bulk stores of boxes, at (column, row) of the first.
__global__ void bulk_store_kernel(const __grid_constant__ TensorMap map, const int16_t* input,
                                  int boxes, int column, int64_t bug) {
  auto* box = at_swizzle<int16_t>(0);
  const int r = int(threadIdx.x) / 8, piece = int(threadIdx.x) % 8;
  for (int i = 0; i < boxes; ++i) {
    if (threadIdx.x == 0 && bug != 1) bulk_wait_read<0>();  // 1: overwrites what a store reads
    named_barrier_sync(1, 64);
    store_pack(box + r * kBoxColumns + 8 * (piece ^ r),
               load_pack<int16_t, 8>(input + (i * kBoxRows + r) * kBoxColumns + 8 * piece));
    if (bug != 2) fence_proxy_async();        // 2: none
    if (bug != 3) named_barrier_sync(1, 64);  // 3: none
    if (threadIdx.x == 0) {
      bulk_store(map, box, column, i * kBoxRows);
      bulk_commit();
    }
  }
  if (threadIdx.x == 0 && bug != 4) bulk_wait();                // 4: ends first
  if (bug == 5 && threadIdx.x < 32) named_barrier_sync(2, 64);  // 5: half the threads
}

// output[32 m + 4 r + c] (as pairs) = row r of matrix m, of registers that hold (column, row).
__global__ void stmatrix_kernel(uint32_t* output) {
  RS_SHARED(uint4, tile, [32]);
  const int g = lane_id() / 4, t = lane_id() % 4;
  uint32_t r[4];
  for (uint32_t m = 0; m < 4; ++m)  // element (row 2t, column g): 1000 m + 10 row + column
    r[m] = (1000 * m + uint32_t(20 * t + g)) | (1000 * m + uint32_t(20 * t + 10 + g)) << 16;
  stmatrix_x4_trans(&tile[lane_id()], r);
  __syncwarp();
  reinterpret_cast<uint4*>(output)[lane_id()] = tile[lane_id()];
}

// output [64, kColumns] = A [64, 64] B [kColumns, 64]^T, A as values [64, 32], metadata [64, 8].
template <class T, int kColumns>
__global__ void wgmma_kernel(const __grid_constant__ TensorMap a_map,
                             const __grid_constant__ TensorMap b_map, const uint8_t* metadata,
                             float* output, int64_t bug) {
  constexpr int kBytesA = 64 * 64, kBytesB = kColumns * 128;
  auto* a = at_swizzle<uint8_t>(bug == 9 ? 256 : 0);  // 9: not where its swizzle begins
  auto* b = at_swizzle<uint8_t>(kBytesA + 1024);
  auto* full = at_swizzle<uint64_t>(kBytesA + 1024 + kBytesB);
  if (threadIdx.x == 0) {
    mbarrier_init(full, 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect_tx(full, kBytesA + kBytesB);
    bulk_load(a, a_map, 0, 0, full);
    bulk_load(b, b_map, 0, 0, full);
  }
  __syncthreads();
  const int warp = warp_id(), g = lane_id() / 4, t = lane_id() % 4;
  const uint8_t* low = metadata + (16 * warp + g) * 8;
  const uint8_t* high = low + 8 * 8;
  if (bug == 1) low = high;  // 1: rows swapped
  const auto word = [&](const uint8_t* row) {
    const int at = bug == 2 ? 2 * (t ^ 1) : 2 * t;  // 2: halves swapped
    return uint32_t(row[at]) | uint32_t(row[at + 1]) << 8;
  };
  uint32_t places = word(low) | word(high) << 16;
  if (bug == 3) places = (places & ~0xfu) | (places >> 2 & 3) | (places & 3) << 2;  // 3: descend
  if (bug != 10 || warp > 0) mbarrier_wait(full, 0);  // 10: a warp does not wait
  if (bug == 11) a[threadIdx.x] = 0;                  // 11: ordinary writes, no proxy fence
  float d[kColumns / 2];
  for (int i = 0; i < kColumns / 2; ++i) d[i] = 1.0f;
  if (bug != 4) wgmma_fence();  // 4: none
  const uint64_t da = wgmma_descriptor<64>(a);
  const uint64_t db = wgmma_descriptor<128>(b);
  if (bug != 6 || warp < 3) {                         // 6: three of four warps
    const int skew = bug == 7 && warp == 3 ? 64 : 0;  // 7: not all the same product
    wgmma_sp<T, kColumns, 0>(d, da, advanced(db, skew), places);
    if (bug == 8) {
      wgmma_sp<T, kColumns, 0>(d, advanced(da, 32), advanced(db, 64), places);  // 8: selector
    } else {
      wgmma_sp<T, kColumns, 1>(d, advanced(da, 32), advanced(db, 64), places);
    }
  }
  wgmma_commit();
  if (bug == 12) {  // 12: overwrites what the products read
    __syncthreads();
    b[threadIdx.x] = 0;
  }
  if (bug != 13) wgmma_wait<0>();  // 13: none
  for (int i = 0; i < kColumns / 2; ++i)
    output[(16 * warp + g + i % 4 / 2 * 8) * kColumns + i / 4 * 8 + 2 * t + i % 2] = d[i];
}

template <class T, int kColumns>
void probe_columns(const Stream& stream, int64_t bug, const Tensor& values, const Tensor& b,
                   const Tensor& metadata, const Tensor& output) {
  // 5: not swizzled as the descriptor says; 9: nor at all, so that it may lie anywhere
  const TensorMap a_map =
      tensor_map(data<T>(stream, values), {64, 32, 64, 64, 32, bug == 5 || bug == 9 ? 0 : 64});
  const TensorMap b_map =
      tensor_map(data<T>(stream, b), {b.size(0), b.size(1), 2 * b.size(1), kColumns, 64, 128});
  launch(stream, "wgmma.sp", wgmma_kernel<T, kColumns>, {1}, {kWarpgroup},
         1024 + 4096 + 1024 + kColumns * 128 + 8, a_map, b_map, data<uint8_t>(stream, metadata),
         mutable_data<float>(stream, output), bug);
}
void probe_wgmma(int64_t columns, int64_t bug, const Tensor& values, const Tensor& b,
                 const Tensor& metadata, const Tensor& output) {
  const Stream stream(values);
  with_float_type(values.scalar_type(), "values", [&](auto tag) {
    using T = typename decltype(tag)::type;
    if constexpr (!std::is_same_v<T, float>) {
      if (columns == 16) probe_columns<T, 16>(stream, bug, values, b, metadata, output);
      if (columns == 64) probe_columns<T, 64>(stream, bug, values, b, metadata, output);
      if (columns == 256) probe_columns<T, 256>(stream, bug, values, b, metadata, output);
    }
  });
}

// 0: matrix [rows, columns] to output [boxes, 8, 64]   1: the other way, boxes down the rows
// 2: stmatrix   `at`: row (0) or column (1) of the first box
void probe_bulk(int64_t which, int64_t bug, const Tensor& matrix, int64_t at,
                const Tensor& output) {
  const Stream stream(matrix);
  if (which == 2)
    return launch(stream, "stmatrix", stmatrix_kernel, {1}, {kWarp}, 0,
                  reinterpret_cast<uint32_t*>(mutable_data<int32_t>(stream, output)));
  const auto map = [&](const Tensor& of, const int16_t* p) {
    return tensor_map(p, {of.size(0), of.size(1), 2 * of.size(1), kBoxRows, kBoxColumns, 128});
  };
  if (which == 0) {
    const TensorMap from = map(matrix, data<int16_t>(stream, matrix));
    launch(stream, "ring", ring_kernel, {1}, {kReaders + kWarp}, 1024 + 2 * kBoxBytes + 32, from,
           mutable_data<int16_t>(stream, output), int(output.size(0)), int(at), bug);
  } else {
    const TensorMap to = map(output, mutable_data<int16_t>(stream, output));
    launch(stream, "bulk store", bulk_store_kernel, {1}, {64}, 1024 + kBoxBytes, to,
           data<int16_t>(stream, matrix), int(matrix.size(0) / kBoxRows), int(at), bug);
  }
}

}  // namespace

RS_CUDA_DEFINITIONS(m) {
  m.def("probe_bulk(int which, int bug, Tensor matrix, int at, Tensor(a!) output) -> ()");
  m.def(
      "probe_wgmma(int columns, int bug, Tensor values, Tensor b, Tensor metadata, Tensor(a!) output) "
      "-> ()");
}
RS_CUDA_OPS(m) {
  m.impl("probe_bulk", TORCH_BOX(&probe_bulk));
  m.impl("probe_wgmma", TORCH_BOX(&probe_wgmma));
}

}  // namespace recsparse
