"""What one engine step brings: which rows decode, which prefill, where their tokens and pages are.

Made once a step and shared by its layers. Nothing of it is kept for the next: keys, values and
sketch lie with the engine's blocks (`EngineKVCache`), so shared prefixes, preemption, recompute and
reused blocks need no bookkeeping of ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Rows", "Step"]


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Requests that bring equally many tokens.

    Attributes
    ----------
    tokens : slice or Tensor, [batch * num_new], int64
        Where these lie in the step's flat tokens, request by request.
    block_table : Tensor, [batch, max_num_blocks], int32
    before : tuple of int
        Tokens that each request holds before the step.
    num_new : int
    of_prompt : bool
        Whether their first token is one of a prompt: they prefill, however few they are.
    """

    tokens: slice | Tensor
    block_table: Tensor
    before: tuple[int, ...]
    num_new: int
    of_prompt: bool
    _lengths: dict[bool, Tensor] = field(default_factory=dict, init=False)

    @property
    def batch(self) -> int:
        return len(self.before)

    @property
    def after(self) -> tuple[int, ...]:
        return tuple(length + self.num_new for length in self.before)

    @property
    def decodes(self) -> bool:
        """Whether each is one generated token behind others: a decode step."""
        return self.num_new == 1 and not self.of_prompt and min(self.before) > 0

    def take(self, flat: Tensor) -> Tensor:
        """``flat`` [num_tokens, ...] as [batch, num_new, ...]; a view if tokens are neighbours."""
        return flat[self.tokens].view(self.batch, self.num_new, *flat.shape[1:])

    def put(self, flat: Tensor, values: Tensor) -> None:
        """The way back, in place."""
        flat[self.tokens] = values.flatten(0, 1)

    def lengths(self, after: bool) -> Tensor:
        """Host lengths for the ops, int32 [batch]; nobody else's to change. Brought to the device
        once, for all layers."""
        if after not in self._lengths:
            counts = self.after if after else self.before
            self._lengths[after] = _on(
                self.block_table.device, torch.tensor(counts, dtype=torch.int32)
            )
        return self._lengths[after].clone()


@dataclass(slots=True, eq=False)
class Step:
    """One engine step.

    Parameters
    ----------
    query_start_loc : sequence of int, [num_requests + 1]
        First flat token of each request, and the end of the last.
    seq_lens : sequence of int, [num_requests]
        Tokens that each request holds after the step.
    block_table : Tensor, [at least num_requests, max_num_blocks], int32
    of_prompt : sequence of bool, [num_requests]
        Whether the first new token of each request is one of its prompt. A scheduler may leave any
        number of them for the last piece, one too, which is not to be taken for a decode step.
    """

    query_start_loc: Sequence[int]
    seq_lens: Sequence[int]
    block_table: Tensor
    of_prompt: Sequence[bool]
    rows: list[Rows] = field(init=False)
    num_tokens: int = field(init=False)
    _positions: Tensor | None = None
    _split: tuple[int, list[Rows]] | None = None
    _pages: dict[int, tuple[Rows, list[int], list[int]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        starts = self.query_start_loc
        self.num_tokens = starts[-1]
        decoding, self.rows = [], []
        for row, length in enumerate(self.seq_lens):
            num_new = starts[row + 1] - starts[row]
            if num_new == 1 and length > 1 and not self.of_prompt[row]:
                decoding.append(row)
            elif num_new:
                tokens = slice(starts[row], starts[row + 1])
                table = self.block_table[row : row + 1]
                of_prompt = bool(self.of_prompt[row])
                self.rows.append(Rows(tokens, table, (length - num_new,), num_new, of_prompt))
        if decoding:
            self.rows.insert(0, self._decoding(decoding))

    def _decoding(self, rows: list[int]) -> Rows:
        """One group of decoding requests."""
        starts = [self.query_start_loc[row] for row in rows]
        before = tuple(self.seq_lens[row] - 1 for row in rows)
        first, count = rows[0], len(rows)
        together = rows == list(range(first, first + count))
        if together and starts == list(range(starts[0], starts[0] + count)):
            tokens: slice | Tensor = slice(starts[0], starts[0] + count)
            return Rows(tokens, self.block_table[first : first + count], before, 1, False)
        device = self.block_table.device
        picked = _on(device, torch.tensor(rows))
        tokens = _on(device, torch.tensor(starts))
        return Rows(tokens, self.block_table[picked], before, 1, False)

    @property
    def positions(self) -> Tensor:
        """Of every flat token in its request, int64 [num_tokens]."""
        if self._positions is None:
            starts = self.query_start_loc
            parts = [
                torch.arange(length - starts[row + 1] + starts[row], length)
                for row, length in enumerate(self.seq_lens)
            ]
            self._positions = _on(self.block_table.device, torch.cat(parts))
        return self._positions

    def pages(self, rows: Rows, page_block_size: int) -> tuple[list[int], list[int]]:
        """Pages of the last token but one of decoding ``rows``, and of their last."""
        if id(rows) not in self._pages:
            ends = torch.stack([rows.lengths(after=False), rows.lengths(after=True)], dim=1)
            places = (ends - 1).div(page_block_size, rounding_mode="floor")
            before, after = rows.block_table.gather(1, places.long()).T.tolist()
            self._pages[id(rows)] = (rows, before, after)  # with the rows, that no other has its id
        return self._pages[id(rows)][1:]

    def calls(self, is_dense: Callable[[int], bool]) -> list[Rows]:
        """Rows for `decode_step` and `prefill`: decoding rows that are dense apart from the others.

        A batch is dense only if all its rows are, so a short request beside a long one would
        otherwise select, and what a request gets would depend on its neighbours.

        Parameters
        ----------
        is_dense : callable
            From a row's length to whether its decode steps are dense: True up to some length. The
            same for all layers that select, so the first answer is kept.
        """
        if not self.rows or not self.rows[0].decodes:
            return self.rows
        decoding = self.rows[0]
        dense = [is_dense(length) for length in decoding.after]
        if all(dense) or not any(dense):
            return self.rows
        key = sum(dense)
        if self._split is None or self._split[0] != key:
            parts = [self._part(decoding, dense, wanted) for wanted in (True, False)]
            self._split = (key, [*parts, *self.rows[1:]])
        return self._split[1]

    @staticmethod
    def _part(rows: Rows, dense: list[bool], wanted: bool) -> Rows:
        picked = [row for row, is_dense in enumerate(dense) if is_dense is wanted]
        index = _on(rows.block_table.device, torch.tensor(picked))
        if isinstance(rows.tokens, slice):
            tokens = index + rows.tokens.start
        else:
            tokens = rows.tokens[index]
        before = tuple(rows.before[row] for row in picked)
        return Rows(tokens, rows.block_table[index], before, rows.num_new, rows.of_prompt)


def _on(device: torch.device, host: Tensor) -> Tensor:
    """What the host knows, on the device, which is not waited for."""
    pinned = device.type == "cuda" and torch.cuda.is_available()
    return (host.pin_memory() if pinned else host).to(device, non_blocking=pinned)
