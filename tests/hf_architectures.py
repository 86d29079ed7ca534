"""Tiny configurations of every architecture that docs/models.md lists, and what attach does there.

`SUPPORTED` names what must run, `REFUSED` what must not, with the reason that the message gives.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOW = 16
SLIDING, FULL, LINEAR = "sliding_attention", "full_attention", "linear_attention"
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_shared_experts": 1,
}
SHARED_KV: dict[str, Any] = {
    "num_hidden_layers": 4,
    "head_dim": 16,
    "sliding_window": WINDOW,
    "layer_types": [SLIDING, FULL, SLIDING, FULL],
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 128,
}
LINEAR_HEADS: dict[str, Any] = {
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": [LINEAR, FULL],
}


@dataclass(frozen=True)
class Architecture:
    """One row of the table.

    Parameters
    ----------
    config : str
        Name of the configuration class in transformers.
    settings : dict
        What differs from `SIZES`.
    implementation : {"sdpa", "eager"}
        What computes this model right in transformers; its SDPA knows neither caps nor sinks.
    dense : dict
        Layers that run dense although the policy would select, and how the reason begins.
    one_layer : dict
        Settings of the model of one selecting layer that the oracle needs.
    compact : bool
        False: no RoPE layout fits, so compact positions are refused.
    build : callable or None
        Makes the model, where AutoModelForCausalLM does not.
    """

    config: str
    settings: dict[str, Any] = field(default_factory=dict)
    implementation: str = "sdpa"
    dense: dict[int, str] = field(default_factory=dict)
    one_layer: dict[str, Any] = field(default_factory=dict)
    compact: bool = True
    build: Callable[[Architecture, dict[str, Any]], Any] | None = None

    def make(self, **changes: Any) -> Any:
        """A float32 model with random weights: large query and key projections, no flat norms."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            settings = SIZES | self.settings | changes
            if self.build is not None:
                model = self.build(self, settings)
            else:
                made = getattr(transformers, self.config)(**settings)
                model = AutoModelForCausalLM.from_config(
                    made, attn_implementation=self.implementation
                )
            _make_interesting(model)
        return model.eval()

    def make_one_layer(self) -> Any:
        return self.make(**({"num_hidden_layers": 1} | self.one_layer))


