"""SpAtten: cascade over layers, soft and hard; local values; bit planes."""

from __future__ import annotations

import itertools
from typing import Any

import hf_models
import pytest
import torch
from torch import Tensor

from kvselect import Dense, KVCache, SpAtten, attach, decode_step, prefill, reference
from kvselect.policies.cascade import HardCascade, kept_share
from kvselect.policies.listed_weights import column_sums
from kvselect.query_blocks import cut_queries
from kvselect.testing import make_qkv, rel_err

DIM, HEADS, LAYERS = 32, 2, 4
SCALE = DIM**-0.5
SMALL: dict[str, Any] = {"num_sink_tokens": 2, "num_recent_tokens": 8, "q_block_size": 16}


def stack(
    seqlens: tuple[int, ...],
    group: int = 2,
    starts: list[int] | None = None,
    seqlen_q: int = 1,
    sketch: str | None = None,
) -> tuple[list[Tensor], list[KVCache]]:
    all_q, caches = [], []
    for layer in range(LAYERS):
        q, k, v = make_qkv(
            len(seqlens), seqlen_q, max(seqlens), group * HEADS, HEADS, DIM, seed=layer
        )
        cache = KVCache(len(seqlens), HEADS, DIM, sketch=sketch)
        if starts is not None:
            cache.set_starts(starts)
        cache.append(k, v, list(seqlens))
        all_q.append(q)
        caches.append(cache)
    return all_q, caches


def shares(policy: SpAtten) -> list[float]:
    return [
        kept_share(layer, LAYERS, policy.mean_pruned, policy.first_pruned, policy.free_layers)
        for layer in range(LAYERS)
    ]


def listed(selection: Any, row: int, block: int = 0) -> list[int]:
    indices, lengths = selection.with_blocks()
    assert (lengths[row, block] == lengths[row, block, 0]).all()
    count = int(lengths[row, block, 0])
    assert (indices[row, block, :, count:] == -1).all()
    found: list[int] = indices[row, block, 0, :count].tolist()
    return found


# ---- schedule


def test_the_schedule_is_free_then_linear() -> None:
    found = [kept_share(layer, 12, 0.5, 0.1, 0.15) for layer in range(12)]
    assert found[:2] == [1.0, 1.0]
    pruned = [1.0 - share for share in found[2:]]
    assert pruned[0] == pytest.approx(0.1) and pruned[-1] == pytest.approx(0.9)
    assert sum(pruned) / len(pruned) == pytest.approx(0.5)
    steps = [b - a for a, b in itertools.pairwise(pruned)]
    assert steps == pytest.approx([steps[0]] * len(steps))
    assert kept_share(0, 1, 0.5, 0.1, 0.0) == 1.0  # nothing came before
    assert kept_share(1, 2, 0.5, 0.1, 0.0) == pytest.approx(0.5)


# ---- soft cascade


@pytest.mark.parametrize("group", [1, 4, 7, 8])
def test_decode_is_that_of_the_reference(group: int) -> None:
    policy = SpAtten(**SMALL)
    starts = [0, 13, 0]
    all_q, caches = stack((120, 100, 7), group, starts)
    states = policy.new_states(caches)
    for row, start in enumerate(starts):
        end = caches[0].lengths[row]
        visible = range(start, end)
        scores = dict.fromkeys(visible, 0.0)
        kept = list(visible)
        for layer, (q, cache, share) in enumerate(zip(all_q, caches, shares(policy))):
            info = decode_step(q, cache, policy, states[layer])[1]
            if share < 1.0:
                kept = reference.cascade_keep(scores, kept, visible, share, 2, 8)
                assert info.selection is not None and listed(info.selection, row) == kept
            else:
                assert info.selection is None
            got = reference.token_sums(q[row], cache.k[row], kept, [end - 1], SCALE)
            for token, weight in got.items():
                scores[token] += weight


