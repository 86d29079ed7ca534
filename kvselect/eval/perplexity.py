"""Perplexity against context length, on text that every Python ships: its standard library.

The scored tokens of a segment are the same at every length; only how much text stands before them
differs. Context and scored tokens are processed under the policy; scored tokens go in calls short
enough that each selects for itself, as a decode step does.
"""

from __future__ import annotations

import hashlib
import json
import math
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812

from kvselect.checks import require
from kvselect.eval.checkpoint import Checkpoint
from kvselect.eval.identity import code_identity, fingerprint
from kvselect.eval.intervals import BOOTSTRAP_DRAWS, BOOTSTRAP_SEED
from kvselect.eval.journal import Journal
from kvselect.eval.machine import describe
from kvselect.eval.results import Length, write_whole
from kvselect.eval.session import Session, share_weights
from kvselect.eval.tasks.prose import Tokenizer
from kvselect.policies.base import Policy
from kvselect.policies.dense import Dense

FORMAT = "kvselect-perplexity-1"
HELD_OUT_SHARE = 12  # one file in so many; a model trained on the others has not seen them
_NO_TEXT = {
    "test",
    "tests",
    "idlelib",
    "site-packages",
    "dist-packages",
    "encodings",
    "__pycache__",
}


def held_out(name: str) -> bool:
    """Whether text of this name is kept for measuring: the MD5 sum of the name is divisible by
    `HELD_OUT_SHARE`. The same names are held out in every version of Python."""
    digest = hashlib.md5(name.encode(), usedforsecurity=False).hexdigest()
    return int(digest, 16) % HELD_OUT_SHARE == 0


def library_files() -> list[Path]:
    """Source files of this Python's standard library, without its tests, in order of their paths.

    Those that `held_out` says of their names are for measuring, the others for training.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    return [
        path
        for path in sorted(root.rglob("*.py"))
        if not (_NO_TEXT | {"pydoc_data"}) & set(path.relative_to(root).parts)
    ]


def library_text() -> str:
    """The held-out source files of this Python's standard library, joined in the order of their
    paths."""
    return "\n".join(
        path.read_text(encoding="utf-8", errors="ignore")
        for path in library_files()
        if held_out(path.name)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class PerplexityRequest:
    """What to measure.

    Attributes
    ----------
    lengths : tuple of Length
        Of context and scored tokens together.
    policies : dict, label -> policy
    segments : int
        Places of the text that are scored.
    scored_tokens : int
        At the end of each.
    seed : int
        Of the places.
    """

    lengths: tuple[Length, ...]
    policies: dict[str, Policy]
    segments: int = 16
    scored_tokens: int = 256
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Text:
    """The text in tokens: [num_tokens] ids, and the digest of the text itself."""

    tokens: list[int]
    prefix: list[int]
    digest: str


def read_text(tokenizer: Tokenizer, text: str) -> Text:
    """Tokens of the text; `prefix` is what the tokenizer puts before any text."""
    return Text(
        tokens=tokenizer.encode(text, add_special_tokens=False),
        prefix=tokenizer.encode(""),
        digest=hashlib.sha256(text.encode()).hexdigest()[:16],
    )


def segment_ends(request: PerplexityRequest, text: Text) -> list[int]:
    """Where each segment ends, ascending; every one has text enough before it for every length.

    Raises
    ------
    ValueError
        If the text is shorter than the longest context, or a length holds no context at all.
    """
    longest = max(request.lengths, key=lambda length: length.tokens)
    shortest = min(request.lengths, key=lambda length: length.tokens)
    least = request.scored_tokens + len(text.prefix) + 2
    require(shortest.tokens >= least, "lengths", shortest.label, f"at least {least} tokens")
    room = len(text.tokens) - longest.tokens
    most = len(text.tokens) - request.segments
    allowed = f"at most {most} tokens: the text has {len(text.tokens)}"
    require(room >= request.segments, "lengths", longest.label, allowed)
    places = np.random.default_rng(request.seed).choice(room, request.segments, replace=False)
    return sorted(longest.tokens + int(place) for place in places)


def score(session: Session, tokens: Sequence[int], scored_tokens: int, device: torch.device) -> Any:
    """Negative log-likelihood of the last tokens given what stands before them [nats]; float64
    [scored_tokens]."""
    ids = torch.tensor(tokens, device=device)
    begin = len(tokens) - scored_tokens
    session.prefill(ids[: begin - 1])
    session.audit.take()
    piece = session.policy.tail_q_block_size
    found = []
    for at in range(begin - 1, len(tokens) - 1, piece):
        asked = ids[at : min(at + piece, len(tokens) - 1)]
        logits = session.model(
            input_ids=asked[None], past_key_values=session.cache, use_cache=True
        ).logits[0]
        targets = ids[at + 1 : at + 1 + len(asked)]
        found.append(F.cross_entropy(logits.double(), targets, reduction="none"))
    return torch.cat(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class PerplexityCell:
    """One policy at one length.

    Attributes
    ----------
    nll : tuple of float
        Mean negative log-likelihood of a scored token, by segment [nats].
    bytes_per_token : float
        Of the scored text.
    kept_mass : float or None
        As in `results.Cell`.
    """

    length: Length
    policy: str
    nll: tuple[float, ...]
    bytes_per_token: float
    kept_mass: float | None

    @property
    def mean_nll(self) -> float:
        return sum(self.nll) / len(self.nll)

    @property
    def perplexity(self) -> float:
        return math.exp(self.mean_nll)

    @property
    def bits_per_byte(self) -> float:
        return self.mean_nll / math.log(2) / self.bytes_per_token


def ratio_to(cell: PerplexityCell, baseline: PerplexityCell) -> tuple[float, float, float]:
    """Perplexity over the baseline's, with its paired bootstrap 95 % interval over segments."""
    difference = np.asarray(cell.nll) - np.asarray(baseline.nll)
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    drawn = rng.integers(0, difference.size, (BOOTSTRAP_DRAWS, difference.size))
    low, high = np.quantile(difference[drawn].mean(1), [0.025, 0.975])
    return math.exp(difference.mean()), math.exp(low), math.exp(high)


