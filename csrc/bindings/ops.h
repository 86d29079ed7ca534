// The CPU op of every schema in ops.cpp: check, allocate outputs, fill the params, run.
#pragma once

#include <tuple>

#include "bindings/checks.h"

namespace kvselect::bindings {

void kv_append(Tensor k, Tensor v, OptionalTensor num_valid, Tensor k_cache, Tensor v_cache,
               OptionalTensor block_table, Tensor cache_seqlens, OptionalTensor sketch,
               StringArg sketch_format, Tensor num_nonfinite, OptionalTensor starts,
               bool sketch_in_pages);

std::tuple<Tensor, Tensor, Tensor> score_tokens(
    Tensor q, OptionalTensor q_local, Tensor k_cache, OptionalTensor block_table,
    Tensor cache_seqlens, OptionalTensor starts, OptionalTensor sketch, StringArg sketch_format,
    OptionalTensor q_block_offsets, int64_t seqlen_q, StringArg window_rule,
    int64_t num_sink_tokens, int64_t num_recent_tokens, int64_t keep, double scale,
    bool normalise_candidates_only, bool max_vote, OptionalTensor cos, OptionalTensor sin,
    int64_t rope_start, bool rope_interleaved, OptionalTensor hit, int64_t max_seqlen_k,
    double softcap, OptionalTensor sink_logits, OptionalTensor ranking, bool sketch_in_pages);
std::tuple<Tensor, Tensor, Tensor> score_tokens_reuse(
    Tensor q, OptionalTensor q_local, Tensor k_cache, OptionalTensor block_table,
    Tensor cache_seqlens, OptionalTensor starts, OptionalTensor sketch, StringArg sketch_format,
    OptionalTensor q_block_offsets, int64_t seqlen_q, StringArg window_rule,
    int64_t num_sink_tokens, int64_t num_recent_tokens, int64_t keep, double scale,
    bool normalise_candidates_only, bool max_vote, OptionalTensor cos, OptionalTensor sin,
    int64_t rope_start, bool rope_interleaved, Tensor hit, int64_t max_seqlen_k, double softcap,
    OptionalTensor sink_logits, OptionalTensor ranking, bool sketch_in_pages, Tensor compared_q,
    Tensor cache_nonfinite, StringArg similarity, double similarity_threshold, int64_t max_age,
    int64_t dense_limit, Tensor anchor_query, Tensor age, Tensor expected_seqlens,
    Tensor known_nonfinite, Tensor reuse_counts);

void select_tokens(Tensor scores, Tensor cache_seqlens, OptionalTensor starts,
                   OptionalTensor q_block_offsets, int64_t seqlen_q, StringArg window_rule,
                   int64_t num_sink_tokens, int64_t num_recent_tokens, int64_t keep,
                   int64_t pool_width, OptionalTensor hit, Tensor indices, Tensor topk_length,
                   Tensor kept_score, OptionalTensor ranking);

std::tuple<Tensor, Tensor> sparse_attention(
    Tensor q, Tensor k_cache, Tensor v_cache, OptionalTensor block_table, Tensor cache_seqlens,
    OptionalTensor starts, OptionalTensor indices, OptionalTensor topk_length,
    OptionalTensor q_block_offsets, double softmax_scale, OptionalTensor cos, OptionalTensor sin,
    int64_t rope_start, bool rope_interleaved, double softcap, OptionalTensor sink_logits);

std::tuple<Tensor, Tensor, Tensor> gather_tokens(Tensor k_cache, Tensor v_cache,
                                                 OptionalTensor block_table, Tensor cache_seqlens,
                                                 OptionalTensor starts, Tensor indices,
                                                 Tensor topk_length, OptionalTensor q_block_offsets,
                                                 int64_t seqlen_q, OptionalTensor cos,
                                                 OptionalTensor sin, int64_t rope_start,
                                                 bool rope_interleaved);

std::tuple<Tensor, Tensor> list_blocks(Tensor picked, Tensor first_block, Tensor end,
                                       OptionalTensor starts, Tensor finite,
                                       int64_t num_window_blocks, int64_t width);

std::tuple<Tensor, Tensor> merge_splits(Tensor partial_out, Tensor partial_lse);

Tensor recovered_mass(Tensor q, Tensor k_cache, OptionalTensor block_table, Tensor cache_seqlens,
                      OptionalTensor starts, Tensor indices, Tensor topk_length,
                      OptionalTensor q_block_offsets, double softmax_scale, int64_t max_seqlen_k,
                      double softcap);

std::tuple<Tensor, Tensor> block_sparse_attention(Tensor q, Tensor k, Tensor v, Tensor block_mask,
                                                  OptionalTensor row_offsets,
                                                  OptionalTensor seqlens_q,
                                                  OptionalTensor cache_seqlens,
                                                  int64_t q_block_size, int64_t kv_block_size,
                                                  bool causal, double softmax_scale, double softcap,
                                                  StringArg implementation);

Tensor block_mass(Tensor q, Tensor k, OptionalTensor lse, OptionalTensor seqlens_q,
                  OptionalTensor cache_seqlens, int64_t q_block_size, int64_t kv_block_size,
                  bool causal, int64_t row_stride, double softmax_scale, double softcap);

Tensor selection_cache_step(Tensor q, Tensor cache_seqlens, OptionalTensor starts,
                            Tensor num_nonfinite, StringArg similarity, double similarity_threshold,
                            int64_t max_age, int64_t dense_limit, Tensor anchor_query, Tensor age,
                            Tensor expected_seqlens, Tensor known_nonfinite, Tensor reuse_counts);

std::tuple<Tensor, Tensor> rolling_sweep(
    Tensor q, OptionalTensor q_local, Tensor k_cache, OptionalTensor block_table,
    Tensor cache_seqlens, OptionalTensor starts, OptionalTensor sketch, StringArg sketch_format,
    int64_t num_sink_tokens, int64_t num_recent_tokens, int64_t keep, double scale,
    bool normalise_candidates_only, OptionalTensor cos, OptionalTensor sin, int64_t rope_start,
    bool rope_interleaved, OptionalTensor hit, OptionalTensor scan_all, Tensor pool,
    Tensor pool_length, Tensor scanned_to, Tensor next_segment, Tensor indices, Tensor topk_length,
    Tensor kept_score, double softcap, OptionalTensor sink_logits);

std::string build_info();
std::string cpu_implementations();
std::string cpu_implementation();
void set_cpu_implementation(StringArg name);
void advise_huge_pages_at(int64_t address, int64_t num_bytes);

}  // namespace kvselect::bindings
