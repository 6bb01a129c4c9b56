#include <algorithm>

#include "low_rank_launch.h"

namespace recsparse::low_rank {

template <class T>
void run_backward(const Stream& stream, BackwardArguments<T> p) {
  const int64_t batch = p.grad_output.rows, columns = p.grad_output.columns;
  const auto width = [&](const T* at, int64_t n) { return at ? matrix(at, batch, n).width : 16; };
  p.factor_width = width(p.factor, columns);
  p.mid_width = std::min(p.mid.width, width(p.grad_mid, p.mid.columns));
  p.output_width = std::min(width(p.grad_x0, columns), width(p.grad_sum, columns));
  p.input_width = width(p.grad_input, p.down.columns);
  if (p.is_cross) p.input_width = std::min(p.input_width, p.grad_output.width);
  with_rows_config<T>(stream, batch, p.down.rows, [&](auto config) {
    using Config = decltype(config);
    launch(stream, "low_rank_backward", backward_kernel<Config, T>,
           {ceil_div(batch, Config::kRows)}, {Config::kThreads}, BackwardStages<Config, T>::kBytes,
           p);
  });
}

template void run_backward(const Stream&, BackwardArguments<float>);
template void run_backward(const Stream&, BackwardArguments<bf16>);
template void run_backward(const Stream&, BackwardArguments<f16>);

}  // namespace recsparse::low_rank
