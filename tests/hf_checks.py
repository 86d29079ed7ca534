"""What attach promises of an architecture, one function per column of docs/models.md.

Each raises AssertionError where the promise is broken, and returns what the table shows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import hf_architectures
import hf_models
import pytest
import torch
from hf_architectures import REFUSED, SUPPORTED
from torch import Tensor

from kvselect import TokenSelect, UnsupportedModelError
from kvselect.integrations.hf import attach, attention

EXACT = 1e-5  # of the largest logit, float32: the model's own sdpa and eager differ by as much
ORACLE = 5e-6  # the same; one layer
CONTEXT, KEPT = 301, 64


def listing(name: str, positions: str, **changes: Any) -> TokenSelect:
    """Selects, beyond 24 tokens, yet leaves nothing out."""
    if not SUPPORTED[name].compact:
        changes |= {"average_queries": "after_rope"}
    return hf_models.listing(positions, **changes)


def ids_for(batch: int, length: int, seed: int = 0) -> Tensor:
    """Random tokens that no model takes for an image or for padding."""
    return hf_models.tokens(batch, length, seed) % 90 + 5


def logits_of(model: Any, ids: Tensor, new: Tensor, with_positions: bool = True) -> Tensor:
    """Logits of a prompt and of teacher-forced decode steps, with the positions of `generate`."""
    logits, cache, begin = [], None, 0
    with torch.no_grad():
        for chunk in (ids, *new.split(1, dim=1)):
            end = begin + chunk.shape[1]
            places = torch.arange(begin, end).expand(chunk.shape[0], -1)
            result = model(
                input_ids=chunk,
                past_key_values=cache,
                use_cache=True,
                **({"position_ids": places} if with_positions else {}),
            )
            logits.append(result.logits)
            cache, begin = result.past_key_values, end
    return torch.cat(logits, dim=1)


def error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


def layers(name: str) -> str:
    """Which layers select, and why the others do not."""
    architecture = SUPPORTED[name]
    with attach(hf_architectures.model(name), listing(name, "original")) as handle:
        report = handle.report()
    shown = []
    for layer in report.layers:
        reason = architecture.dense.get(layer.index)
        assert layer.selects == (reason is None), (layer.index, layer.reason)
        if reason is not None:
            assert layer.reason is not None and layer.reason.startswith(reason)
            shown.append(f"{layer.index}: {layer.reason}")
    selecting = sum(layer.selects for layer in report.layers)
    return f"{selecting} of {len(report.layers)}" + "".join(f"; {text}" for text in shown)


def exact(name: str, positions: str) -> str:
    """With lists that hold everything, logits are the stock model's."""
    architecture = SUPPORTED[name]
    model = hf_architectures.model(name)
    ids, new = ids_for(2, 60), ids_for(2, 3, seed=1)
    plain = architecture.build is None
    expected = logits_of(model, ids, new, plain)
    with attach(model, listing(name, positions)) as handle:
        difference = error(logits_of(model, ids, new, plain), expected)
        report = handle.report()
    assert difference <= EXACT, difference
    for layer in report.layers:
        assert not layer.ran_dense, layer.ran_dense
        if layer.selects:
            assert (layer.decode["num_dense_calls"], layer.decode["num_calls"]) == (0, 3)
            assert layer.prefill["num_dense_calls"] != layer.prefill["num_calls"]
    return f"{difference:.0e}"


