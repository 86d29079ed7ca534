"""Everything that is taken from vLLM, by name: the one file to mend when vLLM moves.

Names are looked up at their first use, so that importing this module imports no vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from kvselect.checks import require
from kvselect.integrations.vllm.config import ServerFacts

TESTED_VERSIONS = ("0.32.0",)

PLACES = {
    "AMXMLABackend": "vllm.v1.attention.backends.mla.amx_mla",
    "CPUMLABackend": "vllm.v1.attention.backends.mla.cpu_mla",
    "AttentionBackendEnum": "vllm.v1.attention.backends.registry",
    "CPUAttentionBackend": "vllm.v1.attention.backends.cpu_attn",
    "CPUAttentionBackendImpl": "vllm.v1.attention.backends.cpu_attn",
    "CPUAttentionMetadata": "vllm.v1.attention.backends.cpu_attn",
    "CPUAttentionMetadataBuilder": "vllm.v1.attention.backends.cpu_attn",
    "_ROPE_DICT": "vllm.model_executor.layers.rotary_embedding",
    "current_platform": "vllm.platforms",
    "extract_layer_index": "vllm.model_executor.models.utils",
    "get_current_vllm_config": "vllm.config",
    "get_forward_context": "vllm.forward_context",
    "get_tp_group": "vllm.distributed.parallel_state",
    "init_logger": "vllm.logger",
    "register_backend": "vllm.v1.attention.backends.registry",
}


def __getattr__(name: str) -> Any:
    if name not in PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(PLACES[name]), name)
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"vllm: got {version()} without {name} in {PLACES[name]} ({error}), allowed: "
            f"{' or '.join(TESTED_VERSIONS)}"
        ) from error


def version() -> str:
    """vLLM's, or "none"."""
    try:
        return str(import_module("vllm").__version__)
    except ImportError:
        return "none"


def override_backends(class_paths: Mapping[str, str]) -> None:
    """Have vLLM take these backends of its enum from these classes, found by path when needed."""
    place = import_module(PLACES["register_backend"])
    for name, class_path in class_paths.items():
        place.register_backend(place.AttentionBackendEnum[name], class_path)


def is_cpu_platform() -> bool:
    return bool(import_module("vllm.platforms").current_platform.is_cpu())


def platform_name() -> str:
    return str(import_module("vllm.platforms").current_platform.device_type)


def server_facts(vllm_config: Any) -> ServerFacts:
    """What `require_server` looks at."""
    text_config = vllm_config.model_config.hf_text_config
    rope = getattr(text_config, "rope_parameters", None) or {}
    speculative = vllm_config.speculative_config
    connector = vllm_config.kv_transfer_config
    parallel = vllm_config.parallel_config
    return ServerFacts(
        architecture=str(vllm_config.model_config.architecture),
        rope_type=str(rope.get("rope_type", "default" if not rope else "one per layer type")),
        speculative_method=None if speculative is None else str(speculative.method),
        kv_connector=None if connector is None else str(connector.kv_connector),
        context_parallel_size=parallel.decode_context_parallel_size
        * parallel.prefill_context_parallel_size,
        tensor_parallel_size=parallel.tensor_parallel_size,
        num_kv_heads=vllm_config.model_config.get_total_num_kv_heads(),
        num_layers=vllm_config.model_config.get_total_num_hidden_layers(),
    )


def cache_memory(vllm_config: Any) -> tuple[int, int]:
    """What vLLM will take for keys and values, at most, and what is free [bytes].

    Of the whole machine: each of its ranks takes as many bytes as are asked for, and none has taken
    them when the first looks.
    """
    memory = import_module("psutil").virtual_memory()  # vLLM brings it
    cache_config = vllm_config.cache_config
    if cache_config.kv_cache_memory_bytes is None:
        wanted = int(cache_config.gpu_memory_utilization * memory.total)
    else:
        wanted = cache_config.kv_cache_memory_bytes * vllm_config.parallel_config.local_world_size
    return wanted, int(memory.available)


def trained_length(vllm_config: Any) -> int:
    """Positions in the checkpoint's own configuration, whatever ``--hf-overrides`` says [tokens].

    Raises
    ------
    ValueError
        If it does not say.
    """
    from transformers import PretrainedConfig

    model = vllm_config.model_config
    stored, _ = PretrainedConfig.get_config_dict(model.model, revision=model.revision)
    length = stored.get("max_position_embeddings")
    require(isinstance(length, int), "config.json max_position_embeddings", length, "an int")
    return int(length)


def rotary_table() -> tuple[Tensor, bool]:
    """cos and sin of every position, and whether pairs are half a head apart: the model's only one.

    Raises
    ------
    ValueError
        If layers rotate by several tables: nobody says which is whose.
    """
    tables = list(import_module(PLACES["_ROPE_DICT"])._ROPE_DICT.values())
    require(len(tables) == 1, "rotary tables of the model", len(tables), "1")
    return tables[0].cos_sin_cache.detach(), bool(tables[0].is_neox_style)


def prometheus_instruments() -> dict[str, Any]:
    """Counters and gauges by name, each with the label "phase"; vLLM brings the client."""
    client = import_module("prometheus_client")
    visible = "Tokens that dense attention would have read, over layers and KV heads."
    attended = "Tokens that attention read, over layers and KV heads."
    mass = "Mean attention mass inside the selections since the start, by their own scores."
    labels = ["phase"]
    return {
        "tokens_visible": client.Counter("kvselect:tokens_visible", visible, labels),
        "tokens_attended": client.Counter("kvselect:tokens_attended", attended, labels),
        "kept_mass": client.Gauge(
            "kvselect:kept_mass", mass, labels, multiprocess_mode="mostrecent"
        ),
    }


def step_metadata(layer_name: str) -> Any:
    """The attention metadata of the forward pass that runs; None: a warm-up."""
    metadata = import_module("vllm.forward_context").get_forward_context().attn_metadata
    return metadata.get(layer_name) if isinstance(metadata, dict) else metadata


def tensor_parallel_group() -> torch.distributed.ProcessGroup | None:
    """Ranks with the other heads of this one's layers; None: it has them all."""
    group = import_module("vllm.distributed.parallel_state").get_tp_group()
    return None if group.world_size == 1 else group.cpu_group


def layer_index(layer_name: str) -> int:
    return int(import_module("vllm.model_executor.models.utils").extract_layer_index(layer_name))