@pytest.mark.parametrize("pruned", [(0.6, 0.3), (0.4, 0.7)])  # the second would let some back in
@pytest.mark.parametrize("cascade", ["soft", "hard"])
def test_what_one_layer_leaves_out_no_layer_below_attends_to(cascade: Any, pruned: Any) -> None:
    """Works when (METHODS 3.6): nesting, in prefill and steps, after crop and reorder."""
    policy = SpAtten(**SMALL, cascade=cascade, mean_pruned=pruned[0], first_pruned=pruned[1])
    all_q, caches = stack((150, 90, 60), seqlen_q=150)
    states = policy.new_states(caches)
    lists: list[list[Any]] = []
    spied = SpAtten.attend

    def attend(self: Any, queries: Any, kv: Any, selection: Any) -> Any:
        lists[-1].append((queries.num_blocks, selection))
        return spied(self, queries, kv, selection)

    def one_pass(step: int | None) -> None:
        lists.clear()
        for q, cache, state in zip(all_q, caches, states):
            lists.append([])
            if step is None:
                prefill(q, cache, policy, state)
            else:
                new = torch.randn(2, cache.batch, 1, HEADS, DIM)
                cache.append(*new)
                decode_step(q[: cache.batch, step : step + 1].contiguous(), cache, policy, state)
        for runs in zip(*lists):
            for above, below in itertools.pairwise(runs):
                if above[1] is None:
                    continue
                for row, block in itertools.product(range(caches[0].batch), range(above[0])):
                    outer = set(listed(above[1], row, block))
                    assert set(listed(below[1], row, block)) <= outer

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(SpAtten, "attend", attend)
        one_pass(None)
        for step in range(3):
            one_pass(step)
        for cache in caches:
            cache.reorder([2, 0])
            cache.crop(2)
        for step in range(3, 6):
            one_pass(step)


@pytest.mark.parametrize("chunk_size", [16, 64, 2048])
@pytest.mark.parametrize("cascade", ["soft", "hard"])
def test_prefill(cascade: Any, chunk_size: int) -> None:
    policy = SpAtten(**SMALL, cascade=cascade, chunk_size=chunk_size)
    length, starts = 90, [0, 21]
    all_q, caches = stack((length, length), 2, starts, length)
    states = policy.new_states(caches)
    outs = [prefill(q, c, policy, s)[0] for q, c, s in zip(all_q, caches, states)]
    offsets = cut_queries(length, 16)
    for row, start in enumerate(starts):
        scores: dict[Any, dict[int, float]] = {}
        kept = {b: list(range(start, e)) for b, e in itertools.pairwise(offsets)}
        total = dict.fromkeys(range(start, length), 0.0)
        seen = dict.fromkeys(range(start, length), 0)
        alive = list(range(start, length))
        for q, cache, out, share in zip(all_q, caches, outs, shares(policy)):
            if cascade == "hard" and share < 1.0:
                rank = {t: total[t] / max(seen[t], 1e-30) for t in alive}
                visible = range(start, length)
                alive = reference.cascade_keep(rank, alive, visible, share, 2, 8)
            added = dict.fromkeys(range(start, length), 0.0)
            for begin, end in itertools.pairwise(offsets):
                first = max(begin, start)
                if first >= end:
                    assert not out[row, begin:end].any()
                    continue
                visible, window = range(start, end), end - max(first - 8, start)
                if cascade == "hard" and share < 1.0:
                    inside = range(max(first - 8, start), end)
                    kept[begin] = sorted({*(t for t in alive if t < end), *inside})
                elif share < 1.0:
                    kept[begin] = reference.cascade_keep(
                        scores[begin], kept[begin], visible, share, 2, window
                    )
                positions = range(first, end)
                got = reference.token_sums(
                    q[row, first:end], cache.k[row], kept[begin], positions, SCALE
                )
                old = scores.get(begin, dict.fromkeys(kept[begin], 0.0))
                scores[begin] = {t: old[t] + w for t, w in got.items()}
                for token, weight in got.items():
                    added[token] += weight
                for t in positions:
                    for j in range(start, t + 1):
                        seen[j] += 1
                keys, values = (
                    cache.k[row, kept[begin]].double(),
                    cache.v[row, kept[begin]].double(),
                )
                logits = torch.einsum(
                    "qgjd,tgd->qgjt", q[row, first:end].double().unflatten(1, (HEADS, -1)), keys
                )
                causal = torch.arange(first, end)[:, None] >= torch.tensor(kept[begin])
                weights = (SCALE * logits).where(causal[:, None, None], -torch.inf).softmax(-1)
                expected = torch.einsum("qgjt,tgd->qgjd", weights, values).flatten(1, 2)
                assert rel_err(out[row, first:end], expected) <= 2e-6
            for token, weight in added.items():
                total[token] += weight


