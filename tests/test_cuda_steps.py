"""Steps "on CUDA" without a GPU: everything on one device, and nothing that waits for it."""

from __future__ import annotations

from typing import Any

import hf_models
import pytest
import torch
from fake_cuda import FakeCuda, fake_cuda, to_fake_cuda
from transformers import StaticCache

import kvselect
from kvselect import (
    InfLLM,
    KVCache,
    Landmark,
    Quest,
    Rope,
    StreamingLLM,
    TieredKVCache,
    TokenSelect,
    decode_step,
    prefill,
)
from kvselect.fixed_cache import FixedKVCache
from kvselect.lru_slots import LruSlots, Taken
from kvselect.score import RANKING_WORDS, new_ranking
from kvselect.tiered_rows import TieredRows

SMALL: dict[str, Any] = {"topk": 64, "num_sink_tokens": 16, "num_recent_tokens": 128}
STEP = ["score_tokens", "select_tokens", "sparse_attention"]


@pytest.fixture(autouse=True)
def no_break_even(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no GPU whose name a stored crossover could carry."""
    monkeypatch.setenv("KVSELECT_BREAK_EVEN", "off")


def test_fake_cuda_finds_what_it_is_for() -> None:
    with fake_cuda() as noted:
        x = torch.zeros(3, device="cuda")
        with pytest.raises(RuntimeError, match="device"):
            x + torch.zeros(3)
        assert not noted.reads and not noted.copies
        assert x.sum().item() == 0 and len(noted.reads) == 1
        torch.tensor([1, 2]).to("cuda")
        assert len(noted.copies) == 1
        assert (x + 1.0).device.type == "cuda" and len(noted.copies) == 1


POLICIES: dict[str, tuple[Any, list[str]]] = {
    "default": (TokenSelect(**SMALL), STEP),
    "layer scope": (TokenSelect(**SMALL, scope="layer"), STEP),
    "compact": (TokenSelect(**SMALL, positions="compact"), STEP),
    "exact keys": (TokenSelect(**SMALL, sketch=None), STEP),
    "selection cache": (TokenSelect(**SMALL, similarity_threshold=0.9), STEP),
    "selection cache, layer scope": (
        TokenSelect(**SMALL, similarity_threshold=0.9, scope="layer"),
        STEP,
    ),
    "mass floor": (TokenSelect(**SMALL, mass_target=0.9, topk_max=128), STEP),
    "streaming": (StreamingLLM(num_sink_tokens=16, num_recent_tokens=128), ["sparse_attention"]),
    "quest": (Quest(token_budget=64), STEP),
    "landmark": (Landmark(num_recent_tokens=64), ["select_tokens", "sparse_attention"]),
    "landmark, residual": (
        Landmark(num_recent_tokens=64, attention="residual"),
        ["select_tokens", "sparse_attention", "merge_splits"],
    ),
    "infllm, original": (
        InfLLM(topk_blocks=1, num_recent_tokens=64, positions="original"),
        STEP,
    ),
    "infllm, clamp": (
        InfLLM(topk_blocks=1, num_recent_tokens=64),
        [*STEP, "sparse_attention", "merge_splits"],
    ),
}


@pytest.mark.parametrize("policy", list(POLICIES))
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("make", [KVCache, FixedKVCache])
def test_a_decode_step_waits_for_nothing_and_copies_nothing(
    make: Any, batch: int, policy: str
) -> None:
    chosen, expected = POLICIES[policy]
    with fake_cuda() as noted:
        cache = make(batch, 2, 64, dtype=torch.bfloat16, device="cuda", capacity=1024)
        k = torch.randn(batch, 500, 2, 64, dtype=torch.bfloat16, device="cuda")
        q = torch.randn(batch, 500, 8, 64, dtype=torch.bfloat16, device="cuda")
        rope = None
        if chosen.caches_unrotated:
            angles = torch.zeros(1024, 32, device="cuda")
            rope = Rope(angles.cos(), angles.sin())
        state = chosen.new_state(cache)
        cache.append(k, k)
        out, lse = prefill(q, cache, chosen, state, rope=rope)
        assert out.device == lse.device == q.device and out.shape == q.shape
        assert not noted.reads
        for step in range(3):
            cache.append(k[:, :1], k[:, :1])
            noted.forget()
            out, info = decode_step(q[:, :1], cache, chosen, state, rope=rope)
            assert out.device == q.device and out.shape == q[:, :1].shape
            assert info.selection is not None
            if step:  # the first may allocate what is remembered
                assert not noted.reads and not noted.copies
            missing = [op for op in expected if op not in noted.ops]
            assert not missing
            # What decides which lists are reused is no op of its own.
            assert "selection_cache_step" not in noted.ops


def decode_steps(model: Any, cache: Any, ids: Any, noted: FakeCuda) -> None:
    for step in range(3):
        noted.forget()
        out = model(ids[:, :1], past_key_values=cache)
        assert out.logits.device.type == "cuda"
        assert noted.ops.count("sparse_attention") == noted.ops.count("kv_append") > 0
        if step:
            assert noted.ops.count("select_tokens") == noted.ops.count("kv_append")
            assert not noted.reads, noted.reads
            assert not noted.copies, noted.copies


@pytest.mark.parametrize("positions", hf_models.POSITIONS)
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
def test_an_attached_model_steps_on_cuda(batch: int, static: bool, positions: str) -> None:
    """Attached on the CPU, then moved: its decode steps find everything where the model is."""
    settings = hf_models.config("llama")
    model = hf_models.build(settings, torch.bfloat16)
    kvselect.attach(model, TokenSelect(**SMALL, positions=positions))
    with fake_cuda() as noted, torch.no_grad():
        to_fake_cuda(model)
        ids = torch.zeros(batch, 500, dtype=torch.int64, device="cuda")
        cache = StaticCache(config=settings, max_cache_len=1024) if static else None
        out = model(ids, use_cache=True, past_key_values=cache)
        decode_steps(model, out.past_key_values, ids, noted)


def test_an_attached_model_steps_on_cuda_with_padding() -> None:
    settings = hf_models.config("llama")
    model = hf_models.build(settings, torch.bfloat16)
    kvselect.attach(model, TokenSelect(**SMALL))
    with fake_cuda() as noted, torch.no_grad():
        to_fake_cuda(model)
        ids = torch.zeros(2, 500, dtype=torch.int64, device="cuda")
        mask = torch.ones_like(ids)
        cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
        for _ in range(3):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            noted.forget()
            model(ids[:, :1], attention_mask=mask, past_key_values=cache)
            assert not noted.reads, noted.reads
            assert noted.ops.count("select_tokens") == settings.num_hidden_layers


def test_a_step_of_a_tiered_cache_reads_its_lists_back_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Which rows are missing is a matter of numbers, which there are none of here: seven."""

    def take(_: LruSlots, tokens: torch.Tensor, wanted: torch.Tensor) -> Taken:
        missing = torch.zeros(7, dtype=torch.int64)
        return Taken(torch.zeros(tokens.shape, dtype=torch.int64), missing, 0)

    monkeypatch.setattr(LruSlots, "take", take)
    monkeypatch.setattr(LruSlots, "forget", lambda *_: None)
    monkeypatch.setattr(TieredRows, "_settle", lambda _: None)
    monkeypatch.setattr(TieredKVCache, "_finds_no_codes", lambda *_: False)
    policy = TokenSelect(**SMALL)
    sizes = {"num_sink_tokens": 16, "num_recent_tokens": 128, "resident_tokens": 600}
    with fake_cuda() as noted:
        cache = TieredKVCache(2, 2, 64, dtype=torch.bfloat16, device="cuda", **sizes)
        k = torch.randn(2, 500, 2, 64, dtype=torch.bfloat16, device="cuda")
        q = torch.randn(2, 500, 8, 64, dtype=torch.bfloat16, device="cuda")
        state = policy.new_state(cache)
        cache.append(k, k)
        out, _ = prefill(q, cache, policy, state)
        assert out.device == q.device and not cache.has_whole_rows
        for change in (("crop", 0), ("reorder", [1, 0]), ("crop", 40)):
            getattr(cache, change[0])(change[1])
            noted.forget()
            cache.append(k[:, :1], k[:, :1])
            assert len(noted.copies) == 2  # key and value to the host; pages are held
            noted.forget()
            out, info = decode_step(q[:, :1], cache, policy, state)
            assert out.device == q.device and info.selection is not None
            assert noted.ops == STEP and not noted.reads
            # Lists to the host; places, keys, values, block table and lengths to the device.
            assert len(noted.copies) == 6


@pytest.mark.parametrize(
    ("settings", "counts"),
    [
        ({}, {"prefill", "decode"}),
        # Tokens that a block does not see may be candidates there, and the vote counts none.
        ({"window_anchor": "block_end"}, {"decode"}),
        ({"scope": "layer"}, set()),
        ({"pool_width": 3}, set()),
        ({"mass_target": 0.9, "topk_max": 128}, set()),
    ],
)
def test_the_vote_counts_for_the_selection_where_it_ranks_by_its_scores(
    settings: dict[str, Any], counts: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, ...]] = []
    monkeypatch.setattr(
        "kvselect.policies.soft_vote.new_ranking",
        lambda q, num_kv_heads: asked.append((*q.shape[:2], num_kv_heads)),
    )
    policy = TokenSelect(**SMALL, **settings)
    cache = KVCache(1, 2, 64, sketch="int4")
    state = policy.new_state(cache)
    k, q = torch.randn(1, 500, 2, 64), torch.randn(1, 500, 8, 64)
    cache.append(k, k)
    prefill(q, cache, policy, state)
    assert bool(asked) == ("prefill" in counts)
    asked.clear()
    cache.append(k[:, :1], k[:, :1])
    decode_step(q[:, :1], cache, policy, state)
    assert asked == ([(1, 1, 2)] if "decode" in counts else [])


@pytest.mark.parametrize(
    ("num_vectors", "num_q_heads", "ranked"),
    [(1, 8, True), (1, 32, True), (1, 34, False), (4, 8, True), (8, 8, False), (2, 10, True)],
)
def test_the_vote_counts_for_sixteen_columns(
    num_vectors: int, num_q_heads: int, ranked: bool
) -> None:
    """By fours, as its products are; the kernel for more has no registers left."""
    with fake_cuda():
        q = torch.zeros(2, 3, num_vectors, num_q_heads, 64, device="cuda")
        found = new_ranking(q, 2)
        assert (None if found is None else tuple(found.shape)) == (
            (2, 3, 2, RANKING_WORDS) if ranked else None
        )
    assert new_ranking(torch.zeros(1, 1, 1, 8, 64), 2) is None
