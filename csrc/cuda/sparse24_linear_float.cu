// 2:4 linear in float32 on CUDA: tiles of the weight are expanded in shared memory, and multiplied
// in full, or where set_tf32 allows it on tensor cores as dense tf32 (mma.sp takes tf32 with one
// kept of each two only, which two of each four need not be). For few rows a kernel that is as fast
// as the weight's bytes arrive, in full.
#include <atomic>

#include "sparse24_linear.h"
#include "sparse24_rows_kernels.cuh"

namespace recsparse::sparse24 {
namespace {

std::atomic<bool> tf32_allowed = false;

// Gives back what was set before.
bool set_tf32(bool allowed) { return tf32_allowed.exchange(allowed); }

template <int kRows>
void launch_rows(const LinearCall<float>& call) {
  // a block's warps share outputs where there are not enough of those for every multiprocessor
  int warps_k = 1;
  const auto blocks = [&] {
    return ceil_div(call.to.columns, kRowsWarps / warps_k * kRowsOutputs);
  };
  while (warps_k < kRowsWarps && blocks() < call.stream.multiprocessors() &&
         call.weight.row_bytes > warps_k * kWarp)
    warps_k *= 2;
  launch(call.stream, "sparse24_linear_rows", linear_rows_kernel<kRows>, {blocks()},
         {kRowsWarps * kWarp}, 0, call.input, call.weight, call.to, warps_k);
}

}  // namespace

bool tf32_wanted() { return tf32_allowed; }

void run_linear(const LinearCall<float>& call) {
  const auto& [stream, input, weight, to, elements] = call;
  if (to.rows == 1) return launch_rows<1>(call);
  if (to.rows <= 4) return launch_rows<4>(call);
  if (to.rows <= kFewRows) return launch_rows<kFewRows>(call);
  run_product<float>(stream, "sparse24_linear", LinearProduct<float>{input, weight, to}, to.rows,
                     to.columns, elements);
}

RS_CUDA_DEFINITIONS(m) { m.def("set_tf32(bool allowed) -> bool"); }
RS_CUDA_SETTINGS(m) { m.impl("set_tf32", TORCH_BOX(&set_tf32)); }

}  // namespace recsparse::sparse24
