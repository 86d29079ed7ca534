"""What the training scripts of the embedded models share: optimisers, a run that resumes, export.

A run keeps its whole state in ``state.pt`` of its folder: weights, optimisers, generator and
counters. Killed at any moment and started again with the same command, it goes on from there and
ends with the weights that an unbroken run ends with.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn
from transformers import LlamaForCausalLM

STATE_NAME = "state.pt"
SECONDS_PER_STATE = 60.0
SECONDS_PER_LINE = 20.0  # of progress, where no terminal shows a bar

# ------------------------------------------------------------------------------------- optimisers


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The matrices, and the rest: embeddings and norms."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and "embed" not in name else others).append(parameter)
    return matrices, others


def orthogonalized(matrix: Tensor) -> Tensor:
    """Nearly the closest matrix with equal singular values: five quintic Newton-Schulz steps."""
    found = matrix / (matrix.norm() + 1e-7)
    tall = found.shape[0] > found.shape[1]
    if tall:
        found = found.T
    for _ in range(5):
        square = found @ found.T
        found = 3.4445 * found + (-4.7750 * square + 2.0315 * (square @ square)) @ found
    return found.T if tall else found


class Muon(torch.optim.Optimizer):
    """Momentum whose every update is made orthogonal, with decoupled weight decay; for matrices.

    Source: K. Jordan, "Muon: an optimizer for hidden layers in neural networks" (2024); Nesterov
    momentum, updates scaled by ``sqrt(rows / columns)`` where that is above 1.
    """

    def __init__(
        self,
        parameters: list[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.05,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["average"] = torch.zeros_like(parameter)
                average = state["average"].lerp_(parameter.grad, 1 - group["momentum"])
                update = orthogonalized(parameter.grad.lerp(average, group["momentum"]))
                update = update * max(1.0, parameter.shape[0] / parameter.shape[1]) ** 0.5
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"])


def learning_rate_factor(step: int, num_steps: int, flat: float = 0.6) -> float:
    """20 steps up, flat for a share `flat` of the run, then linearly down to 2 %."""
    warm_up = min(1.0, (step + 1) / 20)
    if step < flat * num_steps:
        return warm_up
    return warm_up * max(0.02, (num_steps - step) / ((1 - flat) * num_steps))


# --------------------------------------------------------------------------------------------- run


@dataclass(frozen=True, slots=True)
class Part:
    """One stretch of a run, with fresh optimisers.

    Attributes
    ----------
    seed : int
    num_steps : int
    optimizers : (model) -> list of Optimizer
        Their learning rates are the peaks.
    step : (model, rng, step) -> (loss, tokens, [(what, value)])
        Draws a batch and computes its loss; the values are shown as running means.
    flat : float
        As in `learning_rate_factor`.
    """

    seed: int
    num_steps: int
    optimizers: Callable[[nn.Module], list[torch.optim.Optimizer]]
    step: Callable[[Any, np.random.Generator, int], tuple[Tensor, int, list[tuple[str, float]]]]
    flat: float = 0.6


@dataclass(slots=True)
class _Position:
    """Where a run is."""

    part: int = 0
    step: int = 0
    tokens: int = 0
    cpu_seconds: float = 0.0
    shown: dict[str, float] = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)


def run(
    model: LlamaForCausalLM,
    parts: list[Part],
    folder: Path,
    identity: str,
    *,
    first_part: int = 0,
    records: list[dict[str, Any]] | None = None,
    stop_after: int | None = None,
    seconds_per_state: float = SECONDS_PER_STATE,
) -> list[dict[str, Any]] | None:
    """Train in place, from where `folder` says that an interrupted run was.

    Parameters
    ----------
    model : LlamaForCausalLM
        As it is before the first step.
    parts : list of Part
    folder : Path
        Holds the state file while the run is going on.
    identity : str
        Of the recipe: a state of another recipe is refused.
    first_part, records
        Begin there (0-based), with the records of the parts before it.
    stop_after : int or None
        Stop after so many steps of this call, the state written: as if killed, for tests.
    seconds_per_state : float
        Between two writings of the state.

    Returns
    -------
    list of dict or None
        A record per part: number, seed, steps, tokens, CPU seconds and the running means at its
        end. None if stopped before the end.

    Raises
    ------
    ValueError
        If the state in `folder` is damaged or of another recipe.
    """
    path = folder / STATE_NAME
    folder.mkdir(parents=True, exist_ok=True)
    state = _load_state(path, identity)
    at = _Position(part=first_part, records=list(records or []))
    if state is not None:
        at = _Position(**state["position"])
        model.load_state_dict(state["model"])
    model.train()
    total = sum(part.num_steps for part in parts[first_part:])
    done = sum(part.num_steps for part in parts[first_part : at.part]) + at.step
    steps_left = stop_after
    with _progress(total, done) as advance:
        while at.part < len(parts):
            part = parts[at.part]
            rng = np.random.default_rng(part.seed)
            optimizers = part.optimizers(model)
            if state is not None:
                rng.bit_generator.state = state["rng"]
                for optimizer, kept in zip(optimizers, state["optimizers"], strict=True):
                    optimizer.load_state_dict(kept)
            peaks = [[group["lr"] for group in one.param_groups] for one in part.optimizers(model)]
            state = None
            saved = time.monotonic()
            cpu = time.process_time() - at.cpu_seconds
            while at.step < part.num_steps:
                _one_step(model, part, optimizers, peaks, rng, at)
                at.cpu_seconds = time.process_time() - cpu
                shown = " ".join(f"{what} {value:.3f}" for what, value in at.shown.items())
                advance(f"{at.part + 1}/{len(parts)} {shown}")
                steps_left = None if steps_left is None else steps_left - 1
                if time.monotonic() - saved >= seconds_per_state or steps_left == 0:
                    _save_state(path, identity, model, optimizers, rng, at)
                    saved = time.monotonic()
                if steps_left == 0:
                    return None
            at.records.append(
                {
                    "stage": at.part + 1,
                    "seed": part.seed,
                    "steps": part.num_steps,
                    "tokens": at.tokens,
                    "cpu_seconds": round(at.cpu_seconds, 1),
                    "running_mean": {what: round(value, 4) for what, value in at.shown.items()},
                }
            )
            at = _Position(part=at.part + 1, records=at.records)
    return at.records


def _one_step(
    model: LlamaForCausalLM,
    part: Part,
    optimizers: list[torch.optim.Optimizer],
    peaks: list[list[float]],
    rng: np.random.Generator,
    at: _Position,
) -> None:
    factor = learning_rate_factor(at.step, part.num_steps, part.flat)
    for optimizer, rates in zip(optimizers, peaks):
        optimizer.zero_grad()
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate * factor
    loss, tokens, values = part.step(model, rng, at.step)
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
    for what, value in values:
        at.shown[what] = 0.9 * at.shown.get(what, value) + 0.1 * value
    at.step += 1
    at.tokens += tokens


def _save_state(
    path: Path,
    identity: str,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    rng: np.random.Generator,
    at: _Position,
) -> None:
    position = {name: getattr(at, name) for name in _Position.__slots__}
    whole = path.with_suffix(".part")
    torch.save(
        {
            "identity": identity,
            "model": model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "rng": rng.bit_generator.state,
            "position": position,
        },
        whole,
    )
    os.replace(whole, path)  # a kill leaves the old state or the new one


def _load_state(path: Path, identity: str) -> dict[str, Any] | None:
    if not path.exists():
        return None
    allowed = "a state that the same recipe wrote; delete it to begin anew"
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True)
        found = state["identity"]
    except Exception as error:  # torch raises whatever the damage leads to
        raise ValueError(
            f"state: got {str(path)!r}, which is damaged, allowed: {allowed}"
        ) from error
    if found != identity:
        raise ValueError(f"state: got {str(path)!r}, of another recipe, allowed: {allowed}")
    return state


@contextmanager
def _progress(total: int, done: int) -> Iterator[Callable[[str], None]]:
    """A function that counts a step: as a bar on a terminal, elsewhere a line now and then."""
    console = Console(stderr=True)
    if console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, speed_estimate_period=120) as progress:
            bar = progress.add_task("starting", total=total, completed=done)
            yield lambda what: progress.update(bar, description=what, advance=1)
        return
    count, last = done, time.monotonic()

    def advance(what: str) -> None:
        nonlocal count, last
        count += 1
        if time.monotonic() - last >= SECONDS_PER_LINE or count == total:
            last = time.monotonic()
            console.print(f"step {count}/{total} {what}", highlight=False, soft_wrap=True)

    yield advance


# ------------------------------------------------------------------------------------------ export


def save_weights(model: LlamaForCausalLM, folder: Path) -> None:
    """Config, and the weights rounded to bfloat16, as plain `transformers` loads them: in float32.

    The config says float32, so that the model computes in it; the file holds half of the bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.generation_config.do_sample = False
    model.config.dtype = torch.float32
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    weights = {
        name: value.detach().bfloat16().contiguous()
        for name, value in model.state_dict().items()
        if name not in tied
    }
    packed = safetensors_bytes(weights, metadata={"format": "pt"})
    (folder / "model.safetensors").write_bytes(packed)  # save_file leaves a file of mode 600


def save_record(folder: Path, records: list[dict[str, Any]], more: Mapping[str, Any]) -> None:
    """``training.json``: what every stage took and reached; the run's state is deleted."""
    training = {
        **more,
        "stages": records,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }
    (folder / "training.json").write_text(json.dumps(training, indent=2) + "\n")
    (folder / STATE_NAME).unlink(missing_ok=True)
