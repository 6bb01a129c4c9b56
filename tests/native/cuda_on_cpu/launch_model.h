// csrc/cuda/launch.h where kernels run on the CPU: the same classes and functions.
#pragma once

#include "machine.h"

#define RS_CUDA_OPS(m) STABLE_TORCH_LIBRARY_IMPL(recsparse_cuda_on_cpu, CPU, m)
#define RS_CUDA_DEFINITIONS(m) STABLE_TORCH_LIBRARY_FRAGMENT(recsparse_cuda_on_cpu, m)
#define RS_CUDA_SETTINGS(m) \
  STABLE_TORCH_LIBRARY_IMPL(recsparse_cuda_on_cpu, CompositeExplicitAutograd, m)
// One array for each place in the code and instance of the function around it, as __shared__ has.
#define RS_SHARED(type, name, ...)                  \
  using name##_array = type __VA_ARGS__;            \
  static const char name##_key = 0;                 \
  name##_array& name = *static_cast<name##_array*>( \
      ::cuda_on_cpu::shared_array(&name##_key, sizeof(name##_array), alignof(name##_array)))

namespace recsparse {

// Memory that kernels may touch is what data, mutable_data and Scratch gave out since the Stream
// was made.
class Stream {
 public:
  explicit Stream(const Tensor& on) : like_(on), scope_(cuda_on_cpu::open_scope()) {}
  ~Stream() { cuda_on_cpu::close_scope(scope_); }
  Stream(const Stream&) = delete;
  const Tensor& like() const { return like_; }
  int multiprocessors() const { return 3; }  // small and odd: persistent kernels take several turns
  // the least among the GPUs of the architecture
  int64_t max_shared_bytes() const { return (architecture() == 90 ? 227 : 99) * 1024; }
  int architecture() const { return cuda_on_cpu::architecture(); }

 private:
  const Tensor& like_;
  int scope_;
};

inline void register_tensor(const Tensor& t, bool writable) {
  RS_CHECK(t.is_contiguous(), "cuda_on_cpu: kernels get contiguous tensors");
  cuda_on_cpu::register_memory(t.const_data_ptr(), size_t(t.numel() * int64_t(t.element_size())),
                               writable);
}
template <class T>
const T* data(const Stream&, const Tensor& t) {
  register_tensor(t, false);
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
T* mutable_data(const Stream&, const Tensor& t) {
  register_tensor(t, true);
  return static_cast<T*>(t.mutable_data_ptr());
}

template <class T>
T read_back(const Stream&, const T* device) {
  return *device;
}

template <class... Parameters, class... Arguments>
void launch(const Stream&, const char* name, void (*kernel)(Parameters...), const Extent& grid,
            const Extent& block, int64_t shared_bytes, Arguments&&... arguments) {
  static_assert(sizeof...(Parameters) == sizeof...(Arguments), "one argument for each parameter");
  if (grid.count() == 0) return;
  check_extents(name, grid, block);
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> values;
  } call{kernel, {std::forward<Arguments>(arguments)...}};
  const auto body = [](void* p) {
    auto& c = *static_cast<Call*>(p);
    std::apply(c.kernel, c.values);
  };
  cuda_on_cpu::run({name,
                    {grid.x, grid.y, grid.z},
                    {block.x, block.y, block.z},
                    shared_bytes,
                    body,
                    &call,
                    sizeof call});
}

template <class T>
T* dynamic_shared(int64_t byte = 0) {
  return static_cast<T*>(cuda_on_cpu::dynamic_shared(size_t(byte)));
}

inline void check_aligned(const void* p, int64_t bytes) {
  cuda_on_cpu::check_alignment(p, size_t(bytes));
}

}  // namespace recsparse
