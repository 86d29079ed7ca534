"""vLLM's CPU attention with selecting layers; without a policy, vLLM's CPU attention.

The plug-in puts `SelectingCPUBackend` in the place of vLLM's ``CPU_ATTN``. vLLM stores the step's
keys and values before it asks for its attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kvselect.integrations.vllm.selecting import SelectingImpl, StepBuilder
from kvselect.integrations.vllm.shim import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
    step_metadata,
)
from kvselect.integrations.vllm.state import Step

__all__ = ["SelectingCPUBackend", "SelectingCPUBuilder", "SelectingCPUImpl", "SelectingCPUMetadata"]


class SelectingCPUBackend(CPUAttentionBackend):
    """What vLLM asks for classes; its name stays ``CPU_ATTN``, by which vLLM finds it."""

    @staticmethod
    def get_impl_cls() -> type[SelectingCPUImpl]:
        return SelectingCPUImpl

    @staticmethod
    def get_builder_cls() -> type[SelectingCPUBuilder]:
        return SelectingCPUBuilder


@dataclass
class SelectingCPUMetadata(CPUAttentionMetadata):
    """vLLM's, for layers that do not select, and the step as those that do see it."""

    step: Step | None = None


class SelectingCPUBuilder(StepBuilder, CPUAttentionMetadataBuilder):
    with_step = SelectingCPUMetadata


class SelectingCPUImpl(SelectingImpl, CPUAttentionBackendImpl):
    device_type = "cpu"

    def pages(self, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        """Head by head, a block's keys and then its values."""
        num_blocks, num_kv_heads, block_size, _ = kv_cache.shape
        heads_first = kv_cache.view(num_blocks, num_kv_heads, 2 * block_size, -1)
        k, v = heads_first.chunk(2, dim=2)
        return k.transpose(1, 2), v.transpose(1, 2)

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Store the step's keys and values: row by row where the layer selects."""
        if not self.selects(layer):
            super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
            return
        metadata = step_metadata(layer.layer_name)
        if metadata is not None:
            self.store(metadata.step, key, value, kv_cache)

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
        """Attention of the step; ``output`` is written to and returned."""
        scales = (output_scale, output_block_scale)
        if attn_metadata is None or not self.selects(layer):
            step = (query, key, value, kv_cache, attn_metadata, output)
            return super().forward(layer, *step, *scales)
        return self.attend(query, kv_cache, attn_metadata, output, *scales)
