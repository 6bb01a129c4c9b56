// Launches of the 2:4 linear on Hopper's sparse tensor cores.
#include "sparse24_linear_sm90.h"
#include "sparse24_linear_sm90_kernels.cuh"
#include "tensor_map.h"

namespace recsparse::sparse24 {
namespace {

// Tiles kWarpgroupTiles, in order. What counts: the wide tile reads the least shared memory for its
// products; few rows take most of the weight's bytes at a time.
//                                   B   groups, depth, stages, round, slots
using Rows16 = WarpgroupShape<16, 4, 128, 5, 16, 1>;
using Rows32 = WarpgroupShape<32, 4, 128, 4, 32, 1>;
using Rows64 = WarpgroupShape<64, 4, 128, 4, 32, 1>;
using Rows128 = WarpgroupShape<128, 2, 64, 6, 64, 2>;
using Rows256 = WarpgroupShape<256, 2, 64, 4, 64, 2>;

template <class Shape, class T>
void launch_shape(const LinearCall<T>& call, const LinearOutput<T>& to, const WarpgroupPlan& plan) {
  const auto& [stream, input, weight, whole, elements] = call;
  const TensorMap values = tensor_map(
      weight.values, {weight.rows, 4 * weight.row_bytes, 4 * weight.row_bytes * int64_t(sizeof(T)),
                      Shape::kBlockO, Shape::kDepth / 2, Shape::kDepth});
  const TensorMap rows = tensor_map(
      input.at,
      {input.rows, input.columns, input.stride * int64_t(sizeof(T)), Shape::kBlockB, 64, 128});
  const TensorMap metadata = tensor_map(
      weight.metadata, {weight.rows, weight.row_bytes, weight.row_bytes, Shape::kBlockO, 16, 0});
  const int64_t row_bytes = to.columns * int64_t(sizeof(T));
  const bool bulk = !to.parts.at && has_tensor_map(to.output, to.rows, row_bytes) &&
                    has_tensor_map(to.sum, to.rows, row_bytes);
  const auto store_map = [&](const T* at) {
    if (!bulk || !at) return TensorMap{};
    return tensor_map(at, {to.rows, to.columns, row_bytes, Shape::kRound, 64, 128});
  };
  const int64_t blocks = std::min<int64_t>(plan.count(), stream.multiprocessors());
  launch(stream, "sparse24_linear_sm90", sparse_linear_sm90_kernel<Shape, T>, {blocks},
         {Shape::kThreads}, Shape::kSharedBytes, values, rows, metadata, store_map(to.output),
         store_map(to.sum), to, bulk, plan);
}

}  // namespace

template <class T>
void launch_warpgroups(const LinearCall<T>& call, const LinearOutput<T>& to,
                       const WarpgroupPlan& plan) {
  switch (plan.shape) {
    case 0: return launch_shape<Rows16>(call, to, plan);
    case 1: return launch_shape<Rows32>(call, to, plan);
    case 2: return launch_shape<Rows64>(call, to, plan);
    case 3: return launch_shape<Rows128>(call, to, plan);
    default: return launch_shape<Rows256>(call, to, plan);
  }
}
template void launch_warpgroups(const LinearCall<bf16>&, const LinearOutput<bf16>&,
                                const WarpgroupPlan&);
template void launch_warpgroups(const LinearCall<f16>&, const LinearOutput<f16>&,
                                const WarpgroupPlan&);

}  // namespace recsparse::sparse24
