// Tiled products that the low-rank ops are made of where a kernel of their own does not fit.
//
//   out[m, n] = finish(sum_k load(a)(m, k) act(b)(n, k) + bias_scale[m] bias[n])
//   sums[m]   = sum_k sum_scale[k] load(a)(m, k)
//
// a lies as [M, K] (Layout::kAlong) or [K, M] (kAcross), b as [N, K] or [K, N]; out [M, N]. A
// weight gradient, out[n, r] = sum_b p[b, n] q[b, r], has both across.
#pragma once

#include "../activation.h"
#include "mma_tile.cuh"

namespace recsparse::low_rank {

// What is done to a as it is loaded ...
enum class Load {
  kPlain,
  kActivated,      // activation(a)
  kSlopeOfOutput,  // a * slope of the activation whose output is factor
  kTimes,          // a * factor
};
// ... and to the sum at the end, with e and f of the shape of out
enum class Finish {
  kSum,         // activation(sum)
  kCross,       // e * sum + f
  kGradSum,     // e * slope(sum)
  kTimesSlope,  // sum * slope(e)
  kProduct,     // e * sum
  kPlus,        // sum + e
};

template <class T>
struct Product {
  Matrix<T> a, b;
  const T* factor = nullptr;  // laid out as a
  Load load = Load::kPlain;
  Activation load_activation = Activation::kNone, b_activation = Activation::kNone;
  const uint8_t* row_mask = nullptr;  // [rows of a in memory]: those that count
  const T* bias = nullptr;            // [N]
  const float* bias_scale = nullptr;  // [M]
  Finish finish = Finish::kSum;
  Activation activation = Activation::kNone;
  const T *e = nullptr, *f = nullptr;  // [M, N]
  T* out = nullptr;                    // [M, N], or null: only the sums
  T* sums = nullptr;                   // [M], a across
  const float* sum_scale = nullptr;    // [K]
  // set by run_product
  int64_t m = 0, n = 0, k = 0, k_each = 0;
  int out_width = 0;
  float *out_parts = nullptr, *sums_parts = nullptr;  // [S, M, N] and [S, M] where k is split
};

// Runs it, with k split into at most `most_parts` parts where out alone cannot fill the GPU; parts
// are added in a fixed order.
template <Layout kA, Layout kB, class T>
void run_product(const Stream& stream, Product<T> product, int64_t most_parts);

}  // namespace recsparse::low_rank
