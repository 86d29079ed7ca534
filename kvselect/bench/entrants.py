"""Who takes part in a decode bench: torch, Quest, and policies, at their budgets."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache as cached
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
    exact_mass,
)
from kvselect.bench.dense_peers import gpu_dense_peers, stores_logits
from kvselect.bench.layer import Shape
from kvselect.bench.quest import MIN_PAGES, PAGE_TOKENS, Quest, Scorer
from kvselect.bench.reuse import RepeatedStep
from kvselect.cache import KVCache
from kvselect.checks import require
from kvselect.decode import decode_step
from kvselect.policies.base import Policy
from kvselect.policies.dense import Dense
from kvselect.policies.streaming_llm import StreamingLLM
from kvselect.policies.token_select import TokenSelect
from kvselect.selection import Selection

__all__ = [
    "Entrant",
    "Guard",
    "build_or_raise",
    "default_policies",
    "entrants",
    "gpu_policies",
    "kept",
    "reused_entrants",
]

SELECT_INT4 = "kvselect TokenSelect int4"
DENSE_KERNEL = "kvselect TokenSelect int4, dense kernel"  # attends prefill lists
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


def gpu_policies(topk: int) -> dict[str, Policy]:
    """Those of `default_policies` that one cache with an int4 sketch serves: several layers of a
    million tokens fit a GPU once."""
    names = (SELECT_INT4, SELECT_EXACT, STREAMING, OUR_DENSE)
    everybody = default_policies(topk)
    return {name: everybody[name] for name in names}


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
    dense_peer : bool
        Somebody else's attention over everything: what others are compared with.
    design : str or None
        Its row of the step model (`kvselect.bench.expected`); None: it has none.
    hit_share : float
        Of layers that reuse their list.
    prepare : callable or None
        Runs before each call and is not timed.
    """

    method: str
    call: Callable[[], Tensor]
    bytes_must_read: int
    selection: Selection | None
    budget_tokens: int | None = None
    main: bool = True
    note: str = ""
    sketch_over_kv: float | None = None
    dense_peer: bool = False
    design: str | None = None
    hit_share: float = 0.0
    prepare: Callable[[], object] | None = None


# Builds a contender, or reports why there is none and gives None.
Guard = Callable[[str, Callable[[], Entrant]], "Entrant | None"]


def build_or_raise(name: str, build: Callable[[], Entrant]) -> Entrant | None:
    """The guard that lets every error out."""
    return build()


def entrants(
    q: Tensor,
    caches: Mapping[str | None, KVCache],
    shape: Shape,
    policies: Mapping[str, Policy],
    *,
    topk: int,
    curves: Sequence[int],
    with_enable_gqa: bool = True,
    gpu_peers: bool = False,
    guard: Guard = build_or_raise,
) -> dict[str, Entrant]:
    """Everybody, by name: torch first, then kvselect, then Quest; points of curves among them.

    Parameters
    ----------
    q : Tensor, [batch, 1, num_q_heads, head_dim]
    caches : mapping of sketch format to KVCache
        All hold the same tokens; the first serves whoever asks for no sketch.
    policies : mapping of name to Policy
        The first that selects is what Quest is set equal to.
    topk : int
        Of the peer written with torch operators.
    curves : sequence of int
        Budgets of the curves [tokens]; those that would keep half of everything are left out.
    with_enable_gqa : bool
        Whether arrangements that make copies of all keys, or store all logits, take part.
    gpu_peers : bool
        Dense peers are SDPA backend by backend, and packages, instead of the CPU's arrangements.
    guard : callable
        Every contender is built through it.
    """
    base = next(iter(caches.values()))
    curves = [budget for budget in curves if 2 * budget <= base.max_seqlen]
    builds = _dense_builds(q, base, shape, with_enable_gqa, gpu_peers)
    builds |= _token_select_builds(q, base, shape, topk, curves)
    for name, policy in policies.items():
        builds[name] = partial(_policy_entrant, name, policy, q, caches)
    for name, policy in policies.items():
        for budget in curves:
            other = _with_budget(policy, budget)
            if other is not None and other != policy:
                point = partial(_policy_entrant, name, other, q, caches, main=False)
                builds[f"{name}, {budget}"] = point
    built = {name: guard(name, build) for name, build in builds.items()}
    found = {name: entrant for name, entrant in built.items() if entrant is not None}
    selections = [found[name].selection for name in policies if name in found]
    chosen = next((selection for selection in selections if selection is not None), None)
    if chosen is not None:
        found |= _quest_entrants(q, base, shape, chosen, curves, guard)
    return found


