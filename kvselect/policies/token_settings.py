"""What the plugs of token-level selection read of a policy, and the bounds of these settings."""

from __future__ import annotations

from typing import Any, Literal, Protocol

from kvselect.checks import (
    require,
    require_bool,
    require_choice,
    require_float,
    require_int,
    require_scale,
    require_type,
)
from kvselect.dense_kernel import IMPLEMENTATIONS
from kvselect.queries import Phase
from kvselect.rolling_pools import MAX_SEGMENTS
from kvselect.rope import Rope
from kvselect.selection import require_pool_width
from kvselect.sketch import BLOCK_TOKENS, SKETCH_FORMATS

__all__ = [
    "PUBLISHED",
    "ListSettings",
    "TokenSettings",
    "VoteSettings",
    "require_layers",
    "require_token_settings",
    "window_rule",
]


class VoteSettings(Protocol):
    """How tokens are scored; `TokenSelect` says what each means."""

    @property
    def num_sink_tokens(self) -> int: ...
    @property
    def num_recent_tokens(self) -> int: ...
    @property
    def scope(self) -> Literal["kv_head", "layer"]: ...
    @property
    def score_scale(self) -> float | None: ...
    @property
    def normalise_over(self) -> Literal["visible", "candidates"]: ...
    @property
    def window_anchor(self) -> Literal["block_start", "block_end"]: ...
    @property
    def query_groups(self) -> int: ...
    @property
    def aggregate(self) -> Literal["mean", "sum_vote", "max_vote", "probe"]: ...
    @property
    def average_queries(self) -> Literal["before_rope", "after_rope"]: ...
    @property
    def positions(self) -> Literal["original", "compact"]: ...
    @property
    def sketch(self) -> Literal["int4", "int8"] | None: ...
    @property
    def keep(self) -> int: ...


class ListSettings(VoteSettings, Protocol):
    """How scores become lists."""

    @property
    def topk(self) -> int: ...
    @property
    def pool_width(self) -> int: ...
    @property
    def mass_target(self) -> float | None: ...
    @property
    def keep_max(self) -> int: ...
    @property
    def budget(self) -> int: ...
    @property
    def capacity(self) -> int: ...
    def dense_limit(self, rope: Rope | None) -> int: ...


class TokenSettings(ListSettings, Protocol):
    """All that `require_token_settings` checks, and what lasts longer than a step."""

    @property
    def chunk_size(self) -> int: ...
    @property
    def q_block_size(self) -> int: ...
    @property
    def num_tail_tokens(self) -> int: ...
    @property
    def tail_q_block_size(self) -> int: ...
    @property
    def overselect(self) -> float: ...
    @property
    def dense_layers(self) -> tuple[int, ...]: ...
    @property
    def dense_prefill(self) -> bool: ...
    @property
    def dense_below_tokens(self) -> int | None: ...
    @property
    def topk_max(self) -> int | None: ...
    @property
    def layer_budget(self) -> Literal["fixed", "entropy_pool"]: ...
    @property
    def similarity_threshold(self) -> float | None: ...
    @property
    def max_age(self) -> int: ...
    @property
    def similarity(self) -> Literal["min", "q10", "flat"] | None: ...
    @property
    def similarity_on(self) -> Literal["unrotated", "rotated"]: ...
    @property
    def num_segments(self) -> int | None: ...
    @property
    def pool_factor(self) -> float: ...
    @property
    def rolling_floor(self) -> float: ...
    @property
    def rolling_audit_interval(self) -> int | None: ...
    @property
    def prefill_attention(self) -> Literal["sparse_attention", "dense_kernel"]: ...


def window_rule(settings: VoteSettings, phase: Phase) -> str:
    """Where the window of a block is counted from, as the ops name it."""
    return "decode" if phase == "decode" else settings.window_anchor


