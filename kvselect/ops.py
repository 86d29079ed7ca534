"""Loads the compiled extension, gives every op a fake kernel, says what is built and what runs.

The ops are ``torch.ops.kvselect.<name>``; ``csrc/bindings/ops.cpp`` lists their schemas. Fakes tell
``torch.compile`` and ``torch.export`` the shapes and dtypes of outputs; they compute nothing.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from kvselect.checks import require, require_bool, require_type

__all__ = [
    "build_info",
    "cpu_implementation",
    "cpu_implementations",
    "set_cpu_implementation",
    "set_cuda_overlap",
]

Fake = TypeVar("Fake", bound=Callable[..., object])


def _load(name: str) -> None:
    path = Path(__file__).with_name(f"{name}.abi3.so")
    if not path.is_file():
        raise ImportError(
            f"kvselect is not built: {path.name} is missing beside {Path(__file__).name}. "
            "Build it with torch >= 2.11 already installed: pip install --no-build-isolation -e ."
        )
    try:
        torch.ops.load_library(path)  # type: ignore[no-untyped-call]
    except OSError as error:
        raise ImportError(
            f"{path.name} does not load into torch {torch.__version__} ({error}). "
            "Build it again for this environment: pip install --no-build-isolation -e ."
        ) from error


_load("_C")
if torch.version.cuda is not None and Path(__file__).with_name("_C_cuda.abi3.so").is_file():
    _load("_C_cuda")


def _refuse_cuda() -> torch.library.Library:
    """Ops without a CUDA kernel say so, and why; torch's own words name neither.

    They stay refused as long as the library that is returned lives.
    """
    registered = torch._C._dispatch_get_registrations_for_dispatch_key
    cpu, cuda = set(registered("CPU")), set(registered("CUDA"))
    loaded = any("_C_cuda" in str(path) for path in torch.ops.loaded_libraries)
    if loaded:
        reason = "this op has no CUDA kernel"
    elif torch.version.cuda is None:
        reason = f"torch {torch.__version__} has no CUDA"
    else:
        reason = "this kvselect was built without its CUDA module: build it where nvcc is"
    library = torch.library.Library("kvselect", "IMPL", "CUDA")  # type: ignore[no-untyped-call]
    for name in sorted(cpu - cuda):
        if name.startswith("kvselect::"):
            refusal = _refusal(name, reason)
            library.impl(name.removeprefix("kvselect::"), refusal)  # type: ignore[no-untyped-call]
    return library


def _refusal(op: str, reason: str) -> Callable[..., object]:
    def refuse(*args: object, **kwargs: object) -> object:
        raise ValueError(f"{op}: got CUDA tensors, allowed: tensors on the CPU ({reason})")

    return refuse


_REFUSED_ON_CUDA = _refuse_cuda()


def _fake(op: str) -> Callable[[Fake], Fake]:
    """Register the decorated function as the fake kernel of an op; torch's decorator is untyped."""
    register: Callable[[Fake], Fake] = torch.library.register_fake(f"kvselect::{op}")
    return register


@_fake("kv_append")
def _kv_append(
    k: Tensor,
    v: Tensor,
    num_valid: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor | None,
    cache_seqlens: Tensor,
    sketch: Tensor | None,
    sketch_format: str,
    num_nonfinite: Tensor,
    starts: Tensor | None = None,
    sketch_in_pages: bool = False,
) -> None:
    return None


