"""attach(keep="cpu"): the tokens of the same policy on the device, whatever generates them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import hf_architectures
import hf_checks
import hf_models
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from kvselect import Dense, InfLLM, StreamingLLM, TieredKVCache, TokenSelect
from kvselect.integrations.hf import attach
from kvselect.integrations.hf.cache_layer import KVSelectLayer
from kvselect.integrations.hf.tiered_layer import KVSelectTieredLayer
from kvselect.lru_slots import LruSlots

GREEDY: dict[str, Any] = {
    "max_new_tokens": 12,
    "do_sample": False,
    "eos_token_id": None,
    "pad_token_id": 0,
}
LENGTH = 300
PROMPT = hf_models.tokens(1, LENGTH, seed=1)
PADDED, PADDING = hf_models.left_padded((LENGTH, 233, 90), LENGTH, seed=2)


def narrow(positions: str = "original", **changes: Any) -> TokenSelect:
    """Leaves tokens out beyond 164 of them."""
    settings: dict[str, Any] = {
        "topk": 32,
        "num_sink_tokens": 4,
        "num_recent_tokens": 128,
        "overselect": 1.25,
        "q_block_size": 16,
        "num_tail_tokens": 8,
        "tail_q_block_size": 4,
        "max_age": 4,
        "positions": positions,
    }
    return TokenSelect(**(settings | changes))


def least(policy: Any) -> dict[str, Any]:
    """Room for one list, so that tokens of others must go."""
    return {"keep": "cpu", "resident_tokens": policy.capacity}


def greedy(model: Any) -> Any:
    return model.generate(PROMPT, **GREEDY)


def greedy_batch(model: Any) -> Any:
    settings = {**GREEDY, "return_dict_in_generate": True, "output_logits": True}
    out = model.generate(PADDED, attention_mask=PADDING, **settings)
    return torch.stack(out.logits)


def beams(model: Any) -> Any:
    return model.generate(
        PADDED, attention_mask=PADDING, num_beams=3, num_return_sequences=2, **GREEDY
    )


def chunked(model: Any) -> Any:
    return model.generate(PADDED, attention_mask=PADDING, prefill_chunk_size=64, **GREEDY)


def prompt_lookup(model: Any) -> Any:
    return model.generate(PROMPT[:, :160].repeat(1, 2), prompt_lookup_num_tokens=4, **GREEDY)


def assisted(model: Any) -> Any:
    assistant = hf_models.build(hf_models.config("llama"), seed=5)
    return model.generate(PROMPT, assistant_model=assistant, **GREEDY)


def two_turns(model: Any) -> Any:
    cache = DynamicCache(config=model.config)
    first = model.generate(PROMPT, past_key_values=cache, **GREEDY)
    turn = torch.cat((first, hf_models.tokens(1, 6, seed=4)), dim=1)
    every = torch.ones_like(turn)
    return model.generate(turn, attention_mask=every, past_key_values=cache, **GREEDY)


def crop_and_go_on(model: Any) -> Any:
    cache = DynamicCache(config=model.config)
    model.generate(PROMPT, past_key_values=cache, **GREEDY)
    cache.crop(-40)
    turn = torch.cat((PROMPT[:, : cache.get_seq_length()], hf_models.tokens(1, 6, seed=4)), dim=1)
    return model.generate(turn, past_key_values=cache, **GREEDY)


def copied_cache(model: Any) -> Any:
    """Two answers from one context that was read once."""
    cache = DynamicCache(config=model.config)
    model(PROMPT[:, :-1], past_key_values=cache)
    answers = []
    for last in (PROMPT[:, -1:], PROMPT[:, :1]):
        ids = torch.cat((PROMPT[:, :-1], last), dim=1)
        answers.append(model.generate(ids, past_key_values=copy.deepcopy(cache), **GREEDY))
    return torch.cat(answers)


def right_padded(model: Any) -> Any:
    """Holes between prompt and answer: these calls run dense, over keys from the host."""
    return model.generate(PADDED.flip(1), attention_mask=PADDING.flip(1), **GREEDY)


def without_cache(model: Any) -> Any:
    return model.generate(PROMPT, use_cache=False, **{**GREEDY, "max_new_tokens": 2})


SCENARIOS: tuple[Callable[[Any], Tensor], ...] = (
    greedy,
    greedy_batch,
    beams,
    chunked,
    prompt_lookup,
    assisted,
    two_turns,
    crop_and_go_on,
    copied_cache,
    right_padded,
    without_cache,
)


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
@pytest.mark.filterwarnings("ignore:kvselect. layer . runs dense. padding with holes")
def test_the_tokens_of_the_same_policy_on_the_device(scenario: Any, positions: str) -> None:
    if scenario is right_padded and positions == "compact":
        pytest.skip("generate's positions of right padding are no index positions")
    model = hf_models.model("llama")
    policy = narrow(positions)
    with attach(model, policy):
        expected = scenario(model)
    with attach(model, policy, **least(policy)) as handle:
        got = scenario(model)
        report = handle.report()
    assert torch.equal(got, expected)
    for layer in report.layers:
        assert layer.residency is not None
        steps = layer.residency["num_steps"]
        assert (steps > 0) == (scenario not in (right_padded, without_cache))
        if steps and scenario is not assisted:  # whose calls of several tokens take whole rows
            assert layer.residency["num_fetched"] > 0 and layer.residency["num_found"] > 0


OTHERS = {
    "scope layer": narrow(scope="layer"),
    "int8": narrow(sketch="int8"),
    "reused lists": narrow(similarity_threshold=0.5),
    "mass floor": narrow(mass_target=0.95, topk_max=64),
    "streaming": StreamingLLM(num_sink_tokens=4, num_recent_tokens=64, q_block_size=16),
    "dense layer": narrow(dense_layers=(1,)),
    "dense prefill": narrow(dense_prefill=True),
    "dense steps": narrow(dense_below_tokens=305),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_policies(name: str) -> None:
    model, policy = hf_models.model("qwen3"), OTHERS[name]
    with attach(model, policy):
        expected = greedy_batch(model)
    with attach(model, policy, keep="cpu") as handle:
        assert torch.equal(greedy_batch(model), expected)
        report = handle.report()
    for layer in report.layers:
        assert (layer.residency is not None) == layer.selects == (layer.reason is None)
        assert layer.selects == (name != "dense layer" or layer.index != 1)


@pytest.mark.parametrize(
    "name", ["GptOss", "Gemma2", "Gemma3n", "Qwen3-Next", "Phi3", "SmolLM3", "Mistral"]
)
def test_architectures_that_add_something(name: str) -> None:
    """Sink logits, logit caps, shared keys, layers without keys, partial rotation, none."""
    model = hf_architectures.model(name)
    policy = narrow()
    ids, mask = hf_checks.ids_for(2, 250), torch.ones(2, 250, dtype=torch.long)
    mask[1, :40] = 0
    with attach(model, policy):
        expected = model.generate(ids * mask, attention_mask=mask, **GREEDY)
    with attach(model, policy, **least(policy)) as handle:
        got = model.generate(ids * mask, attention_mask=mask, **GREEDY)
        report = handle.report()
    assert torch.equal(got, expected)
    tiered = [layer for layer in report.layers if layer.residency is not None]
    assert tiered
    for layer in tiered:
        assert layer.residency is not None
        readers = [other for other in tiered if other.residency == layer.residency]
        assert layer.residency["num_steps"] in {11, 11 * len(readers)}


def test_bfloat16_and_audits() -> None:
    model = hf_models.model("llama").to(torch.bfloat16)
    audits = []
    for options in ({}, {"keep": "cpu"}):
        with attach(model, narrow(), audit_every=3, **options) as handle:
            audits.append((greedy_batch(model), handle.report().layers[0].decode["exact_audit"]))
    assert torch.equal(audits[0][0], audits[1][0])
    assert audits[0][1] == audits[1][1] and audits[0][1]["num_lists"] > 0


def test_verify_passes_whatever_is_resident() -> None:
    model = hf_models.model("llama")
    for policy in (narrow(), narrow("compact"), OTHERS["streaming"]):
        with attach(model, policy, **least(policy)) as handle:
            tiers = handle._plan.tiers
            handle.verify()
            assert handle._plan.tiers is tiers
            assert all(not tier.residency.num_steps for tier in tiers.values())


def test_keys_lie_on_the_host_and_device_memory_stays() -> None:
    model, policy = hf_models.model("llama"), narrow()
    cache = DynamicCache(config=model.config)
    with attach(model, policy, **least(policy)):
        model.generate(PROMPT, past_key_values=cache, **GREEDY)
        held: dict[int, int] = {}
        for layer in cache.layers:
            assert type(layer) is KVSelectTieredLayer and isinstance(layer.cache, TieredKVCache)
            assert "KVSelectTieredLayer(sketch='int4', tokens=311)" in repr(layer)
            assert not layer.cache.has_whole_rows
            assert layer.cache.sketch_data is not None
            held[id(layer)] = layer.cache.nbytes - layer.cache.sketch_data.nbytes
            for shown, stored in ((layer.keys, layer.cache.k), (layer.values, layer.cache.v)):
                assert shown.data_ptr() == stored.data_ptr()  # not a copy
        longer = torch.cat((PROMPT, hf_models.tokens(1, 400, seed=9)), dim=1)
        model.generate(longer, past_key_values=cache, **GREEDY)
        for layer in cache.layers:
            assert layer.cache.max_seqlen == 711
            assert held[id(layer)] == layer.cache.nbytes - layer.cache.sketch_data.nbytes


def test_the_report_says_what_moved() -> None:
    model, policy = hf_models.model("llama"), narrow()
    with attach(model, policy) as handle:
        greedy(model)
        report = handle.report()
        assert "keep=" not in str(report)
        assert report.layers[0].residency is None and report.layers[0].resident_tokens is None
    with attach(model, policy, keep="cpu") as handle:
        assert "tokens per row and KV head on the device (lru)\n" in str(handle.report())
        for _ in range(2):  # counts span caches
            greedy(model)
        report = handle.report()
    residency = [layer.residency for layer in report.layers if layer.residency is not None]
    assert len(residency) == 3
    for counts in residency:
        assert counts["num_steps"] == 2 * 11
        assert counts["fetched_bytes"] == counts["num_fetched"] * 2 * 32 * 4
        assert counts["stored_bytes"] == 2 * (LENGTH + 11) * 2 * 2 * 32 * 4
    found, fetched = (sum(c[name] for c in residency) for name in ("num_found", "num_fetched"))
    moved = sum(counts["fetched_bytes"] for counts in residency) / 22 / 1e6
    resident = 2 * policy.capacity
    assert (
        f"keep='cpu' in 3 of 3 layers: {resident} tokens per row and KV head on the device (lru); "
        f"{found / (found + fetched):.1%} of the listed rows were there, {moved:.2f} MB moved per "
        "step"
    ) in str(report)
    assert report.to_dict()["layers"][0]["residency"] == residency[0]


@pytest.mark.parametrize("kind", ["TokenSelect", "InfLLM"])
def test_who_makes_room_changes_no_token(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores of "lru_s" come in after every step but the first; the report names the order."""
    noted: list[int] = []
    note = LruSlots.note

    def watched(self: LruSlots, slots: Tensor, received: Tensor) -> None:
        noted.append(int((received > 0).sum()))
        note(self, slots, received)

    monkeypatch.setattr(LruSlots, "note", watched)
    model, policy = hf_models.model("llama"), narrow()
    if kind == "InfLLM":
        policy = InfLLM(  # type: ignore[assignment]
            topk_blocks=3, block_size=16, num_sink_tokens=4, num_recent_tokens=64, q_block_size=32
        )
    answers = []
    for replacement in ("lru", "lru_s"):
        with attach(
            model, policy, keep="cpu", resident_tokens=240, replacement=replacement
        ) as handle:
            answers.append(greedy(model))
            layers = handle.report().layers
            assert [layer.replacement for layer in layers] == [replacement] * 3
            assert f"on the device ({replacement})" in str(handle.report())
            tier = handle._plan.tiers[0]
            assert tier.block_tokens == (16 if kind == "InfLLM" else 1)
        assert all(layer.residency and layer.residency["num_found"] for layer in layers)
        assert any(noted) == (replacement == "lru_s")
    assert torch.equal(*answers)


