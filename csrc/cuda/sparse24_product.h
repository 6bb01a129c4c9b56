// Launches of the 2:4 products: tiles for the blocks, and the depth split between blocks.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>

#include "../sparse24.h"
#include "launch.h"
#include "sparse24_product_kernels.cuh"

namespace recsparse::sparse24 {

// The steps of the depth in parts, so that few tiles still fill the GPU.
struct Split {
  int64_t parts, steps_each;
};

// `least`: steps of a part that its start-up is worth. `most`: parts that memory is given for.
// `blocks`: of a multiprocessor.
inline Split split_depth(const Stream& stream, int64_t tiles, int64_t steps, int64_t least,
                         int64_t most, int64_t blocks = 2) {
  const int64_t wanted = blocks * int64_t(stream.multiprocessors()) / std::max<int64_t>(1, tiles);
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
template <class Output, class F>
void with_parts(const Stream& stream, const char* name, const Split& split, const Output& to,
                F launch_product) {
  const int64_t count = to.rows * to.columns;
  if (split.parts == 1) return launch_product(Parts{nullptr, count});
  const Scratch<float> sums(stream, split.parts * count);
  const Parts parts = {sums.get(), count};
  launch_product(parts);
  launch(stream, name, sum_parts_kernel<Output>, {ceil_div(count, kSumThreads)}, {kSumThreads}, 0,
         parts, split.parts, to);
}

// Whether pairs of every row of a new tensor with so many columns are aligned.
inline bool pairs_aligned(int64_t columns) { return columns % kPair == 0; }

//                          M    N   warps, depth, stages
template <class T>
using LargeShape = ProductShape<T, 128, 128, 2, 2, 32, 3>;
template <class T>
using SmallShape = ProductShape<T, 64, 64, 2, 2, 64 / int(sizeof(T)), 3>;
using LargeTf32Shape = ProductShape<float, 128, 128, 2, 2, 16, 3, Multiply::kTf32>;
using SmallTf32Shape = ProductShape<float, 64, 64, 2, 2, 16, 3, Multiply::kTf32>;

bool tf32_wanted();  // as set_tf32 was told

// rows x columns sums; `elements`: of the operands and the result.
template <class Shape, class Product>
void launch_product(const Stream& stream, const char* name, Product product, int64_t rows,
                    int64_t columns, int64_t elements) {
  const int64_t tiles_m = ceil_div(rows, Shape::kRows);
  const int64_t tiles_n = ceil_div(columns, Shape::kColumns);
  const Split split =
      split_depth(stream, tiles_m * tiles_n, ceil_div(product.depth(), Shape::kDepth), 4,
                  most_parts<typename Shape::Type>(elements, product.to.rows * product.to.columns));
  with_parts(stream, name, split, product.to, [&](Parts parts) {
    product.to.parts = parts;
    launch(stream, name, expanded_product_kernel<Shape, Product>, {tiles_m * tiles_n, split.parts},
           {Shape::kThreads}, ProductTiles<Shape, Product>::kSharedBytes, product, tiles_m, tiles_n,
           split.steps_each);
  });
}
template <class T, class Product>
void run_product(const Stream& stream, const char* name, const Product& product, int64_t rows,
                 int64_t columns, int64_t elements) {
  const auto run = [&](auto shape) {
    launch_product<decltype(shape)>(stream, name, product, rows, columns, elements);
  };
  const bool large =
      ceil_div(rows, LargeShape<T>::kRows) * ceil_div(columns, LargeShape<T>::kColumns) >=
      stream.multiprocessors();
  if constexpr (sizeof(T) == 2) {
    if (large) return run(LargeShape<T>());
  } else if (tf32_wanted()) {
    return large ? run(LargeTf32Shape()) : run(SmallTf32Shape());
  }
  run(SmallShape<T>());
}

// What a product reads and writes, for most_parts.
inline int64_t elements_of(const Sparse24Sizes& size) {
  return size.batch * (size.in_features + size.out_features) + size.out_features * size.padded / 2;
}

}  // namespace recsparse::sparse24
