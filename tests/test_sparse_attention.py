"""sparse_attention against the float64 reference: decode, blocks, lists, compact positions."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from op_calls import ONE_IMPLEMENTATION, Case, attend, int32, make_case, select
from torch import Tensor

from kvselect import reference
from kvselect.reference import QueryBlocks
from kvselect.selection import Selection
from kvselect.testing import LAYOUTS, TOLERANCE, make_qkv, non_contiguous, rel_err, rope_tables

pytestmark = pytest.mark.usefixtures("implementation")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Blocks of bfloat16 may go another way than those of other dtypes (a tile unit).
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
LSE_TOLERANCE = 2e-6  # float32 whatever the dtype of the cache


def random_lists(
    case: Case,
    seqlen_q: int,
    offsets: Tensor | None = None,
    keep: int = 20,
    num_lists: int | None = None,
    recent: int = 4,
) -> tuple[Tensor, Tensor]:
    """Lists as select_tokens makes them: candidates at random, and each block's own tokens."""
    seqlens = case.plain.cache_seqlens
    num_blocks = 1 if offsets is None else len(offsets) - 1
    num_lists = case.plain.k.shape[2] if num_lists is None else num_lists
    shape = (len(seqlens), num_blocks, num_lists, case.plain.k.shape[1])
    scores = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    blocks = QueryBlocks(
        cache_seqlens=seqlens,
        seqlen_q=seqlen_q,
        starts=case.plain.starts,
        offsets=offsets,
        window_rule="block_start",
        num_sink_tokens=2,
        num_recent_tokens=recent,
    )
    return select(scores, blocks, keep=keep, width=keep + recent + seqlen_q + 64)[:2]


def assert_equals_reference(
    case: Case,
    q: Tensor,
    lists: tuple[Tensor, Tensor] | None = None,
    *,
    offsets: Tensor | None = None,
    rope: Any = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    out, lse = attend(
        case,
        q,
        *(lists or (None, None)),
        q_block_offsets=offsets,
        rope=rope,
        softcap=softcap or 0.0,
        sink_logits=sink_logits,
    )
    selection = None
    if lists is not None:
        selection = Selection(*lists, q_block_offsets=offsets)
    elif offsets is not None:  # blocks without lists: the reference needs none to see everything
        offsets = None
    expected_out, expected_lse = reference.sparse_attention(
        q, case.plain, selection, rope=rope, softcap=softcap, sink_logits=sink_logits
    )
    assert out.dtype == q.dtype and lse.dtype == torch.float32
    assert out.is_contiguous() and lse.is_contiguous()
    assert rel_err(out, expected_out) <= TOLERANCE[q.dtype]
    assert rel_err(lse, expected_lse) <= LSE_TOLERANCE
    return out, lse


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 160, 192, 256, 512])
def test_decode_every_head_dim_and_dtype(head_dim: int, dtype: torch.dtype) -> None:
    q, k, v = make_qkv(4, 1, 97, 6, 2, head_dim, dtype=dtype)
    case = make_case(k, v, int32(97, 0, 1, 70))
    out, lse = assert_equals_reference(case, q, random_lists(case, 1))
    assert (out[1] == 0).all() and (lse[1] == -torch.inf).all()
    assert_equals_reference(case, q)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 160, 192, 256, 512])
def test_prefill_every_head_dim_and_dtype(head_dim: int, dtype: torch.dtype) -> None:
    q, k, v = make_qkv(3, 21, 97, 6, 2, head_dim, dtype=dtype)
    case = make_case(k, v, int32(97, 13, 50))
    offsets = int32(0, 8, 21)
    assert_equals_reference(case, q, random_lists(case, 21, offsets), offsets=offsets)
    assert_equals_reference(case, q)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seqlen_q", [1, 21])
