"""The embedded model: plain transformers loads it, it retrieves, and selection serves it well.

Contexts are few: these are regressions with wide margins, and bench/retrieval.py makes the claims.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from kvselect.eval import runner
from kvselect.eval.checkpoint import EMBEDDED, Checkpoint, embedded_model_path, load_checkpoint
from kvselect.eval.demo import demo_policies
from kvselect.eval.results import Cell, Length
from kvselect.eval.tasks import TASKS, dialect, dialect_sample
from kvselect.eval.trained_keys import capture, rank
from kvselect.policies import soft_vote
from kvselect.policies.base import Policy
from kvselect.policies.scoring_vectors import BlockVectors
from kvselect.policies.token_select import TokenSelect
from kvselect.queries import Queries

WINDOW = 512


@cache
def checkpoint() -> Checkpoint:
    return load_checkpoint(EMBEDDED)


def run(policies: dict[str, Policy], task: str, length: int, samples: int) -> dict[str, Cell]:
    request = runner.Request(
        tasks=(TASKS[task],),
        lengths=(Length(label="x", tokens=length),),
        policies=policies,
        samples=samples,
        timed_steps=1,
        seed=7,
    )
    return {cell.policy: cell for cell in runner.run(checkpoint(), request).cells}


# ---- the files


def test_plain_transformers_loads_and_generates() -> None:
    path = embedded_model_path()
    model = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert isinstance(model, LlamaForCausalLM) and model.dtype == torch.float32
    assert tokenizer.get_vocab() == {w: i for i, w in enumerate(dialect.vocabulary())}
    text = "<bos> n3 n1 SET k5 v7 v8 n2 n2 n9 SET k6 v1 v2 n4 n5 GET k5"
    inputs = tokenizer(text, return_tensors="pt")
    assert tokenizer.decode(inputs.input_ids[0]) == text
    out = model.generate(**inputs, max_new_tokens=2)
    assert tokenizer.decode(out[0, inputs.input_ids.shape[1] :]) == "v7 v8"


# ---- retrieval


@pytest.mark.parametrize("task", ["niah_single", "niah_multikey", "niah_pairkey", "chain", "vt"])
def test_selection_loses_nothing_inside_the_window(task: str) -> None:
    samples = 8 if task == "niah_single" else 64
    cells = run(demo_policies(), task, WINDOW, samples)
    assert cells["Dense"].score >= 0.98
    for name in ("TokenSelect original", "TokenSelect compact"):
        assert abs(cells[name].score - cells["Dense"].score) <= 0.005
        assert cells[name].tokens_attended < WINDOW / 2
    assert cells["StreamingLLM"].score < 0.7


def test_stock_attention_retrieves_inside_the_window() -> None:
    """Without any part of kvselect: the figure does not depend on our own dense attention."""
    right = total = 0
    for index in range(2):
        sample = dialect_sample(TASKS["niah_multikey"], WINDOW, seed=5, index=index)
        rows = [np.concatenate([sample.context, q.tokens]) for q in sample.questions]
        tokens = torch.as_tensor(np.stack(rows))
        with torch.inference_mode():
            out = checkpoint().model.generate(tokens, max_new_tokens=2, pad_token_id=0)
        for question, row in zip(sample.questions, out[:, tokens.shape[1] :], strict=True):
            words = checkpoint().tokenizer.convert_ids_to_tokens(row.tolist())
            right += words == list(question.answer)
            total += 1
    assert total == 64 and right / total >= 0.95


@pytest.mark.parametrize("task", ["niah_multikey", "vt"])
def test_compact_selection_retrieves_where_dense_cannot(task: str) -> None:
    policies = demo_policies()
    names = ("Dense", "TokenSelect compact")
    cells = run({name: policies[name] for name in names}, task, 8 * WINDOW, 30)
    assert cells["TokenSelect compact"].score >= 0.95
    assert cells["Dense"].score <= 0.3
    assert cells["TokenSelect compact"].bytes_ratio < 0.2


# ---- selection quality at a small budget: 52 tokens of 512


SMALL: dict[str, Any] = {
    "topk": 16,
    "num_sink_tokens": 4,
    "num_recent_tokens": 32,
    "q_block_size": 32,
    "num_tail_tokens": 0,
    "max_age": 32,
    "sketch": None,
    "overselect": 1.0,
    "positions": "compact",
    "dense_below_tokens": 0,
}
UNROTATED: dict[str, Any] = {**SMALL, "scope": "layer", "aggregate": "mean"}


class Unrotated(TokenSelect):
    """Candidates meet the query without any rotation, as in the runs that set the bars below.

    On this model the shipped rule (a fixed distance of ``num_recent_tokens``) is so much stronger
    that variable tracking does not notice either of the faults: it stays at .97 and above.
    """

    __slots__ = ()

    def _scoring_vectors(self, *arguments: Any) -> list[BlockVectors]:
        queries: Queries = arguments[0]
        assert queries.rope is not None
        parts = TokenSelect._scoring_vectors(self, *arguments)
        return [
            part._replace(q=queries.rope.unrotate(part.q, self.num_recent_tokens).contiguous())
            for part in parts
        ]


def meet_wrong_keys(parts: list[BlockVectors], num_kv_heads: int) -> list[BlockVectors]:
    """The published head map: query head h votes with the keys of KV head h % num_kv_heads."""
    num_q_heads = parts[0].q.shape[3]
    order = [h for g in range(num_kv_heads) for h in range(g, num_q_heads, num_kv_heads)]

    def turned(vectors: Tensor | None) -> Tensor | None:
        return None if vectors is None else vectors[:, :, :, order].contiguous()

    return [part._replace(q=turned(part.q), q_local=turned(part.q_local)) for part in parts]


class WrongHeadMap(TokenSelect):
    __slots__ = ()

    def _scoring_vectors(self, *arguments: Any) -> list[BlockVectors]:
        parts = TokenSelect._scoring_vectors(self, *arguments)
        return meet_wrong_keys(parts, arguments[1].num_kv_heads)


class UnrotatedWrongHeadMap(Unrotated):
    __slots__ = ()

    def _scoring_vectors(self, *arguments: Any) -> list[BlockVectors]:
        parts = Unrotated._scoring_vectors(self, *arguments)
        return meet_wrong_keys(parts, arguments[1].num_kv_heads)


def raw_logits(q: Tensor, kv_cache: Any, *, max_seqlen: int, **rest: Any) -> tuple[Tensor, Tensor]:
    """In the place of `score_blocks`: logits are added up as they are, no softmax, no shares."""
    keys = kv_cache.k[:, :max_seqlen].float()
    grouped = q.unflatten(3, (kv_cache.num_kv_heads, -1))  # type: ignore[no-untyped-call]
    scores = rest["scale"] * torch.einsum("bnvghd,bsgd->bngs", grouped, keys)
    return scores.contiguous(), torch.zeros(scores.shape[:3], dtype=torch.int64)


def small_budget(
    monkeypatch: pytest.MonkeyPatch, policy: TokenSelect, *, raw: bool = False
) -> Cell:
    with monkeypatch.context() as patched:
        if raw:
            patched.setattr(soft_vote, "score_blocks", raw_logits)
        return run({"policy": policy}, "vt", WINDOW, 120)["policy"]


def test_variable_tracking_at_a_small_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """The classical setting: topk 16, 4 sinks, 32 recent, blocks of 32 queries, one mean query."""
    assert small_budget(monkeypatch, Unrotated(**UNROTATED)).score >= 0.92
    assert small_budget(monkeypatch, UnrotatedWrongHeadMap(**UNROTATED)).score <= 0.87
    assert small_budget(monkeypatch, Unrotated(**UNROTATED), raw=True).score <= 0.6


def test_the_shipped_scoring_at_a_small_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """The task forgives the faults here; the attention mass that a selection keeps does not."""
    right = small_budget(monkeypatch, TokenSelect(**SMALL))
    wrong_map = small_budget(monkeypatch, WrongHeadMap(**SMALL))
    raw = small_budget(monkeypatch, TokenSelect(**SMALL), raw=True)
    assert right.score >= 0.98
    assert right.kept_mass is not None
    for wrong in (wrong_map, raw):
        assert wrong.kept_mass is not None and wrong.kept_mass < right.kept_mass - 0.008


# ---- the sketch on this model's own keys


class Bar(NamedTuple):
    recall: float
    mass_recall: float


@pytest.mark.parametrize(
    ("positions", "bar"),
    # Compact positions: layers 1 and 2 put .5 to .8 of their mass on a few tokens, so that the last
    # of the top-k lie in a noise floor of near ties; what is missed there weighs nothing. Layer 0
    # scores words without context: equal words tie, in groups.
    [("original", Bar(0.995, 0.999)), ("compact", Bar(0.945, 0.99))],
)
def test_int4_ranks_trained_keys(positions: str, bar: Bar) -> None:
    layers = capture(checkpoint(), 4096, task="niah_multikey", seed=2)
    topk = 4096 // 16
    for layer in layers:
        ranking = rank(layer, topk, positions=positions, sketch="int4", factors=(1.25, 1.5))
        assert ranking.mass[1.25] >= ranking.exact_mass
        assert ranking.recall[1.5] >= bar.recall
        assert ranking.mass_recall[1.5] >= bar.mass_recall
    assert len(layers) == 4


def test_int8_ranks_trained_keys() -> None:
    for layer in capture(checkpoint(), 2048, task="vt", seed=2):
        ranking = rank(layer, 128, positions="compact", sketch="int8", factors=(1.0, 1.25))
        assert ranking.recall[1.25] >= 0.995 and ranking.mass_recall[1.0] >= 0.96


def test_captured_keys_are_those_of_the_model() -> None:
    """Layer 0's keys do not depend on what was attended to."""
    layers = capture(checkpoint(), 700, task="vt", seed=2)
    sample = dialect_sample(TASKS["vt"], 700, seed=2, max_questions=12)
    model = checkpoint().model
    with torch.no_grad():
        first = model.model.layers[0]
        states = first.input_layernorm(model.model.embed_tokens(torch.as_tensor(sample.context)))
        keys = first.self_attn.k_proj(states).view(-1, 2, 64)
    assert torch.allclose(layers[0].k, keys, atol=1e-5)
    assert layers[0].q.shape == (12 * 3, 4, 64)