def _make_interesting(model: Any) -> None:
    """Attention far from uniform, norms far from one."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "vision" in name or "visual" in name:
                continue
            loud = ("q_", "k_", "qkv", "kv_", "query_key_value")
            if weight.ndim >= 2 and any(part in name for part in loud):
                weight.mul_(12.0)
            if name.endswith("sinks"):
                weight.normal_()
            if weight.ndim == 1 and "norm" in name:
                noise = torch.randn_like(weight)
                weight.mul_(1 + 0.3 * noise).add_(0.1 * noise.flip(0))


def _rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **parameters}}


def _vision_language(architecture: Architecture, settings: dict[str, Any]) -> Any:
    """A model with a vision tower, of which the tests use the text side."""
    tiny = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2}
    tower = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    ids = {
        "image_token_id": 100,
        "video_token_id": 101,
        "vision_start_token_id": 102,
        "vision_end_token_id": 103,
    }
    kind = architecture.config
    if kind == "LlavaConfig":
        config = transformers.LlavaConfig(
            text_config=transformers.LlamaConfig(**settings),
            vision_config=transformers.CLIPVisionConfig(**tower),
            image_token_index=100,
        )
        model = transformers.LlavaForConditionalGeneration(config)
    elif kind == "Gemma3Config":
        config = transformers.Gemma3Config(
            text_config=transformers.Gemma3TextConfig(**settings),
            vision_config=transformers.SiglipVisionConfig(**tower),
            mm_tokens_per_image=4,
            image_token_index=100,
            boi_token_index=101,
            eoi_token_index=102,
        )
        model = transformers.Gemma3ForConditionalGeneration(config)
    elif kind == "Qwen2_5_VLConfig":
        tiny |= {"out_hidden_size": 64, "fullatt_block_indexes": [0]}
        config = transformers.Qwen2_5_VLConfig(text_config=settings, vision_config=tiny, **ids)
        model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    else:
        tiny |= {"out_hidden_size": 64, "deepstack_visual_indexes": [0]}
        config = transformers.Qwen3VLConfig(text_config=settings, vision_config=tiny, **ids)
        model = transformers.Qwen3VLForConditionalGeneration(config)
    return model


_MROPE = _rope("default", mrope_section=[2, 3, 3])
_SLIDES = {0: f"sliding window of {WINDOW} tokens"}
_LOCAL_GLOBAL = {"sliding_window": WINDOW, "layer_types": [SLIDING, FULL]}

SUPPORTED: dict[str, Architecture] = {
    "Llama": Architecture("LlamaConfig", {"head_dim": 32}),
    "Llama, llama3 RoPE": Architecture(
        "LlamaConfig",
        _rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=512,
        ),
    ),
    "Llama, YaRN": Architecture(
        "LlamaConfig", _rope("yarn", factor=4.0, original_max_position_embeddings=512)
    ),
    "Llama, dynamic RoPE": Architecture("LlamaConfig", _rope("dynamic", factor=4.0)),
    "Llama, linear RoPE": Architecture("LlamaConfig", _rope("linear", factor=4.0)),
    "Qwen2": Architecture("Qwen2Config"),
    "Qwen3": Architecture("Qwen3Config", {"head_dim": 32}),
    "Qwen3-MoE": Architecture("Qwen3MoeConfig", {"head_dim": 16, "num_experts": 4, **EXPERTS}),
    "Mistral": Architecture("MistralConfig", {"sliding_window": None, "head_dim": 24}),
    "Mistral, sliding window": Architecture(
        "MistralConfig",
        {"sliding_window": WINDOW},
        dense={0: "sliding window", 1: "sliding window"},
        one_layer={"sliding_window": None},
    ),
    "Gemma2": Architecture(
        "Gemma2Config",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 5.0,
            **_LOCAL_GLOBAL,
        },
        implementation="eager",
        dense=_SLIDES,
        one_layer={"layer_types": [FULL]},
    ),
    "Gemma3": Architecture(
        "Gemma3TextConfig",
        {"head_dim": 16, "query_pre_attn_scalar": 24, **_LOCAL_GLOBAL},
        dense=_SLIDES,
        one_layer={"layer_types": [FULL]},
    ),
    "Phi3": Architecture("Phi3Config", {"partial_rotary_factor": 0.5}),
    "Phi3, longrope": Architecture(
        "Phi3Config",
        {
            "original_max_position_embeddings": 1024,
            **_rope(
                "longrope",
                short_factor=[1.0] * 8,
                long_factor=[2.0] * 8,
                original_max_position_embeddings=1024,
            ),
        },
    ),
    "GptOss": Architecture(
        "GptOssConfig",
        {
            "head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            **_rope("default"),
            **_LOCAL_GLOBAL,
        },
        implementation="eager",
        dense=_SLIDES,
        one_layer={"layer_types": [FULL]},
    ),
    "Cohere": Architecture("CohereConfig"),
    "Cohere2": Architecture(
        "Cohere2Config", _LOCAL_GLOBAL, dense=_SLIDES, one_layer={"layer_types": [FULL]}
    ),
    "GLM4": Architecture("Glm4Config", {"head_dim": 16, "partial_rotary_factor": 0.5}),
    "OLMo2": Architecture("Olmo2Config"),
    "StarCoder2": Architecture("Starcoder2Config", {"sliding_window": None}),
    "StableLM": Architecture("StableLmConfig", {"partial_rotary_factor": 0.25}),
    "GPT-NeoX": Architecture("GPTNeoXConfig", {"num_key_value_heads": 4}),
    "Granite": Architecture("GraniteConfig", {"attention_multiplier": 0.3}),
    "SmolLM3": Architecture("SmolLM3Config", {"no_rope_layers": [1, 0]}),
    "Exaone4": Architecture(
        "Exaone4Config", _LOCAL_GLOBAL, dense=_SLIDES, one_layer={"layer_types": [FULL]}
    ),
    "Ernie4.5": Architecture("Ernie4_5Config"),
    "MiniMax-M2": Architecture(
        "MiniMaxM2Config", {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}
    ),
    "DeepSeek-V3": Architecture(
        "DeepseekV3Config", {**MLA, "n_group": 1, "topk_group": 1}, one_layer={}
    ),
    "DeepSeek-V2": Architecture("DeepseekV2Config", MLA, compact=False),
    "Qwen3-Next": Architecture(
        "Qwen3NextConfig",
        {
            **LINEAR_HEADS,
            "num_experts": 4,
            **EXPERTS,
            "shared_expert_intermediate_size": 32,
            "partial_rotary_factor": 0.5,
        },
        one_layer={"layer_types": [FULL]},
    ),
    "Qwen3.5": Architecture("Qwen3_5TextConfig", LINEAR_HEADS, one_layer={"layer_types": [FULL]}),
    "Bamba": Architecture(
        "BambaConfig",
        {
            "mamba_n_heads": 8,
            "mamba_d_state": 8,
            "mamba_d_head": 16,
            "mamba_n_groups": 1,
            "mamba_expand": 2,
            "attn_layer_indices": [1],
        },
        one_layer={"attn_layer_indices": [0]},
    ),
    "Gemma3n": Architecture(
        "Gemma3nTextConfig",
        {
            **SHARED_KV,
            "laurel_rank": 8,
            "activation_sparsity_pattern": [0.0] * 4,
            "altup_num_inputs": 2,
        },
        dense={0: "sliding window", 2: "sliding window"},
        one_layer={
            "layer_types": [FULL],
            "num_kv_shared_layers": 0,
            "activation_sparsity_pattern": [0.0],
        },
    ),
    "Gemma4": Architecture(
        "Gemma4TextConfig",
        {**SHARED_KV, "global_head_dim": 32},
        dense={0: "sliding window", 2: "sliding window"},
        one_layer={"layer_types": [FULL], "num_kv_shared_layers": 0},
    ),
    "Jamba": Architecture(
        "JambaConfig",
        {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 2,
            "use_mamba_kernels": False,
        },
        one_layer={"attn_layer_period": 1, "attn_layer_offset": 0},
    ),
    "LFM2": Architecture(
        "Lfm2Config", {"layer_types": ["conv", FULL]}, one_layer={"layer_types": [FULL]}
    ),
    "Mixtral": Architecture(
        "MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
    ),
    "Ministral": Architecture(
        "MinistralConfig",
        {"head_dim": 16, **_LOCAL_GLOBAL},
        dense=_SLIDES,
        one_layer={"layer_types": [FULL]},
    ),
    "OLMo3": Architecture(
        "Olmo3Config", _LOCAL_GLOBAL, dense=_SLIDES, one_layer={"layer_types": [FULL]}
    ),
    "Gemma": Architecture("GemmaConfig", {"head_dim": 16}),
    "Phi": Architecture("PhiConfig"),
    "GLM4-MoE": Architecture(
        "Glm4MoeConfig",
        {
            "head_dim": 16,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            **EXPERTS,
        },
    ),
    "Nemotron": Architecture("NemotronConfig", {"head_dim": 16}),
    "Seed-OSS": Architecture("SeedOssConfig", {"head_dim": 16}),
    "Helium": Architecture("HeliumConfig", {"head_dim": 16}),
    "NanoChat": Architecture("NanoChatConfig", compact=False),
    "HunYuan": Architecture("HunYuanDenseV1Config", {"head_dim": 16}, compact=False),
    "Gemma3, text of": Architecture(
        "Gemma3Config",
        {"head_dim": 16, "query_pre_attn_scalar": 24, **_LOCAL_GLOBAL},
        dense=_SLIDES,
        one_layer={"layer_types": [FULL]},
        build=_vision_language,
    ),
    "Qwen2.5-VL, text of": Architecture("Qwen2_5_VLConfig", _MROPE, build=_vision_language),
    "Qwen3-VL, text of": Architecture(
        "Qwen3VLConfig", {"head_dim": 16, **_MROPE}, build=_vision_language
    ),
    "Llava, text of": Architecture("LlavaConfig", build=_vision_language),
}


@dataclass(frozen=True)
class Refusal:
    """A model that attach refuses.

    Parameters
    ----------
    config : str
    settings : dict
    reason : str
        What the message says, of layer 0 where it names layers.
    runs_dense : bool
        Whether ``strict=False`` runs the layers dense instead.
    """

    config: str
    settings: dict[str, Any]
    reason: str
    runs_dense: bool = False

    def make(self) -> Any:
        config = getattr(transformers, self.config)(**self.settings)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config)
            _make_interesting(model)
        return model.eval()


NO_STACK = "got no decoder stack"
_NO_RULE = "its attention pattern is neither causal nor sliding (chunked, bidirectional, ...)"
_NO_PAIR = "position_embeddings are not passed by keyword as a pair (cos, sin)"
_INDEXER = "an indexer of its own picks the keys and reads the mask (DSA)"
_TINY: dict[str, Any] = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2}
_GPT: dict[str, Any] = {"vocab_size": 128, "n_layer": 2, "bos_token_id": 1, "eos_token_id": 2}
_DSA = {"n_group": 1, "topk_group": 1, "index_topk": 8, "index_head_dim": 16, "index_n_heads": 2}

REFUSED: dict[str, Refusal] = {
    "Falcon": Refusal(
        "FalconConfig",
        {**_TINY, "num_attention_heads": 4, "new_decoder_architecture": True, "num_kv_heads": 2},
        NO_STACK,
    ),
    "GPT-J": Refusal("GPTJConfig", {**_GPT, "n_embd": 64, "n_head": 4, "rotary_dim": 8}, NO_STACK),
    "MPT": Refusal(
        "MptConfig", {"vocab_size": 128, "d_model": 64, "n_heads": 4, "n_layers": 2}, NO_STACK
    ),
    "GPT-2": Refusal("GPT2Config", {**_GPT, "n_embd": 64, "n_head": 4}, NO_STACK),
    "BLOOM": Refusal(
        "BloomConfig", {"vocab_size": 128, "hidden_size": 64, "n_layer": 2, "n_head": 4}, NO_STACK
    ),
    "OPT": Refusal(
        "OPTConfig",
        {**_TINY, "ffn_dim": 96, "num_attention_heads": 4, "word_embed_proj_dim": 64},
        _NO_PAIR,
        runs_dense=True,
    ),
    "Llama4": Refusal(
        "Llama4TextConfig",
        {
            **SIZES,
            "head_dim": 16,
            "intermediate_size_mlp": 96,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "attention_chunk_size": 16,
        },
        _NO_RULE,
        runs_dense=True,
    ),
    "EmbeddingGemma (bidirectional)": Refusal(
        "Gemma3TextConfig",
        {**SIZES, "head_dim": 16, "use_bidirectional_attention": True, "layer_types": [FULL] * 2},
        _NO_RULE,
        runs_dense=True,
    ),
    "DeepSeek-V3.2": Refusal("DeepseekV32Config", {**SIZES, **MLA, **_DSA}, _INDEXER),
    "GLM-MoE-DSA": Refusal("GlmMoeDsaConfig", {**SIZES, **MLA, **_DSA}, _INDEXER),
}


@cache
def _shared(name: str) -> Any:
    return SUPPORTED[name].make()


def model(name: str) -> Any:
    """A fresh copy of the model of this row."""
    return copy.deepcopy(_shared(name))
