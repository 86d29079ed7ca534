"""Watching ops at work: how long each stage took, which lists attention read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kvselect.bench.measure import clock_of

__all__ = ["KVSELECT_STAGES", "REST", "AttendedLists", "OpWatch", "stage_ms"]

KVSELECT_STAGES = {
    "kvselect.kv_append": "append and sketch",
    "kvselect.score_tokens": "scan",
    "kvselect.select_tokens": "select",
    "kvselect.sparse_attention": "attention",
    "kvselect.merge_splits": "attention",
    "kvselect.rolling_sweep": "rolling sweep",
    "kvselect.selection_cache_step": "selection cache",
    "kvselect.recovered_mass": "audit",
}
REST = "rest (Python, small torch ops)"


class AttendedLists(NamedTuple):
    """What one call of `sparse_attention` was asked to read, in the form of the op."""

    q: Tensor  # [batch, seqlen_q, num_q_heads, head_dim]
    cache_seqlens: Tensor  # [batch]; with the last of these queries
    indices: Tensor | None  # [batch, num_blocks, num_kv_heads, width]; None: everything
    topk_length: Tensor | None  # [batch, num_blocks, num_kv_heads]
    q_block_offsets: Tensor | None  # [num_blocks + 1]; None: one block


class OpWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While entered: milliseconds of every op of kvselect and of those asked for.

    Attributes
    ----------
    ms : dict
        "namespace.name" of an op -> milliseconds of all its calls.
    attended : list of AttendedLists
        One for each call of `sparse_attention`; the lists are copies.
    """

    def __init__(self, others: Mapping[str, str] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ms: dict[str, float] = {}
        self.attended: list[AttendedLists] = []
        self._others = frozenset(others or ())
        self._now = clock_of(torch.get_num_threads())

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = ".".join(str(func).split(".")[:2])
        if not name.startswith("kvselect.") and name not in self._others:
            return func(*args, **kwargs)
        if name == "kvselect.sparse_attention":
            named = dict(zip((argument.name for argument in func._schema.arguments), args))
            lists = (named[field] for field in AttendedLists._fields[1:])
            copies = (None if x is None else x.clone() for x in lists)
            self.attended.append(AttendedLists(named["q"], *copies))  # type: ignore[arg-type]
        before = self._now()
        out = func(*args, **kwargs)
        self.ms[name] = self.ms.get(name, 0.0) + 1e3 * (self._now() - before)
        return out


def stage_ms(
    call: Callable[[], object], total_ms: float, others: Mapping[str, str] | None = None
) -> dict[str, float]:
    """Milliseconds of each stage of ``call``, which takes ``total_ms`` when nobody watches.

    Ops are timed one by one in a run of their own. What they do not explain of that run or of
    ``total_ms``, whichever is less, is the rest: watching adds to the one, a busy machine to both.

    Parameters
    ----------
    others : mapping of "namespace.name" to str
        Ops outside kvselect, and the stage each belongs to.
    """
    now = clock_of(torch.get_num_threads())
    with OpWatch(others) as watch, torch.no_grad():
        before = now()
        call()
        watched_ms = 1e3 * (now() - before)
    names = {**KVSELECT_STAGES, **(others or {})}
    stages: dict[str, float] = {}
    for op, ms in watch.ms.items():
        stage = names.get(op, op)
        stages[stage] = stages.get(stage, 0.0) + ms
    return {**stages, REST: max(min(total_ms, watched_ms) - sum(stages.values()), 0.0)}
