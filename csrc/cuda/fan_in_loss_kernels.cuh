// Multi-label losses over fixed fan-in logits on CUDA, on top of a tile of logits in shared memory.
//   BCE             sum log(1 + e^z) - t z
//   squared hinge   sum max(0, 1 - (2t - 1) z)^2
// The positives of a chunk of labels are bits, [labels, words], 32 rows of the batch in a word.
#pragma once

#include "fan_in_tiles_kernels.cuh"

namespace recsparse {

enum LossKind : int { kBce = 0, kSquaredHinge = 1 };

struct LossTerm {
  float value, slope;  // slope: derivative by z
};
__device__ __forceinline__ LossTerm loss_term(float z, bool positive, int kind) {  // NaN stays NaN
  if (kind == kBce) {
    const float e = expf(-fabsf(z));
    const float towards = positive ? -z : z;  // sigmoid(z) - 1 = -sigmoid(-z), no cancellation
    const float sigmoid = (towards < 0.0f ? e : 1.0f) / (1.0f + e);
    return {(z > 0.0f ? z : 0.0f) - (positive ? z : 0.0f) + log1pf(e),
            z != z ? z : (positive ? -sigmoid : sigmoid)};
  }
  const float sign = positive ? -1.0f : 1.0f, margin = 1.0f + sign * z;
  const float counted = margin < 0.0f ? 0.0f : margin;
  return {counted * counted, 2.0f * sign * counted};
}

template <class T>
struct LossTerms {
  const uint32_t* positives;  // [labels of the chunk, words]
  int64_t words, first_label;
  int kind;
  float grad_scale;
  T* grad;       // [labels of the chunk, pitch]: slopes times grad_scale; or null
  double* sums;  // of each tile; or null

  // Of one logit, to which the bias is still to be added.
  __device__ __forceinline__ LossTerm term(const FanInLayer<T>& layer, int64_t label, int64_t row,
                                           float z) const {
    const uint32_t word = positives[(label - first_label) * words + row / 32];
    return loss_term(z + bias_of(layer, label), word >> (row % 32) & 1, kind);
  }

  __device__ void operator()(const FanInLayer<T>& layer, const TileLabels& at, int64_t first_row,
                             int rows, const float* z, int pitch, int64_t tile) const {
    constexpr int kVector = kPackOf16Bytes<T>;
    const int padded = (rows + kVector - 1) / kVector * kVector;
    double sum = 0.0;
    for (int i = int(threadIdx.x); i < at.count * padded; i += int(blockDim.x)) {
      const int o = i / padded, b = i % padded;
      const int64_t label = at.first + o, row = first_row + b;
      const LossTerm found =
          b < rows ? term(layer, label, row, z[o * pitch + b]) : LossTerm{0.0f, 0.0f};
      sum += double(found.value);
      if (grad)
        grad[(label - first_label) * layer.pitch + row] = from_float<T>(found.slope * grad_scale);
    }
    if (sums) {
      sum = block_sum(sum);
      if (threadIdx.x == 0) sums[tile] = sum;
    }
  }
};

static __global__ void clear_words_kernel(uint32_t* words, int64_t count) {
  const int64_t i = int64_t(blockIdx.x) * kLabelThreads + threadIdx.x;
  if (i < count) words[i] = 0;
}

// One thread a positive: sets the bit of those of labels [first_label, first_label + count).
template <class Offset, class Label>
__global__ void mark_positives_kernel(const Offset* offsets, const Label* labels, int64_t batch,
                                      int64_t positives, int64_t first_label, int64_t count,
                                      int64_t words, uint32_t* bits) {
  const int64_t i = int64_t(blockIdx.x) * kLabelThreads + threadIdx.x;
  if (i >= positives) return;
  const int64_t label = int64_t(labels[i]) - first_label;
  if (label < 0 || label >= count) return;
  int64_t low = 0, high = batch + 1;  // the first offset above i is that of the next row
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (int64_t(offsets[middle]) <= i) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  const int64_t row = low - 1;
  if (row < 0 || row >= batch) return;
  atomicOr(bits + label * words + row / 32, 1u << (row % 32));  // in any order the same
}

// loss = factor * sum of the tiles' sums. One block.
static __global__ void sum_losses_kernel(const double* sums, int64_t count, double factor,
                                         float* loss) {
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) sum += sums[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) *loss = float(sum * factor);
}

#ifndef RS_CUDA_ON_CPU
template <class Offset>
__global__ void assert_positives_kernel(const Offset* offsets, int64_t batch, int64_t positives) {
  const int64_t b = int64_t(blockIdx.x) * kLabelThreads + threadIdx.x;
  if (b > batch) return;
  assert((b > 0 || offsets[b] == 0) && "recsparse_kernels: offsets must start at 0");
  assert((b == 0 || offsets[b] >= offsets[b - 1]) && "recsparse_kernels: offsets must not descend");
  assert((b < batch || int64_t(offsets[b]) == positives) &&
         "recsparse_kernels: offsets must end at the number of labels");
}
#endif

}  // namespace recsparse
