"""Every architecture whose rotation kvselect undoes: what vLLM rotates, attach never rotated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed here: make test-vllm")

import transformers
from vllm_engine import SMALL, attached, engine

import kvselect
from kvselect.integrations.vllm.config import ROTATING

SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 256,  # heads times head_dim: vLLM's Qwen2 takes head_dim from it
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,  # logits far apart: no ties that rounding decides
    "tie_word_embeddings": False,
    "sliding_window": None,
}


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("architecture", ROTATING)
def test_selections_equal_attach(architecture: str, positions: str, tmp_path: Path) -> None:
    family = architecture.removesuffix("ForCausalLM")
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES)
    model = getattr(transformers, architecture)(config).eval()
    model.save_pretrained(tmp_path)
    policy = kvselect.TokenSelect(**SMALL, positions=positions)
    generator = torch.Generator().manual_seed(1)
    asked = [
        torch.randint(3, 256, (length,), generator=generator).tolist() for length in (600, 129, 900)
    ]
    options: dict[str, Any] = {"model": str(tmp_path), "max_model_len": 1024, "hf_overrides": {}}
    with engine(policy, **options) as running:
        got = running.generate(asked, new_tokens=6)
        served = [layer._served for layer in running.layers]
        assert all(layer.state.decode.tokens_attended > 0 for layer in served)
    assert got == attached(policy, asked, new_tokens=6, model=model)
