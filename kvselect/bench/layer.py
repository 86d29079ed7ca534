"""The layer that a bench runs on: its shape, and keys, values and queries that look trained.

Simulated, not captured: the model of METHODS' structured random keys, as
`kvselect.testing.structured_keys` draws it, made chunk by chunk so that a million tokens need no
more memory than their cache.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvselect.cache import KVCache
from kvselect.checks import HEAD_DIMS, STORAGE_DTYPES, require, require_choice, require_int
from kvselect.sketch import bytes_per_token

__all__ = ["DTYPES", "Shape", "StructuredLayer"]

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in STORAGE_DTYPES}

RANK, DECAY, NUM_OUTLIERS, NOISE = 16, 0.98, 8, 0.7
LOGIT_STD = 2.2
ROPE_BASE = 10_000.0
CHUNK_TOKENS = 1_024  # larger temporaries cost more in page faults than calls cost here
DEVICE_CHUNK_TOKENS = 16_384  # of all rows: on a GPU launches cost, not pages
_STEP_TOKENS = 256  # of the signal's recurrence, solved as one triangular product


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Heads, dtype, rows and device of one layer.

    Parameters
    ----------
    batch : int
        Rows, all of one length.
    device : str
        "cpu", "cuda" or "cuda:1".

    Raises
    ------
    ValueError, TypeError
        If a size or the dtype is not one that kvselect runs.
    """

    num_q_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    dtype: str = "bfloat16"
    batch: int = 1
    device: str = "cpu"

    def __post_init__(self) -> None:
        require_int(self.num_kv_heads, "kv-heads", 1)
        require_int(self.num_q_heads, "q-heads", 1)
        allowed = f"a multiple of kv-heads = {self.num_kv_heads}"
        require(self.num_q_heads % self.num_kv_heads == 0, "q-heads", self.num_q_heads, allowed)
        allowed = " or ".join(map(str, HEAD_DIMS))
        require(self.head_dim in HEAD_DIMS, "head-dim", self.head_dim, allowed)
        require_choice(self.dtype, "dtype", tuple(DTYPES))
        require_int(self.batch, "batch", 1)
        allowed = "cpu, cuda or cuda:N"
        require(_is_device(self.device), "device", self.device, allowed)

    @property
    def on_cuda(self) -> bool:
        return self.device != "cpu"

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def group_size(self) -> int:
        return self.num_q_heads // self.num_kv_heads

    @property
    def row_bytes(self) -> int:
        """One token's keys (or values) of all heads of one row."""
        return self.head_dim * self.num_kv_heads * self.torch_dtype.itemsize

    def sketch_bytes(self, sketch: str | None) -> float:
        """Bytes of one token of one row that a scan reads: of its sketch, or of its keys."""
        if sketch is None:
            return self.row_bytes
        return bytes_per_token(sketch, self.head_dim) * self.num_kv_heads

    def cache_bytes(self, num_tokens: int, sketch: str | None) -> int:
        """Memory of a `KVCache` of so many tokens per row."""
        sketched = 0 if sketch is None else self.sketch_bytes(sketch)
        return int(self.batch * num_tokens * (2 * self.row_bytes + sketched))

    def __str__(self) -> str:
        heads = f"{self.num_q_heads}/{self.num_kv_heads} heads of {self.head_dim}"
        rows = "" if self.batch == 1 else f", batch {self.batch}"
        return f"{heads}, {self.dtype}{rows}"

    def new_cache(self, capacity: int, sketch: str | None) -> KVCache:
        """An empty cache with room for ``capacity`` tokens per row."""
        return KVCache(
            self.batch,
            self.num_kv_heads,
            self.head_dim,
            dtype=self.torch_dtype,
            device=self.device,
            capacity=capacity,
            sketch=sketch,
        )


def _is_device(name: str) -> bool:
    return re.fullmatch(r"cpu|cuda(:\d+)?", name) is not None


