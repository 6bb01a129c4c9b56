// Products with a 2:4 weight that no sparse instruction makes: tiles of the weight are expanded in
// shared memory, or the dense product is made and what is kept is taken from it.
//   LinearProduct      output[b, o] = sum_i input[b, i] W[o, i]            float32
//   GradInputProduct   grad_input[b, i] = sum_o grad_sum[b, o] W[o, i]
//   GradValuesProduct  grad_values[o, k] = sum_b grad_sum[b, o] input[b, column(o, k)]
//   input [B, I]   grad_sum [B, O]   W [O, I] as values [O, P / 2], metadata [O, P / 8]
//
// A product says what its tiles A [M, K] and B [K, N] are and where sums go; the kernel streams the
// tiles through kStages of shared memory. An expanded tile is read one step ahead into registers,
// and written to its stage when the step's arithmetic has been issued.
#pragma once

#include "sparse24_tiles.cuh"

namespace recsparse::sparse24 {

template <class T, int kRows, int kColumns, int kWarpsM, int kWarpsN, int kDepthOf, int kStagesOf,
          Multiply kMultiplyOf = Multiply::kFull>
struct ProductShape : WarpGrid<kRows, kColumns, kWarpsM, kWarpsN> {
  using Grid = WarpGrid<kRows, kColumns, kWarpsM, kWarpsN>;
  using Type = T;
  static constexpr int kDepth = kDepthOf, kStages = kStagesOf;
  static constexpr Multiply kMultiply = kMultiplyOf;
  // The registers of a thread's sums allow as many; without it the compiler aims at more, and
  // spills.
  static constexpr int kMinBlocks = Grid::kWarpRows * Grid::kWarpColumns / kWarp > 64 ? 2 : 3;
  template <Layout kLayout, int kWidth>  // of an operand that is kWidth wide
  using Operand = std::conditional_t<kLayout == Layout::kAlong, Tile<T, kWidth, kDepth>,
                                     Tile<T, kDepth, kWidth>>;
};

template <class Shape, class Product>
struct ProductTiles {
  using A = typename Shape::template Operand<Product::kA, Shape::kRows>;
  using B = typename Shape::template Operand<Product::kB, Shape::kColumns>;
  using Sums = SumTile<Shape::kRows, Shape::kColumns>;
  static constexpr int64_t kStageBytes = A::kBytes + B::kBytes;
  static constexpr int64_t kSharedBytes =
      Shape::kStages * kStageBytes > Sums::kBytes ? Shape::kStages* kStageBytes : Sums::kBytes;
  static_assert(kSharedBytes <= 99 * 1024, "what every GPU from sm_80 on can give a block");
};

template <class Shape, class Product>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kMinBlocks)
    expanded_product_kernel(Product product, int64_t tiles_m, int64_t tiles_n, int64_t steps_each) {
  using T = typename Shape::Type;
  using Tiles = ProductTiles<Shape, Product>;
  using Expanded = ExpandedTile<typename Tiles::B, Shape::kThreads, T>;
  constexpr int kStages = Shape::kStages;
  const TileAt tile = tile_of_block(blockIdx.x, tiles_m, tiles_n);
  const int64_t m0 = tile.m * Shape::kRows, n0 = tile.n * Shape::kColumns;
  const int64_t first = int64_t(blockIdx.y) * steps_each;
  const int64_t left = ceil_div(product.depth(), Shape::kDepth) - first;
  const int64_t steps = left < steps_each ? left : steps_each;
  const auto a_of = [&](int64_t stage) { return dynamic_shared<T>(stage * Tiles::kStageBytes); };
  const auto b_of = [&](int64_t stage) {
    return dynamic_shared<T>(stage * Tiles::kStageBytes + Tiles::A::kBytes);
  };
  const auto load = [&](int64_t step, Expanded& expanded) {
    if (step < steps) {
      const int64_t k = (first + step) * Shape::kDepth, stage = step % kStages;
      load_tile<typename Tiles::A, Shape::kThreads>(a_of(stage), product.a,
                                                    Product::kA == Layout::kAlong ? m0 : k,
                                                    Product::kA == Layout::kAlong ? k : m0);
      const int64_t row = Product::kB == Layout::kAlong ? n0 : k;
      const int64_t column = Product::kB == Layout::kAlong ? k : n0;
      if constexpr (Product::kSparseB) {
        expanded.fetch(product.b, row, column);
      } else {
        load_tile<typename Tiles::B, Shape::kThreads>(b_of(stage), product.b, row, column);
      }
    }
    cp_async_commit();
  };
  const auto finish_load = [&](int64_t step, const Expanded& expanded) {
    if constexpr (Product::kSparseB)
      if (step < steps) expanded.expand(b_of(step % kStages));
  };

  typename Shape::Sums sums;
  sums.clear();
#pragma unroll 1
  for (int step = 0; step < kStages - 1; ++step) {
    Expanded expanded;
    load(step, expanded);
    finish_load(step, expanded);
  }
#pragma unroll 1
  for (int64_t step = 0; step < steps; ++step) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // the stage is there, and the one before it has been read by all
    Expanded expanded;
    load(step + kStages - 1, expanded);
    block_product<typename Shape::Grid, Product::kA, Product::kB, Shape::kDepth, Tiles::A::kStride,
                  Tiles::B::kStride, Shape::kMultiply>(sums, a_of(step % kStages),
                                                       b_of(step % kStages));
    finish_load(step + kStages - 1, expanded);
  }
  cp_async_wait<0>();
  __syncthreads();  // the stages are free: the sums take their place
  float* tile_sums = dynamic_shared<float>();
  block_store_sums<typename Shape::Grid, Tiles::Sums::kStride>(tile_sums, sums);
  __syncthreads();
  product.template store<Shape, Tiles::Sums::kStride>(tile_sums, m0, n0, int64_t(blockIdx.y));
}

