"""Tiny random transformers models whose attention is not uniform, and policies to run them with."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from kvselect.policies.token_select import TokenSelect

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = ("llama", "qwen2", "qwen3", "mistral")
SLIDING = ("mistral_sliding", "qwen2_mixed")
POSITIONS = ("original", "compact")


def config(name: str, **changes: Any) -> PreTrainedConfig:
    """Configuration of a tiny model by name; ``changes`` replace single settings."""
    sizes = SIZES | changes
    mixed = ["full_attention", "sliding_attention"] * sizes["num_hidden_layers"]
    scaled = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
    makers: dict[str, tuple[str, dict[str, Any]]] = {
        "llama": ("LlamaConfig", {}),
        "qwen2": ("Qwen2Config", {}),
        "qwen3": ("Qwen3Config", {}),
        "mistral": ("MistralConfig", {"sliding_window": None}),
        "mistral_sliding": ("MistralConfig", {"sliding_window": 16}),
        "qwen2_mixed": (
            "Qwen2Config",
            {
                "use_sliding_window": True,
                "sliding_window": 16,
                "layer_types": mixed[: sizes["num_hidden_layers"]],
            },
        ),
        "llama_yarn": (
            "LlamaConfig",
            {"rope_parameters": {**scaled, "original_max_position_embeddings": 512}},
        ),
        "llama4": (
            "Llama4TextConfig",
            {
                "intermediate_size_mlp": 96,
                "num_local_experts": 2,
                "num_experts_per_tok": 1,
                "attention_chunk_size": 16,
            },
        ),
        "gemma2": ("Gemma2Config", {"sliding_window": 16, "attn_logit_softcapping": 5.0}),
        "phi3_longrope": (
            "Phi3Config",
            {
                "hidden_size": 128,
                "original_max_position_embeddings": 512,
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "short_factor": [1.0] * 16,
                    "long_factor": [2.0] * 16,
                    "original_max_position_embeddings": 512,
                },
            },
        ),
    }
    class_name, settings = makers[name]
    return getattr(transformers, class_name)(**(sizes | settings))  # type: ignore[no-any-return]


def build(
    settings: PreTrainedConfig,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    attention: str = "sdpa",
) -> Any:
    """A model with random weights: large query and key projections, norms that are not all one."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(settings, attn_implementation=attention)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.ndim >= 2 and any(part in name for part in ("q_", "k_", "qkv")):
                    weight.mul_(12.0)
                if weight.ndim == 1 and "norm" in name:
                    noise = torch.randn_like(weight)
                    weight.mul_(1 + 0.3 * noise).add_(0.1 * noise.flip(0))
    return model.to(dtype).eval()


@cache
def _shared(name: str) -> PreTrainedModel:
    return build(config(name))  # type: ignore[no-any-return]


def model(name: str) -> Any:
    """A fresh copy of the float32 model of this name."""
    return copy.deepcopy(_shared(name))


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    """Random token ids that are none of the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, SIZES["vocab_size"], (batch, length), generator=generator)


def distinct(batch: int, length: int, vocab_size: int, seed: int = 0) -> Tensor:
    """Random token ids, no two of a row equal.

    In a first layer without positions, equal tokens tie
    exactly, and the last bit of a projection decides between them.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(vocab_size - 3, generator=generator)[:length] for _ in range(batch)]
    return torch.stack(rows) + 3


def left_padded(lengths: tuple[int, ...], width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Token ids and padding mask of rows with so many real tokens at their end."""
    ids = tokens(len(lengths), width, seed)
    mask = (torch.arange(width) >= width - torch.tensor(lengths)[:, None]).long()
    return ids * mask, mask


def wide(positions: str = "original", **changes: Any) -> TokenSelect:
    """A policy whose budget covers every context of these tests: it must equal the stock model."""
    settings: dict[str, Any] = {
        "topk": 512,
        "num_sink_tokens": 4,
        "num_recent_tokens": 128,
        "overselect": 1.0,
        "positions": positions,
    }
    return TokenSelect(**(settings | changes))


def listing(positions: str = "original", **changes: Any) -> TokenSelect:
    """A policy that lists every token: it selects, beyond 24 of them, yet leaves nothing out."""
    settings: dict[str, Any] = {
        "topk": 8,
        "num_sink_tokens": 4,
        "num_recent_tokens": 12,
        "overselect": 64.0,
        "sketch": None,
        "q_block_size": 16,
        "num_tail_tokens": 8,
        "tail_q_block_size": 4,
        "positions": positions,
    }
    return TokenSelect(**(settings | changes))


def narrow(positions: str = "original", **changes: Any) -> TokenSelect:
    """A policy that leaves tokens out beyond 24 of them."""
    return listing(positions, overselect=1.0, **changes)
