// 2:4 masks, compress, decompress and linear on the CPU: sizes, memory and threads around the inner
// loops of sparse24_*_kernels.cpp.
#include "../sparse24.h"

#include <torch/csrc/stable/library.h>

#include <atomic>
#include <tuple>

#include "dispatch.h"
#include "huge_pages.h"
#include "sparse24_kernels.h"

namespace recsparse {
namespace {

constexpr int64_t kPackedBytes = 8 << 20;  // panels of a batch packed at a time: stays in cache
constexpr int64_t kLeastPackedBytes = 1 << 20;
constexpr int64_t kPackColumns = 256;           // columns packed by one task
constexpr int64_t kColumnBlock = 256;           // columns of one gradient task
constexpr int64_t kSmallBatchInput = 32;        // rows up to which building lists does not pay
constexpr double kMulAddsPerThread = 64 << 10;  // hides a thread hand-off
constexpr int64_t kChunkBytes = 24 * 1024;      // panel bytes that stay in L1 (a list chunk)

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Tasks that one thread must have at least, each of so many multiply-adds.
int64_t grain(double mul_adds_of_task) {
  return std::max<int64_t>(1, int64_t(kMulAddsPerThread / std::max(mul_adds_of_task, 1.0)));
}

// Rows may be strided, columns not.
Tensor with_unit_columns(const Tensor& t) {
  return t.size(1) <= 1 || t.stride(1) == 1 ? t : torch::stable::contiguous(t);
}

// The rows of a batch cut into panels of at most panel_vecs vectors, packed group by group.
class Panels {
 public:
  Panels(int64_t batch, int64_t columns, int lanes, int most_vecs, int64_t bytes = kPackedBytes)
      : lanes_(lanes), most_vecs_(most_vecs), batch_(batch), columns_(columns) {
    const int64_t rows = panel_rows();
    const int64_t fit = bytes / std::max<int64_t>(1, rows * columns * 4);
    group_ = std::clamp<int64_t>(fit, 1, std::max<int64_t>(1, ceil_div(batch, rows)));
  }

  int64_t panel_rows() const { return int64_t(lanes_) * most_vecs_; }
  int64_t groups() const { return ceil_div(batch_, group_ * panel_rows()); }
  int64_t panels(int64_t group) const {
    return std::min(group_, ceil_div(batch_, panel_rows()) - group * group_);
  }
  int64_t first_row(int64_t group, int64_t panel) const {
    return (group * group_ + panel) * panel_rows();
  }
  int64_t rows(int64_t group, int64_t panel) const {
    return std::min(panel_rows(), batch_ - first_row(group, panel));
  }
  // 1, 2, 4 or 8: panel rows are a power of two
  int vecs(int64_t group, int64_t panel) const {
    const int64_t wanted = ceil_div(rows(group, panel), lanes_);
    int vecs = 1;
    while (vecs < wanted) vecs *= 2;
    return vecs;
  }
  int64_t offset(int64_t panel) const { return panel * panel_rows() * columns_; }
  int64_t scratch_floats() const {  // the last panel of a group may be narrow
    const int64_t whole = group_ - 1;
    return offset(whole) + int64_t(vecs(0, std::min(group_, panels(0)) - 1)) * lanes_ * columns_ +
           (groups() > 1 ? panel_rows() * columns_ : 0);
  }

