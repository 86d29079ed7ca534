"""vLLM's Triton attention with selecting layers: the ``CUSTOM`` backend of its CUDA platform.

Triton's, because its blocks are addressed by any strides, hold a token's key and value side by
side, and come in every dtype that we store. A step's lengths are read on the host, so vLLM is told
that no CUDA graph can hold one; piecewise graphs of the rest of the model run attention between
them, and all of it: keys and values are stored inside `SelectingCudaImpl.forward`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvselect.integrations.vllm.config import require_cuda, require_policy
from kvselect.integrations.vllm.selecting import SelectingImpl, StepBuilder
from kvselect.integrations.vllm.shim import (
    AttentionCGSupport,
    MultipleOf,
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadata,
    TritonAttentionMetadataBuilder,
)
from kvselect.integrations.vllm.state import Step
from kvselect.sketch import BLOCK_TOKENS

__all__ = [
    "SelectingCudaBackend",
    "SelectingCudaBuilder",
    "SelectingCudaImpl",
    "SelectingCudaMetadata",
]


class SelectingCudaBackend(TritonAttentionBackend):
    """What vLLM asks for classes, and whether they fit."""

    forward_includes_kv_cache_update = True

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[SelectingCudaImpl]:
        return SelectingCudaImpl

    @staticmethod
    def get_builder_cls() -> type[SelectingCudaBuilder]:
        return SelectingCudaBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        """Whole blocks of a sketch, whatever the policy: vLLM's default becomes 128."""
        return [MultipleOf(BLOCK_TOKENS)]

    @classmethod
    def supports_block_size(cls, block_size: int | None) -> bool:
        return block_size is None or block_size % BLOCK_TOKENS == 0

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        return bool(capability.major >= 8)

    @classmethod
    def supports_non_causal(cls) -> bool:
        return False

    @classmethod
    def supports_rswa(cls) -> bool:
        return False

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return False

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        return False


@dataclass
class SelectingCudaMetadata(TritonAttentionMetadata):
    """vLLM's, for layers that do not select, and the step as those that do see it."""

    step: Step | None = None


class SelectingCudaBuilder(StepBuilder, TritonAttentionMetadataBuilder):
    _cudagraph_support = AttentionCGSupport.NEVER
    supports_draft_decode_metadata_update = False
    with_step = SelectingCudaMetadata


class SelectingCudaImpl(SelectingImpl, TritonAttentionImpl):
    device_type = "cuda"

    def require_backend(self) -> None:
        require_policy(self._policy)
        require_cuda()

    @staticmethod
    def page_block_size(vllm_config: Any) -> int:
        """The smallest: vLLM chooses later, among multiples of it."""
        return BLOCK_TOKENS

    def pages(self, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        """Token by token, its key and then its value."""
        k, v = torch.split(kv_cache.transpose(1, 2), self.head_size, dim=-1)
        return k, v

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        return False

    def fused_rope_kvcache_supported(self) -> bool:
        return False

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Store the step's keys and values, then attend; ``output`` is written to and returned."""
        scales = (output_scale, output_block_scale)
        if attn_metadata is None or not self.selects(layer):
            if attn_metadata is not None and self.kv_sharing_target_layer_name is None:
                slots = attn_metadata.slot_mapping
                self.do_kv_cache_update(layer, key, value, kv_cache, slots)
            step = (query, key, value, kv_cache, attn_metadata, output)
            return super().forward(layer, *step, *scales)
        self.store(attn_metadata.step, key, value, kv_cache)
        return self.attend(query, kv_cache, attn_metadata, output, *scales)
