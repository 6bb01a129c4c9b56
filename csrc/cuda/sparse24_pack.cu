// 2:4 masks, compress, gather, decompress on CUDA: checks, memory and launches around
// sparse24_pack_kernels.cuh.
#include "../sparse24.h"
#include "sparse24_pack_kernels.cuh"

namespace recsparse::sparse24 {
namespace {

// Whether all rows of so many elements can be accessed eight at a time (`load_eight`).
template <class T>
bool eight_at_a_time(const T* at, int64_t columns) {
  const int64_t bytes = sizeof(T) == 1 ? 8 : 16;
  return is_aligned(at, bytes) && columns * int64_t(sizeof(T)) % bytes == 0;
}

PackSizes sizes_of(const Tensor& dense) {
  return {dense.size(0), dense.size(1), sparse24_padded(dense.size(1)) / 8};
}
int64_t pack_blocks(int64_t bytes) { return ceil_div(bytes, kPackThreads); }

template <class T>
void launch_transposable(const Stream& stream, const T* weight, bool* mask, T* values,
                         uint8_t* metadata, const PackSizes& size) {
  const int64_t tiles = ceil_div(size.rows, 4) * 2 * size.row_bytes;
  launch(stream, "sparse24_transposable", transposable_kernel<T>, {ceil_div(tiles, kTileThreads)},
         {kTileThreads}, 0, weight, mask, values, metadata, size);
}

Tensor sparse24_mask(const Tensor& weight, bool transposable) {
  check_dim(weight, 2, "weight", "[O, I], two-dimensional");
  const Stream stream(weight);
  return with_float_type(weight.scalar_type(), "weight", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Tensor w = torch::stable::contiguous(weight);
    const PackSizes size = sizes_of(w);
    Tensor mask = torch::stable::new_empty(weight, {size.rows, size.columns}, ScalarType::Bool);
    const T* from = data<T>(stream, w);
    bool* to = mutable_data<bool>(stream, mask);
    if (transposable) {
      launch_transposable<T>(stream, from, to, nullptr, nullptr, size);
    } else {
      launch(stream, "sparse24_mask", mask_kernel<T>,
             {pack_blocks(size.rows * ceil_div(size.columns, 8))}, {kPackThreads}, 0, from, to,
             size, eight_at_a_time(from, size.columns), eight_at_a_time(to, size.columns));
    }
    return mask;
  });
}

struct Packed {
  Tensor values, metadata;
};
Packed empty_packed(const Tensor& like, const PackSizes& size) {
  return {torch::stable::new_empty(like, {size.rows, 4 * size.row_bytes}),
          torch::stable::new_empty(like, {size.rows, size.row_bytes}, ScalarType::Byte)};
}

#ifdef RS_CUDA_ON_CPU
// On a GPU the kernel asserts it, for nothing waits for the GPU; here the first is named.
void check_kept(const Tensor& mask) {
  const bool* bits = static_cast<const bool*>(mask.const_data_ptr());
  const int64_t rows = mask.size(0), columns = mask.size(1);
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t c = 0; c < columns; c += 4) {
      int count = 0;
      for (int64_t i = c; i < std::min(c + 4, columns); ++i) count += bits[row * columns + i];
      RS_CHECK_VALUE(count <= 2, "mask must keep at most 2 in each group of 4 columns; row ", row,
                     " keeps ", count, " in columns ", c, " to ", c + 3);
    }
}
#else
void check_kept(const Tensor&) {}
#endif

std::tuple<Tensor, Tensor> sparse24_compress(const Tensor& weight, const Tensor& mask) {
  check_dim(weight, 2, "weight", "[O, I], two-dimensional");
  check_dim(mask, 2, "mask", "[O, I], two-dimensional");
  check_dtype(mask, ScalarType::Bool, "mask");
  RS_CHECK_VALUE(mask.size(0) == weight.size(0) && mask.size(1) == weight.size(1),
                 "mask must have the shape of weight, ", shape_text(weight), "; got ",
                 shape_text(mask));
  const Stream stream(weight);
  return with_float_type(weight.scalar_type(), "weight", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Tensor w = torch::stable::contiguous(weight), kept = torch::stable::contiguous(mask);
    check_kept(kept);
    const PackSizes size = sizes_of(w);
    const Packed packed = empty_packed(weight, size);
    const T* from = data<T>(stream, w);
    const bool* bits = data<bool>(stream, kept);
    launch(stream, "sparse24_compress", compress_kernel<T>,
           {pack_blocks(size.rows * size.row_bytes)}, {kPackThreads}, 0, from, bits,
           mutable_data<T>(stream, packed.values), mutable_data<uint8_t>(stream, packed.metadata),
           size, eight_at_a_time(from, size.columns), eight_at_a_time(bits, size.columns));
    return std::tuple<Tensor, Tensor>(packed.values, packed.metadata);
  });
}