 private:
  int lanes_, most_vecs_;
  int64_t batch_, columns_, group_;
};

// Bytes for packed panels where an op's scratch shall not pass its inputs and outputs, which take
// `held`, and `taken` is scratch for other things.
int64_t packed_bytes(int64_t held, int64_t taken) {
  return std::clamp(held - taken, kLeastPackedBytes, kPackedBytes);
}

// Packs one group of x [batch, valid] into scratch; panels of x and of the gradient have equal
// rows.
template <class T>
void pack_group(const Sparse24LinearKernels<T>& kernels, const Panels& plan, int64_t group,
                const Tensor& x, int64_t padded, float* scratch) {
  const int64_t blocks = ceil_div(padded, kPackColumns);
  parallel_for(plan.panels(group) * blocks, grain(double(plan.panel_rows()) * kPackColumns),
               [&](int64_t begin, int64_t end) {
                 for (int64_t task = begin; task < end; ++task) {
                   const int64_t panel = task / blocks, from = task % blocks * kPackColumns;
                   kernels.pack_panel(data<T>(x) + plan.first_row(group, panel) * x.stride(0),
                                      x.stride(0), plan.rows(group, panel), x.size(1), from,
                                      std::min(padded, from + kPackColumns),
                                      plan.vecs(group, panel), scratch + plan.offset(panel));
                 }
               });
}

// Few rows as float, zero up to a multiple of the widest step, with rows of zeros up to a whole
// number of kernel batches.
template <class T>
class WideRows {
 public:
  explicit WideRows(const Tensor& x)
      : stride(ceil_div(x.size(1), 32) * 32),
        rows(ceil_div(x.size(0), kSmallBatch) * kSmallBatch),
        floats_(rows * stride) {
    for (int64_t r = 0; r < rows; ++r) {
      const bool present = r < x.size(0);
      sparse24_linear_kernels<T>().widen_row(present ? data<T>(x) + r * x.stride(0) : data<T>(x),
                                             present ? x.size(1) : 0, stride,
                                             floats_.get() + r * stride);
    }
  }
  const float* row(int64_t r) { return floats_.get() + r * stride; }

  const int64_t stride, rows;

