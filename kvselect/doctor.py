"""What is built, what runs here, and a one-second check that it computes the right thing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvselect import ops, reference
from kvselect.attention import merge_splits, recovered_mass, sparse_attention
from kvselect.cache import KVCache
from kvselect.crossovers import (
    break_even_mode,
    cache_folder,
    find_all,
    machine_identity,
    shape_of,
    verdict_of,
)
from kvselect.policies.token_select import TokenSelect
from kvselect.score import score_tokens
from kvselect.selection import select_tokens
from kvselect.sketch import encode
from kvselect.testing import make_qkv, rel_err

TOLERANCE = 2e-6  # float32
BFLOAT16_TOLERANCE = 1e-2
# The scan also rounds the query: to 7 bits against int4 codes, to 15 against int8.
SKETCH_TOLERANCE = {"int4": 3e-2, "int8": 2e-4}


@dataclass(frozen=True, slots=True)
class Check:
    """One op of one implementation against the float64 reference.

    Attributes
    ----------
    implementation, op : str
    error : float
        ``|out - ref| / |ref|``, or the share of entries that differ where bits must agree.
    allowed : float
    """

    implementation: str
    op: str
    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed


def describe() -> list[tuple[str, str]]:
    """Name and value of everything worth knowing when something does not work."""
    info = ops.build_info()
    archs = info["cuda_archs"]
    assert isinstance(archs, list)
    if archs:
        cuda = f"built for {', '.join(archs)}, {'loaded' if info['cuda_loaded'] else 'not loaded'}"
    else:
        cuda = "not built"
    names, compiled, notes = ops.cpu_implementations(), info["cpu_compiled"], info["cpu_notes"]
    assert isinstance(compiled, list) and isinstance(notes, dict)
    absent = [name for name in compiled if name not in names]
    kernels = f"{', '.join(names)}; in use: {ops.cpu_implementation()}"
    if absent:
        kernels += f"; not on this CPU: {', '.join(absent)}"
    if not torch.cuda.is_available():
        device = "none that torch can use"
    else:
        device = torch.cuda.get_device_name()
    return [
        ("kvselect", f"{info['version']} ({info['build_type']}, {info['compiler']})"),
        ("python", str(info["python"])),
        ("torch", f"{info['torch']}; compiled against {info['torch_headers']}"),
        ("CPU kernels", kernels),
        *((f"CPU kernels, {name}", note) for name, note in notes.items()),
        ("CUDA kernels", cuda),
        ("CUDA device", device),
        ("threads", str(torch.get_num_threads())),
        ("break-even", _break_even()),
    ]


def _break_even() -> str:
    """Where crossovers are kept, and those that count here with the threads and kernels in use."""
    try:
        mode: str = break_even_mode(default="auto")
    except ValueError as error:
        return str(error)
    try:
        folder = str(cache_folder() / "crossovers")
    except RuntimeError as error:
        folder = f"nowhere ({error})"
    machine = machine_identity()
    own = sorted(
        (found for found in find_all() if found.machine == machine),
        key=lambda found: found.measured_at,
    )
    head = f"{len(own)} measured for this machine, build and number of threads, in {folder}"
    if mode != "auto":
        head += f"; KVSELECT_BREAK_EVEN={mode}"
    defaults = TokenSelect().to_dict()
    lines = [f"{shape_of(found, defaults)}: {verdict_of(found)}" for found in own]
    return "\n".join([head, *lines])


def check_ops() -> list[Check]:
    """Run every op of every CPU implementation on small inputs; the one in use stays in use."""
    in_use = ops.cpu_implementation()
    checks = []
    try:
        for name in ops.cpu_implementations():
            ops.set_cpu_implementation(name)
            checks += [Check(name, op, call(), allowed) for op, call, allowed in _calls()]
    finally:
        ops.set_cpu_implementation(in_use)
    return checks


def _calls() -> list[tuple[str, Callable[[], float], float]]:
    """Each op with a call that gives its error, and the largest one allowed."""
    # Two KV heads of ten query heads each: whole blocks of sketch meet enough columns for a tile
    # unit. Four such blocks and a rest, of which the window cuts the first and the last.
    q, k, v = make_qkv(1, 1, 600, 20, 2, 64, seed=1)
    cache, cache_int8 = (KVCache(1, 2, 64, sketch=name) for name in ("int4", "int8"))
    cache.append(k, v)
    cache_int8.append(k, v)
    window: dict[str, Any] = {"num_sink_tokens": 4, "num_recent_tokens": 128}
    scores = reference.score_tokens(q, cache, source="keys", **window).float()
    selection = reference.select_tokens(scores, cache.cache_seqlens, topk=32, **window)

    def kv_append() -> float:
        blocks = k[:, :256].reshape(1, 2, 128, 2, 64).permute(0, 3, 1, 2, 4)
        expected = encode(blocks.contiguous(), "int4")
        assert cache.sketch_data is not None
        stored = cache.sketch_data[:, :, :2]
        wrong_keys = float((cache.k != k).double().mean())
        return max(wrong_keys, float((stored != expected.view_as(stored)).double().mean()))

    def scored(keys: KVCache, source: str) -> float:
        got = score_tokens(q, keys, source=source, **window)
        return rel_err(got, reference.score_tokens(q, keys, source=source, **window))

    def select() -> float:
        got = select_tokens(scores, cache.cache_seqlens, topk=32, **window)
        width = min(got.indices.shape[-1], selection.indices.shape[-1])
        return float((got.indices[..., :width] != selection.indices[..., :width]).double().mean())

    def attend() -> float:
        expected = reference.sparse_attention(q, cache, selection)
        return max(map(rel_err, sparse_attention(q, cache, selection), expected))

    def attend_block() -> float:  # by tiles, where there are some
        block = KVCache(1, 2, 64, sketch=None, dtype=torch.bfloat16)
        queries, *tokens = make_qkv(1, 20, 600, 20, 2, 64, dtype=torch.bfloat16, seed=2)
        block.append(*tokens)
        out, lse = sparse_attention(queries, block)
        expected_out, expected_lse = reference.sparse_attention(queries, block)
        return max(rel_err(out, expected_out), rel_err(lse, expected_lse))

    def merge() -> float:
        parts: Tensor = torch.stack([k, v])
        weights = torch.stack([k[..., 0], v[..., 0]])
        expected = reference.merge_splits(parts, weights)
        return max(map(rel_err, merge_splits(parts, weights), expected))

    def recover() -> float:
        return rel_err(
            recovered_mass(q, cache, selection), reference.recovered_mass(q, cache, selection)
        )

    return [
        ("kv_append", kv_append, 0.0),
        ("score_tokens, keys", lambda: scored(cache, "keys"), TOLERANCE),
        ("score_tokens, int4", lambda: scored(cache, "sketch"), SKETCH_TOLERANCE["int4"]),
        ("score_tokens, int8", lambda: scored(cache_int8, "sketch"), SKETCH_TOLERANCE["int8"]),
        ("select_tokens", select, 0.0),
        ("sparse_attention", attend, TOLERANCE),
        ("sparse_attention in blocks", attend_block, BFLOAT16_TOLERANCE),
        ("merge_splits", merge, TOLERANCE),
        ("recovered_mass", recover, TOLERANCE),
    ]
