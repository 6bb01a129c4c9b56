// Tiles of matrices in shared memory and their products, for kernels that are made of them.
//
// `Tile` is the shape and layout of a tile, which load_tile fills by cp.async, with zeros outside
// the matrix. warp_product does acc += A B^T of two tiles: mma m16n8k16 for bf16 and f16, plain FMA
// for float32. store_sums brings acc into a float32 tile, from which each thread takes whole
// 16-byte pieces (`Piece`) of rows: global memory is read and written in wide accesses, whatever
// the tile.
//
// Either operand lies in its tile with k along the rows, [m][k], or across them, [k][m]: no matrix
// is ever transposed in memory. Any size and stride is taken: rows and columns outside the matrix
// read as zeros, and rows that 16-byte accesses cannot reach go 4 bytes at a time, or (an odd
// number of 16-bit elements) 16 bytes at a time by way of registers.
// float32 is multiplied in full, unless a kernel asks for tf32: tensor cores keep 10 bits of its
// mantissa (and three products for 22 bits turn infinities into NaN).
#pragma once

#include "primitives.h"
#include "ptx.h"

namespace recsparse {

// A row-major matrix in global memory.
template <class T>
struct Matrix {
  const T* at;
  int64_t rows, columns, stride;
  int width;  // bytes of an access that every row's beginning is aligned to: 16, 4 or one element
};

// Host: the matrix, and how wide its rows can be read. `offset`: rows may begin at multiples of so
// many elements too.
template <class T>
Matrix<T> matrix(const T* at, int64_t rows, int64_t columns, int64_t stride, int64_t offset = 0) {
  const auto fits = [&](int64_t bytes) {
    const int64_t size = int64_t(sizeof(T));
    return is_aligned(at, bytes) && stride * size % bytes == 0 && offset * size % bytes == 0;
  };
  return {at, rows, columns, stride, fits(16) ? 16 : fits(4) ? 4 : int(sizeof(T))};
}
template <class T>
Matrix<T> matrix(const T* at, int64_t rows, int64_t columns) {
  return matrix(at, rows, columns, columns);
}

// kRows x kColumns elements; one 16-byte access of padding a row keeps ldmatrix, and float32 reads
// of 16 bytes, free of bank conflicts.
template <class T, int kRowsOf, int kColumnsOf>
struct Tile {
  static constexpr int kRows = kRowsOf, kColumns = kColumnsOf;
  static constexpr int kPiece = kPackOf16Bytes<T>;
  static constexpr int kStride = kColumns + kPiece;
  static constexpr int kPiecesInRow = kColumns / kPiece;
  static constexpr int kPieces = kRows * kPiecesInRow;
  static constexpr int64_t kBytes = int64_t(kRows) * kStride * int64_t(sizeof(T));
  static_assert(kColumns % kPiece == 0, "rows are whole 16-byte pieces");
};

// A 16-byte piece of a tile's row: which row, which columns from.
struct PieceAt {
  int row, column;
};

// f(PieceAt, i) for the pieces of this thread, the i-th of them; the same ones at every call.
template <class TileOf, int kThreads, int kUnroll = 1, class F>
__device__ __forceinline__ void each_piece(F f) {
  constexpr int kTurns = (TileOf::kPieces + kThreads - 1) / kThreads;
#pragma unroll kUnroll
  for (int i = 0; i < kTurns; ++i) {
    const int piece = int(threadIdx.x) + i * kThreads;
    if (TileOf::kPieces % kThreads == 0 || piece < TileOf::kPieces)
      f(PieceAt{piece / TileOf::kPiecesInRow, piece % TileOf::kPiecesInRow * TileOf::kPiece}, i);
  }
}

// Up to eight 16-bit elements (zeros behind them) at any place of a row: the two aligned pieces
// that hold them, moved together; one by one where those reach outside the matrix.
template <class T>
__device__ __forceinline__ Pack<T, 8> read_unaligned(const Matrix<T>& from, const T* global,
                                                     int count) {
  static_assert(sizeof(T) == 2, "moved by halves of words");
  const int before = int(reinterpret_cast<uintptr_t>(global) % 16) / 2;
  const T* first = global - before;
  const bool both = before + count > 8;
  Pack<T, 8> values;
  if (first < from.at ||
      first + (both ? 16 : 8) > from.at + (from.rows - 1) * from.stride + from.columns) {
#pragma unroll
    for (int e = 0; e < 8; ++e) values.at[e] = e < count ? global[e] : from_float<T>(0.0f);
    return values;
  }
  uint32_t words[8] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (half && !both) break;
    const auto pack = load_pack<uint32_t, 4>(reinterpret_cast<const uint32_t*>(first + 8 * half));
#pragma unroll
    for (int i = 0; i < 4; ++i) words[4 * half + i] = pack.at[i];
  }
#pragma unroll
  for (int i = 0; i < 6; ++i) words[i] = before & 4 ? words[i + 2] : words[i];
#pragma unroll
  for (int i = 0; i < 5; ++i) words[i] = before & 2 ? words[i + 1] : words[i];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t two = __funnelshift_r(words[i], words[i + 1], before & 1 ? 16 : 0);
    const int inside = count - 2 * i;
    reinterpret_cast<uint32_t*>(values.at)[i] = inside > 1 ? two : inside == 1 ? two & 0xffffu : 0u;
  }
  return values;
}

