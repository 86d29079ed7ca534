"""Dense attention that somebody else wrote for GPUs: torch's SDPA by backend, and packages.

None of these packages is required. One that cannot be imported, or that refuses these sizes, is
left out with its own reason.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from kvselect.bench.contenders import folded

__all__ = [
    "PACKAGES",
    "SDPA_BACKENDS",
    "ChunkPeer",
    "gpu_chunk_peers",
    "gpu_dense_peers",
    "sdpa_name",
    "stores_logits",
]

SDPA_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
ARRANGEMENTS = ("group folded", "enable_gqa")
FLASHINFER_WORKSPACE_BYTES = 256 << 20

Call = Callable[[], Tensor]
# Builds the call of one peer for q [batch, 1, num_q_heads, head_dim] and k, v [batch, num_kv_heads,
# seqlen_k, head_dim]; raises whatever keeps it from taking part.
Build = Callable[[Tensor, Tensor, Tensor], Call]


def sdpa_name(backend: str, arrangement: str) -> str:
    """How rows call torch's SDPA with one backend."""
    return f"torch SDPA {backend}, {arrangement}"


def gpu_dense_peers() -> dict[str, Build]:
    """SDPA with each backend alone, group folded into the queries and with ``enable_gqa``; then the
    packages that bring decode attention of their own."""
    sdpa = {
        sdpa_name(backend, arrangement): partial(_build_sdpa, kernel, arrangement)
        for backend, kernel in SDPA_BACKENDS.items()
        for arrangement in ARRANGEMENTS
    }
    return sdpa | PACKAGES


def stores_logits(name: str) -> bool:
    """Whether a peer keeps all logits, and copies of all keys, in memory."""
    return name in {sdpa_name("math", arrangement) for arrangement in ARRANGEMENTS}


def _build_sdpa(backend: SDPBackend, arrangement: str, q: Tensor, k: Tensor, v: Tensor) -> Call:
    grouped = arrangement == "enable_gqa"
    rows = q.transpose(1, 2) if grouped else folded(q, k.shape[1])

    def call() -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(rows, k, v, enable_gqa=grouped)

    call()  # a backend that refuses these sizes says so here
    return call


def _flashinfer(q: Tensor, k: Tensor, v: Tensor) -> Call:
    flashinfer: Any = importlib.import_module("flashinfer")
    batch, _, num_q_heads, head_dim = q.shape
    if batch == 1:
        one = flashinfer.single_decode_with_kv_cache
        return partial(one, q[0, 0], k[0], v[0], kv_layout="HND", use_tensor_cores=True)
    # Every row is one page.
    workspace = q.new_empty(FLASHINFER_WORKSPACE_BYTES, dtype=torch.uint8)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
    ends = q.new_tensor(range(batch + 1), dtype=torch.int32)
    last = q.new_full((batch,), k.shape[2], dtype=torch.int32)
    sizes = (num_q_heads, k.shape[1], head_dim, k.shape[2])
    wrapper.plan(ends, ends[:-1], last, *sizes, q_data_type=q.dtype, kv_data_type=k.dtype)
    return partial(wrapper.run, q[:, 0], (k, v))


def _flash_attn_2(q: Tensor, k: Tensor, v: Tensor) -> Call:
    flash_attn: Any = importlib.import_module("flash_attn")
    keys, values = k.transpose(1, 2), v.transpose(1, 2)
    return partial(flash_attn.flash_attn_with_kvcache, q, keys, values)


def _flash_attn_3(q: Tensor, k: Tensor, v: Tensor) -> Call:
    interface: Any = importlib.import_module("flash_attn_interface")
    keys, values = k.transpose(1, 2), v.transpose(1, 2)
    return partial(interface.flash_attn_with_kvcache, q, keys, values)


def _flash_sparse_attn(q: Tensor, k: Tensor, v: Tensor) -> Call:
    package: Any = importlib.import_module("flash_sparse_attn")
    keys, values = k.transpose(1, 2), v.transpose(1, 2)
    return partial(package.flash_dense_attn_with_kvcache_func, q[:, 0], keys, values)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkPeer:
    """Attention of a chunk of queries at the end of a context.

    Attributes
    ----------
    build : callable
        For q [1, chunk, num_q_heads, head_dim] and k, v [1, num_kv_heads, seqlen_k, head_dim]; its
        call gives [chunk, num_q_heads, head_dim].
    causal : bool
        False: every query sees everything, in favour of the peer.
    sdpa : bool
        It is torch's.
    """

    build: Build
    causal: bool = True
    sdpa: bool = False


def gpu_chunk_peers() -> dict[str, ChunkPeer]:
    """Dense attention of a prefill chunk: SDPA with each fused backend, and packages."""
    peers = {
        "torch SDPA flash, causal": ChunkPeer(build=_build_causal_flash, sdpa=True),
    }
    for backend in ("flash", "cuDNN"):
        build = partial(_build_unmasked, SDPA_BACKENDS[backend])
        peers[f"torch SDPA {backend}, group folded, no mask"] = ChunkPeer(
            build=build, causal=False, sdpa=True
        )
    packages: dict[str, Build] = {
        "flashinfer": _flashinfer_chunk,
        "flash-attn 2": partial(_flash_attn_chunk, "flash_attn"),
        "flash-attn 3": partial(_flash_attn_chunk, "flash_attn_interface"),
        "flash-sparse-attn, dense": _flash_sparse_attn_chunk,
    }
    return peers | {name: ChunkPeer(build=build) for name, build in packages.items()}


def _build_causal_flash(q: Tensor, k: Tensor, v: Tensor) -> Call:
    """The last queries of the context: a causal mask aligned to its lower right corner."""
    rows, bias = q.transpose(1, 2), causal_lower_right(q.shape[1], k.shape[2])

    def call() -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            out: Tensor = scaled_dot_product_attention(rows, k, v, attn_mask=bias, enable_gqa=True)
        return out[0].transpose(0, 1)

    call()
    return call


def _build_unmasked(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Call:
    chunk, _, head_dim = q.shape[1:]
    rows = q.transpose(1, 2).reshape(1, k.shape[1], -1, head_dim)

    def call() -> Tensor:
        with sdpa_kernel(backend):
            out = scaled_dot_product_attention(rows, k, v)
        return out.view(-1, chunk, head_dim).transpose(0, 1)

    call()
    return call


def _flashinfer_chunk(q: Tensor, k: Tensor, v: Tensor) -> Call:
    flashinfer: Any = importlib.import_module("flashinfer")
    one = flashinfer.single_prefill_with_kv_cache
    return partial(one, q[0], k[0], v[0], causal=True, kv_layout="HND")


def _flash_attn_chunk(module: str, q: Tensor, k: Tensor, v: Tensor) -> Call:
    package: Any = importlib.import_module(module)
    keys, values = k.transpose(1, 2), v.transpose(1, 2)

    def call() -> Tensor:
        found = package.flash_attn_func(q, keys, values, causal=True)
        out: Tensor = found[0] if isinstance(found, tuple) else found  # some give the lse as well
        return out[0]

    return call


def _flash_sparse_attn_chunk(q: Tensor, k: Tensor, v: Tensor) -> Call:
    package: Any = importlib.import_module("flash_sparse_attn")
    keys, values = k.transpose(1, 2), v.transpose(1, 2)
    return lambda: package.flash_dense_attn_func(q, keys, values, is_causal=True)[0]


PACKAGES: dict[str, Build] = {
    "flashinfer": _flashinfer,
    "flash-attn 2": _flash_attn_2,
    "flash-attn 3": _flash_attn_3,
    "flash-sparse-attn, dense": _flash_sparse_attn,
}
