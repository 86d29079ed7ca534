"""The reference itself, against dense softmax, torch's own attention and algebra."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from op_calls import int32
from torch import Tensor

from kvselect import reference, sketch
from kvselect.query_blocks import block_range
from kvselect.reference import (
    WINDOW_RULES,
    BlockRange,
    PlainCache,
    QueryBlocks,
    decode_block,
    encode_block,
    kv_append,
    rotate,
    score_query_blocks,
    select_query_blocks,
    sketched_keys,
)
from kvselect.selection import Selection
from kvselect.testing import make_qkv, poison, rel_err, rope_tables, structured_keys

EXACT = 1e-13  # float64 against float64


def cache_of(k: Tensor, v: Tensor, *seqlens: int, starts: Tensor | None = None) -> PlainCache:
    lengths = int32(*seqlens)
    return PlainCache(
        k=poison(k, lengths, starts),
        v=poison(v, lengths, starts),
        cache_seqlens=lengths,
        starts=starts,
    )


# ---- ranges


@pytest.mark.parametrize(
    "rule, expected",
    [
        # row of 100 tokens from 10 on; queries are the last 40; block [8, 20) sits at [68, 80)
        ("decode", (10, 14, 72, 80, 68, 80)),
        ("block_start", (10, 14, 60, 68, 68, 80)),
        ("block_end", (10, 14, 72, 68, 68, 80)),
    ],
)
def test_ranges_by_hand(rule: str, expected: tuple[int, ...]) -> None:
    blocks = QueryBlocks(
        cache_seqlens=int32(100),
        seqlen_q=40,
        starts=int32(10),
        offsets=int32(0, 8, 20, 40),
        window_rule=rule,
        num_sink_tokens=4,
        num_recent_tokens=8,
    )
    start, sink_end, window_start, visible_end, begin, end = expected
    assert blocks.range(0, 1) == BlockRange(
        start=start,
        sink_end=sink_end,
        window_start=window_start,
        visible_end=visible_end,
        begin=begin,
        end=end,
    )


@pytest.mark.parametrize("rule", WINDOW_RULES)
@pytest.mark.parametrize("sinks, recent", [(0, 0), (3, 5), (50, 2), (2, 50), (1000, 1000)])
def test_ranges_are_ordered_and_equal_those_of_the_package(
    rule: str, sinks: int, recent: int
) -> None:
    blocks = QueryBlocks(
        cache_seqlens=int32(100, 39, 12, 1, 0),
        seqlen_q=30,
        starts=int32(10, 0, 12, 0, 0),
        offsets=int32(0, 7, 7, 30),
        window_rule=rule,
        num_sink_tokens=sinks,
        num_recent_tokens=recent,
    )
    batched = block_range(
        blocks.cache_seqlens, blocks.starts, blocks.offsets, 30, rule, sinks, recent
    )
    shape = (5, 3)
    for row in range(5):
        for block in range(3):
            at = blocks.range(row, block)
            assert at.start <= at.sink_end <= at.window_start <= at.end <= blocks.seqlen(row)
            assert at.start <= at.begin <= at.end and at.visible_end in (at.begin, at.end)
            for name in batched._fields:
                assert getattr(at, name) == getattr(batched, name).expand(shape)[row, block]


def test_unknown_window_rule() -> None:
    blocks = QueryBlocks(cache_seqlens=int32(5), seqlen_q=1, window_rule="end")
    with pytest.raises(ValueError, match="window_rule: got 'end', allowed"):
        blocks.range(0, 0)


# ---- the codec


def test_layout_of_a_record_byte_by_byte() -> None:
    """As drawn in sketch.h: sub-blocks of 16 tokens, 64-byte lines, 4 bytes a token."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(128, 80, generator=generator)
    for name, levels in (("int4", 15), ("int8", 255)):
        record = encode_block(keys, name)
        step, lo = record[: 4 * 80].view(torch.float16).float().view(2, 80)
        for token in (0, 1, 15, 16, 77, 127):
            for channel in (0, 3, 4, 7, 8, 41, 79):
                raw = (keys[token, channel] - lo[channel]) / step[channel]
                code = int(raw.round().clamp(0, levels))
                if name == "int4":
                    line, inside = divmod(channel, 8)
                    lines, high, byte = 10, inside // 4, inside % 4
                else:
                    line, byte = divmod(channel, 4)
                    lines, high = 20, 0
                at = 4 * 80 + (token // 16 * lines + line) * 64 + token % 16 * 4 + byte
                stored = int(record[at])
                assert (stored >> 4 if high else stored & 15 if name == "int4" else stored) == code


@pytest.mark.parametrize("name", ["int4", "int8"])
@pytest.mark.parametrize("head_dim", [32, 80, 256])
def test_codec_equals_that_of_the_package(name: str, head_dim: int) -> None:
    keys = torch.randn(3, 128, head_dim, generator=torch.Generator().manual_seed(head_dim))
    keys[1, 5, 7] = torch.nan
    keys[2, :, 3] = 1e-9
    records = sketch.encode(keys, name)
    decoded = sketch.decode(records, name, head_dim)
    for block in range(3):
        assert torch.equal(encode_block(keys[block], name), records[block])
        own = decode_block(records[block], name, head_dim)
        if own is None:
            assert block == 1 and decoded[block].isnan().all()
        else:
            assert rel_err(decoded[block], own) <= 1e-7


@pytest.mark.parametrize("name, levels", [("int4", 15), ("int8", 255)])
def test_both_ends_of_a_range_are_levels(name: str, levels: int) -> None:
    keys = torch.randn(128, 64, generator=torch.Generator().manual_seed(2))
    decoded = decode_block(encode_block(keys, name), name, 64)
    assert decoded is not None
    for end, decoded_end in ((keys.amax(0), decoded.amax(0)), (keys.amin(0), decoded.amin(0))):
        assert (end - decoded_end).abs().max() <= 1e-2  # float16 of lo and of levels * step


def test_append_is_ragged_and_leaves_its_argument() -> None:
    _, k, v = make_qkv(2, 1, 200, 2, 2, 32)
    first = PlainCache(k=k[:, :0], v=v[:, :0], cache_seqlens=int32(0, 0), sketch_format="int4")
    second = kv_append(first, k[:, :130], v[:, :130], int32(130, 7))
    third = kv_append(second, k[:, 130:], v[:, 130:], int32(0, 70))
    assert first.cache_seqlens.tolist() == [0, 0]
    assert second.cache_seqlens.tolist() == [130, 7]
    assert third.cache_seqlens.tolist() == [130, 77]
    assert torch.equal(third.k[0, :130], k[0, :130]) and third.k[0, 130:].isnan().all()
    assert torch.equal(third.v[1, :77], torch.cat([v[1, :7], v[1, 130:200]]))
    assert third.sketch_data is not None and third.sketch_data.shape == (2, 2, 1, 128 + 2048)
    assert torch.equal(third.sketch_data[0, 1, 0], encode_block(k[0, :128, 1], "int4"))
    assert (third.sketch_data[1] == 0).all()
    assert torch.equal(sketched_keys(third, 0, 1)[128:], k[0, 128:130, 1].double())


# ---- rotation


def rope_of(
    num_positions: int, num_pairs: int, start: int = 0, interleaved: bool = False
) -> SimpleNamespace:
    cos, sin = rope_tables(num_positions, num_pairs, base=50.0)
    return SimpleNamespace(cos=cos, sin=sin, start=start, interleaved=interleaved)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_keeps_norms_and_sees_distances_only(interleaved: bool) -> None:
    rope = rope_of(40, 10, start=6, interleaved=interleaved)
    generator = torch.Generator().manual_seed(3)
    a, b = torch.randn(2, 32, generator=generator).double()
    place = torch.tensor

    def product(first: int, second: int) -> Tensor:
        return rotate(a, place(first), rope) @ rotate(b, place(second), rope)

    assert product(20, 13) == pytest.approx(float(product(27, 20)), rel=1e-6)
    assert product(20, 13) != pytest.approx(float(product(20, 14)), rel=1e-3)
    turned = rotate(a, place(17), rope)
    assert turned.norm() == pytest.approx(float(a.norm()), rel=1e-6)
    assert torch.equal(turned[:6], a[:6]) and torch.equal(turned[26:], a[26:])
    assert torch.equal(rotate(a, place(0), rope), a)


def test_pairs_of_both_forms() -> None:
    cos, sin = torch.full((1, 2), 0.6), torch.full((1, 2), 0.8)
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).double()
    half = SimpleNamespace(cos=cos, sin=sin, start=0, interleaved=False)
    pairs = SimpleNamespace(cos=cos, sin=sin, start=0, interleaved=True)
    c, s = float(cos[0, 0]), float(sin[0, 0])
    at = torch.tensor(0)
    expected = [c - 3 * s, 2 * c - 4 * s, 3 * c + s, 4 * c + 2 * s]
    assert rotate(x, at, half).tolist() == pytest.approx(expected)
    expected = [c - 2 * s, 2 * c + s, 3 * c - 4 * s, 4 * c + 3 * s]
    assert rotate(x, at, pairs).tolist() == pytest.approx(expected)


