"""Inputs that hurt, and how far a result may be from the float64 reference.

For tests, benches and the self-check; nothing here is needed to run a model.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# Bound of rel_err by the dtype that results are stored in.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

# Ways to lay out a cache that every kernel must read with the same bits.
LAYOUTS = ("head_major", "token_major", "paged_16", "paged_1", "paged_128")


def rel_err(out: Tensor, ref: Tensor) -> float:
    """``|out - ref| / |ref|`` (Frobenius norms, float64); an all-zero ``ref`` gives ``|out|``.

    Infinities of ``ref`` (the lse of a row that saw nothing) must be met exactly and are then left
    out. Anything else that is not finite gives inf, so that no comparison with a bound passes.
    """
    out, ref = out.double(), ref.double()
    if out.shape != ref.shape:
        raise ValueError(f"out: got shape {tuple(out.shape)}, allowed: {tuple(ref.shape)}")
    same_infinity = ref.isinf() & (out == ref)
    out, ref = out.masked_fill(same_infinity, 0.0), ref.masked_fill(same_infinity, 0.0)
    error, norm = float((out - ref).norm()), float(ref.norm())
    if not (error < float("inf") and norm < float("inf")):
        return float("inf")
    return error / norm if norm > 0 else error


def make_qkv(
    batch: int,
    seqlen_q: int,
    seqlen_k: int,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gaussian q, k and v, each [batch, seqlen, heads, head_dim].

    Queries are scaled so that logits have a standard deviation of 2 under the default
    softmax_scale: attention that is neither flat nor a single spike.
    """
    generator = torch.Generator().manual_seed(seed)
    q = 2.0 * torch.randn(batch, seqlen_q, num_q_heads, head_dim, generator=generator)
    k = torch.randn(batch, seqlen_k, num_kv_heads, head_dim, generator=generator)
    v = torch.randn(batch, seqlen_k, num_kv_heads, head_dim, generator=generator)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def non_contiguous(x: Tensor) -> Tensor:
    """The values of ``x`` in a tensor whose last dim alone is contiguous; the gaps hold NaN."""
    if not x.is_floating_point():
        wide = torch.full((*x.shape[:-1], x.shape[-1] + 16), -(2**30), dtype=x.dtype)
    else:
        wide = torch.full((*x.shape[:-1], x.shape[-1] + 16), float("nan"), dtype=x.dtype)
    view = wide[..., 8 : 8 + x.shape[-1]]
    view.copy_(x)
    return view


def poison(x: Tensor, seqlens: Tensor, starts: Tensor | None = None) -> Tensor:
    """A copy of ``x`` [batch, seqlen, ...] with NaN outside ``[starts, seqlens)`` of each row."""
    place = torch.arange(x.shape[1], device=x.device)
    dead = place[None, :] >= seqlens.to(x.device)[:, None]
    if starts is not None:
        dead |= place[None, :] < starts.to(x.device)[:, None]
    return x.masked_fill(dead.view(*dead.shape, *[1] * (x.dim() - 2)), float("nan"))


class StoredKV(NamedTuple):
    """Keys and values laid out as the ops take them."""

    k_cache: Tensor  # [num_blocks, page_block_size, num_kv_heads, head_dim]
    v_cache: Tensor
    block_table: Tensor | None  # [batch, max_num_blocks] int32