@pytest.mark.parametrize("group", [1, 4, 7, 8])
@pytest.mark.parametrize("seqlen", [1, 9, 10, 11, 17, 40])
@pytest.mark.parametrize("cascade", ["soft", "hard"])
def test_nothing_left_out_is_dense(group: int, seqlen: int, cascade: Any) -> None:
    policies = [SpAtten(**SMALL, cascade=cascade, mean_pruned=0.0)]
    if seqlen <= 10:  # sinks and window hold the row
        policies.append(SpAtten(**SMALL, cascade=cascade))
    for policy in policies:
        all_q, caches = stack((seqlen, max(seqlen - 3, 1)), group, seqlen_q=seqlen)
        for states in (policy.new_states(caches),):
            for q, cache, state in zip(all_q, caches, states):
                dense = reference.sparse_attention(q, cache)[0]
                assert rel_err(prefill(q, cache, policy, state)[0], dense) <= 2e-6
            for q, cache, state in zip(all_q, caches, states):
                step = decode_step(q[:, -1:].contiguous(), cache, policy, state)[0]
                dense = reference.sparse_attention(q[:, -1:], cache)[0]
                assert rel_err(step, dense) <= 2e-6


def test_a_layer_of_its_own_attends_to_everything() -> None:
    policy = SpAtten(**SMALL)
    all_q, caches = stack((120,))
    info = decode_step(all_q[0], caches[0], policy, policy.new_state(caches[0]))[1]
    assert info.selection is None


def test_rows_do_not_depend_on_each_other() -> None:
    for cascade in ("soft", "hard"):
        policy = SpAtten(**SMALL, cascade=cascade)  # type: ignore[arg-type]
        outs = []
        for rows in ([0, 1, 2], [2, 0, 1], [1]):
            all_q, caches = stack((150, 90, 120), seqlen_q=60)
            for cache in caches:
                cache.reorder(rows)
            states = policy.new_states(caches)
            for q, cache, state in zip(all_q, caches, states):
                prefill(q[rows], cache, policy, state)
            steps = [
                decode_step(q[rows, -1:].contiguous(), cache, policy, state)[0]
                for q, cache, state in zip(all_q, caches, states)
            ]
            outs.append(torch.stack(steps))
        assert rel_err(outs[1], outs[0][:, [2, 0, 1]]) <= 1e-6
        assert rel_err(outs[2], outs[0][:, [1]]) <= 1e-6


# ---- hard cascade


def test_dropped_tokens_stay_dropped_and_follow_their_rows() -> None:
    tokens = HardCascade(2, 2, 0.5, torch.device("cpu"))
    cache = KVCache(2, HEADS, DIM, sketch=None)
    cache.append(*torch.zeros(2, 2, 6, HEADS, DIM), [6, 5])
    assert tokens.begin(0, cache) and not tokens.begin(0, cache)
    sums = torch.tensor([[9.0, 1.0, 8.0, 2.0, 7.0, 3.0], [1.0, 2.0, 3.0, 4.0, 5.0, 0.0]])
    tokens.add(sums, torch.ones_like(sums), cache)
    assert tokens.begin(1, cache)
    tokens.drop(1, cache, 0.5, 1, 1)
    alive = tokens.alive(1, cache, 6)
    assert alive.tolist() == [
        [True, False, True, False, False, True],
        [True, *[False] * 3, *[True] * 2],
    ]
    assert tokens.alive(0, cache, 6).all()
    tokens.add(sums, torch.ones_like(sums), cache)
    cache.append(*torch.zeros(2, 2, 1, HEADS, DIM))
    tokens.begin(0, cache)
    assert tokens.score[0, 0] == 9.0 and tokens.seen[0, 0] == 1.0  # (9 + 9) and 2, decayed
    tokens.begin(1, cache)
    tokens.drop(1, cache, 1.0, 1, 1)
    assert torch.equal(tokens.alive(1, cache, 5), alive[:, :5])
    tokens.take_rows(torch.tensor([1, 0]))
    tokens.crop((2, 5))
    assert tokens.dropped[:, 1, :5].tolist() == [
        [False, True, *[False] * 3],
        [False, True, False, True, True],
    ]
    assert not tokens.score[0, 2:].any() and tokens.nbytes > 0


