// Low-rank linear and cross layers, inner loops.
//
//   mid = input down^T + mid_bias            [B, R]
//   pre = act_mid(mid) up^T + bias           [B, O]
//   linear: output = act(pre)                cross: output = x0 * pre + input
//
// A task owns rows: it keeps act_mid(mid) of a block of them in cache and streams through the
// columns of the output with bias, activation and cross term applied as each block is ready.
#include "low_rank_kernels.h"

#include "gemm.h"
#include "vec_math.h"

namespace recsparse::RS_ISA {

// Rows of a block: 4 or 8 register tiles, so that a slice of a panel is loaded once for all of
// them, and [48, 256] float32 of an input block (48 KiB) leaves room for the panels in L2.
constexpr int64_t kRowBlock = 48;
// Columns finished at a time: a [48, 4 panels] block of sums is 24 KiB.
constexpr int64_t kColumnBlock = 4 * kPanel;

// act_mid in place on sums [rows, padded R] of ranks [first, last); mid keeps what was before it.
template <class T>
static void finish_mid(const LowRankForward<T>& p, int64_t begin, int64_t rows, int64_t first,
                       int64_t last, float* sums) {
  const int64_t stride = padded(p.rank);
  with_activation(p.mid_activation, [&](auto tag) {
    for (int64_t i = 0; i < rows; ++i) {
      float* sum = sums + i * stride + first;
      for_each_vec(last - first, [&](int64_t c, int64_t lanes) {
        Vec v = load_lanes(sum + c, lanes);
        if (p.mid_bias) v = v + load_lanes(p.mid_bias + first + c, lanes);
        if (p.mid) store_lanes(p.mid + (begin + i) * p.rank + first + c, v, lanes);
        store_lanes(sum + c, activate<decltype(tag)::value>(v), lanes);
      });
    }
  });
}

// Output columns [first, last) of rows [begin, begin + rows), from the sums [rows, *].
template <class T>
static void finish_output(const LowRankForward<T>& p, int64_t begin, int64_t rows, int64_t first,
                          int64_t last, const float* sums, int64_t sums_row) {
  const T* bias = p.bias ? p.bias + first : nullptr;
  with_activation(p.activation, [&](auto tag) {
    for (int64_t i = 0; i < rows; ++i) {
      const float* sum = sums + i * sums_row;
      const int64_t at = (begin + i) * p.out_features + first;
      for_each_vec(last - first, [&](int64_t c, int64_t lanes) {
        Vec v = load_lanes(sum + c, lanes);
        if (bias) v = v + load_lanes(bias + c, lanes);
        if (p.x0)
          v = fmadd(load_lanes(p.x0 + at + c, lanes), v, load_lanes(p.input + at + c, lanes));
        else
          v = activate<decltype(tag)::value>(v);
        store_lanes(p.output + at + c, v, lanes);
      });
    }
  });
}

template <class T>
int64_t forward_scratch(const LowRankForward<T>& p) {
  return kRowBlock * (padded(p.rank) + kDepthBlock + kColumnBlock);
}

template <class T>
void forward_rows(const LowRankForward<T>& p, int64_t begin, int64_t end, float* scratch) {
  const int64_t mid_row = padded(p.rank);
  float* mid = scratch;
  float* wide = mid + kRowBlock * mid_row;
  float* sums = wide + kRowBlock * kDepthBlock;
  for (; begin < end; begin += kRowBlock) {
    const int64_t rows = min_of(end - begin, kRowBlock);
    for (int64_t k = 0; k < p.in_features; k += kDepthBlock) {
      const int64_t depth = min_of(p.in_features - k, kDepthBlock);
      int64_t a_row;
      const float* a = as_float(p.input + begin * p.in_features + k, p.in_features, rows, depth,
                                wide, kDepthBlock, &a_row);
      gemm(a, a_row, 1, rows, p.down_panels + k * kPanel, p.in_features * kPanel, p.rank, depth,
           mid, mid_row, k > 0);
    }
    finish_mid(p, begin, rows, 0, p.rank, mid);
    for (int64_t n = 0; n < p.out_features; n += kColumnBlock) {
      const int64_t last = min_of(p.out_features, n + kColumnBlock);
      gemm(mid, mid_row, 1, rows, p.up_panels + n * p.rank, p.rank * kPanel, last - n, p.rank, sums,
           kColumnBlock, false);
      finish_output(p, begin, rows, n, last, sums, kColumnBlock);
    }
  }
}

template <class T>
void forward_few_mid(const LowRankForward<T>& p, int64_t first, int64_t last, float* mid) {
  dots(p.input, p.in_features, p.batch, p.down, p.in_features, p.in_features, first, last, mid,
       padded(p.rank));
  finish_mid(p, 0, p.batch, first, last, mid);
}

template <class T>
void forward_few_output(const LowRankForward<T>& p, int64_t first, int64_t last, const float* mid,
                        float* scratch) {
  for (int64_t n = first; n < last; n += kColumnBlock) {
    const int64_t stop = min_of(last, n + kColumnBlock);
    dots(mid, padded(p.rank), p.batch, p.up, p.rank, p.rank, n, stop, scratch - n, kColumnBlock);
    finish_output(p, 0, p.batch, n, stop, scratch, kColumnBlock);
  }
}

// act'(pre) where the activation's output alone gives it.
template <Activation kActivation>
RS_INLINE Vec activate_grad_from_output(Vec y) {
  const Vec one = broadcast(1.0f);
  if constexpr (kActivation == Activation::kRelu) return select(less(zero(), y), one, zero());
  if constexpr (kActivation == Activation::kSigmoid) return y * (one - y);
  if constexpr (kActivation == Activation::kTanh) return fnmadd(y, y, one);
  return one;
}

// Gradient at the pre-activation, columns [first, last) of a block of rows, into grads [rows, depth
// block]; also what depends on the pre-activation alone (grad_x0). `pre` holds act_mid(mid) up^T
// where it is needed.
template <class T>
static void finish_grad_pre(const LowRankBackward<T>& p, int64_t begin, int64_t rows, int64_t first,
                            int64_t last, const float* pre, float* grads) {
  with_activation(p.activation, [&](auto tag) {
    constexpr Activation kActivation = decltype(tag)::value;
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t at = (begin + i) * p.out_features + first;
      for_each_vec(last - first, [&](int64_t c, int64_t lanes) {
        Vec grad = load_lanes(p.grad_output + at + c, lanes);
        if (p.x0) {
          if (p.grad_x0) {
            Vec value = load_lanes(pre + i * kDepthBlock + c, lanes);
            if (p.bias) value = value + load_lanes(p.bias + first + c, lanes);
            store_lanes(p.grad_x0 + at + c, grad * value, lanes);
          }
          grad = grad * load_lanes(p.x0 + at + c, lanes);
        } else if constexpr (kActivation == Activation::kGelu || kActivation == Activation::kSilu) {
          Vec value = load_lanes(pre + i * kDepthBlock + c, lanes);
          if (p.bias) value = value + load_lanes(p.bias + first + c, lanes);
          grad = grad * activate_grad<kActivation>(value);
        } else if constexpr (kActivation != Activation::kNone) {
          grad =
              grad * activate_grad_from_output<kActivation>(load_lanes(p.output + at + c, lanes));
        }
        if (p.grad_pre) store_lanes(p.grad_pre + at + c, grad, lanes);
        store_lanes(grads + i * kDepthBlock + c, grad, lanes);
      });
    }
  });
}

