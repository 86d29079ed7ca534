"""Prompts that begin alike, read once: what `Handle.share_prefixes` gives to ``generate``."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from kvselect.cache import KVCache
from kvselect.checks import require, require_int, require_type
from kvselect.integrations.hf.cache_layer import KVSelectLayer
from kvselect.integrations.hf.plan import StackPlan
from kvselect.integrations.hf.prefix_attention import require_shareable
from kvselect.integrations.hf.prefix_layer import KVSelectPrefixLayer
from kvselect.integrations.hf.rotations import frequencies_change
from kvselect.integrations.hf.stack import execution_device
from kvselect.integrations.hf.upgrade_cache import empty_cache
from kvselect.prefix_groups import PrefixGroups
from kvselect.prefix_plan import PrefixPlan, plan_prefixes

ReadPrefixes = dict[tuple[int, ...], list[KVCache]]
"""By the prefix's tokens: its keys and values in every layer."""


class SharedPrompts(Mapping[str, Any]):
    """Arguments of ``model.generate`` for prompts whose common prefixes are read already.

    Columns are ``[nothing, prefix, padding, a prompt's own tokens]``, every prefix ending where
    the longest does; the cache holds the columns before that place.

    Attributes
    ----------
    input_ids, attention_mask : Tensor, [num_prompts, num_columns], int64
    past_key_values : Cache
        For one ``generate``; ``crop`` it back to go on from the prefixes once more.
    plan : PrefixPlan
        Who shares what, and what that saves.
    """

    def __init__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        past_key_values: Cache,
        plan: PrefixPlan,
        read: ReadPrefixes,
        model: PreTrainedModel,
    ) -> None:
        self.input_ids = input_ids
        self.attention_mask = attention_mask
        self.past_key_values = past_key_values
        self.plan = plan
        self._read = read
        self._model = weakref.ref(model)

    @property
    def num_columns(self) -> int:
        """Of the prompts: where new tokens begin in what ``generate`` returns."""
        return self.input_ids.shape[1]

    def __getitem__(self, name: str) -> Any:
        if name not in ("input_ids", "attention_mask", "past_key_values"):
            raise KeyError(name)
        return getattr(self, name)

    def __iter__(self) -> Iterator[str]:
        return iter(("input_ids", "attention_mask", "past_key_values"))

    def __len__(self) -> int:
        return 3

    def __repr__(self) -> str:
        shared = sum(group.num_tokens > 0 for group in self.plan.groups)
        return (
            f"<SharedPrompts: {len(self.input_ids)} prompts, {shared} shared prefixes, "
            f"{self.plan.saving:.1%} of the prompts' tokens saved>"
        )


def share_prefixes(
    model: PreTrainedModel,
    stack_plan: StackPlan,
    prompts: Sequence[Sequence[int] | Tensor],
    plan: PrefixPlan | None,
    pad_token_id: int | None,
    known: SharedPrompts | None,
) -> SharedPrompts:
    """See `Handle.share_prefixes`."""
    require_shareable(stack_plan)
    _require_full_attention(model, stack_plan)
    require_type(prompts, Iterable, "prompts", "a sequence of prompts, each of token ids")
    embeddings: Any = model.get_input_embeddings()
    ids = [
        _tokens(prompt, number, embeddings.num_embeddings) for number, prompt in enumerate(prompts)
    ]
    require(len(ids) > 0, "prompts", [], "a prompt or more")
    _require_one_rotation(model, stack_plan, max(map(len, ids)))
    if plan is None:
        plan = plan_prefixes(ids)
    _require_plan(plan, ids)
    if pad_token_id is None:
        settings: Any = getattr(model, "generation_config", None)
        pad_token_id = getattr(settings, "pad_token_id", None) or 0
    allowed = f"an int in 0..{embeddings.num_embeddings - 1}, a token id"
    require_int(pad_token_id, "pad_token_id", 0, allowed)
    require(pad_token_id < embeddings.num_embeddings, "pad_token_id", pad_token_id, allowed)

    require_type(known, (SharedPrompts, type(None)), "known", "None or what share_prefixes gave")
    read: ReadPrefixes = {}
    if known is not None:
        same = known._model() is model
        require(same, "known", "prefixes that another model read", "those of this model")
        read = known._read
    needed: ReadPrefixes = {}
    rows = [-1] * len(ids)
    for group in plan.groups:
        prefix = tuple(ids[group.members[0]][: group.num_tokens])
        if not prefix:
            continue
        if prefix not in needed:  # two groups may have the same one
            needed[prefix] = read.get(prefix) or _read_prefix(stack_plan, prefix)
        for member in group.members:
            rows[member] = list(needed).index(prefix)
    cache = empty_cache(stack_plan)
    for index in range(len(cache.layers)):
        cache.layers[index] = KVSelectPrefixLayer(
            PrefixGroups([layers[index] for layers in needed.values()], rows)
        )
    lengths = [len(prefix) for prefix in needed]
    input_ids, mask = _columns(ids, [lengths[row] if row >= 0 else 0 for row in rows], pad_token_id)
    device = model.device
    return SharedPrompts(input_ids.to(device), mask.to(device), cache, plan, needed, model)