@pytest.mark.parametrize("softcap", [None, 0.5, 5.0, 50.0])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_capped_logits_and_sinks(
    softcap: float | None, with_sinks: bool, seqlen_q: int, dtype: torch.dtype
) -> None:
    """Both change the result by far more than any tolerance; a head without a sink has -inf."""
    q, k, v = make_qkv(4, seqlen_q, 97, 6, 2, 64, dtype=dtype)
    q = 3 * q
    case = make_case(k, v, int32(97, 0, 1, 70))
    sinks = torch.tensor([0.0, 3.0, -3.0, 30.0, -100.0, -torch.inf]) if with_sinks else None
    options: dict[str, Any] = {"softcap": softcap, "sink_logits": sinks}
    plain, _ = attend(case, q)
    out, lse = assert_equals_reference(case, q, **options)
    assert (out[1] == 0).all() and (lse[1] == -torch.inf).all()
    if with_sinks or softcap in (0.5, 5.0):
        assert rel_err(out[0], plain[0]) > 0.05
    assert_equals_reference(case, q, random_lists(case, seqlen_q), **options)
    if seqlen_q > 1:
        offsets = int32(0, 8, 21)
        assert_equals_reference(
            case, q, random_lists(case, 21, offsets), offsets=offsets, **options
        )


def test_capped_logits_and_sinks_at_compact_positions() -> None:
    q, k, v = make_qkv(2, 1, 97, 6, 2, 64)
    case = make_case(k, v, int32(97, 70))
    cos, sin = rope_tables(97, 32)
    rope = SimpleNamespace(cos=cos, sin=sin, start=0, interleaved=False)
    sinks = torch.linspace(-1.0, 4.0, 6)
    lists = random_lists(case, 1)
    assert_equals_reference(case, 3 * q, lists, rope=rope, softcap=4.0, sink_logits=sinks)


@pytest.mark.parametrize("seqlen_q", [1, 9])
def test_a_cap_does_not_hide_an_infinite_logit(seqlen_q: int) -> None:
    q, k, v = make_qkv(1, seqlen_q, 97, 2, 1, 64)
    k[0, 40, 0, 0] = torch.inf
    out, _ = attend(make_case(k, v, int32(97)), q, softcap=5.0)
    assert out.isnan().all()


@BOTH
@pytest.mark.parametrize("group_size", [1, 2, 3, 4, 7, 8, 16])
@pytest.mark.parametrize("seqlen_q", [1, 2, 5, 33])
def test_groups(group_size: int, seqlen_q: int, dtype: torch.dtype) -> None:
    q, k, v = make_qkv(2, seqlen_q, 80, 3 * group_size, 3, 64, dtype=dtype)
    case = make_case(k, v, int32(80, 41))
    assert_equals_reference(case, q, random_lists(case, seqlen_q))
    assert_equals_reference(case, q)


@BOTH
@pytest.mark.parametrize("seqlen", [1, 2, 63, 64, 65, 127, 128, 129, 255, 256, 257, 545])
@pytest.mark.parametrize("seqlen_q", [1, 3, 20])
def test_lengths_around_tiles(seqlen: int, seqlen_q: int, dtype: torch.dtype) -> None:
    q, k, v = make_qkv(1, seqlen_q, seqlen, 2, 1, 64, dtype=dtype)
    case = make_case(k, v, int32(seqlen))
    assert_equals_reference(case, q)
    assert_equals_reference(case, q, random_lists(case, seqlen_q, keep=seqlen // 2))


@BOTH
@pytest.mark.parametrize("seqlen_q", [63, 64, 65, 130])
@pytest.mark.parametrize("group_size", [1, 7])
def test_long_query_blocks(seqlen_q: int, group_size: int, dtype: torch.dtype) -> None:
    q, k, v = make_qkv(1, seqlen_q, 210, group_size, 1, 32, dtype=dtype)
    case = make_case(k, v, int32(210))
    assert_equals_reference(case, q, random_lists(case, seqlen_q))
    assert_equals_reference(case, q)


@BOTH
def test_ragged_blocks_with_offsets(dtype: torch.dtype) -> None:
    """Blocks of 0, 1 and many queries; rows shorter than the call; padding at the start."""
    q, k, v = make_qkv(4, 40, 90, 8, 2, 64, dtype=dtype)
    case = make_case(k, v, int32(90, 41, 13, 0), starts=int32(0, 7, 12, 0))
    offsets = int32(0, 9, 9, 24, 25, 40)
    assert_equals_reference(case, q, random_lists(case, 40, offsets), offsets=offsets)


def test_blocks_without_lists_equal_one_block() -> None:
    q, k, v = make_qkv(2, 20, 60, 4, 2, 64)
    case = make_case(k, v, int32(60, 15), starts=int32(3, 2))
    assert_equals_reference(case, q, offsets=int32(0, 7, 20))


def test_lower_right_alignment_is_that_of_torch() -> None:
    q, k, v = make_qkv(1, 7, 30, 2, 2, 64)
    out, _ = attend(make_case(k, v, int32(30)), q)
    mask = torch.ones(7, 30, dtype=torch.bool).tril(diagonal=23)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.double().transpose(1, 2) for x in (q, k, v)), attn_mask=mask
    ).transpose(1, 2)
    assert rel_err(out, expected) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("seqlen_q", [1, 6])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_lists", [False, True])
