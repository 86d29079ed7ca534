"""ColumnRank: the reference's walk, blocks of rows, crops and chunks, what the walk is for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_eviction import DIM, HEADS, Run, small
from torch import Tensor

from kvselect import ColumnRank, decode_step, prefill
from kvselect.evictable_cache import EvictableKVCache
from kvselect.policies import column_rank
from kvselect.policies.column_rank import visits
from kvselect.policies.eviction import Prompt
from kvselect.reference import eviction as plain
from kvselect.testing import make_qkv, rel_err


def prompt_of(q: Tensor, k: Tensor, num_sinks: int = 0, softcap: float = 0.0) -> Prompt:
    return Prompt(q, k, num_sinks, DIM**-0.5, softcap)


def drawn(num_tokens: int, group: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(HEADS, group, num_tokens, DIM, generator=generator).double()
    return q, torch.randn(HEADS, num_tokens, DIM, generator=generator).double()


@settings(deadline=None, max_examples=20)
@given(
    seed=st.integers(0, 2**31),
    num_tokens=st.integers(1, 20),
    group=st.integers(1, 3),
    num_steps=st.integers(1, 6),
    damping=st.sampled_from([0.0, 0.15, 1.0]),
    rows=st.sampled_from([3, 512]),
    held=st.sampled_from([0, 20, 1 << 26]),
)
def test_visits_are_the_references(
    seed: int, num_tokens: int, group: int, num_steps: int, damping: float, rows: int, held: int
) -> None:
    """Whatever the blocks of rows, and however few of them are held from step to step."""
    q, k = drawn(num_tokens, group, seed)
    options: dict[str, Any] = {"num_steps": num_steps, "damping": damping, "temperature": 0.3}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(column_rank, "_ROWS_AT_ONCE", rows)
        patch.setattr(column_rank, "_HELD_FLOATS", held)
        found = visits(prompt_of(q, k), **options)
    for head in range(HEADS):
        wanted = plain.visits(q[head].transpose(0, 1), k[head], DIM**-0.5, **options)
        assert rel_err(found[head], wanted) <= 1e-12


def test_no_more_of_the_matrix_is_held_than_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = drawn(40)
    monkeypatch.setattr(column_rank, "_ROWS_AT_ONCE", 8)
    monkeypatch.setattr(column_rank, "_HELD_FLOATS", 8 * (8 + 16) + 5)
    held: dict[int, Tensor] = {}
    for _ in range(2):
        blocks = list(column_rank._blocks(prompt_of(q, k), 0, q[0, 0], 1.0, held))
        assert [begin for begin, _ in blocks] == [0, 8, 16, 24, 32] and sorted(held) == [0, 8]
        assert [rows.shape for _, rows in blocks] == [(8, 8 * n) for n in range(1, 6)]


def test_without_damping_mass_drifts_to_the_start() -> None:
    """The first token's row leads nowhere else: of 64 random ones it has most after five steps."""
    q, k = (x.repeat(2, *[1] * (x.dim() - 1)) for x in drawn(64, 1))
    for damping, least, most in ((0.0, 0.5, 1.0), (0.15, 0.2, 0.5)):
        found = visits(prompt_of(q, k), num_steps=5, damping=damping, temperature=1.0)
        assert found.sum(1) == pytest.approx(1.0)
        assert ((found[:, 0] > least) & (found[:, 0] < most)).all()


@pytest.mark.parametrize("span", [None, (20, 70)])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_it_keeps_what_the_walk_visits(span: tuple[int, int] | None, softcap: float | None) -> None:
    policy = small(ColumnRank, topk=20, temperature=0.5, span=span)
    run = Run(policy, starts=[0, 4])
    run.step(softcap=softcap)
    for row, (start, length) in enumerate(zip((0, 4), run.seqlens)):
        begin, end = (3, length - start - 9) if span is None else span
        places = [*range(3), *range(begin, end)]
        q = torch.unflatten(run.q[row, run.q.shape[1] - length + start :], 1, (HEADS, -1))
        for head in range(HEADS):
            keys = run.whole.k[row, start:length, head]
            found = visits(
                prompt_of(
                    q[places, head].transpose(0, 1)[None], keys[places][None], 3, softcap or 0.0
                ),
                5,
                0.15,
                0.5,
            )[0, 3:]
            wanted = {i + begin + start for i in plain.best(found.tolist(), 20)}
            listed = run.kept().indices[row, head].tolist()
            dropped = set(range(begin + start, end + start)) - set(listed)
            assert wanted <= set(listed) and len(dropped) == end - begin - 20


