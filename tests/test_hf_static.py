"""Static caches: selection in steps that know no host, eager and compiled into one graph."""

from __future__ import annotations

from typing import Any

import hf_architectures
import hf_checks
import hf_models
import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import StaticCache
from transformers.generation.configuration_utils import CompileConfig

from kvselect import Dense, StreamingLLM, attach
from kvselect.integrations.hf.static_layer import KVSelectStaticLayer

GREEDY: dict[str, Any] = {
    "max_new_tokens": 8,
    "do_sample": False,
    "eos_token_id": None,
    "pad_token_id": 0,
}
IDS = hf_checks.ids_for(3, 60)
MASK = (torch.arange(60) >= 60 - torch.tensor((60, 45, 20))[:, None]).long()
IDS = IDS * MASK


def dynamic(model: Any, **changes: Any) -> Tensor:
    return model.generate(IDS, attention_mask=MASK, **(GREEDY | changes))


def static(model: Any, **changes: Any) -> Tensor:
    settings = {"cache_implementation": "static", "disable_compile": True}
    return dynamic(model, **(settings | changes))


def compiled() -> dict[str, Any]:
    """What generate does by itself on a GPU; the CPU must ask for it."""
    config = CompileConfig(fullgraph=True, mode="default", backend="aot_eager")
    config._compile_all_devices = True
    return {"compile_config": config, "disable_compile": False}


ROWS = [
    (name, positions)
    for name in ("Llama", "Mistral", "Gemma2", "GptOss", "Gemma3n", "SmolLM3", "Qwen3-Next")
    for positions in hf_models.POSITIONS
]


@pytest.mark.parametrize(("name", "positions"), ROWS)
def test_steps_on_a_static_cache(name: str, positions: str) -> None:
    """The stock tokens through lists that hold everything; through others, those of a cache that
    grows. Steps on static caches are counted on the device."""
    model = hf_architectures.model(name)
    stock = dynamic(model)
    with attach(model, hf_checks.listing(name, positions)) as handle:
        assert torch.equal(static(model), stock)
        report = handle.report()
    for layer in report.layers:
        assert not layer.ran_dense
        if not layer.selects:
            continue
        assert layer.cache_layer == "KVSelectStaticLayer"
        assert (layer.decode["num_calls"], layer.decode["num_dense_calls"]) == (7, 0)
        assert layer.decode["tokens_attended"] == layer.decode["tokens_visible"] > 0
        assert layer.tokens_per_step == layer.context_per_step
        assert layer.decode["kept_mass"] == pytest.approx(1.0, abs=1e-5)
    with attach(model, hf_models.narrow(positions)):
        assert torch.equal(static(model), dynamic(model))


@pytest.mark.parametrize(
    ("settings", "positions"),
    [({}, "original"), ({"scope": "layer"}, "compact"), ({"sketch": "int4"}, "compact")],
    ids=str,
)
def test_one_graph_serves_every_step(settings: dict[str, Any], positions: str) -> None:
    """fullgraph: a break is an error. Padded rows, more tokens than the budget, a second call."""
    changes = {**settings, "topk": 8}
    if "sketch" in settings:
        changes |= {"num_recent_tokens": 128, "max_age": 1}
    ids = hf_checks.ids_for(2, 330)
    mask = (torch.arange(330) >= 330 - torch.tensor((330, 290))[:, None]).long()
    arguments = {"attention_mask": mask, **GREEDY}
    model = hf_models.build(hf_models.config("llama", num_hidden_layers=2))
    stock = model.generate(ids * mask, **arguments)
    torch._dynamo.reset()
    counters.clear()
    with attach(model, hf_models.narrow(positions, **changes)) as handle:
        expected = model.generate(ids * mask, **arguments)
        handle.report()
        before = handle.report().layers[0].decode["num_calls"]
        static = {"cache_implementation": "static", **compiled()}
        for _ in range(2):
            assert torch.equal(model.generate(ids * mask, **arguments, **static), expected)
        assert counters["stats"]["unique_graphs"] == 1
        assert not counters["graph_break"]
        layer = handle.report().layers[0]
    assert not torch.equal(stock, expected)
    assert (layer.decode["num_calls"], layer.decode["num_dense_calls"]) == (before + 14, 0)
    assert 0 < layer.decode["kept_mass"] < 1


@pytest.mark.parametrize(
    "policy", [Dense(), StreamingLLM(num_recent_tokens=16, q_block_size=16)], ids=str
)
def test_other_policies(policy: Any) -> None:
    model = hf_models.model("llama")
    with attach(model, policy) as handle:
        expected = dynamic(model)
        assert torch.equal(static(model), expected)
        decode = handle.report().layers[0].decode
    assert decode["num_calls"] == 14
    assert decode["num_dense_calls"] == (14 if isinstance(policy, Dense) else 0)


