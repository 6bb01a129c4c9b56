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
  m.def("sparse24_mask(Tensor weight, bool transposable) -> Tensor");
  m.def("sparse24_compress(Tensor weight, Tensor mask) -> (Tensor, Tensor)");
  m.def("sparse24_gather(Tensor dense, Tensor metadata) -> Tensor");
  m.def("sparse24_decompress(Tensor values, Tensor metadata, SymInt in_features) -> Tensor");
  m.def(
      "sparse24_linear(Tensor input, Tensor values, Tensor metadata, Tensor? bias, SymInt "
      "activation, "
      "bool keep_sum) -> (Tensor, Tensor)");
  m.def(
      "sparse24_linear_ste(Tensor input, Tensor weight, Tensor values, Tensor metadata, Tensor? "
      "bias, "
      "SymInt activation, bool keep_sum, float decay) -> (Tensor, Tensor)");
  m.def(
      "sparse24_linear_grad_input(Tensor grad_sum, Tensor values, Tensor metadata, SymInt "
      "in_features) "
      "-> Tensor");
  m.def("sparse24_linear_grad_values(Tensor grad_sum, Tensor input, Tensor metadata) -> Tensor");

  // ---- masked_embedding ----

  // ---- low_rank ----
  // `needs` of the gradient ops: bits 1 input (x), 2 down, 4 up, 8 mid_bias, 16 bias, 32 x0
  m.def(
      "low_rank_linear(Tensor input, Tensor down, Tensor up, Tensor? mid_bias, Tensor? bias, "
      "SymInt mid_activation, SymInt activation, bool keep_mid) -> (Tensor, Tensor)");
  m.def(
      "low_rank_linear_grad(Tensor grad_output, Tensor input, Tensor down, Tensor up, Tensor mid, "
      "Tensor? bias, Tensor? output, SymInt mid_activation, SymInt activation, SymInt needs) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "low_rank_cross(Tensor x0, Tensor x, Tensor down, Tensor up, Tensor? bias, bool keep_mid) -> "
      "(Tensor, Tensor)");
  m.def(
      "low_rank_cross_grad(Tensor grad_output, Tensor x0, Tensor x, Tensor down, Tensor up, Tensor "
      "mid, Tensor? bias, SymInt needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");

  // ---- fan_in ----
}
