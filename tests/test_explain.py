"""``kvselect explain``: what was attended to, told right; its page, its picture, its refusals."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import hf_models
import pytest
import torch
from test_eval_page import Structure

from kvselect import Dense, SnapKV, StreamingLLM, TokenSelect
from kvselect.cli import main
from kvselect.eval import explain_page
from kvselect.explain import explain

SETTINGS: dict[str, Any] = {
    "topk": 8,
    "num_sink_tokens": 2,
    "num_recent_tokens": 6,
    "sketch": None,
    "overselect": 1.0,
    "q_block_size": 4,
}


def eager_weights(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """[layer][query head, token]: what the newest token attends to, by transformers itself."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        found = model(ids, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    return [weights[0, :, -1].double() for weights in found]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_dense_masses_are_the_models_own(family: str) -> None:
    model = hf_models.model(family)
    ids = hf_models.tokens(1, 30)
    found = explain(model, Dense(), ids, num_steps=3)
    read = torch.tensor([found.tokens])
    assert found.num_prompt_tokens == 30 and len(found.tokens) == 32
    for number, step in enumerate(found.steps):
        upto = read[:, : 30 + number]
        assert step.position == 29 + number and step.token == int(upto[0, -1])
        with torch.no_grad():
            assert step.next_token == int(model(upto).logits[0, -1].argmax())
        wanted = eager_weights(model, upto)
        assert [layer.layer for layer in step.layers] == list(range(len(wanted)))
        for layer, weights in zip(step.layers, wanted):
            assert layer.dense
            for head, group in zip(layer.heads, weights.chunk(len(layer.heads))):
                assert head.positions.tolist() == list(range(step.position + 1))
                assert torch.allclose(head.mass, group.mean(0), atol=1e-5)
    assert [step.token for step in found.steps[1:]] == [step.next_token for step in found.steps[:2]]


@pytest.mark.parametrize("positions", hf_models.POSITIONS)
@pytest.mark.parametrize("scope", ["kv_head", "layer"])
def test_lists_and_masses_of_a_selecting_step(positions: Any, scope: Any) -> None:
    """In the first layer, whose queries no other list touches: a softmax over what is listed."""
    model = hf_models.model("llama")
    ids = hf_models.tokens(1, 60)[0]
    policy = TokenSelect(**SETTINGS, positions=positions, scope=scope)
    found = explain(model, policy, ids, num_steps=2, forced=[7])
    assert found.tokens[60:] == (7,) and found.policy == policy.to_dict()
    for step in found.steps:
        for layer in step.layers:
            assert not layer.dense
            for head in layer.heads:
                assert len(head.positions) == 16  # 2 + 8 + 6
                assert head.positions[:2].tolist() == [0, 1]
                assert head.positions[-1] == step.position
                assert float(head.mass.sum()) == pytest.approx(1.0)
            if scope == "layer":
                assert layer.head_overlap() == 1.0
    if positions == "original":
        wanted = eager_weights(model, torch.tensor([found.tokens]))[0]
        layer = found.steps[1].layers[0]
        for head, group in zip(layer.heads, wanted.chunk(len(layer.heads))):
            listed = group[:, head.positions]
            share = (listed / listed.sum(-1, keepdim=True)).mean(0)
            assert torch.allclose(head.mass, share, atol=1e-5)
    mass = found.steps[0].token_mass()
    assert mass.shape == (60,) and float(mass.sum()) == pytest.approx(1.0)


@pytest.mark.parametrize("evict_at", ["decode", "next_call"])
def test_what_an_eviction_left_is_shown_by_position(evict_at: Any) -> None:
    model = hf_models.model("llama")
    ids = hf_models.tokens(1, 60)[0]
    policy = SnapKV(topk=9, num_sink_tokens=2, num_recent_tokens=6, evict_at=evict_at)
    found = explain(model, policy, ids, num_steps=3, forced=[7, 8])
    wanted = eager_weights(model, torch.tensor([found.tokens]))[0]
    for number, step in enumerate(found.steps):
        for layer in step.layers:
            assert not layer.dense
            for head, after in zip(layer.heads, found.steps[-1].layers[layer.layer].heads):
                kept = head.positions.tolist()
                assert kept == sorted(set(kept)) and kept[:2] == [0, 1]
                assert kept[-number - 1 :] == list(range(59, 60 + number))
                assert set(kept) <= set(after.positions.tolist())  # nothing comes back, or goes
                assert float(head.mass.sum()) == pytest.approx(1.0)
                assert len(kept) == 2 + 9 + 6 + 1 + number
    last = found.steps[-1].layers[0]
    for head, group in zip(last.heads, wanted.chunk(len(last.heads))):
        listed = group[:, head.positions]
        share = (listed / listed.sum(-1, keepdim=True)).mean(0)
        assert torch.allclose(head.mass, share, atol=1e-5)


def test_an_eviction_that_drops_nothing_is_dense() -> None:
    model = hf_models.model("llama")
    found = explain(model, SnapKV(topk=100), hf_models.tokens(1, 60)[0])
    (step,) = found.steps
    for layer in step.layers:
        for head in layer.heads:
            assert head.positions.tolist() == list(range(60))