def test_no_crossover_is_measured_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVSELECT_BREAK_EVEN", "stored")
    with attach(hf_models.model("llama"), narrow(), keep="cpu") as handle:
        text = str(handle.report())
    assert "keep='cpu', where longer dense steps would move whole rows" in text


REFUSED = [
    ({"keep": "disk"}, narrow(), "keep: got 'disk', allowed: None or 'cpu'"),
    ({"resident_tokens": 400}, narrow(), "resident_tokens: got 400, allowed: None without keep="),
    ({"replacement": "lru_s"}, narrow(), "replacement: got 'lru_s', allowed: None without keep="),
    (
        {"keep": "cpu", "replacement": "fifo"},
        narrow(),
        "replacement: got 'fifo', allowed: None or 'lru' or 'lru_s'",
    ),
    (
        {"keep": "cpu", "resident_tokens": 187},
        narrow(),
        r"resident_tokens: got 187, allowed: None or an int >= 188 \(the longest list of the poli",
    ),
    (
        {"keep": "cpu", "resident_tokens": 187},
        narrow(dense_below_tokens=300),
        "resident_tokens: got 187, allowed: None or an int >= 300",
    ),
    ({"keep": "cpu"}, Dense(), r"keep: got 'cpu', allowed: None with this Dense \(every step rea"),
    ({"keep": "cpu"}, narrow(sketch=None), r"this TokenSelect \(sketch=None scores every key\)"),
    ({"keep": "cpu"}, narrow(num_segments=2), "num_segments: pools are scored from their keys"),
    (
        {"keep": "cpu"},
        narrow(dense_layers=(0, 1, 2)),
        "keep: got 'cpu', allowed: None for a model without layers that select and have a cache",
    ),
]


