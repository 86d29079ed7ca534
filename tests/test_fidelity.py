"""Fidelity measures and key estimates against plain float64 formulas."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kvselect import KVCache, score_tokens
from kvselect.bench.quest import page_bounds
from kvselect.eval.dump import LayerDump
from kvselect.eval.fidelity import (
    CANDIDATE_DISTANCE,
    Case,
    Fidelity,
    captured_case,
    compare,
    gaussian_case,
    structured_case,
)
from kvselect.eval.fidelity_chart import fidelity_chart, kind_of, points
from kvselect.eval.key_estimates import ESTIMATORS, find_estimators, high_plane
from kvselect.rope import Rope
from kvselect.testing import rel_err, structured_keys

TOPK = 64


def small(**changes: Any) -> Case:
    """256 tokens, 2 KV heads of 2 query heads, 3 queries."""
    generator = torch.Generator().manual_seed(0)
    _, k = structured_keys(256, 2, 2, 32, rotated=False)
    q = torch.randn(3, 4, 32, generator=generator)
    v = torch.randn(256, 2, 32, generator=generator)
    settings: dict[str, Any] = {"q": q, "k": k, "v": v, "softmax_scale": 0.25}
    return Case(**(settings | changes))


def logits_of(case: Case, query: int, head: int, k: Tensor) -> list[float]:
    """Of one query head, capped, in float64."""
    found = case.softmax_scale * (k[:, head // 2].double() @ case.q[query, head].double())
    if case.softcap:
        found = case.softcap * (found / case.softcap).tanh()
    return [float(x) for x in found]


def softmax(logits: list[float], sink: float | None = None) -> list[float]:
    total = math.fsum(math.exp(x) for x in logits) + (0 if sink is None else math.exp(sink))
    return [math.exp(x) / total for x in logits]


def expected(case: Case, overselect: float, scope: str, ranks_of: Any) -> Fidelity:
    """The definition, token by token. ``ranks_of(query, group)``: estimated votes."""
    keep = round(overselect * TOPK)
    mass = torch.zeros(3, 4, dtype=torch.float64)
    best_mass, errors = torch.zeros_like(mass), torch.zeros_like(mass)
    recalls, worst = [], 0.0
    sinks = case.sink_logits
    for query in range(3):
        weights = [
            softmax(logits_of(case, query, h, case.k), None if sinks is None else float(sinks[h]))
            for h in range(4)
        ]
        by_group = [
            [sum(w[i] for w in weights[2 * g : 2 * g + 2]) for i in range(256)] for g in (0, 1)
        ]
        for g in (0, 1):
            votes, ranks = by_group[g], ranks_of(query, g)
            own = sorted(range(256), key=lambda i: -votes[i])[:TOPK]
            if scope == "layer":
                votes = [a + b for a, b in zip(*by_group)]
                ranks = [a + b for a, b in zip(ranks_of(query, 0), ranks_of(query, 1))]
            exact = sorted(range(256), key=lambda i: -votes[i])[:TOPK]
            listed = sorted(range(256), key=lambda i: -ranks[i])[:keep]
            recalls.append(len(set(exact) & set(listed)) / TOPK)
            missed = max(votes[i] for i in range(256) if i not in listed)
            worst = max(worst, missed / votes[exact[-1]])
            for h in (2 * g, 2 * g + 1):
                mass[query, h] = sum(weights[h][i] for i in listed)
                best_mass[query, h] = sum(weights[h][i] for i in own)
                values = case.v[:, g].double()
                dense = sum(w * values[i] for i, w in enumerate(weights[h]))
                rest = 1 - sum(weights[h])  # what the sink takes
                part = sum(weights[h][i] * values[i] for i in listed) / (mass[query, h] + rest)
                errors[query, h] = (part - dense).norm() / dense.norm()
    means, best, error = mass.mean(0), best_mass.mean(0), errors.mean(0)
    return Fidelity(
        sketch="", scope=scope, overselect=overselect, attended_tokens=keep, bytes_share=0.0,
        mass=float(means.mean()), mass_min=float(means.min()),
        mass_ratio=float(means.mean() / best.mean()), mass_ratio_min=float((means / best).min()),
        recall=sum(recalls) / 6, heaviest_miss=worst,
        output_error=float(error.mean()), output_error_max=float(error.max()),
    )  # fmt: skip


MEASURES = (
    *("attended_tokens", "mass", "mass_min", "mass_ratio", "mass_ratio_min", "recall"),
    *("heaviest_miss", "output_error", "output_error_max"),
)


def require_same(found: Fidelity, wanted: Fidelity) -> None:
    for name in MEASURES:
        assert getattr(found, name) == pytest.approx(getattr(wanted, name), rel=2e-5), name


@pytest.mark.parametrize(
    ("scope", "changes"),
    [
        ("kv_head", {}),
        ("layer", {}),
        ("kv_head", {"softcap": 2.0}),
        ("layer", {"sink_logits": torch.tensor([1.0, 4.0, -2.0, 3.0])}),
    ],
)
def test_measures_are_their_definitions(scope: str, changes: Any) -> None:
    """Ranked by the high plane, which errs enough for every measure to differ from the exact."""
    case = small(**changes)
    seen = high_plane(case.k)

    def ranks(query: int, group: int) -> list[float]:
        heads = [softmax(logits_of(case, query, 2 * group + j, seen)) for j in (0, 1)]
        return [a + b for a, b in zip(*heads)]

    factors = [1.0, 1.5]
    for found in compare(case, TOPK, find_estimators(["high plane"]), factors, [scope]):
        wanted = expected(case, found.overselect, scope, ranks)
        require_same(found, wanted)
        assert found.recall < 1 and found.heaviest_miss > 1 if found.overselect == 1 else True


def test_exact_keys_are_the_measure() -> None:
    rows = compare(small(), TOPK, find_estimators(["none"]), [1.0, 2.0, 4.0])
    by_key = {(row.scope, row.overselect): row for row in rows}
    one = by_key["kv_head", 1.0]
    assert one.mass_ratio == one.mass_ratio_min == one.recall == 1.0 and one.heaviest_miss <= 1.0
    assert by_key["layer", 1.0].mass_ratio < 1.0 == by_key["layer", 1.0].recall
    everything = by_key["kv_head", 4.0]
    assert everything.attended_tokens == 256 and everything.mass == pytest.approx(1.0)
    assert everything.output_error < 1e-6 and everything.heaviest_miss == 0.0
    errors = [by_key["kv_head", f].output_error for f in (1.0, 2.0, 4.0)]
    assert errors == sorted(errors, reverse=True)


def test_bytes() -> None:
    """At head_dim 128: METHODS 1.4, KERNELS 4.1."""
    share = 1 / 32
    found = {name: one.bytes_per_token(128, share) for name, one in ESTIMATORS.items()}
    assert found == {
        "none": 256, "int8": 132, "int4": 68, "high plane": 36, "int4 planes": 36 + 32 / 4,
        "channels": 32, "bounds 16": 32, "mean 16": 16, "mean 64": 4,
    }  # fmt: skip
    (row,) = compare(small(), TOPK, find_estimators(["int4"]), [1.5], ["layer"])
    assert row.bytes_share == (0.5 + 4 / 128) / 4 + 96 / 256


# ---- estimates


def votes(name: str, case: Case, topk: int = TOPK) -> Tensor:
    scorer = ESTIMATORS[name].prepare(case.k, topk, case.softmax_scale, case.softcap)
    return scorer(case.q.unflatten(1, (2, 2)))  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("name", ["int4", "int8", "none"])
def test_what_the_kernels_scan(name: str) -> None:
    case = small()
    cache = KVCache(1, 2, 32, sketch=None if name == "none" else name)
    cache.append(case.k[None], case.v[None])
    for query, found in zip(case.q, votes(name, case)):
        wanted = score_tokens(query[None, None], cache, softmax_scale=case.softmax_scale)
        # A scan of codes may multiply in bfloat16, as the machine has it.
        assert rel_err(found, wanted[0]) < (1e-5 if name == "none" else 1.6e-2)


def by_units(case: Case, logit: Any, num_units: int) -> Tensor:
    """Votes [3, 2, units] of ``logit(query vector, group, unit)``, in float64."""
    found = torch.zeros(3, 2, num_units, dtype=torch.float64)
    for query, h in itertools.product(range(3), range(4)):
        q = case.q[query, h].double()
        own = [case.softmax_scale * logit(q, h // 2, unit) for unit in range(num_units)]
        found[query, h // 2] += torch.tensor(softmax(own), dtype=torch.float64)
    return found


def test_pages() -> None:
    case = small()
    k = case.k.double()

    def bound(q: Tensor, g: int, page: int) -> float:
        keys = k[16 * page : 16 * page + 16, g]
        return sum(max(float(q[d] * x) for x in keys[:, d]) for d in range(32))

    assert rel_err(votes("bounds 16", case), by_units(case, bound, 16)) < 1e-5
    table = page_bounds(case.k.transpose(0, 1))  # the peer that the decode bench times
    assert torch.equal(table[1, 3, :32], case.k[48:64, 1].amax(0))
    for name, size in (("mean 16", 16), ("mean 64", 64)):

        def mean(q: Tensor, g: int, page: int, size: int = size) -> float:
            return float(q @ k[size * page : size * page + size, g].mean(0))

        assert rel_err(votes(name, case), by_units(case, mean, 256 // size)) < 1e-5


def test_channels_of_the_largest_keys() -> None:
    case = small()
    k = case.k.double()

    def partial(q: Tensor, g: int, token: int) -> float:
        size = [float(k[:, g, d].abs().mean()) for d in range(32)]
        picked = sorted(range(32), key=lambda d: -size[d])[:4]  # an eighth
        return sum(float(q[d] * k[token, g, d]) for d in picked)

    assert rel_err(votes("channels", case), by_units(case, partial, 256)) < 1e-5


def test_the_high_plane_is_the_middle_of_four_codes() -> None:
    k = small().k.clone()
    k[:, 1, 5] = 0.7  # a range of nothing
    found = high_plane(k)
    for head, channel, block in itertools.product((0, 1), (0, 5, 31), (0, 1)):
        column = k[128 * block : 128 * block + 128, head, channel]
        low = float(column.min().half())
        step = float(((column.max() - column.min()) / 15).half())
        for token, value in enumerate(column.tolist()):
            wanted = low
            if step > 0:
                code = min(15, max(0, round((value - low) / step)))
                wanted = low + step * ((code >> 2) * 4 + 1.5)
            assert found[128 * block + token, head, channel] == pytest.approx(wanted, rel=1e-5)


def test_planes_rank_what_the_filter_lets_through() -> None:
    case = small()
    found, coarse, fine = (votes(n, case, 16) for n in ("int4 planes", "high plane", "int4"))
    passed = coarse >= coarse.topk(128).values[..., -1:]  # 8 * 16
    assert torch.equal(found > 0, passed)
    assert torch.equal(found[passed], fine[passed])


# ---- cases


def test_a_captured_case_is_what_was_visible() -> None:
    generator = torch.Generator().manual_seed(0)
    rope = Rope.from_frequencies(torch.tensor([1.0, 0.1]), 1)
    plain = {
        name: torch.randn(n, heads, 32, generator=generator)
        for name, n, heads in (("q_unrotated", 10, 4), ("k_unrotated", 300, 2))
    }
    layer = LayerDump(
        index=0, **plain, v=plain["k_unrotated"] + 1, softmax_scale=0.3, softcap=4.0, rope=rope,
        q=rope.rotate_at(plain["q_unrotated"], torch.arange(290, 300)),
        k=rope.rotate_at(plain["k_unrotated"], torch.arange(300)),
    )  # fmt: skip
    case = captured_case(layer, "original")
    assert torch.equal(case.q, layer.q) and torch.equal(case.k, layer.k[:256])
    assert (case.softmax_scale, case.softcap) == (0.3, 4.0) and torch.equal(case.v, layer.v[:256])
    case = captured_case(layer, "compact", 3)
    assert torch.equal(case.k, plain["k_unrotated"][:256])
    picked = plain["q_unrotated"][[0, 4, 9]]
    assert torch.equal(case.q, rope.rotate_at(picked, CANDIDATE_DISTANCE))
    with pytest.raises(ValueError, match="positions: got 'rotated', allowed"):
        captured_case(layer, "rotated")
    short = LayerDump(
        index=0, q=layer.q, q_unrotated=layer.q, k=layer.k[:130], k_unrotated=layer.k[:130],
        v=layer.v[:130], softmax_scale=0.3,
    )  # fmt: skip
    with pytest.raises(ValueError, match="dump: got '120 tokens', allowed: at least 128 tokens"):
        captured_case(short, "original")


@pytest.mark.parametrize("make", [structured_case, gaussian_case])
def test_drawn_cases_have_the_same_deviation(make: Any) -> None:
    case = make(2048, 2, 2, 64, seed=1)
    logits = torch.einsum("hd,thd->ht", case.q[0], case.k.repeat_interleave(2, 1)) / 8
    assert logits.std(-1).tolist() == pytest.approx([2.2] * 4, rel=0.1)
    assert not torch.equal(case.k, make(2048, 2, 2, 64, seed=2).k)


def test_what_is_refused() -> None:
    for arguments, message in (
        ((TOPK, ["mean 64"], [1.5]), r"topk \* overselect: got 96, allowed: multiples of 64"),
        ((TOPK, ["int4"], [8.0]), r"topk \* overselect: got 512, allowed: at most 256"),
        ((TOPK, ["int5"], [1.0]), "sketches: got 'int5', allowed"),
    ):
        topk, names, factors = arguments
        with pytest.raises(ValueError, match=message):
            compare(small(), topk, find_estimators(names), factors)
    with pytest.raises(ValueError, match="scopes: got 'all', allowed"):
        compare(small(), TOPK, find_estimators(["int4"]), [1.0], ["all"])
    cut = small(k=small().k[:200], v=small().v[:200])
    with pytest.raises(ValueError, match="tokens: got 200, allowed: a multiple of 128"):
        compare(cut, TOPK, find_estimators(["int4"]), [1.0])


# ---- the picture


def test_the_picture_draws_means_and_worst_heads() -> None:
    rows = [
        {
            "keys": keys, "scope": scope, "sketch": sketch, "overselect": factor,
            "bytes_share": factor / 10, "mass_ratio": 0.5 * factor + place, "mass_ratio_min": place,
        }
        for place, keys in enumerate(("Gaussian", "tiny vt, rotated", "tiny niah, rotated"))
        for scope in ("kv_head", "layer")
        for sketch in ("int4", "mean 64")
        for factor in (1.0, 2.0)
    ]  # fmt: skip
    assert kind_of("tiny vt, rotated") == "tiny model, rotated keys"
    found = points(rows, "mass_ratio")
    assert list(found) == ["Gaussian keys (drawn)", "tiny model, rotated keys"]
    assert found["tiny model, rotated keys"]["int4"] == [(1.0, 0.1, 2.0), (2.0, 0.2, 2.5)]
    worst = points(rows, "mass_ratio_min")["tiny model, rotated keys"]["mean 64"]
    assert worst == [(1.0, 0.1, 1), (2.0, 0.2, 1)]
    figure = fidelity_chart(rows)
    assert len(figure.axes) == 4
    assert [line.get_label() for line in figure.axes[0].lines][1:] == [
        "int4 (default)", "mean keys of 64 tokens",
    ]  # fmt: skip
