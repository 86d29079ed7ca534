"""kvselect: find the few cached tokens that matter, attend exactly to them, skip the rest."""

from typing import TYPE_CHECKING, Any

from kvselect import reference
from kvselect.attention import merge_splits, recovered_mass, sparse_attention
from kvselect.block_sparse import block_mass, block_sparse_attention
from kvselect.cache import KVCache
from kvselect.checks import UnsupportedModelError
from kvselect.decode import DecodeInfo, decode_step
from kvselect.ops import (
    build_info,
    cpu_implementation,
    cpu_implementations,
    set_cpu_implementation,
)
from kvselect.policies import (
    ActQKV,
    AdaSpa,
    ColumnRank,
    Coverage,
    Dense,
    Dilate,
    Dilated,
    InfLLM,
    Landmark,
    LayerSchedule,
    MaxMin,
    Policy,
    PolicyState,
    Quest,
    RegionQuota,
    SnapKV,
    SpAtten,
    StreamingLLM,
    TokenSelect,
    policy_from_dict,
)
from kvselect.prefill import prefill
from kvselect.rope import Rope
from kvselect.score import score_tokens
from kvselect.selection import Selection, select_tokens
from kvselect.selection_cache import SelectionCache
from kvselect.tiered_cache import TieredKVCache

if TYPE_CHECKING:
    from kvselect.integrations.hf import attach

__all__ = [
    "ActQKV",
    "AdaSpa",
    "ColumnRank",
    "Coverage",
    "DecodeInfo",
    "Dense",
    "Dilate",
    "Dilated",
    "InfLLM",
    "KVCache",
    "Landmark",
    "LayerSchedule",
    "MaxMin",
    "Policy",
    "PolicyState",
    "Quest",
    "RegionQuota",
    "Rope",
    "Selection",
    "SelectionCache",
    "SnapKV",
    "SpAtten",
    "StreamingLLM",
    "TieredKVCache",
    "TokenSelect",
    "UnsupportedModelError",
    "attach",
    "block_mass",
    "block_sparse_attention",
    "build_info",
    "cpu_implementation",
    "cpu_implementations",
    "decode_step",
    "merge_splits",
    "policy_from_dict",
    "prefill",
    "recovered_mass",
    "reference",
    "score_tokens",
    "select_tokens",
    "set_cpu_implementation",
    "sparse_attention",
]


def __getattr__(name: str) -> Any:
    # transformers takes seconds to import, and the functional API does not need it.
    if name == "attach":
        from kvselect.integrations.hf import attach

        return attach
    if name == "__version__":
        from importlib.metadata import version

        return version("kvselect")
    raise AttributeError(f"module 'kvselect' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
