"""``kvselect capture``: what is written is what attention used; files that are not are refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import hf_models
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from kvselect import Dense, StreamingLLM, TokenSelect
from kvselect.checks import UnsupportedModelError
from kvselect.cli import main
from kvselect.eval import capture as capturing
from kvselect.eval.capture import Text, capture, task_text
from kvselect.eval.checkpoint import EMBEDDED, Checkpoint, load_checkpoint
from kvselect.eval.dump import Dump, DumpFileError, LayerDump, load_dump, save_dump
from kvselect.eval.tasks import TASKS
from kvselect.testing import rel_err

NARROW: dict[str, Any] = {
    "topk": 8,
    "num_sink_tokens": 2,
    "num_recent_tokens": 6,
    "sketch": None,
    "overselect": 1.0,
    "q_block_size": 4,
}


def model_of(family: str) -> Any:
    if family == "gemma2":  # which torch's SDPA does not serve
        return hf_models.build(hf_models.config(family), attention="eager")
    return hf_models.model(family)


def checkpoint_of(model: Any) -> Checkpoint:
    window = model.config.max_position_embeddings
    return Checkpoint("tiny", model, tokenizer=None, window_tokens=window, speaks_dialect=False)


def text(length: int) -> Text:
    return Text(hf_models.tokens(1, length)[0].tolist(), {"task": "random"})


def attention(layer: LayerDump) -> torch.Tensor:
    """[num_queries, num_q_heads, num_tokens] float64, from the rotated tensors."""
    k = layer.k.double().repeat_interleave(layer.group_size, dim=1)
    logits = layer.softmax_scale * torch.einsum("jhd,thd->jht", layer.q.double(), k)
    if layer.softcap:
        logits = layer.softcap * (logits / layer.softcap).tanh()
    place = torch.arange(layer.num_tokens)
    own = layer.num_tokens - len(layer.q) + torch.arange(len(layer.q))
    return logits.masked_fill(place > own[:, None, None], -torch.inf).softmax(-1)


@pytest.mark.parametrize("family", ["llama", "qwen3", "llama_yarn", "gemma2"])
def test_the_model_attends_by_what_is_captured(family: str) -> None:
    model = model_of(family)
    found = capture(checkpoint_of(model), [text(40)], [Dense()], 5)
    ids = torch.tensor([text(40).tokens])
    model.set_attn_implementation("eager")
    with torch.no_grad():
        wanted = model(ids, output_attentions=True).attentions
    (layers,) = found.contexts.values()
    sliding = family == "gemma2"
    assert [layer.index for layer in layers] == ([1] if sliding else [0, 1, 2])
    for layer in layers:
        assert layer.q.shape == (5, 4, 32) and layer.k.shape == (40, 2, 32)
        assert (layer.softcap > 0) == sliding
        assert rel_err(attention(layer), wanted[layer.index][0].transpose(0, 1)[-5:]) < 1e-5


@pytest.mark.parametrize("family", ["llama", "llama_yarn"])
@pytest.mark.parametrize("positions", ["original", "compact"])
def test_rotation_takes_one_form_to_the_other(family: str, positions: Any) -> None:
    model = hf_models.model(family)
    policy = TokenSelect(**NARROW, positions=positions)
    found = capture(checkpoint_of(model), [text(60)], [policy], 4)
    dense = capture(checkpoint_of(model), [text(60)], [Dense()], 4)
    for layer, other in zip(found.contexts[60], dense.contexts[60]):
        rope = layer.rope
        assert rope is not None
        places = torch.arange(60)
        assert rel_err(rope.rotate_at(layer.k_unrotated, places), layer.k) < 2e-6
        assert rel_err(rope.rotate_at(layer.q_unrotated, places[-4:]), layer.q) < 2e-6
        assert rel_err(layer.k, layer.k_unrotated) > 0.1
        if layer.index == 0:  # whose keys no attention came before
            assert rel_err(layer.k, other.k) < 2e-6 and rel_err(layer.q, other.q) < 2e-6
            assert torch.equal(layer.v, other.v)
        else:
            assert rel_err(layer.v, other.v) > 1e-3


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    model = hf_models.model("llama")
    texts, policies = [text(30), text(50)], [Dense(), StreamingLLM(num_recent_tokens=20)]
    amounts: list[int] = []
    found = capture(
        checkpoint_of(model), texts, policies, 3, layers=[2, 0],
        on_progress=lambda what, amount: amounts.append(amount),
    )  # fmt: skip
    assert sum(amounts) == 80
    save_dump(tmp_path / "x.safetensors", found)
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]
    again = load_dump(tmp_path / "x.safetensors")
    assert again.about["format"] == "kvselect-capture-1"
    assert {**again.about, "format": None} == {
        **json.loads(json.dumps(found.about)),
        "format": None,
    }
    assert again.about["read"][1]["policy"]["num_recent_tokens"] == 20
    assert again.about["model"]["type"] == "llama" and "commit" in again.about
    assert list(again.contexts) == [30, 50]
    for tokens, layers in found.contexts.items():
        for one, other in zip(layers, again.contexts[tokens], strict=True):
            assert one.softmax_scale == other.softmax_scale == 32**-0.5
            assert one.index == other.index and other.group_size == 2
            for name, tensor in one.tensors().items():
                assert torch.equal(tensor, other.tensors()[name])
            assert other.rope is not None and one.rope is not None
            assert torch.equal(one.rope.inv_freq, other.rope.inv_freq)  # type: ignore[arg-type]


def test_a_layer_without_rotation_and_sink_logits(tmp_path: Path) -> None:
    q, k = torch.randn(2, 4, 32), torch.randn(9, 2, 32)
    sinks = torch.tensor([0.0, 1.0, -1.0, 2.0])
    layer = LayerDump(
        index=1,
        q=q,
        q_unrotated=q,
        k=k,
        k_unrotated=k,
        v=k.clone(),
        softmax_scale=0.2,
        sink_logits=sinks,
    )
    save_dump(tmp_path / "x", Dump(about={}, contexts={9: [layer]}))
    (found,) = load_dump(tmp_path / "x").contexts[9]
    assert found.rope is None and found.q_unrotated is found.q
    assert found.sink_logits is not None and torch.equal(found.sink_logits, sinks)


# ---- files that are not


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dump") / "x.safetensors"
    save_dump(path, capture(checkpoint_of(hf_models.model("llama")), [text(20)], [Dense()], 2))
    return path


def rewritten(path: Path, to: Path, change: Any) -> Path:
    """A copy whose tensors and metadata ``change(tensors, told)`` has been at."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        told = json.loads(file.metadata()["kvselect"])
    change(tensors, told)
    save_file(tensors, to, metadata={"kvselect": json.dumps(told)})
    return to


