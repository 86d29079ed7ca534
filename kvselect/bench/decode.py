"""One decode step: every contender on the same layer, the same query, the same cold caches.

The order is fixed: build, compare every output with float32, measure what each list keeps, and only
then time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor

from kvselect.bench.contenders import (
    BOUND,
    ENABLE_GQA,
    FOLDED,
    MATMUL,
    TORCH_DENSE,
    TORCH_TOKEN_SELECT,
    attention_over,
    require_agreement,
)
from kvselect.bench.entrants import Entrant, default_policies, entrants, kept
from kvselect.bench.layer import Shape, StructuredLayer
from kvselect.bench.measure import ColdCaches, Contender, interleaved_ms, read_gb_per_s, threads
from kvselect.bench.memory import require_memory
from kvselect.bench.quest import MIN_PAGES, PAGE_TOKENS
from kvselect.bench.request import OnProgress, check_sizes, no_progress
from kvselect.bench.results import Timing, print_table, timing
from kvselect.cache import KVCache
from kvselect.checks import require
from kvselect.policies.base import Policy
from kvselect.policies.token_select import TokenSelect
from kvselect.testing import rel_err

__all__ = ["QUESTION", "DecodeRequest", "DecodeRow", "check", "config", "run", "show"]

QUESTION = "How long does one decode step take, and how much attention mass does it keep?"
PERFECT_DENSE = "a perfect dense kernel (modelled)"

BUDGETS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)  # of the curves, in tokens
QUICK_BUDGETS = (512, 2048, 8192)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeRequest:
    """What to measure.

    Parameters
    ----------
    tokens : tuple of int
        Context lengths.
    policies : mapping of name to Policy, or None
        None: `entrants.default_policies`. The first that selects is what Quest is set equal to.
    threads : tuple of int
    rounds : int
    curves : tuple of int
        Budgets of the curves of time against kept mass [tokens]; empty: none.
    slow_tokens : int
        Beyond so many tokens SDPA with ``enable_gqa`` is left out: it takes seconds per call.
    """

    tokens: tuple[int, ...]
    shape: Shape = field(default_factory=Shape)
    topk: int = 2048
    policies: Mapping[str, Policy] | None = None
    threads: tuple[int, ...] = (1,)
    rounds: int = 7
    curves: tuple[int, ...] = BUDGETS
    slow_tokens: int = 131072
    seed: int = 0

    @property
    def contestants(self) -> Mapping[str, Policy]:
        return default_policies(self.topk) if self.policies is None else self.policies

    @property
    def sketches(self) -> tuple[str | None, ...]:
        """Formats of the caches needed; a policy that asks for none takes what is there."""
        needed = {
            policy.required_sketch: None
            for policy in self.contestants.values()
            if isinstance(policy, TokenSelect)
        }
        return tuple(needed) or (None,)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeRow:
    """One contender at one length on one number of threads.

    Attributes
    ----------
    method, budget_tokens, main, note, sketch_over_kv
        As `Entrant` has them.
    over : dict of name to float
        Time of each torch peer over this row's: how often faster it is.
    over_best_torch : float
        The same of the fastest dense arrangement of torch.
    over_perfect_dense : float
        The same of the bytes of all keys and values at the streaming bandwidth.
    attended_tokens, kept_mass : float
        Per KV head; share of the attention mass of the same query, measured exactly.
    output_error : float or None
        Against float32 attention over the same list, relative.
    output_error_vs_dense : float or None
        Against float32 attention over everything.
    """

    tokens: int
    contender: str
    method: str
    budget_tokens: int | None
    main: bool
    note: str
    over: dict[str, float]
    over_best_torch: float
    over_perfect_dense: float
    attended_tokens: float
    kept_mass: float
    output_error: float | None
    output_error_vs_dense: float | None
    sketch_over_kv: float | None
    timing: Timing


def config(request: DecodeRequest) -> dict[str, Any]:
    """Settings for a result file; policies as `policy_from_dict` takes them."""
    policies = {name: policy.to_dict() for name, policy in request.contestants.items()}
    return asdict(replace(request, policies={})) | {"policies": policies}


def check(request: DecodeRequest) -> None:
    """Refuse what cannot run, before anything is allocated.

    Raises
    ------
    ValueError, TypeError
        For a length, budget or policy that does not fit, and for lengths beyond the free memory.
    """
    check_sizes(
        request.tokens,
        request.threads,
        topk=request.topk,
        rounds=request.rounds,
        shortest=MIN_PAGES * PAGE_TOKENS,
    )
    for name, policy in request.contestants.items():
        allowed = "positions='original' (a bench without RoPE)"
        require(policy.positions == "original", f"policy {name}", policy.positions, allowed)
    for tokens in request.tokens:
        require_memory("tokens", tokens, needed_bytes(request, tokens))


def needed_bytes(request: DecodeRequest, tokens: int) -> int:
    """Memory at one length: caches, bounds of pages, and what torch makes of all tokens."""
    shape = request.shape
    caches = sum(shape.cache_bytes(tokens, sketch) for sketch in request.sketches)
    bounds = 8 * shape.row_bytes * (tokens // PAGE_TOKENS)  # twice, once beside zeros for values
    logits = 12 * shape.num_q_heads * tokens
    float32_head = 8 * shape.head_dim * tokens
    at_once = logits + float32_head
    if tokens <= request.slow_tokens:  # enable_gqa repeats keys and values
        at_once = max(at_once, 2 * shape.row_bytes * shape.group_size * tokens)
    return caches + bounds + at_once + (1 << 30)


def run(request: DecodeRequest, on_progress: OnProgress = no_progress) -> list[DecodeRow]:
    """Measure every length on every number of threads.

    Parameters
    ----------
    on_progress : callable
        Told what is going on, and how much of all work (1.0) was just finished.

    Raises
    ------
    DisagreementError
        If an output is further from float32 than its dtype explains; nothing is timed then.
    """
    check(request)
    rows: list[DecodeRow] = []
    for tokens in request.tokens:
        rows += _run_length(request, tokens, on_progress, tokens / sum(request.tokens))
    return rows


def _run_length(
    request: DecodeRequest, tokens: int, on_progress: OnProgress, weight: float
) -> list[DecodeRow]:
    shape = request.shape
    on_progress(f"{tokens} tokens: keys", 0.0)
    layer = StructuredLayer(shape, request.seed)
    caches = {sketch: shape.new_cache(tokens, sketch) for sketch in request.sketches}
    layer.fill(list(caches.values()), tokens)
    base = next(iter(caches.values()))
    q = layer.query(layer.draw_query(), base)[0]
    on_progress(f"{tokens} tokens: contenders", 0.3 * weight)
    everybody = entrants(
        q,
        caches,
        shape,
        request.contestants,
        topk=request.topk,
        curves=request.curves,
        with_enable_gqa=tokens <= request.slow_tokens,
    )
    on_progress(f"{tokens} tokens: outputs", 0.1 * weight)
    errors = compare(q, base, everybody)
    keeps = {name: kept(q, base, entrant.selection) for name, entrant in everybody.items()}

    rows: list[DecodeRow] = []
    contenders = {name: Contender(call=entrant.call) for name, entrant in everybody.items()}
    part = 0.6 * weight / (len(request.threads) * request.rounds * len(contenders))
    for number in request.threads:
        with threads(number):
            bandwidth = read_gb_per_s(number)
            samples = interleaved_ms(
                contenders,
                request.rounds,
                num_threads=number,
                cold=ColdCaches(),
                on_call=lambda name: on_progress(f"{tokens} tokens: {name}", part),
            )
        timed = {
            name: timing(samples[name], entrant.bytes_must_read, bandwidth, number)
            for name, entrant in everybody.items()
        }
        rows += _rows(tokens, everybody, timed, errors, keeps)
        rows.append(_perfect_dense(tokens, 2 * shape.row_bytes * tokens, bandwidth, number, rows))
    return rows


def compare(
    q: Tensor, cache: KVCache, everybody: Mapping[str, Entrant]
) -> dict[str, tuple[float, float]]:
    """Errors of every output against float32: over the same list, and over everything.

    Raises
    ------
    DisagreementError
        Naming the first contender whose output its list does not explain.
    """
    k, v = cache.k.transpose(1, 2), cache.v.transpose(1, 2)
    dense = attention_over(q, k, v, None)
    bound, errors = BOUND[cache.dtype], {}
    for name, entrant in everybody.items():
        out, expected = entrant.call().reshape(dense.shape), dense
        if entrant.selection is not None:
            expected = attention_over(q, k, v, entrant.selection)
        error = rel_err(out, expected)
        require_agreement(name, cache.max_seqlen, error, bound)
        errors[name] = (error, rel_err(out, dense))
    return errors


def _rows(
    tokens: int,
    everybody: Mapping[str, Entrant],
    timed: Mapping[str, Timing],
    errors: Mapping[str, tuple[float, float]],
    keeps: Mapping[str, tuple[float, float]],
) -> list[DecodeRow]:
    names = [name for name in (*TORCH_DENSE, TORCH_TOKEN_SELECT) if name in timed]
    peers = {name: timed[name].median_ms for name in names}
    best = min(peers[name] for name in TORCH_DENSE if name in peers)
    dense_ms = next(found.floor_ms for name, found in timed.items() if name in TORCH_DENSE)
    return [
        DecodeRow(
            tokens=tokens,
            contender=name,
            method=entrant.method,
            budget_tokens=entrant.budget_tokens,
            main=entrant.main,
            note=entrant.note,
            over={peer: ms / timed[name].median_ms for peer, ms in peers.items()},
            over_best_torch=best / timed[name].median_ms,
            over_perfect_dense=dense_ms / timed[name].median_ms,
            attended_tokens=keeps[name][1],
            kept_mass=keeps[name][0],
            output_error=errors[name][0],
            output_error_vs_dense=errors[name][1],
            sketch_over_kv=entrant.sketch_over_kv,
            timing=timed[name],
        )
        for name, entrant in everybody.items()
    ]


def _perfect_dense(
    tokens: int, num_bytes: int, bandwidth: float, number: int, rows: Sequence[DecodeRow]
) -> DecodeRow:
    """Keys and values of everything at the measured bandwidth: what no dense kernel can beat."""
    found = timing([num_bytes / bandwidth / 1e6], num_bytes, bandwidth, number)
    measured = rows[-1]  # of the same length and threads: its ratios give the peers' times
    scale = measured.timing.median_ms / found.median_ms
    return DecodeRow(
        tokens=tokens,
        contender=PERFECT_DENSE,
        method=PERFECT_DENSE,
        budget_tokens=None,
        main=True,
        note="modelled: bytes over bandwidth",
        over={peer: ratio * scale for peer, ratio in measured.over.items()},
        over_best_torch=measured.over_best_torch * scale,
        over_perfect_dense=1.0,
        attended_tokens=float(tokens),
        kept_mass=1.0,
        output_error=None,
        output_error_vs_dense=None,
        sketch_over_kv=None,
        timing=found,
    )


COLUMNS = (
    "",
    "ms",
    "p20-p80",
    "MB",
    "GB/s",
    "x\nfloor",
    "x\ngqa",
    "x\nfolded",
    "x\nmatmul",
    "x torch\nops",
    "x best\ntorch",
    "tokens\nattended",
    "kept\nmass",
    "output\nerror",
)


def show(request: DecodeRequest, rows: Sequence[DecodeRow]) -> None:
    """One table per length and number of threads: the main rows."""
    for tokens in request.tokens:
        for number in request.threads:
            chosen = [
                row
                for row in rows
                if row.main and row.tokens == tokens and row.timing.threads == number
            ]
            bandwidth = chosen[0].timing.streaming_gb_per_s
            clock = "CPU time" if number == 1 else "wall time"
            title = (
                f"decode step, {tokens} tokens, {request.shape}, {number} thread(s), {clock}; "
                f"streaming reads {bandwidth:.1f} GB/s; structured random keys (simulated)"
            )
            print_table(title, COLUMNS, [_cells(row) for row in chosen])


def _cells(row: DecodeRow) -> list[str]:
    found = row.timing
    ratios = [
        f"{row.over[peer]:.1f}" if peer in row.over else "–"
        for peer in (ENABLE_GQA, FOLDED, MATMUL, TORCH_TOKEN_SELECT)
    ]
    return [
        row.contender,
        f"{found.median_ms:.2f}",
        f"{found.p20_ms:.2f}-{found.p80_ms:.2f}",
        f"{found.bytes_must_read / 1e6:.1f}",
        f"{found.gb_per_s:.1f}",
        f"{found.times_floor:.1f}",
        *ratios,
        f"{row.over_best_torch:.1f}",
        f"{row.attended_tokens:.0f}",
        f"{row.kept_mass:.3f}",
        "–" if row.output_error is None else f"{row.output_error:.3f}",
    ]
