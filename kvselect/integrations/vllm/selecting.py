"""What the backends of vLLM's platforms share: which layers select, the checks, the engine's step.

`SelectingImpl` and `StepBuilder` stand before a backend's own classes among their bases. Layers
that do not select (sliding windows, ``policy.dense_layers``) keep that backend's storage and
kernels, in the same blocks.
"""

from __future__ import annotations

from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from kvselect.checks import require
from kvselect.integrations.vllm.config import (
    LayerFacts,
    configured_policy,
    describe,
    extra_share,
    needs_rotation,
    require_attention,
    require_layer,
    require_memory,
    require_pages,
    require_server,
)
from kvselect.integrations.vllm.layer import Rotation, ServedLayer, rotation_from_table
from kvselect.integrations.vllm.metrics import METER
from kvselect.integrations.vllm.shim import (
    allocated_cache_bytes,
    asked_cache_bytes,
    attention_layers,
    available_bytes,
    get_current_vllm_config,
    host_seq_lens,
    init_logger,
    is_local,
    layer_index,
    rotary_module,
    rotary_table,
    sees_later_tokens,
    server_facts,
    tensor_parallel_group,
    trained_length,
)
from kvselect.integrations.vllm.state import Step
from kvselect.policies.base import Policy

__all__ = ["SelectingImpl", "StepBuilder"]

logger = init_logger("vllm.kvselect")


class StepBuilder:
    """Adds the `Step` to a backend's metadata; one for all layers of a group.

    Made when weights are loaded and blocks are counted, but not taken: the last checks are here.
    """

    with_step: ClassVar[Any]  # the backend's metadata and a field "step"

    def __init__(
        self, kv_cache_spec: Any, layer_names: Any, vllm_config: Any, device: Any, **options: Any
    ) -> None:
        parts = (kv_cache_spec, layer_names, vllm_config, device)
        super().__init__(*parts, **options)  # type: ignore[call-arg]  # the backend's
        self._selects = False
        self._has_drafts = vllm_config.speculative_config is not None
        policy = configured_policy(additional_config=vllm_config.additional_config)
        if policy is None:
            return
        layers = attention_layers(vllm_config)
        selecting = [layer for layer in layers.values() if _selects(layer)]
        if vllm_config.parallel_config.pipeline_parallel_size == 1:  # else others may have some
            got, allowed = f"0 of {len(layers)}", "at least 1 (windows, dense_layers leave none)"
            require(bool(selecting), "layers that select", got, allowed)
        here = [layers[name] for name in layer_names if _selects(layers[name])]
        if not here:
            return
        self._selects = True
        for layer in here:
            require_attention(type(layer).__name__, sees_later_tokens(layer))
        spec, kind = kv_cache_spec, torch.device(device).type
        require_pages(policy, spec.block_size)
        cache_bytes = allocated_cache_bytes(vllm_config, spec, len(layer_names), kind)
        share = extra_share(policy, spec.block_size, spec.head_size, spec.dtype.itemsize)
        share *= len(selecting) / len(layer_names)
        if cache_bytes is not None:
            require_memory(cache_bytes, round(share * cache_bytes), available_bytes(kind), kind)

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> Any:
        parts = (common_prefix_len, common_attn_metadata, fast_build)
        metadata = super().build(*parts)  # type: ignore[misc]  # the backend's
        if not self._selects:
            return metadata
        METER.publish()
        count = common_attn_metadata.num_reqs
        of_prompt = common_attn_metadata.is_prefilling
        require(of_prompt is not None, "is_prefilling", of_prompt, "a tensor (vLLM's runner says)")
        step = Step(
            common_attn_metadata.query_start_loc_cpu[: count + 1].tolist(),
            host_seq_lens(common_attn_metadata, self._has_drafts),
            common_attn_metadata.block_table_tensor[:count],
            of_prompt[:count].tolist(),
        )
        return self.with_step(**vars(metadata), step=step)