def test_chunks_of_a_prompt() -> None:
    """For one row the first chunk is nothing but padding: its sketch begins later."""
    model = hf_models.model("llama")
    for changes in ({}, {"sketch": "int4", "num_recent_tokens": 128, "max_age": 1}):
        with attach(model, hf_models.listing(**changes)) as handle:
            assert torch.equal(static(model, prefill_chunk_size=16), dynamic(model))
            for layer in handle.report().layers:
                assert not layer.ran_dense and layer.cache_layer == "KVSelectLayer"
    with attach(model, hf_models.narrow()) as handle:
        found = static(model, prefill_chunk_size=16)
        assert handle.report().layers[0].cache_layer == "KVSelectStaticLayer"
        assert torch.equal(found, dynamic(model, prefill_chunk_size=16))


def test_a_static_cache_filled_before_attach_stays_as_it_is() -> None:
    model = hf_models.model("llama")
    ids = hf_models.tokens(1, 20)
    caches = [StaticCache(config=model.config, max_cache_len=40) for _ in range(2)]
    with torch.no_grad():
        for cache in caches:
            model(ids, past_key_values=cache)
        expected = model(ids[:, :1], past_key_values=caches[0]).logits
        message = "runs dense: a cache layer StaticLayer"
        with attach(model, hf_models.narrow()), pytest.warns(UserWarning, match=message):
            found = model(ids[:, :1], past_key_values=caches[1]).logits
    assert torch.equal(found, expected)
    assert type(caches[1].layers[0]) is not KVSelectStaticLayer


def test_a_compiled_chunk_is_refused() -> None:
    model = hf_models.build(hf_models.config("llama", num_hidden_layers=1))
    ids = hf_models.tokens(1, 20)
    with attach(model, hf_models.listing()), torch.no_grad():
        cache = StaticCache(config=model.config, max_cache_len=40)
        model(ids, past_key_values=cache)
        run = torch.compile(model, backend="eager", fullgraph=True)
        message = "compiled static cache: got '5 tokens', allowed: calls of one token"
        with pytest.raises(Exception, match=message):
            run(ids[:, :5], past_key_values=cache)
        torch._dynamo.reset()
        fresh = StaticCache(config=model.config, max_cache_len=40)
        message = r"static cache: got 'a first call inside torch\.compile"
        with pytest.raises(Exception, match=message):
            run(ids[:, :1], past_key_values=fresh)


@pytest.mark.parametrize("positions", hf_models.POSITIONS)
@pytest.mark.filterwarnings("ignore:kvselect. layer . runs dense. padding with holes")
def test_holes_in_the_padding(positions: str) -> None:
    model = hf_models.model("llama")
    mask = torch.ones_like(IDS)
    mask[0, 10:20] = 0
    places = mask.cumsum(-1) - mask

    def run(cache: Any) -> Tensor:
        with torch.no_grad():
            result = model(IDS, attention_mask=mask, position_ids=places, past_key_values=cache)
            logits, every, place = [result.logits[:, -1:]], mask, places[:, -1:] + 1
            for step in range(3):
                every = torch.cat((every, every.new_ones(3, 1)), dim=1)
                token = hf_checks.ids_for(3, 1, seed=step)
                result = model(
                    token,
                    attention_mask=every,
                    position_ids=place,
                    past_key_values=result.past_key_values,
                )
                place = place + 1
                logits.append(result.logits)
        return torch.cat(logits, dim=1)

    expected = run(None)
    with attach(model, hf_models.narrow(positions)) as handle:
        got = run(StaticCache(config=model.config, max_cache_len=70))
        assert handle.report().layers[0].ran_dense
    assert hf_checks.error(got, expected) <= hf_checks.EXACT


def test_beams() -> None:
    model = hf_models.model("llama")
    expected = dynamic(model, num_beams=3, num_return_sequences=2)
    with attach(model, hf_models.listing("compact")) as handle:
        assert torch.equal(static(model, num_beams=3, num_return_sequences=2), expected)
        assert handle.report().layers[0].decode["num_calls"] == 7


def test_a_cache_is_used_again_after_reset() -> None:
    model = hf_models.model("llama")
    with attach(model, hf_models.narrow()) as handle, torch.no_grad():
        cache = StaticCache(config=model.config, max_cache_len=70)
        ids, new = hf_models.tokens(2, 50), hf_models.tokens(2, 1, seed=1)

        def run() -> Tensor:
            model(ids, past_key_values=cache)
            return model(new, past_key_values=cache).logits

        first = run()
        kept = [tensor.data_ptr() for tensor in cache.layers[0].cache.tensors()]
        cache.reset()
        assert int(cache.get_seq_length()) == 0
        assert torch.equal(run(), first)
        assert [tensor.data_ptr() for tensor in cache.layers[0].cache.tensors()] == kept
        assert handle.report().layers[0].decode["num_calls"] == 2