 private:
  Scratch<float> floats_;
};

// Outputs of one task, fewer where there would not be two tasks for every thread.
int64_t output_block(int64_t panels, int64_t outputs) {
  const int64_t wanted = 2 * int64_t(torch::stable::get_num_threads());
  int64_t block = kOutputBlock;
  while (block > 16 && panels * ceil_div(outputs, block) < wanted) block /= 2;
  return block;
}

template <class T>
void linear_few_rows(const Sparse24Sizes& size, const Tensor& x, const Tensor& values,
                     const Tensor& metadata, const T* bias, Activation activation, T* output,
                     T* sum) {
  const auto& kernels = sparse24_linear_kernels<T>();
  const int64_t kept = size.padded / 2;
  WideRows<T> rows(x);
  const int64_t block = output_block(1, size.out_features);
  parallel_for(ceil_div(size.out_features, block), grain(double(block) * double(kept * size.batch)),
               [&](int64_t begin, int64_t end) {
                 const int64_t first = begin * block;
                 const int64_t count = std::min(size.out_features, end * block) - first;
                 for (int64_t b = 0; b < size.batch; b += kSmallBatch) {
                   const int64_t at = b * size.out_features + first;
                   kernels.linear_rows(rows.row(b), rows.stride,
                                       int(std::min<int64_t>(kSmallBatch, size.batch - b)),
                                       size.padded, data<T>(values) + first * kept,
                                       data<uint8_t>(metadata) + first * (kept / 4), count,
                                       bias ? bias + first : nullptr, activation, output + at,
                                       sum ? sum + at : nullptr, size.out_features);
                 }
               });
}

template <class T>
void linear_panels(const Sparse24Sizes& size, const Tensor& x, const Tensor& values,
                   const Tensor& metadata, const T* bias, Activation activation, T* output,
                   T* sum) {
  const auto& kernels = sparse24_linear_kernels<T>();
  const int64_t kept = size.padded / 2;
  const Panels plan(size.batch, size.padded, kernels.lanes, kernels.panel_vecs);
  Scratch<float> packed(plan.scratch_floats());
  for (int64_t group = 0; group < plan.groups(); ++group) {
    pack_group(kernels, plan, group, x, size.padded, packed.get());
    const int64_t panels = plan.panels(group);
    const int64_t block = output_block(panels, size.out_features);
    const int64_t blocks = ceil_div(size.out_features, block);
    parallel_for(panels * blocks, grain(double(block * plan.rows(group, 0)) * double(kept)),
                 [&](int64_t begin, int64_t end) {
                   Scratch<float> tile(kOutputBlock * plan.panel_rows());
                   Scratch<float> weights(kOutputBlock * 256);
                   for (int64_t task = begin; task < end; ++task) {
                     const int64_t panel = task / blocks, first = task % blocks * block;
                     const int64_t count = std::min(block, size.out_features - first);
                     const int vecs = plan.vecs(group, panel);
                     kernels.linear_panel(packed.get() + plan.offset(panel), vecs, size.padded,
                                          data<T>(values) + first * kept,
                                          data<uint8_t>(metadata) + first * (kept / 4), count,
                                          tile.get(), weights.get());
                     const int64_t at = plan.first_row(group, panel) * size.out_features + first;
                     kernels.unpack_tile(tile.get(), vecs, plan.rows(group, panel), count,
                                         bias ? bias + first : nullptr, activation, output + at,
                                         sum ? sum + at : nullptr, size.out_features);
                   }
                 });
  }
}

std::tuple<Tensor, Tensor> sparse24_linear(const Tensor& input, const Tensor& values,
                                           const Tensor& metadata,
                                           const std::optional<Tensor>& bias, int64_t activation,
                                           bool keep_sum, bool /*transposable*/) {
  const Sparse24Sizes size = check_sparse24_linear(input, values, metadata, bias, activation);
  const Tensor x = with_unit_columns(input);
  const Tensor v = torch::stable::contiguous(values), m = torch::stable::contiguous(metadata);
  const std::optional<Tensor> b =
      bias ? std::optional<Tensor>(torch::stable::contiguous(*bias)) : std::nullopt;
  Tensor output = torch::stable::new_empty(input, {size.batch, size.out_features});
  expect_first_touch(output);
  Tensor sum = keep_sum ? torch::stable::new_empty(input, {size.batch, size.out_features})
                        : torch::stable::new_empty(input, {0});
  if (size.batch == 0 || size.out_features == 0) return {output, sum};
  with_float_type(input.scalar_type(), "input", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto run = size.batch <= kSmallBatch ? linear_few_rows<T> : linear_panels<T>;
    run(size, x, v, m, b ? data<T>(*b) : nullptr, Activation(activation), mutable_data<T>(output),
        keep_sum ? mutable_data<T>(sum) : nullptr);
  });
  return {output, sum};
}

std::tuple<Tensor, Tensor> sparse24_linear_ste(
    const Tensor& input, const Tensor& weight, const Tensor& values, const Tensor& metadata,
    const std::optional<Tensor>& /*values_t*/, const std::optional<Tensor>& /*metadata_t*/,
    const std::optional<Tensor>& bias, int64_t activation, bool keep_sum, double /*decay*/) {
  check_dim(weight, 2, "weight", "[O, I], two-dimensional");
  return sparse24_linear(input, values, metadata, bias, activation, keep_sum, false);
}

// The transposed weights of a block of outputs, as lists (sparse24_kernels.h), for all blocks.
template <class T>
struct Lists {
  Lists(const Sparse24Sizes& size, const Tensor& values, const Tensor& metadata, int64_t outputs)
      : outputs(outputs),
        blocks(ceil_div(size.out_features, outputs)),
        starts(blocks * (size.padded + 1)),
        entries(size.out_features * (size.padded / 2)),
        rows(size.out_features * (size.padded / 2)) {
    const int64_t kept = size.padded / 2;
    parallel_for(blocks, 1, [&](int64_t begin, int64_t end) {
      Scratch<int32_t> cursor(size.padded);
      for (int64_t block = begin; block < end; ++block) {
        const int64_t first = block * outputs;
        sparse24_grad_kernels<T>().build_lists(
            data<T>(values) + first * kept, data<uint8_t>(metadata) + first * (kept / 4),
            size.padded, std::min(outputs, size.out_features - first),
            starts.get() + block * (size.padded + 1), entries.get() + first * kept,
            rows.get() + first * kept, cursor.get());
      }
    });
  }