def test_chunks_and_a_crop_change_nothing() -> None:
    q, k, v = make_qkv(1, 121, 121, 2 * HEADS, HEADS, DIM, seed=4)
    policy = small(ColumnRank)
    kept = []
    for calls in ([(0, 120)], [(0, 50), (50, 51), (51, 120)], [(0, 70), (70, 110), (60, 120)]):
        cache = EvictableKVCache(1, HEADS, DIM)
        state = policy.new_state(cache)
        for begin, end in calls:
            cache.crop(cache.max_seqlen - begin)
            cache.append(k[:, begin:end], v[:, begin:end])
            prefill(q[:, begin:end], cache, policy, state, stepwise=False)
        assert state.window is not None and torch.equal(state.window, q[:, :120])
        cache.append(k[:, 120:], v[:, 120:])
        decode_step(q[:, 120:], cache, policy, state)
        assert state.window is None  # the memory of the queries is free as well
        kept.append(cache.listed().indices)
    assert torch.equal(kept[0], kept[1]) and torch.equal(kept[0], kept[2])


def test_a_prompt_that_others_read_is_refused() -> None:
    run = Run(small(ColumnRank), (120,))
    run.state = run.policy.new_state(run.cache)
    with pytest.raises(
        ValueError,
        match="queries of the prompt: got '1 of the last tokens', allowed: those of all 121 tokens",
    ):
        run.step()


def test_it_finds_what_the_text_leads_to() -> None:
    """Many tokens point to ten hubs, none of which the last queries look at."""
    generator = torch.Generator().manual_seed(1)
    keys = torch.nn.functional.normalize(torch.randn(200, DIM, generator=generator), dim=1)
    hubs = torch.arange(10, 20)
    q = 3.0 * keys[hubs[torch.randint(10, (200,), generator=generator)]]
    q[-32:] = torch.randn(32, DIM, generator=generator)
    run = small(ColumnRank, num_sink_tokens=4)
    cache = EvictableKVCache(1, 1, DIM)
    state = run.new_state(cache)
    cache.append(keys[None, :, None], keys[None, :, None])
    prefill(q[None, :, None], cache, run, state)
    cache.append(keys[None, :1, None], keys[None, :1, None])
    decode_step(q[None, -1:, None], cache, run, state)
    assert set(hubs.tolist()) <= set(cache.listed().indices[0, 0].tolist())


def test_queries_that_are_not_finite_say_nothing() -> None:
    q, k, v = make_qkv(1, 61, 61, 2 * HEADS, HEADS, DIM, seed=5)
    q[:, 7], k[:, 9] = torch.nan, torch.inf
    cache = EvictableKVCache(1, HEADS, DIM)
    policy = small(ColumnRank)
    state = policy.new_state(cache)
    cache.append(k[:, :60], v[:, :60])
    prefill(q[:, :60], cache, policy, state)
    cache.append(k[:, 60:], v[:, 60:])
    decode_step(q[:, 60:], cache, policy, state)
    assert (cache.listed().topk_length == 33).all()


def test_memory_is_announced() -> None:
    sizes = {"num_q_heads": 8, "num_kv_heads": 2, "head_dim": 64, "itemsize": 2}
    remembered, momentary = ColumnRank().extra_bytes(1000, **sizes)
    assert remembered == 1000 * 8 * 64 * 2 and momentary > 4 * 1000 * 1000 / 2
    long = (
        ColumnRank().extra_bytes(1 << 17, **sizes)[1]
        - ColumnRank().extra_bytes(1 << 16, **sizes)[1]
    )
    assert long < 2 * ColumnRank().extra_bytes(1 << 16, **sizes)[1]  # linear: blocks of rows


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"num_steps": 0}, ValueError, "num_steps: got 0"),
        ({"damping": 1.5}, ValueError, r"damping: got 1.5, allowed: a float in \[0, 1\]"),
        ({"temperature": 0.0}, ValueError, "temperature: got 0.0, allowed: a float > 0"),
        ({"temperature": "hot"}, TypeError, "temperature: got str 'hot'"),
    ],
)
def test_every_bound_is_checked(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ColumnRank(**changes)
