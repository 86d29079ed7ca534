"""attach: exact where nothing is left out, reversible to the bit, clear about other caches."""

from __future__ import annotations

from typing import Any

import hf_models
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from kvselect.integrations.hf import KVSelectLayer, attach, plan
from kvselect.integrations.hf.masks import read_mask
from kvselect.policies.dense import Dense
from kvselect.policies.streaming_llm import StreamingLLM

EXACT = 1e-5  # of the largest logit, float32: the model's own sdpa and eager differ by as much


def logits_of(model: Any, ids: Tensor, new: Tensor, **kwargs: Any) -> Tensor:
    """Logits of a prompt and of teacher-forced decode steps."""
    mask = kwargs.pop("attention_mask", None)
    with torch.no_grad():
        result = model(ids, attention_mask=mask, **kwargs)
        logits = [result.logits]
        for token in new.split(1, dim=1):
            if mask is not None:
                mask = torch.cat((mask, mask.new_ones(mask.shape[0], 1)), dim=1)
            result = model(token, past_key_values=result.past_key_values, attention_mask=mask)
            logits.append(result.logits)
    return torch.cat(logits, dim=1)


def error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


def fingerprint(model: Any) -> Any:
    """Everything that attach may touch."""
    hooks = [
        (len(m._forward_pre_hooks), len(m._forward_hooks), len(m._forward_pre_hooks_with_kwargs))
        for m in model.modules()
    ]
    keys = [sorted(module.__dict__) for module in model.modules()]
    return hooks, keys, model.config._attn_implementation, model.config.to_dict(), model.training


# --- exact ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", hf_models.POSITIONS)
@pytest.mark.parametrize("form", ["wide", "listing"])
@pytest.mark.parametrize("name", [*hf_models.FAMILIES, *hf_models.SLIDING, "llama_yarn"])
def test_with_a_budget_of_the_length_logits_are_the_stock_ones(
    name: str, form: str, positions: str
) -> None:
    model = hf_models.model(name)
    ids, new = hf_models.tokens(2, 150), hf_models.tokens(2, 4, seed=1)
    expected = logits_of(model, ids, new)
    with attach(model, getattr(hf_models, form)(positions)) as handle:
        assert error(logits_of(model, ids, new), expected) <= EXACT
        report = handle.report()
    for layer in report.layers:
        slides = name in hf_models.SLIDING and (name != "qwen2_mixed" or layer.index == 1)
        assert layer.selects != slides
        assert not layer.ran_dense
        if layer.selects and form == "listing":
            assert (layer.decode["num_dense_calls"], layer.decode["num_calls"]) == (0, 4)
            assert layer.prefill["num_dense_calls"] != layer.prefill["num_calls"]


@pytest.mark.parametrize(
    "policy",
    [
        Dense(),
        StreamingLLM(num_recent_tokens=200, positions="original"),
        StreamingLLM(num_recent_tokens=200, positions="compact"),
    ],
    ids=["dense", "streaming-original", "streaming-compact"],
)
def test_other_policies_run(policy: Any) -> None:
    model = hf_models.model("llama")
    ids, new = hf_models.tokens(1, 150), hf_models.tokens(1, 4, seed=1)
    expected = logits_of(model, ids, new)
    with attach(model, policy) as handle:
        assert error(logits_of(model, ids, new), expected) <= EXACT
        assert handle.report().to_dict()["policy"] == policy.to_dict()


@pytest.mark.parametrize("positions", hf_models.POSITIONS)
@pytest.mark.parametrize("form", ["wide", "listing"])
def test_left_padded_rows_have_their_own_logits(form: str, positions: str) -> None:
    """Without position_ids the stock model counts padding, which changes nothing but rounding."""
    model = hf_models.model("llama")
    ids, mask = hf_models.left_padded((90, 61, 7), 90)
    new = hf_models.tokens(3, 4, seed=1)
    expected = logits_of(model, ids, new, attention_mask=mask)
    with attach(model, getattr(hf_models, form)(positions)):
        got = logits_of(model, ids, new, attention_mask=mask)
    real = torch.cat((mask, mask.new_ones(3, 4)), dim=1).bool()
    assert error(got[real], expected[real]) <= EXACT
    assert got.isfinite().all()


