// 2:4 linear on CUDA: checks, choice of tiles, launches.
// bf16 and f16 run on sparse tensor cores: by mma.sp here, on Hopper in sparse24_linear_sm90.cu
// where bulk copies can reach the operands. float32 is in sparse24_linear_float.cu.
#include <atomic>

#include "sparse24_linear.h"
#include "sparse24_linear_kernels.cuh"
#include "sparse24_linear_sm90.h"

namespace recsparse::sparse24 {
namespace {

//                                     O    B    warps O, B, K, stages
template <class T>
using ManyRows = SparseShape<T, 128, 128, 2, 2, 1, 3>;
template <class T>
using SomeRows = SparseShape<T, 64, 64, 2, 2, 1, 4>;
template <class T>
using FewRows = SparseShape<T, 32, 16, 1, 1, 4, 5>;

template <class Shape, class T>
void launch_sparse(const LinearCall<T>& call) {
  const auto& [stream, input, weight, to, elements] = call;
  const int64_t tiles_b = ceil_div(to.rows, Shape::kBlockB);
  const int64_t tiles_o = ceil_div(to.columns, Shape::kBlockO);
  const int64_t steps = ceil_div(8 * weight.row_bytes, Shape::kDepth);
  const Split split = split_depth(stream, tiles_b * tiles_o, steps, Shape::kWarpsK > 1 ? 2 : 4,
                                  most_parts<T>(elements, to.rows * to.columns));
  const Matrix<T> values = matrix(weight.values, weight.rows, 4 * weight.row_bytes);
  const int metadata_width = [&] {
    for (const int width : {8, 4})
      if (is_aligned(weight.metadata, width) && weight.row_bytes % width == 0) return width;
    return 1;
  }();
  with_parts(stream, "sparse24_linear_sum", split, to, [&](Parts parts) {
    LinearOutput<T> part = to;
    part.parts = parts;
    launch(stream, "sparse24_linear", sparse_linear_kernel<Shape, T>,
           {tiles_b * tiles_o, split.parts}, {Shape::kThreads}, Shape::kSharedBytes, input, values,
           weight.metadata, weight.row_bytes, metadata_width, part, tiles_b, tiles_o,
           split.steps_each);
  });
}

#ifdef RS_WITH_SM90
std::atomic<bool> warpgroups_wanted = true;  // false: as on other GPUs, to compare

template <class T>
bool fits_warpgroups(const LinearCall<T>& call) {
  const auto& [stream, input, weight, to, elements] = call;
  const int64_t size = int64_t(sizeof(T));
  return warpgroups_wanted && stream.architecture() == 90 && weight.row_bytes > 0 &&
         has_tensor_map(weight.metadata, weight.rows, weight.row_bytes) &&
         has_tensor_map(weight.values, weight.rows, 4 * size * weight.row_bytes) &&
         has_tensor_map(input.at, input.rows, size * input.stride) &&
         8 * weight.row_bytes < int64_t(1) << 31;
}

template <class T>
WarpgroupPlan plan_warpgroups(const LinearCall<T>& call) {
  const auto& [stream, input, weight, to, elements] = call;
  const auto tiles = [&](int shape) {
    return ceil_div(to.rows, kWarpgroupTiles[shape].b) *
           ceil_div(to.columns, kWarpgroupTiles[shape].o);
  };
  int shape = 0;
  while (shape < 3 && to.rows > kWarpgroupTiles[shape].b) ++shape;
  if (shape == 3) {
    // all multiprocessors at a time; the wide tile takes 9/5 of the narrow one's time: it reads
    // less shared memory for as many products
    const auto turns = [&](int s) { return ceil_div(tiles(s), stream.multiprocessors()); };
    if (9 * turns(4) <= 5 * turns(3)) shape = 4;
  }
  const int64_t steps = ceil_div(8 * weight.row_bytes, kMetadataColumns);
  const Split split =
      split_depth(stream, tiles(shape), steps, 4, most_parts<T>(elements, to.rows * to.columns), 1);
  return {shape, ceil_div(to.rows, kWarpgroupTiles[shape].b),
          ceil_div(to.columns, kWarpgroupTiles[shape].o), int(steps), split};
}

template <class T>
void run_warpgroups(const LinearCall<T>& call) {
  const WarpgroupPlan plan = plan_warpgroups(call);
  with_parts(call.stream, "sparse24_linear_sum", plan.split, call.to, [&](Parts parts) {
    LinearOutput<T> to = call.to;
    to.parts = parts;
    launch_warpgroups(call, to, plan);
  });
}
#endif

template <class T>
void run_linear(const LinearCall<T>& call) {
#ifdef RS_WITH_SM90
  if (fits_warpgroups(call)) return run_warpgroups(call);
#endif
  const auto& to = call.to;
  const int64_t large_tiles =
      ceil_div(to.rows, ManyRows<T>::kBlockB) * ceil_div(to.columns, ManyRows<T>::kBlockO);
  if (to.rows <= kFewRows) return launch_sparse<FewRows<T>>(call);
  if (to.rows <= SomeRows<T>::kBlockB || large_tiles < call.stream.multiprocessors())
    return launch_sparse<SomeRows<T>>(call);
  launch_sparse<ManyRows<T>>(call);
}

std::tuple<Tensor, Tensor> sparse24_linear(const Tensor& input, const Tensor& values,
                                           const Tensor& metadata, const MaybeTensor& bias,
                                           int64_t activation, bool keep_sum,
                                           bool /*transposable*/) {
  const Sparse24Sizes size = check_sparse24_linear(input, values, metadata, bias, activation);
  const Stream stream(input);
  return with_float_type(input.scalar_type(), "input", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Tensor x = torch::stable::contiguous(input), v = torch::stable::contiguous(values);
    const Tensor m = torch::stable::contiguous(metadata);
    const MaybeTensor b = bias ? MaybeTensor(torch::stable::contiguous(*bias)) : std::nullopt;
    Tensor output = torch::stable::new_empty(input, {size.batch, size.out_features});
    Tensor sum = keep_sum ? torch::stable::new_empty(input, {size.batch, size.out_features})
                          : torch::stable::new_empty(input, {0});
    if (size.batch == 0 || size.out_features == 0) return std::tuple<Tensor, Tensor>(output, sum);
    T* to = mutable_data<T>(stream, output);
    run_linear(LinearCall<T>{stream,
                             matrix(data<T>(stream, x), size.batch, size.in_features),
                             sparse_weight(data<T>(stream, v), data<uint8_t>(stream, m),
                                           size.out_features, size.padded / 8),
                             {to,
                              keep_sum ? mutable_data<T>(stream, sum) : nullptr,
                              data<T>(stream, b),
                              size.batch,
                              size.out_features,
                              Activation(activation),
                              pairs_aligned(size.out_features),
                              {}},
                             elements_of(size)});
    return std::tuple<Tensor, Tensor>(output, sum);
  });
}

// The dense weight only receives the gradient; the pack of its transpose is for the one to the
// input.
std::tuple<Tensor, Tensor> sparse24_linear_ste(const Tensor& input, const Tensor& weight,
                                               const Tensor& values, const Tensor& metadata,
                                               const MaybeTensor& /*values_t*/,
                                               const MaybeTensor& /*metadata_t*/,
                                               const MaybeTensor& bias, int64_t activation,
                                               bool keep_sum, double /*decay*/) {
  check_dim(weight, 2, "weight", "[O, I], two-dimensional");
  return sparse24_linear(input, values, metadata, bias, activation, keep_sum, false);
}

// Whether Hopper's own kernels run where they can; gives back what was set before.
bool sparse24_use_warpgroups(bool wanted) {
#ifdef RS_WITH_SM90
  return warpgroups_wanted.exchange(wanted);
#else
  return false;
#endif
}

}  // namespace

RS_CUDA_DEFINITIONS(m) { m.def("sparse24_use_warpgroups(bool wanted) -> bool"); }
RS_CUDA_SETTINGS(m) { m.impl("sparse24_use_warpgroups", TORCH_BOX(&sparse24_use_warpgroups)); }
RS_CUDA_OPS(m) {
  m.impl("sparse24_linear", TORCH_BOX(&sparse24_linear));
  m.impl("sparse24_linear_ste", TORCH_BOX(&sparse24_linear_ste));
}

}  // namespace recsparse::sparse24
