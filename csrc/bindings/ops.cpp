// Every op of kvselect: its schema, and the CPU function behind it. Fakes live in kvselect/ops.py.
#include "bindings/ops.h"

#include <torch/csrc/stable/library.h>

using namespace kvselect::bindings;

// Sizes that change from call to call are SymInt, so that torch.compile traces them once instead of
// once a length.
STABLE_TORCH_LIBRARY(kvselect, m) {
    m.def(
        "kv_append(Tensor k, Tensor v, Tensor? num_valid, Tensor(a!) k_cache, Tensor(b!) v_cache, "
        "Tensor? block_table, Tensor(c!) cache_seqlens, Tensor(d!)? sketch, str sketch_format, "
        "Tensor(e!) num_nonfinite, Tensor? starts=None, bool sketch_in_pages=False) -> ()");
    m.def(
        "score_tokens(Tensor q, Tensor? q_local, Tensor k_cache, Tensor? block_table, "
        "Tensor cache_seqlens, Tensor? starts, Tensor? sketch, str sketch_format, "
        "Tensor? q_block_offsets, SymInt seqlen_q, str window_rule, int num_sink_tokens, "
        "int num_recent_tokens, SymInt keep, float scale, bool normalise_candidates_only, "
        "bool max_vote, Tensor? cos, Tensor? sin, int rope_start, bool rope_interleaved, "
        "Tensor? hit, SymInt max_seqlen_k, float softcap=0.0, Tensor? sink_logits=None, "
        "Tensor(a!)? ranking=None, bool sketch_in_pages=False) -> (Tensor scores, Tensor lse, "
        "Tensor num_nonfinite)");
    // With a selection cache: an overload, since eleven more arguments cost every call 1.1 us.
    m.def(
        "score_tokens.reuse(Tensor q, Tensor? q_local, Tensor k_cache, Tensor? block_table, "
        "Tensor cache_seqlens, Tensor? starts, Tensor? sketch, str sketch_format, "
        "Tensor? q_block_offsets, SymInt seqlen_q, str window_rule, int num_sink_tokens, "
        "int num_recent_tokens, SymInt keep, float scale, bool normalise_candidates_only, "
        "bool max_vote, Tensor? cos, Tensor? sin, int rope_start, bool rope_interleaved, "
        "Tensor(a!) hit, SymInt max_seqlen_k, float softcap, Tensor? sink_logits, "
        "Tensor(b!)? ranking, bool sketch_in_pages, Tensor compared_q, Tensor cache_nonfinite, "
        "str similarity, float similarity_threshold, int max_age, SymInt dense_limit, "
        "Tensor(c!) anchor_query, Tensor(d!) age, Tensor(e!) expected_seqlens, "
        "Tensor(f!) known_nonfinite, Tensor(g!) reuse_counts) -> (Tensor scores, Tensor lse, "
        "Tensor num_nonfinite)");
    m.def(
        "select_tokens(Tensor scores, Tensor cache_seqlens, Tensor? starts, "
        "Tensor? q_block_offsets, SymInt seqlen_q, str window_rule, int num_sink_tokens, "
        "int num_recent_tokens, SymInt keep, int pool_width, Tensor? hit, Tensor(a!) indices, "
        "Tensor(b!) topk_length, Tensor(c!) kept_score, Tensor(d!)? ranking=None) -> ()");
    m.def(
        "sparse_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor? block_table, "
        "Tensor cache_seqlens, Tensor? starts, Tensor? indices, Tensor? topk_length, "
        "Tensor? q_block_offsets, float softmax_scale, Tensor? cos, Tensor? sin, int rope_start, "
        "bool rope_interleaved, float softcap=0.0, Tensor? sink_logits=None) -> (Tensor out, "
        "Tensor lse)");
    m.def(
        "list_blocks(Tensor picked, Tensor first_block, Tensor end, Tensor? starts, Tensor finite, "
        "SymInt num_window_blocks, SymInt width) -> (Tensor indices, Tensor count)");
    m.def(
        "gather_tokens(Tensor k_cache, Tensor v_cache, Tensor? block_table, Tensor cache_seqlens, "
        "Tensor? starts, Tensor indices, Tensor topk_length, Tensor? q_block_offsets, "
        "SymInt seqlen_q, Tensor? cos, Tensor? sin, int rope_start, bool rope_interleaved) "
        "-> (Tensor k, Tensor v, Tensor cu_seqlens)");
    m.def("merge_splits(Tensor partial_out, Tensor partial_lse) -> (Tensor out, Tensor lse)");
    m.def(
        "recovered_mass(Tensor q, Tensor k_cache, Tensor? block_table, Tensor cache_seqlens, "
        "Tensor? starts, Tensor indices, Tensor topk_length, Tensor? q_block_offsets, "
        "float softmax_scale, SymInt max_seqlen_k, float softcap=0.0) -> Tensor");
    m.def(
        "block_sparse_attention(Tensor q, Tensor k, Tensor v, Tensor block_mask, "
        "Tensor? row_offsets, Tensor? seqlens_q, Tensor? cache_seqlens, int q_block_size, "
        "int kv_block_size, bool causal, float softmax_scale, float softcap=0.0, "
        "str implementation='auto') -> (Tensor out, Tensor lse)");
    m.def(
        "block_mass(Tensor q, Tensor k, Tensor? lse, Tensor? seqlens_q, Tensor? cache_seqlens, "
        "int q_block_size, int kv_block_size, bool causal, int row_stride, float softmax_scale, "
        "float softcap=0.0) -> Tensor");
    m.def(
        "selection_cache_step(Tensor q, Tensor cache_seqlens, Tensor? starts, "
        "Tensor num_nonfinite, str similarity, float similarity_threshold, int max_age, "
        "SymInt dense_limit, Tensor(a!) anchor_query, Tensor(b!) age, "
        "Tensor(c!) expected_seqlens, Tensor(d!) known_nonfinite, Tensor(e!) reuse_counts) "
        "-> Tensor hit");
    m.def(
        "rolling_sweep(Tensor q, Tensor? q_local, Tensor k_cache, Tensor? block_table, "
        "Tensor cache_seqlens, Tensor? starts, Tensor? sketch, str sketch_format, "
        "int num_sink_tokens, int num_recent_tokens, SymInt keep, float scale, "
        "bool normalise_candidates_only, Tensor? cos, Tensor? sin, int rope_start, "
        "bool rope_interleaved, Tensor? hit, Tensor? scan_all, Tensor(a!) pool, "
        "Tensor(b!) pool_length, Tensor(c!) scanned_to, Tensor(d!) next_segment, "
        "Tensor(e!) indices, Tensor(f!) topk_length, Tensor(g!) kept_score, float softcap=0.0, "
        "Tensor? sink_logits=None) "
        "-> (Tensor num_seen, Tensor num_nonfinite)");
    m.def("build_info() -> str");
    m.def("cpu_implementations() -> str");
    m.def("cpu_implementation() -> str");
    m.def("set_cpu_implementation(str name) -> ()");
    m.def("set_cuda_overlap(bool on) -> ()");
    m.def("advise_huge_pages(int address, int num_bytes) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(kvselect, CPU, m) {
    m.impl("kv_append", TORCH_BOX(&kv_append));
    m.impl("score_tokens", TORCH_BOX(&score_tokens));
    m.impl("score_tokens.reuse", TORCH_BOX(&score_tokens_reuse));
    m.impl("select_tokens", TORCH_BOX(&select_tokens));
    m.impl("sparse_attention", TORCH_BOX(&sparse_attention));
    m.impl("gather_tokens", TORCH_BOX(&gather_tokens));
    m.impl("list_blocks", TORCH_BOX(&list_blocks));
    m.impl("merge_splits", TORCH_BOX(&merge_splits));
    m.impl("recovered_mass", TORCH_BOX(&recovered_mass));
    m.impl("block_sparse_attention", TORCH_BOX(&block_sparse_attention));
    m.impl("block_mass", TORCH_BOX(&block_mass));
    m.impl("selection_cache_step", TORCH_BOX(&selection_cache_step));
    m.impl("rolling_sweep", TORCH_BOX(&rolling_sweep));
}

// No tensor tells these where to run, so they are registered for every backend.
STABLE_TORCH_LIBRARY_IMPL(kvselect, CompositeExplicitAutograd, m) {
    m.impl("build_info", TORCH_BOX(&build_info));
    m.impl("cpu_implementations", TORCH_BOX(&cpu_implementations));
    m.impl("cpu_implementation", TORCH_BOX(&cpu_implementation));
    m.impl("set_cpu_implementation", TORCH_BOX(&set_cpu_implementation));
    m.impl("advise_huge_pages", TORCH_BOX(&advise_huge_pages_at));
}