@pytest.mark.parametrize(("options", "policy", "message"), REFUSED)
def test_what_is_refused(options: dict[str, Any], policy: Any, message: str) -> None:
    model = hf_models.model("llama")
    with pytest.raises(ValueError, match=message):
        attach(model, policy, **options)
    attach(model, narrow()).detach()  # nothing is left behind


def test_static_caches_are_refused() -> None:
    model = hf_models.model("llama")
    allowed = "a cache of dynamic layers with keep='cpu'"
    with attach(model, narrow(), keep="cpu"):
        cache = StaticCache(config=model.config, max_cache_len=400)
        with pytest.raises(ValueError, match=f"got 'a StaticLayer', allowed: {allowed}"):
            model.generate(PROMPT, past_key_values=cache, **GREEDY)


def test_latents_of_mla_stay_where_they_are() -> None:
    model = hf_architectures.model("DeepSeek-V3")
    message = "keep: got 'cpu', allowed: None for a model without layers that select and have"
    with pytest.raises(ValueError, match=message):
        attach(model, narrow(average_queries="after_rope"), keep="cpu")


def test_a_cache_goes_on_under_another_policy() -> None:
    """Of the tier that it was made with: windows that are larger are refused."""
    model = hf_models.model("llama")
    cache = DynamicCache(config=model.config)
    with attach(model, narrow(), keep="cpu"):
        first = model.generate(PROMPT, past_key_values=cache, **GREEDY)
    turn = torch.cat((first, hf_models.tokens(1, 6, seed=4)), dim=1)
    every = torch.ones_like(turn)
    results = []
    for shared in (copy.deepcopy(cache), None):
        with attach(model, narrow(topk=24, sketch="int8")):
            settings = {**GREEDY, "past_key_values": shared, "attention_mask": every}
            results.append(model.generate(turn, **settings))
    with attach(model, narrow(num_recent_tokens=160)):
        allowed = "at most 128, as the TieredKVCache was made"
        with pytest.raises(ValueError, match=f"num_recent_tokens: got 160, allowed: {allowed}"):
            model.generate(turn, past_key_values=cache, attention_mask=every, **GREEDY)
    assert results[0].shape == results[1].shape
    assert isinstance(cache.layers[0], KVSelectLayer)
