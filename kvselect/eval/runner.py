"""Ask every policy the same questions: prefill a context once under the policy, then question after
question on its cache.

Context *and* question are processed under the policy; after each question the cache is cropped back
to the context. All policies run side by side on views of one set of weights, so that their decode
steps can be timed in turn. Every context that a policy has answered is in the journal before the
next begins, and everything that is reported is computed from the journal.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import torch

from kvselect.checks import require
from kvselect.eval.checkpoint import Checkpoint
from kvselect.eval.identity import TEMPLATES, code_identity, fingerprint
from kvselect.eval.journal import Journal, notes_of
from kvselect.eval.machine import describe
from kvselect.eval.memory import available_bytes, estimate, in_units
from kvselect.eval.results import Length, Results, cell_of
from kvselect.eval.session import (
    Session,
    answer,
    graded,
    share_weights,
    stop_tokens,
    time_decode,
)
from kvselect.eval.tasks import Sample, Task, dialect_sample, prose_sample
from kvselect.integrations.hf import attach
from kvselect.policies.base import Policy
from kvselect.policies.dense import Dense


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


def samples(
    checkpoint: Checkpoint, request: Request, task: Task, length: Length
) -> Iterator[Sample]:
    """Contexts with, in all, `request.samples` questions, unless `request.max_contexts` ends it
    sooner."""
    remaining, index = request.samples, 0
    most_contexts = request.max_contexts
    if task.file is not None:  # one question each, and no more than there are
        most_contexts = min(len(task.file.rows), request.samples)
    while remaining > 0 and index != most_contexts:
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
        If a policy does not fit the model, a task does not fit into a length, or the longest
        context does not fit into memory.
    """
    at_once = len(request.policies)
    require_memory(checkpoint, request.policies, request.lengths, at_once=at_once)
    require_policies(checkpoint, request.policies)
    for length in request.lengths:
        for task in request.tasks:
            try:
                next(samples(checkpoint, request, task, length))
            except ValueError as error:
                raise ValueError(f"{task.name} at {length.label}: {error}") from error


def require_policies(checkpoint: Checkpoint, policies: Mapping[str, Policy]) -> None:
    """ValueError that names the first policy that does not fit the model."""
    view = share_weights(checkpoint.model)
    for label, policy in policies.items():
        try:
            attach(view, policy, break_even="off").detach()
        except ValueError as error:
            raise type(error)(f"{label}: {error}") from error


def require_memory(
    checkpoint: Checkpoint,
    policies: Mapping[str, Policy],
    lengths: Sequence[Length],
    *,
    at_once: int,
) -> None:
    """ValueError, with the numbers, if the longest context would not fit into memory.

    `at_once`: policies whose caches live at the same time, the largest of them.
    """
    longest = max(lengths, key=lambda length: length.tokens)
    model = checkpoint.model
    each = [estimate(model, [policy], longest.tokens) for policy in policies.values()]
    caches = sorted((one.cache_bytes for one in each), reverse=True)[:at_once]
    activations = max(one.activation_bytes for one in each)
    wanted = sum(caches) + activations
    free = available_bytes(next(model.parameters()).device)
    if free is not None and wanted > free:
        holders = "one policy" if len(caches) == 1 else f"{len(caches)} policies at once"
        raise ValueError(
            f"lengths: got {longest.label!r}, which takes about {in_units(wanted)} "
            f"beside the weights ({in_units(sum(caches))} of caches for {holders}, "
            f"{in_units(activations)} of activations), allowed: what fits into the "
            f"{in_units(free)} that are free (fewer policies, shorter contexts, a smaller dtype)"
        )


def describe_request(checkpoint: Checkpoint, request: Request) -> dict[str, Any]:
    """What two runs must share to be one run: plain JSON values."""
    rendering = "dialect" if checkpoint.speaks_dialect else "prose"
    return {
        "model_fingerprint": fingerprint(checkpoint.model),
        "dtype": str(checkpoint.model.dtype).removeprefix("torch."),
        "device": next(checkpoint.model.parameters()).device.type,
        "rendering": rendering,
        "template": TEMPLATES[rendering],
        "seed": request.seed,
        "samples": request.samples,
        "questions_per_context": request.questions_per_context,
        "max_contexts": request.max_contexts,
        "timed_steps": request.timed_steps,
        "tasks": [task.name for task in request.tasks],
        "data": {task.name: task.file.digest for task in request.tasks if task.file is not None},
        "prompts": {task.name: task.file.prompt for task in request.tasks if task.file is not None},
        "lengths": {length.label: length.tokens for length in request.lengths},
        "policies": {label: policy.to_dict() for label, policy in request.policies.items()},
        "prefill": "under the policy",
        "break_even": "off: policies select above their budget, fast or not",
        "code": code_identity(),
    }