# ---- scores


def test_scores_are_attention_weights_summed_over_the_group() -> None:
    q, k, v = make_qkv(2, 3, 20, 6, 2, 32)
    scores = reference.score_tokens(q, cache_of(k, v, 20, 20))
    heads = k.repeat_interleave(3, dim=2).double()  # head h reads KV head h // 3
    logits = torch.einsum("bqhd,bthd->bqht", q.double(), heads) * 32**-0.5
    expected = logits.softmax(-1).view(2, 3, 2, 3, 20).sum((1, 3))
    assert rel_err(scores, expected) <= EXACT
    largest = reference.score_tokens(q, cache_of(k, v, 20, 20), aggregate="max_vote")
    expected = logits.softmax(-1).view(2, 3, 2, 3, 20).sum(3).amax(1)
    assert rel_err(largest, expected) <= EXACT


def test_layer_scope_adds_the_heads_and_shows_them_once() -> None:
    q, k, v = make_qkv(1, 1, 20, 4, 2, 32)
    cache = cache_of(k, v, 20)
    per_head = reference.score_tokens(q, cache)
    layer = reference.score_tokens(q, cache, scope="layer")
    assert layer.shape == per_head.shape and layer.stride(1) == 0
    assert rel_err(layer[:, 1], per_head.sum(1)) <= EXACT