  const int64_t outputs, blocks;
  Scratch<int32_t> starts;
  Scratch<float> entries;
  Scratch<uint8_t> rows;
};

template <class T>
void grad_input_panels(const Sparse24Sizes& size, const Tensor& grad, const Tensor& values,
                       const Tensor& metadata, T* out) {
  const auto& kernels = sparse24_linear_kernels<T>();
  const auto& grads = sparse24_grad_kernels<T>();
  const int64_t kept = size.padded / 2, columns = ceil_div(size.out_features, 16) * 16;
  const int64_t held = size.batch * (size.in_features + size.out_features) * int64_t(sizeof(T)) +
                       size.out_features * kept * int64_t(sizeof(T));
  const int64_t listed = size.out_features * kept * int64_t(sizeof(float) + sizeof(uint8_t));
  const Panels plan(size.batch, columns, kernels.lanes, kernels.panel_vecs,
                    packed_bytes(held, listed));
  Scratch<float> packed(plan.scratch_floats());
  Lists<T> lists(size, values, metadata, kChunkBytes / 4 / plan.panel_rows());
  for (int64_t group = 0; group < plan.groups(); ++group) {
    pack_group(kernels, plan, group, grad, columns, packed.get());
    const int64_t panels = plan.panels(group);
    const int64_t block = output_block(panels, size.in_features);
    const int64_t blocks = ceil_div(size.in_features, block);
    parallel_for(
        panels * blocks, grain(double(block * plan.rows(group, 0)) * double(size.out_features / 2)),
        [&](int64_t begin, int64_t end) {
          Scratch<float> tile(kOutputBlock * plan.panel_rows());
          for (int64_t task = begin; task < end; ++task) {
            const int64_t panel = task / blocks, first = task % blocks * block;
            const int64_t count = std::min(block, size.in_features - first);
            const int vecs = plan.vecs(group, panel);
            for (int64_t i = 0; i < lists.blocks; ++i) {
              const int64_t o = i * lists.outputs;
              grads.accumulate_lists(packed.get() + plan.offset(panel) + o * vecs * kernels.lanes,
                                     vecs, lists.starts.get() + i * (size.padded + 1) + first,
                                     lists.entries.get() + o * kept, lists.rows.get() + o * kept,
                                     count, tile.get(), i == 0);
            }
            kernels.unpack_tile(tile.get(), vecs, plan.rows(group, panel), count, nullptr,
                                Activation::kNone,
                                out + plan.first_row(group, panel) * size.in_features + first,
                                nullptr, size.in_features);
          }
        });
  }
}

template <class T>
void grad_input_few_rows(const Sparse24Sizes& size, const Tensor& grad, const Tensor& values,
                         const Tensor& metadata, T* out) {
  const auto& grads = sparse24_grad_kernels<T>();
  const int64_t blocks = ceil_div(size.padded, kColumnBlock);
  const double work = double(kColumnBlock / 2) * double(size.batch * size.out_features);
  parallel_for(blocks, grain(work), [&](int64_t begin, int64_t end) {
    Scratch<float> sums(kSmallBatch * (kColumnBlock + 32));
    for (int64_t block = begin; block < end; ++block)
      for (int64_t b = 0; b < size.batch; b += kSmallBatch)
        grads.grad_input_rows(data<T>(grad) + b * grad.stride(0), grad.stride(0),
                              int(std::min<int64_t>(kSmallBatch, size.batch - b)), data<T>(values),
                              data<uint8_t>(metadata), size.padded, size.out_features,
                              block * kColumnBlock,
                              std::min(size.padded, (block + 1) * kColumnBlock), sums.get(),
                              out + b * size.in_features, size.in_features, size.in_features);
  });
}

Tensor sparse24_linear_grad_input(const Tensor& grad_sum, const Tensor& values,
                                  const Tensor& metadata, int64_t in_features) {
  const Sparse24Sizes size = check_sparse24_grad_input(grad_sum, values, metadata, in_features);
  const Tensor grad = with_unit_columns(grad_sum);
  const Tensor v = torch::stable::contiguous(values), m = torch::stable::contiguous(metadata);
  Tensor out = size.out_features == 0
                   ? torch::stable::new_zeros(grad_sum, {size.batch, in_features})
                   : torch::stable::new_empty(grad_sum, {size.batch, in_features});
  if (size.batch == 0 || in_features == 0 || size.out_features == 0) return out;
  with_float_type(grad_sum.scalar_type(), "grad_sum", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto run = size.batch <= kSmallBatchInput ? grad_input_few_rows<T> : grad_input_panels<T>;
    run(size, grad, v, m, mutable_data<T>(out));
  });
  return out;
}