def drop_queries(tensors: Any, told: Any) -> None:
    tensors["20.1.q"] = tensors["20.1.q"][:1].clone()


def wrong_map(tensors: Any, told: Any) -> None:
    told["layers"]["0"]["kv_head_of_q_head"] = [0, 1, 0, 1]


def with_nan(tensors: Any, told: Any) -> None:
    tensors["20.2.k"][3, 0, 0] = torch.nan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, told: tensors.pop("20.0.v"), r"20\.0\.v: got None, allowed: a tensor"),
        (lambda tensors, told: told.pop("layers"), "lacks or misspells 'layers'"),
        (lambda tensors, told: told.update(format="other"), "format: got 'other'"),
        (lambda tensors, told: told.update(contexts={}), "contexts: got 'none'"),
        (drop_queries, r"20\.1\.q: got \[1, 4, 32\], allowed: 2 queries"),
        (wrong_map, r"kv_head_of_q_head: got \[0, 1, 0, 1\], allowed: runs of equal length"),
        (with_nan, r"20\.2\.k: got 'NaN or inf', allowed: finite numbers"),
        (
            lambda tensors, told: tensors.update({"20.0.k": tensors["20.0.k"].long()}),
            r"20\.0\.k: got torch.int64, allowed: float32",
        ),
        (
            lambda tensors, told: told["layers"]["0"].update(softmax_scale=0.0),
            "softmax_scale: got 0.0, allowed: a float > 0",
        ),
        (lambda tensors, told: tensors.pop("layer.0.inv_freq"), "layer.0.inv_freq: got None"),
    ],
)
def test_a_foreign_file_is_refused(
    written: Path, tmp_path: Path, change: Any, message: str
) -> None:
    path = rewritten(written, tmp_path / "y", change)
    with pytest.raises(DumpFileError, match=message):
        load_dump(path)


