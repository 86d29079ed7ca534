"""What each head of each layer chose at some decode steps, and how much attention it paid to it.

`explain` runs an attached model step by step and reads the lists at the attention op itself, so it
shows what was attended to, whatever policy made the lists.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kvselect.checks import require, require_int, require_type
from kvselect.evictable_cache import EvictableKVCache
from kvselect.policies.base import Policy
from kvselect.rope import Rope

__all__ = ["Explanation", "HeadChoice", "LayerChoice", "StepChoice", "explain"]

Span = tuple[int, int]
"""Token positions [begin, end)."""


@dataclass(frozen=True, slots=True, eq=False)
class HeadChoice:
    """What the query heads of one KV head attended to.

    Attributes
    ----------
    positions : Tensor, [num_listed], int64
        Ascending.
    mass : Tensor, [num_listed], float64
        Share of attention that each listed token got, mean over the query heads; sums to 1, or to
        less where the model has sink logits.
    """

    positions: Tensor
    mass: Tensor

    def mass_of(self, span: Span) -> float:
        """What the tokens of ``span`` got."""
        inside = (self.positions >= span[0]) & (self.positions < span[1])
        return float(self.mass[inside].sum())

    def lists(self, span: Span) -> bool:
        """Whether any token of ``span`` is listed."""
        return bool(((self.positions >= span[0]) & (self.positions < span[1])).any())


@dataclass(frozen=True, slots=True, eq=False)
class LayerChoice:
    """One layer's heads at one step.

    Attributes
    ----------
    layer : int
        As the model counts its layers.
    dense : bool
        Everything visible was attended to.
    heads : tuple of HeadChoice
        By KV head.
    """

    layer: int
    dense: bool
    heads: tuple[HeadChoice, ...]

    def head_overlap(self) -> float | None:
        """Mean Jaccard index of two KV heads' lists; None: there is one head."""
        pairs = [
            _jaccard(one.positions, other.positions)
            for place, one in enumerate(self.heads)
            for other in self.heads[place + 1 :]
        ]
        return sum(pairs) / len(pairs) if pairs else None

    def overlap_with(self, earlier: LayerChoice) -> float:
        """Mean Jaccard index of each KV head's list with its list in ``earlier``."""
        pairs = list(zip(self.heads, earlier.heads, strict=True))
        return sum(_jaccard(a.positions, b.positions) for a, b in pairs) / len(pairs)


@dataclass(frozen=True, slots=True, eq=False)
class StepChoice:
    """One decode step.

    Attributes
    ----------
    position : int
        Of the token that asks.
    token, next_token : int
        What was read at ``position``, and what the model finds likeliest behind it.
    layers : tuple of LayerChoice
        Layers that attend through kvselect.
    """

    position: int
    token: int
    next_token: int
    layers: tuple[LayerChoice, ...]

    def token_mass(self) -> Tensor:
        """Share of attention of every visible token, mean over layers and KV heads; [tokens]."""
        mass = torch.zeros(self.position + 1, dtype=torch.float64)
        heads = [head for layer in self.layers for head in layer.heads]
        for head in heads:
            mass.index_add_(0, head.positions, head.mass)
        return mass / max(len(heads), 1)


