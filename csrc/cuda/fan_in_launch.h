// Fixed fan-in on CUDA, host side: the transposed input, how labels are cut into tiles and chunks,
// and the launches that several ops share.
#pragma once

#include <algorithm>
#include <bit>
#include <optional>
#include <vector>

#include "../fan_in.h"
#include "fan_in_grad_kernels.cuh"
#include "fan_in_tiles_kernels.cuh"
#include "indices.h"
#include "sort.h"

namespace recsparse {

inline MaybeTensor contiguous_or_none(const MaybeTensor& t) {
  return t ? MaybeTensor(torch::stable::contiguous(*t)) : MaybeTensor();
}
inline int64_t bytes_of(const Tensor& t) { return t.numel() * int64_t(t.element_size()); }

// Scratch of a chunk of labels: no more than inputs and outputs hold, and little enough to stay in
// the GPU's L2 between the kernels of a chunk.
constexpr int64_t kMinScratchBytes = 1 << 16, kMaxScratchBytes = 1 << 25;
constexpr int64_t kMaxSortedEntries =
    1 << 22;  // indices sorted at once: by 10 or so bits, in about as long as a chunk takes

template <class T>
int64_t padded_rows(int64_t batch) {
  return ceil_div(batch, kPackOf16Bytes<T>) * kPackOf16Bytes<T>;
}

// Columns [first, first + columns) of t [rows, n] as [columns, pitch].
template <class T>
void transpose(const Stream& stream, const Tensor& t, int64_t first, int64_t columns, T* out) {
  const int64_t rows = t.size(0), pitch = padded_rows<T>(rows);
  launch(stream, "transpose", transpose_kernel<T>,
         {ceil_div(pitch, kTransposeTile) * ceil_div(columns, kTransposeTile)},
         {kTransposeTile, kTransposeRows}, 0, data<T>(stream, t), rows, t.size(1), first, columns,
         out, pitch);
}

struct FanInChunk {
  int64_t first_tile, tiles, first_label, labels;
};

// A layer and a batch, and the tiles they are cut into. The tensors given must outlive it.
template <class T>
class FanInTiles {
 public:
  FanInTiles(const Stream& stream, const FanInSizes& size, const Tensor* input,
             const Tensor* weight, const Tensor& indices, const Tensor* bias)
      : stream_(stream),
        grouped_(size.group_size >= kGroupedFrom),
        x_(stream, input ? size.in_features * padded_rows<T>(size.batch) : 0) {
    constexpr int64_t kVector = kPackOf16Bytes<T>;
    layer_.x = x_.get();
    layer_.weight = weight ? data<T>(stream, *weight) : nullptr;
    layer_.bias = bias ? data<T>(stream, *bias) : nullptr;
    layer_.narrow = nullptr;
    layer_.wide = nullptr;
    if (indices.scalar_type() == ScalarType::Short) {
      layer_.narrow = data<int16_t>(stream, indices);
    } else {
      layer_.wide = data<int32_t>(stream, indices);
    }
    layer_.batch = size.batch;
    layer_.pitch = padded_rows<T>(size.batch);
    layer_.in_features = size.in_features;
    layer_.out_features = size.out_features;
    layer_.fan_in = size.fan_in;
    layer_.group_size = size.group_size;
    layer_.vectors = size.fan_in % 8 == 0 && is_aligned(indices.const_data_ptr(), 16) &&
                     (!weight || is_aligned(weight->const_data_ptr(), 16));
    if (grouped_) {
      m_ = size.group_size <= 16 ? 1 : 2;
      n_ = size.batch <= 64 ? 2 : 4;
      layer_.labels_of_tile = 16 * m_;
      layer_.tiles_of_group = ceil_div(size.group_size, layer_.labels_of_tile);
      across_ = ceil_div(size.batch, 32 * n_);
    } else {
      lanes_ = int(std::min<int64_t>(
          8, std::bit_ceil(uint64_t(std::max<int64_t>(1, layer_.pitch / kVector)))));
      // of a block: the result, which takes most where one lane holds a label's rows, and
      // block_sum's array
      const int64_t left = stream.max_shared_bytes() - result_bytes(1) - 1024;
      int lanes = lanes_;
      while (lanes > 1 && slice_bytes(lanes) > left) lanes /= 2;
      // loading a slice must pay, and a slice too narrow would read the weights too often
      blocks_ = 2 * stream.multiprocessors();
      in_shared_ = input && slice_bytes(lanes) <= left && 2 * lanes >= lanes_ &&
                   size.out_features * size.fan_in >= blocks_ * size.in_features;
      if (in_shared_) lanes_ = lanes;
      layer_.labels_of_tile = kLabelThreads / lanes_;
      layer_.tiles_of_group = 1;
      across_ = ceil_div(size.batch, lanes_ * kVector);
    }
    if (input) transpose<T>(stream, *input, 0, size.in_features, x_.get());
  }
  FanInTiles(const FanInTiles&) = delete;

  const FanInLayer<T>& layer() const { return layer_; }
  bool grouped() const { return grouped_; }
  int m() const { return m_; }
  int n() const { return n_; }
  int64_t across() const { return across_; }
  int64_t count() const { return layer_.out_features ? tile_of(layer_.out_features - 1) + 1 : 0; }

