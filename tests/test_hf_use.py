"""Attached models as people use them: pipelines, chats, streams, threads, several at once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import hf_models
import pytest
import torch
from test_hf_attach import error
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import (
    PreTrainedTokenizerFast,
    TextIteratorStreamer,
    pipeline,
)

from kvselect import StreamingLLM, attach
from kvselect.integrations.hf import calibrate

GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A word for each token of the tiny models."""
    special = ["<pad>", "<bos>", "<eos>", "<user>", "<assistant>", "<unk>"]
    words = special + [f"w{index}" for index in range(hf_models.SIZES["vocab_size"] - len(special))]
    made = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, "<unk>"))
    made.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    fast.add_special_tokens({"additional_special_tokens": ["<user>", "<assistant>"]})
    fast.chat_template = TEMPLATE
    fast.padding_side = "left"
    return fast


@pytest.fixture(scope="module")
def text() -> str:
    return " ".join(f"w{index * 7 % 100}" for index in range(50))


def selecting_steps(handle: Any) -> int:
    """Decode steps of the first layer that attended to lists: 0 if selection is bypassed."""
    decode = handle.report().layers[0].decode
    steps: int = decode["num_calls"] - decode["num_dense_calls"]
    return steps


# --- ways of generating ---------------------------------------------------------------------------


@pytest.mark.parametrize("positions", hf_models.POSITIONS)
def test_a_pipeline(tokenizer: Any, text: str, positions: str) -> None:
    model = hf_models.model("llama")
    settings = {**GREEDY, "return_full_text": False, "batch_size": 2, "pad_token_id": 0}
    prompts = [text, text[:120]]
    expected = pipeline("text-generation", model=model, tokenizer=tokenizer)(prompts, **settings)
    with attach(model, hf_models.listing(positions)) as handle:
        generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
        assert generator(prompts, **settings) == expected
        assert selecting_steps(handle) == 7


@pytest.mark.parametrize("positions", hf_models.POSITIONS)
def test_a_chat_of_two_turns_with_one_cache(tokenizer: Any, text: str, positions: str) -> None:
    from transformers import DynamicCache

    def chat(model: Any) -> list[str]:
        cache, messages, answers = DynamicCache(config=model.config), [], []
        for turn in (text, "w3 w5 w8"):
            messages.append({"role": "user", "content": turn})
            inputs = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            out = model.generate(**inputs, past_key_values=cache, pad_token_id=0, **GREEDY)
            answers.append(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :]))
            messages.append({"role": "assistant", "content": answers[-1]})
        return answers

    model = hf_models.model("qwen3")
    expected = chat(model)
    with attach(model, hf_models.listing(positions)) as handle:
        assert chat(model) == expected
        assert selecting_steps(handle) >= 14


def test_a_stream(tokenizer: Any, text: str) -> None:
    def stream(model: Any) -> list[str]:
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
        inputs = tokenizer(text, return_tensors="pt")
        arguments = {**inputs, **GREEDY, "streamer": streamer, "pad_token_id": 0}
        thread = threading.Thread(target=model.generate, kwargs=arguments)
        thread.start()
        pieces = list(streamer)
        thread.join()
        return pieces

    model = hf_models.model("llama")
    expected = stream(model)
    with attach(model, hf_models.listing("compact")) as handle:
        assert stream(model) == expected
        assert selecting_steps(handle) == 7
    assert len(expected) > 1


# --- several models, several threads --------------------------------------------------------------


def test_two_models_with_two_policies() -> None:
    ids = hf_models.tokens(1, 60)
    first, second = hf_models.model("llama"), hf_models.model("qwen3")
    policies = (hf_models.narrow(), StreamingLLM(num_recent_tokens=16, q_block_size=16))
    alone = []
    for model, policy in zip((first, second), policies):
        with attach(model, policy):
            alone.append(model.generate(ids, pad_token_id=0, **GREEDY))
    with attach(first, policies[0]) as one, attach(second, policies[1]) as other:
        for _ in range(2):
            assert torch.equal(first.generate(ids, pad_token_id=0, **GREEDY), alone[0])
            assert torch.equal(second.generate(ids, pad_token_id=0, **GREEDY), alone[1])
        assert selecting_steps(one) == selecting_steps(other) == 14
    with attach(first, policies[1]):  # and none of it depends on what was attached before
        assert not torch.equal(first.generate(ids, pad_token_id=0, **GREEDY), alone[0])


def test_two_threads_may_run_two_models() -> None:
    ids = hf_models.tokens(1, 60)
    models = [hf_models.model(name) for name in ("llama", "qwen3")]
    policy = hf_models.narrow("compact")
    expected, got = [], [None, None]
    for model in models:
        with attach(model, policy):
            expected.append(model.generate(ids, pad_token_id=0, **GREEDY))

    def run(index: int) -> None:
        with attach(models[index], policy):
            got[index] = models[index].generate(ids, pad_token_id=0, **GREEDY)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(got, expected))