// Starts to copy up to 16 bytes from (row, column) on (`count` elements, the rest zeros) to shared
// memory.
template <class T>
__device__ __forceinline__ void load_piece(T* shared, const Matrix<T>& from, int64_t row,
                                           int64_t column, int count) {
  constexpr int kPiece = kPackOf16Bytes<T>, kInWord = 4 / int(sizeof(T));
  const T* global = from.at + (count > 0 ? row * from.stride + column : 0);
  if (count == kPiece && from.width == 16) {
    cp_async_16(shared, global);
  } else if (count % kInWord == 0 && from.width >= 4) {
#pragma unroll
    for (int e = 0; e < kPiece; e += kInWord)
      cp_async_small<4>(shared + e, e < count ? global + e : from.at, e < count);
  } else if constexpr (sizeof(T) == 2) {
    store_pack(shared, count > 0 ? read_unaligned(from, global, count) : Pack<T, 8>{});
  }
}

// Elements of [first, first + kPiece) that are below the end.
template <int kPiece>
__device__ __forceinline__ int elements_inside(int64_t first, int64_t end) {
  const int64_t left = end - first;
  return left >= kPiece ? kPiece : left > 0 ? int(left) : 0;
}

// Starts to copy the tile at (row0, column0). A barrier, after the wait, makes it visible to
// others.
template <class TileOf, int kThreads, class T>
__device__ __forceinline__ void load_tile(T* shared, const Matrix<T>& from, int64_t row0,
                                          int64_t column0) {
  constexpr int kPiece = TileOf::kPiece;
  if constexpr (TileOf::kPieces % kThreads == 0 && kThreads % TileOf::kPiecesInRow == 0) {
    // a thread keeps its columns: one address, then steps of whole rows
    if (from.width == 16 && column0 + TileOf::kColumns <= from.columns) {
      constexpr int kStep = kThreads / TileOf::kPiecesInRow;
      const int row = int(threadIdx.x) / TileOf::kPiecesInRow;
      const int column = int(threadIdx.x) % TileOf::kPiecesInRow * kPiece;
      const int64_t left = from.rows - row0 - row;
      const T* global = from.at + (left > 0 ? (row0 + row) * from.stride + column0 + column : 0);
      T* target = shared + row * TileOf::kStride + column;
#pragma unroll
      for (int i = 0; i < TileOf::kPieces / kThreads; ++i) {
        const bool valid = i * kStep < left;
        cp_async_16(target + i * kStep * TileOf::kStride, valid ? global : from.at, valid);
        global += kStep * from.stride;
      }
      return;
    }
  }
  each_piece<TileOf, kThreads>([&](PieceAt p, int) {
    const int64_t row = row0 + p.row, column = column0 + p.column;
    const int count = row < from.rows ? elements_inside<kPiece>(column, from.columns) : 0;
    load_piece(shared + p.row * TileOf::kStride + p.column, from, row, column, count);
  });
}

// ---- pieces in registers ----

template <class T>
struct Piece {
  float at[kPackOf16Bytes<T>];
};