template <class T>
void grad_values_few_rows(const Sparse24Sizes& size, const Tensor& grad, const Tensor& x,
                          const Tensor& metadata, T* out) {
  const int64_t kept = size.padded / 2;
  WideRows<T> rows(x), grads(grad);
  parallel_for(
      size.out_features, grain(double(kept * size.batch)), [&](int64_t begin, int64_t end) {
        sparse24_grad_kernels<T>().grad_values_rows(grads.row(0) + begin, grads.stride, rows.row(0),
                                                    rows.stride, int(size.batch),
                                                    data<uint8_t>(metadata) + begin * (kept / 4),
                                                    size.padded, end - begin, out + begin * kept);
      });
}

template <class T>
void grad_values_panels(const Sparse24Sizes& size, const Tensor& grad, const Tensor& x,
                        const Tensor& metadata, T* out) {
  const auto& kernels = sparse24_linear_kernels<T>();
  const auto& grads = sparse24_grad_kernels<T>();
  const int64_t kept = size.padded / 2, grad_columns = ceil_div(size.out_features, 16) * 16;
  // one plan for both, so that their panels hold the same rows
  const int64_t held = size.batch * (size.in_features + size.out_features) * int64_t(sizeof(T)) +
                       size.out_features * kept * int64_t(sizeof(T));
  const int64_t totals = size.out_features * kept * int64_t(sizeof(float));
  const Panels plan(size.batch, std::max(size.padded, grad_columns), kernels.lanes,
                    kernels.panel_vecs, packed_bytes(held / 2, totals / 2));
  Scratch<float> packed_x(plan.scratch_floats()), packed_grad(plan.scratch_floats());
  // sums over the groups of panels, where there is more than one
  Scratch<float> total(plan.groups() > 1 ? size.out_features * kept : 0);
  const int64_t across = ceil_div(size.padded, kColumnBlock);
  const int64_t down = ceil_div(size.out_features, kOutputBlock);
  for (int64_t group = 0; group < plan.groups(); ++group) {
    pack_group(kernels, plan, group, x, size.padded, packed_x.get());
    pack_group(kernels, plan, group, grad, grad_columns, packed_grad.get());
    const bool last = group + 1 == plan.groups();
    parallel_for(
        across * down, grain(double(kOutputBlock * kColumnBlock / 2) * double(size.batch)),
        [&](int64_t begin, int64_t end) {
          Scratch<float> sums(kOutputBlock * kColumnBlock / 2);
          for (int64_t task = begin; task < end; ++task) {
            const int64_t first = task / across * kOutputBlock,
                          column = task % across * kColumnBlock;
            const int64_t count = std::min<int64_t>(kOutputBlock, size.out_features - first);
            const int64_t column_end = std::min(size.padded, column + kColumnBlock);
            const int64_t width = (column_end - column) / 2;
            for (int64_t o = 0; o < count; ++o)
              for (int64_t k = 0; k < width; ++k)
                sums[o * width + k] = group ? total[(first + o) * kept + column / 2 + k] : 0.0f;
            for (int64_t panel = 0; panel < plan.panels(group); ++panel) {
              const int vecs = plan.vecs(group, panel);
              grads.grad_values_panel(
                  packed_grad.get() + plan.offset(panel) + first * vecs * kernels.lanes,
                  packed_x.get() + plan.offset(panel), vecs,
                  data<uint8_t>(metadata) + first * (kept / 4), size.padded, count, column,
                  column_end, sums.get(), width);
            }
            for (int64_t o = 0; o < count; ++o) {
              const int64_t at = (first + o) * kept + column / 2;
              if (last) {
                grads.narrow_row(sums.get() + o * width, width, out + at);
              } else {
                std::copy_n(sums.get() + o * width, width, total.get() + at);
              }
            }
          }
        });
  }
}

