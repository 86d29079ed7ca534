"""BlockStatistics: what stands for the keys of each block of tokens, brought up to date by appends.

Blocks hold ``block_size`` tokens and are counted from a row's first real token.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from weakref import ref

import torch
from torch import Tensor

from kvselect.cache import KVCache
from kvselect.checks import require, require_int
from kvselect.fixed_cache import FixedKVCache
from kvselect.storage import grown
from kvselect.tiered_cache import TieredKVCache

__all__ = ["KINDS", "BlockStatistics", "rows_of_pages"]

KINDS = ("min_max", "moments", "mean_value", "unit_mean")
_TOKENS_AT_ONCE = 8192  # of a row whose keys are gathered: bounds what a long prompt takes


class BlockStatistics:
    """Statistics of the blocks of one layer, per row and KV head; rows follow those of a cache.

    Only finite keys count. A block that changed is computed anew, never widened, so that what is
    cropped leaves no trace; `received` alone sums what cannot be computed again.

    Parameters
    ----------
    block_size : int
        [tokens]
    kinds : tuple of str, of `KINDS`
        "min_max": the largest and the smallest key, channel by channel, in the cache's dtype.
        "moments": mean and variance of the keys, float32. "mean_value": mean value, float32.
        "unit_mean": mean key over its norm, float32.
    representatives : int
        Keys of a block that stand for it when `represent` is told to: those that received most, of
        a number per token which the owner adds to. 0: none.

    Raises
    ------
    ValueError, TypeError
        If a size or kind is not one of these.

    Notes
    -----
    Nothing is read back from the device. An append of one token reads one block per row; a crop or
    a new order of rows costs no more than the blocks that it opens, unless more than a few of them
    come between two steps, or rows start elsewhere: everything is computed anew then.
    """

    def __init__(
        self, block_size: int, kinds: tuple[str, ...] = (), *, representatives: int = 0
    ) -> None:
        require_int(block_size, "block_size", 1)
        for kind in kinds:
            require(kind in KINDS, "kinds", kind, " or ".join(map(repr, KINDS)))
        self._block_size = block_size
        self._kinds = kinds
        require_int(representatives, "representatives", 0)
        self._num_representatives = representatives
        self._tables: dict[str, Tensor] = {}
        self._cache: ref[KVCache] | None = None
        self._seen: tuple[int, int, tuple[int, ...]] | None = None  # serial, version, tokens
        self._represented: tuple[int, ...] = ()  # blocks of each row, the first ones

    @property
    def block_size(self) -> int:
        return self._block_size

    @property
    def kinds(self) -> tuple[str, ...]:
        return self._kinds

    @property
    def num_blocks(self) -> int:
        """Blocks per row that there is room for."""
        return self._tables["finite"].shape[2]

    def most_blocks(self, max_seqlen: int) -> int:
        """Blocks of a row of ``max_seqlen`` tokens, padding included: no more than there are.

        Where every row is padded, blocks, which begin at the first real token, are fewer.
        """
        return min(-(-max_seqlen // self._block_size), self.num_blocks)

    @property
    def min_max(self) -> Tensor:
        """Maxima, then minima, [batch, num_kv_heads, num_blocks, 2 * head_dim].

        NaN where a block has no finite key; as in the others, anything beyond the end of a row.
        """
        return self._table("min_max")

    @property
    def min_max_pages(self) -> tuple[Tensor, Tensor | None]:
        """The same where it lies, and the pages of each row: as `soft_votes` takes them."""
        return self.min_max, None

    @property
    def moments(self) -> Tensor:
        """Means, then variances (divided by the count), [..., num_blocks, 2 * head_dim] float32."""
        return self._table("moments")

    @property
    def mean_value(self) -> Tensor:
        """Of the tokens with finite keys, [..., num_blocks, head_dim] float32."""
        return self._table("mean_value")

    @property
    def unit_mean(self) -> Tensor:
        """Means of the keys, of length 1 (or 0), [..., num_blocks, head_dim] float32."""
        return self._table("unit_mean")

    @property
    def finite(self) -> Tensor:
        """Whether a token is there and its key finite, bool [..., num_blocks, block_size]."""
        return self._table("finite")

    @property
    def num_finite(self) -> Tensor:
        """Tokens that count, float32 [..., num_blocks, 1]."""
        return self._table("num_finite")

    @property
    def received(self) -> Tensor:
        """What the owner added up, [..., num_blocks, block_size] float32; 0 for new tokens."""
        return self._table("received")

    @property
    def representatives(self) -> Tensor:
        """Mean of the keys that stand for a block, [..., num_blocks, head_dim] float32."""
        return self._table("representatives")

    def _table(self, name: str) -> Tensor:
        return self._tables[name]

    @property
    def nbytes(self) -> int:
        """Bytes held, with room not yet used."""
        return sum(table.nbytes for table in self._tables.values())

    def bytes_of(self, num_tokens: int, num_kv_heads: int, head_dim: int, itemsize: int) -> int:
        """`nbytes` of one row of so many tokens, without room to grow."""
        each = sum(
            width * (itemsize if dtype is None else dtype.itemsize)
            for width, dtype in self._columns(head_dim).values()
        )
        return -(-num_tokens // self._block_size) * num_kv_heads * each

    @property
    def scored_nbytes(self) -> int:
        """Bytes by which the blocks that are there are scored: what a step reads of the tables."""
        if not self._tables or self._seen is None:
            return 0
        used = sum(-(-tokens // self._block_size) for tokens in self._seen[2])
        names = [*self._kinds, *(["representatives"] if self._num_representatives else [])]
        tables = [self._tables[name] for name in names if name != "mean_value"]
        return used * sum(table[0, :, 0].nbytes for table in tables if table.shape[2])

    def tensors(self) -> list[Tensor]:
        """Everything that steps write to in place: for ``mark_static_address``."""
        return list(self._tables.values())

    def prepare(self, cache: FixedKVCache) -> None:
        """Make all room at once, before steps are captured."""
        self._cache = ref(cache)
        cache.followers.add(self)
        self._make_room(cache, -(-cache.capacity // self._block_size))

    def clear(self) -> None:
        """Compute everything anew, in place: the tokens of a FixedKVCache changed."""
        cache = None if self._cache is None else self._cache()
        if cache is None or not self._tables:
            return
        if self._num_representatives:
            self.received.zero_()
        self._compute(cache, self.num_blocks)
        # What received nothing stands by all of its keys.
        if self._num_representatives:
            end = torch.full_like(cache.cache_seqlens, self.num_blocks)
            self.represent(cache, end, None, self.num_blocks)

    def follow(self, cache: KVCache) -> None:
        """Bring the blocks up to date with everything that the cache holds.

        Of a cache whose lengths the host does not know, with all that its last append brought:
        follow it after every one.
        """
        if cache.lengths_are_bounds:
            if not self._tables:
                assert isinstance(cache, FixedKVCache)
                self.prepare(cache)
            several = cache.num_appended // self._block_size + 2
            self._compute(cache, min(several, self.num_blocks) if cache.num_appended > 1 else 1)
            return
        size, seen = self._block_size, self._replayed(cache)
        real = cache.num_real_tokens
        self._seen = cache.serial, cache.version, real
        if isinstance(cache, FixedKVCache):
            self.prepare(cache)
        self._make_room(cache, max((-(-tokens // size) for tokens in real), default=0))
        touched = [
            -(-tokens // size) - before // size if tokens > before else 0
            for tokens, before in zip(real, seen)
        ]
        num_blocks = max(touched, default=0)
        with _keys_of(cache, num_blocks):
            self._compute(cache, num_blocks)

    def represent(
        self, cache: KVCache, end: Tensor, ends: tuple[int, ...] | None, most: int
    ) -> None:
        """Find the representatives of the blocks before ``end`` that have none yet.

        The keys that received most (the first of equals); a block none of whose tokens received
        anything stands by all of its keys.

        Parameters
        ----------
        end : Tensor, [batch], int32
            Blocks; what their tokens received is final.
        ends : tuple of int, [batch], or None
            The same, where the host knows it; None: ``most`` blocks of each row may be new.
        """
        if ends is None:
            num_blocks = min(most, self.num_blocks)
        else:
            known = self._represented or (0,) * len(ends)
            num_blocks = max((b - a for a, b in zip(known, ends)), default=0)
            self._represented = ends  # a crop may have moved the window back
        with _keys_of(cache, num_blocks):
            self._represent(cache, end, num_blocks)

    def _represent(self, cache: KVCache, end: Tensor, num_blocks: int) -> None:
        """The last ``num_blocks`` blocks before ``end``; of shorter rows, the first so many."""
        size, device = self._block_size, cache.device
        at_once = max(_TOKENS_AT_ONCE // size, 1)
        for begin in range(0, num_blocks, at_once):
            count = torch.arange(begin, min(begin + at_once, num_blocks), device=device)
            block = (end[:, None] - num_blocks).clamp(min=0).long() + count
            place = block[..., None] * size + torch.arange(size, device=device)
            finite, received = (
                table.gather(2, block[:, None, :, None].expand(-1, table.shape[1], -1, size))
                for table in (self.finite, self.received)
            )
            if cache.starts is not None:
                place = place + cache.starts[:, None, None]
            there = finite.any(1)
            k = stored(cache.scored_k_pages, cache.block_table, place, there).float()
            ranked = received.masked_fill(~finite, -1.0).sort(dim=-1, descending=True, stable=True)
            first = ranked.indices[..., : self._num_representatives]
            best = torch.zeros_like(finite).scatter_(3, first, True)
            best = (best | (received.sum(-1, keepdim=True) <= 0)) & finite
            total = k.masked_fill(~best[..., None], 0.0).sum(3)
            self._write("representatives", block, total / best.sum(-1, keepdim=True))

    def _write(self, name: str, block: Tensor, values: Tensor) -> None:
        """Values [batch, num_kv_heads, n, width] of blocks [batch, n]."""
        # Not scatter_, which took 1.1 ms for one block of 8 heads in bfloat16 on a CPU; this, 8 us.
        row = torch.arange(block.shape[0], device=block.device)[:, None]
        self._tables[name].transpose(1, 2).index_put_((row, block), values.transpose(1, 2))

    def _replayed(self, cache: KVCache) -> tuple[int, ...]:
        """Real tokens of each row that are known, after what happened to the cache."""
        nothing = (0,) * cache.batch
        if self._seen is None or self._seen[0] != cache.serial:
            self._tables, self._represented = {}, ()
            return nothing
        _, version, seen = self._seen
        changes = cache.changes_since(version)
        if changes is None:
            self._represented = ()
            if self._num_representatives:
                self.received.zero_()
            if cache.batch != self.finite.shape[0]:
                self._tables = {}
            return nothing
        for change in changes:
            if change.rows is not None:
                rows = change.rows
                with torch.inference_mode(False):
                    self._tables = {
                        name: table.index_select(0, rows.clone())
                        for name, table in self._tables.items()
                    }
                order = rows.tolist()
                seen = tuple(seen[row] for row in order)
                if self._represented:
                    self._represented = tuple(self._represented[row] for row in order)
            if self._num_representatives:
                self._forget_received(change.num_real_tokens)
            left = change.num_real_tokens
            seen = tuple(map(self._still_true, seen, left))
            ends = (tokens // self._block_size for tokens in left)
            self._represented = tuple(map(min, self._represented, ends))
        return seen

    def _still_true(self, known: int, left: int) -> int:
        """Tokens whose blocks stay as they are when a row is cropped to ``left`` of them."""
        return known if known <= left else left // self._block_size * self._block_size

    def _forget_received(self, num_tokens: tuple[int, ...]) -> None:
        """Of tokens at or behind ``num_tokens``, one number per row."""
        flat = self.received.flatten(2)
        kept = torch.tensor(num_tokens, device=flat.device)[:, None, None]
        flat.masked_fill_(torch.arange(flat.shape[2], device=flat.device) >= kept, 0.0)

    def _columns(self, head_dim: int) -> dict[str, tuple[int, torch.dtype | None]]:
        """Of every table that is kept: values per block, and their dtype (None: the cache's)."""
        widths: dict[str, tuple[int, torch.dtype | None]] = {
            "min_max": (2 * head_dim, None),
            "moments": (2 * head_dim, torch.float32),
            "mean_value": (head_dim, torch.float32),
            "unit_mean": (head_dim, torch.float32),
            "finite": (self._block_size, torch.bool),
            "num_finite": (1, torch.float32),
            "received": (self._block_size, torch.float32),
            "representatives": (head_dim, torch.float32),
        }
        names = [*self._kinds, "finite", "num_finite"]
        if self._num_representatives:
            names += ["received", "representatives"]
        return {name: widths[name] for name in names}

    def _make_room(self, cache: KVCache, num_blocks: int) -> None:
        room = self.num_blocks if self._tables else 0
        if room >= num_blocks and self._tables:
            return
        # No eighth more for a cache of fixed room: it asks for everything at once.
        more = num_blocks if isinstance(cache, FixedKVCache) else num_blocks + num_blocks // 8 + 1
        shape = (cache.batch, cache.num_kv_heads, room)
        with torch.inference_mode(False):  # written to in place by steps of any grad mode
            for name, (width, dtype) in self._columns(cache.head_dim).items():
                table = self._tables.get(name)
                if table is None:
                    dtype = cache.dtype if dtype is None else dtype
                    table = torch.zeros((*shape, width), dtype=dtype, device=cache.device)
                self._tables[name] = grown(table, 2, more)

    def _compute(self, cache: KVCache, num_blocks: int) -> None:
        """The last ``num_blocks`` blocks of each row; of shorter rows, all."""
        if num_blocks == 0 or cache.max_seqlen == 0:
            return
        size, device = self._block_size, cache.device
        start = 0 if cache.starts is None else cache.starts[:, None, None]
        real = (cache.cache_seqlens[:, None, None] - start).clamp(min=0)
        first = ((real + size - 1) // size - num_blocks).clamp(min=0)
        at_once = max(_TOKENS_AT_ONCE // size, 1)
        for begin in range(0, num_blocks, at_once):
            count = min(at_once, num_blocks - begin)
            block = first + torch.arange(begin, begin + count, device=device)[:, None]
            place = block * size + torch.arange(size, device=device)
            self._store(cache, block[..., 0].long(), (place + start).long(), place < real)

    def _store(self, cache: KVCache, block: Tensor, position: Tensor, there: Tensor) -> None:
        """Statistics of blocks [batch, n] whose tokens are at ``position`` [batch, n, size]."""
        k = stored(cache.scored_k_pages, cache.block_table, position, there)
        finite = there[:, None] & k.isfinite().all(-1)
        count = finite.sum(-1, keepdim=True)
        write = partial(self._write, block=block)
        write("finite", values=finite)
        write("num_finite", values=count.float())
        gone, none = ~finite[..., None], count == 0
        if "min_max" in self._kinds:
            high = k.masked_fill(gone, -torch.inf).amax(3)
            low = k.masked_fill(gone, torch.inf).amin(3)
            write("min_max", values=torch.cat([high, low], -1).masked_fill(none, torch.nan))
        if "moments" in self._kinds:
            keys = k.float().masked_fill(gone, 0.0)
            mean = keys.sum(3) / count
            spread = (keys - mean[..., None, :]).masked_fill(gone, 0.0)
            write("moments", values=torch.cat([mean, spread.square().sum(3) / count], -1))
        if "unit_mean" in self._kinds:
            mean = k.float().masked_fill(gone, 0.0).sum(3) / count
            write("unit_mean", values=torch.nn.functional.normalize(mean, dim=-1))
        if "mean_value" in self._kinds:
            v = stored(cache.v_pages, cache.block_table, position, there).float()
            write("mean_value", values=v.masked_fill(gone, 0.0).sum(3) / count)


def _keys_of(cache: KVCache, num_blocks: int) -> AbstractContextManager[None]:
    """For what reads so many blocks of a row: a tier's window shows no more than the last.

    An append of several tokens has brought whole rows to the device, for the attention after it.
    """
    absent = isinstance(cache, TieredKVCache) and not cache.has_whole_rows
    return cache.whole_rows() if num_blocks > 1 and absent else nullcontext()


def rows_of_pages(pages: Tensor, block_table: Tensor) -> Tensor:
    """``pages`` [num_pages, num_kv_heads, blocks of a page, width] of the rows of ``block_table``
    [batch, n], as [batch, num_kv_heads, n times as many blocks, width].
    """
    found = pages[block_table.clamp(min=0).long()]
    return found.transpose(1, 2).flatten(2, 3).contiguous()


def stored(pages: Tensor, block_table: Tensor | None, position: Tensor, there: Tensor) -> Tensor:
    """Keys or values at ``position`` [batch, n, size], as [batch, num_kv_heads, n, size, head_dim].

    Anything, without looking, where ``there`` (of the same shape) is False.
    """
    row = torch.arange(position.shape[0], device=position.device)[:, None, None]
    position = position.where(there, 0)
    page_size = pages.shape[1]
    if block_table is None:
        found = pages[row, position]
    else:
        page = block_table[row, position // page_size].clamp(min=0).long()
        found = pages[page, position % page_size]
    return found.permute(0, 3, 1, 2, 4)