def oracle(name: str, positions: str) -> str:
    """One layer, 64 of 301 tokens: what the stock model gives for the text of these 64.

    With one layer keys and values depend on each token's own embedding only, so the oracle needs
    none of our maths. It discriminates: dense attention is a hundred tolerances away.
    """
    architecture = SUPPORTED[name]
    model = architecture.make_one_layer()
    ids = ids_for(1, CONTEXT)
    policy = listing(
        name,
        positions,
        scope="layer",
        topk=KEPT - 24,
        num_sink_tokens=4,
        num_recent_tokens=20,
        overselect=1.0,
    )
    steps: list[Any] = []
    with torch.no_grad():
        dense = model(input_ids=ids).logits[0, -1]
        with attach(model, policy):
            cache = model(input_ids=ids[:, :-1], use_cache=True).past_key_values
            with _recorded(steps):
                got = model(
                    input_ids=ids[:, -1:],
                    past_key_values=cache,
                    position_ids=torch.tensor([[CONTEXT - 1]]),
                ).logits[0, -1]
        selection = steps[-1]
        kept = selection.indices[0, 0, : int(selection.topk_length[0, 0])].long()
        places = kept[None] if positions == "original" else torch.arange(KEPT)[None]
        expected = model(
            input_ids=ids[0, kept][None],
            position_ids=places,
            attention_mask=torch.ones_like(places),  # or jumps may be read as packed sequences
        ).logits[0, -1]
    assert len(kept) == KEPT
    difference = error(got, expected)
    assert difference <= ORACLE, difference
    assert error(dense, expected) > 100 * ORACLE, error(dense, expected)
    return f"{difference:.0e}"


@contextmanager
def _recorded(steps: list[Any]) -> Iterator[None]:
    """Keep what the decode steps of the attention function select."""
    right = attention.decode_step

    def step(*args: Any, **kwargs: Any) -> Any:
        out, info = right(*args, **kwargs)
        steps.append(info.selection)
        return out, info

    attention.decode_step = step
    try:
        yield
    finally:
        attention.decode_step = right


def detach(name: str) -> str:
    """After detach, logits are bit-equal to before."""
    architecture = SUPPORTED[name]
    model = hf_architectures.model(name)
    ids, new = ids_for(2, 40), ids_for(2, 2, seed=1)
    plain = architecture.build is None
    expected = logits_of(model, ids, new, plain)
    narrow = listing(name, "compact" if architecture.compact else "original", overselect=1.0)
    with attach(model, narrow):
        changed = not torch.equal(logits_of(model, ids, new, plain), expected)
    selects = any(index not in architecture.dense for index in range(_num_layers(model)))
    assert changed == selects
    assert torch.equal(logits_of(model, ids, new, plain), expected)
    return "bit-equal"


def refused(name: str) -> str:
    """attach says why; ``strict=False`` runs the model dense and exact, or refuses it as well."""
    row = REFUSED[name]
    model, policy = row.make(), hf_models.listing()
    ids = ids_for(2, 40)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    with pytest.raises(UnsupportedModelError) as caught:
        attach(model, policy)
    message = str(caught.value)
    assert row.reason in message
    if row.reason != hf_architectures.NO_STACK:
        num_layers = _num_layers(model)
        assert [f"layer {index}:" in message for index in range(num_layers)] == [True] * num_layers
    if row.runs_dense:
        with attach(model, policy, strict=False) as handle, torch.no_grad():
            assert error(model(input_ids=ids).logits, expected) <= EXACT
            report = handle.report()
        assert [layer.reason for layer in report.layers] == [row.reason] * len(report.layers)
    else:
        with pytest.raises(UnsupportedModelError):
            attach(model, policy, strict=False)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, expected)
    return row.reason


def _num_layers(model: Any) -> int:
    layers: int = model.config.get_text_config(decoder=True).num_hidden_layers
    return layers


def batch(name: str, positions: str) -> str:
    """generate() of a left-padded batch: the stock model's tokens, though every step selects."""
    model = hf_architectures.model(name)
    lengths, width = (40, 31), 40
    mask = (torch.arange(width) >= width - torch.tensor(lengths)[:, None]).long()
    ids = ids_for(2, width) * mask
    settings: dict[str, Any] = {
        "attention_mask": mask,
        "max_new_tokens": 5,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    expected = model.generate(ids, **settings)
    with attach(model, listing(name, positions)) as handle:
        assert torch.equal(model.generate(ids, **settings), expected)
        report = handle.report()
    for layer in report.layers:
        steps = layer.decode["num_calls"]  # Gemma4's shared layers prefill one token only
        assert steps in ((4, 5) if layer.selects else (0,))
        assert not layer.decode["num_dense_calls"]
    return "same tokens"