template <class T>
int64_t backward_scratch(const LowRankBackward<T>&) {
  return kRowBlock * (2 * kDepthBlock + kColumnBlock);
}

template <class T>
void backward_rows(const LowRankBackward<T>& p, int64_t begin, int64_t end, float* scratch) {
  const int64_t mid_row = padded(p.rank);
  float* grads = scratch;
  float* pre = grads + kRowBlock * kDepthBlock;
  float* sums = pre + kRowBlock * kDepthBlock;
  const bool direct = !p.x0 && p.activation == Activation::kNone;
  for (; begin < end; begin += kRowBlock) {
    const int64_t rows = min_of(end - begin, kRowBlock);
    float* mid_active = p.mid_active + begin * mid_row;
    float* grad_mid = p.grad_mid + begin * mid_row;
    with_activation(p.mid_activation, [&](auto tag) {
      for (int64_t i = 0; i < rows; ++i)
        for_each_vec(p.rank, [&](int64_t c, int64_t lanes) {
          const Vec v = load_lanes(p.mid + (begin + i) * p.rank + c, lanes);
          store_lanes(mid_active + i * mid_row + c, activate<decltype(tag)::value>(v), lanes);
        });
    });
    for (int64_t n = 0; n < p.out_features; n += kDepthBlock) {
      const int64_t depth = min_of(p.out_features - n, kDepthBlock);
      int64_t a_row = kDepthBlock;
      const float* a = grads;
      if (direct) {
        a = as_float(p.grad_output + begin * p.out_features + n, p.out_features, rows, depth, grads,
                     kDepthBlock, &a_row);
      } else {
        if (p.up_panels_again)
          gemm(mid_active, mid_row, 1, rows, p.up_panels_again + n * p.rank, p.rank * kPanel, depth,
               p.rank, pre, kDepthBlock, false);
        finish_grad_pre(p, begin, rows, n, n + depth, pre, grads);
      }
      gemm(a, a_row, 1, rows, p.up_panels + n * kPanel, p.out_features * kPanel, p.rank, depth,
           grad_mid, mid_row, n > 0);
    }
    with_activation(p.mid_activation, [&](auto tag) {
      if constexpr (decltype(tag)::value == Activation::kNone) return;
      for (int64_t i = 0; i < rows; ++i)
        for_each_vec(p.rank, [&](int64_t c, int64_t lanes) {
          const Vec v = load_lanes(p.mid + (begin + i) * p.rank + c, lanes);
          float* grad = grad_mid + i * mid_row + c;
          store_lanes(grad, load_lanes(grad, lanes) * activate_grad<decltype(tag)::value>(v),
                      lanes);
        });
    });
    if (!p.grad_input) continue;
    for (int64_t n = 0; n < p.in_features; n += kColumnBlock) {
      const int64_t columns = min_of(p.in_features - n, kColumnBlock);
      gemm(grad_mid, mid_row, 1, rows, p.down_panels + n * p.rank, p.rank * kPanel, columns, p.rank,
           sums, kColumnBlock, false);
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t at = (begin + i) * p.in_features + n;
        for_each_vec(columns, [&](int64_t c, int64_t lanes) {
          Vec v = load_lanes(sums + i * kColumnBlock + c, lanes);
          if (p.x0) v = v + load_lanes(p.grad_output + at + c, lanes);
          store_lanes(p.grad_input + at + c, v, lanes);
        });
      }
    }
  }
}

