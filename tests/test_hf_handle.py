"""Handle.verify finds errors, Handle.report says what happened."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import hf_models
import pytest
import torch
from test_hf_attach import fingerprint, logits_of

from kvselect import (
    ActQKV,
    AdaSpa,
    Dense,
    InfLLM,
    Landmark,
    LayerSchedule,
    Quest,
    RegionQuota,
    SnapKV,
    SpAtten,
    StreamingLLM,
    TokenSelect,
    attach,
)
from kvselect.integrations.hf import VerificationError, attention
from kvselect.integrations.hf.rope_fit import Frequencies
from kvselect.integrations.hf.verify import widened_policies

# --- verify ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sketch", ["int4", "int8", None])
@pytest.mark.parametrize("positions", hf_models.POSITIONS)
@pytest.mark.parametrize("name", [*hf_models.FAMILIES, "mistral_sliding", "qwen2_mixed"])
def test_verify_passes(name: str, positions: str, sketch: str | None) -> None:
    model = hf_models.model(name)
    with attach(model, hf_models.wide(positions, sketch=sketch, topk=64)) as handle:
        result = handle.verify()
    assert set(result.logit_error) == {"dense", "lists"}
    assert result.max_error <= result.tolerance == 1e-5
    assert all(sorted(errors) == [0, 1, 2] for errors in result.layer_error.values())


@pytest.mark.parametrize(
    "policy",
    [
        Dense(),
        StreamingLLM(),
        StreamingLLM(positions="original"),
        ActQKV(topk_blocks=2, block_size=4, num_recent_tokens=8),
        AdaSpa(block_size=16, dense_prefill_tokens=0),
        InfLLM(topk_blocks=2, block_size=4, num_recent_tokens=8, q_block_size=16),
        Landmark(topk_blocks=2, block_size=4, num_recent_tokens=8, attention="residual"),
        LayerSchedule(ratio=0.1, first_layer=0, last_layer=2),
        Quest(token_budget=16, page_size=4, dense_layers=()),
        RegionQuota(topk=8, span=(4, 90), num_recent_tokens=8),
        SnapKV(ratio=0.1, num_recent_tokens=8),
        SpAtten(cascade="hard", value_fraction=0.3),
        SpAtten(value_mass=0.5, refine_below=0.1),
    ],
    ids=str,
)
def test_verify_runs_for_other_policies(policy: Any) -> None:
    with attach(hf_models.model("llama"), policy) as handle:
        assert set(handle.verify().logit_error) == {"dense"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("positions", hf_models.POSITIONS)
def test_verify_knows_half_precision(positions: str, dtype: torch.dtype) -> None:
    model = hf_models.model("qwen3").to(dtype)
    with attach(model, hf_models.wide(positions)) as handle:
        assert handle.verify().tolerance > 1e-5


def test_the_lists_of_verify_are_lists() -> None:
    """The widened policy must select, or the run would only repeat the dense one."""
    policy = hf_models.wide("compact", topk=64)
    forms = widened_policies(policy, 196)
    assert forms["dense"].is_dense("decode", 195, 196, None)
    assert not forms["lists"].is_dense("decode", 195, 196, None)
    with attach(hf_models.model("llama"), forms["lists"]) as handle:
        logits_of(handle.model, hf_models.tokens(1, 192), hf_models.tokens(1, 4, seed=1))
        layer = handle.report().layers[0]
    assert layer.decode["num_dense_calls"] == 0
    assert layer.prefill["num_calls"] > layer.prefill["num_dense_calls"]  # type: ignore[operator]
    assert layer.decode["tokens_attended"] == layer.decode["tokens_visible"]


def wrong_frequencies(handle: Any, patch: pytest.MonkeyPatch) -> None:
    layer = handle._plan.layers[1]
    layer.frequencies = Frequencies(layer.frequencies.inv_freq * 1.01, 1.0)
    layer.rope = None


def wrong_scale(handle: Any, patch: pytest.MonkeyPatch) -> None:
    right = attention.decode_step

    def step(*args: Any, softmax_scale: float, **kwargs: Any) -> Any:
        return right(*args, softmax_scale=1.01 * softmax_scale, **kwargs)

    patch.setattr(attention, "decode_step", step)


def wrong_heads(handle: Any, patch: pytest.MonkeyPatch) -> None:
    right = attention.prefill
    patch.setattr(attention, "prefill", lambda q, *rest, **kw: right(q.roll(1, 2), *rest, **kw))


def lost_token(handle: Any, patch: pytest.MonkeyPatch) -> None:
    """Every list lacks its last entry: only the run through lists can notice."""
    right = TokenSelect.select

    def select(*args: Any) -> Any:
        selection = right(*args)
        if selection is not None:
            selection.topk_length.sub_(1)
        return selection

    patch.setattr(TokenSelect, "select", select)


def not_a_number(handle: Any, patch: pytest.MonkeyPatch) -> None:
    right = attention.decode_step
    patch.setattr(
        attention, "decode_step", lambda *a, **kw: (right(*a, **kw)[0] * float("nan"), None)
    )


@pytest.mark.parametrize(
    ("plant", "where"),
    [
        (wrong_frequencies, r"first at layer 1 .*\(dense run, torch.float32, 192 \+ 4 tokens\)"),
        (wrong_scale, "first at layer 0 .*dense run"),
        (wrong_heads, "first at layer 0 .*dense run"),
        (lost_token, "first at layer 0 .*lists run"),
        (not_a_number, "first at layer 0 .*dense run"),
    ],
)
def test_verify_finds_a_planted_error(
    plant: Callable[..., None], where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with attach(hf_models.model("llama"), hf_models.wide("compact", topk=64)) as handle:
        handle.verify()
        plant(handle, monkeypatch)
        with pytest.raises(VerificationError, match=f"LlamaForCausalLM with TokenSelect.*{where}"):
            handle.verify()


def test_verify_finds_a_wrong_tolerance() -> None:
    with attach(hf_models.model("llama"), hf_models.wide()) as handle:
        assert handle.verify(tolerance=1e-3).tolerance == 1e-3
        with pytest.raises(VerificationError, match="allowed: 1e-12"):
            handle.verify(tolerance=1e-12)


def test_verify_leaves_no_trace() -> None:
    model = hf_models.model("llama")
    with attach(model, hf_models.narrow()) as handle:
        model.generate(hf_models.tokens(1, 60), max_new_tokens=4, do_sample=False)
        model.train()
        before, report = fingerprint(model), str(handle.report())
        state = torch.get_rng_state()
        handle.verify()
        with pytest.raises(VerificationError):
            handle.verify(tolerance=0.0)
        assert torch.equal(torch.get_rng_state(), state)
        assert fingerprint(model) == before
        assert str(handle.report()) == report


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt_tokens": 0}, "prompt_tokens: got 0, allowed: an int >= 1"),
        ({"decode_tokens": -1}, "decode_tokens: got -1, allowed: an int >= 0"),
        ({"prompt_tokens": 2048}, "prompt_tokens: got 2052, allowed: at most 2048 tokens"),
    ],
)
def test_verify_checks_its_arguments(settings: Any, message: str) -> None:
    handle = attach(hf_models.model("llama"), hf_models.wide())
    with pytest.raises(ValueError, match=message):
        handle.verify(**settings)


@pytest.mark.parametrize(
    "policy",
    [
        TokenSelect.paper_compat(topk=64),
        hf_models.narrow(scope="layer", pool_width=5, similarity_threshold=0.5),
        hf_models.narrow("compact", similarity_threshold=0.5, normalise_over="candidates"),
        hf_models.narrow(dense_prefill=True, dense_layers=(1,), aggregate="max_vote"),
        hf_models.narrow(average_queries="after_rope", window_anchor="block_end", q_block_size=12),
    ],
    ids=["paper", "layer", "reuse", "dense_prefill", "block_end"],
)
def test_verify_passes_with_other_settings(policy: Any) -> None:
    with attach(hf_models.model("llama"), policy) as handle:
        assert set(handle.verify().logit_error) == {"dense", "lists"}


@pytest.mark.parametrize("positions", hf_models.POSITIONS)
@pytest.mark.parametrize("length", [64, 150, 256])
def test_verify_fits_models_trained_on_little(length: int, positions: str) -> None:
    model = hf_models.build(hf_models.config("llama", max_position_embeddings=length))
    settings = {"q_block_size": 16, "tail_q_block_size": 8, "max_age": 8, "topk": 4}
    policy = hf_models.narrow(positions, **settings)
    assert policy.capacity <= length
    with attach(model, policy) as handle:
        assert set(handle.verify().logit_error) == {"dense", "lists"}


def test_stock_runs_the_model_as_it_was() -> None:
    model = hf_models.model("llama")
    ids, new = hf_models.tokens(1, 60), hf_models.tokens(1, 3, seed=1)
    expected = logits_of(model, ids, new)
    with attach(model, hf_models.narrow("compact")) as handle:
        selected = logits_of(model, ids, new)
        with handle.stock():
            assert torch.equal(logits_of(model, ids, new), expected)
        assert torch.equal(logits_of(model, ids, new), selected)


# --- report ---------------------------------------------------------------------------------------


def test_a_report_before_anything_ran() -> None:
    with attach(hf_models.model("llama"), hf_models.narrow("compact")) as handle:
        report = handle.report()
    assert report.bytes_ratio is None
    assert all(layer.cache_layer == "" for layer in report.layers)
    text = str(report)
    assert "LlamaForCausalLM: TokenSelect, prefill and decode select, compact positions" in text
    assert "trained length 2048 tokens" in text
    assert "revocable: yes (may a token come back?), query-aware: yes" in text
    assert "kernels cpu (" in text


def test_a_report_counts() -> None:
    model = hf_models.model("qwen2_mixed")
    policy = hf_models.narrow(dense_layers=(2,), similarity_threshold=1e-6)
    with attach(model, policy) as handle:
        logits_of(model, hf_models.tokens(2, 60), hf_models.tokens(2, 10, seed=1))
        report = handle.report()
    first, second, third = report.layers
    assert (first.selects, second.selects, third.selects) == (True, False, False)
    assert second.reason == "sliding window of 16 tokens"
    assert third.reason == "in policy.dense_layers"
    assert first.cache_layer == third.cache_layer == "KVSelectLayer"
    assert second.cache_layer == "DynamicSlidingWindowLayer"
    assert first.decode["num_calls"] == 10
    assert first.tokens_per_step is not None
    assert first.context_per_step == pytest.approx(65.5)  # 61 .. 70
    assert 24 <= first.tokens_per_step <= 34  # hits let the list grow by a token per step
    assert first.decode["hit_rate"] is not None
    assert 0 < first.decode["kept_mass"] <= 1  # type: ignore[operator]
    assert 0 < first.bytes_read < first.dense_bytes_read
    assert second.bytes_read == third.bytes_read == 0
    assert report.bytes_ratio == pytest.approx(first.bytes_read / first.dense_bytes_read)


def test_a_report_is_a_table_and_json() -> None:
    model = hf_models.model("mistral_sliding")
    with attach(model, StreamingLLM(num_sink_tokens=1, num_recent_tokens=8)) as handle:
        model.generate(hf_models.tokens(1, 40), max_new_tokens=4, do_sample=False)
        report = handle.report()
    lines = str(report).splitlines()
    assert "revocable: no (may a token come back?), query-aware: no" in lines[1]
    assert lines[2].split()[:2] == ["layer", "runs"]
    assert [line.split()[0] for line in lines[3:]] == ["0", "1", "2"]
    assert all("dense: sliding window of 16 tokens" in line for line in lines[3:])
    settings = json.loads(json.dumps(report.to_dict()))
    assert settings["policy"]["num_recent_tokens"] == 8
    assert settings["layers"][1]["reason"] == "sliding window of 16 tokens"
    assert settings["bytes_ratio"] is None


def test_dense_prefill_is_named() -> None:
    with attach(hf_models.model("llama"), hf_models.narrow(dense_prefill=True)) as handle:
        assert "dense prefill, decode selects" in str(handle.report())


def test_counts_span_caches() -> None:
    model = hf_models.model("llama")
    with attach(model, hf_models.narrow()) as handle:
        for _ in range(3):
            model.generate(
                hf_models.tokens(1, 40), max_new_tokens=5, do_sample=False, eos_token_id=None
            )
        assert handle.report().layers[0].decode["num_calls"] == 12
        model.generate(
            hf_models.tokens(1, 40),
            max_new_tokens=5,
            do_sample=False,
            eos_token_id=None,
            use_cache=False,
        )
        report = handle.report()
    assert report.layers[0].decode["num_calls"] == 12  # without a cache every call is a prefill
    assert report.layers[0].cache_layer == "none"


def test_numbers_that_are_not_finite_are_reported() -> None:
    model = hf_models.model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[77] = float("nan")
    ids = hf_models.tokens(1, 60)
    ids[ids == 77] = 78
    ids[0, 20] = 77
    with attach(model, hf_models.narrow()) as handle, torch.no_grad():
        model(ids)
        report = handle.report()
    assert report.layers[0].nonfinite_cached == 2  # one token, two KV heads
    assert report.layers[0].nonfinite_scored > 0
    assert "2 / " in str(report)


def test_run_time_dense_calls_warn_once() -> None:
    model = hf_models.model("llama")
    ids = hf_models.tokens(2, 20)
    mask = torch.ones_like(ids)
    mask[0, 5] = 0
    with attach(model, hf_models.narrow()) as handle, torch.no_grad():
        with pytest.warns(UserWarning, match="layer . runs dense: padding with holes") as caught:
            model(ids, attention_mask=mask)
            model(ids, attention_mask=mask)
        assert len(caught) == 3
        report = handle.report()
    assert report.layers[0].ran_dense == {"padding with holes (right or middle padding)": 2}
    assert "dense 2x: padding with holes" in str(report).replace("\n", " ")