  // All labels in chunks of whole groups (by group) or tiles (by label): at most `labels`, where a
  // tile and a group have no more.
  std::vector<FanInChunk> chunks(int64_t labels) const {
    const int64_t unit = grouped_ ? layer_.tiles_of_group : 1;
    const int64_t unit_labels = grouped_ ? layer_.group_size : layer_.labels_of_tile;
    const int64_t tiles = std::max<int64_t>(1, labels / unit_labels) * unit;
    std::vector<FanInChunk> all;
    for (int64_t first = 0; first < count(); first += tiles) {
      const int64_t here = std::min(tiles, count() - first);
      const int64_t begin = first / unit * unit_labels;
      const int64_t end = std::min(begin + ceil_div(here, unit) * unit_labels, layer_.out_features);
      all.push_back({first, here, begin, end - begin});
    }
    return all;
  }
  // Chunks whose gradient to the logits, [labels, pitch], stays within a budget of bytes; with
  // `more` elements of T a label.
  std::vector<FanInChunk> chunks_within(int64_t budget, int64_t more = 0) const {
    budget = std::clamp(budget, kMinScratchBytes, kMaxScratchBytes);
    const int64_t labels =
        budget / std::max<int64_t>(1, (layer_.pitch + more) * int64_t(sizeof(T)));
    // 16 bytes for each entry that is sorted
    const int64_t entries = std::min(kMaxSortedEntries, budget / 16);
    return chunks(
        std::min(labels, entries / std::max<int64_t>(1, layer_.fan_in) * layer_.group_size));
  }
  static int64_t most_labels(const std::vector<FanInChunk>& chunks) {
    int64_t most = 0;
    for (const FanInChunk& chunk : chunks) most = std::max(most, chunk.labels);
    return most;
  }

  template <class Epilogue>
  void logits(const char* name, int64_t first_tile, int64_t tiles, const Epilogue& epilogue) const {
    if (layer_.batch == 0) return;
    if (grouped_) {
      if (m_ == 1) {
        n_ == 2 ? by_group<1, 2>(name, first_tile, tiles, epilogue)
                : by_group<1, 4>(name, first_tile, tiles, epilogue);
      } else {
        n_ == 2 ? by_group<2, 2>(name, first_tile, tiles, epilogue)
                : by_group<2, 4>(name, first_tile, tiles, epilogue);
      }
    } else if (in_shared_) {
      const int64_t each = std::min(tiles, ceil_div(blocks_, across_));
      by_label(label_logits_kernel<T, true, Epilogue>, name, first_tile, tiles, each,
               result_bytes(lanes_) + slice_bytes(lanes_), epilogue);
    } else {
      const int64_t each = std::min<int64_t>(tiles, (int64_t(1) << 30) / across_);
      by_label(label_logits_kernel<T, false, Epilogue>, name, first_tile, tiles, each,
               result_bytes(lanes_), epilogue);
    }
  }

 private:
  int64_t slice_bytes(int lanes) const { return layer_.in_features * lanes * 16; }
  static int64_t result_bytes(int lanes) {
    const int64_t pitch = lanes * kPackOf16Bytes<T> + 1;
    return ceil_div(kLabelThreads / lanes * pitch * 4, 128) * 128;
  }
  int64_t tile_of(int64_t label) const {
    if (!grouped_) return label / layer_.labels_of_tile;
    return label / layer_.group_size * layer_.tiles_of_group +
           label % layer_.group_size / layer_.labels_of_tile;
  }
  template <int kM, int kN, class Epilogue>
  void by_group(const char* name, int64_t first_tile, int64_t tiles,
                const Epilogue& epilogue) const {
    launch(stream_, name, group_logits_kernel<T, kM, kN, Epilogue>, {tiles * across_},
           {kGroupThreads}, GroupTile<T, kM, kN>::kBytes, layer_, first_tile, int(across_),
           epilogue);
  }
  template <class Kernel, class Epilogue>
  void by_label(Kernel kernel, const char* name, int64_t first_tile, int64_t tiles, int64_t each,
                int64_t shared_bytes, const Epilogue& epilogue) const {
    launch(stream_, name, kernel, {each * across_}, {kLabelThreads}, shared_bytes, layer_,
           first_tile, tiles, lanes_, int(across_), epilogue);
  }

  const Stream& stream_;
  const bool grouped_;
  Scratch<T> x_;
  FanInLayer<T> layer_;
  int m_ = 0, n_ = 0, lanes_ = 1;
  int64_t across_ = 0, blocks_ = 0;
  bool in_shared_ = false;
};

// The gradient of the logits of a chunk, [labels, pitch], to that of weight and bias.
template <class T>
void end_gradients(const Stream& stream, const FanInTiles<T>& tiles, const FanInChunk& chunk,
                   const T* grad, const Ending<T>& weight, const std::optional<Ending<T>>& bias);

// Sums the gradient to the input, chunk by chunk.
template <class T>
class InputGradient {
 public:
  // At most `budget` bytes for sums beyond one set of them.
  InputGradient(const Stream& stream, const FanInTiles<T>& tiles,
                const std::vector<FanInChunk>& chunks, int64_t budget);
  // `weight` [labels of the chunk, F] stands in for the layer's, if it is given.
  void add(const FanInChunk& chunk, const T* grad, const T* weight = nullptr);
  void write(const Tensor& grad_input, const float* grad_loss, float factor) const;

 private:
  const Stream& stream_;
  const FanInTiles<T>& tiles_;
  int64_t slice_ = 0, slabs_ = 1;  // slice 0: entries are sorted
  bool fresh_ = true;
  Scratch<float> partial_;
  std::optional<Scratch<uint32_t>> keys_, sorted_keys_;
  std::optional<Scratch<int32_t>> positions_, sorted_positions_;
};

}  // namespace recsparse
