// Gradient of a masked table's values, CPU: lookups are sorted by row, then each row's gradient is
// summed in the order of its lookups (so that the result is the same for any number of threads) and
// stored dense, stored for touched rows only, or consumed by an optimizer.
#include <torch/csrc/stable/library.h>

#include <bit>
#include <cmath>
#include <memory>
#include <tuple>

#include "glibc_pow.h"
#include "masked_embedding.h"
#include "radix_sort.h"

namespace recsparse {
namespace {

int bits_for(int64_t count) { return int(std::bit_width(uint64_t(count > 0 ? count - 1 : 0))); }

// Lookups sorted by row and cut into segments, with what the kernels need to know of each lookup.
template <class T>
class SortedLookups {
 public:
  SortedLookups(const Bags& bags, const MaskedTable<T>& table, const Tensor& grad_output,
                const MaybeTensor& argmax, int64_t mode, bool scale_grad_by_freq)
      : lookups_(bags.bags ? bags.begin(bags.bags) : 0), keys_(lookups_), other_(lookups_) {
    const bool max = BagMode(mode) == BagMode::kMax;
    const bool by_lookup = bags.weights || max;  // else the bag is all there is to know of a lookup
    const bool padding_left_out = bags.padding_idx >= 0;
    job_ = {};
    job_.payload_bits = std::max(1, bits_for(by_lookup ? bags.count : bags.bags));
    RS_CHECK_VALUE(job_.payload_bits + bits_for(table.num_embeddings) <= 64,
                   "too many indices for a table of this size: ", bags.count, " and ",
                   table.num_embeddings);
    if (by_lookup) bag_of_ = std::make_unique<Scratch<int32_t>>(lookups_);
    if (bags.mean) bag_scale_ = std::make_unique<Scratch<float>>(bags.bags);
    parallel_over_bags(bags, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        const int64_t first = bags.begin(b), last = bags.end(b);
        int64_t pooled = 0;
        for (int64_t j = first; j < last; ++j) {
          const int64_t row = bags.index(j);
          pooled += row != bags.padding_idx;
          keys_[j] = uint64_t(row) << job_.payload_bits | uint64_t(by_lookup ? j : b);
          if (by_lookup) (*bag_of_)[j] = int32_t(b);
        }
        if (bags.mean) (*bag_scale_)[b] = 1.0f / float(pooled > 1 ? pooled : 1);
      }
    });
    const uint64_t* sorted =
        radix_sort(keys_.get(), other_.get(), lookups_, job_.payload_bits,
                   job_.payload_bits + std::max(1, bits_for(table.num_embeddings)));
    cut(sorted, padding_left_out ? bags.padding_idx : -1);
    job_.sorted = sorted;
    job_.segments = segments_->get();
    job_.bag_of = by_lookup ? bag_of_->get() : nullptr;
    job_.weights = bags.weights;
    job_.bag_scale = bags.mean ? bag_scale_->get() : nullptr;
    job_.grad_output = data<T>(grad_output);
    job_.argmax = max ? data<int32_t>(*argmax) : nullptr;
    job_.in = &bags;
    job_.by_frequency = scale_grad_by_freq;
  }

  MaskedSegments<T>& job() { return job_; }
  int64_t segments() const { return segment_count_; }

  // kernel(begin, end) over segments in parallel, every thread about as many lookups.
  template <class F>
  void run(const F& kernel) const {
    const int64_t* first = segments_->get();
    const int64_t* last = first + segment_count_;
    std::atomic<bool> consistent{true};
    parallel_for(lookups_, kBlock, [&](int64_t begin, int64_t end) {
      const int64_t from = std::lower_bound(first, last, begin) - first;
      const int64_t to = std::lower_bound(first, last, end) - first;
      if (from < to && !kernel(from, to)) consistent.store(false, std::memory_order_relaxed);
    });
    check_consistent(consistent.load());
  }

 private:
  static constexpr int64_t kBlock = 1024;  // lookups a task: about 20 us

