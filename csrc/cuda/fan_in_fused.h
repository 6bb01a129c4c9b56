// The fused pass of a layer whose labels share inputs (fan_in_fused_kernels.cuh), host side.
#pragma once

#include <optional>

#include "fan_in_fused_kernels.cuh"
#include "fan_in_launch.h"
#include "fan_in_step.h"

namespace recsparse {

// The sizes of its blocks; none where there is no such pass, or two blocks would not fit side by
// side: one alone would wait for its own loads.
template <class T>
std::optional<FusedSizes> fused_sizes(const Stream& stream, const FanInTiles<T>& tiles) {
  const FanInLayer<T>& layer = tiles.layer();
  if (sizeof(T) != 2 || !tiles.grouped() || layer.fan_in == 0 || layer.batch == 0)
    return std::nullopt;
  // a block also has the system's part and block_sum's array
  const int64_t most = stream.max_shared_bytes() / 2 - 1024, part = 8 * tiles.n();
  const int64_t rows = ceil_div(layer.pitch, part) * part;
  const int64_t inputs = ceil_div(layer.fan_in, part) * part;
  if (rows > most || inputs > most || rows * inputs > most) return std::nullopt;
  const FusedSizes size = {int(rows), int(inputs), int(std::bit_width(uint64_t(rows / 8 - 1))),
                           int(std::bit_width(uint64_t(inputs / 8 - 1)))};
  return size.places(16 * tiles.m()).end <= most ? std::optional(size) : std::nullopt;
}

// A chunk of labels. `old` [labels of the chunk, F] takes the weights as they were; or null.
template <class T>
void fused_pass(const Stream& stream, const FanInTiles<T>& tiles, const FusedSizes& size,
                const FanInChunk& chunk, const LossTerms<T>& terms, const Endings<T>& endings,
                T* old);

}  // namespace recsparse
