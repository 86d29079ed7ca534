"""What attach refuses, in which words, and that it leaves the model as it was."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from functools import partial
from types import SimpleNamespace
from typing import Any

import hf_models
import pytest
import torch
import transformers
from test_hf_attach import fingerprint
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

from kvselect.checks import UnsupportedModelError
from kvselect.integrations.hf import CopiedModelError, KVSelectLayer, attach
from kvselect.integrations.hf.stack import trained_length
from kvselect.policies.token_select import TokenSelect

SMALL: dict[str, Any] = {"vocab_size": 128, "bos_token_id": 1, "eos_token_id": 2}


def gpt2() -> Any:
    return transformers.GPT2Config(**SMALL, n_embd=64, n_layer=2, n_head=2)


def falcon() -> Any:
    return transformers.FalconConfig(
        **SMALL,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        new_decoder_architecture=True,
        num_kv_heads=2,
    )


def opt() -> Any:
    return transformers.OPTConfig(
        **SMALL,
        hidden_size=64,
        ffn_dim=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        word_embed_proj_dim=64,
    )


def check_untouched(
    model: Any, policy: Any, error: type[Exception], message: str, **kw: Any
) -> None:
    """attach raises, and hooks, configuration and logits are what they were."""
    ids = hf_models.tokens(1, 20)
    with torch.no_grad():
        expected = model(ids).logits
    before = fingerprint(model)
    with pytest.raises(error, match=message):
        attach(model, policy, **kw)
    assert fingerprint(model) == before
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (gpt2(), "GPT2LMHeadModel: got no decoder stack, allowed: a module with `layers`"),
        (falcon(), "FalconForCausalLM: got no decoder stack, allowed: "),
        (opt(), "layer 1: position_embeddings are not passed by keyword as a pair"),
        (
            hf_models.config("llama4", num_hidden_layers=4),
            r"layer 0: its attention pattern is neither causal nor sliding \(chunked",
        ),
        (hf_models.config("llama", head_dim=528), "layer 0: head_dim 528 is more than 512"),
    ],
    ids=["gpt2", "falcon", "opt", "llama4", "head_dim"],
)
def test_models_that_cannot_select(settings: Any, message: str) -> None:
    with torch.random.fork_rng():
        model = AutoModelForCausalLM.from_config(settings)
    check_untouched(model.eval(), hf_models.wide(), UnsupportedModelError, message)


def test_strict_lists_every_offending_layer() -> None:
    model = hf_models.build(hf_models.config("llama4", num_hidden_layers=4))
    with pytest.raises(UnsupportedModelError) as error:
        attach(model, hf_models.wide())
    text = str(error.value)
    assert re.findall(r"layer (\d+):", text) == ["0", "1", "2"]  # the last one knows no positions
    assert "strict=False runs these layers dense." in text


def test_without_strict_offending_layers_run_dense() -> None:
    model = hf_models.build(opt())
    ids = hf_models.tokens(2, 40)
    generate: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    expected = model.generate(ids, **generate)
    with attach(model, hf_models.narrow(), strict=False) as handle:
        assert torch.equal(model.generate(ids, **generate), expected)
        report = handle.report()
    assert not any(layer.selects for layer in report.layers)
    assert all(layer.reason for layer in report.layers)
    assert "dense: " in str(report)
    with attach(model, hf_models.listing(dense_prefill=True), strict=False) as handle:
        assert torch.equal(model.generate(ids, **generate), expected)
        report = handle.report()
    assert all(layer.selects for layer in report.layers)  # no rotation is undone


def test_some_layers_may_select_without_strict() -> None:
    model = hf_models.build(hf_models.config("llama4", num_hidden_layers=4))
    ids = hf_models.tokens(2, 40)
    generate: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    expected = model.generate(ids, **generate)
    with attach(model, hf_models.listing(), strict=False) as handle:
        assert torch.equal(model.generate(ids, **generate), expected)
        report = handle.report()
    assert [layer.selects for layer in report.layers] == [False, False, False, True]
    assert report.layers[3].decode["num_dense_calls"] == 0 < report.layers[3].decode["num_calls"]


def test_a_policy_that_undoes_no_rotation_is_suggested() -> None:
    with pytest.raises(UnsupportedModelError, match="average_queries='after_rope', and") as error:
        attach(hf_models.build(opt()), hf_models.wide())
    assert "strict=False" in str(error.value)


def test_a_bias_of_the_logits_is_refused_without_strict(monkeypatch: pytest.MonkeyPatch) -> None:
    model = hf_models.model("llama")
    inner = model.model.layers[1].self_attn
    biased = partial(inner.forward, position_bias=torch.zeros(1, 4, 1, 1))
    monkeypatch.setattr(inner, "forward", biased)
    message = "LlamaForCausalLM: got ValueError in a forward pass .*position_bias: got 'a tensor'"
    check_untouched(model, hf_models.wide(), UnsupportedModelError, message, strict=False)


def test_a_stack_that_is_not_a_language_model() -> None:
    """The bare decoder is fine; an encoder-decoder is not."""
    model = AutoModel.from_config(hf_models.config("llama")).eval()
    with attach(model, hf_models.wide()), torch.no_grad():
        model(hf_models.tokens(1, 5))
    sizes: dict[str, Any] = {"d_model": 64, "encoder_layers": 1, "decoder_layers": 1}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    bart = AutoModel.from_config(transformers.BartConfig(vocab_size=128, **sizes, **heads))
    with pytest.raises(UnsupportedModelError, match="BartModel: got an encoder-decoder model"):
        attach(bart, hf_models.wide())


def test_a_configuration_without_a_trained_length() -> None:
    message = "SimpleNamespace.max_position_embeddings: got None, allowed: an int"
    with pytest.raises(UnsupportedModelError, match=message):
        trained_length(SimpleNamespace())


def test_hub_kernels() -> None:
    model = hf_models.model("llama")
    model._use_kernels = True
    message = "LlamaForCausalLM.use_kernels: got True, allowed: False"
    with pytest.raises(UnsupportedModelError, match=message):
        attach(model, hf_models.wide())


def test_attention_outside_the_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaPreTrainedModel

    model = hf_models.model("llama")
    monkeypatch.setattr(LlamaPreTrainedModel, "_can_set_attn_implementation", lambda *a: False)
    message = "LlamaForCausalLM: got attention outside transformers' attention interface, allowed: "
    check_untouched(model, hf_models.wide(), UnsupportedModelError, message)


def test_attention_that_does_not_call_us(monkeypatch: pytest.MonkeyPatch) -> None:
    model = hf_models.model("llama")
    inner = model.model.layers[1].self_attn
    monkeypatch.setattr(inner, "forward", lambda hidden_states, **kw: (hidden_states, None))
    message = "layer 1: its attention does not call the registered function"
    check_untouched(model, hf_models.wide(), UnsupportedModelError, message)
    check_untouched(model, hf_models.wide(), UnsupportedModelError, message, strict=False)


def test_a_model_that_fails_on_our_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some attention modules index their mask themselves."""
    model = hf_models.model("llama")
    inner = model.model.layers[1].self_attn
    forward = inner.forward

    def indexing(*args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        if attention_mask is not None:
            attention_mask[0, 0, 6]
        return forward(*args, attention_mask=attention_mask, **kwargs)

    monkeypatch.setattr(inner, "forward", indexing)
    message = "LlamaForCausalLM: got IndexError in a forward pass with the registered"
    check_untouched(model, hf_models.wide(), UnsupportedModelError, message)


# --- arguments ------------------------------------------------------------------------------------


def test_attaching_twice() -> None:
    model = hf_models.model("llama")
    with attach(model, hf_models.wide()) as handle:
        before = fingerprint(model)
        for again in (model, model.model):
            with pytest.raises(ValueError, match="model: got 'a model with TokenSelect attached'"):
                attach(again, hf_models.wide())
        assert fingerprint(model) == before
        assert handle.attached
    attach(model, hf_models.wide()).detach()


def test_compact_capacity_beyond_the_trained_length() -> None:
    model = hf_models.model("llama")
    policy = hf_models.wide("compact", topk=2048)
    message = rf"policy.capacity: got {policy.capacity}, allowed: at most 2048, the trained length"
    check_untouched(model, policy, ValueError, message)
    attach(model, hf_models.wide("original", topk=2048)).detach()


def test_dense_layers_that_do_not_exist() -> None:
    message = r"dense_layers: got \[3, 7\], allowed: indices of this model's layers, 0..2"
    check_untouched(
        hf_models.model("llama"), hf_models.wide(dense_layers=(0, 3, 7)), ValueError, message
    )


def test_wrong_types() -> None:
    model = hf_models.model("llama")
    with pytest.raises(
        TypeError, match=r"model: got Linear .*, allowed: a transformers PreTrained"
    ):
        attach(nn.Linear(2, 2), hf_models.wide())  # type: ignore[arg-type]
    with pytest.raises(
        TypeError, match="policy: got str 'TokenSelect', allowed: a kvselect policy"
    ):
        attach(model, "TokenSelect")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="strict: got int 1, allowed: True or False"):
        attach(model, hf_models.wide(), strict=1)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"policy: got None, allowed: a kvselect policy, or model\.config"
    ):
        attach(model)


