"""How queries are cut into blocks, and which tokens a block sees, competes over, always keeps.

The Python face of ``csrc/include/kvselect/query_blocks.h``, for whole batches on the device.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["WINDOW_RULES", "BlockRange", "block_range", "cut_queries"]

WINDOW_RULES = ("decode", "block_start", "block_end")


class BlockRange(NamedTuple):
    """Positions of each (row, block): ``start <= sink_end <= window_start <= end``, all clipped.

    Each is int32 [batch, num_blocks] (``start``: [batch, 1]).
    """

    start: Tensor  # first real token of the row
    sink_end: Tensor  # sinks are [start, sink_end)
    window_start: (
        Tensor  # candidates are [sink_end, window_start), recent tokens [window_start, end)
    )
    visible_end: Tensor  # scores normalise over [start, visible_end)
    begin: Tensor  # the block's own queries are [begin, end)
    end: Tensor


def cut_queries(
    seqlen_q: int, q_block_size: int, num_tail_tokens: int = 0, tail_q_block_size: int = 16
) -> tuple[int, ...]:
    """Offsets of the query blocks of a prefill call, cut from its end.

    The last ``num_tail_tokens`` go into blocks of ``tail_q_block_size``, the rest into blocks of
    ``q_block_size``; the first block of each part takes its remainder. A question at the end of a
    prompt is thus never averaged with document text, and nothing depends on the prompt's length
    modulo a block.

    Returns
    -------
    tuple of int, ascending from 0 to ``seqlen_q``; ``(0,)`` for an empty call
    """
    tail = min(num_tail_tokens, seqlen_q)
    cuts = list(range(seqlen_q, seqlen_q - tail, -tail_q_block_size))
    cuts += range(seqlen_q - tail, 0, -q_block_size)
    return (0, *reversed(cuts))


def block_range(
    cache_seqlens: Tensor,
    starts: Tensor | None,
    q_block_offsets: Tensor | None,
    seqlen_q: int,
    window_rule: str,
    num_sink_tokens: int,
    num_recent_tokens: int,
) -> BlockRange:
    """Sinks, candidates, window and visible tokens of every (row, block), on the device.

    Parameters
    ----------
    cache_seqlens : Tensor, [batch], int32
        Tokens stored, the queries' own included: query ``j`` sits at ``cache_seqlens - seqlen_q +
        j``.
    starts : Tensor, [batch], int32, or None
        First real token of each row.
    q_block_offsets : Tensor, [num_blocks + 1], int32, or None
        First query of each block; None: one block.
    """
    stored = cache_seqlens[:, None]
    zero = stored.new_zeros(())
    start = zero.expand_as(stored) if starts is None else starts[:, None].clamp(min=zero)
    start = start.minimum(stored)
    first = stored - seqlen_q
    if q_block_offsets is None:
        begin, end = first, stored
    else:
        begin, end = first + q_block_offsets[:-1], first + q_block_offsets[1:]
    begin = begin.maximum(start).minimum(stored)
    end = end.maximum(begin).minimum(stored)
    anchor = begin if window_rule == "block_start" else end
    window_start = (anchor - num_recent_tokens).maximum(start).minimum(end)
    sink_end = (start + num_sink_tokens).minimum(window_start)
    visible_end = end if window_rule == "decode" else begin
    return BlockRange(start, sink_end, window_start, visible_end, begin, end)
