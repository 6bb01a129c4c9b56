// How the fixed fan-in ops cut their work on the CPU.
//
//   panels   the batch, `lanes` rows each; transposed to [I][lanes] in float32, which stays in L2
//   chunks   labels whose indices and float32 weights stay in L2 while all panels meet them
//   tiles    labels whose [labels][lanes] logits or gradients stay in L1
//   slabs    runs of chunks with a panel gradient of their own; added up in order at the end
//
// All of it depends on sizes and instruction level alone, never on the number of threads, and so
// does every sum.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstring>
#include <optional>

#include "../fan_in.h"
#include "dispatch.h"
#include "fan_in_kernels.h"

namespace recsparse {

constexpr int64_t kFanInTile = 64;                // 8 KiB of logits at 32 lanes
constexpr int64_t kFanInChunkBytes = 128 * 1024;  // beside a panel in 1 MiB of L2
constexpr int64_t kFanInPanelBytes = 512 * 1024;  // above this a panel is one vector wide
constexpr int64_t kFanInLogitLanes = 16;          // one cache line for each input
constexpr int64_t kFanInSlabs = 32;
constexpr int64_t kFanInFewSlabs = 8;
constexpr int64_t kFanInSlabLabels =
    512;  // enough work to hide zeroing and adding a panel gradient

struct FanInPlan {
  FanInSizes size;
  int64_t lanes, panels, chunk;

  // For gradients: whole vectors, and two of them halve the sums across lanes.
  FanInPlan(const FanInSizes& sizes, int64_t vector_lanes) : size(sizes), lanes(vector_lanes) {
    if (size.batch > lanes && size.in_features * 2 * lanes * 4 <= kFanInPanelBytes) lanes *= 2;
    cut();
  }

  // For logits alone, where loads of x are the limit: as narrow as the batch, and never wider than
  // a line, since half of a panel of lines is still in L1 when it is wanted again. Labels that
  // share their inputs share those loads; there the weights are the limit, and two vectors share
  // theirs.
  static FanInPlan for_logits(const FanInSizes& sizes, int64_t vector_lanes) {
    FanInPlan plan(sizes);
    const int64_t widest =
        sizes.group_size > 1 ? std::max(kFanInLogitLanes, 2 * vector_lanes) : kFanInLogitLanes;
    plan.lanes = sizes.batch > 1 ? 4 : 1;
    while (plan.lanes < std::min(sizes.batch, widest)) plan.lanes *= 2;
    plan.cut();
    return plan;
  }

  int64_t chunks() const { return (size.out_features + chunk - 1) / chunk; }
  int64_t panel_elements() const { return size.in_features * lanes; }
  int64_t input_elements() const { return panels * panel_elements(); }
  int64_t rows_of_panel(int64_t panel) const { return std::min(lanes, size.batch - panel * lanes); }
  int64_t chunk_end(int64_t begin) const { return std::min(begin + chunk, size.out_features); }

  // Runs of chunks with results of their own, of `bytes_each`, which stay below `budget_bytes`:
  // what the op's inputs and outputs take.
  int64_t slabs(int64_t budget_bytes, int64_t bytes_each) const {
    const int64_t affordable = budget_bytes / std::max<int64_t>(bytes_each, 1);
    const int64_t useful = size.out_features / kFanInSlabLabels;
    const int64_t most = std::min({affordable, useful, kFanInSlabs, chunks()});
    int64_t count = 1;  // a power of two, which a few threads share evenly
    while (2 * count <= most) count *= 2;
    return count;
  }
  // Panel gradients: an eighth of what the layer takes, or what a few threads need and it takes.
  int64_t slabs(int64_t layer_bytes) const {
    const int64_t each = 4 * input_elements();
    return slabs(std::min(layer_bytes, std::max(layer_bytes / 8, kFanInFewSlabs * each)), each);
  }

 private:
  explicit FanInPlan(const FanInSizes& sizes) : size(sizes) {}

