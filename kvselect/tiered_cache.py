"""TieredKVCache: the sketch on the device, keys and values in host memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from kvselect.cache import KVCache
from kvselect.checks import require, require_choice, require_int
from kvselect.lru_slots import Replacement
from kvselect.sketch import BLOCK_TOKENS
from kvselect.storage import Storage
from kvselect.tiered_rows import Residency, TieredRows

__all__ = ["Fetched", "TieredKVCache"]


class Fetched(NamedTuple):
    """Listed tokens on the device: every list a row of one KV head, in pages of one token."""

    k_pages: Tensor  # [num_pages, 1, 1, head_dim]
    v_pages: Tensor
    block_table: Tensor  # [batch * num_kv_heads, width] int32, in the order of the lists
    cache_seqlens: Tensor  # [batch * num_kv_heads] int32


class TieredKVCache(KVCache):
    """A KVCache with ``keep="cpu"``: what a decode step does not read lies in host memory.

    The device holds the sketch of every token, and per row and KV head the keys and values of
    ``resident_tokens`` tokens: the window (sinks and recent tokens), and tokens that lists named,
    of which the least recently listed one makes room (``replacement``). `fetch` brings in what a
    list names. Results are those of a KVCache, bit for bit.

    Whoever needs every token (prefill, calls of several queries, exact scores) takes `whole_rows`:
    one layer's keys and values, on the device for as long as the call lasts. An append of more than
    one token begins that; the attention call which follows ends it.

    Parameters
    ----------
    batch, num_kv_heads, head_dim, dtype, device, capacity
        As for KVCache; the room is on the host, page-locked where the device is CUDA.
    sketch : "int4", "int8" or None
        None is for methods that score nothing.
    num_sink_tokens, num_recent_tokens : int
        At least those of the policy. With a sketch ``num_recent_tokens >= 128``.
    resident_tokens : int
        Room for the longest list, at least; the more, the fewer rows move (docs/tier.md).
    residency : Residency or None
        Where to count what moves; None: a count of its own.
    replacement : "lru" or "lru_s"
        Which listed token makes room. "lru": the least recently listed one. "lru_s" (InfLLM): the
        one with the lowest ``score <- 0.1 * score + attention received``, never one that the step
        lists. Attention to listed tokens is then computed once more, without values.
    block_tokens : int
        With "lru_s": so many neighbours share a score, the sum over them; the blocks of the policy.

    Raises
    ------
    ValueError, TypeError
        As KVCache, or if ``resident_tokens`` are no more than the window.

    Notes
    -----
    Scores read the keys of a sketch block that has no codes (a key is not finite, or their range
    leaves float16): a cache with such a block has whole rows.

    `fetch` reads the lists back from the device and works out on the host who makes room: one wait
    per layer and step. `k` and `v` are views of host memory.
    """

    keep: ClassVar[Literal["cpu"] | None] = "cpu"

    def __init__(
        self,
        batch: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        num_sink_tokens: int,
        num_recent_tokens: int,
        resident_tokens: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        capacity: int = 0,
        sketch: str | None = "int4",
        residency: Residency | None = None,
        replacement: Replacement = "lru",
        block_tokens: int = 1,
    ) -> None:
        require_choice(replacement, "replacement", ("lru", "lru_s"))
        require_int(block_tokens, "block_tokens", 1)
        require_int(num_sink_tokens, "num_sink_tokens", 0)
        require_int(num_recent_tokens, "num_recent_tokens", 1)
        window = num_sink_tokens + num_recent_tokens
        allowed = f"an int >= {window + 1} (more than the window)"
        require_int(resident_tokens, "resident_tokens", window + 1, allowed)
        if sketch is not None:
            allowed = f"an int >= {BLOCK_TOKENS} with a sketch (its blocks)"
            require_int(num_recent_tokens, "num_recent_tokens", BLOCK_TOKENS, allowed)
        self._window = num_sink_tokens, num_recent_tokens
        self._resident_tokens = resident_tokens
        self._residency = Residency() if residency is None else residency
        self._replacement, self._block_tokens = replacement, block_tokens
        self._num_readers = 0  # of whole rows
        self._lacks_codes = False  # a whole sketch block, somewhere
        super().__init__(
            batch,
            num_kv_heads,
            head_dim,
            dtype=dtype,
            device=device,
            capacity=capacity,
            sketch=sketch,
        )

    def _new_storage(
        self,
        batch: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        page_block_size: int | None,
    ) -> Storage:
        self._tiers = TieredRows(
            batch,
            num_kv_heads,
            head_dim,
            dtype,
            device,
            num_sink_tokens=self._window[0],
            num_recent_tokens=self._window[1],
            num_listed_tokens=self._resident_tokens - sum(self._window),
            residency=self._residency,
            replacement=self._replacement,
            block_tokens=self._block_tokens,
        )
        return self._tiers

    @property
    def resident_tokens(self) -> int:
        """Tokens per row and KV head that the device has room for."""
        return self._resident_tokens

    @property
    def replacement(self) -> Replacement:
        """Which listed token makes room."""
        return self._replacement

    @property
    def residency(self) -> Residency:
        """Counts of what moved."""
        return self._residency

    @property
    def has_whole_rows(self) -> bool:
        """Whether every token is on the device."""
        return self._tiers.is_whole

    @property
    def k_pages(self) -> Tensor:
        """Whole rows of keys, as KVCache shows them; ValueError outside of `whole_rows`."""
        self._require_whole_rows("k_pages")
        return self._tiers.k_pages

    @property
    def v_pages(self) -> Tensor:
        """Whole rows of values, as KVCache shows them; ValueError outside of `whole_rows`."""
        self._require_whole_rows("v_pages")
        return self._tiers.v_pages

    @property
    def nbytes(self) -> int:
        """Bytes held on the device: window, listed tokens, sketch; whole rows while they last."""
        sketch = 0 if self._sketch_data is None else self._sketch_data.nbytes
        return self._tiers.nbytes + sketch

    @property
    def host_nbytes(self) -> int:
        """Bytes held on the host: keys and values, with room not yet used."""
        return self._tiers.host_nbytes

    def require_window(self, num_sink_tokens: int, num_recent_tokens: int) -> None:
        """Raise ValueError where scores want exact keys of more first or last tokens."""
        for name, wanted, held in (
            ("num_sink_tokens", num_sink_tokens, self._window[0]),
            ("num_recent_tokens", num_recent_tokens, self._window[1]),
        ):
            require(wanted <= held, name, wanted, f"at most {held}, as the TieredKVCache was made")

    def append(self, k: Tensor, v: Tensor, seqlens: Sequence[int] | Tensor | None = None) -> None:
        """As KVCache. More than one token at once bring whole rows to the device until the next
        attention call."""
        before = self._lengths
        super().append(k, v, seqlens)
        if self._lengths is before:
            return
        self._tiers.store(k.detach(), v.detach(), before, self._lengths)
        blocks, known = self._num_blocks(self._lengths), self._num_blocks(before)
        if blocks != known and not self._lacks_codes and self._finds_no_codes(known, blocks):
            self._lacks_codes = True
            self._tiers.load(self._lengths, self._lengths)

    @contextmanager
    def whole_rows(self) -> Iterator[None]:
        """Every token on the device, as long as this lasts: `k_pages`, `v_pages` hold them all."""
        self._tiers.load(self._lengths, self._lengths)
        self._num_readers += 1
        try:
            yield
        finally:
            self._num_readers -= 1
            if not self._num_readers:
                self.drop_whole_rows()

    def drop_whole_rows(self) -> None:
        """Give back what an append of several tokens brought to the device; the window stays."""
        if self._lacks_codes:
            self._tiers.load(self._lengths, self._lengths)
        else:
            self._tiers.hold(self._lengths, self._lengths, self._host_starts)

    def fetch(self, indices: Tensor | None, by_rank: bool = False) -> Fetched:
        """Bring the tokens of a step's lists to the device; every token, where there is no list.

        Parameters
        ----------
        indices : Tensor, [batch, num_kv_heads, width], int32, or None
            Positions, ascending, each once, -1 pads.
        by_rank : bool
            Whether the query's position is the rank of its own token (compact positions): that is
            the last of every list, then.

        Raises
        ------
        ValueError
            If a list does not fit into ``resident_tokens``, or lacks the newest token by rank.
        """
        if indices is None:
            positions = self._everything()
        else:
            positions = indices.to("cpu", torch.int64)  # waits for the device
        if by_rank and positions.numel():
            last, newest = positions.amax(2), torch.tensor(self._lengths)[:, None] - 1
            complete = bool(((last == newest) | (last < 0)).all())
            allowed = "lists with the newest token (keep='cpu', compact positions)"
            require(complete, "selection", "a list without it", allowed)
        block_table = self._tiers.fetch(positions)
        counts = (positions >= 0).sum(2, dtype=torch.int32)
        return Fetched(*self._tiers.slots, block_table, counts.flatten().to(self._device))

    def note_received(self, received: Tensor) -> None:
        """With "lru_s": the attention probability that each token of the last `fetch` received.

        ``received``: float32 [batch * num_kv_heads, width], on the device, summed over the query
        heads of the KV head; the host reads it at the next fetch, when it waits anyway.
        """
        allowed = "a cache with replacement='lru_s'"
        require(self._replacement == "lru_s", "cache", f"{self._replacement!r}", allowed)
        self._tiers.note(received)

    def _everything(self) -> Tensor:
        """Lists of every token, one per row, seen by all heads."""
        place = torch.arange(max(self._num_real_tokens, default=0))
        start = torch.tensor(self._host_starts)[:, None]
        count = torch.tensor(self._num_real_tokens)[:, None]
        lists = torch.where(place < count, place + start, -1)
        return lists[:, None].expand(-1, self._num_kv_heads, -1)

    def _make_room(self, lengths: list[int], exactly: bool = False) -> None:
        super()._make_room(lengths, exactly)
        if exactly:  # ahead of any token
            return
        several = any(after - before > 1 for before, after in zip(self._lengths, lengths))
        if several or self._num_readers or self._lacks_codes:
            self._tiers.load(self._lengths, lengths)
        else:
            self._tiers.hold(lengths, self._lengths, self._host_starts)

    def _require_whole_rows(self, name: str) -> None:
        allowed = "a place inside of cache.whole_rows() (most tokens are on the host)"
        require(self._tiers.is_whole, name, "a TieredKVCache", allowed)

    def _num_blocks(self, lengths: list[int]) -> list[int]:
        """Whole sketch blocks of each row."""
        if self._sketch_format is None:
            return [0] * len(lengths)
        return [max(n - start, 0) // BLOCK_TOKENS for n, start in zip(lengths, self._host_starts)]

    def _finds_no_codes(self, begins: list[int], ends: list[int]) -> bool:
        """Whether one of blocks [begin, end) of the rows has none; reads the device, if any is."""
        if self._sketch_data is None:
            return False
        first_step = self._sketch_data[..., :2].view(torch.float16)[..., 0]
        return any(
            not bool(first_step[row, :, begin:end].isfinite().all())
            for row, (begin, end) in enumerate(zip(begins, ends))
            if begin < end
        )

    def _changed(self) -> None:
        super()._changed()
        blocks = self._num_blocks(self._lengths)
        self._lacks_codes = self._finds_no_codes([0] * len(blocks), blocks)
        self.drop_whole_rows()