def test_scores_of_candidates_only() -> None:
    q, k, v = make_qkv(1, 1, 20, 1, 1, 32)
    blocks = QueryBlocks(
        cache_seqlens=int32(20), seqlen_q=1, num_sink_tokens=3, num_recent_tokens=5
    )
    scores, lse, _ = score_query_blocks(
        q[:, None], cache_of(k, v, 20), blocks, softmax_scale=1.0, normalise_candidates_only=True
    )
    logits = k[0, 3:15, 0].double() @ q[0, 0, 0].double()
    assert rel_err(scores[0, 0, 0, 3:15], logits.softmax(0)) <= EXACT
    assert rel_err(lse.flatten(), logits.logsumexp(0)[None]) <= EXACT
    assert (scores[..., :3] == 0).all() and (scores[..., 15:] == 0).all()


def test_a_sink_that_is_not_finite_is_marked_in_every_mode() -> None:
    q, k, v = make_qkv(1, 1, 20, 1, 1, 32)
    k[0, 1] = torch.nan
    blocks = QueryBlocks(
        cache_seqlens=int32(20), seqlen_q=1, num_sink_tokens=3, num_recent_tokens=5
    )
    for candidates_only in (False, True):
        scores, _, num_nonfinite = score_query_blocks(
            q[:, None],
            cache_of(k, v, 20),
            blocks,
            softmax_scale=1.0,
            normalise_candidates_only=candidates_only,
        )
        assert scores[0, 0, 0].isnan().nonzero().flatten().tolist() == [1]
        assert num_nonfinite.item() == 1