def test_every_layout_gives_the_same_bits(
    seqlen_q: int, dtype: torch.dtype, with_lists: bool
) -> None:
    """All other memory is NaN: one read outside the row and the result shows it."""
    q, k, v = make_qkv(4, seqlen_q, 150, 8, 2, 64, dtype=dtype)
    seqlens, starts = int32(150, 129, 97, 1), int32(0, 100, 3, 0)
    results = []
    for layout in LAYOUTS:
        case = make_case(k, v, seqlens, starts=starts, layout=layout)
        lists = random_lists(case, seqlen_q) if with_lists else (None, None)
        results.append(attend(case, q, *lists))
    for result in results[1:]:
        assert torch.equal(result[0], results[0][0])
        assert torch.equal(result[1], results[0][1])
    assert results[0][0].isfinite().all()


@pytest.mark.parametrize("seqlen_q", [1, 6])
def test_strides_of_queries_and_lists(seqlen_q: int) -> None:
    q, k, v = make_qkv(2, seqlen_q, 80, 8, 2, 64)
    case = make_case(k, v, int32(80, 33))
    indices, lengths = random_lists(case, seqlen_q)
    packed = attend(case, q, indices, lengths)
    got = attend(
        case,
        non_contiguous(q.transpose(1, 2)).transpose(1, 2),
        non_contiguous(indices),
        non_contiguous(lengths),
    )
    assert torch.equal(got[0], packed[0]) and torch.equal(got[1], packed[1])


@BOTH
def test_one_list_for_all_heads_by_a_stride_of_zero(dtype: torch.dtype) -> None:
    q, k, v = make_qkv(2, 5, 80, 12, 3, 64, dtype=dtype)
    case = make_case(k, v, int32(80, 33))
    indices, lengths = random_lists(case, 5, num_lists=1)
    shared = indices.expand(-1, -1, 3, -1), lengths.expand(-1, -1, 3)
    out, lse = assert_equals_reference(case, q, shared)
    copied = attend(case, q, shared[0].contiguous(), shared[1].contiguous())
    assert torch.equal(out, copied[0]) and torch.equal(lse, copied[1])


def test_entries_behind_the_length_are_not_read() -> None:
    q, k, v = make_qkv(1, 4, 60, 4, 2, 64)
    case = make_case(k, v, int32(60))
    indices, lengths = random_lists(case, 4)
    clean = attend(case, q, indices, lengths)
    place = torch.arange(indices.shape[-1])
    indices = torch.where(place < lengths[..., None], indices, 2**30)
    got = attend(case, q, indices, lengths)
    assert torch.equal(got[0], clean[0]) and torch.equal(got[1], clean[1])