def describe_request(
    checkpoint: Checkpoint, request: PerplexityRequest, text: Text
) -> dict[str, Any]:
    """What two runs must share to be one run."""
    return {
        "model_fingerprint": fingerprint(checkpoint.model),
        "dtype": str(checkpoint.model.dtype).removeprefix("torch."),
        "device": next(checkpoint.model.parameters()).device.type,
        "text": text.digest,
        "seed": request.seed,
        "segments": request.segments,
        "scored_tokens": request.scored_tokens,
        "lengths": {length.label: length.tokens for length in request.lengths},
        "policies": {label: policy.to_dict() for label, policy in request.policies.items()},
        "code": code_identity(),
    }


def measure(
    checkpoint: Checkpoint,
    request: PerplexityRequest,
    text: Text,
    *,
    journal: Journal | None = None,
    on_progress: Callable[[str, int], None] = lambda what, amount: None,
) -> list[PerplexityCell]:
    """Score every segment at every length under every policy.

    Parameters
    ----------
    journal : Journal or None
        What it holds is not scored again.
    on_progress : (what, amount) -> None
        The amounts add up to `total_progress`.
    """
    ends = segment_ends(request, text)
    device = next(checkpoint.model.parameters()).device
    known: dict[tuple[int, str, int], Mapping[str, Any]] = {}
    for record in [] if journal is None else journal.records:
        known[record["length_tokens"], record["policy"], record["segment"]] = record
    cells = []
    view = share_weights(checkpoint.model)
    for length in request.lengths:
        for label, policy in request.policies.items():
            records = []
            with Session(label, view, policy) as session, torch.inference_mode():
                for segment, end in enumerate(ends):
                    found = known.get((length.tokens, label, segment))
                    if found is None:
                        begin = end - length.tokens + len(text.prefix)
                        tokens = [*text.prefix, *text.tokens[begin:end]]
                        nll = score(session, tokens, request.scored_tokens, device)
                        masses = [sum(heads) / len(heads) for heads in session.audit.take()]
                        found = {
                            "length_tokens": length.tokens,
                            "policy": label,
                            "segment": segment,
                            "nll": float(nll.mean()),
                            "mass": sum(masses) / len(masses) if masses else None,
                        }
                        if journal is not None:
                            journal.append(dict(found))
                    records.append(found)
                    on_progress(f"{label} at {length.label}", length.tokens)
            masses = [record["mass"] for record in records if record["mass"] is not None]
            cells.append(
                PerplexityCell(
                    length=length,
                    policy=label,
                    nll=tuple(record["nll"] for record in records),
                    bytes_per_token=_bytes_per_token(checkpoint, request, text, ends),
                    kept_mass=sum(masses) / len(masses) if masses else None,
                )
            )
    return cells


def total_progress(request: PerplexityRequest) -> int:
    """What the amounts given to `on_progress` add up to."""
    tokens = sum(length.tokens for length in request.lengths)
    return tokens * request.segments * len(request.policies)


def _bytes_per_token(
    checkpoint: Checkpoint, request: PerplexityRequest, text: Text, ends: Sequence[int]
) -> float:
    scored = [text.tokens[end - request.scored_tokens : end] for end in ends]
    num_bytes = sum(len(checkpoint.tokenizer.decode(tokens).encode()) for tokens in scored)
    return num_bytes / (request.scored_tokens * len(ends))


def baseline_of(request: PerplexityRequest) -> str | None:
    """The first dense policy."""
    return next((k for k, policy in request.policies.items() if isinstance(policy, Dense)), None)


def to_dict(
    checkpoint: Checkpoint, request: PerplexityRequest, text: Text, cells: list[PerplexityCell]
) -> dict[str, Any]:
    """Plain JSON values."""
    baseline = baseline_of(request)
    by_place = {(cell.length, cell.policy): cell for cell in cells}
    rows = []
    for cell in cells:
        dense = None if baseline is None else by_place[cell.length, baseline]
        ratio = None if dense is None or dense is cell else ratio_to(cell, dense)
        rows.append(
            {
                **asdict(cell),
                "length": cell.length.label,
                "length_tokens": cell.length.tokens,
                "perplexity": cell.perplexity,
                "bits_per_byte": cell.bits_per_byte,
                "ratio_to_baseline": None if ratio is None else ratio[0],
                "ratio_interval_95": None if ratio is None else list(ratio[1:]),
            }
        )
    return {
        "format": FORMAT,
        "model": checkpoint.name,
        "window_tokens": checkpoint.window_tokens,
        "baseline": baseline,
        "request": describe_request(checkpoint, request, text),
        **describe(),
        "cells": rows,
    }


def save(path: Path, found: dict[str, Any]) -> None:
    """Write the JSON; a reader never sees half a file."""
    write_whole(path, json.dumps(found, indent=1) + "\n")
