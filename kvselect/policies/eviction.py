"""EvictionPolicy: what methods share that drop tokens of the prompt once, for good."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from kvselect.attention import attend_queries
from kvselect.block_masks import BlockMask
from kvselect.cache import KVCache
from kvselect.checks import require, require_choice, require_float, require_int, require_type
from kvselect.crossovers import Crossover
from kvselect.evictable_cache import EvictableKVCache
from kvselect.fixed_cache import FixedKVCache
from kvselect.policies.base import Policy, PolicyState, visible_tokens
from kvselect.queries import Phase, Queries
from kvselect.rope import Rope
from kvselect.selection import Selection
from kvselect.tensor_parallel import num_ranks, sum_over_ranks

__all__ = ["EvictionPolicy", "EvictionState", "Prompt", "Span", "best"]


class Prompt(NamedTuple):
    """Sinks and span of one row, with the queries of their tokens: finite, float32, rotated."""

    queries: Tensor  # [num_kv_heads, group_size, num_tokens, head_dim]
    keys: Tensor  # [num_kv_heads, num_tokens, head_dim]
    num_sinks: int  # the first so many are sinks
    softmax_scale: float
    softcap: float

    def logits(self, q: Tensor, k: Tensor) -> Tensor:
        """Of queries [num_queries, head_dim] and keys [num_keys, head_dim] of one head."""
        return _logits(q, k, self.softmax_scale, self.softcap)


class Span(NamedTuple):
    """The tokens of one row that compete, as every KV head sees them."""

    keys: Tensor  # [num_kv_heads, num_tokens, head_dim] float32, before RoPE where that is known
    # [num_kv_heads, num_window_queries * group_size, num_tokens] float32: attention weights that
    # the last queries of the prompt gave them, of a softmax over everything they saw
    weights: Tensor
    begin: int  # position of the first of them, padding excluded
    num_queries: int  # of the window; its last query's weights come last
    prompt: Prompt | None = None  # of methods with `EvictionPolicy.watches_whole_prompt`

    @property
    def num_tokens(self) -> int:
        return self.keys.shape[1]

    @property
    def unit_keys(self) -> Tensor:
        return normalize(self.keys, dim=-1)

    @property
    def received(self) -> Tensor:
        """Mean weight of every token, [num_kv_heads, num_tokens]."""
        return self.weights.mean(1)


@dataclass(slots=True, eq=False)
class EvictionState(PolicyState):
    """`PolicyState`, and the last queries of the prompt."""

    # [batch, at most num_window_queries, num_q_heads, head_dim], or all of the prompt's
    window: Tensor | None = None
    version: int = 0  # of the cache, and its longest row, when the window was as it is
    num_tokens: int = 0
    warned: bool = False

    def keep_window(self, window: Tensor | None, cache: KVCache) -> None:
        """Remember the last queries of what ``cache`` holds."""
        self.window, self.version = window, cache.version
        self.num_tokens = max(cache.num_real_tokens, default=0)

    def take_over(self, before: PolicyState) -> None:
        if isinstance(before, EvictionState):
            self.window, self.warned = before.window, before.warned
            self.version, self.num_tokens = before.version, before.num_tokens

    def follow_rows(self, cache: KVCache) -> None:
        """Have the window follow crops and new orders of the rows; others lose it."""
        if self.window is None or self.version == cache.version:
            return
        changes, window = cache.changes_since(self.version), self.window
        for change in changes or ():
            longest = max(change.num_real_tokens, default=0)
            if change.rows is None:  # every row lost as many tokens
                window = window[:, : max(window.shape[1] - (self.num_tokens - longest), 0)]
            else:
                window = window[change.rows]
            self.num_tokens = longest
        self.window = None if changes is None or window.shape[1] == 0 else window
        self.version = cache.version

    def follow(self, policy: Policy, cache: KVCache) -> None:
        """As `PolicyState`; the last queries are the prompt's, under whatever settings."""
        kept = self.window, self.version, self.num_tokens, self.warned
        super(EvictionState, self).follow(policy, cache)
        self.window, self.version, self.num_tokens, self.warned = kept


