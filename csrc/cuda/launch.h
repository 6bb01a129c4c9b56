// From torch tensors to kernel launches: device and stream, pointers, scratch memory, the launch.
//
//   const Stream stream(values);                       // first thing of an op
//   Scratch<float> partial(stream, count);
//   launch(stream, "name", kernel<T>, {blocks}, {threads}, shared_bytes, arguments...);
//
// Everything runs on torch's current stream of the tensor's device and nothing waits for the GPU,
// so ops can be captured into a CUDA graph. Compiled with RS_CUDA_ON_CPU (tests/native/cuda_on_cpu)
// the same calls run the kernels on the CPU.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "types.h"
// after the types
#include "../dispatch.h"

#ifndef RS_CUDA_ON_CPU
// Opens the block that registers a family's ops: RS_CUDA_OPS(m) { m.impl("name", TORCH_BOX(&f)); }
#define RS_CUDA_OPS(m) STABLE_TORCH_LIBRARY_IMPL(recsparse, CUDA, m)
// Ops that only the CUDA library has, and take no tensors: their schemas and their functions.
#define RS_CUDA_DEFINITIONS(m) STABLE_TORCH_LIBRARY_FRAGMENT(recsparse, m)
#define RS_CUDA_SETTINGS(m) STABLE_TORCH_LIBRARY_IMPL(recsparse, CompositeExplicitAutograd, m)
// An array in shared memory, in a kernel or device function: RS_SHARED(float, tile, [16][17]);
#define RS_SHARED(type, name, ...) __shared__ type name __VA_ARGS__
#endif

namespace recsparse {

using MaybeTensor = std::optional<Tensor>;

// Size of a grid or a block, in 64 bits until it is checked.
struct Extent {
  int64_t x = 1, y = 1, z = 1;
  int64_t count() const { return x * y * z; }
};

constexpr int kWarp = 32;
constexpr int64_t kMaxGridYZ = 65535;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline void check_extents(const char* name, const Extent& grid, const Extent& block) {
  const bool fits = grid.x < (int64_t(1) << 31) && grid.y <= kMaxGridYZ && grid.z <= kMaxGridYZ &&
                    block.count() >= 1 && block.count() <= 1024;
  RS_CHECK(fits, "recsparse: kernel ", name, " cannot be launched: grid ", grid.x, " x ", grid.y,
           " x ", grid.z, ", block ", block.x, " x ", block.y, " x ", block.z);
}

}  // namespace recsparse

#ifdef RS_CUDA_ON_CPU
#include "launch_model.h"
#else

namespace recsparse {

inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) [[likely]]
    return;
  cudaGetLastError();  // clears it: later calls must not report it again
  throw std::runtime_error(std::string("recsparse: ") + what + ": " + cudaGetErrorString(error));
}

// The device of a tensor for the length of an op, with torch's current stream on it.
class Stream {
 public:
  explicit Stream(const Tensor& on) : like_(on), device_(on.get_device()), guard_(device_) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t get() const { return stream_; }
  int32_t device() const { return device_; }
  const Tensor& like() const { return like_; }  // for new tensors on the same device

  int attribute(cudaDeviceAttr which) const {
    int value = 0;
    check_cuda(cudaDeviceGetAttribute(&value, which, device_), "cudaDeviceGetAttribute");
    return value;
  }
  int multiprocessors() const { return attribute(cudaDevAttrMultiProcessorCount); }
  // Without what the system has of each block: compilers count it among a kernel's own arrays on
  // sm_90 and later.
  int64_t max_shared_bytes() const {
    return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) -
           attribute(cudaDevAttrReservedSharedMemoryPerBlock);
  }
  int architecture() const {  // 80, 90, 100
    return 10 * attribute(cudaDevAttrComputeCapabilityMajor) +
           attribute(cudaDevAttrComputeCapabilityMinor);
  }

 private:
  const Tensor& like_;
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

// The elements of a contiguous tensor.
template <class T>
const T* data(const Stream&, const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
T* mutable_data(const Stream&, const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// One number from the device, waiting for it: only where the size of an output depends on it.
template <class T>
T read_back(const Stream& stream, const T* device) {
  T value;
  check_cuda(cudaMemcpyAsync(&value, device, sizeof(T), cudaMemcpyDeviceToHost, stream.get()),
             "cudaMemcpyAsync");
  check_cuda(cudaStreamSynchronize(stream.get()), "cudaStreamSynchronize");
  return value;
}

// Dynamic shared memory that every kernel gets without being asked for: 48 KB less the arrays of
// the kernel, which take at most the rest (tests/native/test_cuda_resources.py).
constexpr int64_t kSharedUnasked = 32 * 1024;

// Runs kernel(arguments...) on the stream; nothing for an empty grid. `name` is for error messages.
template <class... Parameters, class... Arguments>
void launch(const Stream& stream, const char* name, void (*kernel)(Parameters...),
            const Extent& grid, const Extent& block, int64_t shared_bytes,
            Arguments&&... arguments) {
  static_assert(sizeof...(Parameters) == sizeof...(Arguments), "one argument for each parameter");
  if (grid.count() == 0) return;
  check_extents(name, grid, block);
  const void* function = reinterpret_cast<const void*>(kernel);
  if (shared_bytes > kSharedUnasked)
    check_cuda(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    int(shared_bytes)),
               name);
  std::tuple<Parameters...> values(std::forward<Arguments>(arguments)...);
  std::apply(
      [&](auto&... value) {
        void* pointers[] = {const_cast<void*>(static_cast<const void*>(&value))..., nullptr};
        const dim3 blocks(unsigned(grid.x), unsigned(grid.y), unsigned(grid.z));
        const dim3 threads(unsigned(block.x), unsigned(block.y), unsigned(block.z));
        check_cuda(cudaLaunchKernel(function, blocks, threads, pointers, size_t(shared_bytes),
                                    stream.get()),
                   name);
      },
      values);
}

// The block's dynamic shared memory from a byte on; 128-byte aligned at 0.
template <class T>
__device__ __forceinline__ T* dynamic_shared(int64_t byte = 0) {
  extern __shared__ __align__(128) unsigned char recsparse_dynamic_shared[];
  return reinterpret_cast<T*>(recsparse_dynamic_shared + byte);
}

}  // namespace recsparse
#endif

namespace recsparse {

// Device memory from torch's allocator, uninitialised, freed (in stream order) at the end of the
// scope.
template <class T>
class Scratch {
 public:
  Scratch(const Stream& stream, int64_t count)
      : bytes_(torch::stable::new_empty(stream.like(), {count * int64_t(sizeof(T))},
                                        ScalarType::Byte)),
        data_(reinterpret_cast<T*>(mutable_data<uint8_t>(stream, bytes_))) {}
  T* get() const { return data_; }

 private:
  Tensor bytes_;
  T* data_;
};

// A pointer to an optional tensor's elements, or null.
template <class T>
const T* data(const Stream& stream, const MaybeTensor& t) {
  return t ? data<T>(stream, *t) : nullptr;
}

}  // namespace recsparse