def test_unlisted_keys_and_values_are_not_read() -> None:
    q, k, v = make_qkv(1, 1, 60, 4, 2, 64)
    case = make_case(k, v, int32(60))
    indices, lengths = random_lists(case, 1, num_lists=1)
    indices, lengths = indices.expand(-1, -1, 2, -1), lengths.expand(-1, -1, 2)
    clean = attend(case, q, indices, lengths)
    listed = indices[0, 0, 0, : int(lengths[0, 0, 0])].long()
    unlisted = torch.ones(60, dtype=torch.bool).index_fill(0, listed, False)
    for x in (k, v):
        x[:, unlisted] = torch.nan
    got = attend(make_case(k, v, int32(60)), q, indices, lengths)
    assert torch.equal(got[0], clean[0]) and torch.equal(got[1], clean[1])


@BOTH
def test_a_query_sees_no_later_entry(dtype: torch.dtype) -> None:
    """Nor does a NaN in a later token reach it, though the same block reads that token."""
    q, k, v = make_qkv(1, 70, 90, 4, 2, 64, dtype=dtype)
    clean = attend(make_case(k, v, int32(90)), q)
    k[:, 60:] = torch.nan
    v[:, 60:] = torch.nan
    dirty = attend(make_case(k, v, int32(90)), q)
    early = slice(0, 40)  # positions 20..59
    assert rel_err(dirty[0][:, early], clean[0][:, early].double()) <= TOLERANCE[dtype]
    assert torch.equal(dirty[1][:, early].isfinite(), clean[1][:, early].isfinite())


@BOTH
@pytest.mark.parametrize("group_size", [16, 32, 33])
def test_heads_that_all_end_before_a_defect_do_not_meet_it(
    group_size: int, dtype: torch.dtype
) -> None:
    """So many heads that some work on rows that all see the same tokens, but not the last ones."""
    q, k, v = make_qkv(1, 4, 90, group_size, 1, 64, dtype=dtype)
    clean = attend(make_case(k, v, int32(90)), q)
    for bad in (torch.nan, torch.inf):
        v[:, 87:] = bad
        out, lse = attend(make_case(k, v, int32(90)), q)
        assert rel_err(out[:, :1], clean[0][:, :1].double()) <= TOLERANCE[dtype]
        assert torch.equal(lse, clean[1])
        assert not out[:, 1:].isfinite().any()


@BOTH
@pytest.mark.parametrize("magnitude", [1e3, 1e5, 1e15])
def test_huge_logits_leave_the_most_likely_token(magnitude: float, dtype: torch.dtype) -> None:
    """Logits that lie further apart than float32 knows exponents."""
    q, k, v = make_qkv(1, 20, 300, 2, 1, 64, dtype=dtype)
    case = make_case(magnitude * k, v, int32(300))
    out, lse = attend(case, magnitude * q)
    expected_out, expected_lse = reference.sparse_attention(magnitude * q, case.plain, None)
    assert rel_err(out, expected_out) <= TOLERANCE[dtype]
    assert rel_err(lse, expected_lse) <= LSE_TOLERANCE


@BOTH
@pytest.mark.parametrize("seqlen_q", [1, 6, 20])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_defects_show(seqlen_q: int, bad: float, where: str, dtype: torch.dtype) -> None:
    """Selection leaves such tokens out; attention that does read one must not look healthy."""
    q, k, v = make_qkv(1, seqlen_q, 90, 4, 2, 64, dtype=dtype)
    match where:
        case "q":
            q[0, -1, 2] = bad
        case "k":
            k[0, 70, 1] = bad * torch.ones(64).index_fill_(0, torch.arange(0, 64, 2), -1.0)
        case "v":
            v[0, 70, 1] = bad
    cache = make_case(k, v, int32(90))
    out, _ = attend(cache, q)
    expected, _ = reference.sparse_attention(q, cache.plain)
    assert torch.equal(out.isfinite(), expected.isfinite())
    assert not out[0, -1, 2].isfinite().any() and out[0, -1, 0].isfinite().all()


