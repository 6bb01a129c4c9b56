// Launches of the fused pass of fixed fan-in layers.
#include "fan_in_fused.h"

namespace recsparse {
namespace {

template <class T, int kM, int kN>
void launch_fused(const Stream& stream, const FanInTiles<T>& tiles, const FusedSizes& size,
                  const FanInChunk& chunk, const LossTerms<T>& terms, const Endings<T>& endings,
                  T* old) {
  launch(stream, "fan_in_fused", group_fused_kernel<T, kM, kN>, {chunk.tiles}, {kGroupThreads},
         size.places(16 * kM).end, tiles.layer(), size, terms, chunk.first_tile, endings.weight,
         endings.bias ? *endings.bias : Ending<T>(), endings.bias.has_value(), old);
}

}  // namespace

template <class T>
void fused_pass(const Stream& stream, const FanInTiles<T>& tiles, const FusedSizes& size,
                const FanInChunk& chunk, const LossTerms<T>& terms, const Endings<T>& endings,
                T* old) {
  const auto run = [&](auto launch_it) {
    launch_it(stream, tiles, size, chunk, terms, endings, old);
  };
  if (tiles.m() == 1) {
    tiles.n() == 2 ? run(launch_fused<T, 1, 2>) : run(launch_fused<T, 1, 4>);
  } else {
    tiles.n() == 2 ? run(launch_fused<T, 2, 2>) : run(launch_fused<T, 2, 4>);
  }
}

#define RS_INSTANTIATE(T)                                                             \
  template void fused_pass<T>(const Stream&, const FanInTiles<T>&, const FusedSizes&, \
                              const FanInChunk&, const LossTerms<T>&, const Endings<T>&, T*);
RS_INSTANTIATE(bf16)
RS_INSTANTIATE(f16)
#undef RS_INSTANTIATE

}  // namespace recsparse
