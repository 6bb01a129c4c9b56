// Host: the maps that bulk tensor copies go by.
#pragma once

#include "launch.h"
#include "ptx_sm90.h"

namespace recsparse {

// A row-major matrix in global memory, and the box of it that a copy moves. In shared memory the
// box's rows follow each other; with a swizzle (64 or 128, the bytes of a box's row) their
// 16-byte pieces are permuted as wgmma_descriptor says.
struct TensorMapShape {
  int64_t rows, columns, row_bytes;
  int box_rows, box_columns, swizzle;
};

#ifndef RS_CUDA_ON_CPU
inline TensorMap encode_tensor_map(const void* at, int element_bytes, const TensorMapShape& shape) {
  // by name at run time: nothing is linked to the driver
  using Encode =
      CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                   const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                   CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  static const auto encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000,
                                                cudaEnableDefault, &result),
               "cuTensorMapEncodeTiled");
#else
    check_cuda(
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result),
        "cuTensorMapEncodeTiled");
#endif
    RS_CHECK(result == cudaDriverEntryPointSuccess && found,
             "recsparse: the CUDA driver has no cuTensorMapEncodeTiled: it is older than 12.0");
    return reinterpret_cast<Encode>(found);
  }();
  const cuuint64_t extents[] = {cuuint64_t(shape.columns), cuuint64_t(shape.rows)};
  const cuuint64_t strides[] = {cuuint64_t(shape.row_bytes)};
  const cuuint32_t box[] = {cuuint32_t(shape.box_columns), cuuint32_t(shape.box_rows)};
  const cuuint32_t steps[] = {1, 1};
  const auto swizzle = shape.swizzle == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                       : shape.swizzle == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                             : CU_TENSOR_MAP_SWIZZLE_NONE;
  TensorMap map;
  const CUresult result = encode(
      &map, element_bytes == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_UINT16, 2,
      const_cast<void*>(at), extents, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  RS_CHECK(result == CUDA_SUCCESS, "recsparse: cuTensorMapEncodeTiled failed with ", int(result));
  return map;
}
#endif

template <class T>
TensorMap tensor_map(const T* at, const TensorMapShape& shape) {
  static_assert(sizeof(T) == 1 || sizeof(T) == 2, "what a map is made of here");
  return encode_tensor_map(at, int(sizeof(T)), shape);
}

}  // namespace recsparse
