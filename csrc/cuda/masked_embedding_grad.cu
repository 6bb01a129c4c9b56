// Gradient of a masked table's values, CUDA: lookups are sorted by row, then each row's gradient is
// summed in the order of its lookups and stored dense, stored for touched rows only, or consumed by
// an optimizer.
#include <bit>
#include <cmath>
#include <memory>
#include <tuple>

#include "../cpu/glibc_pow.h"
#include "masked_embedding.h"
#include "masked_embedding_grad_kernels.cuh"
#include "sort.h"

namespace recsparse {
namespace {

constexpr int kThreads = 256;

// Lookups sorted by row, and the memory of it.
template <class T>
class SortedLookups {
 public:
  SortedLookups(const Stream& stream, const DeviceTable<T>& table, const Bags& bags,
                const Tensor& grad_output, const MaybeTensor& argmax, bool scale_grad_by_freq)
      : count_(bags.count),
        payloads_(stream, count_),
        sorted_payloads_(stream, count_),
        parts_(stream, 2 * (ceil_div(count_, kChunk) + 1) * table.dim) {
    const bool by_lookup = bags.weights || argmax;  // else the bag is all there is to know
    if (by_lookup) bag_of_ = std::make_unique<Scratch<int32_t>>(stream, count_);
    if (bags.mean) scales_ = std::make_unique<Scratch<float>>(stream, bags.bags);
    const bool wide = uint64_t(table.num_embeddings) >= UINT32_MAX;
    keys_ = std::make_unique<Scratch<uint8_t>>(stream, 2 * count_ * (wide ? 8 : 4));
    if (wide) {
      sort<uint64_t>(stream, table, bags);
    } else {
      sort<uint32_t>(stream, table, bags);
    }
    job_ = {};
    job_.keys = {keys_->get() + count_ * (wide ? 8 : 4), wide};
    job_.count = count_;
    job_.payloads = sorted_payloads_.get();
    job_.bag_of = by_lookup ? bag_of_->get() : nullptr;
    job_.weights = bags.weights;
    job_.bag_scale = bags.mean ? scales_->get() : nullptr;
    job_.grad_output = data<T>(stream, grad_output);
    job_.argmax = data<int32_t>(stream, argmax);
    job_.in = bags;
    job_.by_frequency = scale_grad_by_freq;
    job_.by_four = by_four(job_.grad_output, table.dim);
    job_.parts = parts_.get();
  }

  GradJob<T>& job() { return job_; }
  int64_t count() const { return count_; }

  void run(const Stream& stream, const DeviceTable<T>& table) const {
    with_team(table.dim, [&](auto lanes) {
      constexpr int kLanes = lanes.value;
      launch(stream, "masked_embedding_grad", pieces_kernel<T, kLanes>, team_grid(count_, kLanes),
             {kTeamThreads}, 0, table, job_);
      const int64_t chunks = count_ / kChunk;  // of the last, shorter one no run goes on
      launch(stream, "masked_embedding_grad_join", join_kernel<T, kLanes>,
             team_grid(chunks, kLanes), {kTeamThreads}, 0, table, job_);
    });
  }

 private:
  template <class Key>
  void sort(const Stream& stream, const DeviceTable<T>& table, const Bags& bags) {
    auto* keys = reinterpret_cast<Key*>(keys_->get());
    const auto none = Key(table.num_embeddings);
    launch(stream, "masked_embedding_fill", fill_kernel<Key>, {ceil_div(count_, kThreads)},
           {kThreads}, 0, keys, payloads_.get(), count_, none);
    launch(stream, "masked_embedding_prepare", prepare_kernel<Key>,
           team_grid(bags.bags, kPrepareLanes), {kTeamThreads}, 0, bags, table.num_embeddings, keys,
           payloads_.get(), bag_of_ ? bag_of_->get() : nullptr, scales_ ? scales_->get() : nullptr);
    sort_pairs(stream, keys, keys + count_, payloads_.get(), sorted_payloads_.get(), count_,
               std::max(1, int(std::bit_width(uint64_t(none)))));
  }