// f(row, column, sums at it) for a thread's pieces of kPiece columns of the tile of sums.
template <class Shape, int kStride, int kPiece, class F>
__device__ __forceinline__ void each_piece_of_sums(const float* sums, F f) {
  constexpr int kInRow = Shape::kColumns / kPiece;
#pragma unroll 1
  for (int i = int(threadIdx.x); i < Shape::kRows * kInRow; i += Shape::kThreads) {
    const int row = i / kInRow, column = i % kInRow * kPiece;
    f(row, column, sums + row * kStride + column);
  }
}
// To an output of rows m and columns n.
template <class Shape, int kStride, class Output>
__device__ __forceinline__ void store_output(const Output& to, const float* sums, int64_t m0,
                                             int64_t n0, int64_t part) {
  each_piece_of_sums<Shape, kStride, kPair>(sums, [&](int row, int column, const float* at) {
    const int count = m0 + row < to.rows ? elements_inside<kPair>(n0 + column, to.columns) : 0;
    float values[kPair] = {at[0], at[1]};
    if (count) to.write(m0 + row, n0 + column, count, values, part);
  });
}

template <class T>
struct LinearProduct {
  static constexpr Layout kA = Layout::kAlong, kB = Layout::kAlong;
  static constexpr bool kSparseB = true;
  Matrix<T> a;  // input
  SparseWeight<T> b;
  LinearOutput<T> to;
  __host__ __device__ int64_t depth() const { return 8 * b.row_bytes; }
  template <class Shape, int kStride>
  __device__ __forceinline__ void store(const float* sums, int64_t m0, int64_t n0,
                                        int64_t part) const {
    store_output<Shape, kStride>(to, sums, m0, n0, part);
  }
};

template <class T>
struct GradInputProduct {
  static constexpr Layout kA = Layout::kAlong, kB = Layout::kAcross;
  static constexpr bool kSparseB = true;
  Matrix<T> a;  // grad_sum
  SparseWeight<T> b;
  PlainOutput<T> to;
  __host__ __device__ int64_t depth() const { return b.rows; }
  template <class Shape, int kStride>
  __device__ __forceinline__ void store(const float* sums, int64_t m0, int64_t n0,
                                        int64_t part) const {
    store_output<Shape, kStride>(to, sums, m0, n0, part);
  }
};

template <class T>
struct GradValuesProduct {
  static constexpr Layout kA = Layout::kAcross, kB = Layout::kAcross;
  static constexpr bool kSparseB = false;
  Matrix<T> a, b;  // grad_sum, input
  const uint8_t* metadata;
  int64_t row_bytes;  // P / 8
  PlainOutput<T> to;  // [O, P / 2]
  __host__ __device__ int64_t depth() const { return a.rows; }

  // A group of four columns of the dense gradient gives two values: its sums are in the tile, and
  // zeros in the columns from I to P.
  template <class Shape, int kStride>
  __device__ __forceinline__ void store(const float* sums, int64_t m0, int64_t n0,
                                        int64_t part) const {
    each_piece_of_sums<Shape, kStride, 4>(sums, [&](int row, int column, const float* at) {
      const int64_t o = m0 + row, group = (n0 + column) / 4;
      if (o >= to.rows || group >= 2 * row_bytes) return;
      const uint32_t code = metadata[o * row_bytes + group / 2] >> (group % 2 * 4);
      float kept[kPair] = {at[code & 3], at[code >> 2 & 3]};
      to.write(o, 2 * group, kPair, kept, part);
    });
  }
};

}  // namespace recsparse::sparse24