class StructuredLayer:
    """Draws keys, values and queries of one layer, on its device; every row its own.

    Per KV head: a 16-dimensional signal with autocorrelation .98 mixed into all channels, white
    noise, and 8 channels with a large mean (persistent outliers); then RoPE. Queries mix the same
    signal space; each head is scaled so that its logits have a standard deviation of 2.2. Values
    are Gaussian.
    """

    def __init__(self, shape: Shape, seed: int = 0) -> None:
        self.shape = shape
        self._generator = torch.Generator(shape.device).manual_seed(seed)
        heads, dim = self._all_heads, shape.head_dim
        self._mixing = self._randn(heads, RANK, dim) / RANK**0.5
        order = self._randn(heads, dim).argsort(-1)[:, :NUM_OUTLIERS]
        gain, offset = torch.ones_like(self._mixing[:, 0]), torch.zeros_like(self._mixing[:, 0])
        self._gain = gain.scatter_(1, order, 2.0)
        self._offset = offset.scatter_(1, order, 6.0 * self._randn(heads, NUM_OUTLIERS).sign())
        self._signal = self._randn(heads, RANK)
        self._num_tokens = 0
        self._scale: Tensor | None = None

    @property
    def _all_heads(self) -> int:
        """KV heads of all rows."""
        return self.shape.batch * self.shape.num_kv_heads

    def _randn(self, *size: int) -> Tensor:
        return torch.randn(*size, generator=self._generator, device=self.shape.device)

    def tokens(self, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The next ``count`` tokens, in chunks: keys and values [batch, n, num_kv_heads, head_dim].

        Positions go on from the last call.
        """
        shape, dim = self.shape, self.shape.head_dim
        by_row = (shape.batch, shape.num_kv_heads, dim)
        chunk = CHUNK_TOKENS
        if shape.on_cuda:
            chunk = max(DEVICE_CHUNK_TOKENS // shape.batch, CHUNK_TOKENS)
        while count > 0:
            n = min(count, chunk)
            k = torch.einsum("tgr,grd->tgd", self._next_signal(n), self._mixing)
            k += NOISE * self._randn(n, self._all_heads, dim)
            k = k * self._gain + self._offset
            at = torch.arange(self._num_tokens, self._num_tokens + n, device=k.device)
            k = rotated(k, at[:, None]).view(n, *by_row).transpose(0, 1)
            v = self._randn(shape.batch, n, shape.num_kv_heads, dim)
            yield k.to(shape.torch_dtype), v.to(shape.torch_dtype)
            self._num_tokens += n
            count -= n

    def fill(self, caches: Sequence[KVCache], count: int) -> None:
        """Append the next ``count`` tokens to every cache."""
        for k, v in self.tokens(count):
            for cache in caches:
                cache.append(k, v)

    def draw_query(self) -> Tensor:
        """A query before scale and rotation, [batch * num_q_heads, head_dim] float32."""
        heads, group, dim = self._all_heads, self.shape.group_size, self.shape.head_dim
        q = torch.einsum("ghr,grd->ghd", self._randn(heads, group, RANK), self._mixing)
        return (q + NOISE * self._randn(heads, group, dim)).reshape(-1, dim)

    def drifted(self, q: Tensor, rho: float, *, white: bool = False) -> Tensor:
        """``rho * q + sqrt(1 - rho^2) * fresh``.

        ``fresh`` is another query of this layer, so that all are equally likely; or, if ``white``,
        noise in all directions as long as ``q``, which moves the logits less.
        """
        fresh = self.draw_query()
        if white:
            length = q.norm(dim=-1, keepdim=True) * q.shape[-1] ** -0.5
            fresh = length * self._randn(*q.shape)
        share: float = (1 - rho**2) ** 0.5
        return rho * q + share * fresh

    def query(
        self, q: Tensor, cache: KVCache, position: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """A drawn query as attention over ``cache`` meets it: rotated, and before RoPE.

        Rotated to ``position``; None: to the last token's.

        Heads are scaled by what gives the first query asked for here its standard deviation.

        Returns
        -------
        Two tensors [batch, 1, num_q_heads, head_dim] of the layer's dtype
        """
        at = cache.max_seqlen - 1 if position is None else position
        at_end = rotated(q, torch.tensor([at], device=q.device))
        if self._scale is None:
            stride = max(cache.max_seqlen // 8192, 1)
            keys = cache.k[:, ::stride].float().transpose(0, 1).flatten(1, 2)
            folded = at_end.view(self._all_heads, self.shape.group_size, -1)
            logits = torch.einsum("ghd,tgd->ght", folded, keys) * self.shape.head_dim**-0.5
            self._scale = (LOGIT_STD / logits.std(-1)).reshape(-1, 1)
        dtype, size = self.shape.torch_dtype, (self.shape.batch, 1, -1, self.shape.head_dim)
        return (self._scale * at_end).view(size).to(dtype), (self._scale * q).view(size).to(dtype)

    @property
    def scale(self) -> Tensor:
        """Factor of each query head, [batch * num_q_heads, 1]; fixed by the first `query`."""
        assert self._scale is not None, "query() fixes it"
        return self._scale

    def _next_signal(self, count: int) -> Tensor:
        """[count, heads of all rows, RANK]: first-order autoregression, variance 1."""
        power = torch.arange(_STEP_TOKENS, device=self._signal.device)
        lag = power[:, None] - power
        fresh_to_signal = (1 - DECAY**2) ** 0.5 * torch.where(
            lag >= 0, DECAY ** lag.clamp(min=0).double(), 0.0
        )
        carry = (DECAY ** (power + 1).double()).float()[:, None, None]
        parts = []
        for begin in range(0, count, _STEP_TOKENS):
            n = min(count - begin, _STEP_TOKENS)
            fresh = self._randn(n, self._all_heads, RANK)
            part = torch.einsum("ts,sgr->tgr", fresh_to_signal[:n, :n].float(), fresh)
            part += carry[:n] * self._signal
            self._signal = part[-1]
            parts.append(part)
        return torch.cat(parts)


def rotated(x: Tensor, positions: Tensor) -> Tensor:
    """RoPE in halves; ``positions`` broadcasts over the leading dims of ``x`` [..., head_dim]."""
    pairs = x.shape[-1] // 2
    exponents = torch.arange(pairs, dtype=torch.float64, device=positions.device)
    inv_freq = ROPE_BASE ** (-exponents / pairs)
    angles = positions[..., None].double() * inv_freq
    cos, sin = angles.cos().float(), angles.sin().float()
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