  int64_t count_;
  Scratch<int32_t> payloads_, sorted_payloads_;
  Scratch<float> parts_;
  std::unique_ptr<Scratch<uint8_t>> keys_;  // as given, then sorted
  std::unique_ptr<Scratch<int32_t>> bag_of_;
  std::unique_ptr<Scratch<float>> scales_;
  GradJob<T> job_;
};

void check_grad_output(const Tensor& grad_output, const Tensor& values, const MaybeTensor& argmax,
                       const Bags& bags, int64_t dim, int64_t mode) {
  check_matrix(grad_output, values, bags.bags, dim, "grad_output");
  RS_CHECK_VALUE(bags.bags < (int64_t(1) << 31), "at most 2^31 - 1 bags; got ", bags.bags);
  if (BagMode(mode) != BagMode::kMax) return;
  RS_CHECK_VALUE(argmax.has_value(), "argmax must be given in mode max");
  check_dtype(*argmax, ScalarType::Int, "argmax");
  RS_CHECK_VALUE(argmax->is_contiguous() && argmax->numel() == bags.bags * dim,
                 "argmax must have shape [", bags.bags, ", ", dim, "]; got ", shape_text(*argmax));
}

// argmax only says something in mode max.
MaybeTensor argmax_of(const MaybeTensor& argmax, int64_t mode) {
  return BagMode(mode) == BagMode::kMax ? argmax : std::nullopt;
}

Tensor grad_values(const Tensor& grad_output, const Tensor& values, const Tensor& rows,
                   const MaybeTensor& bases, const MaybeTensor& starts, const MaybeTensor& columns,
                   const Tensor& indices, const MaybeTensor& offsets,
                   const MaybeTensor& per_sample_weights, const MaybeTensor& argmax,
                   int64_t num_embeddings, int64_t embedding_dim, int64_t mode, int64_t padding_idx,
                   bool include_last_offset, bool scale_grad_by_freq) {
  const MaskedTableArgs args{values, rows, bases, starts, columns, num_embeddings, embedding_dim};
  check_masked_table(args);
  const Stream stream(values);
  return with_float_type(values.scalar_type(), "values", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto table = device_table<T>(stream, args);
    const DeviceBags in(stream, indices, num_embeddings, offsets, per_sample_weights, mode,
                        padding_idx, include_last_offset);
    check_grad_output(grad_output, values, argmax, in.bags, embedding_dim, mode);
    SortedLookups<T> lookups(stream, table, in.bags, grad_output, argmax_of(argmax, mode),
                             scale_grad_by_freq);
    Tensor grad = torch::stable::new_zeros(values, shape_of(values));
    lookups.job().grad_values = mutable_data<T>(stream, grad);
    lookups.run(stream, table);
    return grad;
  });
}

// The sizes of the outputs depend on the indices, so this waits for the device.
std::tuple<Tensor, Tensor> grad_touched(const Tensor& grad_output, const Tensor& values,
                                        const Tensor& rows, const MaybeTensor& bases,
                                        const MaybeTensor& starts, const MaybeTensor& columns,
                                        const Tensor& indices, const MaybeTensor& offsets,
                                        const MaybeTensor& per_sample_weights,
                                        int64_t num_embeddings, int64_t embedding_dim, int64_t mode,
                                        int64_t padding_idx, bool include_last_offset,
                                        bool scale_grad_by_freq) {
  const MaskedTableArgs args{values, rows, bases, starts, columns, num_embeddings, embedding_dim};
  check_masked_table(args);
  RS_CHECK_VALUE(BagMode(mode) != BagMode::kMax, "mode max has no gradient over touched rows");
  const Stream stream(values);
  return with_float_type(values.scalar_type(), "values", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto table = device_table<T>(stream, args);
    const DeviceBags in(stream, indices, num_embeddings, offsets, per_sample_weights, mode,
                        padding_idx, include_last_offset);
    check_grad_output(grad_output, values, std::nullopt, in.bags, embedding_dim, mode);
    SortedLookups<T> lookups(stream, table, in.bags, grad_output, std::nullopt, scale_grad_by_freq);
    GradJob<T>& job = lookups.job();
    const int64_t count = lookups.count();
    const Extent grid{ceil_div(count, kThreads)}, block{kThreads};
    Scratch<int32_t> begins(stream, count), run_of(stream, count);
    launch(stream, "masked_embedding_runs", run_begins_kernel, grid, block, 0, job.keys, count,
           num_embeddings, begins.get());
    inclusive_sum(stream, begins.get(), run_of.get(), count);
    const int64_t runs = count ? read_back(stream, run_of.get() + count - 1) : 0;
    job.run_of = run_of.get();
    const bool fixed = table.layout == MaskedLayout::kFixedK;  // rows, and values k at a time
    Scratch<int64_t> counts(stream, runs + 1), starts_of(stream, runs + 1);
    Tensor positions, touched;
    if (fixed) {
      positions = torch::stable::new_empty(values, {runs}, ScalarType::Long);
      touched = torch::stable::new_empty(values, {runs, values.size(1)});
      job.touched_stride = values.size(1);
      launch(stream, "masked_embedding_run_rows", run_rows_kernel<T>, grid, block, 0, table,
             job.keys, count, job.run_of, runs, mutable_data<int64_t>(stream, positions),
             static_cast<int64_t*>(nullptr));
    } else {
      launch(stream, "masked_embedding_run_rows", run_rows_kernel<T>, grid, block, 0, table,
             job.keys, count, job.run_of, runs, static_cast<int64_t*>(nullptr), counts.get());
      exclusive_sum(stream, counts.get(), starts_of.get(), count ? runs + 1 : 0);
      const int64_t total = count ? read_back(stream, starts_of.get() + runs) : 0;
      positions = torch::stable::new_empty(values, {total}, ScalarType::Long);
      touched = torch::stable::new_empty(values, {total});
      job.touched_position = mutable_data<int64_t>(stream, positions);
      job.touched_offset = starts_of.get();
    }
    job.touched = mutable_data<T>(stream, touched);
    if (touched.numel()) lookups.run(stream, table);
    return std::make_tuple(positions, touched);
  });
}