// Mask and compress in one pass over the weight.
std::tuple<Tensor, Tensor> sparse24_prune(const Tensor& weight, bool transposable) {
  check_dim(weight, 2, "weight", "[O, I], two-dimensional");
  const Stream stream(weight);
  return with_float_type(weight.scalar_type(), "weight", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Tensor w = torch::stable::contiguous(weight);
    const PackSizes size = sizes_of(w);
    const Packed packed = empty_packed(weight, size);
    const T* from = data<T>(stream, w);
    T* values = mutable_data<T>(stream, packed.values);
    auto* metadata = mutable_data<uint8_t>(stream, packed.metadata);
    if (transposable) {
      launch_transposable<T>(stream, from, nullptr, values, metadata, size);
    } else {
      launch(stream, "sparse24_prune", prune_kernel<T>, {pack_blocks(size.rows * size.row_bytes)},
             {kPackThreads}, 0, from, values, metadata, size, eight_at_a_time(from, size.columns));
    }
    return std::tuple<Tensor, Tensor>(packed.values, packed.metadata);
  });
}

Tensor sparse24_gather(const Tensor& dense, const Tensor& metadata) {
  check_dim(dense, 2, "dense", "[O, I], two-dimensional");
  check_sparse24_metadata(metadata, dense.size(1));
  RS_CHECK_VALUE(dense.size(0) == metadata.size(0), "dense must have ", metadata.size(0),
                 " rows, one for each row of metadata; got shape ", shape_text(dense));
  const Stream stream(dense);
  return with_float_type(dense.scalar_type(), "dense", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Tensor d = torch::stable::contiguous(dense), m = torch::stable::contiguous(metadata);
    const PackSizes size = sizes_of(d);
    Tensor values = torch::stable::new_empty(dense, {size.rows, 4 * size.row_bytes});
    const T* from = data<T>(stream, d);
    launch(stream, "sparse24_gather", gather_kernel<T>, {pack_blocks(size.rows * size.row_bytes)},
           {kPackThreads}, 0, from, data<uint8_t>(stream, m), mutable_data<T>(stream, values), size,
           eight_at_a_time(from, size.columns));
    return values;
  });
}

Tensor sparse24_decompress(const Tensor& values, const Tensor& metadata, int64_t in_features) {
  RS_CHECK_VALUE(in_features >= 0, "in_features must not be negative; got ", in_features);
  check_sparse24_packed(values, metadata, in_features);
  const Stream stream(values);
  return with_float_type(values.scalar_type(), "values", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Tensor v = torch::stable::contiguous(values), m = torch::stable::contiguous(metadata);
    Tensor dense = torch::stable::new_empty(values, {values.size(0), in_features});
    const PackSizes size = sizes_of(dense);
    const T* from = data<T>(stream, v);
    T* to = mutable_data<T>(stream, dense);
    launch(stream, "sparse24_decompress", decompress_kernel<T>,
           {pack_blocks(size.rows * ceil_div(in_features, 8))}, {kPackThreads}, 0, from,
           data<uint8_t>(stream, m), to, size, is_aligned(from, 4 * int64_t(sizeof(T))),
           eight_at_a_time(to, in_features));
    return dense;
  });
}

}  // namespace

RS_CUDA_OPS(m) {
  m.impl("sparse24_mask", TORCH_BOX(&sparse24_mask));
  m.impl("sparse24_compress", TORCH_BOX(&sparse24_compress));
  m.impl("sparse24_prune", TORCH_BOX(&sparse24_prune));
  m.impl("sparse24_gather", TORCH_BOX(&sparse24_gather));
  m.impl("sparse24_decompress", TORCH_BOX(&sparse24_decompress));
}

}  // namespace recsparse::sparse24
