#include <algorithm>
#include <optional>

#include "activation.cuh"
#include "low_rank_product.h"

namespace recsparse::low_rank {
namespace {

constexpr int kBlock = 64;  // rows and columns of out that a block of threads makes
constexpr int kStages = 3;
using Grid = WarpGrid<kBlock, kBlock, 2, 2>;
constexpr int kThreads = Grid::kThreads;
using OutTile = SumTile<kBlock, kBlock>;

// Terms of the sums a stage: 128 bytes of a row, which is what memory moves at a time.
template <class T>
constexpr int kDepth = 128 / int(sizeof(T));

template <Layout kLayout, class T>
using Operand = Tile<T, kLayout == Layout::kAlong ? kBlock : kDepth<T>,
                     kLayout == Layout::kAlong ? kDepth<T> : kBlock>;

template <Layout kA, Layout kB, class T>
constexpr int64_t stage_bytes(bool with_factor) {
  return (with_factor ? 2 : 1) * Operand<kA, T>::kBytes + Operand<kB, T>::kBytes;
}

template <Layout kLayout, class T>
__device__ __forceinline__ void load_operand(T* shared, const Matrix<T>& from, int64_t first,
                                             int64_t k) {
  load_tile<Operand<kLayout, T>, kThreads>(shared, from, kLayout == Layout::kAlong ? first : k,
                                           kLayout == Layout::kAlong ? k : first);
}

// The value of one element; the pieces of `finish_piece` come to the same.
template <class T>
__device__ __forceinline__ float finish_element(const Product<T>& p, float sum, int64_t row,
                                                int64_t column) {
  if (p.bias) sum += (p.bias_scale ? p.bias_scale[row] : 1.0f) * to_float(p.bias[column]);
  const int64_t at = row * p.n + column;
  switch (p.finish) {
    case Finish::kSum: return activate(sum, p.activation);
    case Finish::kCross: return to_float(p.e[at]) * sum + to_float(p.f[at]);
    case Finish::kGradSum: return to_float(p.e[at]) * slope(sum, p.activation);
    case Finish::kTimesSlope: return sum * slope(to_float(p.e[at]), p.activation);
    case Finish::kProduct: return to_float(p.e[at]) * sum;
    default: return sum + to_float(p.e[at]);
  }
}

// Writes up to 16 bytes of out from their sums in shared memory, which it may change.
template <class T>
__device__ __forceinline__ void finish_piece(const Product<T>& p, float* sums, int64_t row,
                                             int64_t column, int count) {
  constexpr int kPiece = kPackOf16Bytes<T>;
  const int64_t at = row * p.n + column;
  const bool acts = p.activation != Activation::kNone;
  if (p.bias) {
    const float scale = p.bias_scale ? p.bias_scale[row] : 1.0f;
#pragma unroll
    for (int e = 0; e < kPiece; ++e)
      if (e < count) sums[e] += scale * to_float(p.bias[column + e]);
  }
  if (acts && p.finish == Finish::kSum)
    map_piece<kPiece>(sums, [&](float x, int) { return activate(x, p.activation); });
  if (p.finish == Finish::kGradSum)
    map_piece<kPiece>(sums, [&](float x, int) { return slope(x, p.activation); });
  Piece<T> values = read_sums<T>(sums);
  if (p.finish != Finish::kSum) {
    Piece<T> e = read_piece(p.e + at, count, p.out_width);
    if (p.finish == Finish::kTimesSlope) {
#pragma unroll
      for (int i = 0; i < kPiece; ++i) sums[i] = e.at[i];
      map_piece<kPiece>(sums, [&](float x, int) { return slope(x, p.activation); });
      e = read_sums<T>(sums);
    }
    Piece<T> f = {};
    if (p.finish == Finish::kCross) f = read_piece(p.f + at, count, p.out_width);
#pragma unroll
    for (int i = 0; i < kPiece; ++i)
      values.at[i] =
          p.finish == Finish::kPlus ? values.at[i] + e.at[i] : e.at[i] * values.at[i] + f.at[i];
  }
  write_piece(p.out + at, values, count, p.out_width);
}

// One block: kBlock x kBlock of out, over one part of k.
template <Layout kA, Layout kB, class T>
__global__ void __launch_bounds__(kThreads) product_kernel(const Product<T> p) {
  using A = Operand<kA, T>;
  using B = Operand<kB, T>;
  constexpr int kStep = kDepth<T>, kPiece = kPackOf16Bytes<T>;
  const int64_t m0 = int64_t(blockIdx.x) * kBlock, n0 = int64_t(blockIdx.y) * kBlock;
  const int64_t part = blockIdx.z, k0 = part * p.k_each;
  const int64_t k_end = k0 + p.k_each < p.k ? k0 + p.k_each : p.k;
  const int steps = int((k_end - k0 + kStep - 1) / kStep);
  const int64_t stage = stage_bytes<kA, kB, T>(p.factor != nullptr);
  const Matrix<T> factor{p.factor, p.a.rows, p.a.columns, p.a.stride, p.a.width};
  const bool sums_here = p.sums && blockIdx.y == 0;
  const bool changes_a = p.load != Load::kPlain || p.row_mask;
  const bool changes_b = p.b_activation != Activation::kNone;

  const auto a_of = [&](int s) { return dynamic_shared<T>(s % kStages * stage); };
  const auto b_of = [&](int s) { return dynamic_shared<T>(s % kStages * stage + A::kBytes); };
  const auto factor_of = [&](int s) {
    return dynamic_shared<T>(s % kStages * stage + A::kBytes + B::kBytes);
  };
  const auto fetch = [&](int s) {
    if (s < steps) {
      const int64_t k = k0 + int64_t(s) * kStep;
      load_operand<kA>(a_of(s), p.a, m0, k);
      load_operand<kB>(b_of(s), p.b, n0, k);
      if (p.factor) load_operand<kA>(factor_of(s), factor, m0, k);
    }
    cp_async_commit();
  };

  typename Grid::Sums sums;
  sums.clear();
  float column_sum = 0.0f;
  for (int s = 0; s < kStages - 1; ++s) fetch(s);
  for (int s = 0; s < steps; ++s) {
    cp_async_wait<kStages - 2>();
    __syncthreads();
    fetch(s + kStages - 1);
    const int64_t k = k0 + int64_t(s) * kStep;
    if (changes_a)
      each_piece<A, kThreads>([&](PieceAt at, int) {
        T* a = a_of(s) + at.row * A::kStride + at.column;
        const T* f = factor_of(s) + at.row * A::kStride + at.column;
        const int64_t row = (kA == Layout::kAlong ? m0 : k) + at.row;
        if (p.row_mask && row < p.a.rows && !p.row_mask[row]) {
          write_piece(a, Piece<T>{});
        } else if (p.load == Load::kTimes) {
          Piece<T> x = read_piece(a);
          const Piece<T> y = read_piece(f);
#pragma unroll
          for (int e = 0; e < kPiece; ++e) x.at[e] *= y.at[e];
          write_piece(a, x);
        } else if (p.load == Load::kActivated) {
          map_piece<kPiece>(a, [&](float x, int) { return activate(x, p.load_activation); });
        } else if (p.load == Load::kSlopeOfOutput) {
          map_piece<kPiece>(a, [&](float x, int e) {
            return x * slope_of_output(to_float(f[e]), p.load_activation);
          });
        }
      });
    if (changes_b)
      each_piece<B, kThreads>([&](PieceAt at, int) {
        map_piece<kPiece>(b_of(s) + at.row * B::kStride + at.column,
                          [&](float x, int) { return activate(x, p.b_activation); });
      });
    if (changes_a || changes_b) __syncthreads();
    if (kA == Layout::kAcross && sums_here && threadIdx.x < kBlock) {
      float sum = 0.0f;  // of a stage by itself: see warp_product
      for (int i = 0; i < kStep && k + i < k_end; ++i) {
        const float x = to_float(a_of(s)[i * A::kStride + threadIdx.x]);
        sum += p.sum_scale ? x * p.sum_scale[k + i] : x;
      }
      column_sum += sum;
    }
    if (p.out) block_product<Grid, kA, kB, kStep, A::kStride, B::kStride>(sums, a_of(s), b_of(s));
  }
  cp_async_wait<0>();

  if (kA == Layout::kAcross && sums_here && threadIdx.x < kBlock && m0 + threadIdx.x < p.m) {
    const int64_t m = m0 + threadIdx.x;
    if (p.sums_parts) {
      p.sums_parts[part * p.m + m] = column_sum;
    } else {
      p.sums[m] = from_float<T>(column_sum);
    }
  }
  if (!p.out) return;
  __syncthreads();  // the stages have been read: their memory takes the sums
  float* tile = dynamic_shared<float>();
  block_store_sums<Grid, OutTile::kStride>(tile, sums);
  __syncthreads();
  each_piece<Tile<T, kBlock, kBlock>, kThreads>([&](PieceAt at, int) {
    const int64_t row = m0 + at.row, column = n0 + at.column;
    const int count = row < p.m ? elements_inside<kPiece>(column, p.n) : 0;
    if (!count) return;
    float* from = tile + at.row * OutTile::kStride + at.column;
    if (p.out_parts) {
      float* to = p.out_parts + (part * p.m + row) * p.n + column;
      for (int e = 0; e < count; ++e) to[e] = from[e];
    } else {
      finish_piece(p, from, row, column, count);
    }
  });
}

constexpr int kJoinThreads = 256;

// One thread: one element of out, then (behind them) of sums.
template <class T>
__global__ void __launch_bounds__(kJoinThreads)
    join_parts_kernel(const Product<T> p, int64_t parts) {
  const int64_t elements = p.out ? p.m * p.n : 0;
  int64_t i = int64_t(blockIdx.x) * kJoinThreads + threadIdx.x;
  const bool is_sum = i >= elements;
  if (is_sum) i -= elements;
  const int64_t count = is_sum ? (p.sums ? p.m : 0) : elements;
  if (i >= count) return;
  const float* from = (is_sum ? p.sums_parts : p.out_parts) + i;
  float sum = 0.0f;
#pragma unroll 4
  for (int64_t s = 0; s < parts; ++s) sum += from[s * count];
  if (is_sum) {
    p.sums[i] = from_float<T>(sum);
  } else {
    p.out[i] = from_float<T>(finish_element(p, sum, i / p.n, i % p.n));
  }
}

}  // namespace

template <Layout kA, Layout kB, class T>
void run_product(const Stream& stream, Product<T> p, int64_t most_parts) {
  constexpr bool kAlongA = kA == Layout::kAlong, kAlongB = kB == Layout::kAlong;
  p.m = kAlongA ? p.a.rows : p.a.columns;
  p.k = kAlongA ? p.a.columns : p.a.rows;
  p.n = kAlongB ? p.b.rows : p.b.columns;
  if (p.m == 0) return;
  if (p.n == 0) p.out = nullptr;
  if (!p.out && !p.sums) return;
  p.out_width = matrix<T>(p.out, p.m, p.n).width;
  if (p.e) p.out_width = std::min(p.out_width, matrix(p.e, p.m, p.n).width);
  if (p.f) p.out_width = std::min(p.out_width, matrix(p.f, p.m, p.n).width);
  if (p.factor) p.a.width = std::min(p.a.width, matrix(p.factor, p.a.rows, p.a.columns).width);

  const int64_t tiles_m = ceil_div(p.m, kBlock), tiles_n = p.out ? ceil_div(p.n, kBlock) : 1;
  const int64_t steps = std::max<int64_t>(ceil_div(p.k, kDepth<T>), 1);
  // two blocks for each multiprocessor, of four steps at least
  const int64_t wanted = 2 * int64_t(stream.multiprocessors()) / (tiles_m * tiles_n);
  int64_t parts = std::max<int64_t>(std::min({wanted, steps / 4, most_parts}), 1);
  p.k_each = ceil_div(steps, parts) * kDepth<T>;
  parts = std::max<int64_t>(ceil_div(p.k, p.k_each), 1);
  std::optional<Scratch<float>> out_parts, sums_parts;
  if (parts > 1) {
    if (p.out) p.out_parts = out_parts.emplace(stream, parts * p.m * p.n).get();
    if (p.sums) p.sums_parts = sums_parts.emplace(stream, parts * p.m).get();
  }
  const int64_t shared =
      std::max(kStages * stage_bytes<kA, kB, T>(p.factor != nullptr), OutTile::kBytes);
  launch(stream, "low_rank_product", product_kernel<kA, kB, T>, {tiles_m, tiles_n, parts},
         {kThreads}, shared, p);
  if (parts > 1)
    launch(stream, "low_rank_join_parts", join_parts_kernel<T>,
           {ceil_div((p.out ? p.m * p.n : 0) + (p.sums ? p.m : 0), kJoinThreads)}, {kJoinThreads},
           0, p, parts);
}

#define RS_INSTANTIATE(T)                                                                         \
  template void run_product<Layout::kAlong, Layout::kAlong>(const Stream&, Product<T>, int64_t);  \
  template void run_product<Layout::kAlong, Layout::kAcross>(const Stream&, Product<T>, int64_t); \
  template void run_product<Layout::kAcross, Layout::kAcross>(const Stream&, Product<T>, int64_t);
RS_INSTANTIATE(float)
RS_INSTANTIATE(bf16)
RS_INSTANTIATE(f16)
#undef RS_INSTANTIATE

}  // namespace recsparse::low_rank
