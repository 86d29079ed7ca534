"""How well a sketch finds the tokens that attention falls on, against the exact top-k.

Measures of METHODS 5.2, over-selected and not, per KV head and per layer, at equal numbers of
tokens attended. No sinks and no window: every token competes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvselect.checks import require, require_choice
from kvselect.eval.dump import LayerDump
from kvselect.eval.key_estimates import Estimator, Scorer, soft_capped
from kvselect.selection import num_kept
from kvselect.sketch import BLOCK_TOKENS
from kvselect.testing import structured_keys

__all__ = ["Case", "Fidelity", "captured_case", "compare", "gaussian_case", "structured_case"]

SCOPES = ("kv_head", "layer")
TIE = 1e-4  # scores closer than this, relatively, tie: equal keys reach them along different roads
QUERIES_AT_ONCE = 8
CANDIDATE_DISTANCE = 128  # at which un-rotated keys are met: num_recent_tokens of a small policy
LOGIT_STD = 2.2


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Case:
    """Queries and the tokens they choose among.

    Attributes
    ----------
    q : Tensor, [queries, num_q_heads, head_dim]
    k, v : Tensor, [tokens, num_kv_heads, head_dim]
        Tokens: a multiple of 128, all visible to all queries.
    softmax_scale, softcap : float
    sink_logits : Tensor, [num_q_heads], or None
    """

    q: Tensor
    k: Tensor
    v: Tensor
    softmax_scale: float
    softcap: float = 0.0
    sink_logits: Tensor | None = None


def captured_case(layer: LayerDump, positions: str, num_queries: int | None = None) -> Case:
    """A dump's queries over the whole blocks of tokens before the first of them.

    Parameters
    ----------
    positions : "original" or "compact"
        Rotated to their places; or keys un-rotated and queries at the one distance at which compact
        positions meet candidates.
    num_queries : int or None
        So many, evenly spread; None: all.

    Raises
    ------
    ValueError
        If there is no whole block.
    """
    require_choice(positions, "positions", ("original", "compact"))
    first = layer.num_tokens - len(layer.q)
    count = first // BLOCK_TOKENS * BLOCK_TOKENS
    allowed = f"at least {BLOCK_TOKENS} tokens before the first query"
    require(count > 0, "dump", f"{first} tokens", allowed)
    q, k = layer.q.float(), layer.k.float()
    if positions == "compact":
        q, k = layer.q_unrotated.float(), layer.k_unrotated.float()
        if layer.rope is not None:
            q = layer.rope.rotate_at(q, CANDIDATE_DISTANCE)
    if num_queries is not None and num_queries < len(q):
        q = q[torch.linspace(0, len(q) - 1, num_queries).round().long()]
    return Case(
        q=q,
        k=k[:count],
        v=layer.v[:count].float(),
        softmax_scale=layer.softmax_scale,
        softcap=layer.softcap,
        sink_logits=layer.sink_logits,
    )


def structured_case(
    num_tokens: int, num_kv_heads: int, group_size: int, head_dim: int, *, seed: int
) -> Case:
    """METHODS 5.2 (a): rotated keys with outlier channels and an autocorrelated signal."""
    q, k = structured_keys(num_tokens, num_kv_heads, group_size, head_dim, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(k.shape, generator=generator)
    return Case(q=q[None], k=k, v=v, softmax_scale=head_dim**-0.5)


def gaussian_case(
    num_tokens: int, num_kv_heads: int, group_size: int, head_dim: int, *, seed: int
) -> Case:
    """Plain Gaussian keys and queries; logits of the same deviation."""
    generator = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, num_tokens, num_kv_heads, head_dim, generator=generator)
    q = torch.randn(num_kv_heads * group_size, head_dim, generator=generator)
    q = q * (LOGIT_STD * head_dim**0.5 / q.norm(dim=-1, keepdim=True))
    return Case(q=q[None], k=k, v=v, softmax_scale=head_dim**-0.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fidelity:
    """One sketch, scope and over-selection on one case.

    Attributes
    ----------
    attended_tokens : int
        Per list; the same for all sketches.
    bytes_share : float
        Read to rank and to attend, over what dense attention reads; keys and values of 2 bytes.
    mass, mass_min : float
        Attention mass that is kept: mean over query heads and queries; the lowest head's mean.
    mass_ratio, mass_ratio_min : float
        The same over what the exact top-k of scope "kv_head" keeps, not over-selected: ratio of the
        means; the lowest head's.
    recall : float
        Share of the exact top-k of the same scope that is kept; what ties with its last counts.
    heaviest_miss : float
        Largest vote that was missed over the last vote of the exact top-k: the worst of all lists.
    output_error, output_error_max : float
        ``|out - dense| / |dense|``: mean over heads and queries; the highest head's mean.
    """

    sketch: str
    scope: str
    overselect: float
    attended_tokens: int
    bytes_share: float
    mass: float
    mass_min: float
    mass_ratio: float
    mass_ratio_min: float
    recall: float
    heaviest_miss: float
    output_error: float
    output_error_max: float


class _Sums:
    """Measures of one (sketch, scope, over-selection), query by query."""

    def __init__(self) -> None:
        self.mass: list[Tensor] = []
        self.recall: list[Tensor] = []
        self.miss: list[Tensor] = []
        self.error: list[Tensor] = []


def compare(
    case: Case,
    topk: int,
    estimators: Sequence[Estimator],
    overselects: Sequence[float],
    scopes: Sequence[str] = SCOPES,
) -> list[Fidelity]:
    """Every sketch, over-selection and scope on one case.

    Raises
    ------
    ValueError
        If ``topk`` times an over-selection is no whole number of every sketch's pages, or more than
        there are tokens; or a scope is none.
    """
    num_tokens, num_kv_heads, head_dim = case.k.shape
    for scope in scopes:
        require_choice(scope, "scopes", SCOPES)
    for factor in overselects:
        keep = num_kept(topk, factor)
        allowed = f"at most {num_tokens} (tokens)"
        require(keep <= num_tokens, "topk * overselect", keep, allowed)
        for one in estimators:
            allowed = f"multiples of {one.page_tokens} (pages of {one.name!r})"
            require(keep % one.page_tokens == 0, "topk * overselect", keep, allowed)
    scorers = [one.prepare(case.k, topk, case.softmax_scale, case.softcap) for one in estimators]
    sums = {
        (one.name, scope, factor): _Sums()
        for one in estimators
        for scope in scopes
        for factor in overselects
    }
    exact_mass: list[Tensor] = []
    grouped = case.q.unflatten(1, (num_kv_heads, -1))  # type: ignore[no-untyped-call]
    for begin in range(0, len(grouped), QUERIES_AT_ONCE):
        q = grouped[begin : begin + QUERIES_AT_ONCE]
        exact_mass.append(
            _compare_some(case, q, topk, list(zip(estimators, scorers)), overselects, scopes, sums)
        )
    best = torch.cat(exact_mass).mean(0)  # [num_kv_heads, group_size]
    rows = []
    for one in estimators:
        scan = one.bytes_per_token(head_dim, topk / num_tokens)
        for scope in scopes:
            for factor in overselects:
                found, keep = sums[one.name, scope, factor], num_kept(topk, factor)
                mass, error = torch.cat(found.mass).mean(0), torch.cat(found.error).mean(0)
                rows.append(
                    Fidelity(
                        sketch=one.name,
                        scope=scope,
                        overselect=factor,
                        attended_tokens=keep,
                        bytes_share=scan / (4 * head_dim) + keep / num_tokens,
                        mass=float(mass.mean()),
                        mass_min=float(mass.min()),
                        mass_ratio=float(mass.mean() / best.mean()),
                        mass_ratio_min=float((mass / best).min()),
                        recall=float(torch.cat(found.recall).mean()),
                        heaviest_miss=float(torch.cat(found.miss).max()),
                        output_error=float(error.mean()),
                        output_error_max=float(error.max()),
                    )
                )
    return rows


def _compare_some(
    case: Case,
    q: Tensor,
    topk: int,
    ranked: Sequence[tuple[Estimator, Scorer]],
    overselects: Sequence[float],
    scopes: Sequence[str],
    sums: dict[tuple[str, str, float], _Sums],
) -> Tensor:
    """Some queries; returns the mass that the exact top-k per KV head keeps, [q, kv, group]."""
    logits = case.softmax_scale * torch.einsum("qgjd,tgd->qgjt", q, case.k)
    logits = soft_capped(logits, case.softcap)
    sinks: Tensor | None = None
    if case.sink_logits is not None:
        sinks = case.sink_logits.to(logits.dtype).view(q.shape[1:3])
    lse = logits.logsumexp(-1)
    if sinks is not None:
        lse = lse.logaddexp(sinks)
    weights = (logits - lse[..., None]).exp()
    dense = torch.einsum("qgjt,tgd->qgjd", weights, case.v)
    votes = weights.sum(2)
    best = {"kv_head": votes, "layer": votes.sum(1, keepdim=True).expand_as(votes)}
    thresholds = {scope: best[scope].topk(topk).values[..., -1:] for scope in SCOPES}
    exact = _listed(best["kv_head"], topk, 1)
    for one, score in ranked:
        own = score(q)
        for scope in scopes:
            ranks = own if scope == "kv_head" else own.sum(1, keepdim=True).expand_as(own)
            near = best[scope] >= thresholds[scope] * (1 - TIE)
            for factor in overselects:
                found = sums[one.name, scope, factor]
                listed = _listed(ranks, num_kept(topk, factor), one.page_tokens)
                kept = (weights * listed[:, :, None]).sum(-1)
                found.mass.append(kept)
                held = (listed & near).sum(-1).clamp(max=topk)
                found.recall.append(held.double() / topk)
                missed = best[scope].masked_fill(listed, 0.0).amax(-1, keepdim=True)
                found.miss.append(missed / thresholds[scope])
                total = kept
                if sinks is not None:
                    total = kept + (sinks - lse).exp()
                out = torch.einsum("qgjt,tgd->qgjd", weights * listed[:, :, None], case.v)
                out = out / total[..., None]
                found.error.append((out - dense).norm(dim=-1) / dense.norm(dim=-1))
    return (weights * exact[:, :, None]).sum(-1)


def _listed(scores: Tensor, keep: int, page_tokens: int) -> Tensor:
    """Mask [queries, num_kv_heads, tokens] of the tokens of the best units."""
    best = scores.topk(keep // page_tokens).indices
    mask = torch.zeros(scores.shape, dtype=torch.bool).scatter(-1, best, True)
    return mask.repeat_interleave(page_tokens, dim=-1) if page_tokens > 1 else mask