def _tokens(prompt: Sequence[int] | Tensor, number: int, vocabulary: int) -> list[int]:
    name, allowed = f"prompts[{number}]", "token ids: a list of ints or a 1-D integer tensor"
    if isinstance(prompt, Tensor):
        integers = prompt.ndim == 1 and not prompt.is_floating_point()
        require(integers, name, f"{prompt.dtype} {list(prompt.shape)}", allowed)
        prompt = prompt.tolist()
    require_type(prompt, (list, tuple), name, allowed)
    for token in prompt:
        require_type(token, int, name, allowed)
        require(0 <= token < vocabulary, name, f"token {token}", f"ids in 0..{vocabulary - 1}")
    require(len(prompt) > 0, name, [], "a token or more")
    return list(prompt)


def _require_one_rotation(model: PreTrainedModel, plan: StackPlan, longest: int) -> None:
    """A prefix read by itself is rotated as a context of its own length is."""
    fits = longest <= plan.trained_length or not frequencies_change(model)
    allowed = (
        f"at most {plan.trained_length} tokens (the model rotates longer contexts otherwise than "
        "the prefix by itself)"
    )
    require(fits, "longest prompt", longest, allowed)


def _require_plan(plan: object, prompts: list[list[int]]) -> None:
    """Every prompt in one group, and longer than the prefix that it has in common with it."""
    require_type(plan, PrefixPlan, "plan", "a PrefixPlan (kvselect.plan_prefixes)")
    assert isinstance(plan, PrefixPlan)
    members = sorted(member for group in plan.groups for member in group.members)
    allowed = f"every prompt of 0..{len(prompts) - 1} in one group"
    require(members == list(range(len(prompts))), "plan", f"prompts {members}", allowed)
    for group in plan.groups:
        prefix = prompts[group.members[0]][: group.num_tokens]
        for member in group.members:
            prompt = prompts[member]
            fits = len(prompt) > group.num_tokens and prompt[: group.num_tokens] == prefix
            allowed = f"prompts that begin as prompt {group.members[0]} does, and go on"
            got = f"a shared prefix of {group.num_tokens} tokens for prompt {member}"
            require(fits, "plan", got, allowed)


def _require_full_attention(model: PreTrainedModel, plan: StackPlan) -> None:
    """Refuse models with layers whose prefix is not keys and values of every token.

    Raises
    ------
    ValueError
        Naming these layers.
    """
    names = {index: type(x).__name__ for index, x in enumerate(empty_cache(plan).layers)}
    bad = [f"{index}: {name}" for index, name in names.items() if name != KVSelectLayer.__name__]
    bad += [
        f"{layer.index}: keys of layer {layer.source}"
        for layer in plan.layers
        if layer.source not in (None, layer.index)
    ]
    allowed = "full attention with keys of its own in every layer, all on the device"
    require(not bad, f"layers of {type(model).__name__}", bad, allowed)


def _read_prefix(plan: StackPlan, tokens: tuple[int, ...]) -> list[KVCache]:
    """Prefill of one row; keys and values of every layer, without room to grow."""
    stack = plan.owner()
    assert stack is not None
    cache = empty_cache(plan)
    ids = torch.tensor([tokens], device=execution_device(stack))
    with torch.no_grad():
        stack(input_ids=ids, past_key_values=cache, use_cache=True)
    read = []
    for layer in cache.layers:
        assert isinstance(layer, KVSelectLayer) and layer.cache is not None
        layer.cache.set_starts(None)  # the mask said so, where it was asked
        read.append(_without_room(layer.cache))
    return read


def _without_room(cache: KVCache) -> KVCache:
    tight = KVCache(
        1,
        cache.num_kv_heads,
        cache.head_dim,
        dtype=cache.dtype,
        device=cache.device,
        capacity=cache.max_seqlen,
        sketch=cache.sketch_format,
    )
    if tight.capacity >= cache.capacity:
        return cache
    tight.append(cache.k, cache.v)
    return tight


def _columns(
    prompts: list[list[int]], prefix_tokens: list[int], pad_token_id: int
) -> tuple[Tensor, Tensor]:
    """Token ids and mask: prefixes end in one column, prompts in the last."""
    longest = max(prefix_tokens)
    own = max(len(prompt) - count for prompt, count in zip(prompts, prefix_tokens))
    ids = torch.full((len(prompts), longest + own), pad_token_id)
    mask = torch.zeros_like(ids)
    for row, (prompt, count) in enumerate(zip(prompts, prefix_tokens)):
        begin, rest = longest - count, len(prompt) - count
        for columns, part in (
            (slice(begin, longest), prompt[:count]),
            (slice(longest + own - rest, None), prompt[count:]),
        ):
            ids[row, columns] = torch.tensor(part, dtype=ids.dtype)
            mask[row, columns] = 1
    return ids, mask
