"""Decode steps to replay: what a trained model asked, and queries that drift over drawn keys."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from kvselect.cache import KVCache
from kvselect.checks import require, require_choice
from kvselect.eval.checkpoint import Checkpoint
from kvselect.eval.demo import demo_policies
from kvselect.eval.dump import LayerDump
from kvselect.eval.tasks import TASKS, dialect_sample
from kvselect.integrations.hf import attach
from kvselect.policies.base import PolicyState
from kvselect.policies.token_select import TokenSelect
from kvselect.queries import Queries
from kvselect.rope import Rope
from kvselect.testing import structured_keys

__all__ = ["Steps", "captured_steps", "drifting_steps", "trained_steps"]

RANKS = 4096  # positions of a rotation by rank, more than any list has

LOGIT_STD = 2.2  # of the structured queries, METHODS 5.2 (a)


@dataclass(frozen=True, slots=True)
class Steps:
    """Decode steps of one layer: step ``t`` appends token ``num_context + t``, then asks ``q[t]``.

    Attributes
    ----------
    q : Tensor, [num_steps, num_q_heads, head_dim]
    k, v : Tensor, [num_context + num_steps, num_kv_heads, head_dim]
    rope : Rope or None
        Given: nothing is rotated yet, positions are compact.
    q_unrotated : Tensor of the shape of ``q``, or None
        Queries before RoPE where ``q`` and ``k`` are rotated; None: they carry no rotation.
    softmax_scale : float or None
        None: ``head_dim ** -0.5``.
    softcap : float
        0: none.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    rope: Rope | None
    q_unrotated: Tensor | None = None
    softmax_scale: float | None = None
    softcap: float = 0.0

    @property
    def num_context(self) -> int:
        return self.k.shape[0] - self.q.shape[0]

    def cosines(self) -> float:
        """Mean cosine of a head's consecutive queries."""
        q = self.q.float()
        return float(torch.cosine_similarity(q[1:], q[:-1], dim=-1).mean())


def captured_steps(layer: LayerDump, positions: str) -> Steps:
    """The decode steps of a dump, for policies of "original" or "compact" positions.

    Raises
    ------
    ValueError
        If the layer has sink logits, or no rotation that positions could replace.
    """
    require_choice(positions, "positions", ("original", "compact"))
    require(layer.sink_logits is None, "sink_logits", "a tensor", "None")
    room = layer.v.shape[-1]  # narrow heads are stored filled up

    def wide(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (0, room - x.shape[-1]))

    if positions == "original":
        unrotated = None if layer.rope is None else wide(layer.q_unrotated)
        q, k, rope = layer.q, layer.k, layer.rope
    else:
        allowed = "a layer with rotation (positions='compact')"
        require(layer.rope is not None, "rope", None, allowed)
        assert layer.rope is not None and layer.rope.inv_freq is not None
        q, k, unrotated = layer.q_unrotated, layer.k_unrotated, None
        rope = Rope.from_frequencies(
            layer.rope.inv_freq,
            RANKS,
            scaling=layer.rope.scaling,
            start=layer.rope.start,
            interleaved=layer.rope.interleaved,
        )
    return Steps(
        wide(q),
        wide(k),
        layer.v,
        rope,
        q_unrotated=unrotated,
        softmax_scale=layer.softmax_scale,
        softcap=layer.softcap,
    )


def trained_steps(
    checkpoint: Checkpoint, num_tokens: int, task: str, num_steps: int
) -> list[Steps]:
    """The embedded model reads a context and is asked about it, one token at a time, nothing
    forgotten: questions and right answers follow each other as in a conversation."""
    calls: list[tuple[Tensor, Rope | None]] = []
    base: Any = demo_policies()["TokenSelect compact"]

    class Watched(TokenSelect):
        __slots__ = ()

        def select(self, state: PolicyState, queries: Queries, cache: KVCache) -> Any:
            if queries.phase == "decode":
                calls.append((queries.q[0, 0].clone(), queries.rope))
            return TokenSelect.select(self, state, queries, cache)

    watched = Watched(
        **{field.name: getattr(base, field.name) for field in dataclasses.fields(base)}
    )
    words = checkpoint.tokenizer.get_vocab()
    asked: list[int] = []
    sample = dialect_sample(TASKS[task], num_tokens, seed=1, max_questions=128)
    for question in sample.questions:
        asked += [*question.tokens, *(words[word] for word in question.answer)]
    if len(asked) < num_steps:
        raise SystemExit(f"steps: got {num_steps}, allowed: at most {len(asked)} (the questions)")
    cache = DynamicCache(config=checkpoint.model.config)
    with attach(checkpoint.model, watched, break_even="off"), torch.inference_mode():
        checkpoint.model(torch.as_tensor(np.asarray(sample.context))[None], past_key_values=cache)
        calls.clear()
        for token in asked[:num_steps]:
            checkpoint.model(torch.tensor([[token]]), past_key_values=cache)
    num_layers = len(cache.layers)
    rope = calls[0][1]
    assert rope is not None  # positions are compact
    return [
        Steps(
            torch.stack([q for q, _ in calls[index::num_layers]]),
            layer.keys[0].transpose(0, 1).contiguous(),
            layer.values[0].transpose(0, 1).contiguous(),
            rope,
        )
        for index, layer in enumerate(cache.layers)
    ]


def drifting_steps(
    num_q_heads: int, num_kv_heads: int, head_dim: int, num_context: int, num_steps: int, rho: float
) -> Steps:
    """Structured keys, un-rotated, and queries that walk: the noise is a difference of two random
    keys, scaled to the same deviation of the logits, so that later queries are like the first."""
    num_tokens, group = num_context + num_steps, num_q_heads // num_kv_heads
    q, k = structured_keys(num_tokens, num_kv_heads, group, head_dim, rotated=False)
    generator = torch.Generator().manual_seed(1)
    some = torch.randint(num_tokens, (4096,), generator=generator)
    sampled = k[some].repeat_interleave(group, dim=1)  # [4096, num_q_heads, head_dim]

    def scaled(query: Tensor) -> Tensor:
        logits = torch.einsum("hd,thd->ht", query, sampled) * head_dim**-0.5
        return query * (LOGIT_STD / logits.std(-1, keepdim=True))

    walk = [scaled(q)]
    for _ in range(num_steps - 1):
        one, other = torch.randint(4096, (2, num_q_heads), generator=generator)
        heads = torch.arange(num_q_heads)
        noise, minus = sampled[one, heads], sampled[other, heads]
        noise = torch.where(noise == minus, noise, noise - minus)  # the same token twice: no zeros
        noise = scaled(noise)
        walk.append(scaled(rho * walk[-1] + (1 - rho**2) ** 0.5 * noise))
    v = torch.randn(k.shape, generator=generator)
    return Steps(torch.stack(walk).bfloat16(), k.bfloat16(), v.bfloat16(), None)