  void cut() {
    panels = (size.batch + lanes - 1) / lanes;
    const int64_t fitting = kFanInChunkBytes / std::max<int64_t>(8 * size.fan_in, 1);
    const int64_t sharing = size.out_features / 16;  // leave some for other threads
    chunk = std::max<int64_t>(std::min(fitting, sharing) / kFanInTile, 1) * kFanInTile;
  }
};

inline int64_t bytes_of(const Tensor& t) { return t.numel() * int64_t(t.element_size()); }

// The input, transposed: [panels][I][lanes].
template <class T>
Scratch<float> pack_panels(const FanInPlan& plan, const Tensor& input) {
  Scratch<float> panels(plan.input_elements());
  const int64_t columns = plan.size.in_features, blocks = (columns + 63) / 64;
  const T* source = data<T>(input);
  float* target = panels.get();
  const auto& kernels = fan_in_kernels<T>();
  parallel_for(plan.panels * blocks, 8, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t panel = i / blocks, first = i % blocks * 64;
      kernels.pack(source + panel * plan.lanes * columns + first, columns,
                   plan.rows_of_panel(panel), std::min<int64_t>(64, columns - first), plan.lanes,
                   target + panel * plan.panel_elements() + first * plan.lanes);
    }
  });
  return panels;
}

// target [B, I] = the sum of `slabs` panel gradients, in order; uses the first as the accumulator.
template <class T>
void unpack_slabs(const FanInPlan& plan, float* partial, int64_t slabs, const Tensor& output) {
  const int64_t columns = plan.size.in_features, blocks = (columns + 63) / 64;
  T* target = mutable_data<T>(output);
  const auto& kernels = fan_in_kernels<T>();
  parallel_for(plan.panels * blocks, 2, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t panel = i / blocks, first = i % blocks * 64;
      const int64_t width = std::min<int64_t>(64, columns - first);
      float* sum = partial + panel * plan.panel_elements() + first * plan.lanes;
      for (int64_t slab = 1; slab < slabs; ++slab)
        kernels.add(sum + slab * plan.input_elements(), width * plan.lanes, sum);
      kernels.unpack(sum, plan.rows_of_panel(panel), width, plan.lanes,
                     target + panel * plan.lanes * columns + first, columns);
    }
  });
}

// Index storage, int16 or int32.
struct FanInIndices {
  const void* data;
  bool narrow;

  explicit FanInIndices(const Tensor& indices)
      : data(indices.const_data_ptr()), narrow(indices.scalar_type() == ScalarType::Short) {}

  const void* at(int64_t i) const {
    return narrow ? static_cast<const void*>(static_cast<const int16_t*>(data) + i)
                  : static_cast<const void*>(static_cast<const int32_t*>(data) + i);
  }
  int64_t bytes_each() const { return narrow ? sizeof(int16_t) : sizeof(int32_t); }
  int64_t column(int64_t i) const {
    return narrow ? static_cast<const int16_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }

  // whether indices [first, first + count) are in [0, limit)
  template <class T>
  bool in_range(const FanInKernels<T>& kernels, int64_t first, int64_t count, int64_t limit) const {
    if (narrow) return kernels.in_range16(static_cast<const int16_t*>(at(first)), count, limit);
    return kernels.in_range32(static_cast<const int32_t*>(at(first)), count, limit);
  }

  template <class T>
  void dots(const FanInKernels<T>& kernels, const float* input, const T* weight, const T* bias,
            const int64_t* labels, int64_t count, const FanInSizes& size, float* out) const {
    if (narrow)
      kernels.dots16(input, weight, static_cast<const int16_t*>(data), bias, labels, count,
                     size.fan_in, size.group_size, out);
    else
      kernels.dots32(input, weight, static_cast<const int32_t*>(data), bias, labels, count,
                     size.fan_in, size.group_size, out);
  }
};

inline void raise_index_range(int64_t in_features) {
  RS_CHECK_INDEX(false, "indices must be in [0, ", in_features, "), the columns of input");
}

// Before an op that writes in place; other ops find out chunk by chunk, as they read the indices.
template <class T>
void check_index_range(const FanInSizes& size, const Tensor& indices) {
  constexpr int64_t kBlock = 4096;
  const FanInIndices source(indices);
  const int64_t count = size.rows * size.fan_in;
  std::atomic<bool> valid{true};
  parallel_for((count + kBlock - 1) / kBlock, kIndicesPerCheck / kBlock,
               [&](int64_t begin, int64_t end) {
                 const int64_t first = begin * kBlock, last = std::min(end * kBlock, count);
                 if (!source.in_range(fan_in_kernels<T>(), first, last - first, size.in_features))
                   valid = false;
               });
  if (!valid) raise_index_range(size.in_features);
}

