"""Attached models over two processes (tensor parallel), and over CPU and disk (device_map)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import hf_models
import hf_tensor_parallel
import pytest
import torch
from transformers import AutoModelForCausalLM

from kvselect import attach

HERE = Path(__file__).resolve().parent


@pytest.mark.parametrize(("scope", "positions"), [("layer", "original"), ("kv_head", "compact")])
def test_two_ranks_choose_the_tokens_of_one(scope: str, positions: str, tmp_path: Path) -> None:
    """Ranks hold half of the heads each. Without the sum of votes the lists of scope "layer" would
    differ from rank to rank, and what is written with them."""
    pytest.importorskip("accelerate")  # transformers wants it for every tp_plan
    model = hf_models.model("llama")
    model.save_pretrained(tmp_path)
    expected = hf_tensor_parallel.generate(model, scope, positions)
    run = ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "--standalone"]
    script = str(HERE / "hf_tensor_parallel.py")
    done = subprocess.run(
        [sys.executable, "-m", *run, script, str(tmp_path), scope, positions],
        cwd=HERE.parent,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks: list[dict[str, Any]] = [torch.load(tmp_path / f"rank{n}.pt") for n in range(2)]
    for rank in ranks:
        assert rank["heads"] == 2  # of four
        for form in ("listing", "narrow"):
            assert torch.equal(rank[form], expected[form]), form
            assert rank[f"{form} steps"] == expected[f"{form} steps"] == 9
            if scope == "layer":  # a list of all heads, so a mass of all heads
                assert rank[f"{form} mass"] == pytest.approx(expected[f"{form} mass"], rel=1e-4)
        for form in ("resident", "kept on cpu"):
            assert torch.equal(rank[form], expected["resident"]), form
        assert torch.equal(rank["listing"], rank["stock"])
        assert not torch.equal(rank["narrow"], rank["stock"])
        for policy in hf_tensor_parallel.JOINING if scope == "layer" else ():
            assert torch.equal(rank[repr(policy)], expected[repr(policy)]), policy
            assert not torch.equal(rank[repr(policy)], rank["stock"]), policy
        wanted = "similarity_threshold: got 0.9, allowed: None with scope='layer'"
        assert wanted in rank["refused"][0]
        assert "num_segments: got 4, allowed: None" in rank["refused"][1]
        for policy, message in zip(hf_tensor_parallel.ALONE, rank["refused"][2:], strict=True):
            assert f"tensor parallel: got 'a policy {type(policy).__name__}'" in message


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_weights_that_are_offloaded(place: str, tmp_path: Path) -> None:
    """Hooks of accelerate bring a layer's weights in for each call; ours come on top of them."""
    pytest.importorskip("accelerate")
    from accelerate import cpu_offload, disk_offload

    model = hf_models.model("qwen3")
    ids, mask = hf_models.left_padded((60, 45), 60)
    settings: dict[str, Any] = {"attention_mask": mask, **hf_tensor_parallel.GREEDY}
    expected = model.generate(ids, **settings)
    if place == "cpu":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    assert next(model.model.layers[0].parameters()).device.type == "meta"
    assert torch.equal(model.generate(ids, **settings), expected)
    for positions in hf_models.POSITIONS:
        with attach(model, hf_models.listing(positions)) as handle:
            assert torch.equal(model.generate(ids, **settings), expected)
            layers = handle.report().layers
            handle.verify()
        assert all(layer.decode["num_calls"] == 9 for layer in layers)
        assert all(layer.decode["num_dense_calls"] == 0 for layer in layers)


def test_a_device_map(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model = hf_models.model("llama")
    model.save_pretrained(tmp_path / "model")
    places: dict[str, str] = {"model.layers.1": "disk", "model.layers.2": "disk"}
    rest = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model",
        device_map=dict.fromkeys(rest, "cpu") | places,
        offload_folder=tmp_path / "weights",
    )
    ids = hf_models.tokens(1, 60)
    expected = model.generate(ids, **hf_tensor_parallel.GREEDY)
    with attach(loaded, hf_models.listing("compact")) as handle:
        assert torch.equal(loaded.generate(ids, **hf_tensor_parallel.GREEDY), expected)
        assert handle.report().layers[2].decode["num_calls"] == 9
