"""Which tokens a block of queries sees, competes over and always keeps."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

WINDOW_RULES = ("decode", "block_start", "block_end")


def clip(value: int, low: int, high: int) -> int:
    return max(low, min(value, high))


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockRange:
    """Token positions of one query block of one row: start <= sink_end <= window_start <= end."""

    start: int  # first real token of the row
    sink_end: int  # sinks are [start, sink_end)
    window_start: int  # candidates are [sink_end, window_start), recent tokens [window_start, end)
    visible_end: int  # scores normalise over [start, visible_end)
    begin: int  # first query of the block
    end: int  # one past its last query

    @property
    def num_candidates(self) -> int:
        return self.window_start - self.sink_end


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryBlocks:
    """The last ``seqlen_q`` tokens of each row as queries, cut into blocks.

    Parameters
    ----------
    cache_seqlens : Tensor, [batch], int32
        Tokens stored, the queries' own included: query j sits at ``cache_seqlens - seqlen_q + j``.
    seqlen_q : int
    starts : Tensor or None, [batch], int32
        First real token of each row (left padding); None: 0.
    offsets : Tensor or None, [num_blocks + 1], int32
        First query of each block, relative to the first query; None: one block.
    window_rule : {"decode", "block_start", "block_end"}
        "decode": window counted from ``end``, visible up to ``end``. "block_start": both from and
        up to ``begin``. "block_end": window counted from ``end``, visible up to ``begin``.
    num_sink_tokens, num_recent_tokens : int
    """

    cache_seqlens: Tensor
    seqlen_q: int
    starts: Tensor | None = None
    offsets: Tensor | None = None
    window_rule: str = "decode"
    num_sink_tokens: int = 0
    num_recent_tokens: int = 0

    @property
    def batch(self) -> int:
        return self.cache_seqlens.numel()

    @property
    def num_blocks(self) -> int:
        return 1 if self.offsets is None else self.offsets.numel() - 1

    def seqlen(self, row: int) -> int:
        return int(self.cache_seqlens[row])

    def start(self, row: int) -> int:
        start = 0 if self.starts is None else int(self.starts[row])
        return clip(start, 0, self.seqlen(row))

    def queries(self, block: int) -> range:
        """Numbers of the queries of a block, relative to the first query of the call."""
        if self.offsets is None:
            return range(self.seqlen_q)
        return range(int(self.offsets[block]), int(self.offsets[block + 1]))

    def position(self, row: int, query: int) -> int:
        """Position of a query; negative where the row holds fewer than ``seqlen_q`` tokens."""
        return self.seqlen(row) - self.seqlen_q + query

    def range(self, row: int, block: int) -> BlockRange:
        if self.window_rule not in WINDOW_RULES:
            raise ValueError(f"window_rule: got {self.window_rule!r}, allowed: {WINDOW_RULES}")
        seqlen, start = self.seqlen(row), self.start(row)
        queries = self.queries(block)
        begin = clip(self.position(row, queries.start), start, seqlen)
        end = clip(self.position(row, queries.stop), begin, seqlen)
        anchor = begin if self.window_rule == "block_start" else end
        window_start = clip(anchor - self.num_recent_tokens, start, end)
        return BlockRange(
            start=start,
            sink_end=clip(start + self.num_sink_tokens, start, window_start),
            window_start=window_start,
            visible_end=end if self.window_rule == "decode" else begin,
            begin=begin,
            end=end,
        )
