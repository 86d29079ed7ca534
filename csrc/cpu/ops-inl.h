// Every op over the vector type of the including file, in the order in which they use each other.

#include "cpu/exp-inl.h"
#include "cpu/soft_cap-inl.h"
#include "cpu/key_logits-inl.h"
#if KVS_HAS_BF16_DOT
#include "cpu/key_logits_bf16-inl.h"
#endif
#include "cpu/gather_tokens-inl.h"
#include "cpu/kv_append-inl.h"
#include "cpu/list_blocks-inl.h"
#include "cpu/merge_splits-inl.h"
#include "cpu/recovered_mass-inl.h"
#if KVS_HAS_TILE_DOT
#include "cpu/tile_dot-inl.h"
#endif
#include "cpu/sketch_logits-inl.h"
#include "cpu/candidate_logits-inl.h"
#include "cpu/score_tokens-inl.h"
#include "cpu/select_tokens-inl.h"
#include "cpu/selection_cache_step-inl.h"
#include "cpu/matmul-inl.h"
#include "cpu/weighted_sum-inl.h"
#if KVS_HAS_TILE_DOT
#include "cpu/attention_tiles-inl.h"
#endif
#include "cpu/sparse_attention-inl.h"
#include "cpu/query_panel-inl.h"
#include "cpu/block_sparse_attention-inl.h"
#include "cpu/block_mass-inl.h"
#include "cpu/rolling_sweep-inl.h"