void update(const Tensor& values, const Tensor& state, const Tensor& second_state,
            const Tensor& grad_output, const Tensor& rows, const MaybeTensor& bases,
            const MaybeTensor& starts, const MaybeTensor& columns, const Tensor& indices,
            const MaybeTensor& offsets, const MaybeTensor& per_sample_weights,
            const MaybeTensor& argmax, int64_t num_embeddings, int64_t embedding_dim, int64_t mode,
            int64_t padding_idx, bool include_last_offset, bool scale_grad_by_freq,
            int64_t optimizer, double lr, double beta1, double beta2, double eps, int64_t step) {
  const MaskedTableArgs args{values, rows, bases, starts, columns, num_embeddings, embedding_dim};
  check_masked_table(args);
  RS_CHECK_VALUE(optimizer >= 0 && optimizer <= 2,
                 "optimizer must be 0 (SGD), 1 (row Adagrad) or 2 (Adam); got ", optimizer);
  const auto kind = MaskedOptimizer(optimizer);
  const auto check_state = [&](const Tensor& t, int64_t size, const char* name) {
    check_dtype(t, ScalarType::Float, name);
    RS_CHECK_VALUE(t.is_contiguous() && t.numel() == size, name, " must be contiguous with ", size,
                   " elements; got shape ", shape_text(t));
  };
  if (kind == MaskedOptimizer::kRowAdagrad) check_state(state, num_embeddings, "state");
  if (kind == MaskedOptimizer::kAdam) {
    RS_CHECK_VALUE(step >= 1, "step must be at least 1; got ", step);
    check_state(state, values.numel(), "state");
    check_state(second_state, values.numel(), "second_state");
  }
  const Stream stream(values);
  with_float_type(values.scalar_type(), "values", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto table = device_table<T>(stream, args);
    const DeviceBags in(stream, indices, num_embeddings, offsets, per_sample_weights, mode,
                        padding_idx, include_last_offset);
    check_grad_output(grad_output, values, argmax, in.bags, embedding_dim, mode);
    SortedLookups<T> lookups(stream, table, in.bags, grad_output, argmax_of(argmax, mode),
                             scale_grad_by_freq);
    GradJob<T>& job = lookups.job();
    job.update_values = mutable_data<T>(stream, values);
    job.optimizer = kind;
    if (kind != MaskedOptimizer::kSgd) job.state = mutable_data<float>(stream, state);
    if (kind == MaskedOptimizer::kAdam)
      job.second_state = mutable_data<float>(stream, second_state);
    job.lr = float(lr);
    job.beta1 = float(beta1);
    job.beta2 = float(beta2);
    job.rest1 = float(1.0 - beta1);
    job.rest2 = float(1.0 - beta2);
    job.eps = float(eps);
    job.correction1 = float(1.0 - std::pow(beta1, double(step)));
    job.correction2 = float(std::sqrt(1.0 - std::pow(beta2, double(step))));
    lookups.run(stream, table);
  });
}

}  // namespace

RS_CUDA_OPS(m) {
  m.impl("masked_embedding_bag_grad_values", TORCH_BOX(&grad_values));
  m.impl("masked_embedding_bag_grad_touched", TORCH_BOX(&grad_touched));
  m.impl("masked_embedding_bag_update", TORCH_BOX(&update));
}

}  // namespace recsparse
