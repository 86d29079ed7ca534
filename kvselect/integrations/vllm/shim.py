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

TESTED_VERSIONS = ("0.32.0", "0.28.0")

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

NOT_IN = {"0.28.0": {"AMXMLABackend", "AMX_MLA"}}
"""What a tested release does without, names and backends: it came later."""


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
    known = place.AttentionBackendEnum.__members__
    for name, class_path in class_paths.items():
        if name in NOT_IN.get(version(), ()):
            continue
        if name not in known:
            raise ImportError(
                f"vllm: got {version()} without the backend {name}, allowed: "
                f"{' or '.join(TESTED_VERSIONS)}"
            )
        place.register_backend(known[name], class_path)


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
        num_speculative_tokens=0 if speculative is None else speculative.num_speculative_tokens,
        kv_connector=None if connector is None else str(connector.kv_connector),
        context_parallel_size=parallel.decode_context_parallel_size
        * parallel.prefill_context_parallel_size,
        pipeline_parallel_size=parallel.pipeline_parallel_size,
        tensor_parallel_size=parallel.tensor_parallel_size,
        num_kv_heads=vllm_config.model_config.get_total_num_kv_heads(),
        num_layers=vllm_config.model_config.get_total_num_hidden_layers(),
    )


def asked_cache_bytes(vllm_config: Any) -> int | None:
    """What the user says that keys and values take on this machine, all ranks; None: he does not.

    A share of memory is known when the weights have theirs: `allocated_cache_bytes`.
    """
    cache_config = vllm_config.cache_config
    asked = cache_config.kv_cache_memory_bytes
    if asked is None or cache_config.num_gpu_blocks_override is not None:
        return None
    return int(asked * vllm_config.parallel_config.local_world_size)


def allocated_cache_bytes(vllm_config: Any, kv_cache_spec: Any, num_layers: int) -> int:
    """What vLLM is about to take on this machine for layers of this kind: all blocks, all ranks.

    Layers of other kinds share their blocks.
    """
    num_blocks = vllm_config.cache_config.num_gpu_blocks
    allowed = "an int, before blocks are made"
    require(isinstance(num_blocks, int), "num_gpu_blocks", num_blocks, allowed)
    ranks = vllm_config.parallel_config.local_world_size
    return int(num_blocks * kv_cache_spec.page_size_bytes * num_layers * ranks)


def available_bytes() -> int:
    """Memory that is free on this machine."""
    return int(import_module("psutil").virtual_memory().available)  # vLLM brings it


def attention_layers(vllm_config: Any) -> dict[str, Any]:
    """The layers of this process that vLLM knows by name; not all of them attend."""
    return dict(vllm_config.compilation_config.static_forward_context)


def is_local(layer: Any) -> bool:
    """Whether the layer attends within chunks of the row (Llama 4), as vLLM splits it up."""
    return getattr(layer, "attention_chunk_size", None) is not None


def sees_later_tokens(layer: Any) -> bool:
    return bool(getattr(layer, "use_mm_prefix", False))


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


def rotary_module(vllm_config: Any, head_size: int) -> Any:
    """What rotates queries and keys in every layer of the model: `rotary_table` reads it.

    Raises
    ------
    ValueError
        If layers rotate by several tables: nobody says which is whose.
    """
    config = vllm_config.model_config.hf_text_config
    asked = getattr(config, "rope_parameters", None)
    if asked is not None:
        pairs = asked.items()
        asked = tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in pairs)
    # vLLM keeps tables by what they were asked for with, those of a process's other engines too.
    found = [
        module
        for key, module in import_module(PLACES["_ROPE_DICT"])._ROPE_DICT.items()
        if (key[0], key[2], key[4]) == (head_size, config.max_position_embeddings, asked)
        and vllm_config.model_config.dtype in key
    ]
    require(len(found) == 1, "rotary tables of the model", len(found), "1")
    return found[0]


def rotary_table(module: Any) -> tuple[Tensor, bool]:
    """cos and sin of every position, and whether pairs are half a head apart."""
    return module.cos_sin_cache.detach(), bool(module.is_neox_style)


def prometheus_instruments() -> dict[str, Any]:
    """Counters and gauges by name, each with the label "phase"; vLLM brings the client."""
    client = import_module("prometheus_client")
    visible = "Tokens that dense attention would have read, over layers and KV heads."
    attended = "Tokens that attention read, over layers and KV heads."
    mass = "Mean attention mass inside the selections since the start, by their own scores."
    reused = "Lists of tokens that the selection cache reused."
    selected = "Lists of tokens that it was asked for and that were selected anew."
    labels = ["phase"]
    return {
        "tokens_visible": client.Counter("kvselect:tokens_visible", visible, labels),
        "tokens_attended": client.Counter("kvselect:tokens_attended", attended, labels),
        "lists_reused": client.Counter("kvselect:lists_reused", reused, labels),
        "lists_selected": client.Counter("kvselect:lists_selected", selected, labels),
        "kept_mass": client.Gauge(
            "kvselect:kept_mass", mass, labels, multiprocess_mode="mostrecent"
        ),
    }


def step_metadata(layer_name: str) -> Any:
    """The attention metadata of the forward pass that runs; None: a warm-up.

    Raises
    ------
    ValueError
        If there is metadata, but none of this layer.
    """
    metadata = import_module("vllm.forward_context").get_forward_context().attn_metadata
    if metadata is None:
        return None
    found = metadata.get(layer_name) if isinstance(metadata, dict) else None
    allowed = f"an entry of {layer_name} (kvselect would leave its tokens out)"
    require(found is not None, "attention metadata", type(metadata).__name__, allowed)
    return found


def tensor_parallel_group() -> torch.distributed.ProcessGroup | None:
    """Ranks with the other heads of this one's layers; None: it has them all."""
    group = import_module("vllm.distributed.parallel_state").get_tp_group()
    return None if group.world_size == 1 else group.cpu_group


def layer_index(layer_name: str) -> int:
    return int(import_module("vllm.model_executor.models.utils").extract_layer_index(layer_name))