Tensor sparse24_linear_grad_values(const Tensor& grad_sum, const Tensor& input,
                                   const Tensor& metadata) {
  const Sparse24Sizes size = check_sparse24_grad_values(grad_sum, input, metadata);
  const Tensor grad = with_unit_columns(grad_sum), x = with_unit_columns(input);
  const Tensor m = torch::stable::contiguous(metadata);
  if (size.batch == 0) return torch::stable::new_zeros(input, {size.out_features, size.padded / 2});
  Tensor out = torch::stable::new_empty(input, {size.out_features, size.padded / 2});
  if (out.numel() == 0) return out;
  with_float_type(input.scalar_type(), "input", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto run = size.batch <= kSmallBatch ? grad_values_few_rows<T> : grad_values_panels<T>;
    run(size, grad, x, m, mutable_data<T>(out));
  });
  return out;
}

constexpr double kMulAddsPerColumn = 4;  // what packing an element costs, for the grain

Tensor sparse24_mask(const Tensor& weight, bool transposable) {
  check_dim(weight, 2, "weight", "[O, I], two-dimensional");
  const Tensor w = with_unit_columns(weight);
  const int64_t rows = w.size(0), columns = w.size(1);
  Tensor mask = torch::stable::new_empty(weight, {rows, columns}, ScalarType::Bool);
  with_float_type(weight.scalar_type(), "weight", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto& kernels = sparse24_pack_kernels<T>();
    const auto run = transposable ? kernels.mask_tiles : kernels.mask_rows;
    parallel_for(ceil_div(rows, 4), grain(16 * kMulAddsPerColumn * double(columns)),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t r = begin * 4; r < std::min(rows, end * 4); r += 4)
                     run(data<T>(w) + r * w.stride(0), w.stride(0), std::min<int64_t>(4, rows - r),
                         columns, mutable_data<bool>(mask) + r * columns);
                 });
  });
  return mask;
}

std::tuple<Tensor, Tensor> sparse24_compress(const Tensor& weight, const Tensor& mask) {
  check_sparse24_mask(weight, mask);
  const int64_t rows = weight.size(0), columns = weight.size(1);
  const Tensor w = with_unit_columns(weight), kept = with_unit_columns(mask);
  const int64_t padded = sparse24_padded(columns);
  Tensor values = torch::stable::new_empty(weight, {rows, padded / 2});
  Tensor metadata = torch::stable::new_empty(weight, {rows, padded / 8}, ScalarType::Byte);
  std::atomic<bool> fits = true;
  with_float_type(weight.scalar_type(), "weight", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto& kernels = sparse24_pack_kernels<T>();
    parallel_for(rows, grain(kMulAddsPerColumn * double(columns)), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        if (kernels.compress_row(data<T>(w) + r * w.stride(0),
                                 data<bool>(kept) + r * kept.stride(0), columns,
                                 mutable_data<T>(values) + r * (padded / 2),
                                 mutable_data<uint8_t>(metadata) + r * (padded / 8)))
          continue;
        fits = false;
        break;
      }
    });
  });
  if (!fits) check_sparse24_kept(data<bool>(kept), rows, kept.stride(0), columns, 1);
  return {values, metadata};
}