  // Segment starts: where the row differs from the one before. Padding is at one place, its segment
  // is left out by closing the gap (segments need not touch: each has its own end in the next
  // entry, so padding lookups are moved to the end of `sorted` before this when there are any).
  void cut(const uint64_t* sorted, int64_t padding_row) {
    const int bits = job_.payload_bits;
    if (padding_row >= 0) {
      uint64_t* keys = const_cast<uint64_t*>(sorted);  // one of our two buffers
      const uint64_t low = uint64_t(padding_row) << bits;
      const uint64_t high = uint64_t(padding_row + 1) << bits;
      uint64_t* pad = std::lower_bound(keys, keys + lookups_, low);
      uint64_t* after = std::lower_bound(pad, keys + lookups_, high);
      std::copy(after, keys + lookups_, pad);
      lookups_ -= after - pad;
    }
    const int64_t blocks = std::max<int64_t>(1, lookups_ / kBlock);
    const auto block_begin = [&](int64_t b) { return lookups_ * b / blocks; };
    const auto starts = [&](int64_t e) { return e == 0 || (sorted[e] ^ sorted[e - 1]) >> bits; };
    Scratch<int64_t> next(blocks + 1);
    parallel_for(blocks, 8, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        int64_t count = 0;
        for (int64_t e = block_begin(b); e < block_begin(b + 1); ++e) count += bool(starts(e));
        next[b] = count;
      }
    });
    segment_count_ = 0;
    for (int64_t b = 0; b < blocks; ++b) segment_count_ += std::exchange(next[b], segment_count_);
    segments_ = std::make_unique<Scratch<int64_t>>(segment_count_ + 1);
    parallel_for(blocks, 8, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b)
        for (int64_t e = block_begin(b), s = next[b]; e < block_begin(b + 1); ++e)
          if (starts(e)) (*segments_)[s++] = e;
    });
    (*segments_)[segment_count_] = lookups_;
  }

  int64_t lookups_;
  Scratch<uint64_t> keys_, other_;
  std::unique_ptr<Scratch<int32_t>> bag_of_;
  std::unique_ptr<Scratch<float>> bag_scale_;
  std::unique_ptr<Scratch<int64_t>> segments_;
  int64_t segment_count_ = 0;
  MaskedSegments<T> job_;
};

void check_grad_output(const Tensor& grad_output, const Tensor& values, const MaybeTensor& argmax,
                       const Bags& bags, int64_t dim, int64_t mode) {
  check_same_dtype(grad_output, "grad_output", values, "values");
  RS_CHECK_VALUE(grad_output.dim() == 2 && grad_output.size(0) == bags.bags &&
                     grad_output.size(1) == dim && grad_output.is_contiguous(),
                 "grad_output must be contiguous of shape [", bags.bags, ", ", dim, "]; got ",
                 shape_text(grad_output));
  RS_CHECK_VALUE(bags.bags < (int64_t(1) << 31), "at most 2^31 - 1 bags; got ", bags.bags);
  if (BagMode(mode) != BagMode::kMax) return;
  RS_CHECK_VALUE(argmax.has_value(), "argmax must be given in mode max");
  check_dtype(*argmax, ScalarType::Int, "argmax");
  RS_CHECK_VALUE(argmax->is_contiguous() && argmax->numel() == bags.bags * dim,
                 "argmax must have shape [", bags.bags, ", ", dim, "]; got ", shape_text(*argmax));
}

Tensor grad_values(const Tensor& grad_output, const Tensor& values, const Tensor& rows,
                   const MaybeTensor& bases, const MaybeTensor& starts, const MaybeTensor& columns,
                   const Tensor& indices, const MaybeTensor& offsets,
                   const MaybeTensor& per_sample_weights, const MaybeTensor& argmax,
                   int64_t num_embeddings, int64_t embedding_dim, int64_t mode, int64_t padding_idx,
                   bool include_last_offset, bool scale_grad_by_freq) {
  const MaskedTableArgs args{values, rows, bases, starts, columns, num_embeddings, embedding_dim};
  return with_float_type(values.scalar_type(), "values", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const MaskedTable<T> table = masked_table<T>(args);
    const Bags bags = check_bags(args, indices, offsets, per_sample_weights, mode, padding_idx,
                                 include_last_offset);
    check_grad_output(grad_output, values, argmax, bags, embedding_dim, mode);
    SortedLookups<T> lookups(bags, table, grad_output, argmax, mode, scale_grad_by_freq);
    std::vector<int64_t> shape{values.size(0)};
    if (values.dim() == 2) shape.push_back(values.size(1));
    Tensor grad = torch::stable::new_zeros(values, shape);
    lookups.job().grad_values = mutable_data<T>(grad);
    lookups.run([&](int64_t begin, int64_t end) {
      return masked_grad_kernels<T>().apply(table, lookups.job(), begin, end);
    });
    return grad;
  });
}