template <class T>
int64_t columns_scratch(const LowRankColumns<T>& p) {
  return kColumnBlock * (kDepthBlock + 1) + p.rank * kColumnBlock;
}

// Columns [begin, end), the whole batch in order.
template <class T>
void columns(const LowRankColumns<T>& p, int64_t begin, int64_t end, float* scratch) {
  const int64_t factor_row = padded(p.rank);
  float* panels = scratch;
  float* totals = panels + kColumnBlock * kDepthBlock;
  float* sums = totals + kColumnBlock;
  for (; begin < end; begin += kColumnBlock) {
    const int64_t count = min_of(end - begin, kColumnBlock);
    for (int64_t c = 0; c < kColumnBlock; c += kLanes) store(totals + c, zero());
    for (int64_t r = 0; p.batch == 0 && r < p.rank * kColumnBlock; r += kLanes)
      store(sums + r, zero());
    for (int64_t k = 0; k < p.batch; k += kDepthBlock) {
      const int64_t depth = min_of(p.batch - k, kDepthBlock);
      for (int64_t i = 0; i < depth; ++i) {
        const int64_t at = (k + i) * p.columns + begin;
        for_each_vec(count, [&](int64_t c, int64_t lanes) {
          Vec v = load_lanes(p.source + at + c, lanes);
          if (p.source_scale) v = v * load_lanes(p.source_scale + at + c, lanes);
          store(panels + (c / kPanel * kDepthBlock + i) * kPanel + c % kPanel, v);
        });
      }
      for (int64_t c = 0; p.column_sum && c < count; c += kLanes) {
        const float* panel = panels + c / kPanel * kDepthBlock * kPanel + c % kPanel;
        store(totals + c, load(totals + c) + sum_column(panel, kPanel, depth));
      }
      gemm(p.factor + k * factor_row, 1, factor_row, p.rank, panels, kDepthBlock * kPanel, count,
           depth, sums, kColumnBlock, k > 0);
    }
    if (p.column_sum)
      for_each_vec(count, [&](int64_t c, int64_t lanes) {
        store_lanes(p.column_sum + begin + c, load(totals + c), lanes);
      });
    if (!p.out) continue;
    for (int64_t r = 0; r < p.rank; ++r) {
      if (p.out_by_column) {
        for (int64_t c = 0; c < count; ++c)
          p.out[(begin + c) * p.rank + r] = from_float<T>(sums[r * kColumnBlock + c]);
      } else {
        for_each_vec(count, [&](int64_t c, int64_t lanes) {
          const Vec v = load_lanes(sums + r * kColumnBlock + c, lanes);
          store_lanes(p.out + r * p.columns + begin + c, v, lanes);
        });
      }
    }
  }
}

template <class T>
void sum_rows(const float* matrix, int64_t row, int64_t rows, int64_t n, T* out) {
  for_each_vec(n, [&](int64_t c, int64_t lanes) {
    Vec total = zero();  // whole vectors may be read: rows are padded
    for (int64_t i = 0; i < rows; i += kDepthBlock)
      total = total + sum_column(matrix + i * row + c, row, min_of(rows - i, kDepthBlock));
    store_lanes(out + c, total, lanes);
  });
}

template <class T>
const LowRankKernels<T>& low_rank_kernels() {
  static constexpr LowRankKernels<T> table = {kPanel,
                                              kRowBlock,
                                              kColumnBlock,
                                              &pack_panels<T>,
                                              &forward_scratch<T>,
                                              &forward_rows<T>,
                                              &forward_few_mid<T>,
                                              &forward_few_output<T>,
                                              &backward_scratch<T>,
                                              &backward_rows<T>,
                                              &columns_scratch<T>,
                                              &columns<T>,
                                              &sum_rows<T>};
  return table;
}
RS_INSTANTIATE_KERNEL_TABLE(LowRankKernels, low_rank_kernels)

}  // namespace recsparse::RS_ISA