def test_output_attentions() -> None:
    model = hf_models.model("llama")
    message = "output_attentions: got True, allowed: False"
    with attach(model, hf_models.wide()), torch.no_grad():
        with pytest.raises(ValueError, match=message):
            model(hf_models.tokens(1, 5), output_attentions=True)
        settings: dict[str, Any] = {"output_attentions": True, "return_dict_in_generate": True}
        with pytest.raises(ValueError, match=message):
            model.generate(hf_models.tokens(1, 5), max_new_tokens=2, **settings)
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    check_untouched(model, hf_models.wide(), ValueError, "config.output_attentions: got True")


def test_the_name_without_attach() -> None:
    model = hf_models.model("llama")
    attach(model, hf_models.wide()).detach()
    model.set_attn_implementation("kvselect")
    message = "attn_implementation: got 'kvselect', allowed: a model with a policy: call kvselect"
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        model(hf_models.tokens(1, 5))


def test_another_implementation_while_attached() -> None:
    model = hf_models.model("llama")
    with attach(model, hf_models.wide("compact")), torch.no_grad():
        model.set_attn_implementation("sdpa")
        message = "attn_implementation: got 'sdpa', allowed: 'kvselect' while attached"
        with pytest.raises(ValueError, match=message):
            model(hf_models.tokens(1, 5))
    assert model.config._attn_implementation == "sdpa"