def test_a_damaged_or_missing_file_is_refused(written: Path, tmp_path: Path) -> None:
    with pytest.raises(DumpFileError, match="which is not a file, allowed: a file that kvselect"):
        load_dump(tmp_path / "none")
    cut = tmp_path / "cut"
    cut.write_bytes(written.read_bytes()[:-100])
    with pytest.raises(DumpFileError, match="which is damaged"):
        load_dump(cut)
    other = tmp_path / "weights"
    save_file({"w": torch.zeros(2)}, other)
    with pytest.raises(DumpFileError, match="format: got None, allowed: 'kvselect-capture-1'"):
        load_dump(other)


# ---- refusals of capture


def test_layers_that_cannot_be_captured_are_named() -> None:
    checkpoint = checkpoint_of(model_of("gemma2"))
    message = r"layers: got '0 \(sliding window of 16 tokens\)', allowed: of 1"
    with pytest.raises(ValueError, match=message):
        capture(checkpoint, [text(30)], [Dense()], 2, layers=[1, 0])
    with pytest.raises(ValueError, match="layers: got 7, allowed: of 1"):
        capture(checkpoint, [text(30)], [Dense()], 2, layers=[7])
    sliding = checkpoint_of(hf_models.model("mistral_sliding"))
    with pytest.raises(ValueError, match="layers: got 'none that attends to everything'"):
        capture(sliding, [text(30)], [Dense()], 2)


def test_queries_and_lengths_that_do_not_fit() -> None:
    checkpoint = checkpoint_of(hf_models.model("llama"))
    with pytest.raises(ValueError, match=r"queries: got 29, allowed: an int in 1\.\.28"):
        capture(checkpoint, [text(30)], [Dense()], 29)
    with pytest.raises(ValueError, match="lengths: got '30 twice', allowed: each once"):
        capture(checkpoint, [text(30), text(30)], [Dense(), Dense()], 2)


def test_a_rotation_that_changes_with_the_length_is_not_undone() -> None:
    model = hf_models.build(hf_models.config("phi3_longrope"))
    checkpoint = checkpoint_of(model)
    assert capture(checkpoint, [text(300)], [Dense()], 2).contexts[300]
    with pytest.raises(ValueError, match="lengths: got 520, allowed: contexts within the trained"):
        capture(checkpoint, [text(520)], [Dense()], 2)


def test_a_model_that_cannot_be_attached_to_is_refused() -> None:
    model = hf_models.build(hf_models.config("llama4"))
    with pytest.raises(UnsupportedModelError):
        capture(checkpoint_of(model), [text(30)], [Dense()], 2)


# ---- the command


def run(*arguments: str) -> int:
    return main(["capture", *arguments])


def test_the_command_on_the_embedded_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "x.safetensors"
    wanted = ("--model", "embedded", "--task", "vt", "--lengths", "1x,2x", "--out", str(out))
    assert run(*wanted, "--queries", "12", "--layers", "1,3") == 0
    shown = capsys.readouterr().out
    assert "read under Dense (original positions): 2 layers of 4/2 heads of 64, 12" in shown
    assert "read under TokenSelect (compact positions)" in shown
    found = load_dump(out)
    assert [one["source"]["task"] for one in found.about["read"]] == ["vt", "vt"]
    sizes = [
        len(task_text(load_checkpoint(EMBEDDED), TASKS["vt"], n, 12).tokens) for n in (512, 1024)
    ]
    assert list(found.contexts) == sizes and all(n > 500 for n in sizes)
    assert [layer.index for layer in found.contexts[sizes[0]]] == [1, 3]

    before = out.read_bytes()
    assert run(*wanted) == 2 and out.read_bytes() == before
    assert "allowed: a new file (--force replaces this one)" in capsys.readouterr().err
    assert run(*wanted, "--force", "--lengths", "1x", "--queries", "3") == 0
    assert list(load_dump(out).contexts) == [len(
        task_text(load_checkpoint(EMBEDDED), TASKS["vt"], 512, 3).tokens)]  # fmt: skip


