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
    "AttentionCGSupport": "vllm.v1.attention.backend",
    "CPUMLABackend": "vllm.v1.attention.backends.mla.cpu_mla",
    "AttentionBackendEnum": "vllm.v1.attention.backends.registry",
    "CPUAttentionBackend": "vllm.v1.attention.backends.cpu_attn",
    "CPUAttentionBackendImpl": "vllm.v1.attention.backends.cpu_attn",
    "CPUAttentionMetadata": "vllm.v1.attention.backends.cpu_attn",
    "CPUAttentionMetadataBuilder": "vllm.v1.attention.backends.cpu_attn",
    "MultipleOf": "vllm.v1.attention.backend",
    "TritonAttentionBackend": "vllm.v1.attention.backends.triton_attn",
    "TritonAttentionImpl": "vllm.v1.attention.backends.triton_attn",
    "TritonAttentionMetadata": "vllm.v1.attention.backends.triton_attn",
    "TritonAttentionMetadataBuilder": "vllm.v1.attention.backends.triton_attn",
    "_ROPE_DICT": "vllm.model_executor.layers.rotary_embedding",
    "current_platform": "vllm.platforms",
    "extract_layer_index": "vllm.model_executor.models.utils",
    "get_current_vllm_config": "vllm.config",
    "get_current_vllm_config_or_none": "vllm.config.vllm",
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


def override_backends(class_paths: Mapping[str, str], *, keep_others: bool = False) -> None:
    """Have vLLM take these backends of its enum from these classes, found by path when needed.

    ``keep_others``: but for those that somebody else registered.
    """
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
        if not (keep_others and _is_somebody_elses(known[name])):
            place.register_backend(known[name], class_path)


def _is_somebody_elses(backend: Any) -> bool:
    return bool(backend.is_overridden() and not backend.get_path().startswith("kvselect."))


def backend_path(name: str) -> str | None:
    """Of the class that vLLM itself has for the backend; None: it has no such backend."""
    known = import_module(PLACES["AttentionBackendEnum"]).AttentionBackendEnum.__members__
    path = known[name].value if name in known else None
    return path if isinstance(path, str) and path.startswith("vllm.") else None


def vllm_backends() -> list[str]:
    """Names of all backends that vLLM has a class for."""
    known = import_module(PLACES["AttentionBackendEnum"]).AttentionBackendEnum.__members__
    return [name for name in known if backend_path(name) is not None]


def class_of(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def asked_backend(vllm_config: Any) -> str | None:
    """Name of the backend that the user picked for full attention; None: vLLM picks."""
    config = vllm_config.attention_config
    per_kind = getattr(config, "backend_per_kind", None) or {}
    backend = per_kind.get("full_attention", config.backend)
    return None if backend is None else str(backend.name)


def platform_name() -> str:
    """ "cpu", "cuda", "rocm", ...; "" where vLLM found none."""
    return str(getattr(import_module("vllm.platforms").current_platform, "device_name", ""))


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
        num_ubatches=parallel.num_ubatches if parallel.use_ubatching else 1,
        num_kv_heads=vllm_config.model_config.get_total_num_kv_heads(),
        num_layers=vllm_config.model_config.get_total_num_hidden_layers(),
    )


def asked_cache_bytes(vllm_config: Any, device_type: str) -> int | None:
    """What the user says that keys and values take of one memory: all ranks on the CPU, one on
    CUDA; None: he does not.

    A share of memory is known when the weights have theirs: `allocated_cache_bytes`.
    """
    cache_config = vllm_config.cache_config
    asked = cache_config.kv_cache_memory_bytes
    if asked is None or cache_config.num_gpu_blocks_override is not None:
        return None
    return int(asked * _ranks(vllm_config, device_type))


def allocated_cache_bytes(
    vllm_config: Any, kv_cache_spec: Any, num_layers: int, device_type: str
) -> int | None:
    """What vLLM is about to take of one memory for layers of this kind: all blocks, and ranks as
    above; None: it only measures, over a few blocks, as it does before CUDA graphs are captured.

    Layers of other kinds share their blocks.
    """
    num_blocks = vllm_config.cache_config.num_gpu_blocks
    if num_blocks is None and device_type == "cuda":
        return None
    allowed = "an int, before blocks are made"
    require(isinstance(num_blocks, int), "num_gpu_blocks", num_blocks, allowed)
    ranks = _ranks(vllm_config, device_type)
    return int(num_blocks * kv_cache_spec.page_size_bytes * num_layers * ranks)


def _ranks(vllm_config: Any, device_type: str) -> int:
    """Ranks that share one memory."""
    return 1 if device_type == "cuda" else int(vllm_config.parallel_config.local_world_size)


def available_bytes(device_type: str) -> int:
    """Memory that is free: of this machine, or of this process's GPU, what torch keeps included."""
    if device_type == "cuda":
        free, _ = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
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


def host_seq_lens(common: Any, has_drafts: bool) -> list[int]:
    """Tokens that each request of a step holds after it, for the host.

    ``common``: vLLM's CommonAttentionMetadata. Its bound on the host is exact but for drafts, which
    the device may have rejected since; then, and without one, the device is waited for.
    """
    lengths, bound = common.seq_lens, common.seq_lens_cpu_upper_bound
    if lengths.device.type != "cpu" and bound is not None and not has_drafts:
        lengths = bound
    return [int(length) for length in lengths[: common.num_reqs].tolist()]


def tensor_parallel_group(device_type: str) -> torch.distributed.ProcessGroup | None:
    """Ranks with the other heads of this one's layers; None: it has them all."""
    group = import_module("vllm.distributed.parallel_state").get_tp_group()
    if group.world_size == 1:
        return None
    return group.cpu_group if device_type == "cpu" else group.device_group


def layer_index(layer_name: str) -> int:
    return int(import_module("vllm.model_executor.models.utils").extract_layer_index(layer_name))