def test_prefill_scores_only_what_every_query_of_the_block_sees() -> None:
    q, k, v = make_qkv(1, 2, 20, 1, 1, 32)
    blocks = QueryBlocks(
        cache_seqlens=int32(20), seqlen_q=8, offsets=int32(0, 4, 8), window_rule="block_start"
    )
    cache = cache_of(k, v, 20)
    scores = score_query_blocks(q.view(1, 2, 1, 1, 32), cache, blocks, softmax_scale=1.0).scores
    for block, end in ((0, 12), (1, 16)):
        logits = k[0, :end, 0].double() @ q[0, block, 0].double()
        assert rel_err(scores[0, block, 0, :end], logits.softmax(0)) <= EXACT
        assert (scores[0, block, 0, end:] == 0).all()


def test_compact_scores_are_attention_logits_at_compact_places() -> None:
    """Sinks and recent tokens that are all there is score as attention weighs them."""
    q, k, v = make_qkv(1, 1, 30, 1, 1, 32)
    rope = rope_of(30, 16)
    cache = cache_of(k, v, 30)
    blocks = QueryBlocks(
        cache_seqlens=int32(30), seqlen_q=1, num_sink_tokens=4, num_recent_tokens=26
    )
    rotated = rotate(q, torch.tensor(29), rope)[:, None]
    _, lse, _ = score_query_blocks(
        q[:, None], cache, blocks, softmax_scale=0.3, q_local=rotated, rope=rope
    )
    _, expected = reference.sparse_attention(q, cache, rope=rope, softmax_scale=0.3)
    assert rel_err(lse.flatten(), expected.flatten()) <= EXACT


# ---- selection


def test_selection_by_hand() -> None:
    scores = torch.tensor([[[0.0, 0.1, 0.9, 0.2, 0.9, 0.3, 0.0, 0.0]]])
    chosen = reference.select_tokens(
        scores, int32(8), topk=2, num_sink_tokens=1, num_recent_tokens=2
    )
    assert chosen.indices.tolist() == [[[0, 2, 4, 6, 7]]]
    assert chosen.topk_length.tolist() == [[5]]
    assert chosen.kept_score is not None and chosen.kept_score.item() == pytest.approx(1.8)
    more = reference.select_tokens(scores, int32(8), topk=2, overselect=1.5)
    assert more.indices.tolist() == [[[2, 4, 5]]]


def test_selection_equals_a_stable_sort() -> None:
    generator = torch.Generator().manual_seed(4)
    scores = torch.randint(0, 9, (50,), generator=generator).float()
    blocks = QueryBlocks(cache_seqlens=int32(50), seqlen_q=1)
    for keep in (0, 1, 13, 49, 50, 80):
        lists = select_query_blocks(scores.view(1, 1, 1, 50), blocks, keep=keep)
        order = torch.sort(scores, descending=True, stable=True).indices[:keep].sort().values
        assert lists.indices.flatten().tolist() == order.tolist()


# ---- attention


@pytest.mark.parametrize("seqlen_q", [1, 7])
def test_dense_attention_is_that_of_torch(seqlen_q: int) -> None:
    q, k, v = make_qkv(2, seqlen_q, 25, 6, 2, 32)
    out, lse = reference.sparse_attention(q, cache_of(k, v, 25, 25))
    heads = [x.double().transpose(1, 2) for x in (q, k, v)]
    mask = torch.ones(seqlen_q, 25, dtype=torch.bool).tril(diagonal=25 - seqlen_q)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *heads, attn_mask=mask, enable_gqa=True
    )
    assert rel_err(out, expected.transpose(1, 2)) <= EXACT
    logits = heads[0] @ heads[1].repeat_interleave(3, dim=1).mT * 32**-0.5
    expected_lse = logits.masked_fill(~mask, -torch.inf).logsumexp(-1)
    assert rel_err(lse, expected_lse.transpose(1, 2)) <= EXACT


def test_full_lists_are_dense_attention_with_and_without_compact_positions() -> None:
    q, k, v = make_qkv(1, 5, 25, 4, 2, 32)
    cache, rope = cache_of(k, v, 25), rope_of(25, 16)
    everything = Selection(
        torch.arange(25, dtype=torch.int32).expand(1, 2, 25),
        torch.full((1, 2), 25, dtype=torch.int32),
    )
    for positions in (None, rope):
        listed = reference.sparse_attention(q, cache, everything, rope=positions)
        dense = reference.sparse_attention(q, cache, rope=positions)
        assert rel_err(listed[0], dense[0]) <= EXACT and rel_err(listed[1], dense[1]) <= EXACT
    places = torch.arange(25)
    rotated = PlainCache(k=rotate(k, places[:, None], rope), v=v, cache_seqlens=int32(25))
    original = reference.sparse_attention(rotate(q, places[20:, None], rope), rotated)
    assert rel_err(original[0], reference.sparse_attention(q, cache, rope=rope)[0]) <= EXACT


