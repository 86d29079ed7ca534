"""The ops of a step, each with its inputs, its floor and its check against float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache as once
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvselect.attention import sparse_attention
from kvselect.bench.contenders import BOUND, attention_over, folded, selection_from
from kvselect.bench.entrants import ENDS
from kvselect.bench.layer import Shape, StructuredLayer
from kvselect.bench.measure import Contender
from kvselect.cache import KVCache
from kvselect.decode import decode_step
from kvselect.policies.token_select import TokenSelect
from kvselect.score import score_tokens
from kvselect.selection import Selection, num_kept, select_tokens
from kvselect.sketch import BLOCK_TOKENS, encode
from kvselect.testing import rel_err

__all__ = ["Op", "gpu_ops", "listed_tokens", "single_ops"]

SCAN = {"int4": "scan int4", "int8": "scan int8", None: "scan exact keys"}
HIT = "decode step, hit"
STEP = "decode step, miss"
DENSE = "dense attention"
CHUNK_TOKENS = 2048
GPU_LISTS = (2688, 16384)  # tokens: sinks, window and 2048; and as many as keep a gather busy
# Of the votes against float32 with exact keys: what the sketch rounds away (the exact scan: BOUND).
SKETCH_BOUND = {"int4": 0.3, "int8": 0.03}


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """One op on its inputs.

    Attributes
    ----------
    contender : Contender
    bytes_must_read : int
        Per call; an append's are read and written.
    error : callable
        Runs the op once; relative error against float32, or the share of what is stored that
        differs.
    bound : float
        Largest error allowed.
    macs : int or None
        Multiply-adds per call, where the op is made of them.
    int8 : bool
        They may run as int8 dot products.
    """

    contender: Contender
    bytes_must_read: int
    error: Callable[[], float]
    bound: float
    macs: int | None = None
    int8: bool = False


def listed_tokens(topk: int) -> int:
    """Tokens of one list: sinks, window, and what an int4 scan picks for ``topk``."""
    keep = num_kept(topk, ENDS.overselect)
    return ENDS.num_sink_tokens + keep + ENDS.num_recent_tokens


def single_ops(shape: Shape, tokens: int, topk: int, steps: int, seed: int) -> dict[str, Op]:
    """Every op by name, on a layer of so many tokens; a hit may run ``steps`` times."""
    row, bound = shape.row_bytes, BOUND[shape.torch_dtype]
    layer = StructuredLayer(shape, seed)
    caches = {sketch: shape.new_cache(tokens, sketch) for sketch in ("int4", "int8", None)}
    moving = shape.new_cache(tokens + steps + 1, "int4")
    layer.fill([*caches.values(), moving], tokens)
    cache = caches["int4"]
    k, v = cache.k.transpose(1, 2), cache.v.transpose(1, 2)
    q = layer.query(layer.draw_query(), cache)[0]
    score = partial(
        score_tokens,
        num_sink_tokens=ENDS.num_sink_tokens,
        num_recent_tokens=ENDS.num_recent_tokens,
    )
    head_macs = shape.num_q_heads * shape.head_dim

    found = _append_ops(shape, layer)
    votes = _votes(q, k)
    for sketch, scanned in caches.items():
        scan = partial(score, q, scanned)
        found[SCAN[sketch]] = Op(
            contender=Contender(call=scan),
            bytes_must_read=int(shape.sketch_bytes(sketch) * tokens),
            error=partial(_scan_error, scan, votes),
            bound=SKETCH_BOUND[sketch] if sketch is not None else 2 * bound,
            macs=head_macs * tokens,
            int8=sketch is not None,
        )
    scores = score(q, cache)
    select = partial(
        select_tokens,
        scores,
        cache.cache_seqlens,
        topk=topk,
        overselect=ENDS.overselect,
        num_sink_tokens=ENDS.num_sink_tokens,
        num_recent_tokens=ENDS.num_recent_tokens,
    )
    listed = listed_tokens(topk)
    found["select"] = Op(
        contender=Contender(call=select),
        bytes_must_read=4 * shape.num_kv_heads * tokens,
        error=lambda: _selection_error(select(), scores[0], num_kept(topk, ENDS.overselect)),
        bound=1e-5,
    )
    for name, selection in (
        ("attention, selected list", select()),
        ("attention, random list", _random_list(shape, tokens, listed)),
        ("attention, latest tokens", _latest(shape, tokens, listed)),
    ):
        found[name] = Op(
            contender=Contender(call=partial(sparse_attention, q, cache, selection)),
            bytes_must_read=2 * row * listed,
            error=partial(_attention_error, q, cache, k, v, selection),
            bound=bound,
            macs=2 * head_macs * listed,
        )
    found[DENSE] = Op(
        contender=Contender(call=partial(sparse_attention, q, cache)),
        bytes_must_read=2 * row * tokens,
        error=partial(_attention_error, q, cache, k, v, None),
        bound=bound,
        macs=2 * head_macs * tokens,
    )
    miss = TokenSelect(topk=topk, dense_below_tokens=0)
    state = miss.new_state(cache)
    found[STEP] = Op(
        contender=Contender(call=partial(decode_step, q, cache, miss, state)),
        bytes_must_read=int(shape.sketch_bytes("int4") * tokens + 2 * row * listed),
        error=lambda: _step_error(q, cache, decode_step(q, cache, miss, miss.new_state(cache))),
        bound=bound,
    )
    found[HIT] = _hit_op(topk, layer, moving, q, bound)
    return found


def gpu_ops(shape: Shape, tokens: int, topk: int, seed: int) -> dict[str, Op]:
    """The ops of a step that leave the cache as it is, on one cache with an int4 sketch, and
    attention over random lists of `GPU_LISTS`."""
    row, bound = shape.row_bytes, BOUND[shape.torch_dtype]
    layer, cache = StructuredLayer(shape, seed), shape.new_cache(tokens, "int4")
    layer.fill([cache], tokens)
    k, v = cache.k.transpose(1, 2), cache.v.transpose(1, 2)
    q = layer.query(layer.draw_query(), cache)[0]
    score = partial(
        score_tokens,
        num_sink_tokens=ENDS.num_sink_tokens,
        num_recent_tokens=ENDS.num_recent_tokens,
    )
    head_macs, votes = shape.num_q_heads * shape.head_dim, _votes(q, k)
    found: dict[str, Op] = {}
    for sketch, source in (("int4", "sketch"), (None, "keys")):
        scan = partial(score, q, cache, source=source)
        found[SCAN[sketch]] = Op(
            contender=Contender(call=scan),
            bytes_must_read=int(shape.sketch_bytes(sketch) * tokens),
            error=partial(_scan_error, scan, votes),
            bound=SKETCH_BOUND["int4"] if sketch else 2 * bound,
            macs=head_macs * tokens,
        )

    @once  # not before it is needed: a scan that fails takes no other op with it
    def scores() -> Tensor:
        return score(q, cache)

    def select() -> Selection:
        return select_tokens(
            scores(),
            cache.cache_seqlens,
            topk=topk,
            overselect=ENDS.overselect,
            num_sink_tokens=ENDS.num_sink_tokens,
            num_recent_tokens=ENDS.num_recent_tokens,
        )

    found["select"] = Op(
        contender=Contender(call=lambda: select().indices),
        bytes_must_read=4 * shape.num_kv_heads * tokens,
        error=lambda: _selection_error(select(), scores()[0], num_kept(topk, ENDS.overselect)),
        bound=1e-5,
    )
    for count in GPU_LISTS:
        if count > tokens:
            continue
        for name, selection in (
            (f"attention, random list of {count} tokens", _random_list(shape, tokens, count)),
            (f"attention, latest {count} tokens", _latest(shape, tokens, count)),
        ):
            attend = partial(sparse_attention, q, cache, selection)
            found[name] = Op(
                contender=Contender(call=lambda attend=attend: attend()[0]),  # type: ignore[misc]
                bytes_must_read=2 * row * count,
                error=partial(_attention_error, q, cache, k, v, selection),
                bound=bound,
                macs=2 * head_macs * count,
            )
    found[DENSE] = Op(
        contender=Contender(call=lambda: sparse_attention(q, cache)[0]),
        bytes_must_read=2 * row * tokens,
        error=partial(_attention_error, q, cache, k, v, None),
        bound=bound,
        macs=2 * head_macs * tokens,
    )
    return found


def _append_ops(shape: Shape, layer: StructuredLayer) -> dict[str, Op]:
    """One token at a time, a whole block of them per sample, and a prefill chunk at once."""
    chunks = list(layer.tokens(CHUNK_TOKENS))
    k, v = (torch.cat(parts, dim=1) for parts in zip(*chunks))
    cache = shape.new_cache(CHUNK_TOKENS, "int4")
    tokens = [(k[:, at : at + 1], v[:, at : at + 1]) for at in range(BLOCK_TOKENS)]
    # Read, written, and written as sketch.
    per_token = int(4 * shape.row_bytes + shape.sketch_bytes("int4"))
    turn: Iterator[tuple[Tensor, Tensor]] = iter(())

    def start() -> None:
        nonlocal turn
        cache.reset()
        turn = iter(tokens)

    def append_one() -> None:
        cache.append(*next(turn))

    def error_one() -> float:
        start()
        for _ in range(BLOCK_TOKENS):
            append_one()
        return _append_error(cache, k[:, :BLOCK_TOKENS], v[:, :BLOCK_TOKENS])

    def error_chunk() -> float:
        cache.reset()
        cache.append(k, v)
        return _append_error(cache, k, v)

    return {
        "append 1 token": Op(
            contender=Contender(call=append_one, prepare=start, repeats=BLOCK_TOKENS),
            bytes_must_read=per_token,
            error=error_one,
            bound=0.0,
        ),
        f"append {CHUNK_TOKENS} tokens": Op(
            contender=Contender(call=partial(cache.append, k, v), prepare=cache.reset),
            bytes_must_read=per_token * CHUNK_TOKENS,
            error=error_chunk,
            bound=0.0,
        ),
    }


def _hit_op(topk: int, layer: StructuredLayer, cache: KVCache, q: Tensor, bound: float) -> Op:
    policy = TokenSelect(
        topk=topk, dense_below_tokens=0, similarity_threshold=0.99, max_age=1 << 20
    )
    state = policy.new_state(cache)
    (k, v), row = next(layer.tokens(1)), layer.shape.row_bytes

    def step() -> tuple[Tensor, object]:
        return decode_step(q, cache, policy, state, q_unrotated=q)

    def error() -> float:
        step()
        cache.append(k, v)
        out, info = decode_step(q, cache, policy, state, q_unrotated=q)
        assert info.hit is not None and bool(info.hit.all()), "the same query hits"
        return _step_error(q, cache, (out, info))

    return Op(
        contender=Contender(call=step, prepare=lambda: cache.append(k, v)),
        bytes_must_read=2 * row * listed_tokens(topk),
        error=error,
        bound=bound,
    )


def _votes(q: Tensor, k: Tensor) -> Tensor:
    """Attention weights summed over the group, [num_kv_heads, seqlen_k] float32."""
    rows, votes = folded(q, k.shape[1])[0].float(), []
    for head in range(k.shape[1]):
        logits = rows[head] @ k[0, head].float().T * q.shape[-1] ** -0.5
        votes.append(torch.softmax(logits, -1).sum(0))
    return torch.stack(votes)


def _scan_error(scan: Callable[[], Tensor], votes: Tensor) -> float:
    return rel_err(scan()[0], votes)


def _selection_error(selection: Selection, scores: Tensor, keep: int) -> float:
    """Scores picked against those that torch's top-k picks."""
    first, last = ENDS.num_sink_tokens, scores.shape[1] - ENDS.num_recent_tokens
    best = scores[:, first:last].topk(keep, -1).values.double().sum(-1)
    ends = scores[:, :first].double().sum(-1) + scores[:, last:].double().sum(-1)
    assert selection.kept_score is not None
    return rel_err(selection.kept_score[0], best + ends)


