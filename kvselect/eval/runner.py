"""Ask every policy the same questions: prefill a context once under the policy, then question after
question on its cache.

Context *and* question are processed under the policy; after each question the cache is cropped back
to the context. All policies run side by side on views of one set of weights, so that their decode
steps can be timed in turn.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from kvselect.eval.audit import Audit, audited
from kvselect.eval.checkpoint import Checkpoint
from kvselect.eval.machine import describe
from kvselect.eval.report import Cell, Length, Results
from kvselect.eval.tasks import (
    Question,
    Sample,
    Task,
    dialect_sample,
    grade_text,
    grade_words,
    prose_sample,
)
from kvselect.integrations.hf import attach
from kvselect.policies.base import Policy
from kvselect.policies.dense import Dense
from kvselect.sketch import bytes_per_token


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What to run.

    Attributes
    ----------
    tasks, lengths : tuple
    policies : dict, label -> policy
        If one of them is `Dense`, the others are compared with it.
    samples : int
        Questions per cell.
    questions_per_context : int
        At most so many of them share a context.
    max_contexts : int or None
        Stop a cell after so many contexts, with fewer questions than `samples` if a context has
        few.
    timed_steps : int
        Decode steps timed per policy and cell, after one that warms up.
    seed : int
        Of the samples.
    """

    tasks: tuple[Task, ...]
    lengths: tuple[Length, ...]
    policies: dict[str, Policy]
    samples: int
    questions_per_context: int = 32
    max_contexts: int | None = None
    timed_steps: int = 12
    seed: int = 0


class Session:
    """One policy on its own view of the model, attached while the session is open.

    Parameters
    ----------
    label : str
    model : PreTrainedModel
        A view that no other session uses (`share_weights`).
    policy : Policy
    """

    def __init__(self, label: str, model: Any, policy: Policy) -> None:
        self.label = label
        self.model = model
        self.policy = policy
        self.audit = Audit()
        self.cache: Any = None
        self._handle = attach(model, audited(policy, self.audit), break_even="off")

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc: object) -> None:
        self.cache = None
        self._handle.detach()

    def step(self, tokens: Tensor) -> Tensor:
        """Append tokens [n] to the cache; logits [vocab_size] after the last of them."""
        output = self.model(
            input_ids=tokens[None], past_key_values=self.cache, use_cache=True, logits_to_keep=1
        )
        logits: Tensor = output.logits[0, -1]
        return logits

    def timed_step(self, tokens: Tensor) -> float:
        """`step`, in seconds of wall time."""
        _finish(tokens.device)
        begin = time.perf_counter()
        self.step(tokens)
        _finish(tokens.device)
        return time.perf_counter() - begin

    def prefill(self, context: Tensor) -> float:
        """Read a context into a new cache; seconds of wall time."""
        self.cache = DynamicCache(config=self.model.config)
        return self.timed_step(context)

    def traffic(self) -> tuple[float, float]:
        """Decode steps so far: mean tokens attended per step, layer and KV head; bytes read over
        dense (modelled)."""
        layers = [layer for layer in self._handle.report().layers if layer.selects]
        config = self.model.config.get_text_config()
        head_dim = getattr(config, "head_dim", None)
        head_dim = head_dim or config.hidden_size // config.num_attention_heads
        key_bytes = head_dim * self.model.dtype.itemsize
        sketch = self.policy.required_sketch
        scan_bytes = key_bytes if sketch is None else bytes_per_token(sketch, head_dim)
        read = dense = tokens = 0.0
        for layer in layers:
            counts: dict[str, Any] = layer.decode
            read += counts["tokens_attended"] * 2 * key_bytes
            read += counts["tokens_scanned"] * scan_bytes
            read += counts["tokens_scored_from_keys"] * key_bytes
            dense += counts["tokens_visible"] * 2 * key_bytes
            tokens += (layer.tokens_per_step or 0.0) / len(layers)
        return tokens, read / dense if dense else 1.0

    def cache_bytes(self) -> int:
        """Memory of the session's cache, sketch included."""
        total = 0
        for layer in self.cache.layers:
            own = getattr(layer, "cache", None)  # of the layers that we replaced
            total += layer.keys.nbytes + layer.values.nbytes if own is None else own.nbytes
        return total

    def crop_to(self, num_tokens: int) -> None:
        """Forget everything after the context."""
        surplus = self.cache.get_seq_length() - num_tokens
        if surplus > 0:
            self.cache.crop(-surplus)


