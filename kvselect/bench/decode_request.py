"""What a decode bench is asked, what it answers, and what it refuses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from kvselect.bench.entrants import default_policies
from kvselect.bench.layer import Shape
from kvselect.bench.memory import free_device_bytes, require_cuda, require_memory
from kvselect.bench.quest import MIN_PAGES, PAGE_TOKENS
from kvselect.bench.request import check_sizes
from kvselect.bench.results import Timing
from kvselect.checks import require, require_int
from kvselect.policies.base import Policy
from kvselect.policies.token_select import TokenSelect

__all__ = ["BUDGETS", "QUESTION", "QUICK_BUDGETS", "DecodeRequest", "DecodeRow", "check", "config"]

QUESTION = "How long does one decode step take, and how much attention mass does it keep?"
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
        Beyond so many tokens of all rows SDPA that makes copies of all keys or stores all logits
        (``enable_gqa`` on a CPU, the math backend on a GPU) is left out: it takes seconds per call.
    layers : int
        Timed together.
    hit_shares : tuple of float in (0, 1]
        Steps with a selection cache of which so many reuse their list, on ``layers >= 2``; for
        every policy that has a sketch.
    gpu_peers : bool
        Dense peers are those of a GPU, on whatever device.
    """

    tokens: tuple[int, ...]
    shape: Shape = field(default_factory=Shape)
    topk: int = 2048
    policies: Mapping[str, Policy] | None = None
    threads: tuple[int, ...] = (1,)
    rounds: int = 7
    curves: tuple[int, ...] = BUDGETS
    slow_tokens: int = 131072
    layers: int = 1
    hit_shares: tuple[float, ...] = ()
    gpu_peers: bool = False
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
        if self.gpu_peers and len(needed) > 1:  # exact scores read the keys of any cache
            needed.pop(None, None)
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
        The same of the fastest dense peer: of torch, on a GPU also of other packages.
    over_perfect_dense : float
        The same of the bytes of all keys and values at the streaming bandwidth.
    attended_tokens, kept_mass : float
        Per KV head; share of the attention mass of the same query, measured exactly.
    output_error : float or None
        Against exact attention over the same list, relative; the worst layer's.
    output_error_vs_dense : float or None
        Against exact attention over everything.
    expected_us, over_expected : float or None
        Of the step model (`kvselect.bench.expected`) at this run's bandwidth, and time over it.
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
    layers: int = 1
    batch: int = 1
    hit_share: float = 0.0
    expected_us: float | None = None
    over_expected: float | None = None


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
    require_int(request.layers, "layers", 1)
    if request.hit_shares:
        allowed = "an int >= 2 with hit_shares (layers take turns)"
        require(request.layers >= 2, "layers", request.layers, allowed)
    for share in request.hit_shares:
        require(0.0 < share <= 1.0, "hit_shares", share, "shares in (0, 1]")
    if request.shape.on_cuda:
        require_cuda(request.shape.device)
        require(request.threads == (1,), "threads", request.threads, "(1,) on a GPU")
    for name, policy in request.contestants.items():
        allowed = "positions='original' (a bench without RoPE)"
        require(policy.positions == "original", f"policy {name}", policy.positions, allowed)
    for tokens in request.tokens:
        free = free_device_bytes(request.shape.device) if request.shape.on_cuda else None
        require_memory("tokens", tokens, needed_bytes(request, tokens), free)


def needed_bytes(request: DecodeRequest, tokens: int) -> int:
    """Memory at one length: caches, bounds of pages, and what torch makes of all tokens."""
    shape = request.shape
    caches = sum(shape.cache_bytes(tokens, sketch) for sketch in request.sketches)
    bounds = 8 * shape.row_bytes * (tokens // PAGE_TOKENS)  # twice, once beside zeros for values
    logits = 12 * shape.batch * shape.num_q_heads * tokens
    float32_head = 8 * shape.head_dim * tokens
    at_once = logits + float32_head
    if shape.batch * tokens <= request.slow_tokens:  # enable_gqa repeats keys and values
        repeated = 2 * shape.batch * shape.row_bytes * shape.group_size * tokens
        at_once = max(at_once, repeated)
    if shape.on_cuda:  # every graph keeps its own
        at_once *= 4
    return request.layers * (caches + bounds) + at_once + (1 << 30)