def test_empty_lists() -> None:
    q, k, v = make_qkv(2, 3, 20, 4, 2, 64)
    case = make_case(k, v, int32(20, 20))
    indices = torch.full((2, 1, 2, 8), -1, dtype=torch.int32)
    lengths = torch.zeros(2, 1, 2, dtype=torch.int32)
    indices[1, 0, 1, 0], lengths[1, 0, 1] = 18, 1  # seen by the last two queries
    out, lse = assert_equals_reference(case, q, (indices, lengths))
    assert (out[0] == 0).all() and (lse[0] == -torch.inf).all()
    assert (out[1, 0] == 0).all() and (lse[1, 0] == -torch.inf).all()
    assert torch.equal(out[1, 1:, 2:], v[1, 18, 1].expand(2, 2, 64))
    assert_equals_reference(case, q[:, :1], (indices, lengths))


def test_lists_without_room_are_empty_lists() -> None:
    q, k, v = make_qkv(1, 2, 20, 4, 2, 64)
    indices = torch.zeros(1, 1, 2, 0, dtype=torch.int32)
    lengths = torch.zeros(1, 1, 2, dtype=torch.int32)
    out, lse = attend(make_case(k, v, int32(20)), q, indices, lengths)
    assert (out == 0).all() and (lse == -torch.inf).all()


@pytest.mark.parametrize("offsets", [None, int32(0), int32(0, 0)])
@pytest.mark.parametrize("with_rope", [False, True])
def test_no_queries(offsets: Tensor | None, with_rope: bool) -> None:
    cos, sin = rope_tables(20, 32)
    rope = SimpleNamespace(cos=cos, sin=sin, start=0, interleaved=False) if with_rope else None
    q, k, v = make_qkv(2, 0, 20, 4, 2, 64)
    case = make_case(k, v, int32(20, 3))
    out, lse = attend(case, q, q_block_offsets=offsets, rope=rope)
    assert out.shape == (2, 0, 4, 64) and lse.shape == (2, 0, 4)


def test_padding_queries_see_nothing() -> None:
    q, k, v = make_qkv(1, 10, 10, 4, 2, 64)
    out, lse = assert_equals_reference(make_case(k, v, int32(10), starts=int32(6)), q)
    assert (out[0, :6] == 0).all() and (lse[0, :6] == -torch.inf).all()
    assert lse[0, 6:].isfinite().all()


def test_everything_listed_equals_no_list() -> None:
    q, k, v = make_qkv(1, 9, 77, 8, 2, 64, dtype=torch.bfloat16)
    case = make_case(k, v, int32(77))
    indices = torch.arange(77, dtype=torch.int32).expand(1, 1, 2, 77)
    lengths = torch.full((1, 1, 2), 77, dtype=torch.int32)
    for seqlen_q in (1, 9):
        listed = attend(case, q[:, -seqlen_q:], indices, lengths)
        dense = attend(case, q[:, -seqlen_q:])
        assert torch.equal(listed[0], dense[0]) and torch.equal(listed[1], dense[1])


def test_scale_and_large_logits() -> None:
    q, k, v = make_qkv(1, 2, 50, 4, 2, 64)
    case = make_case(k, v, int32(50))
    out, lse = attend(case, q, softmax_scale=0.7)
    expected = reference.sparse_attention(q, case.plain, softmax_scale=0.7)
    # logits are six times as large as usual, and so is what rounding them does to the weights
    assert rel_err(out, expected[0]) <= 6 * TOLERANCE[torch.float32]
    assert rel_err(lse, expected[1]) <= LSE_TOLERANCE
    out, lse = attend(case, 1e4 * q)
    assert out.isfinite().all() and lse.isfinite().all()
    assert (out.abs() <= v.abs().max()).all()


def test_float16_logits_do_not_overflow() -> None:
    q, k, v = make_qkv(1, 3, 40, 2, 1, 256, dtype=torch.float16)
    out, lse = attend(make_case(60 * k, v, int32(40)), 60 * q)
    assert out.isfinite().all() and lse.isfinite().all()