@pytest.fixture
def slow_calibration(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Any]]:
    """Stops attach in its middle: (has it come there, may it go on)."""
    reached, go_on = threading.Event(), threading.Event()
    right = calibrate.dense_attention

    def stop(*args: Any, **kwargs: Any) -> Tensor:
        reached.set()
        assert go_on.wait(30)
        return right(*args, **kwargs)

    monkeypatch.setattr(calibrate, "dense_attention", stop)
    yield reached, go_on
    go_on.set()


def test_attach_while_another_thread_generates_is_an_error(slow_calibration: Any) -> None:
    """For the other thread, in words; attach itself goes on, and the model works afterwards."""
    reached, go_on = slow_calibration
    model = hf_models.model("llama")
    ids = hf_models.tokens(1, 60)
    expected = model.generate(ids, pad_token_id=0, **GREEDY)
    handles: list[Any] = []
    thread = threading.Thread(target=lambda: handles.append(attach(model, hf_models.listing())))
    thread.start()
    assert reached.wait(30)
    message = "forward: got a call from another thread while attach runs, allowed: one after"
    with pytest.raises(RuntimeError, match=message):
        model.generate(ids, pad_token_id=0, **GREEDY)
    go_on.set()
    thread.join()
    assert torch.equal(model.generate(ids, pad_token_id=0, **GREEDY), expected)
    assert selecting_steps(handles[0]) == 7
    handles[0].detach()


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", hf_models.POSITIONS)
def test_a_mask_that_hides_everything(positions: str) -> None:
    """The row sees nothing: attention gives 0, and no other row notices."""
    model = hf_models.model("llama")
    ids = hf_models.tokens(2, 60)
    mask = torch.ones_like(ids)
    mask[0] = 0
    with attach(model, hf_models.narrow(positions)), torch.no_grad():
        alone = model(ids[1:]).logits[0]
        result = model(ids, attention_mask=mask)
        assert result.logits.isfinite().all()
        assert error(result.logits[1], alone) <= 1e-5
        mask = torch.cat((mask, mask.new_ones(2, 1)), dim=1)
        cache = result.past_key_values
        step = model(ids[:, :1], attention_mask=mask, past_key_values=cache)
        assert step.logits.isfinite().all()


@pytest.mark.parametrize("positions", hf_models.POSITIONS)
def test_no_prompt_and_an_empty_one(positions: str) -> None:
    """Without a prompt generate begins with its first token; an empty one fails as it always did,
    and leaves nothing behind."""
    model = hf_models.model("llama")
    settings = {**GREEDY, "max_new_tokens": 40, "pad_token_id": 0}
    nothing = torch.zeros(1, 0, dtype=torch.int64)
    expected = model.generate(**settings)
    with pytest.raises(RuntimeError) as stock:
        model(nothing)
    with attach(model, hf_models.listing(positions)) as handle:
        assert torch.equal(model.generate(**settings), expected)
        assert selecting_steps(handle) == 40 - 24
        with pytest.raises(RuntimeError) as attached:
            model(nothing)
        assert str(attached.value) == str(stock.value)
        assert torch.equal(model.generate(**settings), expected)


def test_positions_that_jump() -> None:
    """Original positions are the model's own; compact ones count tokens, whatever is passed."""
    model = hf_models.model("llama")
    ids, new = hf_models.tokens(1, 60), hf_models.tokens(1, 1, seed=1)
    places = torch.cat((torch.arange(30), torch.arange(900, 930)))[None]
    later = torch.tensor([[1500]])
    every = torch.ones_like(ids)  # or jumps are read as packed sequences

    def run() -> Tensor:
        with torch.no_grad():
            result = model(ids, position_ids=places, attention_mask=every)
            cache = result.past_key_values
            step = model(new, position_ids=later, past_key_values=cache)
            return torch.cat((result.logits, step.logits), dim=1)

    stock = run()
    with attach(model, hf_models.listing()):
        assert error(run(), stock) <= 1e-5
    with attach(model, hf_models.listing("compact")), torch.no_grad():
        cache = model(ids).past_key_values
        plain = model(new, past_key_values=cache).logits
        assert torch.equal(run()[:, -1:], plain)


def test_a_model_in_training_mode_is_refused() -> None:
    model = hf_models.model("llama").train()
    with attach(model, hf_models.narrow()):
        with pytest.raises(ValueError, match=r"model\.training: got True, allowed: False"):
            model(hf_models.tokens(1, 30))
        with torch.no_grad():
            model(hf_models.tokens(1, 30))


def test_beams_with_a_state_per_row() -> None:
    """Beams are reordered at every step: what was remembered of another row is never used."""
    model = hf_models.model("llama")
    ids, mask = hf_models.left_padded((60, 45), 60)
    settings = {**GREEDY, "attention_mask": mask, "num_beams": 3, "pad_token_id": 0}
    with attach(model, hf_models.narrow(num_segments=None)) as handle:
        fresh = model.generate(ids, **settings)
        assert selecting_steps(handle) == 7
    for remembering in ({"similarity_threshold": 1e-6}, {"num_segments": 2}):
        with attach(model, hf_models.narrow(**remembering)) as handle:
            assert torch.equal(model.generate(ids, **settings), fresh)
            assert not handle.report().layers[0].decode["num_hits"]
