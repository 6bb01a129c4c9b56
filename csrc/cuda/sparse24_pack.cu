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

// Rows of the packed weight and of its transpose, to be made where `values` is not null.
template <class T>
PackedLines<T> rows_of(const PackSizes& size, T* values = nullptr, uint8_t* metadata = nullptr) {
  return {values, metadata, size.rows, size.row_bytes};
}
template <class T>
PackedLines<T> columns_of(const PackSizes& size, T* values = nullptr, uint8_t* metadata = nullptr) {
  return {values, metadata, size.columns, sparse24_padded(size.rows) / 8};
}

Extent tile_blocks(const PackSizes& size) {
  return {ceil_div(size.rows, kBlockRows) * ceil_div(size.columns, kBlockColumns)};
}

// mask: const bool*, to be packed; or bool*, where the chosen one goes, null where it is not
// wanted.
template <class T, class Mask>
void launch_tiles(const Stream& stream, const T* weight, Mask mask, const PackSizes& size,
                  const PackedLines<T>& rows, const PackedLines<T>& columns) {
  const auto fours = [&](const void* at, int64_t bytes) {
    return is_aligned(at, 4 * bytes) && size.columns % 4 == 0;
  };
  launch(stream, "sparse24_tiles", tiles_kernel<T, std::is_same_v<Mask, const bool*>>,
         tile_blocks(size), {kTileThreads}, 0, weight, mask, rows, columns,
         fours(weight, sizeof(T)), fours(mask, 1));
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
      launch_tiles(stream, from, to, size, rows_of<T>(size), columns_of<T>(size));
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
void check_kept(const Tensor& mask, bool both) {
  const bool* bits = static_cast<const bool*>(mask.const_data_ptr());
  const int64_t rows = mask.size(0), columns = mask.size(1);
  check_sparse24_kept(bits, rows, columns, columns, 1);
  if (both) check_sparse24_kept(bits, columns, 1, rows, columns, "column", "rows");
}
#else
void check_kept(const Tensor&, bool) {}
#endif

std::tuple<Tensor, Tensor> sparse24_compress(const Tensor& weight, const Tensor& mask) {
  check_sparse24_mask(weight, mask);
  const Stream stream(weight);
  return with_float_type(weight.scalar_type(), "weight", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Tensor w = torch::stable::contiguous(weight), kept = torch::stable::contiguous(mask);
    check_kept(kept, false);
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
      launch_tiles<T, bool*>(stream, from, nullptr, size, rows_of(size, values, metadata),
                             columns_of<T>(size));
    } else {
      launch(stream, "sparse24_prune", prune_kernel<T>, {pack_blocks(size.rows * size.row_bytes)},
             {kPackThreads}, 0, from, values, metadata, size, eight_at_a_time(from, size.columns));
    }
    return std::tuple<Tensor, Tensor>(packed.values, packed.metadata);
  });
}

struct BothPacked {
  Packed rows, columns;
  std::tuple<Tensor, Tensor, Tensor, Tensor> outputs() const {
    return {rows.values, rows.metadata, columns.values, columns.metadata};
  }
};

// `mask` as in launch_tiles.
template <class T, class Mask>
BothPacked pack_both(const Stream& stream, const Tensor& weight, Mask mask) {
  const PackSizes size = sizes_of(weight);
  const PackSizes transposed = {size.columns, size.rows, sparse24_padded(size.rows) / 8};
  const BothPacked packed = {empty_packed(weight, size), empty_packed(weight, transposed)};
  launch_tiles(stream, data<T>(stream, weight), mask, size,
               rows_of(size, mutable_data<T>(stream, packed.rows.values),
                       mutable_data<uint8_t>(stream, packed.rows.metadata)),
               columns_of(size, mutable_data<T>(stream, packed.columns.values),
                          mutable_data<uint8_t>(stream, packed.columns.metadata)));
  return packed;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sparse24_compress_both(const Tensor& weight,
                                                                  const Tensor& mask) {
  check_sparse24_mask(weight, mask);
  const Stream stream(weight);
  return with_float_type(weight.scalar_type(), "weight", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Tensor w = torch::stable::contiguous(weight), kept = torch::stable::contiguous(mask);
    check_kept(kept, true);
    return pack_both<T>(stream, w, data<bool>(stream, kept)).outputs();
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sparse24_prune_both(const Tensor& weight) {
  check_dim(weight, 2, "weight", "[O, I], two-dimensional");
  const Stream stream(weight);
  return with_float_type(weight.scalar_type(), "weight", [&](auto tag) {
    using T = typename decltype(tag)::type;
    bool* const not_wanted = nullptr;
    return pack_both<T>(stream, torch::stable::contiguous(weight), not_wanted).outputs();
  });
}

std::tuple<Tensor, Tensor> sparse24_transpose(const Tensor& values, const Tensor& metadata,
                                              int64_t in_features) {
  check_sparse24_pack(values, metadata, in_features);
  const Stream stream(values);
  return with_float_type(values.scalar_type(), "values", [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Tensor v = torch::stable::contiguous(values), m = torch::stable::contiguous(metadata);
    const PackSizes size = {values.size(0), in_features, metadata.size(1)};
    const Packed packed =
        empty_packed(values, {size.columns, size.rows, sparse24_padded(size.rows) / 8});
    const T* from = data<T>(stream, v);
    launch(stream, "sparse24_transpose", transpose_pack_kernel<T>, tile_blocks(size),
           {kTileThreads}, 0, from, data<uint8_t>(stream, m), size,
           columns_of(size, mutable_data<T>(stream, packed.values),
                      mutable_data<uint8_t>(stream, packed.metadata)),
           is_aligned(from, 2 * int64_t(sizeof(T))));
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
  check_sparse24_pack(values, metadata, in_features);
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
  m.impl("sparse24_compress_both", TORCH_BOX(&sparse24_compress_both));
  m.impl("sparse24_prune_both", TORCH_BOX(&sparse24_prune_both));
  m.impl("sparse24_transpose", TORCH_BOX(&sparse24_transpose));
  m.impl("sparse24_gather", TORCH_BOX(&sparse24_gather));
  m.impl("sparse24_decompress", TORCH_BOX(&sparse24_decompress));
}

}  // namespace recsparse::sparse24