std::tuple<Tensor, Tensor> sparse24_prune(const Tensor& weight, bool transposable) {
  return sparse24_compress(weight, sparse24_mask(weight, transposable));
}

// body(r, c, rows, columns) for blocks of at most kPackBlock x kPackBlock from (r, c) on.
template <class Body>
void for_pack_blocks(int64_t rows, int64_t columns, const Body& body) {
  const int64_t down = ceil_div(rows, kPackBlock), across = ceil_div(columns, kPackBlock);
  const double work = kMulAddsPerColumn * 2 * double(kPackBlock * kPackBlock);
  parallel_for(down * across, grain(work), [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t r = block / across * kPackBlock, c = block % across * kPackBlock;
      body(r, c, std::min<int64_t>(kPackBlock, rows - r),
           std::min<int64_t>(kPackBlock, columns - c));
    }
  });
}

struct Packed {
  Tensor values, metadata;
  template <class T>
  Sparse24Pack<T> from(int64_t row, int64_t column) const {
    const int64_t row_bytes = metadata.size(1);
    return {mutable_data<T>(values) + 4 * row * row_bytes + column / 2,
            mutable_data<uint8_t>(metadata) + row * row_bytes + column / 8, row_bytes};
  }
};
Packed empty_packed(const Tensor& like, int64_t rows, int64_t columns) {
  const int64_t row_bytes = sparse24_padded(columns) / 8;
  return {torch::stable::new_empty(like, {rows, 4 * row_bytes}),
          torch::stable::new_empty(like, {rows, row_bytes}, ScalarType::Byte)};
}

// Packs of W and of W' in one pass; without a mask, of the best transposable one.
std::tuple<Tensor, Tensor, Tensor, Tensor> pack_both(const Tensor& weight,
                                                     const std::optional<Tensor>& mask) {
  const int64_t rows = weight.size(0), columns = weight.size(1);
  const Tensor w = with_unit_columns(weight);
  const std::optional<Tensor> kept =
      mask ? std::optional<Tensor>(with_unit_columns(*mask)) : std::nullopt;
  const Packed packed = empty_packed(weight, rows, columns);
  const Packed transposed = empty_packed(weight, columns, rows);
  std::atomic<bool> fits = true;
  with_float_type(weight.scalar_type(), "weight", [&](auto tag) {
    using T = typename decltype(tag)::type;
    for_pack_blocks(rows, columns, [&](int64_t r, int64_t c, int64_t down, int64_t across) {
      if (!sparse24_pack_kernels<T>().compress_block(
              data<T>(w) + r * w.stride(0) + c, w.stride(0),
              kept ? data<bool>(*kept) + r * kept->stride(0) + c : nullptr,
              kept ? kept->stride(0) : 0, down, across, packed.from<T>(r, c),
              transposed.from<T>(c, r)))
        fits = false;
    });
  });
  if (!fits) {
    const bool* bits = data<bool>(*kept);
    check_sparse24_kept(bits, rows, kept->stride(0), columns, 1);
    check_sparse24_kept(bits, columns, 1, rows, kept->stride(0), "column", "rows");
  }
  return {packed.values, packed.metadata, transposed.values, transposed.metadata};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sparse24_compress_both(const Tensor& weight,
                                                                  const Tensor& mask) {
  check_sparse24_mask(weight, mask);
  return pack_both(weight, mask);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sparse24_prune_both(const Tensor& weight) {
  check_dim(weight, 2, "weight", "[O, I], two-dimensional");
  return pack_both(weight, std::nullopt);
}

std::tuple<Tensor, Tensor> sparse24_transpose(const Tensor& values, const Tensor& metadata,
                                              int64_t in_features) {
  check_sparse24_pack(values, metadata, in_features);
  const Packed packed = {torch::stable::contiguous(values), torch::stable::contiguous(metadata)};
  const Packed transposed = empty_packed(values, in_features, values.size(0));
  with_float_type(values.scalar_type(), "values", [&](auto tag) {
    using T = typename decltype(tag)::type;
    for_pack_blocks(values.size(0), in_features,
                    [&](int64_t r, int64_t c, int64_t down, int64_t across) {
                      const int64_t row_bytes = metadata.size(1);
                      sparse24_pack_kernels<T>().transpose_block(
                          data<T>(packed.values) + 4 * r * row_bytes + c / 2,
                          data<uint8_t>(packed.metadata) + r * row_bytes + c / 8, row_bytes, down,
                          across, transposed.from<T>(c, r));
                    });
  });
  return {transposed.values, transposed.metadata};
}

Tensor sparse24_gather(const Tensor& dense, const Tensor& metadata) {
  check_dim(dense, 2, "dense", "[O, I], two-dimensional");
  check_sparse24_metadata(metadata, dense.size(1));
  RS_CHECK_VALUE(dense.size(0) == metadata.size(0), "dense must have ", metadata.size(0),
                 " rows, one for each row of metadata; got shape ", shape_text(dense));
  const Tensor d = with_unit_columns(dense), m = torch::stable::contiguous(metadata);
  const int64_t rows = d.size(0), columns = d.size(1), bytes = m.size(1);
  Tensor values = torch::stable::new_empty(dense, {rows, 4 * bytes});
  with_float_type(dense.scalar_type(), "dense", [&](auto tag) {
    using T = typename decltype(tag)::type;
    parallel_for(rows, grain(kMulAddsPerColumn * double(columns)), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r)
        sparse24_pack_kernels<T>().gather_row(data<T>(d) + r * d.stride(0),
                                              data<uint8_t>(m) + r * bytes, columns,
                                              mutable_data<T>(values) + r * 4 * bytes);
    });
  });
  return values;
}

