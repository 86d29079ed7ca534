"""How queries are cut into blocks, and what a block sees: the Python face of query_blocks.h."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvselect import TokenSelect, reference
from kvselect.prefill import query_blocks
from kvselect.query_blocks import WINDOW_RULES, block_range, cut_queries


@pytest.mark.parametrize(
    "seqlen_q, offsets",
    [
        (0, (0,)),
        (1, (0, 1)),
        (5, (0, 1, 5)),
        (8, (0, 4, 8)),
        (9, (0, 1, 5, 9)),
        (18, (0, 10, 14, 18)),
        (40, (0, 2, 12, 22, 32, 36, 40)),
        (38, (0, 10, 20, 30, 34, 38)),
    ],
)
def test_blocks_are_cut_from_the_end(seqlen_q: int, offsets: tuple[int, ...]) -> None:
    assert cut_queries(seqlen_q, 10, num_tail_tokens=8, tail_q_block_size=4) == offsets


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 600), st.integers(1, 200), st.integers(0, 150), st.integers(1, 40))
def test_every_query_belongs_to_one_block(
    seqlen_q: int, q_block_size: int, num_tail_tokens: int, tail_q_block_size: int
) -> None:
    offsets = cut_queries(seqlen_q, q_block_size, num_tail_tokens, tail_q_block_size)
    assert offsets[0] == 0 and offsets[-1] == seqlen_q
    lengths = [end - begin for begin, end in itertools.pairwise(offsets)]
    assert all(0 < length <= max(q_block_size, tail_q_block_size) for length in lengths)
    # More context before it does not move any cut of the end of the call but the first one's.
    longer = cut_queries(seqlen_q + 37, q_block_size, num_tail_tokens, tail_q_block_size)
    assert {o + 37 for o in offsets[1:]} <= set(longer)


def test_a_policy_names_its_blocks() -> None:
    policy = TokenSelect(q_block_size=100, num_tail_tokens=20, tail_q_block_size=10)
    assert query_blocks(250, policy) == (0, 30, 130, 230, 240, 250)
    with pytest.raises(ValueError, match="seqlen_q: got -1"):
        query_blocks(-1, policy)


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=3),
    st.none() | st.lists(st.integers(0, 45), min_size=3, max_size=3),
    st.integers(0, 20),
    st.lists(st.integers(0, 20), max_size=3),
    st.sampled_from(WINDOW_RULES),
    st.integers(0, 10),
    st.integers(0, 30),
)
def test_ranges_equal_the_reference(
    seqlens: list[int],
    starts: list[int] | None,
    seqlen_q: int,
    cuts: list[int],
    rule: str,
    sinks: int,
    recent: int,
) -> None:
    offsets = sorted({0, seqlen_q, *(min(cut, seqlen_q) for cut in cuts)})
    cut = torch.tensor(offsets, dtype=torch.int32) if len(offsets) > 1 else None
    cache_seqlens = torch.tensor(seqlens, dtype=torch.int32)
    first = None
    if starts is not None:
        first = torch.tensor(starts[: len(seqlens)], dtype=torch.int32)
    got = block_range(cache_seqlens, first, cut, seqlen_q, rule, sinks, recent)
    blocks = reference.QueryBlocks(
        cache_seqlens=cache_seqlens,
        seqlen_q=seqlen_q,
        starts=first,
        offsets=cut,
        window_rule=rule,
        num_sink_tokens=sinks,
        num_recent_tokens=recent,
    )
    for row in range(blocks.batch):
        for block in range(blocks.num_blocks):
            expected = blocks.range(row, block)
            for name, values in got._asdict().items():
                column = 0 if values.shape[1] == 1 else block
                assert int(values[row, column]) == getattr(expected, name), name
