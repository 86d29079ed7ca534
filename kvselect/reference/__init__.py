"""Every op of kvselect in plain float64 torch: the specification that the kernels are held to.

Loops are welcome here, tricks are not. Functions under the names of the public ones take the same
arguments; the ones with ``query_blocks`` in their names also know what only the ops know: blocks of
queries, window rules, several scoring vectors, compact positions, reused lists. All of them
take any cache that has the attributes of `CacheLike`: a KVCache, or a PlainCache of two tensors.
"""

from kvselect.reference.attention import (
    gather_tokens,
    merge_splits,
    recovered_mass,
    sparse_attention,
)
from kvselect.reference.block_scores import (
    block_lse,
    blocks_of_row,
    finite_keys,
    list_blocks,
    local_mass,
    moment_lse,
    page_bound,
    quest_pages,
    representative,
)
from kvselect.reference.block_sparse import block_mass, block_sparse_attention
from kvselect.reference.cache import (
    BLOCK_TOKENS,
    CacheLike,
    PlainCache,
    decode_block,
    encode_block,
    kv_append,
    sketched_keys,
)
from kvselect.reference.cascade import cascade_keep, heaviest, token_sums
from kvselect.reference.decode import DecodeState, StepInfo, decode_step
from kvselect.reference.layer_budgets import (
    cosine_score,
    normalised_entropy,
    pool_count,
    probe_query,
)
from kvselect.reference.query_blocks import WINDOW_RULES, BlockRange, QueryBlocks
from kvselect.reference.rotation import RopeTable, rotate
from kvselect.reference.score import BlockScores, score_query_blocks, score_tokens
from kvselect.reference.selection import BlockLists, select_query_blocks, select_tokens
from kvselect.reference.selection_cache import CacheStep, selection_cache_step
from kvselect.reference.stingy import (
    scoring_slot,
    stingy_attention,
    stingy_estimate,
    stingy_slots,
)
from kvselect.reference.sweep import SweepState, SweptLists, rolling_sweep

__all__ = [
    "BLOCK_TOKENS",
    "WINDOW_RULES",
    "BlockLists",
    "BlockRange",
    "BlockScores",
    "CacheLike",
    "CacheStep",
    "DecodeState",
    "PlainCache",
    "QueryBlocks",
    "RopeTable",
    "StepInfo",
    "SweepState",
    "SweptLists",
    "block_lse",
    "block_mass",
    "block_sparse_attention",
    "blocks_of_row",
    "cascade_keep",
    "cosine_score",
    "decode_block",
    "decode_step",
    "encode_block",
    "finite_keys",
    "gather_tokens",
    "heaviest",
    "kv_append",
    "list_blocks",
    "local_mass",
    "merge_splits",
    "moment_lse",
    "normalised_entropy",
    "page_bound",
    "pool_count",
    "probe_query",
    "quest_pages",
    "recovered_mass",
    "representative",
    "rolling_sweep",
    "rotate",
    "score_query_blocks",
    "score_tokens",
    "scoring_slot",
    "select_query_blocks",
    "select_tokens",
    "selection_cache_step",
    "sketched_keys",
    "sparse_attention",
    "stingy_attention",
    "stingy_estimate",
    "stingy_slots",
    "token_sums",
]