# ---- compact positions


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("start, num_pairs", [(0, 32), (0, 8), (16, 20), (6, 5)])
@pytest.mark.parametrize("seqlen_q", [1, 20])
def test_compact_positions(interleaved: bool, start: int, num_pairs: int, seqlen_q: int) -> None:
    cos, sin = rope_tables(101, num_pairs, base=100.0)
    rope = SimpleNamespace(cos=cos, sin=sin, start=start, interleaved=interleaved)
    q, k, v = make_qkv(3, seqlen_q, 100, 8, 2, 64)
    case = make_case(k, v, int32(100, 61, 5), starts=int32(0, 30, 0))
    offsets = int32(0, 7, 20) if seqlen_q == 20 else None
    lists = random_lists(case, seqlen_q, offsets)
    assert_equals_reference(case, q, lists, offsets=offsets, rope=rope)
    assert_equals_reference(case, q, rope=rope)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seqlen_q", [1, 20])
def test_compact_positions_in_every_dtype(dtype: torch.dtype, seqlen_q: int) -> None:
    cos, sin = rope_tables(91, 48)
    rope = SimpleNamespace(cos=cos, sin=sin, start=0, interleaved=False)
    q, k, v = make_qkv(1, seqlen_q, 90, 4, 2, 96, dtype=dtype)
    case = make_case(k, v, int32(90), layout="paged_16")
    assert_equals_reference(case, q, random_lists(case, seqlen_q), rope=rope)


@pytest.mark.parametrize("seqlen_q", [1, 4])
def test_heads_rotate_by_their_own_list(seqlen_q: int) -> None:
    """Lists of different lengths: the query's rank differs between KV heads."""
    cos, sin = rope_tables(64, 32, base=100.0)
    rope = SimpleNamespace(cos=cos, sin=sin, start=0, interleaved=False)
    q, k, v = make_qkv(1, seqlen_q, 60, 8, 2, 64)
    case = make_case(k, v, int32(60))
    indices = torch.full((1, 1, 2, 30), -1, dtype=torch.int32)
    indices[0, 0, 0, :9] = int32(0, 3, 5, 40, 41, 56, 57, 58, 59)
    indices[0, 0, 1, :24] = torch.arange(36, 60, dtype=torch.int32)
    lists = indices, int32(9, 24).view(1, 1, 2)
    assert_equals_reference(case, q, lists, rope=rope)


@pytest.mark.parametrize("seqlen_q", [1, 4])
def test_rank_of_a_query_whose_own_token_is_not_listed(seqlen_q: int) -> None:
    """Its key may not be finite; the query still stands one place behind the last token it sees."""
    cos, sin = rope_tables(64, 32, base=100.0)
    rope = SimpleNamespace(cos=cos, sin=sin, start=0, interleaved=False)
    q, k, v = make_qkv(1, seqlen_q, 60, 2, 1, 64)
    case = make_case(k, v, int32(60))
    lists = int32(0, 5, 30, 57, 58).view(1, 1, 1, 5), int32(5).view(1, 1, 1)
    assert_equals_reference(case, q, lists, rope=rope)


# ---- one test per message


def bad_call(**change: Any) -> None:
    q, k, v = make_qkv(2, 4, 40, 4, 2, 64)
    case = make_case(k, v, int32(40, 20))
    indices, lengths = random_lists(case, 4)
    arguments: dict[str, Any] = {"q": q, "indices": indices, "topk_length": lengths} | change
    attend(case, **arguments)


