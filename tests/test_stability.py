"""What old lists are worth, against policies that reuse them and against plain formulas."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from kvselect import TokenSelect
from kvselect.bench.step_replay import run
from kvselect.eval.dump import LayerDump
from kvselect.eval.stability import Budget, Reuse, replay_cache, reuse_of
from kvselect.eval.stability_chart import stability_chart
from kvselect.eval.step_streams import captured_steps
from kvselect.rope import Rope

BUDGET = Budget(keep=12, num_sink_tokens=2, num_recent_tokens=8)
SETTINGS: dict[str, Any] = {
    "topk": 12,
    "num_sink_tokens": 2,
    "num_recent_tokens": 8,
    "sketch": None,
    "overselect": 1.0,
    "dense_below_tokens": 0,
}
STEPS, CONTEXT = 14, 90


def drifting(**changes: Any) -> LayerDump:
    """2 KV heads of 2 query heads whose queries move little; softmax_scale is none's default."""
    generator = torch.Generator().manual_seed(0)
    tokens = CONTEXT + STEPS
    inv_freq = 100.0 ** -(torch.arange(16) / 16)
    rope = Rope.from_frequencies(inv_freq, 1)
    k, v = torch.randn(2, tokens, 2, 32, generator=generator)
    walk = [torch.randn(4, 32, generator=generator)]
    for _ in range(STEPS - 1):
        walk.append(0.9 * walk[-1] + 0.44 * torch.randn(4, 32, generator=generator))
    q = torch.stack(walk) * 1.5
    places = torch.arange(tokens)
    settings: dict[str, Any] = {
        "index": 0,
        "q_unrotated": q,
        "k_unrotated": k,
        "v": v,
        "softmax_scale": 0.2,
        "rope": rope,
        "q": rope.rotate_at(q, places[CONTEXT:]),
        "k": rope.rotate_at(k, places),
    }
    return LayerDump(**(settings | changes))


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_a_policy_that_reuses_lists_keeps_as_much(positions: Any, softcap: float) -> None:
    """TokenSelect with a selection cache, its mass measured from outside, hits and all."""
    layer = drifting(softcap=softcap)
    steps = captured_steps(layer, positions)
    base = TokenSelect(**SETTINGS, positions=positions)
    thresholds = (0.5, 0.8, 0.9)
    policies = {"fresh": base} | {
        str(t): dataclasses.replace(base, similarity_threshold=t, max_age=3) for t in thresholds
    }
    outcomes = run([steps], policies)
    heads = reuse_of(layer, positions, BUDGET)
    fresh = sum(float(head.kept.diagonal().mean()) for head in heads) / 2
    assert outcomes["fresh"].kept_mass == pytest.approx(fresh, rel=1e-5)
    hits = []
    for threshold in thresholds:
        found = [replay_cache(head, threshold, 3) for head in heads]
        outcome = outcomes[str(threshold)]
        assert outcome.num_hits == round(sum(one.hit_rate for one in found) * (STEPS - 1))
        kept = sum(one.kept for one in found) / 2
        assert outcome.kept_mass == pytest.approx(kept, rel=1e-5)
        assert kept < fresh or outcome.num_hits == 0
        hits.append(outcome.num_hits)
    assert hits[0] > hits[1] > hits[2] and hits[0] > 10


def test_shares_and_overlaps() -> None:
    """One pair of steps, by hand."""
    layer = drifting()
    head = reuse_of(layer, "original", BUDGET)[1]
    later, earlier = 9, 4
    k = layer.k[:, 1].double()

    def weights(step: int) -> list[float]:
        seen = k[: CONTEXT + step + 1]
        logits = 0.2 * layer.q[step, 2:].double() @ seen.T
        return [float(x) for x in logits.softmax(-1).mean(0)]

    def picks(step: int) -> set[int]:
        own = weights(step)
        candidates = range(2, CONTEXT + step + 1 - 8)
        return set(sorted(candidates, key=lambda i: -own[i])[:12])

    own = weights(later)
    old, fresh = picks(earlier), picks(later)
    left = range(CONTEXT + earlier + 1 - 8, CONTEXT + later + 1 - 8)  # the old window's beginning
    assert float(head.overlap[later, earlier]) == len(old & fresh) / 12
    held = sum(own[i] for i in old | set(left))
    assert float(head.fresh_share[later, earlier]) == pytest.approx(
        held / sum(own[i] for i in fresh)
    )
    assert float(head.fresh_mass[later, earlier]) == pytest.approx(sum(own[i] for i in fresh))
    window = own[CONTEXT + later + 1 - 8 :]
    kept = held + sum(own[:2]) + sum(window)
    assert float(head.kept[later, earlier]) == pytest.approx(kept)
    pair = torch.cosine_similarity(layer.q_unrotated[later, 2:], layer.q_unrotated[earlier, 2:])
    assert float(head.cosine[later, earlier]) == pytest.approx(float(pair.min()), rel=1e-5)
    assert head.kept[earlier, later].isnan() and head.cosine[earlier, later].isnan()
    assert float(head.overlap[later, later]) == float(head.fresh_share[later, later]) == 1.0


