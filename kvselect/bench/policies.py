"""Every method on the same layer: a prefill chunk and decode steps, at several budgets of tokens.

Each method runs as `prefill` and `decode_step` drive it, on a cache and a state of its own, after
the same prompt: what it needs of earlier queries it sees in the chunk. Outputs are compared with
exact attention over everything on the same tokens; an error is what the method loses, not a fault,
so nobody is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from kvselect.attention import recovered_mass, sparse_attention
from kvselect.bench.layer import ROPE_BASE, Shape, StructuredLayer
from kvselect.bench.measure import ColdCaches, Contender, interleaved_ms, quantiles, threads
from kvselect.bench.memory import require_memory
from kvselect.bench.prefill import chunk_queries
from kvselect.bench.request import OnProgress, OnSkip, no_progress
from kvselect.bench.results import Skipped
from kvselect.checks import require, require_int
from kvselect.decode import decode_step
from kvselect.eval.memory import layer_bytes
from kvselect.machine import free_bytes
from kvselect.policies.base import POLICIES, Policy
from kvselect.policies.dense import Dense
from kvselect.policies.eviction import EvictionPolicy
from kvselect.prefill import prefill
from kvselect.rope import Rope
from kvselect.testing import rel_err

__all__ = [
    "DENSE",
    "PoliciesRequest",
    "PolicyRow",
    "budgeted",
    "fastest",
    "run",
]

DENSE = "Dense"
DRIFT = 0.95  # cosine of the queries of neighbouring decode steps


def budgeted(methods: Sequence[str] | None, budgets: Sequence[int]) -> dict[str, Policy]:
    """Label -> policy: Dense, then every method that has a budget, at each.

    Parameters
    ----------
    methods : sequence of str or None
        Class names; None: all that are registered.
    budgets : sequence of int
        Tokens attended per decode step.

    Raises
    ------
    ValueError
        If a method is unknown or has no budget, or a budget is too small.
    """
    found: dict[str, Policy] = {DENSE: Dense()}
    sized = [name for name, method in POLICIES.items() if "at_budget" in vars(method)]
    for name in sized if methods is None else methods:
        require(name in sized, "policies", name, ", ".join(sized))
        for budget in budgets:
            found[f"{name} {budget}"] = POLICIES[name].at_budget(budget)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class PoliciesRequest:
    """What to measure.

    Parameters
    ----------
    tokens : tuple of int
        Context lengths after the chunk.
    policies : mapping of label to policy
        With one that is `Dense`; times are given over its.
    chunk_tokens : int
        Of the prompt's last call, which is timed.
    rounds : int
        Timed decode steps; a third as many chunks.
    """

    tokens: tuple[int, ...]
    policies: Mapping[str, Policy]
    shape: Shape = field(default_factory=Shape)
    chunk_tokens: int = 512
    rounds: int = 9
    threads: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        require_int(self.chunk_tokens, "chunk-tokens", 1)
        require_int(self.rounds, "rounds", 1)
        require_int(self.threads, "threads", 1)
        for tokens in self.tokens:
            allowed = f"an int > {self.chunk_tokens} (chunk-tokens)"
            require_int(tokens, "tokens", self.chunk_tokens + 1, allowed)
        require(DENSE in self.policies, "policies", list(self.policies), f"{DENSE} among them")


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyRow:
    """One policy at one length.

    Attributes
    ----------
    method : str
        Class of the policy.
    attended_tokens : float
        Per decode step and KV head.
    kept_mass : float or None
        Share of the attention mass of the last step that its list holds, mean over query heads,
        measured exactly; None: the method has no list of cached tokens.
    output_error : float
        Of the last step against exact attention over everything, relative.
    bytes_ratio : float
        Bytes of cache and sketch that a decode step reads over dense attention's (modelled).
    memory_bytes : int
        Keys, values, sketch, and what the method remembers.
    decode_ms, prefill_ms : float
        Medians; of one decode step, and of the chunk.
    over_dense_decode, over_dense_prefill : float
        Dense time of the same run over this row's: how often faster.
    """

    tokens: int
    policy: str
    method: str
    settings: dict[str, Any]
    attended_tokens: float
    kept_mass: float | None
    output_error: float
    bytes_ratio: float
    memory_bytes: int
    decode_ms: float
    decode_samples_ms: list[float]
    prefill_ms: float
    prefill_samples_ms: list[float]
    over_dense_decode: float
    over_dense_prefill: float


def run(
    request: PoliciesRequest,
    on_progress: OnProgress = no_progress,
    on_skip: OnSkip | None = None,
) -> list[PolicyRow]:
    """Measure every length.

    Parameters
    ----------
    request : PoliciesRequest
    on_progress : callable
        Told what is going on, and which share of all work was just finished.
    on_skip : callable or None
        Told who cannot take part at a length: whom the free memory leaves no room for, or who wants
        the queries of the whole prompt; None: that is an error.

    Raises
    ------
    ValueError
        If a length's caches do not fit into the free memory together, or, without ``on_skip``, a
        policy cannot take part.
    """
    rows: list[PolicyRow] = []
    with threads(request.threads), torch.inference_mode():
        for tokens in request.tokens:
            weight = tokens / sum(request.tokens)
            fitting = _fitting(request, tokens, on_skip)
            rows += _Prompt(replace(request, policies=fitting), tokens).rows(on_progress, weight)
    return rows


def _fitting(request: PoliciesRequest, tokens: int, on_skip: OnSkip | None) -> dict[str, Policy]:
    """Those that the last call tells enough, and that have room for what they take for a moment
    beside the caches of all."""
    shape, free = request.shape, free_bytes()
    sizes = {
        "num_q_heads": shape.num_q_heads,
        "num_kv_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "itemsize": shape.torch_dtype.itemsize,
    }
    held, momentary = 0.0, {}
    for label, policy in request.policies.items():
        of_layer, momentary[label] = layer_bytes(policy, tokens, **sizes)
        held += of_layer
    require_memory("tokens", tokens, int(held), free)
    fitting = {}
    for label, policy in request.policies.items():
        try:
            watches_all = isinstance(policy, EvictionPolicy) and policy.watches_whole_prompt
            allowed = "one that asks for no queries but those of the prompt's last call"
            require(not watches_all, "policy", label, allowed)
            require_memory("policy", label, int(held) + momentary[label], free)
        except ValueError as error:
            if on_skip is None:
                raise
            on_skip(Skipped(tokens=tokens, contender=label, reason=str(error)))
        else:
            fitting[label] = policy
    return fitting


class _Runner:
    """One policy: its cache and state, and the calls that are timed."""

    def __init__(self, policy: Policy, prompt: _Prompt) -> None:
        self.policy, self.prompt = policy, prompt
        self.out = self.q = prompt.chunk[0]
        self.selection: Any = None
        self.step = 0
        self.restart()

    def restart(self) -> None:
        """A cache that holds the prompt but its last chunk."""
        prompt = self.prompt
        shape, room = prompt.shape, prompt.num_tokens
        self.cache = self.policy.new_cache(
            shape.batch,
            shape.num_kv_heads,
            shape.head_dim,
            dtype=shape.torch_dtype,
            device=shape.device,
            capacity=room,
        )
        self.cache.append(prompt.k[:, : prompt.before], prompt.v[:, : prompt.before])
        self.state = self.policy.new_state(self.cache)
        self.policy.update(self.state, self.cache)  # what blocks of the prompt say, it knows
        self.step = 0

    def read_chunk(self) -> None:
        """Append the last chunk and attend from it."""
        prompt = self.prompt
        part = slice(prompt.before, prompt.tokens)
        self.cache.append(prompt.k[:, part], prompt.v[:, part])
        q, q_unrotated = prompt.chunk
        if "prefill" in self.policy.phases:
            prefill(
                q, self.cache, self.policy, self.state, q_unrotated=q_unrotated, rope=prompt.rope
            )
        else:
            sparse_attention(q, self.cache)

    def append_one(self) -> None:
        at = self.prompt.tokens + self.step
        self.cache.append(self.prompt.k[:, at : at + 1], self.prompt.v[:, at : at + 1])
        self.step += 1

    def decode(self) -> None:
        """Attend from the token appended last."""
        q, q_unrotated = self.prompt.steps[self.step - 1]
        rope = self.prompt.rope
        self.out, info = decode_step(
            q, self.cache, self.policy, self.state, q_unrotated=q_unrotated, rope=rope
        )
        self.q, self.selection = q, info.selection


class _Prompt:
    """One length: keys, values and queries of one layer, the same for everybody."""

    def __init__(self, request: PoliciesRequest, tokens: int) -> None:
        self.request, self.tokens, self.shape = request, tokens, request.shape
        self.before = tokens - request.chunk_tokens
        self.num_tokens = tokens + 1 + request.rounds  # one step warms up
        layer = StructuredLayer(self.shape, request.seed)
        parts = list(layer.tokens(self.num_tokens))  # the first query of the layer sets its scale
        self.k, self.v = (torch.cat(part, dim=1) for part in zip(*parts))
        cache = self.shape.new_cache(tokens, None)
        cache.append(self.k[:, :tokens], self.v[:, :tokens])
        self.chunk = chunk_queries(layer, cache, request.chunk_tokens)
        drawn, self.steps = layer.draw_query(), []
        for step in range(1 + request.rounds):
            drawn = layer.drifted(drawn, DRIFT)
            self.steps.append(layer.query(drawn, cache, tokens + step))
        pairs = self.shape.head_dim // 2
        inv_freq = ROPE_BASE ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
        self.rope = Rope.from_frequencies(inv_freq, self.num_tokens)

    def rows(self, on_progress: OnProgress, weight: float) -> list[PolicyRow]:
        request = self.request
        runners = {label: _Runner(policy, self) for label, policy in request.policies.items()}
        calls = len(runners) * (request.rounds + max(request.rounds // 3, 1))

        def tell(label: str) -> None:
            on_progress(f"{self.tokens} tokens: {label}", weight / calls)

        def timed(contenders: dict[str, Contender], rounds: int) -> dict[str, list[float]]:
            return interleaved_ms(
                contenders,
                rounds,
                num_threads=request.threads,
                cold=ColdCaches(),
                max_seconds=60.0,
                on_call=tell,
            )

        chunks = {
            label: Contender(call=runner.read_chunk, prepare=runner.restart)
            for label, runner in runners.items()
        }
        prefill_ms = timed(chunks, max(request.rounds // 3, 1))
        before = {label: _counts(runner, self.shape) for label, runner in runners.items()}
        steps = {
            label: Contender(call=runner.decode, prepare=runner.append_one)
            for label, runner in runners.items()
        }
        decode_ms = timed(steps, request.rounds)
        dense_decode = quantiles(decode_ms[DENSE]).median
        dense_prefill = quantiles(prefill_ms[DENSE]).median
        dense = runners[DENSE]
        rows = []
        for label, runner in runners.items():
            read, visible, attended = (
                now - then for now, then in zip(_counts(runner, self.shape), before[label])
            )
            lists = runner.step * self.shape.num_kv_heads
            mass: float | None = 1.0
            if runner.selection is not None:
                # All caches hold the same tokens; one of an irrevocable method may not any more.
                mass = float(recovered_mass(runner.q, dense.cache, runner.selection).mean())
            decode, chunk = (quantiles(ms[label]).median for ms in (decode_ms, prefill_ms))
            settings = runner.policy.to_dict()
            rows.append(
                PolicyRow(
                    tokens=self.tokens,
                    policy=label,
                    method=settings["policy"],
                    settings=settings,
                    attended_tokens=attended / lists,
                    kept_mass=mass,
                    output_error=rel_err(runner.out, self._exact(dense)),
                    bytes_ratio=read / visible,
                    memory_bytes=runner.cache.nbytes + runner.state.nbytes,
                    decode_ms=decode,
                    decode_samples_ms=decode_ms[label],
                    prefill_ms=chunk,
                    prefill_samples_ms=prefill_ms[label],
                    over_dense_decode=dense_decode / decode,
                    over_dense_prefill=dense_prefill / chunk,
                )
            )
        return rows

    def _exact(self, dense: _Runner) -> Tensor:
        """Attention of the last step over everything, float32."""
        cache = dense.cache
        k, v = (x[0].float().transpose(0, 1) for x in (cache.k, cache.v))
        q = self.steps[dense.step - 1][0][0, 0].float().view(k.shape[0], -1, k.shape[2])
        weights = torch.softmax(q @ k.transpose(1, 2) * k.shape[2] ** -0.5, -1)
        return (weights @ v).view(1, 1, -1, k.shape[2])


def _counts(runner: _Runner, shape: Shape) -> tuple[float, float, float]:
    """Bytes read, bytes that dense attention would have read, tokens attended: by decode steps."""
    counts, itemsize = runner.state.decode, shape.torch_dtype.itemsize
    sketch = runner.policy.required_sketch
    return (
        counts.bytes_read(shape.head_dim, itemsize, sketch),
        counts.dense_bytes_read(shape.head_dim, itemsize),
        float(counts.tokens_attended),
    )


def fastest(rows: Sequence[PolicyRow], masses: Sequence[float]) -> list[tuple[int, float, str]]:
    """Per length and mass: the policy with the quickest decode step that keeps at least so much.

    Those whose decode steps are dense attention under another name do not compete.

    Returns
    -------
    (tokens, mass, label), the label of Dense where nothing else keeps so much.
    """
    found = []
    rows = [row for row in rows if row.method == DENSE or "decode" in POLICIES[row.method].phases]
    for tokens in dict.fromkeys(row.tokens for row in rows):
        here = [row for row in rows if row.tokens == tokens and row.kept_mass is not None]
        for mass in masses:
            enough = [row for row in here if (row.kept_mass or 0.0) >= mass]
            best = min(enough, key=lambda row: row.decode_ms)
            found.append((tokens, mass, best.policy))
    return found