def test_an_old_step_counts_for_what_decay_says() -> None:
    kept = []
    for decay in (1.0, 0.0):
        policy = SpAtten(**SMALL, cascade="hard", decay=decay, mean_pruned=0.8, first_pruned=0.8)
        all_q, caches = stack((80,), seqlen_q=80)
        states = policy.new_states(caches)
        for q, cache, state in zip(all_q, caches, states):
            prefill(q[:, :40].contiguous(), cache, policy, state)
        info = None
        for step in range(3):
            for q, cache, state in zip(all_q, caches, states):
                cache.append(*torch.ones(2, 1, 1, HEADS, DIM))
                q = q[:, 40 + step : 41 + step].contiguous()
                info = decode_step(q, cache, policy, state)[1]
        assert info is not None and info.selection is not None
        kept.append(listed(info.selection, 0))
        assert not policy.revocable
    assert SpAtten().revocable and len(kept[0]) == len(kept[1])


def read_then_ask(cascade: Any, seed: int) -> float:
    """Share of needles that the question's last layer attends to: read first, asked after.

    Of a needle's five tokens nothing in the text speaks; the question asks for them alone.
    """
    generator = torch.Generator().manual_seed(seed)
    policy = SpAtten(cascade=cascade, num_sink_tokens=2, num_recent_tokens=16, q_block_size=32)
    common, needle = torch.randn(2, HEADS, DIM, generator=generator)
    common, needle = 5 * common / common.norm(dim=-1, keepdim=True), 6 * needle
    caches, states, where = [], [], 40 + int(torch.randint(100, (), generator=generator))
    for _ in range(LAYERS):
        k = torch.randn(1, 256, HEADS, DIM, generator=generator)
        k[:, torch.randperm(256, generator=generator)[:60]] += common
        k[:, where : where + 5] = needle / 3
        cache = KVCache(1, HEADS, DIM, sketch=None)
        cache.append(k, torch.randn(1, 256, HEADS, DIM, generator=generator))
        caches.append(cache)
    states = policy.new_states(caches)
    reading = common - needle / 3
    for cache, state in zip(caches, states):
        noise = torch.randn(1, 256, HEADS, DIM, generator=generator)
        prefill(noise + reading, cache, policy, state)
    info = None
    for cache, state in zip(caches, states):
        cache.append(*torch.randn(2, 1, 1, HEADS, DIM, generator=generator))
        info = decode_step(needle[None, None].clone(), cache, policy, state)[1]
    assert info is not None and info.selection is not None
    return len(set(listed(info.selection, 0)) & set(range(where, where + 5))) / 5


def test_read_then_ask_is_lost_by_the_hard_cascade() -> None:
    """Works when: the loss is quantified. Drawn keys (simulated), 16 texts."""
    soft = sum(read_then_ask("soft", seed) for seed in range(16)) / 16
    hard = sum(read_then_ask("hard", seed) for seed in range(16)) / 16
    assert soft >= 0.99 and hard <= 0.1, (soft, hard)


# ---- column sums


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_column_sums_add_up_to_the_queries(softcap: float) -> None:
    policy = SpAtten(**SMALL)
    all_q, caches = stack((60, 41), 4, [0, 3])
    sink_logits = torch.linspace(-1, 1, 8)
    for sinks in (None, sink_logits):
        seen: list[Tensor] = []
        with pytest.MonkeyPatch.context() as patched:

            def spy(*arguments: Any) -> Tensor:
                seen.append(column_sums(*arguments))  # noqa: B023
                return seen[-1]  # noqa: B023

            patched.setattr("kvselect.policies.spatten.column_sums", spy)
            for q, cache, state in zip(all_q, caches, policy.new_states(caches)):
                decode_step(q, cache, policy, state, softcap=softcap or None, sink_logits=sinks)
        for sums in seen:
            assert (sums >= 0).all() and not sums[1, 0, :3].any() and not sums[1, 0, 41:].any()
            if sinks is None:
                assert sums.sum(2).flatten().tolist() == pytest.approx([8.0, 8.0], rel=1e-5)
            else:
                assert (sums.sum(2) < 8.0).all()


# ---- local values and bit planes