Tensor sparse24_decompress(const Tensor& values, const Tensor& metadata, int64_t in_features) {
  check_sparse24_pack(values, metadata, in_features);
  const Tensor v = torch::stable::contiguous(values), m = torch::stable::contiguous(metadata);
  const int64_t rows = v.size(0), bytes = m.size(1);
  Tensor dense = torch::stable::new_empty(values, {rows, in_features});
  with_float_type(values.scalar_type(), "values", [&](auto tag) {
    using T = typename decltype(tag)::type;
    parallel_for(
        rows, grain(kMulAddsPerColumn * double(in_features)), [&](int64_t begin, int64_t end) {
          for (int64_t r = begin; r < end; ++r)
            sparse24_pack_kernels<T>().decompress_row(data<T>(v) + r * 4 * bytes,
                                                      data<uint8_t>(m) + r * bytes, in_features,
                                                      mutable_data<T>(dense) + r * in_features);
        });
  });
  return dense;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(recsparse, CPU, m) {
  m.impl("sparse24_mask", TORCH_BOX(&sparse24_mask));
  m.impl("sparse24_compress", TORCH_BOX(&sparse24_compress));
  m.impl("sparse24_prune", TORCH_BOX(&sparse24_prune));
  m.impl("sparse24_compress_both", TORCH_BOX(&sparse24_compress_both));
  m.impl("sparse24_prune_both", TORCH_BOX(&sparse24_prune_both));
  m.impl("sparse24_transpose", TORCH_BOX(&sparse24_transpose));
  m.impl("sparse24_gather", TORCH_BOX(&sparse24_gather));
  m.impl("sparse24_decompress", TORCH_BOX(&sparse24_decompress));
  m.impl("sparse24_linear", TORCH_BOX(&sparse24_linear));
  m.impl("sparse24_linear_ste", TORCH_BOX(&sparse24_linear_ste));
  m.impl("sparse24_linear_grad_input", TORCH_BOX(&sparse24_linear_grad_input));
  m.impl("sparse24_linear_grad_values", TORCH_BOX(&sparse24_linear_grad_values));
}

}  // namespace recsparse
