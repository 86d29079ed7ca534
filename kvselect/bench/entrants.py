"""Who takes part in a decode bench: torch, Quest, and policies, at their budgets."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from kvselect.attention import recovered_mass
from kvselect.bench.bisection import fewest
from kvselect.bench.contenders import (
    ENABLE_GQA,
    TORCH_DENSE,
    TORCH_TOKEN_SELECT,
    TorchTokenSelect,
    dense_attention,
)
from kvselect.bench.layer import Shape
from kvselect.bench.quest import MIN_PAGES, PAGE_TOKENS, Quest, Scorer
from kvselect.cache import KVCache
from kvselect.decode import decode_step
from kvselect.policies.base import Policy
from kvselect.policies.dense import Dense
from kvselect.policies.streaming_llm import StreamingLLM
from kvselect.policies.token_select import TokenSelect
from kvselect.selection import Selection

__all__ = ["Entrant", "default_policies", "entrants", "kept"]

SELECT_INT4 = "kvselect TokenSelect int4"
SELECT_INT8 = "kvselect TokenSelect int8"
SELECT_EXACT = "kvselect TokenSelect exact keys"
STREAMING = "kvselect StreamingLLM"
OUR_DENSE = "kvselect dense"
QUEST: dict[Scorer, str] = {
    "kvselect": "Quest, bounds by kvselect",
    "torch": "Quest, bounds by torch",
}
EQUAL_MASS = "equal kept mass"
EQUAL_TOKENS = "equal tokens"

ENDS = TokenSelect()  # its sinks and window are those of every method here


def default_policies(topk: int) -> dict[str, Policy]:
    """The methods of kvselect under the names that result files use.

    They select at every length: a break-even that would make a short one dense is switched off.
    """
    select = partial(TokenSelect, topk=topk, dense_below_tokens=0)
    return {
        SELECT_INT4: select(),
        SELECT_INT8: select(sketch="int8", overselect=1.0),
        SELECT_EXACT: select(sketch=None, overselect=1.0),
        STREAMING: StreamingLLM(
            num_sink_tokens=ENDS.num_sink_tokens,
            num_recent_tokens=ENDS.num_recent_tokens + topk,
            positions="original",
        ),
        OUR_DENSE: Dense(),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Entrant:
    """A contender before it is timed.

    Attributes
    ----------
    method : str
        Whose curve it is a point of.
    call : callable
        One decode step, selection included; gives the output.
    bytes_must_read : int
        By the method's own plan.
    selection : Selection or None
        What `call` attends to; None: everything.
    budget_tokens : int or None
        topk, window, or pages in tokens.
    main : bool
        In the table; otherwise a point of a curve only.
    note : str
        Why this budget, where another row decides it.
    sketch_over_kv : float or None
        Memory of the sketch over that of keys and values.
    """

    method: str
    call: Callable[[], Tensor]
    bytes_must_read: int
    selection: Selection | None
    budget_tokens: int | None = None
    main: bool = True
    note: str = ""
    sketch_over_kv: float | None = None


def entrants(
    q: Tensor,
    caches: Mapping[str | None, KVCache],
    shape: Shape,
    policies: Mapping[str, Policy],
    *,
    topk: int,
    curves: Sequence[int],
    with_enable_gqa: bool = True,
) -> dict[str, Entrant]:
    """Everybody, by name: torch first, then kvselect, then Quest; points of curves among them.

    Parameters
    ----------
    q : Tensor, [1, 1, num_q_heads, head_dim]
    caches : mapping of sketch format to KVCache
        All hold the same tokens; the first serves whoever asks for no sketch.
    policies : mapping of name to Policy
        The first that selects is what Quest is set equal to.
    topk : int
        Of the peer written with torch operators.
    curves : sequence of int
        Budgets of the curves [tokens]; those that would keep half of everything are left out.
    """
    base = next(iter(caches.values()))
    curves = [budget for budget in curves if 2 * budget <= base.max_seqlen]
    found = _torch_entrants(q, base, shape, topk, curves, with_enable_gqa)
    for name, policy in policies.items():
        found[name] = _policy_entrant(name, policy, q, caches)
    selections = [found[name].selection for name in policies]
    for name, policy in policies.items():
        for budget in curves:
            other = _with_budget(policy, budget)
            if other is not None and other != policy:
                entrant = _policy_entrant(name, other, q, caches)
                found[f"{name}, {budget}"] = dataclasses.replace(entrant, main=False)
    chosen = next((selection for selection in selections if selection is not None), None)
    if chosen is not None:
        found |= _quest_entrants(q, base, shape, chosen, curves)
    return found


def kept(q: Tensor, cache: KVCache, selection: Selection | None) -> tuple[float, float]:
    """Mean over query heads of the mass kept (exact), mean over KV heads of tokens attended."""
    if selection is None:
        return 1.0, float(cache.max_seqlen)
    mass = float(recovered_mass(q, cache, selection).mean())
    return mass, float(selection.topk_length.float().mean())


def _torch_entrants(
    q: Tensor,
    cache: KVCache,
    shape: Shape,
    topk: int,
    curves: Sequence[int],
    with_enable_gqa: bool,
) -> dict[str, Entrant]:
    tokens, row = cache.max_seqlen, shape.row_bytes
    k, v = cache.k.transpose(1, 2), cache.v.transpose(1, 2)
    found = {
        name: Entrant(
            method=name,
            call=partial(dense_attention, name, q, k, v),
            bytes_must_read=2 * row * tokens,
            selection=None,
        )
        for name in TORCH_DENSE
        if with_enable_gqa or name != ENABLE_GQA
    }
    peer = None
    for budget in (topk, *(budget for budget in curves if budget != topk)):
        listed = budget + ENDS.num_sink_tokens + ENDS.num_recent_tokens
        if listed > tokens:
            continue
        if peer is None:
            peer = TorchTokenSelect(k, v, ENDS.num_sink_tokens, ENDS.num_recent_tokens)
        main = budget == topk
        found[TORCH_TOKEN_SELECT if main else f"{TORCH_TOKEN_SELECT}, {budget}"] = Entrant(
            method=TORCH_TOKEN_SELECT,
            call=partial(peer.step, q, budget),
            bytes_must_read=row * (tokens + 2 * listed),
            selection=peer.selection(q, budget),
            budget_tokens=budget,
            main=main,
        )
    return found


def _policy_entrant(
    name: str, policy: Policy, q: Tensor, caches: Mapping[str | None, KVCache]
) -> Entrant:
    wanted = policy.required_sketch
    cache = caches[wanted] if wanted in caches else next(iter(caches.values()))
    state, budget, share = policy.new_state(cache), None, None
    selection = decode_step(q, cache, policy, state)[1].selection
    itemsize = cache.dtype.itemsize
    if isinstance(policy, TokenSelect):
        budget = policy.topk
        if cache.sketch_data is not None:
            stored = 2 * cache.max_seqlen * cache.num_kv_heads * cache.head_dim * itemsize
            share = cache.sketch_data.numel() / stored
    elif isinstance(policy, StreamingLLM):
        budget = policy.num_recent_tokens
    return Entrant(
        method=name,
        call=lambda: decode_step(q, cache, policy, state)[0],
        bytes_must_read=int(state.decode.bytes_read(cache.head_dim, itemsize, wanted)),
        selection=selection,
        budget_tokens=budget,
        sketch_over_kv=share,
    )


def _with_budget(policy: Policy, budget: int) -> Policy | None:
    """The policy with another budget; None where it has none."""
    if isinstance(policy, TokenSelect):
        return dataclasses.replace(policy, topk=budget)
    if isinstance(policy, StreamingLLM):
        return dataclasses.replace(policy, num_recent_tokens=budget)
    return None


def _quest_entrants(
    q: Tensor, cache: KVCache, shape: Shape, chosen: Selection, curves: Sequence[int]
) -> dict[str, Entrant]:
    """Quest at the kept mass of ``chosen`` and at its tokens; the curve of the better scorer."""
    scorers: list[Scorer] = ["kvselect", "torch"]
    if not Quest.can_score_with_kvselect(cache.head_dim):
        scorers = ["torch"]
    mass, attended = kept(q, cache, chosen)
    found: dict[str, Entrant] = {}
    for scorer in scorers:
        quest, name = Quest(cache, scorer), QUEST[scorer]
        entrant = partial(_quest_entrant, quest, name, q, shape)
        enough = partial(_keeps, quest, q, cache, mass)
        pages = fewest(MIN_PAGES, quest.num_pages, enough)
        found[f"{name}, {EQUAL_MASS}"] = entrant(pages, note=EQUAL_MASS)
        if scorer != scorers[0]:
            continue
        pages = min(max(-(-int(attended) // PAGE_TOKENS), MIN_PAGES), quest.num_pages)
        found[f"{name}, {EQUAL_TOKENS}"] = entrant(pages, note=EQUAL_TOKENS)
        for budget in curves:
            pages = max(budget // PAGE_TOKENS, MIN_PAGES)
            found[f"{name}, {budget}"] = entrant(pages, main=False)
    return found


def _keeps(quest: Quest, q: Tensor, cache: KVCache, mass: float, num_pages: int) -> bool:
    return kept(q, cache, quest.select(q, num_pages))[0] >= mass


def _quest_entrant(
    quest: Quest,
    name: str,
    q: Tensor,
    shape: Shape,
    num_pages: int,
    *,
    note: str = "",
    main: bool = True,
) -> Entrant:
    selection = quest.select(q, num_pages)
    attended = int(selection.topk_length[0, 0])
    return Entrant(
        method=name,
        call=partial(quest.step, q, num_pages),
        bytes_must_read=quest.metadata_bytes + 2 * shape.row_bytes * attended,
        selection=selection,
        budget_tokens=num_pages * PAGE_TOKENS,
        main=main,
        note=note,
    )