@pytest.mark.parametrize("group", [1, 4, 7, 8])
@pytest.mark.parametrize(
    "settings",
    [{"value_fraction": 0.3}, {"value_mass": 0.9}, {"value_fraction": 0.3, "renormalise": False}],
)
def test_only_the_heaviest_values_are_read(group: int, settings: dict[str, Any]) -> None:
    policy = SpAtten(**SMALL, mean_pruned=0.0, **settings)
    all_q, caches = stack((60, 41), group, [0, 3])
    q, cache = all_q[0], caches[0]
    state: Any = policy.new_state(cache)
    expected = torch.zeros(2, 1, group * HEADS, DIM, dtype=torch.float64)
    poisoned, listed_rows, read_rows = cache.v.clone(), 0, 0
    poisoned[:] = torch.nan
    for row, start in enumerate([0, 3]):
        end = cache.lengths[row]
        for head in range(HEADS):
            own = q[row, 0, head * group : (head + 1) * group].double()
            weights = (SCALE * own @ cache.k[row, start:end, head].double().T).softmax(1)
            places = reference.heaviest(
                weights.sum(0), settings.get("value_fraction", 1.0), settings.get("value_mass")
            )
            tokens = [start + place for place in places]
            poisoned[row, tokens, head] = cache.v[row, tokens, head]
            picked = weights[:, places]
            if settings.get("renormalise", True):
                picked = picked / picked.sum(1, keepdim=True)
            out = picked @ cache.v[row, tokens, head].double()
            expected[row, 0, head * group : (head + 1) * group] = out
            listed_rows, read_rows = listed_rows + end - start, read_rows + len(places)
    cache.v[:] = poisoned  # what is not read may hold anything
    out, info = decode_step(q, cache, policy, state)
    assert rel_err(out, expected) <= 2e-6
    assert state.counts.value_share == pytest.approx(read_rows / listed_rows)
    assert info.selection is not None and listed(info.selection, 1) == list(range(3, 41))


def test_all_values_are_what_attention_reads() -> None:
    policy = SpAtten(**SMALL, value_mass=0.999999, mean_pruned=0.3)
    plain = SpAtten(**SMALL, mean_pruned=0.3)
    all_q, caches = stack((90, 70))
    states, others = policy.new_states(caches), plain.new_states(caches)
    for q, cache, state, other in zip(all_q, caches, states, others):
        out, info = decode_step(q, cache, policy, state)
        expected, plain_info = decode_step(q, cache, plain, other)
        assert rel_err(out, expected) <= 1e-4 and rel_err(info.lse, plain_info.lse) <= 1e-5
    assert policy.tail_q_block_size == 1 and plain.tail_q_block_size == 16


def test_values_saved_at_a_small_output_error() -> None:
    """Works when: V bytes saved at an output error below 5 %. Drawn keys (simulated)."""
    q, k, v = make_qkv(4, 1, 1000, 8, HEADS, DIM, seed=3)
    cache = KVCache(4, HEADS, DIM, sketch=None)
    cache.append(k, v)
    dense = reference.sparse_attention(2 * q, cache)[0]
    errors, read = [], []
    for mass in (0.5, 0.9, 0.99, 0.999):
        policy = SpAtten(**SMALL, mean_pruned=0.0, value_mass=mass)
        state: Any = policy.new_state(cache)
        out = decode_step(2 * q, cache, policy, state)[0]
        errors.append(rel_err(out, dense))
        read.append(state.counts.value_share)
    assert errors == sorted(errors, reverse=True) and read == sorted(read)
    saved = max(1 - part for part, error in zip(read, errors) if error < 0.05)
    assert saved > 0.5, (errors, read)


def test_flat_lists_fetch_their_low_bits_and_peaked_ones_do_not() -> None:
    """Works when: the refine rate against tau, and high-bit top-k against exact (simulated)."""
    q, k, v = make_qkv(1, 1, 512, 4, HEADS, DIM, seed=8)
    cache = KVCache(1, HEADS, DIM, sketch="int4")
    cache.append(k, v)
    q[:, :, 2:] *= 5.0  # the second KV head's queries are peaked
    rates = []
    for tau in (1e-4, 0.1, 0.3, 0.9999):
        policy = SpAtten(**SMALL, mean_pruned=0.0, refine_below=tau)
        state: Any = policy.new_state(cache)
        out = decode_step(q, cache, policy, state)[0]
        rates.append(state.counts.refine_rate)
        exact = reference.sparse_attention(q, cache)[0]
        if rates[-1] == 1.0:
            assert rel_err(out, exact) <= 2e-6
        elif rates[-1] == 0.0:
            assert 1e-3 < rel_err(out, exact) < 0.3
        else:
            assert rel_err(out[:, :, :2], exact[:, :, :2]) <= 2e-6  # the flat one is exact
            assert rel_err(out[:, :, 2:], exact[:, :, 2:]) > 1e-5
    assert rates == sorted(rates) and rates[0] == 0.0 and 0.5 in rates and rates[-1] == 1.0

    coarse = SpAtten(**SMALL, mean_pruned=0.0, refine_below=1e-6, value_fraction=0.1)
    fine = SpAtten(**SMALL, mean_pruned=0.0, value_fraction=0.1)
    picked = []
    for policy in (coarse, fine):
        found: Any = decode_step(q, cache, policy, policy.new_state(cache))[1].selection
        picked.append([set(v[c].tolist()) for v, c in zip(found.values[0], found.chosen[0])])
    for high, exact_ones in zip(*picked):
        assert len(high & exact_ones) / len(exact_ones) > 0.9


