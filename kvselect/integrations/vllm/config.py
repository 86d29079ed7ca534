"""Which policy a server runs, and what it cannot run: every refusal in one sentence."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from kvselect.checks import HEAD_DIMS, STORAGE_DTYPES, require
from kvselect.dense_kernel import dense_kernel
from kvselect.engine_block_statistics import require_whole_blocks
from kvselect.engine_cache import require_page_block_size, sketch_share
from kvselect.ops import build_info
from kvselect.policies import ActQKV, Dense, Landmark, Quest, StreamingLLM, TokenSelect
from kvselect.policies.base import Policy, policy_from_dict
from kvselect.policies.block_policy import BlockPolicy

__all__ = [
    "ADDITIONAL_CONFIG_KEY",
    "POLICY_VARIABLE",
    "LayerFacts",
    "ServerFacts",
    "configured_policy",
    "extra_share",
    "require_attention",
    "require_cuda",
    "require_layer",
    "require_memory",
    "require_pages",
    "require_policy",
    "require_servable",
    "require_server",
]

POLICY_VARIABLE = "KVSELECT_VLLM_POLICY"
ADDITIONAL_CONFIG_KEY = "kvselect"

SERVED = (TokenSelect, StreamingLLM, Quest, Landmark, ActQKV, Dense)

# Their attention rotates queries and keys by the model's one table, in every layer, as the last
# thing before attention: what is rotated back here is what they had before.
ROTATING = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
)
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def configured_policy(
    environ: Mapping[str, str] | None = None, additional_config: object = None
) -> Policy | None:
    """The policy that the user asked for; None: none, and vLLM's own attention runs.

    Parameters
    ----------
    environ : mapping or None
        Holds the policy's dict as JSON under ``KVSELECT_VLLM_POLICY``; None: ``os.environ``.
    additional_config : object
        vLLM's; where it is a mapping, its entry "kvselect" is a policy's dict.

    Raises
    ------
    ValueError, TypeError
        If it is no policy, one that cannot be served, or the two places disagree.
    """
    found = []
    text = (os.environ if environ is None else environ).get(POLICY_VARIABLE, "")
    if text.strip():
        try:
            settings = json.loads(text)
        except json.JSONDecodeError as error:
            allowed = f"a policy's dict as JSON ({error})"
            require(False, POLICY_VARIABLE, text, allowed)
        found.append(policy_from_dict(settings))
    if isinstance(additional_config, Mapping) and ADDITIONAL_CONFIG_KEY in additional_config:
        found.append(policy_from_dict(additional_config[ADDITIONAL_CONFIG_KEY]))
    if not found:
        return None
    allowed = f"the policy of {POLICY_VARIABLE}, {found[0]}, or no entry"
    name = f"additional_config[{ADDITIONAL_CONFIG_KEY!r}]"
    require(found[0] == found[-1], name, found[-1], allowed)
    require_servable(found[0])
    return found[0]


def require_servable(policy: Policy) -> None:
    """Refuse what remembers something of a row that a server's next step cannot find again.

    Raises
    ------
    ValueError
    """
    names = " or ".join(served.__name__ for served in SERVED)
    require(type(policy) in SERVED, "policy", type(policy).__name__, f"{names} under vLLM")
    remembered = {"num_segments": None, "layer_budget": "fixed", "probe_statistics": "window"}
    for name, off in remembered.items():
        value = getattr(policy, name, off)
        allowed = f"{off!r} under vLLM (what is remembered between steps is not kept by its blocks)"
        require(value == off, name, value, allowed)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerFacts:
    """What the whole server is, as far as a policy may not fit it."""

    architecture: str
    rope_type: str
    speculative_method: str | None
    num_speculative_tokens: int
    kv_connector: str | None
    context_parallel_size: int
    pipeline_parallel_size: int
    tensor_parallel_size: int
    num_kv_heads: int
    num_layers: int
    num_ubatches: int


def require_server(policy: Policy, facts: ServerFacts) -> None:
    """Refuse models and ways of serving.

    Raises
    ------
    ValueError
    """
    if needs_rotation(policy):
        allowed = (
            f"{' or '.join(ROTATING)} with {type(policy).__name__} in these settings, which needs "
            "queries before RoPE (or positions='original' with average_queries='after_rope' and "
            "similarity_on='rotated')"
        )
        require(facts.architecture in ROTATING, "model", facts.architecture, allowed)
        allowed = " or ".join(map(repr, ROPE_TYPES))
        require(facts.rope_type in ROPE_TYPES, "rope_type", facts.rope_type, allowed)
    allowed = "None or 'ngram' under kvselect (a draft model's layers would select as well)"
    method = facts.speculative_method
    require(method in (None, "ngram"), "speculative", method, allowed)
    # More queries than that are blocks of prefill, which choose together.
    most = policy.tail_q_block_size - 1
    num_drafts = facts.num_speculative_tokens
    allowed = f"at most {most}, tail_q_block_size - 1 (each draft selects as a decode step does)"
    require(num_drafts <= most, "num_speculative_tokens", num_drafts, allowed)
    allowed = "None under kvselect (blocks from elsewhere have no sketch)"
    require(facts.kv_connector is None, "kv_connector", facts.kv_connector, allowed)
    size = facts.context_parallel_size
    require(size == 1, "context_parallel_size", size, "1 under kvselect (a rank needs whole rows)")
    if policy.query_aware and type(policy) is not Dense:
        size, heads = facts.tensor_parallel_size, facts.num_kv_heads
        allowed = f"at most {heads}, the model's KV heads (each selects by all of its queries)"
        require(size <= heads, "tensor_parallel_size", size, allowed)
    reason, ranks = policy.needs_all_heads, facts.tensor_parallel_size
    require(reason is None or ranks == 1, "tensor_parallel_size", ranks, f"1 ({reason})")
    threshold = getattr(policy, "similarity_threshold", None)
    if policy.joins_heads and facts.tensor_parallel_size > 1:
        allowed = "None with scope='layer' in tensor parallel (ranks would have to agree), or scope"
        require(threshold is None, "similarity_threshold", threshold, f"{allowed}='kv_head'")
    if facts.pipeline_parallel_size > 1:
        allowed = "None in pipeline parallel (other requests run between two steps of one)"
        require(threshold is None, "similarity_threshold", threshold, allowed)
    allowed = "1 under kvselect (no --enable-dbo, no --ubatch-size: a step comes in one piece)"
    require(facts.num_ubatches == 1, "ubatches", facts.num_ubatches, allowed)
    bad = [index for index in policy.dense_layers if index >= facts.num_layers]
    allowed = f"indices of this model's layers, 0..{facts.num_layers - 1}"
    require(not bad, "dense_layers", bad, allowed)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerFacts:
    """What one attention layer is, as vLLM says when it makes it."""

    attn_type: str
    head_dim: int
    dtype: torch.dtype
    kv_cache_dtype: str
    has_alibi: bool
    shares_kv: bool
    page_block_size: int
    device_type: str
    softcap: float


def require_layer(policy: Policy, facts: LayerFacts) -> None:
    """Refuse layers. One with a sliding window is not to be asked: it runs vLLM's own attention.

    Raises
    ------
    ValueError
    """
    kind = facts.attn_type
    require(kind == "decoder", "attn_type", kind, "'decoder' (no cross or encoder attention)")
    allowed = " or ".join(map(str, HEAD_DIMS))
    require(facts.head_dim in HEAD_DIMS, "head_dim", facts.head_dim, allowed)
    allowed = " or ".join(map(str, STORAGE_DTYPES))
    require(facts.dtype in STORAGE_DTYPES, "dtype", facts.dtype, allowed)
    stored, own = facts.kv_cache_dtype, str(facts.dtype).removeprefix("torch.")
    allowed = f"'auto' under kvselect (its kernels read keys of the model's dtype, {own})"
    require(stored in ("auto", own), "kv_cache_dtype", stored, allowed)
    require(not facts.has_alibi, "alibi_slopes", "slopes", "None")
    allowed = "None under kvselect (each layer selects from its own keys)"
    require(not facts.shares_kv, "kv_sharing_target_layer_name", "a layer", allowed)
    require_pages(policy, facts.page_block_size)
    if policy.prefill_attention == "dense_kernel":
        dense_kernel(torch.device(facts.device_type), facts.dtype, facts.softcap)


def require_pages(policy: Policy, page_block_size: int) -> None:
    """ValueError unless pages of so many tokens can keep what the policy has beside their keys."""
    require_page_block_size(page_block_size, policy.required_sketch)
    if isinstance(policy, BlockPolicy):
        require_whole_blocks(page_block_size, policy.new_statistics().block_size)


def extra_share(policy: Policy, page_block_size: int, head_dim: int, itemsize: int) -> float:
    """Bytes that a policy keeps beside keys and values, over theirs."""
    heads = {"num_q_heads": 1, "num_kv_heads": 1}
    kept, _ = policy.extra_bytes(page_block_size, head_dim=head_dim, itemsize=itemsize, **heads)
    pages = 2 * page_block_size * head_dim * itemsize
    return kept / pages + sketch_share(policy.required_sketch, head_dim, itemsize)


def require_attention(kind: str, sees_later_tokens: bool) -> None:
    """Refuse layers that are more than attention over all earlier tokens of the request.

    Parameters
    ----------
    kind : str
        Class of vLLM's layer.
    sees_later_tokens : bool
        Whether some tokens attend to later ones, as those of an image may.

    Raises
    ------
    ValueError
    """
    allowed = "Attention under kvselect, or one with a window, which runs vLLM's own"
    require(kind == "Attention", "attention layer", kind, allowed)
    allowed = "causal attention under kvselect"
    require(not sees_later_tokens, "attention", "tokens that attend to later ones", allowed)


def require_memory(
    cache_bytes: int, extra_bytes: int, available_bytes: int, device_type: str = "cpu"
) -> None:
    """Refuse to start where keys, values and what is kept beside them do not fit.

    Parameters
    ----------
    cache_bytes, extra_bytes : int
        What vLLM will take for keys and values, and we beside them.
    available_bytes : int
        Before either is taken.
    device_type : str
        Whose memory it is: "cpu" or "cuda".

    Raises
    ------
    ValueError
    """
    share = extra_bytes / max(cache_bytes, 1)
    gib = 2.0**30
    allowed = (
        f"at most {available_bytes / (1 + share) / gib:.2f} GiB: {available_bytes / gib:.2f} GiB "
        f"are free, and kvselect takes {share:.0%} of the cache on top"
    )
    got = f"{cache_bytes / gib:.2f} GiB"
    fits = cache_bytes + extra_bytes <= available_bytes
    asked_by = {"cpu": "VLLM_CPU_KVCACHE_SPACE", "cuda": "--gpu-memory-utilization"}
    require(fits, f"KV cache ({asked_by[device_type]})", got, allowed)


def require_cuda() -> None:
    """ValueError unless this kvselect has its CUDA kernels."""
    info = build_info()
    name, got = "kvselect's CUDA module", "none"
    if info["cuda_archs"]:
        got = f"one that torch {info['torch']} does not load"
    allowed = "one beside a torch with CUDA (build it where nvcc is, KVSELECT_CUDA=on)"
    require(info["cuda_loaded"] is True, name, got, allowed)


def require_policy(policy: Policy | None) -> None:
    """ValueError where there is none for a backend that only selects."""
    allowed = f"one ({POLICY_VARIABLE}, or additional_config) with --attention-backend CUSTOM"
    require(policy is not None, "policy", policy, allowed)


def needs_rotation(policy: Policy) -> bool:
    """Whether steps ask for queries, or keys, before RoPE."""
    return policy.caches_unrotated or averages_unrotated(policy) or compares_unrotated(policy)


def averages_unrotated(policy: Policy) -> bool:
    """Whether prefill asks for queries before RoPE although keys are cached rotated."""
    if policy.caches_unrotated or getattr(policy, "dense_prefill", False):
        return False
    return getattr(policy, "average_queries", None) == "before_rope"


def compares_unrotated(policy: Policy) -> bool:
    """Whether decode steps ask for queries before RoPE although keys are cached rotated."""
    if policy.caches_unrotated or getattr(policy, "similarity_threshold", None) is None:
        return False
    return getattr(policy, "similarity_on", None) == "unrotated"


def describe(policy: Policy | None) -> str:
    """For the log."""
    settings: dict[str, Any] = {} if policy is None else policy.to_dict()
    return json.dumps(settings)
