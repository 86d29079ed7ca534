"""Changes of TokenSelect's defaults: what they change, and what is said of their effects."""

from __future__ import annotations

import dataclasses
from typing import Any

import hf_models
import pytest
import torch

from kvselect import KVCache, TokenSelect, attach, decode_step
from kvselect.eval.ablation import (
    BASE,
    CHANGES,
    DENSE,
    Effect,
    ModuloHeads,
    mass_effects,
    text_effects,
    variants,
)
from kvselect.eval.perplexity import PerplexityCell
from kvselect.eval.results import Length
from kvselect.testing import make_qkv, rope_tables

SETTINGS: dict[str, Any] = {
    "topk": 8,
    "num_sink_tokens": 2,
    "num_recent_tokens": 6,
    "sketch": None,
    "overselect": 1.0,
    "q_block_size": 4,
    "dense_below_tokens": 0,
}


@pytest.mark.parametrize("scope", ["kv_head", "layer"])
@pytest.mark.parametrize("positions", ["original", "compact"])
def test_the_modulo_map_meets_the_published_keys(positions: Any, scope: Any) -> None:
    """Head h among the keys of KV head h % 3: the right map on heads in that order."""
    from kvselect.rope import Rope

    q, k, v = make_qkv(1, 1, 70, 12, 3, 32)
    rope = Rope(*rope_tables(128, 16)) if positions == "compact" else None
    order = sorted(range(12), key=lambda h: (h % 3, h))
    lists = {}
    settings = {**SETTINGS, "positions": positions, "scope": scope}
    for policy, asked in (
        (ModuloHeads(**settings), q),
        (TokenSelect(**settings), q[:, :, order]),
        (TokenSelect(**settings), q),
    ):
        cache = KVCache(1, 3, 32, dtype=torch.float32, sketch=None)
        cache.append(k, v)
        _, info = decode_step(asked.contiguous(), cache, policy, policy.new_state(cache), rope=rope)
        assert info.selection is not None
        lists[type(policy).__name__, asked is q] = info.selection.indices
    assert torch.equal(lists["ModuloHeads", True], lists["TokenSelect", False])
    assert not torch.equal(lists["ModuloHeads", True], lists["TokenSelect", True])


def test_every_variant_changes_what_it_says() -> None:
    base = TokenSelect(**SETTINGS)
    found = variants(base)
    assert list(found) == [BASE, DENSE, "modulo head map", *CHANGES]
    assert found[BASE] is base and type(found["modulo head map"]) is ModuloHeads
    for label, change in CHANGES.items():
        other = found[label]
        differs = {
            one.name
            for one in dataclasses.fields(base)
            if getattr(base, one.name) != getattr(other, one.name)
        }
        assert differs == set(change), label


def test_the_modulo_map_runs_in_a_model() -> None:
    model, ids = hf_models.model("llama"), hf_models.tokens(1, 60)
    logits = {}
    for kind in (TokenSelect, ModuloHeads):
        with attach(model, kind(**SETTINGS), break_even="off"), torch.no_grad():
            logits[kind] = model(ids).logits[0, -1]
    assert not torch.allclose(logits[TokenSelect], logits[ModuloHeads])


def effect(**changes: Any) -> Effect:
    settings: dict[str, Any] = {
        "variant": "x", "what": "vt", "length_tokens": 512, "measure": "score", "value": 0.5,
        "base": 0.4, "effect": 0.1, "low": 0.05, "high": 0.15, "samples": 50,
    }  # fmt: skip
    return Effect(**(settings | changes))


def test_verdicts() -> None:
    assert effect().verdict == "better"
    assert effect(low=-0.05).verdict == "" and effect(low=0.0).verdict == ""
    assert effect(low=-0.3, high=-0.1).verdict == "worse"
    assert effect(measure="perplexity").verdict == "worse"
    assert effect(measure="perplexity", low=-0.3, high=-0.1).verdict == "better"
    assert effect(samples=7).verdict == ""


def test_masses_are_paired_by_context() -> None:
    def record(policy: str, index: int, mass: list[list[float]]) -> dict[str, Any]:
        return {
            "kind": "answers", "task": "vt", "length_tokens": 64, "policy": policy,
            "index": index, "mass": mass,
        }  # fmt: skip

    records = [
        {"kind": "timing"},
        record(BASE, 0, [[0.5, 0.7], [0.8, 0.8]]),
        record("x", 1, [[0.3, 0.3], [0.3, 0.3]]),
        record(BASE, 1, [[0.4, 0.4], [0.4, 0.4]]),
        record("x", 0, [[0.6, 0.6], [0.6, 0.6]]),
    ]
    base, other = sorted(mass_effects(records), key=lambda one: one.variant)
    assert (base.effect, base.low, base.high) == (0.0, 0.0, 0.0)
    assert other.base == pytest.approx((0.7 + 0.4) / 2) and other.value == pytest.approx(0.45)
    assert other.effect == pytest.approx(-0.1) and other.samples == 2
    assert [other.low, other.high] == pytest.approx([-0.1, -0.1])  # equal in both contexts


def test_perplexities_are_paired_by_segment() -> None:
    def cell(policy: str, nll: tuple[float, ...]) -> PerplexityCell:
        length = Length(label="1x", tokens=64)
        return PerplexityCell(
            length=length, policy=policy, nll=nll, bytes_per_token=1.0, kept_mass=None
        )

    cells = [cell(BASE, (1.0, 2.0, 3.0)), cell("x", (1.1, 2.1, 3.1))]
    base, other = text_effects(cells)
    assert base.effect == 0.0 and other.base == base.value == pytest.approx(2.718281828**2)
    assert other.effect == pytest.approx(2.718281828**0.1 - 1, rel=1e-6)
    assert other.low == pytest.approx(other.effect) and other.measure == "perplexity"
