"""Queries and keys of a trained model, and how a sketch ranks them against the keys themselves."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from kvselect.cache import KVCache
from kvselect.eval.checkpoint import Checkpoint
from kvselect.eval.demo import demo_policies
from kvselect.eval.tasks import TASKS, dialect_sample
from kvselect.integrations.hf import attach
from kvselect.policies.base import Policy, PolicyState
from kvselect.policies.token_select import TokenSelect
from kvselect.queries import Queries
from kvselect.rope import Rope
from kvselect.score import score_tokens
from kvselect.selection import Selection, select_tokens
from kvselect.sketch import BLOCK_TOKENS


@dataclass(frozen=True, slots=True)
class Layer:
    """What one attention layer asked and what it could have found; nothing is rotated.

    Attributes
    ----------
    q : Tensor, [num_queries, num_q_heads, head_dim], float32
    k : Tensor, [num_tokens, num_kv_heads, head_dim], float32
    rope : Rope or None
        The layer's rotation, for `num_tokens` positions; None: not known.
    """

    q: Tensor
    k: Tensor
    rope: Rope | None


def capture(checkpoint: Checkpoint, num_tokens: int, *, task: str, seed: int = 0) -> list[Layer]:
    """Layers of the embedded model that has read `num_tokens` and is asked about them.

    The context is read under compact selection: dense attention makes nonsense of the hidden states
    beyond the trained window, hence of the keys of all layers but the first. The queries are those
    of the question words and of the words of the answers.
    """
    calls: list[Tensor] = []

    class Watched(TokenSelect):
        __slots__ = ()

        def select(self, state: PolicyState, queries: Queries, cache: KVCache) -> Selection | None:
            if queries.phase == "decode":
                calls.append(queries.q[0].clone())
            return TokenSelect.select(self, state, queries, cache)

    base: Policy = demo_policies()["TokenSelect compact"]
    watched = Watched(
        **{field.name: getattr(base, field.name) for field in dataclasses.fields(base)}
    )
    sample = dialect_sample(TASKS[task], num_tokens, seed=seed, max_questions=12)
    cache = DynamicCache(config=checkpoint.model.config)
    words = checkpoint.tokenizer.get_vocab()
    with attach(checkpoint.model, watched), torch.inference_mode():
        checkpoint.model(torch.as_tensor(sample.context)[None], past_key_values=cache)
        length = cache.get_seq_length()
        calls.clear()
        for question in sample.questions:
            answer = np.array([words[word] for word in question.answer], np.int64)
            asked = torch.as_tensor(np.concatenate([question.tokens, answer]))
            checkpoint.model(asked[None], past_key_values=cache)
            cache.crop(length - cache.get_seq_length())
    num_layers = len(cache.layers)
    config = checkpoint.model.config
    theta = float(config.rope_parameters["rope_theta"])
    frequencies = theta ** -(torch.arange(0, config.head_dim, 2).float() / config.head_dim)
    rope = Rope.from_frequencies(frequencies, num_tokens)
    return [
        Layer(
            q=torch.cat(calls[index::num_layers]),
            k=layer.keys[0].transpose(0, 1).contiguous(),
            rope=rope,
        )
        for index, layer in enumerate(cache.layers)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """How well a sketch finds the exact top-k: its best ``factor * topk`` against them, by factor.

    Attributes
    ----------
    set_recall : dict
        Share of the exact top-k that was found, mean over queries and KV heads.
    recall : dict
        The same, where a token that ties with the last of the exact top-k counts as one of them. A
        word-level model repeats its words, so in its first layer hundreds of keys are equal, and
        which of them are "the" top-k is decided by their positions alone.
    mass_recall : dict
        Share of the exact top-k's attention mass that was found: what a missed token weighs.
    mass : dict
        Attention mass held by all that was found, mean.
    heaviest_miss : dict
        Largest score that was missed, over the last score of the exact top-k; the worst of all.
    exact_mass : float
        Attention mass held by the exact top-k, mean.
    """

    set_recall: dict[float, float]
    recall: dict[float, float]
    mass_recall: dict[float, float]
    mass: dict[float, float]
    heaviest_miss: dict[float, float]
    exact_mass: float


TIE = 1e-4  # scores closer than this, relatively, tie: equal keys reach them along different roads


def rank(
    layer: Layer, topk: int, *, positions: str | None, sketch: str, factors: tuple[float, ...]
) -> Ranking:
    """Compare the sketch's ranking with the exact one, for every query of a layer.

    Parameters
    ----------
    topk : int
        Of all tokens; no sinks, no window.
    positions : "original", "compact" or None
        As a policy of these positions scores: keys at their places and queries at the last one; or
        keys as they are and queries at a fixed distance of 128. None: neither is rotated.
    """
    num_tokens = layer.k.shape[0] // BLOCK_TOKENS * BLOCK_TOKENS  # every token is in the sketch
    q, k = layer.q, layer.k[:num_tokens]
    if positions is not None:
        assert layer.rope is not None
        q = layer.rope.rotate(q, num_tokens - 1 if positions == "original" else BLOCK_TOKENS)
    if positions == "original":
        assert layer.rope is not None
        k = layer.rope.rotate(k, torch.arange(num_tokens))
    cache = KVCache(1, k.shape[1], k.shape[2], sketch=sketch)
    cache.append(k[None], k[None])
    exact = torch.cat([score_tokens(row[None, None], cache, source="keys") for row in q])
    sketched = torch.cat([score_tokens(row[None, None], cache, source="sketch") for row in q])
    best = _listed(exact, topk, 1.0)
    threshold = torch.where(best, exact, torch.inf).amin(2, keepdim=True)
    near = exact >= threshold * (1 - TIE)
    group_size = q.shape[1] // k.shape[1]

    def held(listed: Tensor) -> float:
        return float((exact * listed).sum(2).mean()) / group_size

    ranking = Ranking(
        set_recall={}, recall={}, mass_recall={}, mass={}, heaviest_miss={}, exact_mass=held(best)
    )
    for factor in factors:
        found = _listed(sketched, topk, factor)
        ranking.set_recall[factor] = float((found & best).sum(2).double().mean()) / topk
        ranking.recall[factor] = float((found & near).sum(2).clamp(max=topk).double().mean()) / topk
        ranking.mass_recall[factor] = held(best & found) / ranking.exact_mass
        ranking.mass[factor] = held(found)
        missed = exact.masked_fill(found, 0.0).amax(2, keepdim=True) / threshold
        ranking.heaviest_miss[factor] = float(missed.max())
    return ranking


def _listed(scores: Tensor, topk: int, overselect: float) -> Tensor:
    """Mask of the tokens that the op picks, of the shape of `scores` [rows, lists, seqlen]."""
    seqlens = torch.full(scores.shape[:1], scores.shape[2], dtype=torch.int32)
    lists = select_tokens(scores, seqlens, topk=topk, overselect=overselect)
    listed = torch.zeros(scores.shape, dtype=torch.int32)
    listed.scatter_add_(2, lists.indices.clamp(min=0).long(), (lists.indices >= 0).int())
    return listed > 0