std::tuple<Tensor, Tensor> grad_touched(const Tensor& grad_output, const Tensor& values,
                                        const Tensor& rows, const MaybeTensor& bases,
                                        const MaybeTensor& starts, const MaybeTensor& columns,
                                        const Tensor& indices, const MaybeTensor& offsets,
                                        const MaybeTensor& per_sample_weights,
                                        int64_t num_embeddings, int64_t embedding_dim, int64_t mode,
                                        int64_t padding_idx, bool include_last_offset,
                                        bool scale_grad_by_freq) {
  const MaskedTableArgs args{values, rows, bases, starts, columns, num_embeddings, embedding_dim};
  return with_float_type(values.scalar_type(), "values", [&](auto tag) {
    using T = typename decltype(tag)::type;
    RS_CHECK_VALUE(BagMode(mode) != BagMode::kMax, "mode max has no gradient over touched rows");
    const MaskedTable<T> table = masked_table<T>(args);
    const Bags bags = check_bags(args, indices, offsets, per_sample_weights, mode, padding_idx,
                                 include_last_offset);
    check_grad_output(grad_output, values, std::nullopt, bags, embedding_dim, mode);
    SortedLookups<T> lookups(bags, table, grad_output, std::nullopt, mode, scale_grad_by_freq);
    const int64_t segments = lookups.segments();
    MaskedSegments<T>& job = lookups.job();
    Scratch<int64_t> offset(segments + 1);
    const auto run_apply = [&] {
      job.touched_offset = offset.get();
      lookups.run([&](int64_t begin, int64_t end) {
        return masked_grad_kernels<T>().apply(table, job, begin, end);
      });
    };
    if (table.layout == MaskedLayout::kFixedK) {  // positions are rows, values come k at a time
      const int64_t k = values.size(1);
      Tensor positions = torch::stable::new_empty(values, {segments}, ScalarType::Long);
      Tensor touched = torch::stable::new_empty(values, {segments, k});
      int64_t* position = mutable_data<int64_t>(positions);
      for (int64_t s = 0; s < segments; ++s) {
        position[s] = int64_t(job.sorted[job.segments[s]] >> job.payload_bits);
        offset[s] = s * k;
      }
      job.touched = mutable_data<T>(touched);
      run_apply();
      return std::make_tuple(positions, touched);
    }
    lookups.run([&](int64_t begin, int64_t end) {
      return masked_grad_kernels<T>().count(table, job, begin, end, offset.get());
    });
    int64_t total = 0;
    for (int64_t s = 0; s < segments; ++s) total += std::exchange(offset[s], total);
    Tensor positions = torch::stable::new_empty(values, {total}, ScalarType::Long);
    Tensor touched = torch::stable::new_empty(values, {total});
    job.touched = mutable_data<T>(touched);
    job.touched_position = mutable_data<int64_t>(positions);
    run_apply();
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
  with_float_type(values.scalar_type(), "values", [&](auto tag) {
    using T = typename decltype(tag)::type;
    RS_CHECK_VALUE(optimizer >= 0 && optimizer <= 2,
                   "optimizer must be 0 (SGD), 1 (row Adagrad) or 2 (Adam); got ", optimizer);
    const MaskedTable<T> table = masked_table<T>(args);
    const Bags bags = check_bags(args, indices, offsets, per_sample_weights, mode, padding_idx,
                                 include_last_offset);
    check_grad_output(grad_output, values, argmax, bags, embedding_dim, mode);
    const auto kind = MaskedOptimizer(optimizer);
    const auto check_state = [&](const Tensor& t, int64_t size, const char* name) {
      check_dtype(t, ScalarType::Float, name);
      RS_CHECK_VALUE(t.is_contiguous() && t.numel() == size, name, " must be contiguous with ",
                     size, " elements; got shape ", shape_text(t));
    };
    if (kind == MaskedOptimizer::kRowAdagrad) check_state(state, num_embeddings, "state");
    if (kind == MaskedOptimizer::kAdam) {
      RS_CHECK_VALUE(step >= 1, "step must be at least 1; got ", step);
      check_state(state, values.numel(), "state");
      check_state(second_state, values.numel(), "second_state");
    }
    SortedLookups<T> lookups(bags, table, grad_output, argmax, mode, scale_grad_by_freq);
    MaskedSegments<T>& job = lookups.job();
    job.update_values = mutable_data<T>(values);
    job.optimizer = kind;
    job.state = kind == MaskedOptimizer::kSgd ? nullptr : mutable_data<float>(state);
    job.second_state = kind == MaskedOptimizer::kAdam ? mutable_data<float>(second_state) : nullptr;
    job.lr = float(lr);
    job.beta1 = float(beta1);
    job.beta2 = float(beta2);
    job.rest1 = float(1.0 - beta1);
    job.rest2 = float(1.0 - beta2);
    job.eps = float(eps);
    job.correction1 = float(1.0 - std::pow(beta1, double(step)));
    job.correction2 = float(std::sqrt(1.0 - std::pow(beta2, double(step))));
    lookups.run([&](int64_t begin, int64_t end) {
      return masked_grad_kernels<T>().apply(table, job, begin, end);
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(recsparse, CPU, m) {
  m.impl("masked_embedding_bag_grad_values", TORCH_BOX(&grad_values));
  m.impl("masked_embedding_bag_grad_touched", TORCH_BOX(&grad_touched));
  m.impl("masked_embedding_bag_update", TORCH_BOX(&update));
}

}  // namespace recsparse