@pytest.mark.parametrize("positions", hf_models.POSITIONS)
@pytest.mark.filterwarnings("ignore:kvselect. layer . runs dense. padding with holes")
def test_holes_in_the_padding_run_dense(positions: str) -> None:
    """Right and middle padding; index positions count the valid keys before a token."""
    model = hf_models.model("llama")
    ids, new = hf_models.tokens(3, 40), hf_models.tokens(3, 4, seed=1)
    mask = torch.ones_like(ids)
    mask[0, 30:] = 0
    mask[1, 10:20] = 0
    mask[2, :5] = 0
    real = torch.cat((mask, mask.new_ones(3, 4)), dim=1)
    places = real.cumsum(-1) - real

    def run() -> Tensor:
        with torch.no_grad():
            result = model(ids, attention_mask=mask, position_ids=places[:, :40])
            logits = [result.logits]
            for step, token in enumerate(new.split(1, dim=1), start=40):
                result = model(
                    token,
                    past_key_values=result.past_key_values,
                    attention_mask=real[:, : step + 1],
                    position_ids=places[:, step : step + 1],
                )
                logits.append(result.logits)
        return torch.cat(logits, dim=1)

    expected = run()
    with attach(model, hf_models.narrow(positions)) as handle:
        got = run()
        counts = handle.report().layers[0].ran_dense
    assert error(got[real.bool()], expected[real.bool()]) <= EXACT
    assert counts == {"padding with holes (right or middle padding)": 5}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("positions", hf_models.POSITIONS)
def test_half_precision_stays_close(positions: str, dtype: torch.dtype) -> None:
    """The bound and its reasons are those of verify.TOLERANCE."""
    model = hf_models.model("qwen3").to(dtype)
    ids, new = hf_models.tokens(1, 150), hf_models.tokens(1, 4, seed=1)
    expected = logits_of(model, ids, new)
    with attach(model, hf_models.listing(positions)):
        got = logits_of(model, ids, new)
    assert error(got.float(), expected.float()) <= (2e-2 if dtype == torch.float16 else 1e-1)


def test_dense_layers_keep_the_models_rotation() -> None:
    model = hf_models.model("llama")
    ids, new = hf_models.tokens(1, 60), hf_models.tokens(1, 4, seed=1)
    expected = logits_of(model, ids, new)
    with attach(model, hf_models.narrow("compact", dense_layers=(0, 1, 2))) as handle:
        assert error(logits_of(model, ids, new), expected) <= EXACT
        report = handle.report()
    assert [layer.reason for layer in report.layers] == ["in policy.dense_layers"] * 3
    with attach(model, hf_models.listing("compact", dense_layers=(1,))) as handle:
        assert error(logits_of(model, ids, new), expected) <= EXACT
        assert [layer.selects for layer in handle.report().layers] == [True, False, True]


@pytest.mark.parametrize("positions", hf_models.POSITIONS)
def test_a_users_mask_runs_dense_or_raises(positions: str) -> None:
    model = hf_models.model("llama")
    ids = hf_models.tokens(1, 30)
    allowed = torch.ones(30, 30, dtype=torch.bool).tril()
    allowed[:, 3:9] &= torch.eye(30, dtype=torch.bool)[:, 3:9]
    mask = torch.zeros(30, 30).masked_fill(~allowed, torch.finfo(torch.float32).min)[None, None]
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        plain = model(ids).logits
    assert error(expected, plain) > 1e-2
    with attach(model, hf_models.narrow(positions)) as handle:
        cache = DynamicCache(config=model.config)
        if positions == "compact":
            message = "attention_mask: got 'a 4-D mask', allowed: a 2-D padding mask or None"
            with torch.no_grad(), pytest.raises(ValueError, match=message):
                model(ids, attention_mask=mask, past_key_values=cache)
            assert cache.get_seq_length() == 0
            return
        with torch.no_grad(), pytest.warns(UserWarning, match="dense: a 4-D attention mask"):
            assert error(model(ids, attention_mask=mask).logits, expected) <= EXACT
        assert handle.report().layers[2].ran_dense == {"a 4-D attention mask": 1}


