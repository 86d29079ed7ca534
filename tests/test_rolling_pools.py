"""TokenSelect with rolling sweeps: what a decode step remembers, audits, counts and forgets."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from kvselect import KVCache, PolicyState, TokenSelect, decode_step, recovered_mass
from kvselect.rope import Rope
from kvselect.testing import make_qkv

HEADS, GROUP, HEAD_DIM = 2, 2, 32


def policy(**settings: Any) -> TokenSelect:
    defaults: dict[str, Any] = {
        "topk": 48,
        "num_sink_tokens": 4,
        "num_recent_tokens": 128,
        "dense_below_tokens": 0,
        "sketch": None,
        "num_segments": 4,
        "rolling_audit_interval": None,
    }
    return TokenSelect(**(defaults | settings))


class Run:
    """Decode steps of the same tokens, on a cache of one's own."""

    def __init__(self, chosen: TokenSelect, seqlens: list[int], *, rows: Any = slice(None)) -> None:
        longest = max(seqlens) + 200
        q, k, v = make_qkv(
            len(seqlens), longest, longest, HEADS * GROUP, HEADS, HEAD_DIM, dtype=torch.float32
        )
        self.q, self.k, self.v = q[rows], k[rows], v[rows]
        self.seqlens = seqlens[rows]
        self.policy, self.rope = chosen, None
        if chosen.positions == "compact":
            self.rope = Rope.from_frequencies(10000.0 ** -torch.linspace(0, 1, 16), 4096)
        batch = len(self.seqlens)
        self.cache = KVCache(batch, HEADS, HEAD_DIM, dtype=torch.float32, sketch=chosen.sketch)
        self.state: PolicyState = chosen.new_state(self.cache)
        padded = max(self.seqlens)
        self.cache.append(self.k[:, :padded], self.v[:, :padded], seqlens=self.seqlens)

    def append(self, count: int = 1) -> None:
        new = [slice(n, n + count) for n in self.seqlens]
        k = torch.stack([self.k[row, part] for row, part in enumerate(new)])
        v = torch.stack([self.v[row, part] for row, part in enumerate(new)])
        self.cache.append(k, v)
        self.seqlens = [n + count for n in self.seqlens]

    def step(self, count: int = 1) -> Any:
        self.append(count)
        q = torch.stack([self.q[row, n - 1 : n] for row, n in enumerate(self.seqlens)])
        _, info = decode_step(q, self.cache, self.policy, self.state, rope=self.rope)
        return info.selection

    def lists(self, steps: int) -> list[Tensor]:
        return [self.step().indices.clone() for _ in range(steps)]


# ---- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_segments": 1}, "num_segments: got 1, allowed: None or an int in 2..64"),
        ({"num_segments": 65}, "num_segments: got 65, allowed: None or an int in 2..64"),
        ({"pool_factor": 0.0}, "pool_factor: got 0.0, allowed: a float > 0"),
        ({"rolling_floor": -1.0}, "rolling_floor: got -1.0, allowed: a float > 0"),
        (
            {"rolling_audit_interval": 0},
            "rolling_audit_interval: got 0, allowed: None or an int >= 1",
        ),
        ({"pool_width": 3}, "pool_width: got 3, allowed: 1 with num_segments"),
    ],
)
def test_error_messages(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        policy(**settings)


# ---- lists


@pytest.mark.parametrize("sketch", [None, "int4", "int8"])
def test_the_first_step_is_a_full_scan(sketch: str | None) -> None:
    rolling = Run(policy(sketch=sketch), [1500])
    full = Run(policy(sketch=sketch, num_segments=None), [1500])
    assert torch.equal(rolling.step().indices, full.step().indices)
    assert rolling.state.decode.num_rolled == 0
    assert rolling.state.decode.kept_mass == pytest.approx(full.state.decode.kept_mass, rel=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"scope": "layer"},
        {"positions": "compact"},
        {"normalise_over": "candidates"},
        {"score_scale": 0.3},
        {"num_segments": 7},
    ],
    ids=str,
)
def test_pools_that_hold_everything_are_a_full_scan(settings: dict[str, Any]) -> None:
    rolling = Run(policy(pool_factor=30.0, **settings), [1500])
    full = Run(policy(**(settings | {"num_segments": None})), [1500])
    for ours, theirs in zip(rolling.lists(9), full.lists(9), strict=True):
        width = min(ours.shape[-1], theirs.shape[-1])
        assert torch.equal(ours[..., :width], theirs[..., :width])
    assert rolling.state.decode.num_rolled == 0  # everything was looked at, at every step


def test_small_pools_keep_most_of_the_mass_and_scan_a_part() -> None:
    rolling, full = Run(policy(), [3000]), Run(policy(num_segments=None), [3000])
    masses = []
    for run in (rolling, full):
        run.q = run.q[:, :1] + 0.5 * run.q  # queries that have something in common
        kept = []
        for _ in range(13):
            selection = run.step()
            q = run.q[:, run.seqlens[0] - 1 : run.seqlens[0]]
            kept.append(float(recovered_mass(q, run.cache, selection).mean()))
        masses.append(sum(kept[1:]) / 12)
    ours, theirs = masses
    assert 0.75 * theirs < ours < 1.0001 * theirs
    counts = rolling.state.decode
    assert counts.num_rolled == 12 * HEADS
    assert 0 < counts.tokens_scored_from_keys <= 12 * HEADS * 3 * 96
    # the first step scans everything, later ones a quarter and what is always looked at
    per_step = (counts.tokens_scanned / HEADS - 3001) / 12
    assert 3000 / 4 < per_step < 3000 / 4 + 3 * 128 + 132
    key = HEAD_DIM * 4
    expected = (counts.tokens_scanned + counts.tokens_scored_from_keys) * key
    assert counts.bytes_read(HEAD_DIM, 4, None) == expected + counts.tokens_attended * 2 * key
    assert set(counts.to_dict()) >= {"num_rolled", "num_audited", "num_stopped", "rolling_mass"}