def test_refining_needs_the_sketch() -> None:
    policy = SpAtten(**SMALL, refine_below=0.1)
    assert policy.required_sketch == "int4" and SpAtten().required_sketch is None
    all_q, caches = stack((60,))
    with pytest.raises(ValueError, match="sketch: got None, allowed: 'int4'"):
        decode_step(all_q[0], caches[0], policy, policy.new_state(caches[0]))


# ---- attached models


@pytest.mark.parametrize("cascade", ["soft", "hard"])
def test_through_attach(cascade: Any) -> None:
    model = hf_models.model("llama")
    options: Any = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    prompts = hf_models.tokens(3, 100)
    outs = []
    for policy in (Dense(), SpAtten(**SMALL, cascade=cascade, mean_pruned=0.0)):
        with attach(model, policy):
            outs.append(model.generate(prompts, **options))
    assert torch.equal(*outs)
    policy = SpAtten(**SMALL, cascade=cascade, value_fraction=0.5)
    with attach(model, policy) as handle:
        out = model.generate(prompts, **options)
        report = handle.report()
        assert torch.equal(model.generate(prompts.flip(0), **options), out.flip(0))
        beams = model.generate(prompts[:1], num_beams=3, **options)
    assert beams.shape == (1, 110)
    visible = [layer.decode["tokens_visible"] for layer in report.layers]
    attended = [layer.decode["tokens_attended"] for layer in report.layers]
    assert attended[0] == visible[0] and attended[-1] < 0.8 * visible[-1]
    assert report.revocable == (cascade == "soft")


@pytest.mark.parametrize(
    "settings, error, message",
    [
        ({"cascade": "none"}, ValueError, "cascade: got 'none', allowed: 'soft' or 'hard'"),
        ({"mean_pruned": 1.0}, ValueError, r"mean_pruned: got 1.0, allowed: a float in \[0, 1\)"),
        ({"first_pruned": -0.1}, ValueError, "first_pruned: got -0.1"),
        ({"first_pruned": 0.0}, ValueError, "first_pruned: got 0.0, allowed: between 2 . mean_pru"),
        ({"free_layers": 1.0}, ValueError, "free_layers: got 1.0"),
        ({"decay": 1.5, "cascade": "hard"}, ValueError, r"decay: got 1.5, allowed: a float in \[0"),
        ({"decay": 0.5}, ValueError, "decay: got 0.5, allowed: 1 with cascade='soft'"),
        ({"num_sink_tokens": -1}, ValueError, "num_sink_tokens: got -1"),
        ({"num_recent_tokens": 0}, ValueError, "num_recent_tokens: got 0"),
        ({"chunk_size": 0}, ValueError, "chunk_size: got 0"),
        ({"q_block_size": "16"}, TypeError, "q_block_size: got str '16'"),
        ({"value_fraction": 0.0}, ValueError, r"value_fraction: got 0.0, allowed: a float in \(0"),
        ({"value_mass": 1.0}, ValueError, r"value_mass: got 1.0, allowed: None or a float in \(0"),
        ({"refine_below": 0.0}, ValueError, "refine_below: got 0.0, allowed: None or a float"),
        (
            {"value_mass": 0.9, "value_fraction": 0.5},
            ValueError,
            "value_fraction: got 0.5, allowed: 1 with value_mass",
        ),
        ({"renormalise": 1}, TypeError, "renormalise: got int 1"),
        ({"dense_layers": (True,)}, TypeError, "dense_layers: got bool True"),
    ],
)
def test_every_bound_is_checked(
    settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        SpAtten(**settings)