JOURNAL_NAME, RESULTS_NAME = "samples.jsonl", "results.json"


class _NoJournal:
    """Records that live as long as the process."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def append(self, record: dict[str, Any]) -> None:
        self.records.append(record)


def run(
    checkpoint: Checkpoint,
    request: Request,
    *,
    journal: Journal | None = None,
    on_progress: Callable[[str, int], None] = lambda what, tokens: None,
    on_cells: Callable[[Results], None] = lambda results: None,
) -> Results:
    """Run everything that was asked for and is not in the journal yet.

    Parameters
    ----------
    checkpoint : Checkpoint
        Its model is not changed: sessions attach to views of it.
    request : Request
    journal : Journal or None
        Made with the header that `describe_request` gives. None: nothing is kept.
    on_progress : (what, amount) -> None
        Called after every answered context with the task and length at hand; the amounts add up to
        `total_progress`, what the journal had included.
    on_cells : (results) -> None
        Called whenever all policies finished a task at a length: write partial results here.

    Raises
    ------
    kvselect.UnsupportedModelError, ValueError
        As `check`; also if the journal's answers are to other samples than this code draws.

    Notes
    -----
    Memory: one KV cache per policy, at the same time.
    """
    check(checkpoint, request)
    baseline = next(
        (label for label, policy in request.policies.items() if isinstance(policy, Dense)), None
    )
    config = describe_request(checkpoint, request)
    for told_elsewhere in ("tasks", "lengths", "policies"):
        config.pop(told_elsewhere)
    kept = _NoJournal() if journal is None else journal
    done = _Done(kept)
    results = Results(
        model=checkpoint.name,
        window_tokens=checkpoint.window_tokens,
        tasks=tuple(task.name for task in request.tasks),
        lengths=request.lengths,
        policies={label: policy.to_dict() for label, policy in request.policies.items()},
        baseline=baseline,
        config=config,
        environment=done.environment(),
        notes=[] if journal is None else notes_of(journal),
    )
    views = {label: share_weights(checkpoint.model) for label in request.policies}
    with torch.inference_mode():
        for length in request.lengths:
            for task in request.tasks:
                if not done.is_finished(task, length, request.policies):
                    with ExitStack() as opened:
                        sessions = [
                            opened.enter_context(Session(label, views[label], policy))
                            for label, policy in request.policies.items()
                        ]
                        _run_cell(checkpoint, request, sessions, task, length, done, on_progress)
                else:
                    on_progress(f"{task.name} at {length.label}", _cell_amount(request, length))
                results.layers = done.layers()
                results.cells += [
                    cell_of(
                        task.name,
                        length,
                        label,
                        done.answers(task, length, label),
                        done.timing(task, length)[label],
                    )
                    for label in request.policies
                ]
                on_cells(results)
    results.complete = True
    on_cells(results)
    return results


def total_progress(request: Request) -> int:
    """What the amounts given to `on_progress` add up to: questions, weighted by the length of their
    context."""
    cells = sum(_cell_amount(request, length) for length in request.lengths)
    return len(request.tasks) * cells


def _cell_amount(request: Request, length: Length) -> int:
    return len(request.policies) * request.samples * length.tokens


class _Share:
    """How much of a cell is done: the larger of its share of questions and of contexts."""

    def __init__(
        self, request: Request, length: Length, num_policies: int, tell: Callable[[int], None]
    ) -> None:
        self._amount = _cell_amount(request, length)
        self._most = (request.samples, request.max_contexts)
        self._num_policies = num_policies
        self._tell = tell
        self._questions = self._contexts = self._told = 0

    def answered(self, num_questions: int) -> None:
        """One context, by one policy."""
        self._questions += num_questions
        self._contexts += 1
        samples, contexts = self._most
        share = self._questions / samples
        if contexts is not None:
            share = max(share, self._contexts / contexts)
        self._tell_up_to(int(self._amount * share / self._num_policies))

    def finished(self) -> None:
        self._tell_up_to(self._amount)

    def _tell_up_to(self, amount: int) -> None:
        self._tell(amount - self._told)
        self._told = amount


class _Done:
    """What a journal holds, by task, length, context and policy; writes what is added."""

    def __init__(self, journal: Journal | _NoJournal) -> None:
        self._journal = journal
        self._answers: dict[tuple[str, int], dict[str, dict[int, dict[str, Any]]]] = {}
        self._timings: dict[tuple[str, int], dict[str, list[float]]] = {}
        self._finished: dict[tuple[str, int], int] = {}
        self._environment: dict[str, Any] | None = None
        self._layers: tuple[int, ...] = ()
        for record in journal.records:
            self._note(record)

    def _note(self, record: Mapping[str, Any]) -> None:
        key = (record.get("task", ""), record.get("length_tokens", 0))
        if record["kind"] == "answers":
            by_policy = self._answers.setdefault(key, {})
            by_policy.setdefault(record["policy"], {})[record["index"]] = dict(record)
        elif record["kind"] == "timing":
            self._timings[key] = record["decode_s"]
        elif record["kind"] == "finished":
            self._finished[key] = record["num_contexts"]
        elif record["kind"] == "environment":
            self._environment = record["environment"]
        elif record["kind"] == "layers":
            self._layers = tuple(record["layers"])

    def add(self, kind: str, **fields: Any) -> None:
        record = {"kind": kind, **fields}
        self._journal.append(record)
        self._note(record)

    def environment(self) -> dict[str, Any]:
        """Where the run began and when; of the first of its processes."""
        if self._environment is None:
            now = datetime.now(timezone.utc).isoformat(timespec="seconds")
            self.add("environment", environment={**describe(), "begun": now})
        assert self._environment is not None
        return self._environment

    def layers(self) -> tuple[int, ...]:
        return self._layers

    def set_layers(self, layers: Sequence[int]) -> None:
        if self._layers != tuple(layers):
            self.add("layers", layers=list(layers))

    def is_finished(self, task: Task, length: Length, policies: Iterable[str]) -> bool:
        """Whether every answer and the times are here: a line of a damaged journal may be lost."""
        num_contexts = self._finished.get((task.name, length.tokens))
        answers = [len(self.answers(task, length, policy)) for policy in policies]
        return set(answers) == {num_contexts} and bool(self.timing(task, length))

    def answers(self, task: Task, length: Length, policy: str) -> list[dict[str, Any]]:
        """In the order of the contexts."""
        found = self._answers.get((task.name, length.tokens), {}).get(policy, {})
        return [found[index] for index in sorted(found)]

    def answer(self, task: Task, length: Length, policy: str, index: int) -> dict[str, Any] | None:
        by_policy = self._answers.get((task.name, length.tokens), {})
        return by_policy.get(policy, {}).get(index)

    def timing(self, task: Task, length: Length) -> dict[str, list[float]]:
        return self._timings.get((task.name, length.tokens), {})


def _run_cell(
    checkpoint: Checkpoint,
    request: Request,
    sessions: Sequence[Session],
    task: Task,
    length: Length,
    done: _Done,
    on_progress: Callable[[str, int], None],
) -> None:
    """All policies on one task at one length, context by context, in turn."""
    device = next(checkpoint.model.parameters()).device
    what = f"{task.name} at {length.label}"
    key = {"task": task.name, "length_tokens": length.tokens}
    done.set_layers(sessions[0].selecting_layers())
    ahead = _Share(request, length, len(sessions), lambda amount: on_progress(what, amount))
    for index, sample in enumerate(samples(checkpoint, request, task, length)):
        context = torch.as_tensor(sample.context, device=device)
        digest = sample.digest()
        to_be_timed = not done.timing(task, length)
        for session in sessions:
            known = done.answer(task, length, session.label, index)
            if known is not None:
                require(
                    known["sample"] == digest,
                    f"journal: sample {index} of {what}",
                    known["sample"],
                    f"{digest}, what this kvselect draws; another folder, or --restart",
                )
            if known is None or to_be_timed:
                prefill_s = session.prefill(context)
            if known is None:
                told = _answer_all(checkpoint, session, sample, device)
                done.add(
                    "answers",
                    **key,
                    index=index,
                    policy=session.label,
                    sample=digest,
                    context_tokens=len(context),
                    prefill_s=prefill_s,
                    **told,
                )
            if not to_be_timed:
                session.forget()
            ahead.answered(len(sample.questions))
        if to_be_timed:
            seconds = time_decode(sessions, context[-1:], request.timed_steps)
            done.add("timing", **key, decode_s=seconds)
    done.add("finished", **key, num_contexts=index + 1)
    ahead.finished()


def _answer_all(
    checkpoint: Checkpoint, session: Session, sample: Sample, device: torch.device
) -> dict[str, Any]:
    """Ask everything about a context that the session has read; what the journal keeps of it."""
    stop = stop_tokens(checkpoint)
    before = session.traffic()
    session.audit.take()
    scores, texts = [], []
    for question in sample.questions:
        score, text = graded(checkpoint, question, answer(session, question, device, stop))
        scores.append(score)
        texts.append(text)
    return {
        "scores": scores,
        "texts": texts,
        "gold": [list(question.answer) for question in sample.questions],
        "depths": [question.depth for question in sample.questions],
        "mass": session.audit.take(),
        "traffic": dataclasses.asdict(session.traffic().since(before)),
        "cache_bytes": session.cache_bytes(),
    }