def test_a_rolling_sweep_is_refused() -> None:
    model = hf_models.model("llama")
    with attach(model, hf_models.narrow(num_segments=4)):
        message = "num_segments: got 4, allowed: None with a static cache"
        with pytest.raises(ValueError, match=message):
            static(model)
        dynamic(model)


@pytest.mark.parametrize("positions", hf_models.POSITIONS)
@pytest.mark.parametrize(
    "settings", [{}, {"scope": "layer"}, {"similarity_on": "rotated"}], ids=str
)
def test_lists_are_reused_in_one_graph(settings: dict[str, Any], positions: str) -> None:
    """The device decides what is reused: the same hits as on a cache that grows."""
    if positions == "compact" and "similarity_on" in settings:
        pytest.skip("compact positions compare un-rotated queries")
    reuse = {"similarity_threshold": 0.01, "similarity": "flat", "max_age": 4}
    policy = hf_models.narrow(positions, **reuse, **settings)
    model = hf_models.build(hf_models.config("llama", num_hidden_layers=2))
    with attach(model, policy) as handle:
        expected = dynamic(model, max_new_tokens=20)
        by_hand = handle.report().layers
        torch._dynamo.reset()
        counters.clear()
        for run in ({}, compiled()):
            assert torch.equal(static(model, max_new_tokens=20, **run), expected)
        assert counters["stats"]["unique_graphs"] == 1
        assert not counters["graph_break"]
        for layer, wanted in zip(handle.report().layers, by_hand):
            for count in ("num_hits", "tokens_scanned", "tokens_attended"):
                assert layer.decode[count] == 3 * wanted.decode[count] > 0, count
            assert layer.decode["num_misses"] > 0


def test_another_sketch_is_refused() -> None:
    layer = KVSelectStaticLayer(40, "int4")
    layer.announce("rotated", "int4", None)
    layer.update(torch.zeros(1, 2, 3, 32), torch.zeros(1, 2, 3, 32))
    with pytest.raises(ValueError, match="sketch: got 'int8', allowed: 'int4', which this static"):
        layer.announce("rotated", "int8", None)


@pytest.mark.filterwarnings("ignore:kvselect. layer . runs dense. a cache layer Static")
def test_latents_run_dense() -> None:
    model = hf_architectures.model("DeepSeek-V3")
    expected = dynamic(model)
    with attach(model, hf_models.narrow()) as handle:
        assert torch.equal(static(model), expected)
        assert handle.report().layers[0].ran_dense == {"a cache layer StaticLayer": 8}


def test_counts_of_every_way_to_step() -> None:
    """Two caches in turn, a prompt token by token, a short call on a filled cache, two models."""
    models = [hf_models.build(hf_models.config("llama", num_hidden_layers=1)) for _ in range(2)]
    ids = hf_models.tokens(1, 60)

    def cache() -> StaticCache:
        return StaticCache(config=models[0].config, max_cache_len=80)

    with torch.no_grad(), attach(models[0], hf_models.narrow()) as handle:
        caches = [cache(), cache()]
        for one in caches:
            models[0](ids, past_key_values=one)
        for _ in range(3):
            for one in caches:
                models[0](ids[:, :1], past_key_values=one)
        assert handle.report().layers[0].decode["num_calls"] == 6
        fed = cache()
        for place in range(30):
            models[0](ids[:, place : place + 1], past_key_values=fed)
        assert handle.report().layers[0].decode["num_calls"] == 6 + 30
        with attach(models[1], hf_models.narrow()) as other:
            models[1](ids[:, :1], past_key_values=caches[0])
            assert other.report().layers[0].decode["num_calls"] == 1
            assert handle.report().layers[0].decode["num_calls"] == 6 + 30
    found = []
    for kind in (None, cache()):
        with torch.no_grad(), attach(models[0], hf_models.narrow()) as handle:
            filled = models[0](ids, past_key_values=kind, use_cache=True).past_key_values
            models[0](ids[:, :3], past_key_values=filled)
            layer = handle.report().layers[0]
            counts = ("tokens_visible", "tokens_attended", "tokens_scanned", "num_calls")
            found.append(([layer.decode[name] for name in counts], layer.tokens_per_step))
    assert found[0] == found[1]


def test_a_reset_cache_of_before_attach_selects() -> None:
    model = hf_models.model("llama")
    ids = hf_models.tokens(1, 30)
    cache = StaticCache(config=model.config, max_cache_len=40)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        with attach(model, hf_models.narrow()):
            with pytest.warns(UserWarning, match="a cache layer StaticLayer"):
                model(ids[:, :2], past_key_values=cache)
            cache.reset()
            model(ids, past_key_values=cache)
            assert type(cache.layers[0]) is KVSelectStaticLayer
