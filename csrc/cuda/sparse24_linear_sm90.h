// The 2:4 linear of Hopper as the rest of the library sees it. Its kernels are compiled for sm_90a
// alone; kernels that other files share are not launched from there.
#pragma once

#include "sparse24_linear.h"

namespace recsparse::sparse24 {

constexpr int kMetadataColumns = 128;  // that 16 bytes of a row's metadata describe

// Which kernel, and what its persistent blocks go through: tiles, for each part of the depth.
struct WarpgroupPlan {
  int shape;
  int64_t tiles_b, tiles_o;
  int steps;  // of kMetadataColumns
  Split split;
  __host__ __device__ int64_t count() const { return tiles_b * tiles_o * split.parts; }
};

// The kernels' tiles, by `shape`.
struct WarpgroupTile {
  int b, o;
};
constexpr WarpgroupTile kWarpgroupTiles[] = {
    {16, 256}, {32, 256}, {64, 256}, {128, 128}, {256, 128}};

// Whether bulk copies can reach the rows of such a matrix.
inline bool has_tensor_map(const void* at, int64_t rows, int64_t row_bytes) {
  return is_aligned(at, 16) && row_bytes % 16 == 0 && rows < int64_t(1) << 31;
}

// To parts, or to the output.
template <class T>
void launch_warpgroups(const LinearCall<T>& call, const LinearOutput<T>& to,
                       const WarpgroupPlan& plan);

}  // namespace recsparse::sparse24