def test_a_detached_handle() -> None:
    handle = attach(hf_models.model("llama"), hf_models.wide())
    handle.detach()
    message = "handle: got 'a detached model', allowed: an attached one"
    with pytest.raises(ValueError, match=message):
        handle.verify()
    with pytest.raises(ValueError, match=message), handle.stock():
        pass
    assert "detached" in repr(handle)
    handle.report()


# --- training -------------------------------------------------------------------------------------


def test_a_backward_pass_raises() -> None:
    model = hf_models.model("llama")
    ids = hf_models.tokens(1, 8)
    with attach(model, hf_models.wide()):
        logits = model(ids).logits  # with gradients switched on, as in many a script
        with pytest.raises(
            RuntimeError, match="backward: got a gradient through kvselect attention"
        ):
            logits.sum().backward()
        model.train()
        with pytest.raises(ValueError, match=r"model\.training: got True, allowed: False"):
            model(ids, labels=ids)
        with torch.no_grad():
            assert torch.equal(model(ids).logits, logits)
    model(ids, labels=ids).loss.backward()


def test_dropout_raises() -> None:
    model = hf_models.build(hf_models.config("llama", attention_dropout=0.1))
    model.train()
    with (
        attach(model, hf_models.wide()),
        torch.no_grad(),
        pytest.raises(ValueError, match=r"dropout: got 0.1, allowed: 0 \(kvselect does not train"),
    ):
        model(hf_models.tokens(1, 8))


# --- copies ---------------------------------------------------------------------------------------


def test_a_copy_must_be_attached_again() -> None:
    model = hf_models.model("llama")
    ids = hf_models.tokens(1, 60)
    with torch.no_grad():
        stock = model(ids).logits
    with attach(model, hf_models.narrow()), torch.no_grad():
        selected = model(ids).logits
        twin = copy.deepcopy(model)
        with pytest.raises(CopiedModelError, match="re-attach"):
            twin(ids)
        assert torch.equal(model(ids).logits, selected)
        with attach(twin, hf_models.narrow()):
            assert torch.equal(twin(ids).logits, selected)
        assert torch.equal(model(ids).logits, selected)
        assert torch.equal(twin(ids).logits, stock)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, stock)
    assert fingerprint(twin) == fingerprint(model)


# --- nothing else changes -------------------------------------------------------------------------


def test_importing_kvselect_does_not_import_transformers() -> None:
    code = "import sys, kvselect; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_other_models_stay_stock() -> None:
    model, other = hf_models.model("llama"), hf_models.model("llama")
    ids = hf_models.tokens(1, 60)
    with torch.no_grad():
        expected = other(ids).logits
        with attach(model, hf_models.narrow()):
            assert torch.equal(other(ids).logits, expected)
            assert not torch.equal(model(ids).logits, expected)
            cache = other(ids).past_key_values
    assert not any(isinstance(layer, KVSelectLayer) for layer in cache.layers)


def test_policies_ride_in_the_configuration(tmp_path: Any) -> None:
    policy = TokenSelect(topk=9, num_recent_tokens=128, dense_layers=(1,))
    model = hf_models.model("llama")
    model.config.kvselect = policy.to_dict()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"
    with attach(loaded) as handle:
        assert handle.policy == policy
        loaded.save_pretrained(tmp_path / "attached")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "attached")
    assert again.config._attn_implementation == "sdpa"
    loaded.config.kvselect = {"policy": "TokenSelect", "unknown": 1}
    with pytest.raises(ValueError, match="settings of TokenSelect: got"):
        attach(loaded)
