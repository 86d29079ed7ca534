"""Audits: decode steps scored exactly, beside what the policy did."""

from __future__ import annotations

from typing import Any

import hf_architectures
import hf_models
import pytest
import torch
from torch import Tensor

from kvselect import (
    Dense,
    KVCache,
    Rope,
    StreamingLLM,
    TokenSelect,
    attach,
    decode_step,
    recovered_mass,
    score_tokens,
    select_tokens,
)
from kvselect.testing import make_qkv

GREEDY: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}


def policy(**changes: Any) -> TokenSelect:
    fields: dict[str, Any] = {
        "topk": 24,
        "num_sink_tokens": 2,
        "num_recent_tokens": 128,
        "overselect": 1.0,
        "q_block_size": 16,
        "max_age": 4,
    }
    return TokenSelect(**(fields | changes))


def filled(sketch: str | None, seqlen: int = 700) -> tuple[Tensor, KVCache]:
    q, k, v = make_qkv(2, 1, seqlen, 4, 2, 32, seed=3)
    cache = KVCache(2, 2, 32, sketch=sketch)
    cache.append(k, v)
    return 3 * q, cache


@pytest.mark.parametrize("sketch", [None, "int4"])
@pytest.mark.parametrize("scope", ["kv_head", "layer"])
def test_an_audit_is_the_exact_top_k_and_the_exact_mass(scope: str, sketch: str | None) -> None:
    q, cache = filled(sketch)
    asked = policy(scope=scope, sketch=sketch)
    state = asked.new_state(cache)
    out, info = decode_step(q, cache, asked, state, audit=True)
    found = state.decode.exact_audit
    scores = score_tokens(q, cache, source="keys", scope=scope)
    window = {"num_sink_tokens": 2, "num_recent_tokens": 128}
    best = select_tokens(
        scores[:, : 1 if scope == "layer" else 2], cache.cache_seqlens, topk=24, **window
    )
    shares = []
    for row in range(2):
        for n in range(best.indices.shape[1]):
            exact = set(best.indices[row, n].tolist()) - {-1}
            exact -= {0, 1, *range(700 - 128, 700)}
            shares.append(len(exact & set(info.selection.indices[row, n].tolist())) / 24)
    assert found is not None and found["num_lists"] == len(shares)
    assert found["overlap"] == pytest.approx(sum(shares) / len(shares))
    assert found["least_overlap"] == pytest.approx(min(shares))
    mass = recovered_mass(q, cache, info.selection).mean()
    assert found["mass"] == pytest.approx(float(mass), abs=1e-5)
    if sketch is None:
        assert found["overlap"] == 1.0 and found["mass"] == pytest.approx(found["exact_mass"])
    else:
        assert found["overlap"] < 1.0 and found["mass"] < found["exact_mass"]
    again, _ = decode_step(q, cache, asked, asked.new_state(cache))
    assert torch.equal(again, out)  # an audit changes nothing


def test_compact_positions() -> None:
    q, cache = filled("int8")
    asked = policy(sketch="int8", positions="compact")
    rope = Rope.from_frequencies(torch.logspace(0, -3, 16), 512)
    state = asked.new_state(cache)
    decode_step(q, cache, asked, state, rope=rope, audit=True)
    found = state.decode.exact_audit
    assert found is not None and 0.9 < found["overlap"] <= 1.0
    assert found["mass"] == pytest.approx(found["exact_mass"], rel=0.05)


def test_a_stale_list_is_seen() -> None:
    """A list that is reused for another query holds less of what this one wants."""
    q, cache = filled(None)
    asked = policy(sketch=None, similarity_threshold=1e-9, similarity="flat")
    state = asked.new_state(cache)
    decode_step(q, cache, asked, state, audit=True)
    fresh = state.decode.exact_audit
    other = q + 6 * torch.randn(q.shape, generator=torch.Generator().manual_seed(1))
    _, k, v = make_qkv(2, 1, 1, 4, 2, 32, seed=9)
    cache.append(k, v)
    _, info = decode_step(other, cache, asked, state, audit=True)
    assert info.hit.any()
    assert fresh["least_overlap"] == 1.0 > state.decode.exact_audit["least_overlap"]


def test_layers_are_audited_every_so_many_steps() -> None:
    model = hf_models.model("llama")
    ids = hf_models.tokens(1, 60)
    with attach(model, hf_models.narrow()):
        expected = model.generate(ids, **GREEDY)
    with attach(model, hf_models.narrow(), audit_every=4, audit_layers=(0, 2)) as handle:
        assert torch.equal(model.generate(ids, **GREEDY), expected)
        handle.verify()
        report = handle.report()
    audits = [layer.decode["exact_audit"] for layer in report.layers]
    assert audits[1] is None
    assert [audit["num_lists"] for audit in (audits[0], audits[2])] == [2 * 2, 2 * 2]  # of 9 steps
    assert audits[0]["overlap"] == 1.0  # exact keys: nothing is missed
    text = " ".join(str(report).split())
    assert "layer 0: 4 lists audited: they hold 100.0% of the exact top-k (least 100.0%)" in text
    assert report.to_dict()["layers"][0]["decode"]["exact_audit"] == audits[0]


def test_sinks_take_no_part_of_what_is_kept() -> None:
    model = hf_architectures.model("GptOss")
    with attach(model, hf_models.narrow(), audit_every=1) as handle:
        model.generate(hf_models.tokens(1, 60) % 90 + 5, **GREEDY)
        audit = handle.report().layers[1].decode["exact_audit"]
        mass = handle.report().layers[1].decode["kept_mass"]
    assert audit["overlap"] == 1.0
    assert audit["mass"] == pytest.approx(audit["exact_mass"]) == pytest.approx(mass, rel=1e-3)


def test_bad_input() -> None:
    model = hf_models.model("qwen2_mixed")
    for bad, message in (
        ({"audit_every": 0}, "audit_every: got 0, allowed: None or an int >= 1"),
        ({"audit_layers": (0,)}, r"audit_layers: got \(0,\), allowed: None without audit_every"),
        (
            {"audit_every": 2, "audit_layers": (1,)},
            r"audit_layers: got \[1\], allowed: layers that",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            attach(model, hf_models.narrow(), **bad)
    for unscored in (StreamingLLM(), Dense()):
        with pytest.raises(ValueError, match="audit_every: got 2, allowed: None for a policy with"):
            attach(model, unscored, audit_every=2)
    q, cache = filled(None)
    streaming = StreamingLLM(num_recent_tokens=16, q_block_size=16, positions="original")
    message = "audit: got 'a policy StreamingLLM', allowed: a policy that scores tokens"
    with pytest.raises(ValueError, match=message):
        decode_step(q, cache, streaming, streaming.new_state(cache), audit=True)
    with attach(model, hf_models.narrow(), audit_every=2):
        message = "audit_every: got 2, allowed: None with a static cache"
        with pytest.raises(ValueError, match=message):
            model.generate(
                hf_models.tokens(1, 60),
                cache_implementation="static",
                disable_compile=True,
                **GREEDY,
            )
