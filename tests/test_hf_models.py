"""Every architecture of docs/models.md: exact, reversible, and right where tokens are left out."""

from __future__ import annotations

import hf_architectures
import hf_checks
import hf_models
import pytest
import torch
from hf_architectures import REFUSED, SUPPORTED

from kvselect.integrations.hf import attach

COMPACT = [name for name, row in SUPPORTED.items() if row.compact]


@pytest.mark.parametrize("name", SUPPORTED)
def test_layers_select_or_say_why_not(name: str) -> None:
    hf_checks.layers(name)


@pytest.mark.parametrize("name", SUPPORTED)
def test_exact_at_original_positions(name: str) -> None:
    hf_checks.exact(name, "original")


@pytest.mark.parametrize("name", COMPACT)
def test_exact_at_compact_positions(name: str) -> None:
    hf_checks.exact(name, "compact")


@pytest.mark.parametrize("name", COMPACT)
def test_one_layer_on_the_kept_tokens_alone(name: str) -> None:
    hf_checks.oracle(name, "compact")


@pytest.mark.parametrize("name", SUPPORTED)
def test_one_layer_on_the_kept_tokens_at_their_places(name: str) -> None:
    hf_checks.oracle(name, "original")


@pytest.mark.parametrize("name", SUPPORTED)
def test_detach_is_bit_equal(name: str) -> None:
    hf_checks.detach(name)


@pytest.mark.parametrize("name", SUPPORTED)
def test_generate_of_a_padded_batch(name: str) -> None:
    hf_checks.batch(name, "compact" if SUPPORTED[name].compact else "original")


@pytest.mark.parametrize("name", REFUSED)
def test_refused_models_are_told_why(name: str) -> None:
    hf_checks.refused(name)


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize(
    "name", ["Gemma2", "GptOss", "DeepSeek-V3", "Gemma3n", "Qwen3-Next", "Jamba", "GPT-NeoX"]
)
def test_verify(name: str, positions: str) -> None:
    with attach(hf_architectures.model(name), hf_models.wide(positions, topk=64)) as handle:
        assert set(handle.verify().logit_error) == {"dense", "lists"}


def test_the_report_says_what_latents_cost() -> None:
    with attach(hf_architectures.model("DeepSeek-V3"), hf_models.listing("compact")) as handle:
        handle.model.generate(hf_checks.ids_for(1, 40), max_new_tokens=3, do_sample=False)
        report = handle.report()
    assert [layer.cache_layer for layer in report.layers] == ["LatentLayer"] * 2
    assert all("slower than dense" in str(layer.note) for layer in report.layers)
    assert "slower than dense" in " ".join(str(report).split())


def test_the_report_says_whose_keys_are_shared() -> None:
    with attach(hf_architectures.model("Gemma4"), hf_models.listing()) as handle:
        layers = handle.report().layers
    assert [layer.note for layer in layers] == [None, None, None, "reads the keys of layer 1"]


def test_layers_that_share_keys_agree_on_their_positions() -> None:
    """With compact positions a reader of keys that HF rotates cannot select."""
    model = hf_architectures.model("Gemma4")
    ids, new = hf_checks.ids_for(2, 60), hf_checks.ids_for(2, 3, seed=1)
    expected = hf_checks.logits_of(model, ids, new)
    for dense, selecting in ((1, []), (3, [])):
        policy = hf_models.listing("compact", dense_layers=(dense,))
        with attach(model, policy) as handle:
            assert hf_checks.error(hf_checks.logits_of(model, ids, new), expected) <= 1e-5
            layers = handle.report().layers
        assert [layer.index for layer in layers if layer.selects] == selecting
        assert layers[4 - dense].reason == f"shares its keys with layer {dense}, which runs dense"
    with attach(model, hf_models.listing("original", dense_layers=(1,))) as handle:
        assert hf_checks.error(hf_checks.logits_of(model, ids, new), expected) <= 1e-5
        assert [layer.index for layer in handle.report().layers if layer.selects] == [3]


def test_a_latent_cache_is_not_mistaken() -> None:
    """Un-rotated latents belong to the attached model; those of before belong to nobody."""
    model = hf_architectures.model("DeepSeek-V3")
    ids, new = hf_checks.ids_for(1, 30), hf_checks.ids_for(1, 1, seed=1)
    with torch.no_grad():
        foreign = model(ids).past_key_values
        with attach(model, hf_models.narrow("compact")):
            cache = model(ids).past_key_values
            with pytest.raises(ValueError, match="past_key_values: got 'a DynamicLayer'"):
                model(new, past_key_values=foreign)
        with pytest.raises(ValueError, match="cache layer: got '30 unrotated keys'"):
            model(new, past_key_values=cache)


def test_latents_with_holes_in_the_padding_run_dense() -> None:
    model = hf_architectures.model("DeepSeek-V3")
    ids = hf_checks.ids_for(2, 40)
    mask = torch.ones_like(ids)
    mask[0, 10:20] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
    expected = model.generate(ids, **settings, eos_token_id=None, pad_token_id=0)
    with attach(model, hf_models.narrow()) as handle, pytest.warns(UserWarning, match="holes"):
        got = model.generate(ids, **settings, eos_token_id=None, pad_token_id=0)
        assert handle.report().layers[0].ran_dense
    assert torch.equal(got, expected)


def test_image_positions_raise_where_they_would_be_ignored() -> None:
    model = hf_architectures.model("Qwen2.5-VL, text of")
    ids = hf_checks.ids_for(1, 40)
    places = torch.arange(40).expand(3, 1, 40).clone()
    with attach(model, hf_models.listing("compact")), torch.no_grad():
        model(input_ids=ids, position_ids=places)
        places[1, 0, 5:9] = 5
        with pytest.raises(ValueError, match="position_ids: got 'axes that differ', allowed: the"):
            model(input_ids=ids, position_ids=places)
    with torch.no_grad():
        expected = model(input_ids=ids, position_ids=places).logits
        with attach(model, hf_models.listing()):
            got = model(input_ids=ids, position_ids=places).logits
    assert hf_checks.error(got, expected) <= 1e-5