// A chunk of labels, its indices checked and its weights in float32. One for each thread, filled
// again for each chunk.
template <class T>
class FanInChunk {
 public:
  FanInChunk(const FanInPlan& plan, const Tensor& indices, const T* weight, const T* bias)
      : plan_(plan),
        indices_(indices),
        weight_(weight),
        bias_(bias),
        wide_weight_(std::is_same_v<T, float> || !weight ? 0 : plan.chunk * plan.size.fan_in),
        wide_bias_(bias ? plan.chunk : 0) {}

  // Labels [begin, end); false when an index is out of range.
  bool load(int64_t begin, int64_t end) {
    const auto& kernels = fan_in_kernels<T>();
    const FanInSizes& size = plan_.size;
    const int64_t row = begin / size.group_size, row_end = (end - 1) / size.group_size + 1;
    if (!indices_.in_range(kernels, row * size.fan_in, (row_end - row) * size.fan_in,
                           size.in_features))
      return false;
    begin_ = begin;
    if (weight_) {
      const T* weight = weight_ + begin * size.fan_in;
      if constexpr (std::is_same_v<T, float>) {
        current_ = weight;
      } else {
        kernels.widen(weight, (end - begin) * size.fan_in, wide_weight_.get());
        current_ = wide_weight_.get();
      }
    }
    if (bias_) kernels.widen(bias_ + begin, end - begin, wide_bias_.get());
    return true;
  }

  // fetch_next: the first pass over this chunk also fetches the next one into the cache.
  FanInTile tile(int64_t label, int64_t labels, bool fetch_next = false) {
    const FanInSizes& size = plan_.size;
    const int64_t at = label - begin_;
    FanInTile tile = {current_ ? current_ + at * size.fan_in : nullptr,
                      bias_ ? wide_bias_.get() + at : nullptr,
                      indices_.at(begin_ / size.group_size * size.fan_in),
                      indices_.narrow,
                      begin_ % size.group_size + at,
                      labels,
                      size.fan_in,
                      size.group_size,
                      plan_.lanes,
                      {}};
    if (fetch_next && label + plan_.chunk < size.out_features) {
      const int64_t next = label + plan_.chunk, row_bytes = size.fan_in * indices_.bytes_each();
      tile.ahead[0] = {reinterpret_cast<const char*>(weight_ + next * size.fan_in),
                       size.fan_in * int64_t(sizeof(T))};
      tile.ahead[1] = {static_cast<const char*>(indices_.data) + next * row_bytes / size.group_size,
                       row_bytes / size.group_size};
    }
    return tile;
  }

  // The float32 weights and biases of the chunk, to be changed in place; the weights are the
  // layer's own where that holds float32.
  float* weight() { return const_cast<float*>(current_); }
  float* bias() { return wide_bias_.get(); }

 private:
  const FanInPlan& plan_;
  FanInIndices indices_;
  const T* weight_;
  const T* bias_;
  const float* current_ = nullptr;
  int64_t begin_ = 0;
  Scratch<float> wide_weight_, wide_bias_;
};

// The gradient of a chunk of a tensor, in float32: summed in its own place where it holds float32,
// else in scratch of the size of a chunk.
template <class T>
class FanInChunkSums {
 public:
  FanInChunkSums(T* target, int64_t elements)
      : target_(target), wide_(std::is_same_v<T, float> && target ? 0 : elements) {}

  // of the elements from `first` on
  float* at(int64_t first) {
    if constexpr (std::is_same_v<T, float>) {
      if (target_) return target_ + first;
    }
    return wide_.get();
  }
  void write(int64_t first, int64_t count) {
    if constexpr (!std::is_same_v<T, float>) {
      if (target_) fan_in_kernels<T>().narrow(wide_.get(), count, target_ + first);
    }
  }

 private:
  T* const target_;  // null: the sums are for the caller alone
  Scratch<float> wide_;
};

// body(first label, labels) over [begin, end), tile by tile.
template <class F>
void for_each_tile(int64_t begin, int64_t end, const F& body) {
  for (int64_t label = begin; label < end; label += kFanInTile)
    body(label, std::min(kFanInTile, end - label));
}

template <class T>
const T* data_or_null(const std::optional<Tensor>& t) {
  return t ? data<T>(*t) : nullptr;
}

inline std::optional<Tensor> contiguous_or_none(const std::optional<Tensor>& t) {
  if (!t) return std::nullopt;
  return torch::stable::contiguous(*t);
}

}  // namespace recsparse
