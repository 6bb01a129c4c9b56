// Topology update of a fixed fan-in layer on CUDA, in place. Nothing waits for the GPU.
#include <algorithm>
#include <vector>

#include "../fan_in.h"
#include "fan_in_rewire_kernels.cuh"
#include "indices.h"
#include "sort.h"

namespace recsparse {
namespace {

constexpr int64_t kMaxBlocks =
    2048;  // of the histogram: enough to fill any GPU, the rest is a loop

template <class T>
void drop(const Stream& stream, const Connections<T>& connections, int64_t criterion, int64_t scope,
          double amount, int8_t* dropped) {
  const int64_t count = connections.rows * connections.fan_in;
  const int64_t blocks = ceil_div(count, kRewireThreads);
  if (criterion == kFraction && scope == kRow) {
    launch(stream, "fan_in_drop_of_row", drop_of_row_kernel<T>, {connections.rows}, {kRowThreads},
           0, connections, int64_t(amount * double(connections.fan_in) + 0.5), dropped);
    return;
  }
  const Scratch<RewireLimit> limit(stream, 1);
  const Scratch<int64_t> equal(stream, blocks), before(stream, blocks);
  const bool limited = criterion == kFraction;
  if (limited) {
    const Scratch<unsigned long long> bins(stream, 256);
    launch(stream, "fan_in_begin_limit", begin_limit_kernel, {1}, {256}, 0,
           int64_t(amount * double(count) + 0.5), limit.get(), bins.get());
    for (int shift = 56; shift >= 0; shift -= 8) {
      launch(stream, "fan_in_limit_histogram", limit_histogram_kernel<T>,
             {std::min(blocks, kMaxBlocks)}, {kRewireThreads}, 0, connections,
             static_cast<const RewireLimit*>(limit.get()), shift, bins.get());
      launch(stream, "fan_in_limit_digit", limit_digit_kernel, {1}, {256}, 0, limit.get(),
             bins.get(), shift);
    }
    launch(stream, "fan_in_count_equal", count_equal_kernel<T>, {blocks}, {kRewireThreads}, 0,
           connections, static_cast<const RewireLimit*>(limit.get()), equal.get());
    exclusive_sum(stream, equal.get(), before.get(), blocks);
  }
  launch(stream, "fan_in_drop", drop_kernel<T>, {blocks}, {kRewireThreads}, 0, connections,
         float(amount), limited ? static_cast<const RewireLimit*>(limit.get()) : nullptr,
         static_cast<const int64_t*>(before.get()), dropped);
}

template <class V>
void reset(const Stream& stream, const FanInSizes& size, const int8_t* dropped, uint64_t key,
           float scale, V* values) {
  const int64_t count = size.out_features * size.fan_in;
  launch(stream, "fan_in_reset", reset_kernel<V>, {ceil_div(count, kRewireThreads)},
         {kRewireThreads}, 0, dropped, count, size.fan_in, size.group_size, key, scale, values);
}

Tensor fan_in_rewire(const Tensor& weight, const Tensor& indices, const std::vector<Tensor>& state,
                     int64_t in_features, int64_t group_size, int64_t criterion, int64_t scope,
                     double amount, double init_scale, bool allow_duplicates, int64_t seed) {
  const FanInSizes size = check_fan_in_rewire(weight, indices, state, in_features, group_size,
                                              criterion, scope, amount, allow_duplicates);
  for (const Tensor& moments : state) {
    const int64_t bytes = int64_t(moments.element_size());
    RS_CHECK_TYPE(bytes == 2 || bytes == 4 || bytes == 8,
                  "state must have elements of 2, 4 or 8 bytes; got ",
                  dtype_text(moments.scalar_type()));
  }
  const Stream stream(weight);
  const int64_t row_bytes = 3 * size.fan_in * int64_t(sizeof(int32_t));
  RS_CHECK_VALUE(allow_duplicates || row_bytes <= stream.max_shared_bytes(), "rows of at most ",
                 stream.max_shared_bytes() / 12, " indices can be regrown on this GPU; got ",
                 size.fan_in);
  checked_indices(stream, "indices", indices, in_features, "");  // compared, never used as offsets
  Tensor total = torch::stable::new_empty(weight, std::vector<int64_t>{}, ScalarType::Long);
  const int64_t count = size.rows * size.fan_in;
  const uint64_t key = split_mix(uint64_t(seed));
  const Scratch<int8_t> dropped(stream, count);
  const int8_t* chosen = dropped.get();
  with_float_type(weight.scalar_type(), "weight", [&](auto tag) {
    using T = typename decltype(tag)::type;
    T* values = mutable_data<T>(stream, weight);
    drop<T>(stream, {values, size.rows, size.out_features, size.fan_in, group_size, key}, criterion,
            scope, amount, dropped.get());
    reset(stream, size, chosen, key, float(init_scale), values);
  });
  const auto regrow = [&](auto* columns) {
    using Index = std::remove_pointer_t<decltype(columns)>;
    if (allow_duplicates) {
      launch(stream, "fan_in_redraw", redraw_kernel<Index>, {ceil_div(count, kRewireThreads)},
             {kRewireThreads}, 0, chosen, count, key, in_features, columns);
    } else if (count > 0) {
      launch(stream, "fan_in_regrow", regrow_kernel<Index>, {size.rows}, {kRowThreads}, row_bytes,
             chosen, size.fan_in, key, in_features, columns);
    }
  };
  if (indices.scalar_type() == ScalarType::Short) {
    regrow(mutable_data<int16_t>(stream, indices));
  } else {
    regrow(mutable_data<int32_t>(stream, indices));
  }
  for (const Tensor& moments : state) {
    if (moments.element_size() == 2) {
      reset(stream, size, chosen, key, 0.0f, mutable_data<int16_t>(stream, moments));
    } else if (moments.element_size() == 4) {
      reset(stream, size, chosen, key, 0.0f, mutable_data<int32_t>(stream, moments));
    } else {
      reset(stream, size, chosen, key, 0.0f, mutable_data<int64_t>(stream, moments));
    }
  }
  launch(stream, "fan_in_count_dropped", count_dropped_kernel, {1}, {1024}, 0, chosen, count,
         mutable_data<int64_t>(stream, total));
  return total;
}

}  // namespace

RS_CUDA_OPS(m) { m.impl("fan_in_rewire", TORCH_BOX(&fan_in_rewire)); }

}  // namespace recsparse