def test_compact_attention_depends_on_ranks_only() -> None:
    """The same tokens listed at other places of a longer cache give the same attention."""
    q, k, v = make_qkv(1, 1, 6, 2, 1, 32)
    rope = rope_of(6, 16)
    near, _ = reference.sparse_attention(q, cache_of(k, v, 6), rope=rope)
    places = torch.tensor([2, 9, 11, 40, 41, 59])
    long_k, long_v = torch.full((2, 1, 60, 1, 32), torch.nan)
    long_k[:, places], long_v[:, places] = k, v
    lists = Selection(places.int().view(1, 1, 6), torch.full((1, 1), 6, dtype=torch.int32))
    far, _ = reference.sparse_attention(q, cache_of(long_k, long_v, 60), lists, rope=rope)
    assert torch.equal(near, far)


def test_merging_parts_is_the_whole() -> None:
    q, k, v = make_qkv(1, 1, 25, 4, 2, 32)
    cache = cache_of(k, v, 25)
    parts = []
    for first, last in ((0, 4), (4, 4), (4, 25)):
        indices = torch.arange(first, last, dtype=torch.int32).expand(1, 2, last - first)
        lengths = torch.full((1, 2), last - first, dtype=torch.int32)
        parts.append(reference.sparse_attention(q, cache, Selection(indices, lengths)))
    merged = reference.merge_splits(
        torch.stack([p[0] for p in parts]), torch.stack([p[1] for p in parts])
    )
    whole = reference.sparse_attention(q, cache)
    assert rel_err(merged[0], whole[0]) <= EXACT and rel_err(merged[1], whole[1]) <= EXACT
    nothing = reference.merge_splits(torch.full((2, 3), torch.nan), torch.full((2,), -torch.inf))
    assert (nothing[0] == 0).all() and nothing[1] == -torch.inf


def test_recovered_mass_is_the_ratio_of_the_lse() -> None:
    q, k, v = make_qkv(1, 4, 25, 4, 2, 32)
    cache = cache_of(k, v, 25, starts=int32(3))
    indices = int32(4, 7, 20, 22, 24).expand(1, 2, 5)
    lists = Selection(indices, torch.full((1, 2), 5, dtype=torch.int32))
    mass = reference.recovered_mass(q, cache, lists)
    part, whole = (reference.sparse_attention(q, cache, x)[1] for x in (lists, None))
    assert rel_err(mass, (part - whole).exp()) <= EXACT


# ---- inputs for tests


def test_rel_err_never_passes_what_is_not_finite() -> None:
    ref = torch.tensor([1.0, -torch.inf, 2.0])
    assert rel_err(ref, ref) == 0
    assert rel_err(torch.tensor([1.0, 0.0, 2.0]), ref) == torch.inf
    assert rel_err(torch.tensor([torch.nan, -torch.inf, 2.0]), ref) == torch.inf
    assert rel_err(ref, torch.tensor([1.0, 0.0, 2.0])) == torch.inf
    assert rel_err(torch.tensor([3.0]), torch.tensor([0.0])) == 3.0
    with pytest.raises(ValueError, match=r"out: got shape \(1,\), allowed: \(2,\)"):
        rel_err(torch.zeros(1), torch.zeros(2))


def test_structured_keys_are_as_described() -> None:
    q, k = structured_keys(2048, 2, 4, 64, rotated=False)
    logits = torch.einsum("ghd,tgd->ght", q.view(2, 4, 64), k) * 64**-0.5
    assert rel_err(logits.std(-1), torch.full((2, 4), 2.2)) <= 1e-4
    outliers = (k.mean(0).abs() > 4.0).sum(-1)
    assert outliers.tolist() == [8, 8]