@dataclass(frozen=True, slots=True, eq=False)
class Explanation:
    """What `explain` found.

    Attributes
    ----------
    tokens : tuple of int
        The prompt and the tokens that were read behind it.
    num_prompt_tokens : int
    steps : tuple of StepChoice
    policy : dict
        As ``Policy.to_dict``.
    """

    tokens: tuple[int, ...]
    num_prompt_tokens: int
    steps: tuple[StepChoice, ...]
    policy: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it; masses with six digits."""
        steps = [
            {
                "position": step.position,
                "token": step.token,
                "next_token": step.next_token,
                "layers": [
                    {
                        "layer": layer.layer,
                        "dense": layer.dense,
                        "heads": [
                            {
                                "positions": head.positions.tolist(),
                                "mass": [round(x, 6) for x in head.mass.tolist()],
                            }
                            for head in layer.heads
                        ],
                    }
                    for layer in step.layers
                ],
            }
            for step in self.steps
        ]
        return {
            "format": "kvselect-explanation-1",
            "policy": self.policy,
            "tokens": list(self.tokens),
            "num_prompt_tokens": self.num_prompt_tokens,
            "steps": steps,
        }


def explain(
    model: Any,
    policy: Policy,
    input_ids: Tensor,
    *,
    num_steps: int = 1,
    forced: Sequence[int] = (),
) -> Explanation:
    """Which tokens each head attends to at the end of a prompt, and at the steps that follow.

    Parameters
    ----------
    model : PreTrainedModel
        Not attached; it is as it was afterwards.
    policy : Policy
    input_ids : Tensor, [1, num_tokens] or [num_tokens], integer
        At least 2 tokens. All but the last are prefilled; the last one asks first.
    num_steps : int
        Decode steps to look at: each reads the token that the step before found likeliest.
    forced : sequence of int
        Tokens to read instead, the first ones; the rest is as above.

    Raises
    ------
    ValueError, TypeError, UnsupportedModelError
        If an argument is none of these, the model is attached already, or cannot be, or no layer of
        it selects.

    Notes
    -----
    Weights are computed anew in float64 from the keys that the op read, rotated (in float32) to the
    rank in their list where positions are compact. Where a policy dropped tokens, what remains is
    shown, and a model's sink logits are left out of the shares. Memory: the lists and one float64
    per entry.
    """
    from kvselect.integrations.hf import attach

    require_type(input_ids, Tensor, "input_ids", "an integer Tensor")
    ids = input_ids[None] if input_ids.ndim == 1 else input_ids
    one_prompt = ids.ndim == 2 and ids.shape[0] == 1 and ids.shape[1] >= 2
    require(one_prompt, "input_ids", tuple(input_ids.shape), "one prompt of at least 2 tokens")
    require(not ids.is_floating_point(), "input_ids", ids.dtype, "integers")
    require_int(num_steps, "num_steps", 1)
    allowed = "others (what lies before a stingy window never reaches the op)"
    require(policy.positions != "stingy", "policy.positions", policy.positions, allowed)
    ids = ids.to(model.device)
    steps: list[StepChoice] = []
    read = [int(token) for token in ids[0]]
    with attach(model, policy, break_even="off") as handle, torch.inference_mode():
        selecting = [layer.index for layer in handle.report().layers if layer.selects]
        allowed = "at least one that selects (see handle.report())"
        require(bool(selecting), "layers of the policy", 0, allowed)
        cache = model(ids[:, :-1], use_cache=True, logits_to_keep=1).past_key_values
        for number in range(num_steps):
            with _ListWatch() as watch:
                logits = model(ids[:, -1:], past_key_values=cache).logits
            calls = len(watch.found) // len(selecting)
            allowed = f"as many for each of the {len(selecting)} layers that select"
            whole = calls >= 1 and len(watch.found) == calls * len(selecting)
            require(whole, "attention calls", len(watch.found), allowed)
            layers = tuple(
                _layer_choice(
                    index,
                    watch.found[place * calls : (place + 1) * calls],
                    _remaining(cache.layers[index]),
                )
                for place, index in enumerate(selecting)
            )
            likeliest = int(logits[0, -1].argmax())
            steps.append(StepChoice(len(read) - 1, read[-1], likeliest, layers))
            following = forced[number] if number < len(forced) else likeliest
            if number + 1 < num_steps:
                read.append(int(following))
                ids = torch.tensor([[following]], device=model.device)
    return Explanation(
        tokens=tuple(read),
        num_prompt_tokens=input_ids.shape[-1],
        steps=tuple(steps),
        policy=policy.to_dict(),
    )


class _HeadLogits(NamedTuple):
    """What one attention call read for a KV head, before the softmax."""

    positions: Tensor  # [num_listed], ascending
    logits: Tensor  # [group_size, num_listed] float64
    sinks: Tensor | None  # [group_size] float64: one more logit each


class _Call(NamedTuple):
    """One attention call of one query."""

    dense: bool
    heads: list[_HeadLogits]


def _remaining(layer: Any) -> Tensor | None:
    """Positions of what an evicted cache layer holds, [num_kv_heads, width]; None: of no such."""
    cache = getattr(layer, "cache", None)
    if not isinstance(cache, EvictableKVCache) or cache.rows is None:
        return None
    return cache.listed().indices[0]


def _layer_choice(layer: int, calls: list[_Call], remaining: Tensor | None) -> LayerChoice:
    """What a layer attended to by one call, or by several over parts of its list.

    ``remaining``: positions of the places that calls on an evicted cache name.
    """
    heads = []
    for head, parts in enumerate(zip(*(call.heads for call in calls))):
        positions, order = torch.cat([part.positions for part in parts]).sort()
        if remaining is not None:
            positions = remaining[head, positions].long()
        logits = torch.cat([part.logits for part in parts], -1)[:, order]
        lse = logits.logsumexp(-1)
        for part in parts:
            if part.sinks is not None:
                lse = lse.logaddexp(part.sinks)
        mass = (logits - lse[:, None]).exp().mean(0)
        heads.append(HeadChoice(positions.cpu(), mass.cpu()))
    dense = remaining is None and all(call.dense for call in calls)
    return LayerChoice(layer, dense, tuple(heads))


class _ListWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While entered: what every call of `sparse_attention` of one query attends to."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[_Call] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.kvselect.sparse_attention.default:
            named = {x.name: value for x, value in zip(func._schema.arguments, args)}
            self.found.append(_Call(named["indices"] is None, _choices(named)))
        return func(*args, **(kwargs or {}))


def _choices(call: dict[str, Any]) -> list[_HeadLogits]:
    """What each KV head of a call of one query attends to.

    A call has one row, or, on an evicted cache, one of a single head for every KV head.
    """
    q, keys = call["q"], call["k_cache"]
    num_kv_heads = keys.shape[2]
    group_size = q.shape[2] // num_kv_heads
    rope = None
    if call["cos"] is not None:
        rope = Rope(
            call["cos"], call["sin"], start=call["rope_start"], interleaved=call["rope_interleaved"]
        )
    found = []
    for row, head in product(range(q.shape[0]), range(num_kv_heads)):
        seqlen = int(call["cache_seqlens"][row])
        start = 0 if call["starts"] is None else int(call["starts"][row])
        if call["indices"] is None:
            positions = torch.arange(start, seqlen, device=q.device)
        else:
            count = int(call["topk_length"][row, 0, head])
            positions = call["indices"][row, 0, head, :count].long()
        k = _stored_keys(call, row, positions, head).double()
        own = q[row, 0, head * group_size : (head + 1) * group_size].double()
        if rope is not None:
            places = torch.arange(len(positions), device=q.device)
            k = rope.rotate(k[:, None], places)[:, 0].double()
            own = rope.rotate(own, int((positions < seqlen - 1).sum())).double()
        logits = call["softmax_scale"] * (own @ k.mT)
        if softcap := call.get("softcap", 0.0):
            logits = softcap * (logits / softcap).tanh()
        sinks = None
        if call.get("sink_logits") is not None:
            sinks = call["sink_logits"][head * group_size : (head + 1) * group_size].double()
        found.append(_HeadLogits(positions, logits, sinks))
    return found


def _stored_keys(call: dict[str, Any], row: int, positions: Tensor, head: int) -> Tensor:
    """Keys of a row at ``positions``, [n, head_dim]."""
    keys, table = call["k_cache"], call["block_table"]
    stored: Tensor
    if table is None:
        stored = keys[row, positions, head]
        return stored
    page = table[row, positions // keys.shape[1]].long()
    stored = keys[page, positions % keys.shape[1], head]
    return stored


def _jaccard(one: Tensor, other: Tensor) -> float:
    """Of two ascending lists without repeats; 1 where both are empty."""
    shared = int(torch.isin(one, other).sum())
    union = len(one) + len(other) - shared
    return shared / union if union else 1.0