LISTS = torch.zeros(2, 1, 2, 4, dtype=torch.int32)
LENGTHS = torch.ones(2, 1, 2, dtype=torch.int32)
TABLE = torch.zeros(90, 32)
ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"q": torch.zeros(2, 4, 64)}, r"q: got shape \[2, 4, 64\], allowed: \[batch, seqlen_q, num_"),
    ({"q": torch.zeros(2, 4, 4, 64).half()}, "q: got float16, allowed: float32"),
    ({"q": torch.zeros(2, 4, 64, 4).mT}, "q: got strides .*1 in the last dimension"),
    ({"q": torch.zeros(2, 4, 3, 64)}, "num_q_heads: got 3, allowed: a multiple of num_kv_heads"),
    ({"q": torch.zeros(2, 4, 4, 32)}, r"q: got shape .*head_dim=64"),
    ({"k_cache": torch.zeros(2, 40, 2, 64).int()}, "k_cache: got int32, allowed: float32, float16"),
    ({"v_cache": torch.zeros(2, 43, 2, 64).half()}, "v_cache: got float16, allowed: float32"),
    ({"v_cache": torch.zeros(2, 39, 2, 64)}, r"v_cache: got shape \[2, 39, 2, 64\]"),
    ({"v_cache": torch.zeros(2, 43, 64, 2).mT}, "v_cache: got strides .*1 in the last dimension"),
    ({"cache_seqlens": int32(99, 1)}, "cache_seqlens: got 99 tokens in row 0, allowed: at most 43"),
    ({"q_block_offsets": int32(0, 3)}, r"q_block_offsets: got 0\.\.3, allowed: 0\.\.4"),
    ({"indices": None}, "topk_length: got a tensor, allowed: None, like indices"),
    ({"topk_length": None}, "topk_length: got None, allowed: a tensor, like indices"),
    ({"indices": LISTS.long(), "topk_length": LENGTHS}, "indices: got int64, allowed: int32"),
    ({"indices": LISTS[:, :, :1], "topk_length": LENGTHS}, r"indices: got shape \[2, 1, 1, 4\]"),
    ({"indices": LISTS.mT.contiguous().mT, "topk_length": LENGTHS}, "indices: got strides"),
    ({"topk_length": LENGTHS.long()}, "topk_length: got int64, allowed: int32"),
    ({"topk_length": LENGTHS[:1]}, r"topk_length: got shape \[1, 1, 2\]"),
    ({"topk_length": 999 * LENGTHS}, r"topk_length: got 999 at \[0, 0, 0\], allowed: 0\.\."),
    ({"indices": LISTS + 40, "topk_length": LENGTHS}, r"indices: got 40 at \[0, 0, 0, 0\]"),
    ({"indices": LISTS - 1, "topk_length": LENGTHS}, r"indices: got -1 at \[0, 0, 0, 0\], allowed"),
    ({"indices": LISTS, "topk_length": 2 * LENGTHS}, r"indices: got 0 at \[0, 0, 0, 1\], allowed"),
    ({"cos": TABLE}, "sin: got None, allowed: a tensor, like cos"),
    ({"cos": TABLE[:29], "sin": TABLE[:29]}, "cos: got 29 positions, allowed: at least 30"),
    ({"cos": TABLE, "sin": TABLE, "rope_start": 1}, "rope_start: got 1 with 32 pairs"),
    ({"softcap": -1.0}, r"softcap: got -1, allowed: 0 \(none\), or 1e-6 .. 1e6"),
    ({"softcap": float("nan")}, "softcap: got -?nan, allowed"),
    ({"sink_logits": torch.zeros(3)}, r"sink_logits: got shape \[3\]"),
    ({"sink_logits": torch.zeros(4).double()}, "sink_logits: got float64, allowed: float32"),
]


@ONE_IMPLEMENTATION
@pytest.mark.parametrize("change, message", ERRORS, ids=[e[1][:44] for e in ERRORS])
def test_error_messages(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bad_call(**change)


@ONE_IMPLEMENTATION
def test_dense_call_needs_a_table_as_long_as_the_row() -> None:
    with pytest.raises(ValueError, match="cos: got 39 positions, allowed: at least 40"):
        bad_call(indices=None, topk_length=None, cos=TABLE[:39], sin=TABLE[:39])
