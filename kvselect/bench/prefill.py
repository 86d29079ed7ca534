"""One prefill chunk on a long context: append, sketch, scores, lists and attention together.

Dense contenders take minutes at 128K, so they are timed on some of the KV heads (and the query
heads that read them) and scaled: heads are independent, and every row says how many were timed. On
a GPU all of them are, against a GPU's peers (`kvselect.bench.dense_peers`), in CUDA graphs where a
contender can be captured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import nan

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvselect.attention import sparse_attention
from kvselect.bench.contenders import BOUND, exact_dtype, require_agreement
from kvselect.bench.dense_peers import gpu_chunk_peers
from kvselect.bench.entrants import DENSE_KERNEL, OUR_DENSE, SELECT_INT4
from kvselect.bench.expected import expected_chunk_us
from kvselect.bench.graphs import (
    ColdL2,
    DeviceSamples,
    as_reason,
    copy_gb_per_s,
    interleaved_replays,
)
from kvselect.bench.layer import ROPE_BASE, StructuredLayer, rotated
from kvselect.bench.measure import (
    ColdCaches,
    Contender,
    interleaved_ms,
    kept_heap,
    read_gb_per_s,
    threads,
)
from kvselect.bench.prefill_request import (
    MASKED,
    MATMUL,
    NUM_SAMPLES,
    QUESTION,
    ROWS_AT_ONCE,
    TORCH,
    UNMASKED,
    PrefillRequest,
    PrefillRow,
    check,
)
from kvselect.bench.prefill_table import show
from kvselect.bench.request import OnProgress, OnSkip, no_progress
from kvselect.bench.results import Skipped, Timing, timing
from kvselect.bench.watch import AttendedLists, OpWatch, stage_ms
from kvselect.cache import KVCache
from kvselect.fixed_cache import FixedKVCache
from kvselect.policies.base import PolicyState
from kvselect.policies.token_select import TokenSelect
from kvselect.prefill import prefill
from kvselect.rope import Rope
from kvselect.testing import rel_err

__all__ = [
    "MASKED",
    "MATMUL",
    "QUESTION",
    "TORCH",
    "UNMASKED",
    "PrefillRequest",
    "PrefillRow",
    "check",
    "chunk_queries",
    "run",
    "show",
]

DRIFT = 0.95  # cosine of neighbouring queries
DENSE_KERNELS = {"aten._scaled_dot_product_flash_attention_for_cpu": "attention"}


def run(
    request: PrefillRequest,
    on_progress: OnProgress = no_progress,
    on_skip: OnSkip | None = None,
) -> list[PrefillRow]:
    """Measure every length on every number of threads.

    Parameters
    ----------
    on_skip : callable or None
        Told who does not take part, and why: whoever cannot be built, or disagrees with exact
        attention. None: such an error ends the bench.

    Raises
    ------
    DisagreementError
        Without ``on_skip``: if an output is further from float32 than its dtype explains; nothing
        is timed then.
    """
    check(request)
    rows: list[PrefillRow] = []
    for tokens in request.tokens:
        weight = tokens / sum(request.tokens)
        rows += _Bench(request, tokens, on_progress, on_skip, weight).rows()
    return rows


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chunk:
    """A contender: its call gives the outputs of some heads, [chunk, heads, head_dim]."""

    call: Callable[[], Tensor]
    kv_heads: int
    prepare: Callable[[], object] | None = None
    causal: bool = True
    selects: bool = False
    sdpa: bool = False
    dense_peer: bool = False
    state: PolicyState | None = None  # of contenders that select


class _Bench:
    """One length: inputs, contenders, checks."""

    def __init__(
        self,
        request: PrefillRequest,
        tokens: int,
        on_progress: OnProgress,
        on_skip: OnSkip | None,
        weight: float,
    ) -> None:
        self.request, self.tokens = request, tokens
        self.on_progress, self.on_skip, self.weight = on_progress, on_skip, weight
        shape, chunk = request.shape, request.chunk_tokens
        on_progress(f"{tokens} tokens: keys", 0.0)
        layer = StructuredLayer(shape, request.seed)
        self.cache = shape.new_cache(tokens, "int4")
        if request.gpu_peers:  # a graph knows no host: its cache has all lengths on the device
            self.cache = FixedKVCache(
                1,
                shape.num_kv_heads,
                shape.head_dim,
                dtype=shape.torch_dtype,
                device=shape.device,
                capacity=tokens,
                sketch="int4",
            )
        layer.fill([self.cache], tokens - chunk)
        parts = list(layer.tokens(chunk))
        self.new_k, self.new_v = (torch.cat(part, dim=1) for part in zip(*parts))
        self.cache.append(self.new_k, self.new_v)
        self.q, self.q_unrotated = chunk_queries(layer, self.cache, chunk)
        pairs = shape.head_dim // 2
        inv_freq = ROPE_BASE ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
        self.rope = Rope.from_frequencies(inv_freq, tokens, device=self.cache.device)
        self.sampled = torch.linspace(0, chunk - 1, min(NUM_SAMPLES, chunk)).round().long()

        heads = request.timed_kv_heads
        self.dense_heads, q_heads = heads, heads * shape.group_size
        self.policy = TokenSelect(topk=request.topk, dense_below_tokens=0)
        self.state = self.policy.new_state(self.cache)
        self.copying = dataclasses.replace(self.policy, prefill_attention="dense_kernel")
        self.copying_state = self.copying.new_state(self.cache)
        self.dense_q, self.dense_cache = self.q, self.cache
        if request.gpu_peers:
            self.k, self.v = self.cache.k.transpose(1, 2), self.cache.v.transpose(1, 2)
            return
        self.k = self.cache.k[:, :, :heads].transpose(1, 2).contiguous()
        self.v = self.cache.v[:, :, :heads].transpose(1, 2).contiguous()
        self.dense_q = self.q[:, :, :q_heads].contiguous()
        self.dense_cache = KVCache(
            1, heads, shape.head_dim, dtype=shape.torch_dtype, capacity=tokens, sketch=None
        )
        self.dense_cache.append(self.k.transpose(1, 2), self.v.transpose(1, 2))

    def skip(self, name: str, error: Exception) -> None:
        """Report who does not take part; without anybody to report to, that is an error."""
        if self.on_skip is None:
            raise error
        self.on_skip(Skipped(tokens=self.tokens, contender=name, reason=as_reason(error)))

    def chunks(self) -> dict[str, _Chunk]:
        """The contenders by name."""
        return self._gpu_chunks() if self.request.gpu_peers else self._cpu_chunks()

    def _set_length(self, tokens: int) -> None:
        """Of a cache with all lengths on the device: the same after every call of a contender."""
        self.cache.cache_seqlens.fill_(tokens)

    def _ours(self, policy: TokenSelect, state: PolicyState) -> Tensor:
        self.cache.append(self.new_k, self.new_v)
        out, _ = prefill(
            self.q,
            self.cache,
            policy,
            state,
            q_unrotated=self.q_unrotated,
            rope=self.rope,
        )
        return out[0]

    def _our_chunks(self, kv_heads: int, prepare: Callable[[], object]) -> dict[str, _Chunk]:
        """Selection, its lists attended by our kernel and by a dense one."""
        return {
            name: _Chunk(
                call=partial(self._ours, policy, state),
                kv_heads=kv_heads,
                prepare=prepare,
                selects=True,
                state=state,
            )
            for name, policy, state in (
                (SELECT_INT4, self.policy, self.state),
                (DENSE_KERNEL, self.copying, self.copying_state),
            )
        }

    def _our_dense(self) -> Tensor:
        return sparse_attention(self.dense_q, self.dense_cache)[0][0]

    def _gpu_chunks(self) -> dict[str, _Chunk]:
        heads, chunk = self.dense_heads, self.request.chunk_tokens
        found: dict[str, _Chunk] = {}
        for name, peer in gpu_chunk_peers().items():
            try:
                call = peer.build(self.q, self.k, self.v)
            except Exception as error:
                self.skip(name, error)
                continue
            found[name] = _Chunk(
                call=call, kv_heads=heads, causal=peer.causal, sdpa=peer.sdpa, dense_peer=True
            )
        whole, shorter = self.tokens, self.tokens - chunk
        found[OUR_DENSE] = _Chunk(
            call=self._our_dense, kv_heads=heads, prepare=partial(self._set_length, whole)
        )
        return found | self._our_chunks(heads, partial(self._set_length, shorter))

    def _cpu_chunks(self) -> dict[str, _Chunk]:
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

        return {
            MASKED: _Chunk(call=masked, kv_heads=heads, sdpa=True, dense_peer=True),
            UNMASKED: _Chunk(
                call=unmasked, kv_heads=heads, causal=False, sdpa=True, dense_peer=True
            ),
            MATMUL: _Chunk(call=matmul, kv_heads=heads, dense_peer=True),
            OUR_DENSE: _Chunk(call=self._our_dense, kv_heads=heads),
            **self._our_chunks(self.request.shape.num_kv_heads, partial(self.cache.crop, chunk)),
        }

    def rows(self) -> list[PrefillRow]:
        """Compare, then time, then rows."""
        request, shape, chunks = self.request, self.request.shape, self.chunks()
        self.on_progress(f"{self.tokens} tokens: outputs", 0.2 * self.weight)
        found = {}
        for name, one in chunks.items():
            try:
                found[name] = self._compare(name, one)
            except Exception as failure:
                self.skip(name, failure)
        chunks = {name: chunks[name] for name in found}
        self.on_progress(f"{self.tokens} tokens: time", 0.2 * self.weight)
        rows = []
        part = 0.6 * self.weight / (len(request.threads) * request.rounds * max(len(chunks), 1))
        for number in request.threads:
            with threads(number), kept_heap():
                bandwidth, samples = self._measure(chunks, number, part)
                chunks = {name: one for name, one in chunks.items() if name in samples}
                scaled = {
                    name: [ms * shape.num_kv_heads / one.kv_heads for ms in samples[name].event_ms]
                    for name, one in chunks.items()
                }
                timed = {
                    name: timing(
                        scaled[name],
                        self._bytes(one, found[name][1]),
                        bandwidth,
                        number,
                        wall_ms=samples[name].wall_ms if shape.on_cuda else None,
                        not_captured=samples[name].not_captured if shape.on_cuda else None,
                    )
                    for name, one in chunks.items()
                }
                stages = {name: self._stages(one, timed[name]) for name, one in chunks.items()}
            peers = {name: timed[name].median_ms for name, one in chunks.items() if one.dense_peer}
            sdpa = [ms for name, ms in peers.items() if chunks[name].sdpa]
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
                        over_best_sdpa=min(sdpa, default=nan) / ms,
                        over_best_torch=min(peers.values(), default=nan) / ms,
                        attended_tokens=attended,
                        kept_mass=mass,
                        output_error=error,
                        gmac_per_s=None if one.selects else macs / ms / 1e6,
                        stages_ms=stages[name],
                        timing=timed[name],
                        attention=_kernels(one.state),
                        expected_us=(us := self._expected_us(one, attended, bandwidth)),
                        over_expected=None if us is None else 1e3 * ms / us,
                    )
                )
        return rows

    def _measure(
        self, chunks: Mapping[str, _Chunk], number: int, part: float
    ) -> tuple[float, dict[str, DeviceSamples]]:
        """Bandwidth of the machine, and milliseconds of every contender."""
        shape = self.request.shape
        contenders = {
            name: Contender(call=one.call, prepare=one.prepare) for name, one in chunks.items()
        }

        def on_call(name: str) -> None:
            self.on_progress(f"{self.tokens} tokens: {name}", part)

        if shape.on_cuda:
            device = torch.device(shape.device)
            bandwidth = copy_gb_per_s(device)
            samples = interleaved_replays(
                contenders,
                self.request.rounds,
                cold=ColdL2(device),
                bound=BOUND[shape.torch_dtype],
                on_call=on_call,
                on_fail=self.skip,
            )
            return bandwidth, samples
        bandwidth = read_gb_per_s(number)
        found = interleaved_ms(
            contenders,
            self.request.rounds,
            num_threads=number,
            cold=ColdCaches(),
            max_seconds=10.0,
            on_call=on_call,
        )
        return bandwidth, {name: DeviceSamples(ms, [], "") for name, ms in found.items()}

    def _expected_us(self, one: _Chunk, attended: float, bandwidth: float) -> float | None:
        request = self.request
        if not request.gpu_peers:
            return None
        listed = attended if one.selects else None
        return expected_chunk_us(
            request.shape, self.tokens, request.chunk_tokens, listed, bandwidth
        )

    def _bytes(self, one: _Chunk, attended: float) -> int:
        """Keys and values once; ours: the sketch once, and every block's list."""
        shape = self.request.shape
        if not one.selects:
            return 2 * shape.row_bytes * self.tokens
        blocks = -(-self.request.chunk_tokens // self.policy.q_block_size)
        listed = 2 * shape.row_bytes * attended * blocks
        return int(shape.sketch_bytes("int4") * self.tokens + listed)

    def _stages(self, one: _Chunk, timed: Timing) -> dict[str, float]:
        if not one.selects or self.request.shape.on_cuda:  # a GPU is not done when an op returns
            return {}
        assert one.prepare is not None
        one.prepare()
        return stage_ms(one.call, timed.median_ms, DENSE_KERNELS)

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
        exact = exact_dtype(out.device)
        for head in range(one.kv_heads):
            heads = slice(head * group, (head + 1) * group)
            k, v = (x[0, :, head].to(exact) for x in (self.cache.k, self.cache.v))
            for number, index in enumerate(self.sampled.tolist()):
                visible = first + index + 1 if one.causal else self.tokens
                logits = self.q[0, index, heads].to(exact) @ k[:visible].T * k.shape[1] ** -0.5
                weights, values = torch.softmax(logits, -1), v[:visible]
                entry = None if lists is None else lists[number]
                if entry is not None:
                    listed = entry[head][entry[head] < visible]
                    weights, values = weights[:, listed], v[listed]
                    counts.append(float(len(listed)))
                mass = weights.sum(-1, keepdim=True)
                masses.append(float(mass.mean()))
                errors.append((out[index, heads].to(exact), weights / mass @ values))
        got, expected = (torch.stack(parts) for parts in zip(*errors))
        error, bound = rel_err(got, expected), BOUND[self.cache.dtype]
        require_agreement(name, self.tokens, error, bound)
        if counts:
            attended = sum(counts) / len(counts)
        return sum(masses) / len(masses), attended, error


def _kernels(state: PolicyState | None) -> str | None:
    """What attended the lists, by the policy's own count."""
    return None if state is None else ", ".join(sorted(state.prefill.attention_kernels))


def chunk_queries(layer: StructuredLayer, cache: KVCache, count: int) -> tuple[Tensor, Tensor]:
    """A chunk of drifting queries at the end of ``cache``, rotated and before RoPE."""
    q = layer.draw_query()
    layer.query(q, cache)  # fixes the scale of every head
    rows = []
    for _ in range(count):
        q = layer.drifted(q, DRIFT)
        rows.append(q)
    stacked = torch.stack(rows) * layer.scale
    first = cache.max_seqlen - count
    positions = torch.arange(first, cache.max_seqlen, device=stacked.device)[:, None]
    dtype = layer.shape.torch_dtype
    return rotated(stacked, positions)[None].to(dtype), stacked[None].to(dtype)


def _lists_of(attended: Sequence[AttendedLists], sampled: Tensor) -> list[Tensor | None]:
    """Of each sampled query the lists of its heads, [num_kv_heads] ragged; None: everything."""
    found: list[Tensor | None] = []
    for index in sampled.tolist():
        begin = 0
        for call in attended:
            if index < begin + call.num_queries:
                found.append(_lists_in(call, index - begin))
                break
            begin += call.num_queries
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
