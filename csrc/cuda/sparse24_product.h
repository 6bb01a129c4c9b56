// How the depth of a product is split between blocks, for the launches of the 2:4 products.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>

#include "launch.h"
#include "sparse24_tiles.cuh"

namespace recsparse {

// The steps of the depth in parts, so that few tiles still fill the GPU.
struct Split {
  int64_t parts, steps_each;
};

// `least`: steps of a part that its start-up is worth. `most`: parts that memory is given for.
inline Split split_depth(const Stream& stream, int64_t tiles, int64_t steps, int64_t least,
                         int64_t most) {
  const int64_t wanted = 2 * int64_t(stream.multiprocessors()) / std::max<int64_t>(1, tiles);
  const int64_t parts =
      std::max<int64_t>(1, std::min({wanted, steps / least, most, int64_t(kMaxGridYZ)}));
  const int64_t each = std::max<int64_t>(1, ceil_div(steps, parts));
  return {std::max<int64_t>(1, ceil_div(steps, each)), each};
}

// Parts of `count` float32 sums that take no more bytes than the operands and the result, of so
// many elements of T.
template <class T>
int64_t most_parts(int64_t elements, int64_t count) {
  return elements * int64_t(sizeof(T)) / std::max<int64_t>(1, 4 * count);
}

// Runs launch_product(parts), which writes the sums of each part or, if there is one, the result;
// then adds the parts up.
template <class T, class F>
void with_parts(const Stream& stream, const char* name, const Split& split, int64_t count,
                LinearOutput<T> to, F launch_product) {
  if (split.parts == 1) return launch_product(Parts{nullptr, count});
  const Scratch<float> sums(stream, split.parts * count);
  const Parts parts = {sums.get(), count};
  launch_product(parts);
  launch(stream, name, sum_parts_kernel<T>, {ceil_div(count, kSumThreads)}, {kSumThreads}, 0, parts,
         split.parts, to);
}

// output [rows, columns], contiguous, with nothing added to the sums.
template <class T>
LinearOutput<T> plain_output(T* output, int64_t rows, int64_t columns) {
  return {output,
          nullptr,
          nullptr,
          rows,
          columns,
          Activation::kNone,
          matrix(output, rows, columns).width,
          {nullptr, rows * columns}};
}

}  // namespace recsparse