def reused_entrants(
    steps: Mapping[str, RepeatedStep],
    q: Tensor,
    cache: KVCache,
    shape: Shape,
    hit_shares: Sequence[float],
    layer: int,
    guard: Guard,
) -> dict[str, Entrant]:
    """Steps with a selection cache, of which a share hits: layers take turns.

    Parameters
    ----------
    steps : mapping of a policy's name to RepeatedStep
        Armed, on ``cache``.
    layer : int
        Its number decides whether it hits at a share between 0 and 1.
    """
    found = {}
    for policy, repeated in steps.items():
        for share in hit_shares:
            name = f"{policy}, {'all' if share == 1 else f'{100 * share:g} %'} hits"
            similar = int((layer + 1) * share) > int(layer * share)
            build = partial(_reused_entrant, name, repeated, q, cache, shape, similar, share)
            entrant = guard(name, build)
            if entrant is not None:
                found[name] = entrant
    return found


def _reused_entrant(
    name: str,
    repeated: RepeatedStep,
    q: Tensor,
    cache: KVCache,
    shape: Shape,
    similar: bool,
    share: float,
) -> Entrant:
    repeated.restore()
    _, info = repeated.step(q, similar)
    selection = info.selection
    assert selection is not None and info.hit is not None, "a selection cache was asked for"
    hits = int((info.hit != 0).sum())
    allowed = info.hit.numel() if similar else 0
    require(hits == allowed, f"{name}: lists reused", hits, str(allowed))
    selection = dataclasses.replace(
        selection, indices=selection.indices.clone(), topk_length=selection.topk_length.clone()
    )
    listed = float(selection.topk_length.float().mean())
    scanned = 0.0 if similar else shape.sketch_bytes(cache.sketch_format) * cache.max_seqlen
    return Entrant(
        method=name,
        call=lambda: repeated.step(q, similar)[0],
        bytes_must_read=int(shape.batch * (scanned + 2 * shape.row_bytes * listed)),
        selection=selection,
        design="hit" if share == 1 else cache.sketch_format,
        hit_share=share,
        prepare=repeated.restore,
    )


def kept(q: Tensor, cache: KVCache, selection: Selection | None) -> tuple[float, float]:
    """Mean over query heads of the mass kept (exact), mean over KV heads of tokens attended."""
    if selection is None:
        return 1.0, float(cache.max_seqlen)
    by_head = exact_mass if q.is_cuda else recovered_mass  # the op runs on CPUs only
    mass = float(by_head(q, cache, selection).mean())
    return mass, float(selection.topk_length.float().mean())


def _dense_builds(
    q: Tensor, cache: KVCache, shape: Shape, with_enable_gqa: bool, gpu_peers: bool
) -> dict[str, Callable[[], Entrant]]:
    """Attention over everything, as torch and others have it."""
    k, v = cache.k.transpose(1, 2), cache.v.transpose(1, 2)

    def entrant(name: str, build: Callable[[], Callable[[], Tensor]]) -> Entrant:
        return Entrant(
            method=name,
            call=build(),
            bytes_must_read=2 * shape.row_bytes * cache.max_seqlen * shape.batch,
            selection=None,
            dense_peer=True,
            design="dense",
        )

    if gpu_peers:
        peers: dict[str, Callable[[], Callable[[], Tensor]]] = {
            name: partial(build, q, k, v)
            for name, build in gpu_dense_peers().items()
            if with_enable_gqa or not stores_logits(name)
        }
    else:
        peers = {
            name: lambda name=name: partial(dense_attention, name, q, k, v)  # type: ignore[misc]
            for name in TORCH_DENSE
            if with_enable_gqa or name != ENABLE_GQA
        }
    return {name: partial(entrant, name, build) for name, build in peers.items()}


