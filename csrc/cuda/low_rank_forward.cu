#include <algorithm>

#include "low_rank_launch.h"

namespace recsparse::low_rank {

template <class T>
void run_forward(const Stream& stream, ForwardArguments<T> p) {
  const int64_t batch = p.input.rows, columns = p.up.rows;
  p.mid_width = p.mid ? matrix<T>(p.mid, batch, p.down.rows).width : 0;
  p.output_width = matrix<T>(p.output, batch, columns).width;
  if (p.x0)
    p.output_width = std::min({p.output_width, matrix(p.x0, batch, columns).width, p.input.width});
  with_rows_config<T>(stream, batch, p.down.rows, [&](auto config) {
    using Config = decltype(config);
    launch(stream, "low_rank_forward", forward_kernel<Config, T>, {ceil_div(batch, Config::kRows)},
           {Config::kThreads}, ForwardStages<Config, T>::kBytes, p);
  });
}

template void run_forward(const Stream&, ForwardArguments<float>);
template void run_forward(const Stream&, ForwardArguments<bf16>);
template void run_forward(const Stream&, ForwardArguments<f16>);

}  // namespace recsparse::low_rank