def share_weights(model: Any) -> Any:
    """A second model object over the same parameters and buffers: hooks of one do not reach the
    other."""
    memo = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def answer(session: Session, question: Question, device: torch.device, stop: set[int]) -> list[int]:
    """Ask one question on the session's cache, greedily; the cache is as before afterwards."""
    before = session.cache.get_seq_length()
    logits = session.step(torch.as_tensor(question.tokens, device=device))
    if question.top_words:
        tokens = logits.topk(len(question.answer)).indices.tolist()
    else:
        tokens = [int(logits.argmax())]
        while len(tokens) < question.max_new_tokens and tokens[-1] not in stop:
            logits = session.step(torch.tensor(tokens[-1:], device=device))
            tokens.append(int(logits.argmax()))
    session.crop_to(before)
    return tokens


def is_right(checkpoint: Checkpoint, question: Question, tokens: list[int]) -> bool:
    """Grade generated tokens: word by word in the dialect, by containment in prose."""
    if checkpoint.speaks_dialect:
        return grade_words(question, checkpoint.tokenizer.convert_ids_to_tokens(tokens))
    return grade_text(question, checkpoint.tokenizer.decode(tokens, skip_special_tokens=True))


def samples(
    checkpoint: Checkpoint, request: Request, task: Task, length: Length
) -> Iterator[Sample]:
    """Contexts with, in all, `request.samples` questions, unless `request.max_contexts` ends it
    sooner."""
    remaining, index = request.samples, 0
    while remaining > 0 and index != request.max_contexts:
        most = min(remaining, request.questions_per_context)
        if checkpoint.speaks_dialect:
            sample = dialect_sample(
                task, length.tokens, seed=request.seed, index=index, max_questions=most
            )
        else:
            sample = prose_sample(
                task,
                length.tokens,
                checkpoint.tokenizer,
                seed=request.seed,
                index=index,
                max_questions=most,
            )
        remaining -= len(sample.questions)
        index += 1
        yield sample


def check(checkpoint: Checkpoint, request: Request) -> None:
    """Find out before anything runs whether everything could.

    Raises
    ------
    kvselect.UnsupportedModelError
        If the model cannot be attached to.
    ValueError
        If a policy does not fit the model, or a task does not fit into a length.
    """
    view = share_weights(checkpoint.model)
    for label, policy in request.policies.items():
        try:
            attach(view, policy, break_even="off").detach()
        except ValueError as error:
            raise type(error)(f"{label}: {error}") from error
    for length in request.lengths:
        for task in request.tasks:
            try:
                next(samples(checkpoint, request, task, length))
            except ValueError as error:
                raise ValueError(f"{task.name} at {length.label}: {error}") from error


def stop_tokens(checkpoint: Checkpoint) -> set[int]:
    """Ids that end a generation."""
    config = checkpoint.model.generation_config
    ids = [] if config is None or config.eos_token_id is None else config.eos_token_id
    return set(ids) if isinstance(ids, list) else {int(ids)}


def time_decode(sessions: Sequence[Session], token: Tensor, timed_steps: int) -> dict[str, float]:
    """Median wall time of a decode step of each session [s], one step of each in turn, after one to
    warm up."""
    order = list(sessions)
    seconds: dict[str, list[float]] = {session.label: [] for session in order}
    for session in order:
        session.audit.enabled = False
    for step in range(1 + timed_steps):
        for session in order:
            taken = session.timed_step(token)
            if step > 0:
                seconds[session.label].append(taken)
        order = order[1:] + order[:1]
    for session in order:
        session.crop_to(session.cache.get_seq_length() - 1 - timed_steps)
        session.audit.enabled = True
    return {label: statistics.median(values) for label, values in seconds.items()}


