"""Attention with true distances inside a window and one distance to everything before it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kvselect.attention import attend_queries, merge_splits
from kvselect.block_lists import QueryWindows, split_lists
from kvselect.cache import KVCache
from kvselect.queries import Queries
from kvselect.selection import Selection

__all__ = ["attend_clamped"]


def attend_clamped(
    queries: Queries,
    cache: KVCache,
    selection: Selection,
    windows: QueryWindows,
    *,
    block_size: int,
    distance: int,
) -> tuple[Tensor, Tensor]:
    """Attention over window and the rest of each list apart, merged by their lse.

    The window's tokens lie next to each other, so that ranks keep their distances. Un-rotated keys
    before it sit at position 0, where queries turned by ``distance`` see them all; what a table
    would scale those keys by (YaRN), the queries carry for them.

    Parameters
    ----------
    queries : Queries
        Un-rotated, with ``rope``, as the keys of ``cache``.
    distance : int
        Of what lies before the window.

    Returns
    -------
    out, lse : Tensor
        As `sparse_attention` gives them.
    """
    far, near = split_lists(selection, windows, cache, block_size)
    assert queries.rope is not None
    rope = queries.rope
    turned = rope.rotate(rope.rotate(queries.q, distance), 0).to(queries.q.dtype)
    parts = (
        attend_queries(replace(queries, q=turned, sink_logits=None), cache, far, None),
        attend_queries(queries, cache, near, queries.rope),
    )
    outs, lses = (torch.stack(both) for both in zip(*parts))
    out, lse = merge_splits(outs.float(), lses)
    return out.to(queries.q.dtype), lse
