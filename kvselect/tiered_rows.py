"""TieredRows: all tokens in host memory; on the device a window, and what lists named lately.

The device keeps one pool of slots per row, ``[batch, num_slots, num_kv_heads, head_dim]``:

    [ pages of the window | slots of listed tokens, the least recently listed or the least attended
      out first ]

The window (sinks and recent tokens) is addressed by position, in pages: appends write there, scores
read their exact keys there. Page entries of tokens that lie elsewhere point to page 0; nothing
reads them. Which tokens have the other slots is each KV head's own affair.
Attention sees the pool as pages of one token and head, and each list as the block table of a row.

Calls that need every token (prefill, long dense steps, exact scores) get whole rows on the device
for as long as they last: of one layer, not of all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvselect.lru_slots import LruSlots, Replacement
from kvselect.storage import HeadMajorRows, zeros_in_huge_pages

__all__ = ["Residency", "TieredRows"]

PAGE_TOKENS = 64  # of the window; one more is held than the window fills


@dataclass(slots=True, eq=False)
class Residency:
    """What moved between host and device; rows are a token's key and value in one KV head.

    Attributes
    ----------
    num_steps : int
        Steps that brought listed tokens in.
    num_found, num_fetched : int
        Rows that these listed outside of the window: on the device already; brought in.
    fetched_bytes : int
        What that moved to the device.
    num_loads, loaded_bytes : int
        Whole rows for prefill and the like, and pages of the window: to the device.
    stored_bytes : int
        Appended tokens: to the host.
    """

    num_steps: int = 0
    num_found: int = 0
    num_fetched: int = 0
    fetched_bytes: int = 0
    num_loads: int = 0
    loaded_bytes: int = 0
    stored_bytes: int = 0

    @property
    def hit_rate(self) -> float | None:
        """Share of the listed rows outside of the window that were found; None: none was listed."""
        listed = self.num_found + self.num_fetched
        return self.num_found / listed if listed else None

    @property
    def fetched_bytes_per_step(self) -> float | None:
        return self.fetched_bytes / self.num_steps if self.num_steps else None

    def to_dict(self) -> dict[str, Any]:
        """All counts as plain values."""
        return {
            "num_steps": self.num_steps,
            "num_found": self.num_found,
            "num_fetched": self.num_fetched,
            "hit_rate": self.hit_rate,
            "fetched_bytes": self.fetched_bytes,
            "fetched_bytes_per_step": self.fetched_bytes_per_step,
            "num_loads": self.num_loads,
            "loaded_bytes": self.loaded_bytes,
            "stored_bytes": self.stored_bytes,
        }

    def __deepcopy__(self, memo: dict[int, Any]) -> Residency:
        return self  # copies of a cache count for the same report


def _rows_of_words(store: Tensor) -> Tensor:
    """A view, [rows, head_dim * itemsize / 8]."""
    # index_copy_ took 0.22 ms for 5300 rows of 32 words, and 0.49 as 128 bfloat16.
    return store.view(-1, store.shape[-1]).view(torch.int64)


def window_pages(num_tokens: int) -> int:
    """Most pages that so many neighbouring tokens lie on."""
    return (num_tokens - 1 + PAGE_TOKENS - 1) // PAGE_TOKENS + 1 if num_tokens else 0


class TieredRows:
    """Storage of a `TieredKVCache`, which says how long rows are and when whole ones are needed.

    Parameters
    ----------
    num_sink_tokens, num_recent_tokens : int
        The window.
    num_listed_tokens : int
        Slots per row and KV head for tokens outside of it; pages round up.
    residency : Residency
        Counts what moves.
    replacement : "lru" or "lru_s"
        Which listed token makes room; see `LruSlots`.
    block_tokens : int
        With "lru_s": tokens that share a score, counted from a row's first, padding excluded.
    """

    def __init__(
        self,
        batch: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        num_sink_tokens: int,
        num_recent_tokens: int,
        num_listed_tokens: int,
        residency: Residency,
        replacement: Replacement = "lru",
        block_tokens: int = 1,
    ) -> None:
        self._num_sink_tokens, self._num_recent_tokens = num_sink_tokens, num_recent_tokens
        num_pages = window_pages(num_sink_tokens) + window_pages(num_recent_tokens)
        self._first_listed = num_pages * PAGE_TOKENS
        self._pages_per_row = -(-(self._first_listed + num_listed_tokens) // PAGE_TOKENS)
        num_slots = self._pages_per_row * PAGE_TOKENS
        self.residency = residency
        self._device = device
        self._pinned = device.type == "cuda"
        self._sizes = num_kv_heads, head_dim, dtype
        with torch.inference_mode(False):  # changed in place by calls of any grad mode
            self._host = HeadMajorRows(
                batch, num_kv_heads, head_dim, dtype, torch.device("cpu"), self._pinned
            )
            like = torch.empty(0, dtype=dtype, device=device)
            shape = (batch, num_slots, num_kv_heads, head_dim)
            self._k, self._v = (zeros_in_huge_pages(like, shape) for _ in range(2))
            self._table = torch.zeros((batch, 0), dtype=torch.int32, device=device)
            self._window_slot = torch.full((batch, 0), -1, dtype=torch.int64)
        num_lists = batch * num_kv_heads
        self._listed = LruSlots(num_lists, num_slots - self._first_listed, replacement)
        self._block_tokens = block_tokens
        self._starts = [0] * batch
        # Of the last fetch: slots of its tokens, their positions, and what they received since.
        self._taken: tuple[Tensor, Tensor] | None = None
        self._received: Tensor | None = None
        self._pages: list[dict[int, int]] = [{} for _ in range(batch)]  # logical: of the window
        self._whole: HeadMajorRows | None = None

    @property
    def capacity(self) -> int:
        return self._host.capacity

    @property
    def num_slots(self) -> int:
        """Of a row: window and listed tokens."""
        return self._k.shape[1]

    @property
    def num_listed_tokens(self) -> int:
        """Slots for tokens outside of the window."""
        return self._listed.num_slots

    @property
    def is_whole(self) -> bool:
        """Whether whole rows are on the device."""
        return self._whole is not None

    @property
    def k_pages(self) -> Tensor:
        return self._in_pages(self._k) if self._whole is None else self._whole.k_pages

    @property
    def v_pages(self) -> Tensor:
        return self._in_pages(self._v) if self._whole is None else self._whole.v_pages

    @property
    def block_table(self) -> Tensor | None:
        return self._table if self._whole is None else None

    @property
    def slots(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the pool, [batch * num_slots * num_kv_heads, 1, 1, head_dim]."""
        head_dim = self._sizes[1]
        return self._k.view(-1, 1, 1, head_dim), self._v.view(-1, 1, 1, head_dim)

    @property
    def nbytes(self) -> int:
        """Held on the device."""
        stores = [self._k, self._v]
        if self._whole is not None:
            stores += [self._whole.k_pages, self._whole.v_pages]
        return sum(store.nbytes for store in stores)

    @property
    def host_nbytes(self) -> int:
        return self._host.k_pages.nbytes + self._host.v_pages.nbytes

    def make_room(self, lengths: list[int], exactly: bool = False) -> None:
        with torch.inference_mode(False):
            self._settle()
            self._host.make_room(lengths, exactly)
            missing = self.capacity - self._window_slot.shape[1]
            if missing <= 0:
                return
            batch = self._window_slot.shape[0]
            pages = self.capacity // PAGE_TOKENS - self._table.shape[1]
            more = torch.zeros((batch, pages), dtype=torch.int32, device=self._device)
            self._table = torch.cat([self._table, more], dim=1)
            nowhere = torch.full((batch, missing), -1, dtype=torch.int64)
            self._window_slot = torch.cat([self._window_slot, nowhere], dim=1)
        self._listed.make_room(self.capacity)

    def release(self, lengths: list[int]) -> None:
        """Rows keep their room on the host; what lies behind ``lengths`` leaves the device."""
        ends = torch.tensor(lengths, dtype=torch.int64)
        self._settle_scores()
        self._listed.forget(ends.repeat_interleave(self._sizes[0]))

    def take_rows(self, rows: list[int], lengths: list[int]) -> None:
        """Rows take along what is on the device of them."""
        self._settle()
        self._settle_scores()
        picked = torch.tensor(rows, dtype=torch.int64)
        heads = torch.arange(self._sizes[0])
        with torch.inference_mode(False):
            self._host.take_rows(rows, lengths)
            on_device = picked.to(self._device)
            self._k, self._v = (x.index_select(0, on_device) for x in (self._k, self._v))
            self._window_slot = self._window_slot.index_select(0, picked)
            self._listed.take_lists((picked[:, None] * len(heads) + heads).flatten())
            self._pages = [dict(self._pages[row]) for row in rows]
            shape = (len(rows), self._table.shape[1])
            self._table = torch.zeros(shape, dtype=torch.int32, device=self._device)
        for row, pages in enumerate(self._pages):
            for page, place in pages.items():
                self._table[row, page] = row * self._pages_per_row + place
        self._whole = None

    def tokens(self, lengths: list[int]) -> tuple[Tensor, Tensor]:
        """Views of host memory."""
        self._settle()
        return self._host.tokens(lengths)

    def row_keys(self, row: int, begin: int, end: int) -> Tensor:
        """A copy on the device."""
        self._settle()
        return self._host.row_keys(row, begin, end).to(self._device)

    def store(self, k: Tensor, v: Tensor, before: list[int], after: list[int]) -> None:
        """Copy appended tokens, the first ones of ``k`` and ``v`` as `append` has them."""
        for new, host in ((k, self._host.k_pages), (v, self._host.v_pages)):
            if min(before) == max(before) and min(after) == max(after):
                count = after[0] - before[0]
                host[:, before[0] : after[0]].copy_(new[:, :count], non_blocking=True)
            else:
                for row, (begin, end) in enumerate(zip(before, after)):
                    host[row, begin:end].copy_(new[row, : end - begin], non_blocking=True)
        self.residency.stored_bytes += self._row_bytes() * (sum(after) - sum(before))

    def load(self, stored: list[int], lengths: list[int]) -> None:
        """Whole rows on the device, until `hold`: what is stored, and room for ``lengths``."""
        if self._whole is not None:
            self._whole.make_room(lengths)
            return
        num_kv_heads, head_dim, dtype = self._sizes
        with torch.inference_mode(False):
            whole = HeadMajorRows(len(lengths), num_kv_heads, head_dim, dtype, self._device)
            whole.make_room(lengths, exactly=True)
            used = max(stored, default=0)
            whole.k_pages[:, :used].copy_(self._host.k_pages[:, :used], non_blocking=True)
            whole.v_pages[:, :used].copy_(self._host.v_pages[:, :used], non_blocking=True)
        self._whole = whole
        for pages in self._pages:  # appends pass the window by: `hold` fills it anew
            pages.clear()
        self._window_slot.fill_(-1)
        self._table.zero_()
        if used:
            self.residency.num_loads += 1
            self.residency.loaded_bytes += self._row_bytes() * used * len(lengths)

    def hold(self, lengths: list[int], stored: list[int], starts: list[int]) -> None:
        """The window of rows of ``lengths`` tokens, of which the host has ``stored``; no more whole
        rows."""
        self._whole, self._starts = None, list(starts)
        for row, (length, have, start) in enumerate(zip(lengths, stored, starts)):
            pages, wanted = self._pages[row], self._window(length, start)
            if pages.keys() == wanted:
                continue
            for page in pages.keys() - wanted:
                self._window_slot[row, page * PAGE_TOKENS : (page + 1) * PAGE_TOKENS] = -1
                self._table[row, page] = 0
                del pages[page]
            free = set(range(self._first_listed // PAGE_TOKENS)) - set(pages.values())
            assert len(free) >= len(wanted - pages.keys())
            for page, place in zip(sorted(wanted - pages.keys()), sorted(free)):
                pages[page] = place
                self._table[row, page] = row * self._pages_per_row + place
                begin, slot = page * PAGE_TOKENS, place * PAGE_TOKENS
                self._window_slot[row, begin : begin + PAGE_TOKENS] = torch.arange(
                    slot, slot + PAGE_TOKENS
                )
                count = min(have - begin, PAGE_TOKENS)
                if count > 0:
                    for pool, host in (
                        (self._k, self._host.k_pages),
                        (self._v, self._host.v_pages),
                    ):
                        pool[row, slot : slot + count].copy_(
                            host[row, begin : begin + count], non_blocking=True
                        )
                    self.residency.loaded_bytes += self._row_bytes() * count

    def fetch(self, positions: Tensor) -> Tensor:
        """Bring in what lists name; where everything is then.

        Parameters
        ----------
        positions : Tensor, [batch, num_kv_heads, width], int64, on the host
            -1 pads.

        Returns
        -------
        Tensor, [batch * num_kv_heads, width], int32, on the device
            Places among `slots`; 0 pads.

        Raises
        ------
        ValueError
            If a list names more tokens outside of the window than there are slots for.
        """
        batch, num_kv_heads, width = positions.shape
        listed = positions >= 0
        token = positions.clamp(min=0)
        window = self._window_slot[:, None].expand(-1, num_kv_heads, -1).gather(2, token)
        wanted = listed & (window < 0)
        flat = (batch * num_kv_heads, width)
        self._settle_scores()
        taken = self._listed.take(token.reshape(flat), wanted.reshape(flat))
        self._move(taken.place, token.reshape(-1), taken.slots.reshape(-1), width)
        self._taken = taken.slots, token.reshape(flat)

        slots = torch.where(wanted, taken.slots.view(token.shape) + self._first_listed, window)
        slots += torch.arange(batch)[:, None, None] * self.num_slots
        slots = slots * num_kv_heads + torch.arange(num_kv_heads)[:, None]
        slots.masked_fill_(~listed, 0)
        count = self.residency
        count.num_steps += 1
        count.num_found += taken.num_found
        count.num_fetched += taken.place.numel()
        count.fetched_bytes += taken.place.numel() * self._row_bytes() // num_kv_heads
        return slots.view(flat).int().to(self._device)

    def note(self, received: Tensor) -> None:
        """What the tokens of the last fetch received, float32 [batch * num_kv_heads, width], on the
        device; the host reads it when it next works out who makes room."""
        self._received = received

    def _settle_scores(self) -> None:
        taken, received = self._taken, self._received
        self._taken = self._received = None
        if taken is None or received is None:
            return
        slots, token = taken
        received = received.to("cpu").nan_to_num(0.0, 0.0, 0.0).masked_fill(slots < 0, 0.0)
        if self._block_tokens > 1:
            start = torch.tensor(self._starts).repeat_interleave(self._sizes[0])
            block = (token - start[:, None]).clamp(min=0) // self._block_tokens
            total = received.new_zeros(received.shape[0], self.capacity // self._block_tokens + 1)
            received = total.scatter_add(1, block, received).gather(1, block)
        self._listed.note(slots, received)

    def _move(self, place: Tensor, token: Tensor, slot: Tensor, width: int) -> None:
        """Copy rows from the host to the slots that they were given: one copy for all lists."""
        if not place.numel():
            return
        num_kv_heads = self._sizes[0]
        row_and_head = place // width
        source = row_and_head * self.capacity + token[place]
        row, head = row_and_head // num_kv_heads, row_and_head % num_kv_heads
        target = (row * self.num_slots + slot[place] + self._first_listed) * num_kv_heads + head
        target = target.to(self._device)
        for host, pool in ((self._host.k_pages, self._k), (self._host.v_pages, self._v)):
            rows = _rows_of_words(host.transpose(1, 2))
            shape = (place.numel(), rows.shape[1])
            staged = torch.empty(shape, dtype=rows.dtype, pin_memory=self._pinned)
            torch.index_select(rows, 0, source, out=staged)
            staged = staged.to(self._device, non_blocking=True)
            _rows_of_words(pool).index_copy_(0, target, staged)

    def _window(self, length: int, start: int) -> set[int]:
        """Pages of the first and the last tokens of a row."""
        recent = max(length - self._num_recent_tokens, 0)
        pages = {*range(recent // PAGE_TOKENS, -(-length // PAGE_TOKENS))}
        if self._num_sink_tokens:
            sinks_end = min(start + self._num_sink_tokens, length)
            pages.update(range(start // PAGE_TOKENS, -(-sinks_end // PAGE_TOKENS)))
        return pages

    def _in_pages(self, pool: Tensor) -> Tensor:
        return pool.view(-1, PAGE_TOKENS, *pool.shape[2:])

    def _row_bytes(self) -> int:
        """Of a token's keys and values in all KV heads."""
        num_kv_heads, head_dim, dtype = self._sizes
        return 2 * num_kv_heads * head_dim * dtype.itemsize

    def _settle(self) -> None:
        """Wait for copies to the host before the host reads them."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