def run(
    checkpoint: Checkpoint,
    request: Request,
    *,
    on_progress: Callable[[str, int], None] = lambda what, tokens: None,
    on_cells: Callable[[Results], None] = lambda results: None,
) -> Results:
    """Run everything that was asked for.

    Parameters
    ----------
    checkpoint : Checkpoint
        Its model is not changed: sessions attach to views of it.
    request : Request
    on_progress : (what, amount) -> None
        Called after every answered question with the task and length at hand; the amounts add up to
        `total_progress`.
    on_cells : (results) -> None
        Called whenever all policies finished a task at a length: write partial results here.

    Raises
    ------
    kvselect.UnsupportedModelError, ValueError
        As `check`.

    Notes
    -----
    Memory: one KV cache per policy, at the same time.
    """
    check(checkpoint, request)
    baseline = next(
        (label for label, policy in request.policies.items() if isinstance(policy, Dense)), None
    )
    results = Results(
        model=checkpoint.name,
        window_tokens=checkpoint.window_tokens,
        tasks=tuple(task.name for task in request.tasks),
        lengths=request.lengths,
        policies={label: policy.to_dict() for label, policy in request.policies.items()},
        baseline=baseline,
        config={
            "samples": request.samples,
            "questions_per_context": request.questions_per_context,
            "max_contexts": request.max_contexts,
            "timed_steps": request.timed_steps,
            "seed": request.seed,
            "rendering": "dialect" if checkpoint.speaks_dialect else "prose",
            "dtype": str(checkpoint.model.dtype).removeprefix("torch."),
            "device": next(checkpoint.model.parameters()).device.type,
            "prefill": "under the policy",
            "break_even": "off: policies select above their budget, fast or not",
        },
        environment=describe(),
    )
    views = {label: share_weights(checkpoint.model) for label in request.policies}
    with torch.inference_mode():
        for length in request.lengths:
            for task in request.tasks:
                with ExitStack() as opened:
                    sessions = [
                        opened.enter_context(Session(label, views[label], policy))
                        for label, policy in request.policies.items()
                    ]
                    results.cells += _run_cell(
                        checkpoint, request, sessions, task, length, on_progress
                    )
                on_cells(results)
    results.complete = True
    on_cells(results)
    return results


def total_progress(request: Request) -> int:
    """What the amounts given to `on_progress` add up to: questions, weighted by the length of their
    context."""
    tokens = sum(length.tokens for length in request.lengths)
    return len(request.tasks) * len(request.policies) * request.samples * tokens


def _run_cell(
    checkpoint: Checkpoint,
    request: Request,
    sessions: Sequence[Session],
    task: Task,
    length: Length,
    on_progress: Callable[[str, int], None],
) -> list[Cell]:
    """All policies on one task at one length, context by context, in turn."""
    device = next(checkpoint.model.parameters()).device
    stop = stop_tokens(checkpoint)
    outcomes: dict[str, list[bool]] = {session.label: [] for session in sessions}
    prefill_s: dict[str, list[float]] = {session.label: [] for session in sessions}
    decode_s: dict[str, float] = {}
    for sample in samples(checkpoint, request, task, length):
        context = torch.as_tensor(sample.context, device=device)
        for session in sessions:
            prefill_s[session.label].append(session.prefill(context))
            for question in sample.questions:
                tokens = answer(session, question, device, stop)
                outcomes[session.label].append(is_right(checkpoint, question, tokens))
                on_progress(f"{task.name} at {length.label}", length.tokens)
        if not decode_s:
            decode_s = time_decode(sessions, context[-1:], request.timed_steps)
    missing = request.samples - len(outcomes[sessions[0].label])
    on_progress(f"{task.name} at {length.label}", missing * length.tokens * len(sessions))
    cells = []
    for session in sessions:
        tokens_attended, bytes_ratio = session.traffic()
        cells.append(
            Cell(
                task=task.name,
                length=length,
                policy=session.label,
                outcomes=tuple(outcomes[session.label]),
                kept_mass=session.audit.recovered_mass,
                tokens_attended=tokens_attended,
                bytes_ratio=bytes_ratio,
                decode_ms=1000 * decode_s[session.label],
                prefill_s=statistics.median(prefill_s[session.label]),
                cache_bytes=session.cache_bytes(),
            )
        )
    return cells
