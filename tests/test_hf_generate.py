"""generate() of an attached model: the stock model's tokens wherever nothing is left out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hf_models
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from kvselect.integrations.hf import attach

GREEDY: dict[str, Any] = {
    "max_new_tokens": 8,
    "do_sample": False,
    "eos_token_id": None,
    "pad_token_id": 0,
}
PROMPT = hf_models.tokens(1, 40, seed=1)
PADDED, PADDING = hf_models.left_padded((40, 31, 15), 40, seed=2)


def greedy(model: Any) -> Tensor:
    return model.generate(PROMPT, **GREEDY)


def greedy_batch(model: Any) -> Tensor:
    return model.generate(PADDED, attention_mask=PADDING, **GREEDY)


def sampled(model: Any) -> Tensor:
    torch.manual_seed(3)
    settings = {**GREEDY, "do_sample": True, "num_return_sequences": 3}
    return model.generate(PROMPT, **settings)


def beams(model: Any) -> Tensor:
    return model.generate(
        PADDED, attention_mask=PADDING, num_beams=4, num_return_sequences=2, **GREEDY
    )


def chunked(model: Any) -> Tensor:
    return model.generate(PROMPT, prefill_chunk_size=16, **GREEDY)


def chunked_padded(model: Any) -> Tensor:
    """For one row the first chunk is nothing but padding."""
    return model.generate(PADDED, attention_mask=PADDING, prefill_chunk_size=16, **GREEDY)


def one_by_one(model: Any) -> Tensor:
    """Prefill in calls of one token, which no rule may take for decode steps of a padded row."""
    return model.generate(PADDED, attention_mask=PADDING, prefill_chunk_size=1, **GREEDY)


def prompt_lookup(model: Any) -> Tensor:
    return model.generate(PROMPT.repeat(1, 2), prompt_lookup_num_tokens=4, **GREEDY)


def assisted(model: Any) -> Tensor:
    assistant = hf_models.build(hf_models.config("llama"), seed=5)
    return model.generate(PROMPT, assistant_model=assistant, **GREEDY)


def two_turns(model: Any) -> Tensor:
    cache = DynamicCache(config=model.config)
    first = model.generate(PROMPT, past_key_values=cache, **GREEDY)
    turn = torch.cat((first, hf_models.tokens(1, 6, seed=4)), dim=1)
    every = torch.ones_like(turn)  # or generate takes an answer's token 0 for padding
    return model.generate(turn, attention_mask=every, past_key_values=cache, **GREEDY)


def bare_cache(model: Any) -> Tensor:
    """A cache made without a configuration has no layers yet."""
    return model.generate(PROMPT, past_key_values=DynamicCache(), **GREEDY)


def crop_and_go_on(model: Any) -> Tensor:
    cache = DynamicCache(config=model.config)
    model.generate(PROMPT, past_key_values=cache, **GREEDY)
    cache.crop(-(cache.get_seq_length() - 30))
    turn = torch.cat((PROMPT[:, :30], hf_models.tokens(1, 6, seed=4)), dim=1)
    return model.generate(turn, past_key_values=cache, **GREEDY)


def without_cache(model: Any) -> Tensor:
    return model.generate(PADDED, attention_mask=PADDING, use_cache=False, **GREEDY)


def right_padded(model: Any) -> Tensor:
    """Holes between prompt and answer."""
    mask = PADDING.flip(1)
    return model.generate(PADDED.flip(1), attention_mask=mask, **GREEDY)


def right_padded_beams(model: Any) -> Tensor:
    mask = PADDING.flip(1)
    return model.generate(PADDED.flip(1), attention_mask=mask, num_beams=3, **GREEDY)


SCENARIOS: dict[str, Callable[[Any], Tensor]] = {
    scenario.__name__: scenario
    for scenario in (
        greedy,
        greedy_batch,
        sampled,
        beams,
        chunked,
        chunked_padded,
        one_by_one,
        prompt_lookup,
        assisted,
        two_turns,
        bare_cache,
        crop_and_go_on,
        without_cache,
        right_padded,
        right_padded_beams,
    )
}
HOLES = ("right_padded", "right_padded_beams")
REFUSED = {
    # transformers itself cannot crop a sliding layer that forgot, without recording the past
    "mistral_sliding": ("crop_and_go_on",),
    "qwen2_mixed": ("crop_and_go_on",),
}
CASES = [
    (name, scenario, form, positions)
    for name in (*hf_models.FAMILIES, *hf_models.SLIDING)
    for scenario in SCENARIOS
    for form in ("wide", "listing")
    for positions in hf_models.POSITIONS
    # generate gives right padding position 0 and counts on from there, which index positions do not
    # follow (tests/test_hf_attach.py has holes in both modes)
    if not (scenario in HOLES and positions == "compact")
    and scenario not in REFUSED.get(name, ())
    # other families: every scenario once, in the mode that differs most from the stock model
    and (name == "llama" or (form, positions) == ("listing", "compact") or scenario in HOLES)
]


@pytest.mark.parametrize(("name", "scenario", "form", "positions"), CASES)
@pytest.mark.filterwarnings("ignore:kvselect. layer . runs dense. padding with holes")
def test_generate_gives_the_stock_tokens(
    name: str, scenario: str, form: str, positions: str
) -> None:
    """Dense by budget ("wide"), and through lists that hold everything ("listing")."""
    model = hf_models.model(name)
    run = SCENARIOS[scenario]
    expected = run(model)
    with attach(model, getattr(hf_models, form)(positions)) as handle:
        got = run(model)
        report = handle.report()
    assert torch.equal(got, expected)
    for layer in report.layers:
        assert bool(layer.ran_dense) == (scenario in HOLES and layer.selects)
        counts = [layer.prefill, layer.decode]
        selected = any(phase["num_calls"] != phase["num_dense_calls"] for phase in counts)
        assert selected == (form == "listing" and layer.selects and scenario not in HOLES)