class SelectingImpl:
    """One attention layer: selects, or is what it would be without kvselect."""

    device_type: ClassVar[str]

    num_heads: int
    head_size: int
    scale: float
    logits_soft_cap: float
    sinks: Tensor | None

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
        **of_the_backend: Any,
    ) -> None:
        super().__init__(
            num_heads,  # type: ignore[call-arg]  # the backend's
            head_size,
            scale,
            num_kv_heads,
            alibi_slopes,
            sliding_window,
            kv_cache_dtype,
            logits_soft_cap,
            attn_type,
            kv_sharing_target_layer_name,
            sinks,
            **of_the_backend,
        )
        self._vllm_config = vllm_config = get_current_vllm_config()
        self._policy = configured_policy(additional_config=vllm_config.additional_config)
        self._served: ServedLayer | None = None
        self._trained_length = 0
        self.require_backend()
        if self._policy is None:
            return
        require_server(self._policy, server_facts(vllm_config))
        if sliding_window is not None:
            self._policy = None
            return
        facts = LayerFacts(
            attn_type=attn_type,
            head_dim=head_size,
            dtype=vllm_config.model_config.dtype,
            kv_cache_dtype=kv_cache_dtype,
            has_alibi=alibi_slopes is not None,
            shares_kv=kv_sharing_target_layer_name is not None,
            page_block_size=self.page_block_size(vllm_config),
            device_type=self.device_type,
            softcap=logits_soft_cap or 0.0,
        )
        self._check(self._policy, facts, vllm_config)

    def require_backend(self) -> None:
        """ValueError if this backend cannot run here, or not without a policy."""

    @staticmethod
    def page_block_size(vllm_config: Any) -> int:
        """Tokens of a block, as far as that is known before weights are loaded."""
        return int(vllm_config.cache_config.block_size)

    def pages(self, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of vLLM's blocks [num_blocks, num_kv_heads, page_block_size, ...], each
        [num_blocks, page_block_size, num_kv_heads, head_dim].
        """
        raise NotImplementedError

    def _check(self, policy: Policy, facts: LayerFacts, vllm_config: Any) -> None:
        """Everything that can be known before weights are loaded and memory is taken."""
        require_layer(policy, facts)
        asked = asked_cache_bytes(vllm_config, self.device_type)
        if asked is not None:
            sizes = facts.page_block_size, facts.head_dim, facts.dtype.itemsize
            extra = round(extra_share(policy, *sizes) * asked)
            require_memory(asked, extra, available_bytes(self.device_type), self.device_type)
        if needs_rotation(policy):
            self._trained_length = trained_length(vllm_config)
        if policy.caches_unrotated:
            allowed = f"at most {self._trained_length}, the trained length of the model"
            fits = policy.num_positions <= self._trained_length
            require(fits, "policy.capacity", policy.num_positions, allowed)
            if getattr(policy, "dense_prefill", False):
                longest = vllm_config.model_config.max_model_len
                allowed += ", with positions='compact' and dense_prefill"
                require(longest <= self._trained_length, "max_model_len", longest, allowed)
        logger.info_once("kvselect: full-attention layers run %s", describe(policy))

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """The model is made: what it rotates by can be read."""
        super().process_weights_after_loading(act_dtype)  # type: ignore[misc]  # the backend's
        if self._policy is not None and needs_rotation(self._policy):
            self._rotation()

    def selects(self, layer: Any) -> bool:
        """Whether ``layer``, whose implementation this is, selects."""
        policy = self._policy
        if policy is None or is_local(layer):
            return False
        return layer_index(layer.layer_name) not in policy.dense_layers

    def store(self, step: Step, key: Tensor, value: Tensor, kv_cache: Tensor) -> None:
        """Keep the step's keys and values, row by row."""
        self._serve(kv_cache).store(step, key, value)

    def attend(
        self, query: Tensor, kv_cache: Tensor, attn_metadata: Any, output: Tensor, *scales: Any
    ) -> Tensor:
        """Attention of the step; ``output`` is written to and returned."""
        allowed = "None under kvselect (its kernels write no quantised output)"
        require(all(scale is None for scale in scales), "output_scale", "a tensor", allowed)
        allowed = "True under kvselect (it serves decoders)"
        require(attn_metadata.causal is True, "causal", attn_metadata.causal, allowed)
        self._serve(kv_cache).attend(attn_metadata.step, query, output)
        return output

    def _serve(self, kv_cache: Tensor) -> ServedLayer:
        """The layer over vLLM's blocks, made at its first step: nobody has them before."""
        if self._served is not None and self._served.is_over(kv_cache):
            return self._served
        assert self._policy is not None
        joins_heads = self._policy.joins_heads
        self._served = ServedLayer(
            self._policy,
            *self.pages(kv_cache),
            num_q_heads=self.num_heads,
            softmax_scale=self.scale,
            rotation=self._rotation() if needs_rotation(self._policy) else None,
            softcap=self.logits_soft_cap or None,
            sink_logits=self.sinks,
            process_group=tensor_parallel_group(kv_cache.device.type) if joins_heads else None,
        )
        METER.add(self._served.state)
        return self._served

    def _rotation(self) -> Rotation:
        """The model's, made once for all its layers: it is as long as its contexts."""
        module = rotary_module(self._vllm_config, self.head_size)
        sizes = (self._trained_length, self.head_size)
        made = _ROTATIONS.get(module)
        if made is None or made[0] != sizes:
            made = (sizes, rotation_from_table(*rotary_table(module), *sizes))
            _ROTATIONS[module] = made
        return made[1]


_ROTATIONS: WeakKeyDictionary[Any, tuple[tuple[int, int], Rotation]] = WeakKeyDictionary()


def _selects(layer: Any) -> bool:
    """Of anything that vLLM knows by name."""
    implementation = getattr(layer, "impl", None)
    return isinstance(implementation, SelectingImpl) and implementation.selects(layer)