def require_token_settings(settings: TokenSettings) -> None:
    """Each setting within its bounds, and all of them together.

    Raises
    ------
    ValueError, TypeError
        Naming the first that is not.
    """
    for name in ("topk", "num_recent_tokens", "chunk_size", "q_block_size"):
        require_int(getattr(settings, name), name, 1)
    for name in ("tail_q_block_size", "query_groups", "max_age"):
        require_int(getattr(settings, name), name, 1)
    for name in ("num_sink_tokens", "num_tail_tokens"):
        require_int(getattr(settings, name), name, 0)
    require_choice(settings.scope, "scope", ("kv_head", "layer"))
    require_choice(settings.normalise_over, "normalise_over", ("visible", "candidates"))
    require_choice(settings.window_anchor, "window_anchor", ("block_start", "block_end"))
    require_choice(settings.aggregate, "aggregate", ("mean", "sum_vote", "max_vote", "probe"))
    require_choice(settings.average_queries, "average_queries", ("before_rope", "after_rope"))
    require_choice(settings.positions, "positions", ("original", "compact"))
    require_choice(settings.sketch, "sketch", (*SKETCH_FORMATS, None))
    require_choice(settings.similarity, "similarity", ("min", "q10", "flat", None))
    require_choice(settings.similarity_on, "similarity_on", ("unrotated", "rotated"))
    require_pool_width(settings.pool_width)
    require_choice(settings.prefill_attention, "prefill_attention", IMPLEMENTATIONS)
    require_bool(settings.dense_prefill, "dense_prefill")
    overselect = require_float(settings.overselect, "overselect", "a float >= 1")
    require(overselect >= 1.0, "overselect", settings.overselect, "a float >= 1")
    if settings.score_scale is not None:
        require_scale(settings.score_scale, "score_scale")
    if settings.dense_below_tokens is not None:
        allowed = "None or an int >= 0"
        require_int(settings.dense_below_tokens, "dense_below_tokens", 0, allowed)
    _require_floor(settings)
    require_choice(settings.layer_budget, "layer_budget", ("fixed", "entropy_pool"))
    if settings.layer_budget == "entropy_pool":
        _require_pool(settings)
    if settings.aggregate == "probe":
        allowed = "'before_rope' with aggregate='probe' (it weighs queries at one angle)"
        first = settings.average_queries == "before_rope"
        require(first, "average_queries", settings.average_queries, allowed)
    if settings.similarity_threshold is not None:
        allowed = "None or a float in (0, 1]"
        threshold = require_float(settings.similarity_threshold, "similarity_threshold", allowed)
        require(0.0 < threshold <= 1.0, "similarity_threshold", threshold, allowed)
    if settings.num_segments is not None:
        allowed = f"None or an int in 2..{MAX_SEGMENTS}"
        require_int(settings.num_segments, "num_segments", 2, allowed)
        enough = settings.num_segments <= MAX_SEGMENTS
        require(enough, "num_segments", settings.num_segments, allowed)
        allowed = "1 with num_segments (a pool member's neighbours are not scored)"
        require(settings.pool_width == 1, "pool_width", settings.pool_width, allowed)
    for name in ("pool_factor", "rolling_floor"):
        value = require_float(getattr(settings, name), name, "a float > 0")
        require(value > 0.0, name, value, "a float > 0")
    if settings.rolling_audit_interval is not None:
        allowed = "None or an int >= 1"
        require_int(settings.rolling_audit_interval, "rolling_audit_interval", 1, allowed)
    require_layers(settings.dense_layers)

    if settings.sketch is not None:
        allowed = f"an int >= {BLOCK_TOKENS} with a sketch (its blocks; sketch=None has no bound)"
        enough = settings.num_recent_tokens >= BLOCK_TOKENS
        require(enough, "num_recent_tokens", settings.num_recent_tokens, allowed)
    if settings.window_anchor == "block_end":
        largest = settings.q_block_size
        if settings.num_tail_tokens:
            largest = max(largest, settings.tail_q_block_size)
        allowed = f"an int >= {largest} (q_block_size) with window_anchor='block_end'"
        enough = settings.num_recent_tokens >= largest
        require(enough, "num_recent_tokens", settings.num_recent_tokens, allowed)
    if settings.positions == "compact":
        allowed = "'unrotated' with positions='compact'"
        require(
            settings.similarity_on == "unrotated", "similarity_on", settings.similarity_on, allowed
        )


def require_layers(dense_layers: object) -> None:
    """TypeError, ValueError unless it is a tuple of layer indices."""
    require_type(dense_layers, tuple, "dense_layers", "a tuple of layer indices")
    assert isinstance(dense_layers, tuple)
    for layer in dense_layers:
        require_int(layer, "dense_layers", 0, "layer indices >= 0")


PUBLISHED: dict[str, Any] = {
    "scope": "layer",
    "score_scale": 1.0,
    "normalise_over": "candidates",
    "chunk_size": 512,
    "q_block_size": 512,
    "num_tail_tokens": 0,
    "window_anchor": "block_end",
    "query_groups": 1,
    "aggregate": "mean",
    "average_queries": "after_rope",
    "positions": "compact",
    "sketch": None,
    "overselect": 1.0,
    "similarity_threshold": 0.9,
    "similarity": "flat",
}
"""Settings of TokenSelect as it was published, where they differ from the defaults."""


def _require_pool(settings: TokenSettings) -> None:
    """A pool moves tokens between the layers of one pass; other ways to move them do not mix."""
    why = "with layer_budget='entropy_pool'"
    allowed = f"None {why} (each would set the number of tokens)"
    require(settings.mass_target is None, "mass_target", settings.mass_target, allowed)
    allowed = f"None {why} (a list that is reused takes no part in the pool of its pass)"
    threshold = settings.similarity_threshold
    require(threshold is None, "similarity_threshold", threshold, allowed)
    allowed = f"None {why} (a sweep scores too little for an entropy)"
    require(settings.num_segments is None, "num_segments", settings.num_segments, allowed)
    allowed = f"1 {why} (its counts rank tokens by their own scores)"
    require(settings.pool_width == 1, "pool_width", settings.pool_width, allowed)


def _require_floor(settings: TokenSettings) -> None:
    """A mass floor needs scores that are shares of attention mass, of all that is visible."""
    if settings.mass_target is None:
        allowed = "None without mass_target"
        require(settings.topk_max is None, "topk_max", settings.topk_max, allowed)
        return
    allowed = "None or a float in (0, 1)"
    target = require_float(settings.mass_target, "mass_target", allowed)
    require(0.0 < target < 1.0, "mass_target", target, allowed)
    allowed = f"an int >= {settings.topk} (topk) with mass_target"
    require_int(settings.topk_max, "topk_max", settings.topk, allowed)
    allowed = "None with mass_target"
    require(settings.score_scale is None, "score_scale", settings.score_scale, allowed)
    require(settings.num_segments is None, "num_segments", settings.num_segments, allowed)
    allowed = "'visible' with mass_target"
    require(
        settings.normalise_over == "visible", "normalise_over", settings.normalise_over, allowed
    )
    allowed = "'sum_vote' or 'mean' or 'probe' with mass_target"
    require(settings.aggregate != "max_vote", "aggregate", settings.aggregate, allowed)
    require(settings.pool_width == 1, "pool_width", settings.pool_width, "1 with mass_target")