// From and to global memory: `count` elements (zeros behind them), as wide as `width` says.
template <class T>
__device__ __forceinline__ Piece<T> read_piece(const T* global, int count, int width) {
  constexpr int kPiece = kPackOf16Bytes<T>;
  Piece<T> values;
  if (count == kPiece && width == 16) {
    const auto pack = load_pack<T, kPiece>(global);
#pragma unroll
    for (int e = 0; e < kPiece; ++e) values.at[e] = to_float(pack.at[e]);
  } else {
#pragma unroll
    for (int e = 0; e < kPiece; ++e) values.at[e] = e < count ? to_float(global[e]) : 0.0f;
  }
  return values;
}
template <class T>
__device__ __forceinline__ void write_piece(T* global, const Piece<T>& values, int count,
                                            int width) {
  constexpr int kPiece = kPackOf16Bytes<T>;
  Pack<T, kPiece> pack;
#pragma unroll
  for (int e = 0; e < kPiece; ++e) pack.at[e] = from_float<T>(values.at[e]);
  if (count == kPiece && width == 16) {
    store_pack(global, pack);
  } else {
#pragma unroll
    for (int e = 0; e < kPiece; ++e)
      if (e < count) global[e] = pack.at[e];
  }
}
// From and to a tile of T.
template <class T>
__device__ __forceinline__ Piece<T> read_piece(const T* shared) {
  return read_piece(shared, kPackOf16Bytes<T>, 16);
}
template <class T>
__device__ __forceinline__ void write_piece(T* shared, const Piece<T>& values) {
  write_piece(shared, values, kPackOf16Bytes<T>, 16);
}

// at[e] = f(at[e], e) of a piece in shared memory: a loop, so that what f computes is compiled once
// and not for each element.
template <int kPiece, class T, class F>
__device__ __forceinline__ void map_piece(T* at, F f) {
#pragma unroll 1
  for (int e = 0; e < kPiece; ++e) at[e] = from_float<T>(f(to_float(at[e]), e));
}

// ---- products ----

// The tensor cores' output layout, which float32 shares: acc[i][j] is the 16 x 8 tile at (16 i, 8
// j) of the warp's, and of it lane 4 g + t holds (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t +
// 1).
template <int kTilesM, int kTilesN>
struct WarpSums {
  float at[kTilesM][kTilesN][4];
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kTilesM; ++i)
#pragma unroll
      for (int j = 0; j < kTilesN; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) at[i][j][e] = 0.0f;
  }
};

// How an operand lies in its tile.
enum class Layout { kAlong, kAcross };  // [m][k] and [k][m]

// How float32 is multiplied.
enum class Multiply { kFull, kTf32 };

// warp_product of float32 by mma m16n8k8 tf32.
template <Layout kA, Layout kB, int kDepth, int kStrideA, int kStrideB, int kTilesM, int kTilesN>
__device__ __forceinline__ void warp_product_tf32(WarpSums<kTilesM, kTilesN>& sums, const float* a,
                                                  const float* b) {
  static_assert(kDepth % 8 == 0, "an mma takes eight values of k");
  const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
  for (int k = 0; k < kDepth; k += 8) {
    uint32_t a_part[kTilesM][4];
#pragma unroll
    for (int m = 0; m < kTilesM; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = 16 * m + g + i % 2 * 8, depth = k + t + i / 2 * 4;
        a_part[m][i] =
            cvt_tf32(a[kA == Layout::kAlong ? row * kStrideA + depth : depth * kStrideA + row]);
      }
#pragma unroll
    for (int n = 0; n < kTilesN; ++n) {
      uint32_t b_part[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int column = 8 * n + g, depth = k + t + i * 4;
        b_part[i] = cvt_tf32(
            b[kB == Layout::kAlong ? column * kStrideB + depth : depth * kStrideB + column]);
      }
#pragma unroll
      for (int m = 0; m < kTilesM; ++m) mma_m16n8k8_tf32(sums.at[m][n], a_part[m], b_part);
    }
  }
}

// sums[m, n] += sum over k < kDepth of a(m, k) b(n, k); a and b point to the warp's first row or
// column, strides in elements.
template <Layout kA, Layout kB, int kDepth, int kStrideA, int kStrideB,
          Multiply kMultiply = Multiply::kFull, class T, int kTilesM, int kTilesN>
