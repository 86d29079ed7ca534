"""What is built, what runs here, and a one-second check that it computes the right thing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kvselect import ops, reference
from kvselect.attention import merge_splits, recovered_mass, sparse_attention
from kvselect.cache import KVCache
from kvselect.score import score_tokens
from kvselect.selection import select_tokens
from kvselect.sketch import encode
from kvselect.testing import make_qkv, rel_err

TOLERANCE = 2e-6  # float32, as everywhere


@dataclass(frozen=True, slots=True)
class Check:
    """One op of one implementation against the float64 reference.

    Attributes
    ----------
    implementation, op : str
    error : float
        ``|out - ref| / |ref|``, or the share of entries that differ where bits must agree.
    """

    implementation: str
    op: str
    error: float

    @property
    def passed(self) -> bool:
        return self.error <= TOLERANCE


def describe() -> list[tuple[str, str]]:
    """Name and value of everything worth knowing when something does not work."""
    info = ops.build_info()
    archs = info["cuda_archs"]
    assert isinstance(archs, list)
    if archs:
        cuda = f"built for {', '.join(archs)}, {'loaded' if info['cuda_loaded'] else 'not loaded'}"
    else:
        cuda = "not built"
    if not torch.cuda.is_available():
        device = "none that torch can use"
    else:
        device = torch.cuda.get_device_name()
    return [
        ("kvselect", f"{info['version']} ({info['build_type']}, {info['compiler']}, {info['cpp_standard']})"),
        ("python", str(info["python"])),
        ("torch", f"{info['torch']}; compiled against {info['torch_headers']}"),
        ("CPU kernels", f"{', '.join(ops.cpu_implementations())}; in use: {ops.cpu_implementation()}"),
        ("CUDA kernels", cuda),
        ("CUDA device", device),
        ("threads", str(torch.get_num_threads())),
    ]


def check_ops() -> list[Check]:
    """Run every op of every CPU implementation on small inputs; the implementation in use stays in use."""
    in_use = ops.cpu_implementation()
    checks = []
    try:
        for name in ops.cpu_implementations():
            ops.set_cpu_implementation(name)
            checks += [Check(name, op, call()) for op, call in _calls()]
    finally:
        ops.set_cpu_implementation(in_use)
    return checks


def _calls() -> list[tuple[str, Callable[[], float]]]:
    """Each op with a call that gives its error. Two KV heads, group size 2, two blocks of sketch and a rest."""
    q, k, v = make_qkv(1, 1, 300, 4, 2, 64, seed=1)
    cache = KVCache(1, 2, 64, sketch="int4")
    cache.append(k, v)
    window = {"num_sink_tokens": 4, "num_recent_tokens": 128}
    scores = reference.score_tokens(q, cache, source="keys", **window).float()
    selection = reference.select_tokens(scores, cache.cache_seqlens, topk=32, **window)

    def kv_append() -> float:
        blocks = k[:, :256].unflatten(1, (2, 128)).permute(0, 3, 1, 2, 4)
        expected = encode(blocks.contiguous(), "int4")
        assert cache.sketch_data is not None
        stored = cache.sketch_data[:, :, :2]
        wrong_keys = float((cache.k != k).double().mean())
        return max(wrong_keys, float((stored != expected.view_as(stored)).double().mean()))

    def scored(source: str) -> float:
        got = score_tokens(q, cache, source=source, **window)
        return rel_err(got, reference.score_tokens(q, cache, source=source, **window))

    def select() -> float:
        got = select_tokens(scores, cache.cache_seqlens, topk=32, **window)
        width = min(got.indices.shape[-1], selection.indices.shape[-1])
        return float((got.indices[..., :width] != selection.indices[..., :width]).double().mean())

    def attend() -> float:
        pairs = zip(
            sparse_attention(q, cache, selection),
            reference.sparse_attention(q, cache, selection),
            strict=True,
        )
        return max(rel_err(got, expected) for got, expected in pairs)

    def merge() -> float:
        parts: Tensor = torch.stack([k, v])
        weights = torch.stack([k[..., 0], v[..., 0]])
        pairs = zip(merge_splits(parts, weights), reference.merge_splits(parts, weights), strict=True)
        return max(rel_err(got, expected) for got, expected in pairs)

    def recover() -> float:
        return rel_err(
            recovered_mass(q, cache, selection), reference.recovered_mass(q, cache, selection)
        )

    return [
        ("kv_append", kv_append),
        ("score_tokens (keys)", lambda: scored("keys")),
        ("score_tokens (int4 sketch)", lambda: scored("sketch")),
        ("select_tokens", select),
        ("sparse_attention", attend),
        ("merge_splits", merge),
        ("recovered_mass", recover),
    ]