def test_the_mass_of_a_step_that_rolled_is_not_known() -> None:
    run = Run(policy(), [1500])
    first, second = run.step(), run.step()
    assert first.kept_mass.isfinite().all()
    assert second.kept_mass.isnan().all()
    assert run.state.decode.kept_mass == pytest.approx(float(first.kept_mass.mean()), rel=1e-5)


def test_a_batch_gives_the_lists_of_its_rows_alone() -> None:
    settings = {"rolling_audit_interval": 3, "rolling_floor": 0.9, "sketch": "int4"}
    together = Run(policy(**settings), [1500, 2100, 900])
    batched = together.lists(12)
    for row in range(3):
        alone = Run(policy(**settings), [1500, 2100, 900], rows=slice(row, row + 1))
        for ours, theirs in zip(batched, alone.lists(12), strict=True):
            width = min(ours.shape[-1], theirs.shape[-1])
            assert torch.equal(ours[row, :, :width], theirs[0, :, :width])


# ---- what voids pools


def rolled_at(run: Run, count: int = 1) -> bool:
    before = run.state.decode.num_rolled
    run.step(count)
    return run.state.decode.num_rolled > before


@pytest.mark.parametrize("change", ["crop", "two tokens", "reorder", "settings", "prefill"])
def test_what_voids_pools(change: str) -> None:
    run = Run(policy(), [1500])
    assert [rolled_at(run) for _ in range(3)] == [False, True, True]
    if change == "crop":
        run.cache.crop(13)
        run.seqlens = [1490]
    elif change == "reorder":
        run.cache.reorder(torch.tensor([0]))
    elif change == "settings":
        run.policy = policy(topk=40)
    elif change == "prefill":
        run.state.invalidate()
    assert not rolled_at(run, 2 if change == "two tokens" else 1)
    assert rolled_at(run)


def test_short_rows_of_a_batch_stay_dense() -> None:
    run = Run(policy(dense_below_tokens=1000), [900, 1500])
    for _ in range(3):
        selection = run.step()
        assert (selection.topk_length[0] == run.seqlens[0]).all()
        assert (selection.topk_length[1] < 400).all()
    assert run.state.decode.num_rolled == 2 * HEADS  # row 1, but for its first step


# ---- audits


def test_audits_stop_lists_that_lose_too_much() -> None:
    run = Run(policy(rolling_audit_interval=5, rolling_floor=10.0), [1500])
    full = Run(policy(num_segments=None), [1500])
    ours, theirs = run.lists(5), full.lists(5)  # the audit is due 4 steps after the fill
    assert run.state.decode.num_stopped == run.state.decode.num_audited == HEADS
    assert run.state.rolling_pools is not None and run.state.rolling_pools.all_stopped
    for one, other in zip(run.lists(6), full.lists(6), strict=True):
        assert torch.equal(one, other)
    assert run.state.decode.num_rolled == 4 * HEADS
    assert not torch.equal(ours[4], theirs[4])
    assert not rolled_at(run, 2) and rolled_at(run)  # pools are filled anew: another chance


def test_audits_are_due_once_per_interval_and_read_all_keys() -> None:
    audited = Run(policy(rolling_audit_interval=3, rolling_floor=0.01), [1500])
    bare = Run(policy(), [1500])
    for one, other in zip(audited.lists(12), bare.lists(12), strict=True):
        assert torch.equal(one, other)
    counts = audited.state.decode  # ages 4, 7 and 10
    assert counts.num_audited == 3 * HEADS and counts.num_stopped == 0
    read = counts.tokens_scored_from_keys - bare.state.decode.tokens_scored_from_keys
    assert read == HEADS * (1505 + 1508 + 1511)
    assert 0.5 < counts.rolling_mass < 1.5
    assert bare.state.decode.num_audited == 0 and bare.state.decode.rolling_mass is None


# ---- with the selection cache


@pytest.mark.parametrize("scope", ["kv_head", "layer"])
def test_reused_lists_do_not_roll(scope: str) -> None:
    run = Run(policy(similarity_threshold=0.9, max_age=3, scope=scope), [1500])
    q = run.q[:, :1].clone()
    run.q = q.expand(-1, run.q.shape[1], -1, -1)  # every query is the same
    lists = 1 if scope == "layer" else HEADS
    previous = run.step()
    for number in range(1, 9):
        scanned = run.state.decode.tokens_scanned
        selection = run.step()
        if number % 4:  # three hits, then a step that rolls
            assert (selection.topk_length == previous.topk_length + 1).all()
            last = int(selection.topk_length[0, 0]) - 1
            assert (selection.indices[0, :, last] == 1500 + number).all()
            assert run.state.decode.tokens_scanned == scanned
        else:
            assert run.state.decode.tokens_scanned > scanned
        previous = selection
    assert run.state.decode.num_hits == 6 * lists
    assert run.state.decode.num_rolled == 2 * lists