def store(
    k: Tensor, v: Tensor, seqlens: Tensor, *, layout: str, starts: Tensor | None = None
) -> StoredKV:
    """Lay out ``k``, ``v`` [batch, seqlen, num_kv_heads, head_dim]; all other memory holds NaN.

    "head_major" [batch, num_kv_heads, capacity, head_dim] as Hugging Face has it, "token_major"
    rows of all heads side by side, "paged_N" pages of N tokens in shuffled order with unused ones
    between them (keys and values of a page adjacent, as vLLM has them). Capacity exceeds seqlen.
    """
    batch, seqlen, num_kv_heads, head_dim = k.shape
    k, v = poison(k, seqlens, starts), poison(v, seqlens, starts)
    if layout in ("head_major", "token_major"):
        capacity = seqlen + 3
        shape = (batch, num_kv_heads, capacity, head_dim)
        if layout == "token_major":
            shape = (batch, capacity, num_kv_heads, head_dim)
        views = []
        for x in (k, v):
            buffer = torch.full(shape, float("nan"), dtype=x.dtype)
            view = buffer.transpose(1, 2) if layout == "head_major" else buffer
            view[:, :seqlen] = x
            views.append(view)
        return StoredKV(views[0], views[1], None)
    if not layout.startswith("paged_"):
        raise ValueError(f"layout: got {layout!r}, allowed: {', '.join(LAYOUTS)}")
    page = int(layout.removeprefix("paged_"))
    pages_per_row = -(-seqlen // page)
    num_blocks = batch * pages_per_row + 3
    pool = torch.full((num_blocks, 2, page, num_kv_heads, head_dim), float("nan"), dtype=k.dtype)
    order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(page))
    table = order[: batch * pages_per_row].view(batch, pages_per_row).to(torch.int32)
    for row in range(batch):
        for number in range(pages_per_row):
            first, last = number * page, min((number + 1) * page, seqlen)
            physical = int(table[row, number])
            pool[physical, 0, : last - first] = k[row, first:last]
            pool[physical, 1, : last - first] = v[row, first:last]
    for row in range(batch):  # a page that holds no visible token need not exist
        table[row, -(-int(seqlens[row]) // page) :] = -1
    return StoredKV(pool[:, 0], pool[:, 1], table)


def rope_tables(
    num_positions: int, num_pairs: int, *, base: float = 10_000.0
) -> tuple[Tensor, Tensor]:
    """cos and sin [num_positions, num_pairs], float32, of the ordinary RoPE frequencies."""
    inv_freq = base ** (-torch.arange(num_pairs, dtype=torch.float64) / num_pairs)
    angles = torch.arange(num_positions, dtype=torch.float64)[:, None] * inv_freq
    return angles.cos().float().contiguous(), angles.sin().float().contiguous()


def structured_keys(
    seqlen: int,
    num_kv_heads: int,
    group_size: int,
    head_dim: int,
    *,
    rotated: bool = True,
    logit_std: float = 2.2,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """One query and many keys that look like a trained layer's; simulated, not captured.

    Per KV head: a 16-dimensional signal with autocorrelation .98 mixed into all channels, white
    noise, and 8 channels with a large mean (persistent outliers); then RoPE at positions
    0..seqlen-1, query at seqlen-1. Queries mix the same signal space; each is scaled so that its
    logits have the given standard deviation under softmax_scale = head_dim ** -0.5.

    Returns
    -------
    q : Tensor, [num_kv_heads * group_size, head_dim], float32
    k : Tensor, [seqlen, num_kv_heads, head_dim], float32
    """
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    rank, decay, num_outliers = 16, 0.98, 8
    signal = randn(seqlen, num_kv_heads, rank)
    fresh = (1 - decay**2) ** 0.5
    for t in range(1, seqlen):
        signal[t] = decay * signal[t - 1] + fresh * signal[t]
    mixing = randn(num_kv_heads, rank, head_dim) / rank**0.5
    k = torch.einsum("tgr,grd->tgd", signal, mixing) + 0.7 * randn(seqlen, num_kv_heads, head_dim)
    q = torch.einsum("ghr,grd->ghd", randn(num_kv_heads, group_size, rank), mixing)
    q = q + 0.7 * randn(num_kv_heads, group_size, head_dim)
    for g in range(num_kv_heads):
        channels = torch.randperm(head_dim, generator=generator)[:num_outliers]
        k[:, g, channels] = k[:, g, channels] * 2.0 + 6.0 * randn(num_outliers).sign()
    if rotated:
        cos, sin = rope_tables(seqlen, head_dim // 2)
        k, q = _rotate_halves(k, cos[:, None], sin[:, None]), _rotate_halves(q, cos[-1], sin[-1])
    logits = torch.einsum("ghd,tgd->ght", q, k) * head_dim**-0.5
    q = q * (logit_std / logits.std(-1, keepdim=True))
    return q.reshape(num_kv_heads * group_size, head_dim), k


def _rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def median_cpu_seconds(call: Callable[[], object], *, repeats: int = 9) -> float:
    """Median CPU time of ``call`` over ``repeats`` runs, after one to warm up. [s]

    CPU time of the process, all threads together: on a shared machine it says more than a clock.
    """
    call()
    samples = []
    for _ in range(repeats):
        before = time.process_time()
        call()
        samples.append(time.process_time() - before)
    return statistics.median(samples)
