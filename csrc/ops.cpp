// Every native schema: the table of contents. Implementations are in csrc/cpu/<family>.cpp.
//
// Names, argument order and defaults equal those of recsparse_kernels/reference/<family>.py, whose
// signatures are the definition (tests/test_schemas.py compares them).
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(recsparse, m) {
  // instruction level of the CPU kernels: 0 portable, 1 AVX2, 2 AVX-512
  m.def("cpu_level() -> int");
  m.def("highest_cpu_level() -> int");
  m.def("set_cpu_level(int level) -> ()");

  // ---- sparse24 ----

  // ---- masked_embedding ----

  // ---- low_rank ----

  // ---- fan_in ----
}