__device__ __forceinline__ void warp_product(WarpSums<kTilesM, kTilesN>& sums, const T* a,
                                             const T* b) {
  const int lane = lane_id();
  if constexpr (sizeof(T) == 4 && kMultiply == Multiply::kTf32) {
    warp_product_tf32<kA, kB, kDepth, kStrideA, kStrideB>(sums, a, b);
  } else if constexpr (sizeof(T) == 2) {
    static_assert(kTilesN % 2 == 0 && kDepth % 16 == 0, "an ldmatrix.x4 of B feeds two tiles");
    const int q = lane / 8, j = lane % 8;  // this lane's row: j of matrix q
    const T* a_row = kA == Layout::kAlong ? a + (q % 2 * 8 + j) * kStrideA + q / 2 * 8
                                          : a + (q / 2 * 8 + j) * kStrideA + q % 2 * 8;
    const T* b_row = kB == Layout::kAlong ? b + (q / 2 * 8 + j) * kStrideB + q % 2 * 8
                                          : b + (q % 2 * 8 + j) * kStrideB + q / 2 * 8;
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
      uint32_t a_part[kTilesM][4];
#pragma unroll
      for (int m = 0; m < kTilesM; ++m) {
        if constexpr (kA == Layout::kAlong)
          ldmatrix_x4(a_part[m], a_row + 16 * m * kStrideA + k);
        else
          ldmatrix_x4_trans(a_part[m], a_row + k * kStrideA + 16 * m);
      }
#pragma unroll
      for (int n = 0; n < kTilesN; n += 2) {
        uint32_t both[4];
        if constexpr (kB == Layout::kAlong)
          ldmatrix_x4(both, b_row + 8 * n * kStrideB + k);
        else
          ldmatrix_x4_trans(both, b_row + k * kStrideB + 8 * n);
        const uint32_t b_part[2][2] = {{both[0], both[1]}, {both[2], both[3]}};
#pragma unroll
        for (int m = 0; m < kTilesM; ++m) {
          mma_m16n8k16<T>(sums.at[m][n], a_part[m], b_part[0]);
          mma_m16n8k16<T>(sums.at[m][n + 1], a_part[m], b_part[1]);
        }
      }
    }
  } else {
    static_assert(kDepth % 4 == 0, "four values of k an access");
    // The sum of a tile's depth is taken by itself, then added: a long sum in blocks errs less.
    WarpSums<kTilesM, kTilesN> part;
    part.clear();
    const int g = lane / 4, t = lane % 4;
#pragma unroll 2
    for (int k = 0; k < kDepth; k += 4) {
      float x[kTilesM][2][4];
#pragma unroll
      for (int m = 0; m < kTilesM; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int row = 16 * m + 8 * h + g;
          if constexpr (kA == Layout::kAlong) {
            const auto pack = load_pack<float, 4>(a + row * kStrideA + k);
#pragma unroll
            for (int e = 0; e < 4; ++e) x[m][h][e] = pack.at[e];
          } else {
#pragma unroll
            for (int e = 0; e < 4; ++e) x[m][h][e] = a[(k + e) * kStrideA + row];
          }
        }
#pragma unroll
      for (int n = 0; n < kTilesN; ++n) {
        float y[2][4];
        const int column = 8 * n + 2 * t;
        if constexpr (kB == Layout::kAlong) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const auto pack = load_pack<float, 4>(b + (column + h) * kStrideB + k);
#pragma unroll
            for (int e = 0; e < 4; ++e) y[h][e] = pack.at[e];
          }
        } else {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const auto pack = load_pack<float, 2>(b + (k + e) * kStrideB + column);
            y[0][e] = pack.at[0];
            y[1][e] = pack.at[1];
          }
        }
#pragma unroll
        for (int e = 0; e < 4; ++e)
#pragma unroll
          for (int m = 0; m < kTilesM; ++m)
#pragma unroll
            for (int i = 0; i < 4; ++i)
              part.at[m][n][i] = fmaf(x[m][i / 2][e], y[i % 2][e], part.at[m][n][i]);
      }
    }