def _attention_error(
    q: Tensor, cache: KVCache, k: Tensor, v: Tensor, selection: Selection | None
) -> float:
    expected = attention_over(q, k, v, selection)
    return rel_err(sparse_attention(q, cache, selection)[0].reshape(expected.shape), expected)


def _step_error(q: Tensor, cache: KVCache, step: tuple[Tensor, Any]) -> float:
    out, info = step
    k, v = cache.k.transpose(1, 2), cache.v.transpose(1, 2)
    expected = attention_over(q, k, v, info.selection)
    return rel_err(out.reshape(expected.shape), expected)


def _append_error(cache: KVCache, k: Tensor, v: Tensor) -> float:
    """Share of what was stored that differs: keys, values, sketch of whole blocks."""
    assert cache.sketch_data is not None
    blocks = k.shape[1] // BLOCK_TOKENS
    whole = torch.unflatten(k[:, : blocks * BLOCK_TOKENS], 1, (blocks, BLOCK_TOKENS))
    expected = encode(whole.permute(0, 3, 1, 2, 4), "int4")
    stored = cache.sketch_data[:, :, :blocks]
    pairs = ((cache.k, k), (cache.v, v), (stored, expected))
    return max(float((got != wanted).double().mean()) for got, wanted in pairs)


def _random_list(shape: Shape, tokens: int, count: int) -> Selection:
    """The worst locality: every head its own random tokens."""
    generator = torch.Generator(shape.device).manual_seed(1)
    rows = [
        torch.randperm(tokens, generator=generator, device=shape.device)[:count].sort().values
        for _ in range(shape.num_kv_heads)
    ]
    return selection_from(torch.stack(rows)[None])


def _latest(shape: Shape, tokens: int, count: int) -> Selection:
    """The best locality: the last tokens."""
    latest = torch.arange(tokens - count, tokens, device=shape.device)
    return selection_from(latest.expand(1, shape.num_kv_heads, -1))
