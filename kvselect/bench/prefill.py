"""One prefill chunk on a long context: append, sketch, scores, lists and attention together.

Dense contenders take minutes at 128K, so they are timed on some of the KV heads (and the query
heads that read them) and scaled: heads are independent, and every row says how many were timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvselect.attention import sparse_attention
from kvselect.bench.contenders import BOUND, require_agreement
from kvselect.bench.entrants import OUR_DENSE, SELECT_INT4
from kvselect.bench.layer import ROPE_BASE, Shape, StructuredLayer, rotated
from kvselect.bench.measure import (
    ColdCaches,
    Contender,
    interleaved_ms,
    kept_heap,
    read_gb_per_s,
    threads,
)
from kvselect.bench.memory import require_memory
from kvselect.bench.request import OnProgress, check_sizes, no_progress
from kvselect.bench.results import Timing, print_table, timing
from kvselect.bench.watch import AttendedLists, OpWatch, stage_ms
from kvselect.cache import KVCache
from kvselect.checks import require_int
from kvselect.policies.token_select import TokenSelect
from kvselect.prefill import prefill
from kvselect.rope import Rope
from kvselect.testing import rel_err

__all__ = ["QUESTION", "PrefillRequest", "PrefillRow", "check", "run", "show"]

QUESTION = "How long does a prefill chunk take on a long context, selection included?"
MASKED = "torch SDPA, enable_gqa, causal mask"
UNMASKED = "torch SDPA, group folded, no mask"
MATMUL = "torch matmul-softmax-matmul"
SDPA = (MASKED, UNMASKED)
TORCH = (*SDPA, MATMUL)
ROWS_AT_ONCE = 256  # queries of one matrix product: its logits stay a few hundred MB
DRIFT = 0.95  # cosine of neighbouring queries
NUM_SAMPLES = 24  # queries whose outputs and kept mass are computed in float32


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillRequest:
    """What to measure.

    Parameters
    ----------
    tokens : tuple of int
        Context lengths, the chunk included.
    chunk_tokens : int
        Queries of the chunk.
    dense_kv_heads : int
        KV heads that dense contenders are timed on; all of them if there are no more.
    """

    tokens: tuple[int, ...]
    shape: Shape = field(default_factory=Shape)
    chunk_tokens: int = 2048
    topk: int = 2048
    threads: tuple[int, ...] = (1,)
    rounds: int = 3
    dense_kv_heads: int = 1
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillRow:
    """One contender at one length on one number of threads.

    Attributes
    ----------
    timed_kv_heads : int
        Of ``num_kv_heads``; times are of all heads, scaled from these.
    over : dict of name to float
        Time of each torch peer over this row's.
    over_best_sdpa, over_best_torch : float
        The same of the fastest form of SDPA, and of the fastest of all. "group folded, no mask"
        attends to a few tokens too many, in favour of the peer.
    attended_tokens, kept_mass : float
        Per query and KV head; the mass on sampled queries, causal, in float32.
    stages_ms : dict
        Of contenders of kvselect; empty for others.
    """

    tokens: int
    contender: str
    chunk_tokens: int
    timed_kv_heads: int
    num_kv_heads: int
    over: dict[str, float]
    over_best_sdpa: float
    over_best_torch: float
    attended_tokens: float
    kept_mass: float
    output_error: float
    gmac_per_s: float | None
    stages_ms: dict[str, float]
    timing: Timing


def check(request: PrefillRequest) -> None:
    """Refuse what cannot run, before anything is allocated.

    Raises
    ------
    ValueError, TypeError
        For sizes that do not fit each other or the free memory.
    """
    require_int(request.chunk_tokens, "chunk_tokens", 1)
    require_int(request.dense_kv_heads, "dense_kv_heads", 1)
    check_sizes(
        request.tokens,
        request.threads,
        topk=request.topk,
        rounds=request.rounds,
        shortest=request.chunk_tokens + 1,
    )
    for tokens in request.tokens:
        require_memory("tokens", tokens, needed_bytes(request, tokens))


def needed_bytes(request: PrefillRequest, tokens: int) -> int:
    """Memory at one length."""
    shape = request.shape
    heads = min(request.dense_kv_heads, shape.num_kv_heads)
    caches = shape.cache_bytes(tokens, "int4")
    caches += shape.cache_bytes(tokens, None) * heads // shape.num_kv_heads
    mask = 3 * request.chunk_tokens * tokens  # bool, and what torch makes of it
    mask += 8 * ROWS_AT_ONCE * heads * shape.group_size * tokens  # logits of one product
    samples = 8 * NUM_SAMPLES * shape.group_size * tokens + 8 * shape.head_dim * tokens
    scores = 4 * tokens * (request.chunk_tokens // 64 + 16) * shape.num_q_heads
    return caches + mask + samples + scores + (1 << 30)


def run(request: PrefillRequest, on_progress: OnProgress = no_progress) -> list[PrefillRow]:
    """Measure every length on every number of threads.

    Raises
    ------
    DisagreementError
        If an output is further from float32 than its dtype explains; nothing is timed then.
    """
    check(request)
    rows: list[PrefillRow] = []
    for tokens in request.tokens:
        rows += _Bench(request, tokens, on_progress, tokens / sum(request.tokens)).rows()
    return rows


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chunk:
    """A contender: its call gives the outputs of some heads, [chunk, heads, head_dim]."""

    call: Callable[[], Tensor]
    kv_heads: int
    prepare: Callable[[], object] | None = None
    causal: bool = True
    selects: bool = False


class _Bench:
    """One length: inputs, contenders, checks."""

    def __init__(
        self, request: PrefillRequest, tokens: int, on_progress: OnProgress, weight: float
    ) -> None:
        self.request, self.tokens = request, tokens
        self.on_progress, self.weight = on_progress, weight
        shape, chunk = request.shape, request.chunk_tokens
        on_progress(f"{tokens} tokens: keys", 0.0)
        layer = StructuredLayer(shape, request.seed)
        self.cache = shape.new_cache(tokens, "int4")
        layer.fill([self.cache], tokens - chunk)
        parts = list(layer.tokens(chunk))
        self.new_k, self.new_v = (torch.cat(part, dim=1) for part in zip(*parts))
        self.cache.append(self.new_k, self.new_v)
        self.q, self.q_unrotated = _queries(layer, self.cache, chunk)
        pairs = shape.head_dim // 2
        inv_freq = ROPE_BASE ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
        self.rope = Rope.from_frequencies(inv_freq, tokens)
        self.sampled = torch.linspace(0, chunk - 1, min(NUM_SAMPLES, chunk)).round().long()

        heads = min(request.dense_kv_heads, shape.num_kv_heads)
        self.dense_heads, q_heads = heads, heads * shape.group_size
        self.k = self.cache.k[:, :, :heads].transpose(1, 2).contiguous()
        self.v = self.cache.v[:, :, :heads].transpose(1, 2).contiguous()
        self.dense_q = self.q[:, :, :q_heads].contiguous()
        self.dense_cache = KVCache(
            1, heads, shape.head_dim, dtype=shape.torch_dtype, capacity=tokens, sketch=None
        )
        self.dense_cache.append(self.k.transpose(1, 2), self.v.transpose(1, 2))
        self.policy = TokenSelect(topk=request.topk, dense_below_tokens=0)
        self.state = self.policy.new_state(self.cache)

    def chunks(self) -> dict[str, _Chunk]:
        """The contenders by name."""
        chunk, heads = self.request.chunk_tokens, self.dense_heads
        rows = self.dense_q.transpose(1, 2)  # [1, q heads, chunk, head_dim]
        row = torch.arange(self.tokens - chunk, self.tokens)
        mask = torch.arange(self.tokens)[None, :] <= row[:, None]

        def masked() -> Tensor:
            out = scaled_dot_product_attention(
                rows, self.k, self.v, attn_mask=mask, enable_gqa=True
            )
            return out[0].transpose(0, 1)

        def unmasked() -> Tensor:
            folded = rows.reshape(1, heads, -1, rows.shape[-1])
            out = scaled_dot_product_attention(folded, self.k, self.v)
            return out.view(-1, chunk, rows.shape[-1]).transpose(0, 1)

        later = torch.ones(chunk, chunk, dtype=torch.bool).triu(1)

        def matmul() -> Tensor:
            scaled, parts = self.dense_q[0] * rows.shape[-1] ** -0.5, []
            for begin in range(0, chunk, ROWS_AT_ONCE):
                end = min(begin + ROWS_AT_ONCE, chunk)
                visible = self.tokens - chunk + end
                some = scaled[begin:end].transpose(0, 1).reshape(heads, -1, rows.shape[-1])
                logits = some @ self.k[0, :, :visible].transpose(1, 2)
                diagonal = logits.view(heads, -1, end - begin, visible)[..., begin - end :]
                diagonal.masked_fill_(later[: end - begin, : end - begin], -torch.inf)
                out = torch.softmax(logits, -1) @ self.v[0, :, :visible]
                parts.append(out.view(-1, end - begin, out.shape[-1]).transpose(0, 1))
            return torch.cat(parts)

        def ours() -> Tensor:
            self.cache.append(self.new_k, self.new_v)
            out, _ = prefill(
                self.q,
                self.cache,
                self.policy,
                self.state,
                q_unrotated=self.q_unrotated,
                rope=self.rope,
            )
            return out[0]

        def dense() -> Tensor:
            return sparse_attention(self.dense_q, self.dense_cache)[0][0]

        return {
            MASKED: _Chunk(call=masked, kv_heads=heads),
            UNMASKED: _Chunk(call=unmasked, kv_heads=heads, causal=False),
            MATMUL: _Chunk(call=matmul, kv_heads=heads),
            OUR_DENSE: _Chunk(call=dense, kv_heads=heads),
            SELECT_INT4: _Chunk(
                call=ours,
                kv_heads=self.request.shape.num_kv_heads,
                prepare=partial(self.cache.crop, chunk),
                selects=True,
            ),
        }

    def rows(self) -> list[PrefillRow]:
        """Compare, then time, then rows."""
        request, shape, chunks = self.request, self.request.shape, self.chunks()
        self.on_progress(f"{self.tokens} tokens: outputs", 0.2 * self.weight)
        found = {name: self._compare(name, one) for name, one in chunks.items()}
        self.on_progress(f"{self.tokens} tokens: time", 0.2 * self.weight)
        rows = []
        part = 0.6 * self.weight / (len(request.threads) * request.rounds * len(chunks))
        for number in request.threads:
            with threads(number), kept_heap():
                bandwidth = read_gb_per_s(number)
                samples = interleaved_ms(
                    {
                        name: Contender(call=one.call, prepare=one.prepare)
                        for name, one in chunks.items()
                    },
                    request.rounds,
                    num_threads=number,
                    cold=ColdCaches(),
                    max_seconds=10.0,
                    on_call=lambda name: self.on_progress(f"{self.tokens} tokens: {name}", part),
                )
                scaled = {
                    name: [ms * shape.num_kv_heads / one.kv_heads for ms in samples[name]]
                    for name, one in chunks.items()
                }
                timed = {
                    name: timing(scaled[name], self._bytes(one, found[name][1]), bandwidth, number)
                    for name, one in chunks.items()
                }
                stages = {name: self._stages(one, timed[name]) for name, one in chunks.items()}
            peers = {name: timed[name].median_ms for name in TORCH}
            pairs = request.chunk_tokens * (self.tokens - (request.chunk_tokens - 1) / 2)
            macs = 2 * pairs * shape.num_q_heads * shape.head_dim
            for name, one in chunks.items():
                mass, attended, error = found[name]
                ms = timed[name].median_ms
                rows.append(
                    PrefillRow(
                        tokens=self.tokens,
                        contender=name,
                        chunk_tokens=request.chunk_tokens,
                        timed_kv_heads=one.kv_heads,
                        num_kv_heads=shape.num_kv_heads,
                        over={peer: peer_ms / ms for peer, peer_ms in peers.items()},
                        over_best_sdpa=min(peers[peer] for peer in SDPA) / ms,
                        over_best_torch=min(peers.values()) / ms,
                        attended_tokens=attended,
                        kept_mass=mass,
                        output_error=error,
                        gmac_per_s=None if one.selects else macs / ms / 1e6,
                        stages_ms=stages[name],
                        timing=timed[name],
                    )
                )
        return rows

    def _bytes(self, one: _Chunk, attended: float) -> int:
        """Keys and values once; ours: the sketch once, and every block's list."""
        shape = self.request.shape
        if not one.selects:
            return 2 * shape.row_bytes * self.tokens
        blocks = -(-self.request.chunk_tokens // self.policy.q_block_size)
        listed = 2 * shape.row_bytes * attended * blocks
        return int(shape.sketch_bytes("int4") * self.tokens + listed)

    def _stages(self, one: _Chunk, timed: Timing) -> dict[str, float]:
        if not one.selects:
            return {}
        assert one.prepare is not None
        one.prepare()
        return stage_ms(one.call, timed.median_ms)

    def _compare(self, name: str, one: _Chunk) -> tuple[float, float, float]:
        """Kept mass, tokens attended, error of the output on the sampled queries."""
        if one.prepare is not None:
            one.prepare()
        with OpWatch() as watch, torch.no_grad():
            out = one.call()
        first = self.tokens - self.request.chunk_tokens
        group = self.request.shape.group_size
        lists = _lists_of(watch.attended, self.sampled) if one.selects else None
        attended = float(self.tokens)
        errors, masses, counts = [], [], []
        for head in range(one.kv_heads):
            heads = slice(head * group, (head + 1) * group)
            k, v = (x[0, :, head].float() for x in (self.cache.k, self.cache.v))
            for number, index in enumerate(self.sampled.tolist()):
                visible = first + index + 1 if one.causal else self.tokens
                logits = self.q[0, index, heads].float() @ k[:visible].T * k.shape[1] ** -0.5
                weights, values = torch.softmax(logits, -1), v[:visible]
                entry = None if lists is None else lists[number]
                if entry is not None:
                    listed = entry[head][entry[head] < visible]
                    weights, values = weights[:, listed], v[listed]
                    counts.append(float(len(listed)))
                mass = weights.sum(-1, keepdim=True)
                masses.append(float(mass.mean()))
                errors.append((out[index, heads].float(), weights / mass @ values))
        got, expected = (torch.stack(parts) for parts in zip(*errors))
        error, bound = rel_err(got, expected), BOUND[self.cache.dtype]
        require_agreement(name, self.tokens, error, bound)
        if counts:
            attended = sum(counts) / len(counts)
        return sum(masses) / len(masses), attended, error


def _queries(layer: StructuredLayer, cache: KVCache, count: int) -> tuple[Tensor, Tensor]:
    """A chunk of drifting queries at the end of ``cache``, rotated and before RoPE."""
    q = layer.draw_query()
    layer.query(q, cache)  # fixes the scale of every head
    rows = []
    for _ in range(count):
        q = layer.drifted(q, DRIFT)
        rows.append(q)
    stacked = torch.stack(rows) * layer.scale
    positions = torch.arange(cache.max_seqlen - count, cache.max_seqlen)[:, None]
    dtype = layer.shape.torch_dtype
    return rotated(stacked, positions)[None].to(dtype), stacked[None].to(dtype)


def _lists_of(attended: Sequence[AttendedLists], sampled: Tensor) -> list[Tensor | None]:
    """Of each sampled query the lists of its heads, [num_kv_heads] ragged; None: everything."""
    found: list[Tensor | None] = []
    for index in sampled.tolist():
        begin = 0
        for call in attended:
            if index < begin + call.q.shape[1]:
                found.append(_lists_in(call, index - begin))
                break
            begin += call.q.shape[1]
    return found


def _lists_in(call: AttendedLists, index: int) -> Tensor | None:
    if call.indices is None or call.topk_length is None:
        return None
    block = 0
    if call.q_block_offsets is not None:
        block = int((call.q_block_offsets[1:] <= index).sum())
    indices = call.indices[0, block].long()
    # Padding beyond every visible position: whoever reads the list leaves it out.
    return indices.masked_fill(indices < 0, torch.iinfo(torch.int64).max)


COLUMNS = (
    "",
    "ms",
    "p20-p80",
    "GMAC/s",
    "x SDPA\nmasked",
    "x SDPA\nunmasked",
    "x\nmatmul",
    "x best\ntorch",
    "KV heads\ntimed",
    "tokens\nattended",
    "kept\nmass",
    "output\nerror",
)


def show(request: PrefillRequest, rows: Sequence[PrefillRow]) -> None:
    """One table per length and number of threads, and our stages below it."""
    for tokens in request.tokens:
        for number in request.threads:
            chosen = [row for row in rows if row.tokens == tokens and row.timing.threads == number]
            clock = "CPU time" if number == 1 else "wall time"
            title = (
                f"prefill chunk of {request.chunk_tokens} queries at {tokens} tokens, "
                f"{request.shape}, {number} thread(s), {clock}; structured random keys (simulated)"
            )
            print_table(title, COLUMNS, [_cells(row) for row in chosen])
            for row in chosen:
                if row.stages_ms:
                    total = sum(row.stages_ms.values())
                    shares = (
                        f"{stage} {ms:.0f} ms ({100 * ms / total:.0f} %)"
                        for stage, ms in row.stages_ms.items()
                    )
                    print(f"{row.contender}: {', '.join(shares)}")


def _cells(row: PrefillRow) -> list[str]:
    found = row.timing
    return [
        row.contender,
        f"{found.median_ms:.0f}",
        f"{found.p20_ms:.0f}-{found.p80_ms:.0f}",
        "–" if row.gmac_per_s is None else f"{row.gmac_per_s:.0f}",
        *(f"{row.over[peer]:.2f}" for peer in TORCH),
        f"{row.over_best_torch:.1f}",
        f"{row.timed_kv_heads} of {row.num_kv_heads}",
        f"{row.attended_tokens:.0f}",
        f"{row.kept_mass:.3f}",
        f"{row.output_error:.3f}",
    ]