@_fake("score_tokens")
def _score_tokens(
    q: Tensor,
    q_local: Tensor | None,
    k_cache: Tensor,
    block_table: Tensor | None,
    cache_seqlens: Tensor,
    starts: Tensor | None,
    sketch: Tensor | None,
    sketch_format: str,
    q_block_offsets: Tensor | None,
    seqlen_q: int,
    window_rule: str,
    num_sink_tokens: int,
    num_recent_tokens: int,
    keep: int,
    scale: float,
    normalise_candidates_only: bool,
    max_vote: bool,
    cos: Tensor | None,
    sin: Tensor | None,
    rope_start: int,
    rope_interleaved: bool,
    hit: Tensor | None,
    max_seqlen_k: int,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
    ranking: Tensor | None = None,
    sketch_in_pages: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, num_blocks, num_vectors, num_q_heads, _ = q.shape
    num_kv_heads = k_cache.shape[2]
    return (
        q.new_empty((batch, num_blocks, num_kv_heads, max_seqlen_k), dtype=torch.float32),
        q.new_empty((batch, num_blocks, num_vectors, num_q_heads), dtype=torch.float32),
        q.new_empty((batch, num_blocks, num_kv_heads), dtype=torch.int64),
    )


@_fake("score_tokens.reuse")
def _score_tokens_reuse(
    q: Tensor,
    q_local: Tensor | None,
    k_cache: Tensor,
    block_table: Tensor | None,
    cache_seqlens: Tensor,
    starts: Tensor | None,
    sketch: Tensor | None,
    sketch_format: str,
    q_block_offsets: Tensor | None,
    seqlen_q: int,
    window_rule: str,
    num_sink_tokens: int,
    num_recent_tokens: int,
    keep: int,
    scale: float,
    normalise_candidates_only: bool,
    max_vote: bool,
    cos: Tensor | None,
    sin: Tensor | None,
    rope_start: int,
    rope_interleaved: bool,
    hit: Tensor,
    max_seqlen_k: int,
    softcap: float,
    sink_logits: Tensor | None,
    ranking: Tensor | None,
    sketch_in_pages: bool,
    compared_q: Tensor,
    cache_nonfinite: Tensor,
    similarity: str,
    similarity_threshold: float,
    max_age: int,
    dense_limit: int,
    anchor_query: Tensor,
    age: Tensor,
    expected_seqlens: Tensor,
    known_nonfinite: Tensor,
    reuse_counts: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, num_blocks, num_vectors, num_q_heads, _ = q.shape
    num_kv_heads = k_cache.shape[2]
    return (
        q.new_empty((batch, num_blocks, num_kv_heads, max_seqlen_k), dtype=torch.float32),
        q.new_empty((batch, num_blocks, num_vectors, num_q_heads), dtype=torch.float32),
        q.new_empty((batch, num_blocks, num_kv_heads), dtype=torch.int64),
    )


@_fake("select_tokens")
def _select_tokens(
    scores: Tensor,
    cache_seqlens: Tensor,
    starts: Tensor | None,
    q_block_offsets: Tensor | None,
    seqlen_q: int,
    window_rule: str,
    num_sink_tokens: int,
    num_recent_tokens: int,
    keep: int,
    pool_width: int,
    hit: Tensor | None,
    indices: Tensor,
    topk_length: Tensor,
    kept_score: Tensor,
    ranking: Tensor | None = None,
) -> None:
    return None


@_fake("sparse_attention")
def _sparse_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor | None,
    cache_seqlens: Tensor,
    starts: Tensor | None,
    indices: Tensor | None,
    topk_length: Tensor | None,
    q_block_offsets: Tensor | None,
    softmax_scale: float,
    cos: Tensor | None,
    sin: Tensor | None,
    rope_start: int,
    rope_interleaved: bool,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=torch.float32)


@_fake("list_blocks")
def _list_blocks(
    picked: Tensor,
    first_block: Tensor,
    end: Tensor,
    starts: Tensor | None,
    finite: Tensor,
    num_window_blocks: int,
    width: int,
) -> tuple[Tensor, Tensor]:
    lists = picked.shape[:2]
    return picked.new_empty((*lists, width)), picked.new_empty(lists)


@_fake("gather_tokens")
def _gather_tokens(
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor | None,
    cache_seqlens: Tensor,
    starts: Tensor | None,
    indices: Tensor,
    topk_length: Tensor,
    q_block_offsets: Tensor | None,
    seqlen_q: int,
    cos: Tensor | None,
    sin: Tensor | None,
    rope_start: int,
    rope_interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, num_blocks, num_kv_heads, width = indices.shape
    num_lists = batch * num_blocks * num_kv_heads
    shape = (num_lists * width, k_cache.shape[-1])
    cu_seqlens = indices.new_empty(num_lists + 1)
    return k_cache.new_empty(shape), k_cache.new_empty(shape), cu_seqlens


@_fake("merge_splits")
def _merge_splits(partial_out: Tensor, partial_lse: Tensor) -> tuple[Tensor, Tensor]:
    return partial_out.new_empty(partial_out.shape[1:]), partial_out.new_empty(
        partial_out.shape[1:-1]
    )


@_fake("recovered_mass")
def _recovered_mass(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor | None,
    cache_seqlens: Tensor,
    starts: Tensor | None,
    indices: Tensor,
    topk_length: Tensor,
    q_block_offsets: Tensor | None,
    softmax_scale: float,
    max_seqlen_k: int,
    softcap: float = 0.0,
) -> Tensor:
    return q.new_empty(q.shape[:-1], dtype=torch.float32)


@_fake("block_sparse_attention")
def _block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: Tensor,
    row_offsets: Tensor | None,
    seqlens_q: Tensor | None,
    cache_seqlens: Tensor | None,
    q_block_size: int,
    kv_block_size: int,
    causal: bool,
    softmax_scale: float,
    softcap: float = 0.0,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=torch.float32)


@_fake("block_mass")
def _block_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None,
    seqlens_q: Tensor | None,
    cache_seqlens: Tensor | None,
    q_block_size: int,
    kv_block_size: int,
    causal: bool,
    row_stride: int,
    softmax_scale: float,
    softcap: float = 0.0,
) -> Tensor:
    batch, seqlen_q, num_q_heads, _ = q.shape
    num_q_blocks = (seqlen_q + q_block_size - 1) // q_block_size
    num_kv_blocks = (k.shape[1] + kv_block_size - 1) // kv_block_size
    shape = (batch, num_q_heads, num_q_blocks, num_kv_blocks)
    return q.new_empty(shape, dtype=torch.float32)


