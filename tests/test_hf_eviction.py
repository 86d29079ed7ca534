"""Evictions through attach: exact at full budget, memory gone, every kind of call after it."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import hf_models
import pytest
import torch
from test_hf_attach import EXACT, error, logits_of
from transformers import DynamicCache, StaticCache

from kvselect import ColumnRank, Coverage, InfLLM, MaxMin, Quest, SnapKV
from kvselect.eval.session import Session
from kvselect.integrations.hf import attach
from kvselect.integrations.hf.evicting_layer import KVSelectEvictingLayer

POLICIES: list[type[Any]] = [SnapKV, MaxMin, Coverage, ColumnRank]


def small(kind: type[Any], **changes: Any) -> Any:
    options: dict[str, Any] = {"topk": 16, "num_sink_tokens": 2, "num_recent_tokens": 8}
    return kind(**(options | changes))


@pytest.mark.parametrize("kind", POLICIES)
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_budget_for_everything_gives_the_stock_logits(name: str, kind: type[Any]) -> None:
    model = hf_models.model(name)
    ids, mask = hf_models.left_padded((90, 71), 90)
    new = hf_models.tokens(2, 4, seed=1)
    expected = logits_of(model, ids, new, attention_mask=mask)
    with attach(model, small(kind, topk=200)) as handle:
        got = logits_of(model, ids, new, attention_mask=mask)
        assert error(got[0], expected[0]) <= EXACT
        assert error(got[1, 19:], expected[1, 19:]) <= EXACT
        handle.verify(prompt_tokens=60)


@pytest.mark.parametrize("kind", POLICIES)
def test_memory_is_gone_and_the_report_says_what_is_read(kind: type[Any]) -> None:
    model = hf_models.model("llama")
    ids = hf_models.tokens(2, 200)
    with attach(model, small(kind)) as handle, torch.no_grad():
        result = model(ids, use_cache=True)
        cache = result.past_key_values
        before = sum(layer.cache.nbytes for layer in cache.layers)
        for step in range(3):
            model(ids[:, step : step + 1], past_key_values=cache)
        assert cache.get_seq_length() == 203
        for layer in cache.layers:
            assert isinstance(layer, KVSelectEvictingLayer) and layer.cache is not None
            assert layer.cache.rows is not None
            assert set(layer.cache.rows.lengths) == {2 + 16 + 8 + 3}
            assert layer.keys.shape[2] == 203 and layer.keys.isnan().all()
        assert sum(layer.cache.nbytes for layer in cache.layers) < 0.3 * before
        report = handle.report()
        assert not report.revocable and "revocable: no" in str(report)
        for layer_report in report.layers:
            assert layer_report.tokens_per_step == pytest.approx(28)
            assert layer_report.context_per_step == pytest.approx(202)


def test_generate_beams_and_a_second_turn() -> None:
    model = hf_models.model("llama")
    ids = hf_models.tokens(1, 120)
    with attach(model, small(SnapKV)):
        options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        model.generate(ids, num_beams=3, **options)
        result = model.generate(ids, return_dict_in_generate=True, **options)
        turn = torch.cat((result.sequences, hf_models.tokens(1, 9, seed=4)), 1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            out = model.generate(turn, past_key_values=result.past_key_values, **options)
        assert out.shape[1] == 126 + 9 + 6
        said = [
            str(w.message) for w in caught if "dropped tokens before this prompt" in str(w.message)
        ]
        assert len(said) == model.config.num_hidden_layers


def test_what_cannot_be_evicted_is_refused() -> None:
    model = hf_models.model("llama")
    ids = hf_models.tokens(1, 60)
    with attach(model, small(SnapKV)), torch.no_grad():
        static = StaticCache(config=model.config, max_cache_len=80)
        with pytest.raises(
            ValueError, match="past_key_values: got 'a StaticLayer', allowed: a cac"
        ):
            model(ids, past_key_values=static)
        result = model(ids, use_cache=True)
        model(ids[:, :1], past_key_values=result.past_key_values)
        mask = torch.zeros(1, 1, 1, 62)
        with (
            pytest.warns(UserWarning, match="runs dense: a 4-D attention mask"),
            pytest.raises(ValueError, match="past_key_values: got 'a 4-D attention mask'"),
        ):
            model(ids[:, :1], past_key_values=result.past_key_values, attention_mask=mask)


def test_a_session_reads_the_context_again_for_every_question() -> None:
    model = hf_models.model("llama")
    context, question = hf_models.tokens(1, 90)[0], hf_models.tokens(1, 5, seed=2)[0]
    with Session("evicts", model, small(SnapKV)) as session, torch.no_grad():
        session.prefill(context)
        answers = []
        for _ in range(2):
            session.step(question)
            assert not any(layer.has_dropped for layer in session.cache.layers)
            answers.append(session.step(question[:1]))
            assert all(layer.has_dropped for layer in session.cache.layers)
            session.crop_to(90)
            assert session.cache.get_seq_length() == 90
        assert torch.equal(*answers)
        assert session.audit.take() == []  # what is gone has no mass


def test_a_session_that_drops_before_the_question_reads_the_context_once() -> None:
    model = hf_models.model("llama")
    context, question = hf_models.tokens(1, 90)[0], hf_models.tokens(1, 5, seed=2)[0]
    other = hf_models.tokens(1, 7, seed=3)[0]
    policy = small(SnapKV, evict_at="next_call")
    with Session("evicts", model, policy) as session, torch.no_grad():
        session.prefill(context)
        answers, kept = [], []
        for asked in (question, other, question):
            answers.append(session.step(asked))
            assert all(layer.has_dropped for layer in session.cache.layers)
            session.crop_to(90)
            assert all(layer.has_dropped for layer in session.cache.layers)
            assert session.cache.get_seq_length() == 90
            kept.append([layer.cache.listed().indices for layer in session.cache.layers])
        assert torch.equal(answers[0], answers[2]) and not torch.equal(answers[0], answers[1])
        assert all(torch.equal(a, b) for a, b in zip(kept[0], kept[1]))


@pytest.mark.parametrize(
    "policy",
    [
        small(SnapKV, num_window_queries=8),
        InfLLM(topk_blocks=2, block_size=4, num_recent_tokens=8, q_block_size=16),
        Quest(token_budget=16, page_size=4, dense_layers=()),
    ],
    ids=str,
)
def test_a_prompt_cache_that_is_copied_or_repeated_remembers_the_prompt(policy: Any) -> None:
    """A window of queries, and attention that was received, cannot be computed again."""
    model, ids = hf_models.model("llama"), hf_models.tokens(1, 60)

    def steps(cache: Any, batch: int = 1) -> torch.Tensor:
        new = ids[:, :1].repeat(batch, 1)
        return torch.cat([model(new, past_key_values=cache).logits for _ in range(3)], 1)

    with attach(model, policy), torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(ids, past_key_values=cache)
        copied, repeated = copy.deepcopy(cache), copy.deepcopy(cache)
        repeated.batch_repeat_interleave(2)
        wanted = steps(cache)
        assert torch.equal(steps(copied), wanted)
        for row in steps(repeated, 2):
            assert error(row, wanted[0]) <= EXACT


def test_a_call_without_a_cache_is_dense() -> None:
    model, ids = hf_models.model("llama"), hf_models.tokens(1, 60)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        with attach(model, small(SnapKV)):
            assert error(model(ids, use_cache=False).logits, expected) <= EXACT