def test_a_cache_may_come_by_position() -> None:
    model = hf_models.model("llama")
    ids = hf_models.tokens(1, 40)
    with attach(model, hf_models.listing("compact")), torch.no_grad():
        expected = model.model(ids).last_hidden_state
        cache = DynamicCache(config=model.config)
        assert torch.equal(model.model(ids, None, None, cache).last_hidden_state, expected)
        assert isinstance(cache.layers[0], KVSelectLayer)
        made = model.model(ids, None, None, None).past_key_values
        assert isinstance(made.layers[0], KVSelectLayer)


def test_masks_are_read_once_per_kind_and_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    model = hf_models.model("qwen2_mixed")
    ids, mask = hf_models.left_padded((40, 20), 40)
    reads = []
    monkeypatch.setattr(plan, "read_mask", lambda mask: reads.append(mask) or read_mask(mask))
    with attach(model, hf_models.narrow()), torch.no_grad():
        cache = model(ids, attention_mask=mask).past_key_values
        assert len(reads) == 2
        starts = cache.layers[2].cache.starts
        for _ in range(3):
            mask = torch.cat((mask, mask.new_ones(2, 1)), dim=1)
            model(ids[:, :1], attention_mask=mask, past_key_values=cache)
        assert len(reads) == 8
        assert cache.layers[2].cache.starts is starts  # the very tensor: the cache read it once


def test_a_missing_mask_is_not_taken_for_a_forgotten_one() -> None:
    model = hf_models.model("llama")
    with attach(model, hf_models.narrow()) as handle, torch.no_grad():
        model(hf_models.tokens(1, 5))
        with pytest.raises(TypeError, match="attention_mask: got NoneType, allowed: "):
            handle._plan.mask(None)


# --- reversible -----------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", [*hf_models.FAMILIES, *hf_models.SLIDING])
def test_detach_is_bit_equal(name: str, implementation: str) -> None:
    model = hf_models.model(name)
    model.set_attn_implementation(implementation)
    before = fingerprint(model)
    ids, new = hf_models.tokens(2, 40), hf_models.tokens(2, 3, seed=1)
    expected = logits_of(model, ids, new)
    handle = attach(model, hf_models.narrow("compact"))
    assert fingerprint(model) != before
    changed = logits_of(model, ids, new)
    assert torch.equal(changed, expected) == (
        name == "mistral_sliding" and implementation == "sdpa"
    )
    assert handle.attached
    handle.detach()
    handle.detach()
    assert not handle.attached
    assert fingerprint(model) == before
    assert torch.equal(logits_of(model, ids, new), expected)


def test_the_context_manager_detaches_on_errors() -> None:
    model = hf_models.model("llama")
    before = fingerprint(model)
    with pytest.raises(ZeroDivisionError), attach(model, hf_models.wide()):
        raise ZeroDivisionError
    assert fingerprint(model) == before


def test_attach_leaves_the_random_state_and_the_mode_alone() -> None:
    model = hf_models.model("llama")
    model.train()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    attach(model, hf_models.wide("compact"))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())


def test_a_cache_outlives_the_attachment() -> None:
    """Rotated keys are anybody's; un-rotated ones belong to the attached model."""
    ids, new = hf_models.tokens(1, 30), hf_models.tokens(1, 2, seed=1)
    model = hf_models.model("llama")
    expected = logits_of(model, ids, new)[:, 30:]
    for positions in hf_models.POSITIONS:
        with torch.no_grad():
            with attach(model, hf_models.wide(positions)):
                cache = model(ids).past_key_values
            if positions == "original":
                got = [model(token, past_key_values=cache).logits for token in new.split(1, dim=1)]
                assert error(torch.cat(got, dim=1), expected) <= EXACT
            else:
                with pytest.raises(ValueError, match="cache layer: got '30 unrotated keys'"):
                    model(new[:, :1], past_key_values=cache)
                assert cache.get_seq_length() == 30