#pragma unroll
    for (int m = 0; m < kTilesM; ++m)
#pragma unroll
      for (int n = 0; n < kTilesN; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums.at[m][n][i] += part.at[m][n][i];
  }
}

// Sums as float32 rows; eight floats of padding put the eight rows of a store into banks of their
// own.
template <int kRows, int kColumns>
struct SumTile {
  static constexpr int kStride = kColumns + 8;
  static constexpr int64_t kBytes = int64_t(kRows) * kStride * 4;
};

template <int kStride, int kTilesM, int kTilesN>
__device__ __forceinline__ void store_sums(float* tile, const WarpSums<kTilesM, kTilesN>& sums) {
  const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
  for (int m = 0; m < kTilesM; ++m)
#pragma unroll
    for (int n = 0; n < kTilesN; ++n)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        store_pack<float, 2>(tile + (16 * m + 8 * h + g) * kStride + 8 * n + 2 * t,
                             {{sums.at[m][n][2 * h], sums.at[m][n][2 * h + 1]}});
}

// The piece of a tile of sums that the threads take as one of T.
template <class T>
__device__ __forceinline__ Piece<T> read_sums(const float* at) {
  Piece<T> values;
#pragma unroll
  for (int e = 0; e < kPackOf16Bytes<T>; e += 4) {
    const auto pack = load_pack<float, 4>(at + e);
#pragma unroll
    for (int i = 0; i < 4; ++i) values.at[e + i] = pack.at[i];
  }
  return values;
}

// ---- a block's warps over a tile of products ----

// kWarpsM x kWarpsN warps own equal parts of kRows x kColumns sums.
template <int kRowsOf, int kColumnsOf, int kWarpsMOf, int kWarpsNOf>
struct WarpGrid {
  static constexpr int kRows = kRowsOf, kColumns = kColumnsOf;
  static constexpr int kWarpsM = kWarpsMOf, kWarpsN = kWarpsNOf;
  static constexpr int kThreads = kWarp * kWarpsM * kWarpsN;
  static constexpr int kWarpRows = kRows / kWarpsM, kWarpColumns = kColumns / kWarpsN;
  static_assert(kRows % (16 * kWarpsM) == 0, "a warp's rows are tiles of 16");
  static_assert(kColumns % (16 * kWarpsN) == 0, "a warp's columns are pairs of tiles of 8");
  using Sums = WarpSums<kWarpRows / 16, kWarpColumns / 8>;
  __device__ static int row() { return warp_id() / kWarpsN * kWarpRows; }
  __device__ static int column() { return warp_id() % kWarpsN * kWarpColumns; }
};

// store_sums for T: f(row, column, value) of the block's sums, pairs of columns rounded to T.
template <class Grid, int kStride, class T, class F>
__device__ __forceinline__ void block_store_rounded(T* tile, const typename Grid::Sums& sums, F f) {
  const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
  for (int m = 0; m < Grid::kWarpRows / 16; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int n = 0; n < Grid::kWarpColumns / 8; ++n) {
        const int row = Grid::row() + 16 * m + 8 * h + g, column = Grid::column() + 8 * n + 2 * t;
        store_pack<T, 2>(tile + row * kStride + column,
                         {{from_float<T>(f(row, column, sums.at[m][n][2 * h])),
                           from_float<T>(f(row, column + 1, sums.at[m][n][2 * h + 1]))}});
      }
}

// Every warp its part of the tiles' product.
template <class Grid, Layout kA, Layout kB, int kDepth, int kStrideA, int kStrideB,
          Multiply kMultiply = Multiply::kFull, class T>
__device__ __forceinline__ void block_product(typename Grid::Sums& sums, const T* a, const T* b) {
  warp_product<kA, kB, kDepth, kStrideA, kStrideB, kMultiply>(
      sums, a + Grid::row() * (kA == Layout::kAlong ? kStrideA : 1),
      b + Grid::column() * (kB == Layout::kAlong ? kStrideB : 1));
}
template <class Grid, int kStride>
__device__ __forceinline__ void block_store_sums(float* tile, const typename Grid::Sums& sums) {
  store_sums<kStride>(tile + Grid::row() * kStride + Grid::column(), sums);
}

}  // namespace recsparse