@dataclass(frozen=True, slots=True, kw_only=True)
class EvictionPolicy(Policy):
    """Base of methods that act once, when the prompt has been read.

    Prefill is dense. Then every KV head keeps sinks, recent tokens, all tokens outside of the span,
    and ``topk`` tokens of the span that `choose` names; the others leave the cache, which must be
    an `EvictableKVCache` (`attach` makes one). Later tokens are all kept and a later prompt finds
    only what was kept: with ``evict_at="decode"`` a warning says so once.

    Parameters
    ----------
    topk : int
        Tokens of the span that every KV head keeps.
    ratio : float in (0, 1] or None
        Given, the share of the span instead of ``topk``.
    span : pair of int or None
        Positions [begin, end) of the prompt, padding excluded, that may be dropped: image tokens, a
        document. None: everything but sinks and recent tokens, which are protected in any case.
    num_sink_tokens, num_recent_tokens : int
        Protected tokens at either end of the prompt.
    num_window_queries : int
        Last queries of the prompt whose attention weights methods may ask for.
    evict_at : "decode" or "next_call"
        "decode": at the first decode step, so that a question that ends the prompt is read over all
        of it. "next_call": before whatever follows the first call is read, so that a question finds
        what was kept without knowing it; a prompt that comes in several calls loses tokens after
        the first of them.
    drop_below : float in (0, 1] or None
        Given, layers that evict share what they found, in the order in which they run: from the
        first on whose window gives the span less than this share of its attention (mean over
        queries and heads), all of the span goes, per row. The states must be those of a stack
        (`new_states`, or `attach`). Source: ToDRE, arXiv:2505.18757.
    """

    revocable: ClassVar[bool] = False
    persistent: ClassVar[bool] = True
    needs_keys_before_rope: ClassVar[bool] = False
    watches_whole_prompt: ClassVar[bool] = False  # are the queries of all of it kept until then?

    topk: int = 1024
    ratio: float | None = None
    span: tuple[int, int] | None = None
    num_sink_tokens: int = 16
    num_recent_tokens: int = 64
    num_window_queries: int = 32
    evict_at: Literal["decode", "next_call"] = "decode"
    drop_below: float | None = None

    def __post_init__(self) -> None:
        require_int(self.topk, "topk", 0)
        if self.ratio is not None:
            ratio = require_float(self.ratio, "ratio", "None or a float in (0, 1]")
            require(0.0 < ratio <= 1.0, "ratio", ratio, "None or a float in (0, 1]")
        if self.span is not None:
            require_type(self.span, tuple, "span", "None or (begin, end)")
            fits = len(self.span) == 2 and all(type(place) is int for place in self.span)
            allowed = "None or (begin, end) with 0 <= begin <= end"
            require(fits and 0 <= self.span[0] <= self.span[1], "span", self.span, allowed)
        require_int(self.num_sink_tokens, "num_sink_tokens", 0)
        require_int(self.num_recent_tokens, "num_recent_tokens", 1)
        require_int(self.num_window_queries, "num_window_queries", 1)
        require_choice(self.evict_at, "evict_at", ("decode", "next_call"))
        if self.drop_below is not None:
            share = require_float(self.drop_below, "drop_below", "None or a float in (0, 1]")
            require(0.0 < share <= 1.0, "drop_below", share, "None or a float in (0, 1]")

    @property
    def flows_between_layers(self) -> bool:
        return self.drop_below is not None

    @property
    def joins_heads(self) -> bool:
        return self.drop_below is not None

    @property
    def dense_prefill(self) -> bool:
        """Prefill only watches the last queries."""
        return True

    @property
    def tail_q_block_size(self) -> int:
        """A call of several tokens is a prompt, whatever the cache holds."""
        return 1

    @property
    def reads_unlisted(self) -> str:
        return "it frees what it does not keep, and reads the rest at every step"

    def new_state(
        self, cache: KVCache, crossovers: Mapping[int, Crossover] | None = None
    ) -> EvictionState:
        return EvictionState(self, crossovers=crossovers)

    def is_dense(self, phase: Phase, begin: int, end: int, rope: Rope | None) -> bool:
        return phase == "prefill"

    def choose(self, span: Span, budget: int) -> Tensor:
        """The tokens to keep, bool [num_kv_heads, num_tokens]: ``budget`` per head, in the mean."""
        raise NotImplementedError

    def select(self, state: PolicyState, queries: Queries, cache: KVCache) -> Selection | None:
        """What remains, by the tokens' positions; None: everything."""
        assert isinstance(state, EvictionState)
        if queries.phase == "prefill" and not isinstance(cache, FixedKVCache | EvictableKVCache):
            state.statistics("prefill").record_dense(visible_tokens(queries, cache))
            return None  # of a call without a cache nothing is left that could be dropped
        allowed = "a kvselect.evictable_cache.EvictableKVCache (attach makes one: no static cache)"
        require(isinstance(cache, EvictableKVCache), "cache", type(cache).__name__, allowed)
        assert isinstance(cache, EvictableKVCache)
        if cache.rows is None:
            state.follow_rows(cache)
        if cache.rows is None and self._is_due(queries, cache):
            self._evict(state, queries, cache)
        elif queries.phase == "prefill" and cache.rows is None:
            watched = 0 if self.watches_whole_prompt else self.num_window_queries  # -0: all
            last = queries.q[:, -watched:]
            before = state.window
            if before is not None and before.shape[0] == last.shape[0]:
                last = torch.cat((before, last), 1)[:, -watched:]
            state.keep_window(last.clone(), cache)
        elif self.evict_at == "decode" and queries.phase == "prefill" and not state.warned:
            state.warned = True
            warnings.warn(
                f"kvselect: {type(self).__name__} dropped tokens before this prompt came; it "
                "finds only what was kept (revocable=False)",
                stacklevel=2,
            )
        visible = visible_tokens(queries, cache)
        if cache.rows is None:
            state.statistics(queries.phase).record_dense(visible)
            return None
        left = cache.listed()
        if queries.q_block_offsets is not None:
            indices, lengths = (
                x[:, None].expand(-1, queries.num_blocks, *x.shape[1:])
                for x in (left.indices, left.topk_length)
            )
            left = Selection(indices, lengths, queries.q_block_offsets)
        state.statistics(queries.phase).record_selection(left, visible, scored=False)
        return left

    def attend(
        self, queries: Queries, cache: KVCache, selection: Selection | BlockMask | None
    ) -> tuple[Tensor, Tensor]:
        """Over all that the cache holds: what it does not hold is not listed either."""
        return attend_queries(queries, cache, None, None)

    def new_cache(
        self,
        batch: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        capacity: int = 0,
    ) -> EvictableKVCache:
        return EvictableKVCache(
            batch, num_kv_heads, head_dim, dtype=dtype, device=device, capacity=capacity
        )

    def extra_bytes(
        self, num_tokens: int, *, num_q_heads: int, num_kv_heads: int, head_dim: int, itemsize: int
    ) -> tuple[int, int]:
        """For a moment: float32 keys, the window's weights, and what remains beside what was."""
        rows = self.num_window_queries * num_q_heads // num_kv_heads
        floats = 3 * rows + 2 * head_dim
        return 0, num_kv_heads * num_tokens * (4 * floats + 2 * head_dim * itemsize)

    def _is_due(self, queries: Queries, cache: EvictableKVCache) -> bool:
        if self.evict_at == "decode":
            return queries.phase == "decode"
        return max(cache.num_real_tokens, default=0) > queries.seqlen_q  # something came before

    def _evict(self, state: EvictionState, queries: Queries, cache: EvictableKVCache) -> None:
        window = queries.q if state.window is None else state.window
        if window.shape[0] != cache.batch:  # rows came or went since
            window = queries.q
        newer = 0 if window is queries.q else queries.seqlen_q  # tokens behind the window
        masks = torch.zeros(
            cache.batch, cache.num_kv_heads, cache.max_seqlen, dtype=torch.bool, device=cache.device
        )
        gone = self._dropped_above(state, queries, cache)
        starts = [n - real for n, real in zip(cache.lengths, cache.num_real_tokens)]
        for row, (start, length) in enumerate(zip(starts, cache.lengths)):
            masks[row, :, start:length] = True
            begin, end = start + self.num_sink_tokens, length - self.num_recent_tokens - newer
            if self.span is not None:
                begin, end = max(begin, start + self.span[0]), min(end, start + self.span[1])
            num_tokens = max(end - begin, 0)
            budget = self.topk if self.ratio is None else round(self.ratio * num_tokens)
            if num_tokens == 0 or (budget >= num_tokens and self.drop_below is None):
                continue
            if not gone[row]:
                span = self._span(queries, cache, window[row], row, start, (begin, end), newer)
                gone[row] = self._is_ignored(span, queries)
                if not gone[row] and budget < num_tokens:
                    masks[row, :, begin:end] = self.choose(span, budget)
            if gone[row]:
                masks[row, :, begin:end] = False
        lengths = masks.sum(2)
        width = int(lengths.max()) if lengths.numel() else 0
        place = torch.arange(cache.max_seqlen, dtype=torch.int32, device=cache.device)
        listed = place.where(masks, cache.max_seqlen).sort(2).values[..., :width]
        listed = listed.where(listed < cache.max_seqlen, -1)
        cache.evict(listed, lengths.int(), self.num_recent_tokens + newer)
        state.window = None
        if self.drop_below is not None:  # the stack must know of what has just happened here
            state.shared(cache).carry("dropped spans", state.layer, queries, tuple(gone))

    def _dropped_above(
        self, state: EvictionState, queries: Queries, cache: EvictableKVCache
    ) -> list[bool]:
        """Whether a layer above dropped all of a row's span, in this call."""
        none = (False,) * cache.batch
        if self.drop_below is None:
            return list(none)
        allowed = "one of policy.new_states(caches): drop_below goes from layer to layer"
        require(state.stack is not None, "state", "the state of a layer by itself", allowed)
        stack = state.shared(cache)
        return list(stack.carried("dropped spans", state.layer, queries, lambda: none))

    def _is_ignored(self, span: Span, queries: Queries) -> bool:
        if self.drop_below is None:
            return False
        mass = sum_over_ranks(span.weights.sum(2).mean()[None], queries.process_group)
        return float(mass) / num_ranks(queries.process_group) < self.drop_below

    def _span(
        self,
        queries: Queries,
        cache: EvictableKVCache,
        window: Tensor,
        row: int,
        start: int,
        bounds: tuple[int, int],
        newer: int,
    ) -> Span:
        begin, end = bounds
        last = cache.lengths[row] - newer
        keys = cache.k[row, start:last].float().transpose(0, 1)
        group = window.shape[1] // cache.num_kv_heads
        prompt = None
        if self.watches_whole_prompt:
            prompt = self._prompt(queries, keys, window, begin - start, end - start)
        window = window[-min(self.num_window_queries, window.shape[0], last - start) :].float()
        grouped = window.view(window.shape[0], cache.num_kv_heads, group, -1).permute(1, 0, 2, 3)
        flat = grouped.flatten(1, 2)
        logits = _logits(flat, keys, queries.softmax_scale, queries.softcap)
        first = last - start - window.shape[0]
        seen = first + torch.arange(window.shape[0], device=cache.device).repeat_interleave(group)
        place = torch.arange(last - start, device=cache.device)
        # A key that is not finite gets no attention, and takes none from the others.
        unseen = (place > seen[:, None]) | ~keys.isfinite().all(2)[:, None]
        weights = logits.masked_fill(unseen, -torch.inf).softmax(-1).nan_to_num(0.0)
        positions = place[begin - start : end - start]
        keys = keys[:, begin - start : end - start].nan_to_num(0.0, 0.0, 0.0)
        if self.needs_keys_before_rope and queries.rope is not None:
            keys = _before_rope(keys, queries.rope, positions)
        weights = weights[..., begin - start : end - start]
        return Span(keys, weights, begin - start, window.shape[0], prompt)

    def _prompt(
        self, queries: Queries, keys: Tensor, window: Tensor, begin: int, end: int
    ) -> Prompt:
        """Of a row's keys [num_kv_heads, num_tokens, head_dim] and the queries that end with it."""
        num_kv_heads, num_tokens, _ = keys.shape
        allowed = f"those of all {num_tokens} tokens (the policy must see all of the prefill)"
        got = f"{window.shape[0]} of the last tokens"
        require(window.shape[0] >= num_tokens, "queries of the prompt", got, allowed)
        num_sinks = min(self.num_sink_tokens, begin)
        places = torch.arange(num_sinks + end - begin, device=keys.device)
        places[num_sinks:] += begin - num_sinks
        picked = window[places - num_tokens].float().nan_to_num(0.0, 0.0, 0.0)
        picked = torch.unflatten(picked, 1, (num_kv_heads, -1)).permute(1, 2, 0, 3)
        there = keys[:, places].nan_to_num(0.0, 0.0, 0.0)
        return Prompt(picked, there, num_sinks, queries.softmax_scale, queries.softcap)


def _logits(q: Tensor, k: Tensor, softmax_scale: float, softcap: float) -> Tensor:
    logits = softmax_scale * q @ k.transpose(-1, -2)
    return softcap * (logits / softcap).tanh() if softcap else logits


def _before_rope(keys: Tensor, rope: Rope, positions: Tensor) -> Tensor:
    """Keys [num_kv_heads, num_tokens, head_dim] before their rotation, but for scale."""
    by_token = keys.transpose(0, 1)
    if rope.inv_freq is None:
        return rope.unrotate(by_token, positions).transpose(0, 1)
    return rope.rotate_at(by_token, -positions).transpose(0, 1)


def best(scores: Tensor, budget: int) -> Tensor:
    """The ``budget`` best of the last dimension as a mask; equal scores in their order."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices[..., :budget]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, True)
