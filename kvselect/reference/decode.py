"""One decode step, list by list: reuse what is similar enough, else score and pick; then attend."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from kvselect.reference.attention import sparse_attention
from kvselect.reference.cache import CacheLike
from kvselect.reference.query_blocks import BlockRange, QueryBlocks
from kvselect.reference.rotation import RopeTable, rotate
from kvselect.reference.score import score_query_blocks
from kvselect.reference.selection import num_kept, pick, without_nonfinite
from kvselect.reference.selection_cache import similarity_of
from kvselect.selection import Selection

if TYPE_CHECKING:
    from kvselect.policies import Policy


@dataclass(slots=True)
class Remembered:
    """One reusable list: the query that made it, its tokens, and how often it was reused."""

    anchor: Tensor  # [heads per list, head_dim], float64
    listed: list[int]
    seqlen: int  # tokens of the row when it was last used
    age: int = 0  # steps since it was made


@dataclass(slots=True)
class DecodeState:
    """What a policy with a selection cache remembers of one layer, by (row, list)."""

    lists: dict[tuple[int, int], Remembered] = field(default_factory=dict)
    version: int | None = None  # of the cache; another one voids all lists


class StepInfo(NamedTuple):
    """What a decode step did."""

    selection: Selection | None  # None: every row was dense
    lse: Tensor  # [batch, 1, num_q_heads] float64

    @property
    def hit(self) -> Tensor | None:
        return None if self.selection is None else self.selection.hit

    @property
    def kept_mass(self) -> Tensor | None:
        return None if self.selection is None else self.selection.kept_mass


def decode_step(
    q: Tensor,
    cache: CacheLike,
    policy: Policy,
    state: Any,
    *,
    q_unrotated: Tensor | None = None,
    rope: RopeTable | None = None,
    softmax_scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> tuple[Tensor, StepInfo]:
    """Attention of each row's newest token over what TokenSelect, StreamingLLM or Dense selects.

    Parameters
    ----------
    q : Tensor, [batch, 1, num_q_heads, head_dim]
        Query of the token appended last. Rotated for ``positions="original"``, un-rotated for
        "compact".
    cache : CacheLike
    policy : TokenSelect, StreamingLLM or Dense
    state : DecodeState
        Kept from step to step; changed. Matters to a policy with a selection cache only.
    q_unrotated : Tensor of the shape of q, or None
        What the selection cache compares with "original" positions; None: q.
    rope : RopeTable or None
        Needed by "compact".
    softmax_scale : float or None
        None: ``head_dim ** -0.5``.
    softcap, sink_logits
        As in sparse_attention.

    Returns
    -------
    out : Tensor, [batch, 1, num_q_heads, head_dim], float64; 0 for a row without tokens
    info : StepInfo

    Raises
    ------
    ValueError
        If the policy is another one.
    TypeError
        If the policy reuses lists and the state is no DecodeState.

    Notes
    -----
    Source: TokenSelect, arXiv:2411.02886. A row is dense while it holds at most ``num_sink_tokens +
    topk + num_recent_tokens`` real tokens (or ``dense_below_tokens``): its list holds every token,
    and the next step does not reuse it.
    """
    name = type(policy).__name__
    if name not in ("TokenSelect", "StreamingLLM", "Dense"):
        raise ValueError(f"policy: got {policy!r}, allowed: TokenSelect, StreamingLLM, Dense")
    settings: Any = policy  # fields differ between the three
    table = rope if settings.positions == "compact" else None
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    blocks = QueryBlocks(cache_seqlens=cache.cache_seqlens, seqlen_q=1, starts=cache.starts)
    batch, num_kv_heads = len(cache.cache_seqlens), cache.k.shape[2]
    dense, limit = [True] * batch, dense_limit(settings, table)
    if name != "Dense":
        blocks = QueryBlocks(
            cache_seqlens=cache.cache_seqlens,
            seqlen_q=1,
            starts=cache.starts,
            num_sink_tokens=settings.num_sink_tokens,
            num_recent_tokens=settings.num_recent_tokens,
        )
        dense = [blocks.seqlen(row) - blocks.start(row) <= limit for row in range(batch)]
    if all(dense):
        out, lse = sparse_attention(
            q, cache, softmax_scale=scale, rope=table, softcap=softcap, sink_logits=sink_logits
        )
        return out, StepInfo(None, lse)

    num_lists = 1 if getattr(settings, "scope", "layer") == "layer" else num_kv_heads
    votes: Tensor | None = None
    if name == "TokenSelect":
        votes = decode_votes(q, cache, blocks, settings, table, scale, softcap, sink_logits)
        if num_lists == 1:
            votes = votes.sum(1, keepdim=True)
    threshold: Any = getattr(settings, "similarity_threshold", None)  # None: select every time
    compared = (q if q_unrotated is None or table is not None else q_unrotated)[:, 0].double()
    compared = compared.view(batch, num_lists, -1, q.shape[-1])
    if threshold is not None:
        if not isinstance(state, DecodeState):
            raise TypeError(f"state: got {type(state).__name__}, allowed: DecodeState()")
        version = getattr(cache, "version", None)
        if state.version != version:
            state.lists, state.version = {}, version

    total: float | Tensor | None = total_score(settings, q.shape[2] // num_lists)
    if total is not None and sink_logits is not None and votes is not None:
        total = votes.nansum(-1)  # the sinks took the rest

    lists: list[list[int]] = []
    kept: list[float] = []
    hits: list[int] = []
    for row in range(batch):
        at = blocks.range(row, 0)
        for n in range(num_lists):
            own = None if votes is None else votes[row, n].tolist()
            hit = False
            if dense[row] and limit > budget(settings):
                listed, score = list(range(at.start, at.end)), float("nan")
            else:  # a dense row within the budget loses nothing by selection
                whole = (
                    total
                    if total is None
                    else float(torch.as_tensor(total).expand(batch, num_lists)[row, n])
                )
                listed, score = fresh_list(own, at, settings, whole)
            if threshold is not None:
                known = state.lists.pop((row, n), None)
                anchor, age = compared[row, n], 0
                if not dense[row] and known is not None and known.seqlen == at.end - 1:
                    alike = similarity_of(anchor, known.anchor, how_similar(settings))
                    hit = alike >= threshold and known.age < settings.max_age
                if hit:
                    listed, score = [*known.listed, at.end - 1], float("nan")
                    anchor, age = known.anchor, known.age + 1
                if not dense[row]:
                    state.lists[row, n] = Remembered(anchor, listed, at.end, age)
            lists.append(listed)
            kept.append(score)
            hits.append(int(hit))

    width = max(map(len, lists))
    indices = torch.full((len(lists), width), -1, dtype=torch.int32)
    for number, listed in enumerate(lists):
        indices[number, : len(listed)] = torch.tensor(listed, dtype=torch.int32)
    shape = (batch, num_lists)
    lengths = torch.tensor([len(x) for x in lists], dtype=torch.int32)
    selection = Selection(
        indices.view(*shape, width).expand(-1, num_kv_heads, -1),
        lengths.view(shape).expand(-1, num_kv_heads),
        kept_score=torch.tensor(kept, dtype=torch.float64).view(shape).expand(-1, num_kv_heads),
        total_score=total,
        hit=torch.tensor(hits, dtype=torch.int32).view(shape) if threshold is not None else None,
    )
    out, lse = sparse_attention(
        q,
        cache,
        selection,
        softmax_scale=scale,
        rope=table,
        softcap=softcap,
        sink_logits=sink_logits,
    )
    return out, StepInfo(selection, lse)


def fresh_list(
    own: list[float] | None, at: BlockRange, settings: Any, total: float | None = None
) -> tuple[list[int], float]:
    """Sinks, the best-scored candidates and the window, and what they score; None: no scores.

    With a mass floor, as many candidates as reach its share of ``total``, between two bounds.
    """
    sinks, window = range(at.start, at.sink_end), range(at.window_start, at.end)
    if own is None:
        return [*sinks, *window], 0.0
    keep = num_kept(settings.topk, settings.overselect)
    target, largest = settings.mass_target, keep
    if target is not None:
        largest = num_kept(settings.topk_max, settings.overselect)
    while True:
        picked = pick(own, at.sink_end, at.window_start, keep, settings.pool_width)
        listed = without_nonfinite([*sinks, *picked, *window], own)
        if keep >= min(largest, at.num_candidates) or target is None or total is None:
            break
        if sum(own[i] for i in listed) >= target * total:
            break
        keep += 1
    return listed, sum(own[i] for i in listed)


def budget(settings: Any) -> int:
    """Tokens that may be attended to before anything is left out."""
    total: int = settings.num_sink_tokens + settings.num_recent_tokens
    return total + getattr(settings, "topk", 0)


def dense_limit(settings: Any, table: RopeTable | None) -> int:
    """Rows of at most so many real tokens are dense; 0 for Dense, whose rows all are."""
    if not hasattr(settings, "num_recent_tokens"):
        return 0
    limit = max(budget(settings), getattr(settings, "dense_below_tokens", None) or 0)
    if table is not None and hasattr(settings, "topk"):
        limit = min(limit, table.cos.shape[0])
    return limit


def how_similar(settings: Any) -> str:
    default = "min" if settings.scope == "kv_head" else "q10"
    return settings.similarity or default


def total_score(settings: Any, heads_per_list: int) -> float | None:
    """What all visible tokens of a list score together; None: scores are no shares of mass."""
    if getattr(settings, "score_scale", 1.0) is not None:
        return None
    if settings.normalise_over != "visible" or settings.aggregate == "max_vote":
        return None
    return float(heads_per_list)


def decode_votes(
    q: Tensor,
    cache: CacheLike,
    blocks: QueryBlocks,
    settings: Any,
    table: RopeTable | None,
    softmax_scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Scores of a TokenSelect decode step, [batch, num_kv_heads, max_seqlen].

    With "compact" positions candidates meet the query at the fixed distance ``num_recent_tokens``,
    sinks and recent tokens at the rank of its own token.
    """
    keep = num_kept(settings.topk, settings.overselect)
    vectors, local = q.double(), None
    if table is not None:
        ranks = []
        for row in range(blocks.batch):
            at = blocks.range(row, 0)
            always = at.sink_end - at.start + at.end - at.window_start
            ranks.append(max(always + min(keep, at.num_candidates) - 1, 0))
        local = rotate(vectors, torch.tensor(ranks)[:, None, None], table)[:, None]
        vectors = rotate(vectors, torch.tensor(settings.num_recent_tokens), table)
    return score_query_blocks(
        vectors[:, None],
        cache,
        blocks,
        softmax_scale=softmax_scale if settings.score_scale is None else settings.score_scale,
        q_local=local,
        source="keys" if settings.sketch is None else "sketch",
        keep=keep,
        normalise_candidates_only=settings.normalise_over == "candidates",
        rope=table,
        softcap=softcap,
        sink_logits=sink_logits,
    ).scores[:, 0]
