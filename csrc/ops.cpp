// Every native schema: the table of contents. Implementations are in csrc/cpu/<family>.cpp
// and csrc/cuda/<family>.cu.
//
// Names, argument order and defaults equal those of recsparse_kernels/reference/<family>.py, whose
// signatures are the definition (tests/test_schemas.py compares them).
#include <torch/csrc/stable/library.h>

#ifndef RS_LIBRARY
#define RS_LIBRARY recsparse  // the tests' copy of the CUDA ops has a namespace of its own
#endif

STABLE_TORCH_LIBRARY(RS_LIBRARY, m) {
  // instruction level of the CPU kernels: 0 portable, 1 AVX2, 2 AVX-512
  m.def("cpu_levels() -> int");
  m.def("cpu_level() -> int");
  m.def("set_cpu_level(int level) -> ()");
  m.def("use_huge_pages(Tensor tensor) -> int");
  m.def("set_huge_pages(bool outputs) -> ()");

  // ---- sparse24 ----
  m.def("sparse24_mask(Tensor weight, bool transposable) -> Tensor");
  m.def("sparse24_compress(Tensor weight, Tensor mask) -> (Tensor, Tensor)");
  m.def("sparse24_prune(Tensor weight, bool transposable) -> (Tensor, Tensor)");
  m.def("sparse24_compress_both(Tensor weight, Tensor mask) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("sparse24_prune_both(Tensor weight) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "sparse24_transpose(Tensor values, Tensor metadata, SymInt in_features) -> (Tensor, Tensor)");
  m.def("sparse24_gather(Tensor dense, Tensor metadata) -> Tensor");
  m.def("sparse24_decompress(Tensor values, Tensor metadata, SymInt in_features) -> Tensor");
  m.def(
      "sparse24_linear(Tensor input, Tensor values, Tensor metadata, Tensor? bias, SymInt activation, "
      "bool keep_sum, bool transposable) -> (Tensor, Tensor)");
  m.def(
      "sparse24_linear_ste(Tensor input, Tensor weight, Tensor values, Tensor metadata, Tensor? values_t, "
      "Tensor? metadata_t, Tensor? bias, SymInt activation, bool keep_sum, float decay) "
      "-> (Tensor, Tensor)");
  m.def(
      "sparse24_linear_grad_input(Tensor grad_sum, Tensor values, Tensor metadata, SymInt in_features) "
      "-> Tensor");
  m.def("sparse24_linear_grad_values(Tensor grad_sum, Tensor input, Tensor metadata) -> Tensor");

  // ---- masked_embedding ----
  m.def(
      "masked_embedding(Tensor values, Tensor rows, Tensor? bases, Tensor? starts, Tensor? columns, Tensor indices, SymInt num_embeddings, SymInt embedding_dim, SymInt padding_idx, bool scale_grad_by_freq, bool sparse) -> Tensor");
  m.def(
      "masked_embedding_bag(Tensor values, Tensor rows, Tensor? bases, Tensor? starts, Tensor? columns, Tensor indices, Tensor? offsets, Tensor? per_sample_weights, SymInt num_embeddings, SymInt embedding_dim, SymInt pooling_mode, SymInt padding_idx, bool include_last_offset, bool scale_grad_by_freq, bool sparse) -> (Tensor, Tensor)");
  m.def(
      "masked_embedding_records(Tensor like, Tensor records, Tensor starts, Tensor bases, Tensor indices, Tensor? offsets, Tensor? per_sample_weights, SymInt num_embeddings, SymInt embedding_dim, SymInt kept, SymInt pooling_mode, SymInt padding_idx, bool include_last_offset) -> Tensor");
  m.def(
      "masked_embedding_bag_grad_per_sample_weights(Tensor grad_output, Tensor values, Tensor rows, Tensor? bases, Tensor? starts, Tensor? columns, Tensor indices, Tensor? offsets, SymInt num_embeddings, SymInt embedding_dim, SymInt pooling_mode, SymInt padding_idx, bool include_last_offset) -> Tensor");
  m.def(
      "masked_embedding_bag_grad_values(Tensor grad_output, Tensor values, Tensor rows, Tensor? bases, Tensor? starts, Tensor? columns, Tensor indices, Tensor? offsets, Tensor? per_sample_weights, Tensor? argmax, SymInt num_embeddings, SymInt embedding_dim, SymInt pooling_mode, SymInt padding_idx, bool include_last_offset, bool scale_grad_by_freq) -> Tensor");
  m.def(
      "masked_embedding_bag_grad_touched(Tensor grad_output, Tensor values, Tensor rows, Tensor? bases, Tensor? starts, Tensor? columns, Tensor indices, Tensor? offsets, Tensor? per_sample_weights, SymInt num_embeddings, SymInt embedding_dim, SymInt pooling_mode, SymInt padding_idx, bool include_last_offset, bool scale_grad_by_freq) -> (Tensor, Tensor)");
  m.def(
      "masked_embedding_bag_update(Tensor(a0!) values, Tensor(a1!) state, Tensor(a2!) second_state, Tensor grad_output, Tensor rows, Tensor? bases, Tensor? starts, Tensor? columns, Tensor indices, Tensor? offsets, Tensor? per_sample_weights, Tensor? argmax, SymInt num_embeddings, SymInt embedding_dim, SymInt pooling_mode, SymInt padding_idx, bool include_last_offset, bool scale_grad_by_freq, SymInt optimizer, float lr, float beta1, float beta2, float eps, SymInt step) -> ()");
  m.def(
      "masked_embedding_renorm(Tensor(a0!) values, Tensor rows, Tensor? bases, Tensor? starts, Tensor? columns, Tensor indices, SymInt num_embeddings, SymInt embedding_dim, float max_norm, float norm_type) -> ()");
  m.def(
      "masked_embedding_unpack(Tensor values, Tensor rows, Tensor? bases, Tensor? starts, Tensor? columns, SymInt num_embeddings, SymInt embedding_dim) -> Tensor");
  m.def(
      "masked_embedding_unpack_grad_values(Tensor grad_output, Tensor values, Tensor rows, Tensor? bases, Tensor? starts, Tensor? columns, SymInt num_embeddings, SymInt embedding_dim) -> Tensor");
  m.def(
      "masked_embedding_repack(Tensor values, Tensor rows, Tensor? bases, Tensor? starts, Tensor? columns, Tensor new_values, Tensor new_rows, Tensor? new_bases, Tensor? new_starts, Tensor? new_columns, SymInt num_embeddings, SymInt embedding_dim) -> Tensor");
  m.def(
      "masked_embedding_matmul_t(Tensor input, Tensor values, Tensor rows, Tensor? bases, Tensor? starts, Tensor? columns, SymInt num_embeddings, SymInt embedding_dim) -> Tensor");
  m.def(
      "masked_embedding_matmul_t_grad_input(Tensor grad_output, Tensor values, Tensor rows, Tensor? bases, Tensor? starts, Tensor? columns, SymInt num_embeddings, SymInt embedding_dim) -> Tensor");
  m.def(
      "masked_embedding_matmul_t_grad_values(Tensor grad_output, Tensor input, Tensor values, Tensor rows, Tensor? bases, Tensor? starts, Tensor? columns, SymInt num_embeddings, SymInt embedding_dim) -> Tensor");

  // ---- selection ----
  m.def(
      "selection_histogram(Tensor scores, SymInt? ties_of, SymInt first_position, SymInt shift, SymInt width, SymInt first) -> Tensor");
  m.def("selection_mask(Tensor scores, SymInt key, SymInt? tie, SymInt first_position) -> Tensor");

  // ---- low_rank ----
  // `needs` of the gradient ops: bits 1 input (x), 2 down, 4 up, 8 mid_bias, 16 bias, 32 x0
  m.def(
      "low_rank_linear(Tensor input, Tensor down, Tensor up, Tensor? mid_bias, Tensor? bias, SymInt mid_activation, SymInt activation, bool keep_mid) -> (Tensor, Tensor)");
  m.def(
      "low_rank_linear_grad(Tensor grad_output, Tensor input, Tensor down, Tensor up, Tensor mid, Tensor? bias, Tensor? output, SymInt mid_activation, SymInt activation, SymInt needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "low_rank_cross(Tensor x0, Tensor x, Tensor down, Tensor up, Tensor? bias, bool keep_mid) -> (Tensor, Tensor)");
  m.def(
      "low_rank_cross_grad(Tensor grad_output, Tensor x0, Tensor x, Tensor down, Tensor up, Tensor mid, Tensor? bias, SymInt needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "low_rank_embedding_bag(Tensor table, Tensor up, Tensor? mean, Tensor indices, Tensor? offsets, Tensor? per_sample_weights, SymInt pooling_mode, SymInt padding_idx, bool include_last_offset, bool scale_grad_by_freq, bool sparse, bool keep_pooled) -> (Tensor, Tensor)");
  m.def(
      "low_rank_embedding_bag_grad(Tensor grad_output, Tensor table, Tensor up, Tensor? mean, Tensor indices, Tensor? offsets, Tensor? per_sample_weights, Tensor pooled, SymInt pooling_mode, SymInt padding_idx, bool include_last_offset, bool needs_sample_weights) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "low_rank_embedding_bag_max(Tensor table, Tensor up, Tensor? mean, Tensor indices, Tensor offsets, SymInt padding_idx, bool include_last_offset) -> (Tensor, Tensor)");
  m.def(
      "low_rank_embedding_bag_max_grad(Tensor grad_output, Tensor table, Tensor up, Tensor indices, Tensor positions, bool needs_mean) -> (Tensor, Tensor, Tensor)");
  m.def(
      "low_rank_rows_grad(Tensor grad_pooled, Tensor indices, Tensor? offsets, Tensor? per_sample_weights, SymInt num_embeddings, SymInt pooling_mode, SymInt padding_idx, bool include_last_offset) -> Tensor");
  m.def(
      "low_rank_rows_grad_sparse(Tensor grad_pooled, Tensor indices, Tensor? offsets, Tensor? per_sample_weights, SymInt num_embeddings, SymInt pooling_mode, SymInt padding_idx, bool include_last_offset) -> (Tensor, Tensor, Tensor)");
  m.def(
      "low_rank_fields(Tensor table, Tensor starts, Tensor projections, Tensor? bias, Tensor indices, bool with_output, bool with_interaction, bool sparse) -> (Tensor, Tensor, Tensor)");
  m.def(
      "low_rank_fields_grad(Tensor? grad_mid, Tensor? grad_output, Tensor? grad_interaction, Tensor mid, Tensor projections, Tensor? bias) -> (Tensor, Tensor, Tensor)");

  // ---- fan_in ----
  m.def(
      "fan_in_linear(Tensor input, Tensor weight, Tensor indices, Tensor? bias, SymInt group_size) "
      "-> Tensor");
  m.def(
      "fan_in_linear_grad_input(Tensor grad_output, Tensor weight, Tensor indices, SymInt "
      "in_features, SymInt group_size) -> Tensor");
  m.def(
      "fan_in_linear_grad_weight(Tensor grad_output, Tensor input, Tensor indices, SymInt "
      "group_size) -> Tensor");
  m.def(
      "fan_in_linear_update(Tensor grad_output, Tensor input, Tensor(a2!) weight, Tensor indices, "
      "Tensor(a4!)? bias, Tensor(a5!)[] state, SymInt group_size, SymInt optimizer, float lr, "
      "float weight_decay, float beta1, float beta2, float eps, SymInt step, bool "
      "stochastic_rounding, SymInt seed) -> ()");
  m.def(
      "fan_in_loss(Tensor input, Tensor weight, Tensor indices, Tensor? bias, Tensor offsets, "
      "Tensor labels, SymInt kind, SymInt reduction, SymInt group_size) -> Tensor");
  m.def(
      "fan_in_loss_grad(Tensor grad_loss, Tensor input, Tensor weight, Tensor indices, Tensor? "
      "bias, Tensor offsets, Tensor labels, SymInt kind, SymInt reduction, SymInt group_size, bool "
      "input_grad, bool weight_grad) -> (Tensor, Tensor, Tensor)");
  m.def(
      "fan_in_loss_step(Tensor grad_loss, Tensor input, Tensor(a2!) weight, Tensor indices, "
      "Tensor(a4!)? bias, Tensor offsets, Tensor labels, Tensor(a7!)[] state, SymInt kind, SymInt "
      "reduction, SymInt group_size, bool input_grad, SymInt optimizer, float lr, float "
      "weight_decay, float beta1, float beta2, float eps, SymInt step, bool stochastic_rounding, "
      "SymInt seed) -> (Tensor, Tensor)");
  m.def(
      "fan_in_topk(Tensor input, Tensor weight, Tensor indices, Tensor? bias, SymInt k, SymInt "
      "group_size) -> (Tensor, Tensor)");
  m.def(
      "fan_in_score(Tensor input, Tensor weight, Tensor indices, Tensor? bias, Tensor candidates, "
      "SymInt group_size) -> Tensor");
  m.def(
      "fan_in_score_grad_input(Tensor grad_output, Tensor weight, Tensor indices, Tensor "
      "candidates, SymInt in_features, SymInt group_size) -> Tensor");
  m.def(
      "fan_in_score_grad_weight(Tensor grad_output, Tensor input, Tensor indices, Tensor "
      "candidates, SymInt out_features, SymInt group_size) -> Tensor");
  m.def(
      "fan_in_rewire(Tensor(a0!) weight, Tensor(a1!) indices, Tensor(a2!)[] state, SymInt "
      "in_features, SymInt group_size, SymInt criterion, SymInt scope, float amount, float "
      "init_scale, bool allow_duplicates, SymInt seed) -> Tensor");
}
