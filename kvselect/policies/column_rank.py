"""ColumnRank: keep tokens that a walk along the prompt's own attention visits (AIM, 2412.03248)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvselect.checks import require, require_float, require_int
from kvselect.policies.base import register_policy
from kvselect.policies.budgets import share_out
from kvselect.policies.eviction import EvictionPolicy, Prompt, Span, best

__all__ = ["ColumnRank", "visits"]

_ROWS_AT_ONCE = 512  # of a head's matrix
_HELD_FLOATS = 1 << 26  # of it that are held from step to step; the others are computed anew


@register_policy
@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnRank(EvictionPolicy):
    """Evict what the prompt's tokens, as queries, do not lead to.

    Per query head ``M = softmax(logits / temperature)``, causal, over sinks and span; ``x`` is
    ``1 / n``, then ``num_steps`` times ``(1 - damping) * x M + damping / n``. Tokens of the span
    are ranked by the root mean square of ``x`` over the query heads of their KV head.

    Parameters
    ----------
    num_steps : int
    damping : float in [0, 1]
        Share of every step that starts anew at a token drawn evenly. Upstream's 0 lets all mass
        drift to the first tokens, which no causal row leaves.
    temperature : float > 0
    topk, ratio, span, num_sink_tokens, num_recent_tokens, num_window_queries
        See `EvictionPolicy`.

    Raises
    ------
    ValueError, TypeError
        If a setting is out of bounds, or tokens are to be dropped of a prompt whose queries did
        not all go through the policy.

    Notes
    -----
    Source: Zhong et al., AIM, arXiv:2412.03248, which has one ranking for all heads of a layer.
    The queries of the whole prompt are kept until tokens are dropped: ``group_size`` times the
    memory of its keys. The sinks take part in the walk, so that its mass drifts there and not to
    the span's first token, and are not ranked. Of a head's ``n ** 2 / 2`` weights at most 2**26 are
    held (256 MB); of a prompt longer than some 11 000 tokens each step computes the rest anew.
    """

    query_aware: ClassVar[bool] = False
    watches_whole_prompt: ClassVar[bool] = True

    num_steps: int = 5
    damping: float = 0.15
    temperature: float = 0.1

    def __post_init__(self) -> None:
        EvictionPolicy.__post_init__(self)
        require_int(self.num_steps, "num_steps", 1)
        damping = require_float(self.damping, "damping", "a float in [0, 1]")
        require(0.0 <= damping <= 1.0, "damping", damping, "a float in [0, 1]")
        temperature = require_float(self.temperature, "temperature", "a float > 0")
        require(temperature > 0.0, "temperature", temperature, "a float > 0")

    @classmethod
    def at_budget(cls, budget: int) -> ColumnRank:
        sinks, recent, picked = share_out(budget)
        return cls(topk=picked, num_sink_tokens=sinks, num_recent_tokens=recent)

    def extra_bytes(self, num_tokens: int, **sizes: int) -> tuple[int, int]:
        remembered, momentary = super(ColumnRank, self).extra_bytes(num_tokens, **sizes)
        queries = num_tokens * sizes["num_q_heads"] * sizes["head_dim"]
        rows = 4 * min(_ROWS_AT_ONCE, num_tokens) * num_tokens  # logits, mask, weights of a block
        held = min(_HELD_FLOATS, num_tokens * (num_tokens + _ROWS_AT_ONCE) // 2)
        momentary += 4 * (held + rows + queries)  # queries in float32
        return remembered + queries * sizes["itemsize"], momentary

    def choose(self, span: Span, budget: int) -> Tensor:
        assert span.prompt is not None
        found = visits(span.prompt, self.num_steps, self.damping, self.temperature)
        return best(found[:, span.prompt.num_sinks :], budget)


def visits(prompt: Prompt, num_steps: int, damping: float, temperature: float) -> Tensor:
    """How often the walk is at each token of the prompt, [num_kv_heads, num_tokens]: root mean
    square over the query heads of the KV head; the visits of one query head add up to 1."""
    num_tokens = prompt.keys.shape[1]
    found = torch.zeros_like(prompt.keys[..., 0])
    for head, queries in enumerate(prompt.queries):
        for q in queries:
            held: dict[int, Tensor] = {}
            x = found.new_full((num_tokens,), 1.0 / num_tokens)
            for _ in range(num_steps):
                after = torch.full_like(x, damping / num_tokens)
                for begin, rows in _blocks(prompt, head, q, temperature, held):
                    end = rows.shape[1]
                    after[:end] += (1.0 - damping) * (x[begin:end] @ rows)
                x = after
            found[head] += x.square() / queries.shape[0]
    return found.sqrt()


def _blocks(
    prompt: Prompt, head: int, q: Tensor, temperature: float, held: dict[int, Tensor]
) -> Iterator[tuple[int, Tensor]]:
    """First row of each block of a head's matrix and its rows, up to the last one's token."""
    num_tokens, num_held = q.shape[0], sum(rows.numel() for rows in held.values())
    for begin in range(0, num_tokens, _ROWS_AT_ONCE):
        rows = held.get(begin)
        if rows is None:
            end = min(begin + _ROWS_AT_ONCE, num_tokens)
            logits = prompt.logits(q[begin:end], prompt.keys[head, :end]) / temperature
            later = torch.ones_like(logits, dtype=torch.bool).triu_(begin + 1)
            rows = logits.masked_fill_(later, -torch.inf).softmax(1)
            if num_held + rows.numel() <= _HELD_FLOATS:
                held[begin] = rows
                num_held += rows.numel()
        yield begin, rows