def test_the_questions_are_asked_with_their_answers() -> None:
    checkpoint = load_checkpoint(EMBEDDED)
    found = task_text(checkpoint, TASKS["niah_multikey"], 300, 20, seed=3)
    words = checkpoint.tokenizer.convert_ids_to_tokens(found.tokens)
    context, asked = words[:-20], words[-20:]
    assert len(words) <= 300 and asked[0] == "GET"
    for place in range(0, 20, 4):  # GET key value value
        _, key, *value = asked[place : place + 4]
        told = [context[i + 1 : i + 3] for i, word in enumerate(context) if word == key]
        assert value in told


def test_the_command_reads_a_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt, out = tmp_path / "p.txt", tmp_path / "x"
    prompt.write_text("SET k1 v1 " * 40, encoding="utf-8")
    wanted = ("--model", "embedded", "--prompt-file", str(prompt), "--out", str(out))
    assert run(*wanted, "--lengths", "100", "--queries", "4") == 0
    found = load_dump(out)
    assert list(found.contexts) == [100]
    assert found.about["read"][0]["source"]["file"] == "p.txt"
    capsys.readouterr()
    assert run(*wanted, "--lengths", "200", "--force") == 2
    assert "lengths: got 200, allowed: at most 120 tokens, which p.txt has" in (
        capsys.readouterr().err
    )
    assert (
        run(*wanted[:2], "--prompt-file", str(tmp_path / "no"), "--out", str(out), "--force") == 2
    )
    assert "prompt-file: got" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--queries", "0"), "queries: got 0, allowed: an int >= 1"),
        (("--queries", "600"), "queries: got 600, allowed: an int in 1..510 at 512 tokens"),
        (("--layers", "0,x"), "layers: got 'x', allowed: indices >= 0 with commas"),
        (("--layers", "1,1"), "layers: got '1', allowed: indices >= 0 with commas, each once"),
        (("--layers", ","), "layers: got ',', allowed: at least one index"),
        (("--layers", "4"), "layers: got 4, allowed: of 0, 1, 2, 3"),
        (("--lengths", "zz"), "lengths: got 'zz'"),
        (("--lengths", "100m"), "lengths: got '100m'"),
        (("--policy", "nobody"), "policies: got 'nobody'"),
        (("--task", "none"), "tasks: got 'none'"),
        (("--lengths", "40000k"), "which takes about"),
    ],
)
def test_the_command_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    out = str(tmp_path / "x")
    assert run("--model", "embedded", "--task", "vt", "--out", out, *arguments) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = ("--model", "embedded", "--task", "vt", "--queries", "4")
    assert run(*wanted, "--out", str(tmp_path)) == 2
    assert "allowed: a file, not a folder" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr("os.access", lambda *_: False)
        assert run(*wanted, "--out", str(tmp_path / "x")) == 2
        assert "cannot)" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        full = shutil.disk_usage(tmp_path)._replace(free=1000)
        patch.setattr("shutil.disk_usage", lambda *_: full)
        assert run(*wanted, "--out", str(tmp_path / "x")) == 2
        assert "out: got a file of about" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
        assert run(*wanted, "--out", str(tmp_path / "x")) == 2
        assert "No space left" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_estimate_is_the_size_of_the_file(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(hf_models.model("llama"))
    found = capture(checkpoint, [text(50), text(70)], [Dense(), Dense()], 6, layers=[1])
    save_dump(tmp_path / "x", found)
    size = capturing.dump_bytes(checkpoint, [50, 70], 6, 1)
    by_hand = sum(t.nbytes for x in found.contexts.values() for t in x[0].tensors().values())
    # v and both forms of k, and both forms of q
    assert size == by_hand and 0 < (tmp_path / "x").stat().st_size - size < 6000


def test_what_a_layer_holds_is_frozen() -> None:
    q = torch.zeros(1, 2, 32)
    layer = LayerDump(index=0, q=q, q_unrotated=q, k=q, k_unrotated=q, v=q, softmax_scale=1.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        layer.index = 1  # type: ignore[misc]