def _token_select_builds(
    q: Tensor, cache: KVCache, shape: Shape, topk: int, curves: Sequence[int]
) -> dict[str, Callable[[], Entrant]]:
    """TokenSelect's steps as torch ops at every budget that fits."""
    tokens, row = cache.max_seqlen, shape.row_bytes
    k, v = cache.k.transpose(1, 2), cache.v.transpose(1, 2)
    ends = ENDS.num_sink_tokens, ENDS.num_recent_tokens

    def entrant(budget: int) -> Entrant:
        peer = TorchTokenSelect(k, v, *ends)
        return Entrant(
            method=TORCH_TOKEN_SELECT,
            call=partial(peer.step, q, budget),
            bytes_must_read=row * shape.batch * (tokens + 2 * (budget + sum(ends))),
            selection=peer.selection(q, budget),
            budget_tokens=budget,
            main=budget == topk,
        )

    budgets = (topk, *(budget for budget in curves if budget != topk))
    return {
        TORCH_TOKEN_SELECT if budget == topk else f"{TORCH_TOKEN_SELECT}, {budget}": partial(
            entrant, budget
        )
        for budget in budgets
        if budget + sum(ends) <= tokens
    }


def _policy_entrant(
    name: str,
    policy: Policy,
    q: Tensor,
    caches: Mapping[str | None, KVCache],
    *,
    main: bool = True,
) -> Entrant:
    wanted = policy.required_sketch
    cache = caches[wanted] if wanted in caches else next(iter(caches.values()))
    state, budget, share, design = policy.new_state(cache), None, None, None
    selection = decode_step(q, cache, policy, state)[1].selection
    itemsize = cache.dtype.itemsize
    if isinstance(policy, TokenSelect):
        budget, design = policy.topk, wanted or "exact"
        if wanted is not None and cache.sketch_data is not None:
            stored = 2 * cache.batch * cache.max_seqlen * cache.num_kv_heads
            share = cache.sketch_data.numel() / (stored * cache.head_dim * itemsize)
    elif isinstance(policy, StreamingLLM):
        budget = policy.num_recent_tokens
    elif isinstance(policy, Dense):
        design = "dense"
    return Entrant(
        method=name,
        call=lambda: decode_step(q, cache, policy, state)[0],
        bytes_must_read=int(state.decode.bytes_read(cache.head_dim, itemsize, wanted))
        + state.scored_nbytes,
        selection=selection,
        budget_tokens=budget,
        sketch_over_kv=share,
        main=main,
        design=design,
    )


def _with_budget(policy: Policy, budget: int) -> Policy | None:
    """The policy with another budget; None where it has none."""
    if isinstance(policy, TokenSelect):
        return dataclasses.replace(policy, topk=budget)
    if isinstance(policy, StreamingLLM):
        return dataclasses.replace(policy, num_recent_tokens=budget)
    return None


def _quest_entrants(
    q: Tensor,
    cache: KVCache,
    shape: Shape,
    chosen: Selection,
    curves: Sequence[int],
    guard: Guard,
) -> dict[str, Entrant]:
    """Quest at the kept mass of ``chosen`` and at its tokens; the curve of the better scorer."""
    scorers: list[Scorer] = ["kvselect", "torch"]
    if not Quest.can_score_with_kvselect(cache.head_dim):
        scorers = ["torch"]
    mass, attended = kept(q, cache, chosen)
    found: dict[str, Entrant] = {}
    best: Scorer | None = None  # the first that can be built at all draws the curve
    for scorer in scorers:
        name, made = QUEST[scorer], cached(partial(Quest, cache, scorer))

        def equal_mass(made: Callable[[], Quest] = made, name: str = name) -> Entrant:
            quest = made()
            enough = partial(_keeps, quest, q, cache, mass)
            pages = fewest(MIN_PAGES, quest.num_pages, enough)
            return _quest_entrant(quest, name, q, shape, pages, note=EQUAL_MASS)

        entrant = guard(f"{name}, {EQUAL_MASS}", equal_mass)
        if entrant is None:
            continue
        found[f"{name}, {EQUAL_MASS}"] = entrant
        if best is not None:
            continue
        best, quest = scorer, made()
        pages = min(max(-(-int(attended) // PAGE_TOKENS), MIN_PAGES), quest.num_pages)
        found[f"{name}, {EQUAL_TOKENS}"] = _quest_entrant(
            quest, name, q, shape, pages, note=EQUAL_TOKENS
        )
        for budget in curves:
            pages = max(budget // PAGE_TOKENS, MIN_PAGES)
            found[f"{name}, {budget}"] = _quest_entrant(quest, name, q, shape, pages, main=False)
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