def test_attaching_anew_goes_on_with_the_cache() -> None:
    """Another policy: its state is new, its sketch is built from the stored keys."""
    ids, new = hf_models.tokens(1, 300), hf_models.tokens(1, 2, seed=1)
    model = hf_models.model("llama")
    expected = logits_of(model, ids, new)[:, 300:]
    with attach(model, hf_models.listing()), torch.no_grad():
        cache = model(ids).past_key_values
    settings = {"sketch": "int4", "num_recent_tokens": 128}
    with attach(model, hf_models.listing(**settings)) as handle, torch.no_grad():
        got = [model(token, past_key_values=cache).logits for token in new.split(1, dim=1)]
        assert handle.report().layers[0].decode["num_dense_calls"] == 0
    assert error(torch.cat(got, dim=1), expected) <= EXACT
    message = "got '302 rotated keys', allowed: unrotated keys"
    compact = hf_models.listing("compact")
    with attach(model, compact), torch.no_grad(), pytest.raises(ValueError, match=message):
        model(new[:, :1], past_key_values=cache)


@pytest.mark.filterwarnings("ignore:kvselect. layer . runs dense. a cache layer DynamicLayer")
def test_a_cache_filled_before_attach_runs_dense_or_raises() -> None:
    ids, new = hf_models.tokens(1, 60), hf_models.tokens(1, 2, seed=1)
    model = hf_models.model("llama")
    expected = logits_of(model, ids, new)[:, 60:]
    for positions in hf_models.POSITIONS:
        with torch.no_grad():
            cache = model(ids).past_key_values
            with attach(model, hf_models.narrow(positions)) as handle:
                if positions == "compact":
                    with pytest.raises(ValueError, match="past_key_values: got 'a DynamicLayer'"):
                        model(new[:, :1], past_key_values=cache)
                    assert cache.get_seq_length() == 60
                    continue
                got = [model(token, past_key_values=cache).logits for token in new.split(1, dim=1)]
                report = handle.report()
        assert error(torch.cat(got, dim=1), expected) <= EXACT
        assert report.layers[1].ran_dense == {"a cache layer DynamicLayer filled before attach": 2}


@pytest.mark.filterwarnings("ignore:kvselect. layer . runs dense. a cache layer Static")
def test_static_caches_filled_before_run_dense_by_their_true_length() -> None:
    """Attached later, the model meets layers that are not ours."""
    model = hf_models.model("llama")
    ids, mask = hf_models.left_padded((40, 13), 40)
    settings: dict[str, Any] = {
        "max_new_tokens": 6,
        "do_sample": False,
        "eos_token_id": None,
        "attention_mask": mask,
        "cache_implementation": "static",
        "disable_compile": True,
    }
    expected = model.generate(ids, **settings)
    del settings["cache_implementation"]

    def filled() -> Any:
        cache = StaticCache(config=model.config, max_cache_len=46)
        with torch.no_grad():
            model(ids[:, :16], attention_mask=mask[:, :16], past_key_values=cache)
        return cache

    cache = filled()
    with attach(model, hf_models.narrow()) as handle:
        got = model.generate(ids, past_key_values=cache, **settings)
        assert torch.equal(got, expected)
        assert handle.report().layers[0].ran_dense == {"a cache layer StaticLayer": 6}
    message = "past_key_values: got 'a StaticLayer', allowed: "
    cache = filled()
    with attach(model, hf_models.narrow("compact")), pytest.raises(ValueError, match=message):
        model.generate(ids, past_key_values=cache, **settings)
