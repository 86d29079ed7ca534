"""Watching ops at work: how long each stage took, which lists attention read, what was written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kvselect.bench.measure import clock_of, return_freed_memory
from kvselect.bench.memory import resident_bytes
from kvselect.sketch import BLOCK_TOKENS

__all__ = ["KVSELECT_STAGES", "REST", "AttendedLists", "OpWatch", "WriteWatch", "stage_ms"]

KVSELECT_STAGES = {
    "kvselect.kv_append": "append and sketch",
    "kvselect.score_tokens": "scan",
    "kvselect.select_tokens": "select",
    "kvselect.list_blocks": "select",
    "kvselect.gather_tokens": "gather",
    "kvselect.sparse_attention": "attention",
    "kvselect.merge_splits": "attention",
    "kvselect.rolling_sweep": "rolling sweep",
    "kvselect.selection_cache_step": "selection cache",
    "kvselect.recovered_mass": "audit",
    "kvselect.block_sparse_attention": "attention",
    "kvselect.block_mass": "audit",
}
REST = "rest (Python, small torch ops)"


class AttendedLists(NamedTuple):
    """What a call of `sparse_attention` or `gather_tokens` was asked to read, in the ops' form."""

    num_queries: int
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
        One for each call of `sparse_attention` or `gather_tokens`; the lists are copies.
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
        if name in ("kvselect.sparse_attention", "kvselect.gather_tokens"):
            named = dict(zip((argument.name for argument in func._schema.arguments), args))
            lists = (named[field] for field in AttendedLists._fields[1:])
            copies = [None if x is None else x.clone() for x in lists]
            num_queries, offsets = named.get("seqlen_q"), copies[-1]
            if num_queries is None:
                num_queries = named["q"].shape[1]
            elif offsets is not None:  # some of a call's blocks, counted from its first query
                offsets -= offsets[0].clone()
                num_queries = int(offsets[-1])
            self.attended.append(AttendedLists(num_queries, *copies))  # type: ignore[arg-type]
        before = self._now()
        out = func(*args, **kwargs)
        self.ms[name] = self.ms.get(name, 0.0) + 1e3 * (self._now() - before)
        return out


class WriteWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While entered: bytes that ops write, and the most memory that the process has after any.

    An op that returns memory of its own has written all of it, unless it only allocates; one that
    works in place has written the tensor that it is called on; `kv_append` its tokens and the
    sketch records of the blocks that they complete.

    Attributes
    ----------
    written_bytes : int
    peak_bytes : int
        In RAM, beyond what the process had when the block was entered (Linux).
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.written_bytes = self.peak_bytes = 0
        return_freed_memory()
        self._resident_bytes = resident_bytes()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = str(func).split(".")[1]
        if name == "kv_append":
            self.written_bytes += _appended_bytes(*args)
        out = func(*args, **(kwargs or {}))
        if name.endswith("_"):
            self.written_bytes += args[0].nbytes
        elif isinstance(out, Tensor) and "empty" not in name:
            given = {x.untyped_storage().data_ptr() for x in _tensors(args)}
            if out.untyped_storage().data_ptr() not in given:
                self.written_bytes += out.nbytes
        if resident_bytes() - self._resident_bytes > self.peak_bytes:  # or freed since
            return_freed_memory()
            self.peak_bytes = max(self.peak_bytes, resident_bytes() - self._resident_bytes)
        return out


def _tensors(values: Any) -> list[Tensor]:
    """The tensors of an op's arguments, those in lists included."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors(value)
    return found


def _appended_bytes(
    k: Tensor,
    v: Tensor,
    num_valid: Tensor | None,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor | None,
    cache_seqlens: Tensor,
    sketch_data: Tensor | None,
    *rest: Any,
) -> int:
    """What `kv_append` writes, for rows without padding that take every token."""
    assert num_valid is None
    record_bytes = 0
    if sketch_data is not None:
        num_new = k.shape[1]
        ends = [(n + num_new) // BLOCK_TOKENS - n // BLOCK_TOKENS for n in cache_seqlens.tolist()]
        record_bytes = sum(ends) * sketch_data.shape[1] * sketch_data.shape[3]
    return k.nbytes + v.nbytes + record_bytes


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