@_fake("selection_cache_step")
def _selection_cache_step(
    q: Tensor,
    cache_seqlens: Tensor,
    starts: Tensor | None,
    num_nonfinite: Tensor,
    similarity: str,
    similarity_threshold: float,
    max_age: int,
    dense_limit: int,
    anchor_query: Tensor,
    age: Tensor,
    expected_seqlens: Tensor,
    known_nonfinite: Tensor,
    reuse_counts: Tensor,
) -> Tensor:
    return age.new_empty(age.shape)


@_fake("rolling_sweep")
def _rolling_sweep(
    q: Tensor,
    q_local: Tensor | None,
    k_cache: Tensor,
    block_table: Tensor | None,
    cache_seqlens: Tensor,
    starts: Tensor | None,
    sketch: Tensor | None,
    sketch_format: str,
    num_sink_tokens: int,
    num_recent_tokens: int,
    keep: int,
    scale: float,
    normalise_candidates_only: bool,
    cos: Tensor | None,
    sin: Tensor | None,
    rope_start: int,
    rope_interleaved: bool,
    hit: Tensor | None,
    scan_all: Tensor | None,
    pool: Tensor,
    pool_length: Tensor,
    scanned_to: Tensor,
    next_segment: Tensor,
    indices: Tensor,
    topk_length: Tensor,
    kept_score: Tensor,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    batch, num_lists, _, _ = pool.shape
    return (
        pool.new_empty((batch, num_lists, 2)),
        pool.new_empty((batch, k_cache.shape[2]), dtype=torch.int64),
    )


def build_info() -> dict[str, object]:
    """What this kvselect was built with and what it found here.

    Returns
    -------
    dict
        ``version``, ``compiler``, ``cpp_standard``, ``build_type``, ``target_processor``,
        ``torch_headers`` (the torch it was compiled against), ``torch_abi_target`` (the oldest
        torch it runs on): str;
        ``cuda_archs``: list of str, empty if there is no CUDA module; ``cuda_loaded``: bool;
        ``torch``, ``cuda_runtime`` (of torch, or None), ``python``: str;
        ``cpu_compiled``: list of str, the CPU implementations in this build, slowest first;
        ``cpu_implementations``: those of them that run here; ``cpu_implementation``: the one in
        use; ``cpu_notes``: dict from some of their names to what a user should know about them.
    """
    lines = str(torch.ops.kvselect.build_info()).splitlines()
    info: dict[str, object] = {}
    notes: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition("=")
        if name.startswith("cpu_note_"):
            notes[name.removeprefix("cpu_note_")] = value
        else:
            info[name] = value
    info["cpu_compiled"] = str(info["cpu_compiled"]).split(",")
    info["cpu_notes"] = notes
    info["cuda_archs"] = [arch for arch in str(info["cuda_archs"]).split(",") if arch]
    info["cuda_loaded"] = any("_C_cuda" in str(path) for path in torch.ops.loaded_libraries)
    info["torch"] = str(torch.__version__)
    info["cuda_runtime"] = torch.version.cuda
    info["python"] = platform.python_version()
    info["cpu_implementations"] = cpu_implementations()
    info["cpu_implementation"] = cpu_implementation()
    return info


def cpu_implementations() -> list[str]:
    """Names of the CPU implementations that run on this machine, slowest first: "scalar", ..."""
    return str(torch.ops.kvselect.cpu_implementations()).split(",")


def cpu_implementation() -> str:
    """Name of the CPU implementation in use: the fastest that runs here, or what was forced.

    Raises
    ------
    ValueError
        If the environment variable ``KVSELECT_CPU`` names one that does not exist or does not run
        here.
    """
    return str(torch.ops.kvselect.cpu_implementation())


def set_cuda_overlap(on: bool) -> None:
    """Whether a CUDA kernel of ours may start while the one before it finishes, from now on.

    Programmatic dependent launch: effective from sm_90 on, off to begin with. Results are the same
    bits either way.

    Raises
    ------
    TypeError
        If ``on`` is not a bool.
    ValueError
        If the CUDA module is not loaded.
    """
    require_bool(on, "on")
    loaded = build_info()["cuda_loaded"]
    require(loaded is True, "on", on, "with the CUDA module loaded")
    torch.ops.kvselect.set_cuda_overlap(on)


def set_cpu_implementation(name: str) -> None:
    """Use this CPU implementation from now on, in all threads.

    Parameters
    ----------
    name : str
        One of :func:`cpu_implementations`, or "auto" for the fastest of them. The environment
        variable ``KVSELECT_CPU`` does the same for a whole process.

    Raises
    ------
    ValueError
        If the implementation does not exist or does not run here; the one in use stays in use.
    TypeError
        If ``name`` is not a string.
    """
    require_type(name, str, "name", "a str")
    allowed = ["auto", *cpu_implementations()]
    require(name in allowed, "name", name, f"on this CPU {', '.join(allowed)}")
    torch.ops.kvselect.set_cpu_implementation(name)
