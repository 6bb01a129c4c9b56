// Launches of the gradients that the linear ops and the losses of fixed fan-in layers share.
#include "fan_in_launch.h"

namespace recsparse {
namespace {

constexpr int64_t kWantedSums = 2048;  // blocks that sum by input: an input's entries are cut into
constexpr int64_t kMinPart = 256;      // parts, so that there are as many, but not into short ones

template <class T, int kM, int kN>
void weight_by_group(const Stream& stream, const FanInTiles<T>& tiles, const FanInChunk& chunk,
                     const T* grad, const Ending<T>& ending) {
  const int64_t across = ceil_div(tiles.layer().fan_in, 32 * kN);
  const int64_t pitch = kStep<T> + kPad<T>;
  launch(stream, "fan_in_grad_weight", group_grad_weight_kernel<T, kM, kN>, {chunk.tiles * across},
         {kGroupThreads}, 2 * (16 * kM + 32 * kN) * pitch * int64_t(sizeof(T)), tiles.layer(), grad,
         chunk.first_label, chunk.first_tile, int(across), ending);
}

// Lanes that hold the rows of the batch, 16 bytes each.
template <class T>
int row_lanes(int64_t pitch) {
  return int(std::min<int64_t>(
      kWarp, std::bit_ceil(uint64_t(std::max<int64_t>(1, pitch / kPackOf16Bytes<T>)))));
}

}  // namespace

template <class T>
void end_gradients(const Stream& stream, const FanInTiles<T>& tiles, const FanInChunk& chunk,
                   const T* grad, const Ending<T>& weight, const std::optional<Ending<T>>& bias) {
  const FanInLayer<T>& layer = tiles.layer();
  if (layer.fan_in > 0 && tiles.grouped()) {
    const bool few = layer.fan_in <= 64;
    if (tiles.m() == 1) {
      few ? weight_by_group<T, 1, 2>(stream, tiles, chunk, grad, weight)
          : weight_by_group<T, 1, 4>(stream, tiles, chunk, grad, weight);
    } else {
      few ? weight_by_group<T, 2, 2>(stream, tiles, chunk, grad, weight)
          : weight_by_group<T, 2, 4>(stream, tiles, chunk, grad, weight);
    }
  } else if (layer.fan_in > 0) {
    const int lanes = row_lanes<T>(layer.pitch);
    const int64_t tasks = chunk.labels * ceil_div(layer.fan_in, kEntries);
    launch(stream, "fan_in_grad_weight", label_grad_weight_kernel<T>,
           {ceil_div(tasks * lanes, kLabelThreads)}, {kLabelThreads}, 0, layer, grad,
           chunk.first_label, chunk.labels, lanes, weight);
  }
  if (bias)
    launch(stream, "fan_in_grad_bias", grad_bias_kernel<T>,
           {ceil_div(chunk.labels, kLabelThreads / kWarp)}, {kLabelThreads}, 0, grad, layer.pitch,
           chunk.first_label, chunk.labels, *bias);
}

template <class T>
InputGradient<T>::InputGradient(const Stream& stream, const FanInTiles<T>& tiles,
                                const std::vector<FanInChunk>& chunks, int64_t budget)
    : stream_(stream), tiles_(tiles), partial_(stream, 0) {
  const FanInLayer<T>& layer = tiles.layer();
  int64_t most_tiles = 1, most_labels = 0;
  for (const FanInChunk& chunk : chunks) {
    most_tiles = std::max(most_tiles, chunk.tiles);
    most_labels = std::max(most_labels, chunk.labels);
  }
  const int64_t set = std::max<int64_t>(1, layer.in_features * layer.pitch * 4);
  const int64_t affordable = 1 + budget / set;
  const auto bytes = [&](int64_t slice) {
    const int64_t stage =
        tiles.m() == 1 ? GroupInputStage<T, 1>::bytes(slice) : GroupInputStage<T, 2>::bytes(slice);
    return layer.in_features * slice * 4 + 2 * stage;
  };
  if (tiles.grouped()) {
    slice_ = 64;
    while (slice_ >= 8 &&
           (bytes(slice_) > stream.max_shared_bytes() || (slice_ > 8 && slice_ / 2 >= layer.pitch)))
      slice_ /= 2;
    if (slice_ < 8) slice_ = 0;
  }
  if (slice_) {
    const int64_t each = std::clamp<int64_t>(stream.max_shared_bytes() / bytes(slice_), 1, 4);
    const int64_t slices = std::max<int64_t>(1, ceil_div(layer.pitch, slice_));
    slabs_ = std::clamp<int64_t>(stream.multiprocessors() * each / slices, 1,
                                 std::min(affordable, most_tiles));
  } else {
    const int64_t sums = std::max<int64_t>(
        1,
        layer.in_features * ceil_div(layer.pitch, row_lanes<T>(layer.pitch) * kPackOf16Bytes<T>));
    const int64_t rows = ceil_div(most_labels, layer.group_size) + 1, entries = rows * layer.fan_in;
    const int64_t length = entries / std::max<int64_t>(1, layer.in_features);
    slabs_ = std::clamp<int64_t>(std::min(kWantedSums / sums, length / kMinPart), 1,
                                 std::min<int64_t>(affordable, 8));
    keys_.emplace(stream, entries);
    sorted_keys_.emplace(stream, entries);
    positions_.emplace(stream, entries);
    sorted_positions_.emplace(stream, entries);
  }
  partial_ = Scratch<float>(stream, slabs_ * layer.in_features * layer.pitch);
}

template <class T>
void InputGradient<T>::add(const FanInChunk& chunk, const T* grad, const T* weight) {
  FanInLayer<T> layer = tiles_.layer();
  const int64_t first_weight = weight ? chunk.first_label : 0;
  if (weight) layer.weight = weight;
  if (layer.in_features * layer.pitch == 0) return;
  if (slice_) {
    const int64_t slices = ceil_div(layer.pitch, slice_);
    const auto run = [&](auto kernel, int64_t stage) {
      launch(stream_, "fan_in_grad_input", kernel, {slabs_ * slices}, {slice_ / 8 * kWarp},
             layer.in_features * slice_ * 4 + 2 * stage, layer, first_weight, grad,
             chunk.first_label, chunk.first_tile, chunk.tiles, int(slices), int(slice_), fresh_,
             partial_.get());
    };
    if (tiles_.m() == 1) {
      run(group_grad_input_kernel<T, 1>, GroupInputStage<T, 1>::bytes(slice_));
    } else {
      run(group_grad_input_kernel<T, 2>, GroupInputStage<T, 2>::bytes(slice_));
    }
  } else {
    const int64_t row = chunk.first_label / layer.group_size;
    const int64_t rows = ceil_div(chunk.first_label + chunk.labels, layer.group_size) - row;
    const int64_t entries = rows * layer.fan_in;
    launch(stream_, "fan_in_entry_keys", entry_keys_kernel<T>, {ceil_div(entries, kLabelThreads)},
           {kLabelThreads}, 0, layer, row * layer.fan_in, entries, keys_->get(), positions_->get());
    sort_pairs(stream_, keys_->get(), sorted_keys_->get(), positions_->get(),
               sorted_positions_->get(), entries, std::bit_width(uint64_t(layer.in_features)));
    const int lanes = row_lanes<T>(layer.pitch);
    const int64_t across = ceil_div(layer.pitch, lanes * kPackOf16Bytes<T>);
    launch(stream_, "fan_in_sum_by_input", sum_by_input_kernel<T>,
           {layer.in_features * slabs_ * across}, {kSumThreads}, 0, layer, first_weight, grad,
           chunk.first_label, chunk.labels, static_cast<const uint32_t*>(sorted_keys_->get()),
           static_cast<const int32_t*>(sorted_positions_->get()), entries, slabs_, lanes,
           int(across), fresh_, partial_.get());
  }
  fresh_ = false;
}

template <class T>
void InputGradient<T>::write(const Tensor& grad_input, const float* grad_loss, float factor) const {
  const FanInLayer<T>& layer = tiles_.layer();
  launch(stream_, "fan_in_reduce_slabs", reduce_slabs_kernel<T>,
         {ceil_div(layer.batch, kTransposeTile) * ceil_div(layer.in_features, kTransposeTile)},
         {kTransposeTile, kTransposeRows}, 0, static_cast<const float*>(partial_.get()),
         fresh_ ? int64_t(0) : slabs_, layer.in_features, layer.pitch, layer.batch, grad_loss,
         factor, mutable_data<T>(stream_, grad_input));
}

#define RS_INSTANTIATE(T)                                                                          \
  template void end_gradients<T>(const Stream&, const FanInTiles<T>&, const FanInChunk&, const T*, \
                                 const Ending<T>&, const std::optional<Ending<T>>&);               \
  template class InputGradient<T>;
RS_INSTANTIATE(float)
RS_INSTANTIATE(bf16)
RS_INSTANTIATE(f16)
#undef RS_INSTANTIATE

}  // namespace recsparse
