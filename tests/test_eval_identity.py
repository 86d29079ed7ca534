"""What makes two runs the same."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from hf_models import config
from transformers import LlamaForCausalLM

from kvselect.eval import identity
from kvselect.eval.identity import code_identity, fingerprint


def model(seed: int = 0, **changes: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(config("llama", **changes))


def test_a_fingerprint_is_of_weights_shapes_and_settings(tmp_path: Path) -> None:
    first = fingerprint(model())
    assert len(first) == 16 and fingerprint(model()) == first
    model().save_pretrained(tmp_path)
    assert fingerprint(LlamaForCausalLM.from_pretrained(tmp_path)) == first
    assert fingerprint(model(seed=1)) != first
    assert fingerprint(model(num_hidden_layers=2)) != first
    other = model()
    other.config.rope_parameters = {**other.config.rope_parameters, "rope_theta": 5.0}
    assert fingerprint(other) != first
    other = model()
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    assert fingerprint(other) != first
    assert fingerprint(model().bfloat16()) != first


def test_code_is_told_apart_by_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "kvselect"
    root = Path(identity.kvselect.__file__).parent
    shutil.copytree(root, package, ignore=shutil.ignore_patterns("__pycache__"))
    real = code_identity()
    monkeypatch.setattr(identity.kvselect, "__file__", str(package / "__init__.py"))
    assert code_identity() == real
    (package / "results").mkdir()
    (package / "results" / "notes.txt").write_text("written by a run")
    assert code_identity() == real
    (package / "decode.py").write_text("changed = True\n")
    assert code_identity()["files"] != real["files"]