def test_spans_and_overlaps() -> None:
    found = explain(
        hf_models.model("llama"),
        StreamingLLM(num_sink_tokens=2, num_recent_tokens=4),
        hf_models.tokens(1, 40),
        num_steps=2,
    )
    first, second = (step.layers[0] for step in found.steps)
    assert first.heads[0].positions.tolist() == [0, 1, 36, 37, 38, 39]
    assert second.overlap_with(first) == 5 / 7 and first.head_overlap() == 1.0
    head = first.heads[0]
    assert head.lists((1, 3)) and not head.lists((2, 36))
    assert head.mass_of((0, 40)) == pytest.approx(1.0) and head.mass_of((2, 36)) == 0.0


def test_the_model_is_as_before_and_arguments_are_checked() -> None:
    model = hf_models.model("llama")
    ids = hf_models.tokens(1, 30)
    before = model(ids).logits
    explain(model, TokenSelect(**SETTINGS), ids)
    assert torch.equal(model(ids).logits, before)
    for wrong, message in (
        (ids.repeat(2, 1), r"input_ids: got \(2, 30\), allowed: one prompt of at least 2"),
        (ids[:, :1], "input_ids: got .* at least 2 tokens"),
        (ids.float(), "input_ids: got .*float32, allowed: integers"),
    ):
        with pytest.raises(ValueError, match=message):
            explain(model, Dense(), wrong)
    with pytest.raises(TypeError, match="input_ids: got list"):
        explain(model, Dense(), [1, 2])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_steps: got 0"):
        explain(model, Dense(), ids, num_steps=0)


def test_passages_are_the_neighbourhoods_of_the_heaviest() -> None:
    step = explain(hf_models.model("llama"), Dense(), hf_models.tokens(1, 50)).steps[0]
    mass = step.token_mass()
    found = explain_page.passages(step, heaviest=3, around=2)
    shown = {place for passage in found for place in range(passage.begin, passage.end)}
    for place in mass.topk(3).indices.tolist():
        assert {place - 2, place, place + 2} & set(range(50)) <= shown
    assert len(shown) <= 15
    for passage, following in itertools.pairwise(found):
        assert passage.end < following.begin
    for passage in found:
        assert passage.mass == tuple(mass[passage.begin : passage.end].tolist())


def test_the_command_shows_the_hops_of_a_chain(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each hop's link gets the most attention of the three at the step that needs it."""
    arguments = ["--model", "embedded", "--task", "chain", "--length", "2x"]
    assert main(["explain", *arguments, "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert shown.count("evidence") == 3 and "step 3: after" in shown
    stored = json.loads((tmp_path / "explain.json").read_text())
    assert stored["format"] == "kvselect-explanation-1" and len(stored["steps"]) == 3
    page = (tmp_path / "explain.html").read_text()
    assert json.loads(Structure(page).script) == stored
    assert "http" not in page.replace("http://www.w3.org", "")
    assert (tmp_path / "heat.png").stat().st_size > 10_000
    masses = [
        float(value.split('"')[0])
        for part in page.split("What the answer needs.")[1:]
        for value in part.split("</table>")[0].split('<data value="')[2::2]
    ]
    for hop in range(3):
        at_step = masses[3 * hop : 3 * hop + 3]
        assert at_step.index(max(at_step)) == hop


def test_the_command_reads_a_prompt_and_a_file(tmp_path: Path) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("SET k1 v1 v2 n5 n6 GET k1")
    for source in (["--prompt", prompt.read_text()], ["--file", str(prompt)]):
        out = ["--out", str(tmp_path / "out"), "--steps", "2", "--policy", "dense"]
        assert main(["explain", "--model", "embedded", *source, *out, "--position", "5"]) == 0
        stored = json.loads((tmp_path / "out" / "explain.json").read_text())
        assert stored["steps"][0]["position"] == 5 and len(stored["steps"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "nothing"], "tasks: got 'nothing', allowed"),
        (["--task", "chain", "--question", "99"], "question: got 99, allowed: 0.."),
        (["--task", "chain", "--steps", "65"], "steps: got 65, allowed: 1..64"),
        (["--task", "chain", "--sample", "-1"], "sample: got -1, allowed"),
        (["--task", "chain", "--position", "0"], "position: got 0, allowed: 1.."),
        (["--prompt", ""], "prompt: got .* allowed: at least 2 tokens"),
        (["--file", "/nowhere/prompt"], "file: got '/nowhere/prompt'"),
        (["--prompt", "k1 k2", "--policy", "best"], "policies: got 'best', allowed"),
    ],
)
def test_the_command_refuses(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["explain", "--model", "embedded", *arguments, "--out", str(tmp_path / "new")]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert not (tmp_path / "new").exists()


def test_words_that_look_like_mathematics_are_words() -> None:
    found = explain(hf_models.model("llama"), Dense(), hf_models.tokens(1, 20))
    words = tuple("$\\frac$ " for _ in found.tokens)
    told = explain_page.Told(found, words, ("$$",), (), "a title")
    assert "frac" in explain_page.page(told)


def test_a_policy_that_selects_nowhere_is_refused() -> None:
    model = hf_models.model("llama")
    policy = TokenSelect(**SETTINGS, dense_layers=tuple(range(model.config.num_hidden_layers)))
    with pytest.raises(ValueError, match="layers of the policy: got 0, allowed: at least one"):
        explain(model, policy, hf_models.tokens(1, 20))
