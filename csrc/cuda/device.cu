// What the library was built with, and what the driver runs: neither touches a GPU.
#include "launch.h"

namespace recsparse {
namespace {

// 1000 major + 10 minor
int64_t cuda_runtime_version() { return CUDART_VERSION; }
int64_t cuda_driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;  // 0: no driver
}

}  // namespace

RS_CUDA_DEFINITIONS(m) {
  m.def("cuda_runtime_version() -> int");
  m.def("cuda_driver_version() -> int");
}
RS_CUDA_SETTINGS(m) {
  m.impl("cuda_runtime_version", TORCH_BOX(&cuda_runtime_version));
  m.impl("cuda_driver_version", TORCH_BOX(&cuda_driver_version));
}

}  // namespace recsparse
