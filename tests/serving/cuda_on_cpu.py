"""The classes of the CUDA backend in the place of vLLM's CPU backend, on CPU tensors.

What they take from vLLM is real but for Triton's two kernels, which plain torch stands in for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from kvselect.integrations.vllm import shim
from kvselect.integrations.vllm.config import require_policy
from kvselect.integrations.vllm.cuda_backend import SelectingCudaBackend, SelectingCudaImpl
from kvselect.integrations.vllm.plugin import CPU_BACKENDS


class Impl(SelectingCudaImpl):
    device_type = "cpu"  # whose memory is asked for

    def require_backend(self) -> None:
        require_policy(self._policy)


class Backend(SelectingCudaBackend):
    @staticmethod
    def get_name() -> str:
        return "CPU_ATTN"

    @staticmethod
    def get_impl_cls() -> type[Impl]:
        return Impl


def store(
    key: Tensor, value: Tensor, keys: Tensor, values: Tensor, slots: Tensor, *quantisation: Any
) -> None:
    """triton_reshape_and_cache_flash: caches are [num_blocks, block_size, heads, head_dim]."""
    kept = slots >= 0
    block, place = slots[kept] // keys.shape[1], slots[kept] % keys.shape[1]
    keys[block, place] = key[: len(slots)][kept]
    values[block, place] = value[: len(slots)][kept]


def attend(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    cu_seqlens_q: Tensor,
    seqused_k: Tensor,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int],
    block_table: Tensor,
    **others: Any,
) -> None:
    """unified_attention, in float64: ``window_size[0]`` tokens before each query, -1: all."""
    assert causal and others["softcap"] == 0 and others["sinks"] is None
    for row, length in enumerate(seqused_k.tolist()):
        begin, end = cu_seqlens_q[row : row + 2].tolist()
        pages = block_table[row].long()
        keys, values = (x[pages].flatten(0, 1)[:length].double() for x in (k, v))
        group = q.shape[1] // k.shape[2]
        keys, values = (x.repeat_interleave(group, 1) for x in (keys, values))
        place = torch.arange(length - end + begin, length)[:, None]
        seen = torch.arange(length) <= place
        if window_size[0] >= 0:
            seen &= torch.arange(length) >= place - window_size[0]
        logits = torch.einsum("qhd,khd->hqk", q[begin:end].double(), keys) * softmax_scale
        weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
        out[begin:end] = torch.einsum("hqk,khd->qhd", weights, values).to(out.dtype)


@contextmanager
def cuda_classes() -> Iterator[None]:
    """Engines that are started inside run them."""
    import_module("vllm.plugins").load_general_plugins()  # ours would come after this
    triton = import_module("vllm.v1.attention.backends.triton_attn")
    chosen = import_module("vllm.v1.attention.selector")._cached_get_attn_backend
    utils = import_module("vllm.v1.attention.backends.utils")
    forget_layout = getattr(utils, "set_kv_cache_layout", lambda _: None)  # 0.28.0 keeps one
    kernels = triton.triton_reshape_and_cache_flash, triton.unified_attention
    triton.triton_reshape_and_cache_flash, triton.unified_attention = store, attend
    shim.override_backends({"CPU_ATTN": f"{__name__}.Backend"})
    chosen.cache_clear()
    forget_layout(None)
    try:
        yield
    finally:
        triton.triton_reshape_and_cache_flash, triton.unified_attention = kernels
        shim.override_backends(CPU_BACKENDS)
        chosen.cache_clear()
        forget_layout(None)