def test_the_rule_of_the_cache() -> None:
    """Cosine with the anchor, not with the step before; at most ``max_age`` in a row."""
    cosine = torch.tensor([[1.0, 0, 0, 0], [0.9, 1, 0, 0], [0.7, 0.9, 1, 0], [0.9, 0.9, 0.9, 1]])
    kept = torch.tensor(
        [[0.8, 0, 0, 0], [0.6, 0.7, 0, 0], [0.1, 0.2, 0.9, 0], [0.3, 0.3, 0.5, 0.6]]
    )
    head = Reuse(cosine=cosine, overlap=kept, fresh_share=kept, fresh_mass=kept, kept=kept)
    found = replay_cache(head, 0.85, 64)  # hit 1 on 0, miss 2, hit 3 on 2
    assert found.hit_rate == pytest.approx(2 / 3)
    assert found.kept == pytest.approx((0.8 + 0.6 + 0.9 + 0.5) / 4)
    assert found.kept_fresh == pytest.approx((0.8 + 0.7 + 0.9 + 0.6) / 4)
    found = replay_cache(head, 0.5, 1)  # hit 1 on 0, too old at 2, hit 3 on 2
    assert found.kept == pytest.approx((0.8 + 0.6 + 0.9 + 0.5) / 4)
    assert replay_cache(head, 0.5, 64).kept == pytest.approx((0.8 + 0.6 + 0.1 + 0.3) / 4)
    assert replay_cache(head, 0.95, 64).hit_rate == 0.0


def test_what_is_refused() -> None:
    layer = drifting()
    with pytest.raises(ValueError, match="positions: got 'rotated'"):
        reuse_of(layer, "rotated", BUDGET)
    many = Budget(keep=82, num_sink_tokens=2, num_recent_tokens=8)
    with pytest.raises(ValueError, match="keep: got 82, allowed: at most 81"):
        reuse_of(layer, "original", many)
    sinks = drifting(sink_logits=torch.zeros(4))
    for call in (
        lambda: reuse_of(sinks, "original", BUDGET),
        lambda: captured_steps(sinks, "compact"),
    ):
        with pytest.raises(ValueError, match="sink_logits: got 'a tensor', allowed: None"):
            call()
    plain = drifting(rope=None)
    with pytest.raises(ValueError, match="rope: got None, allowed: a layer with rotation"):
        captured_steps(plain, "compact")
    assert captured_steps(plain, "original").q_unrotated is None


def test_narrow_heads_are_filled_up() -> None:
    layer = drifting(v=torch.zeros(CONTEXT + STEPS, 2, 64))
    steps = captured_steps(layer, "original")
    assert steps.q.shape[-1] == steps.k.shape[-1] == 64 and steps.softmax_scale == 0.2
    assert torch.equal(steps.k[..., :32], layer.k) and not steps.k[..., 32:].any()
    assert steps.q_unrotated is not None and steps.q_unrotated.shape == steps.q.shape


def test_the_picture() -> None:
    rows: list[dict[str, Any]] = []
    for stream in ("a", "b"):
        for ages in ([1, 64], [1, 1], [2, 8]):
            for cosine in (0.5, 0.9):
                rows.append(
                    {
                        "stream": stream, "part": "pairs", "ages": ages, "cosine_mean": cosine,
                        "count": 9, "share": cosine, "share_p10": cosine - 0.2,
                    }
                )  # fmt: skip
        for name in ("full scan", "cosine cache 0.9", "rolling 4, 1x", "rolling 16, 2x"):
            rows.append(
                {
                    "stream": stream, "part": "sweep", "contender": name, "bytes_over_full": 0.5,
                    "time_over_full": 0.7, "mass_over_full": 0.9, "layer": 3,
                }
            )  # fmt: skip
    figure = stability_chart(rows)
    assert len(figure.axes) == 6 and figure.axes[1].get_title(loc="left") == "b"
    told = [text.get_text() for text in figure.axes[2].get_legend().get_texts()]
    assert told == ["full scan", "cosine cache", "rolling 4", "rolling 16"]
    ages = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert ages[:2] == ["age 1", "ages 2 to 8"]
