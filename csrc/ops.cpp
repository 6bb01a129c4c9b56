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
  m.def("masked_embedding(Tensor values, Tensor rows, Tensor? bases, Tensor? starts, Tensor? columns, Tensor indices, SymInt num_embeddings, SymInt embedding_dim, SymInt padding_idx, bool scale_grad_by_freq, bool sparse) -> Tensor");
  m.def("masked_embedding_bag(Tensor values, Tensor rows, Tensor? bases, Tensor? starts, Tensor? columns, Tensor indices, Tensor? offsets, Tensor? per_sample_weights, SymInt num_embeddings, SymInt embedding_dim, SymInt pooling_mode, SymInt padding_idx, bool include_last_offset, bool scale_grad_by_freq, bool sparse) -> (Tensor, Tensor)");
  m.def("masked_embedding_records(Tensor like, Tensor records, Tensor starts, Tensor bases, Tensor indices, Tensor? offsets, Tensor? per_sample_weights, SymInt num_embeddings, SymInt embedding_dim, SymInt kept, SymInt pooling_mode, SymInt padding_idx, bool include_last_offset) -> Tensor");
  m.def("masked_embedding_bag_grad_per_sample_weights(Tensor grad_output, Tensor values, Tensor rows, Tensor? bases, Tensor? starts, Tensor? columns, Tensor indices, Tensor? offsets, SymInt num_embeddings, SymInt embedding_dim, SymInt pooling_mode, SymInt padding_idx, bool include_last_offset) -> Tensor");
  m.def("masked_embedding_bag_grad_values(Tensor grad_output, Tensor values, Tensor rows, Tensor? bases, Tensor? starts, Tensor? columns, Tensor indices, Tensor? offsets, Tensor? per_sample_weights, Tensor? argmax, SymInt num_embeddings, SymInt embedding_dim, SymInt pooling_mode, SymInt padding_idx, bool include_last_offset, bool scale_grad_by_freq) -> Tensor");
  m.def("masked_embedding_bag_grad_touched(Tensor grad_output, Tensor values, Tensor rows, Tensor? bases, Tensor? starts, Tensor? columns, Tensor indices, Tensor? offsets, Tensor? per_sample_weights, SymInt num_embeddings, SymInt embedding_dim, SymInt pooling_mode, SymInt padding_idx, bool include_last_offset, bool scale_grad_by_freq) -> (Tensor, Tensor)");
  m.def("masked_embedding_bag_update(Tensor(a0!) values, Tensor(a1!) state, Tensor(a2!) second_state, Tensor grad_output, Tensor rows, Tensor? bases, Tensor? starts, Tensor? columns, Tensor indices, Tensor? offsets, Tensor? per_sample_weights, Tensor? argmax, SymInt num_embeddings, SymInt embedding_dim, SymInt pooling_mode, SymInt padding_idx, bool include_last_offset, bool scale_grad_by_freq, SymInt optimizer, float lr, float beta1, float beta2, float eps, SymInt step) -> ()");
  m.def("masked_embedding_renorm(Tensor(a0!) values, Tensor rows, Tensor? bases, Tensor? starts, Tensor? columns, Tensor indices, SymInt num_embeddings, SymInt embedding_dim, float max_norm, float norm_type) -> ()");
  m.def("masked_embedding_unpack(Tensor values, Tensor rows, Tensor? bases, Tensor? starts, Tensor? columns, SymInt num_embeddings, SymInt embedding_dim) -> Tensor");
  m.def("masked_embedding_unpack_grad_values(Tensor grad_output, Tensor values, Tensor rows, Tensor? bases, Tensor? starts, Tensor? columns, SymInt num_embeddings, SymInt embedding_dim) -> Tensor");
  m.def("masked_embedding_repack(Tensor values, Tensor rows, Tensor? bases, Tensor? starts, Tensor? columns, Tensor new_values, Tensor new_rows, Tensor? new_bases, Tensor? new_starts, Tensor? new_columns, SymInt num_embeddings, SymInt embedding_dim) -> Tensor");
  m.def("masked_embedding_matmul_t(Tensor input, Tensor values, Tensor rows, Tensor? bases, Tensor? starts, Tensor? columns, SymInt num_embeddings, SymInt embedding_dim) -> Tensor");
  m.def("masked_embedding_matmul_t_grad_input(Tensor grad_output, Tensor values, Tensor rows, Tensor? bases, Tensor? starts, Tensor? columns, SymInt num_embeddings, SymInt embedding_dim) -> Tensor");
  m.def("masked_embedding_matmul_t_grad_values(Tensor grad_output, Tensor input, Tensor values, Tensor rows, Tensor? bases, Tensor? starts, Tensor? columns, SymInt num_embeddings, SymInt embedding_dim) -> Tensor");

  // ---- low_rank ----

  // ---- fan_in ----
}
