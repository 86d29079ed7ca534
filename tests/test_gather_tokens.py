"""gather_tokens against the float64 reference: every layout, ragged blocks, padding, ranks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_calls import ONE_IMPLEMENTATION, Case, int32, make_case, rope_arguments
from test_sparse_attention import random_lists
from torch import Tensor

from kvselect import reference
from kvselect.selection import Selection
from kvselect.testing import LAYOUTS, TOLERANCE, make_qkv, non_contiguous, rel_err, rope_tables

pytestmark = pytest.mark.usefixtures("implementation")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def gather(
    case: Case,
    lists: tuple[Tensor, Tensor],
    seqlen_q: int,
    *,
    offsets: Tensor | None = None,
    rope: Any = None,
    **changes: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """The rows that the op wrote, without the room behind them."""
    arguments: dict[str, Any] = {
        **case.cache_arguments(),
        "v_cache": case.stored.v_cache,
        "indices": lists[0],
        "topk_length": lists[1],
        "q_block_offsets": offsets,
        "seqlen_q": seqlen_q,
        **rope_arguments(rope),
    }
    k, v, cu_seqlens = torch.ops.kvselect.gather_tokens(**(arguments | changes))
    num_lists, width = lists[0].shape[0] * lists[0].shape[1] * lists[0].shape[2], lists[0].shape[3]
    assert k.shape == v.shape == (num_lists * width, case.plain.k.shape[-1])
    assert cu_seqlens.shape == (num_lists + 1,) and cu_seqlens.dtype == torch.int32
    return k[: int(cu_seqlens[-1])], v[: int(cu_seqlens[-1])], cu_seqlens


def assert_equals_reference(
    case: Case,
    lists: tuple[Tensor, Tensor],
    seqlen_q: int,
    *,
    offsets: Tensor | None = None,
    rope: Any = None,
) -> tuple[Tensor, Tensor, Tensor]:
    got = gather(case, lists, seqlen_q, offsets=offsets, rope=rope)
    selection = Selection(*lists, q_block_offsets=offsets)
    want = reference.gather_tokens(case.plain, selection, seqlen_q, rope=rope)
    assert torch.equal(got[2], want[2]) and torch.equal(got[1].double(), want[1])
    if rope is None:
        assert torch.equal(got[0].double(), want[0])
    else:
        assert rel_err(got[0], want[0]) <= TOLERANCE[got[0].dtype]
    return got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 160, 192, 256, 512])
def test_every_head_dim_and_dtype(head_dim: int, dtype: torch.dtype) -> None:
    _, k, v = make_qkv(3, 1, 97, 2, 2, head_dim, dtype=dtype)
    case = make_case(k, v, int32(97, 13, 50))
    offsets = int32(0, 8, 21)
    assert_equals_reference(case, random_lists(case, 21, offsets), 21, offsets=offsets)


def test_every_layout_gives_the_same_bits() -> None:
    """All other memory is NaN."""
    _, k, v = make_qkv(4, 1, 150, 2, 2, 64, dtype=torch.bfloat16)
    seqlens, starts = int32(150, 129, 97, 1), int32(0, 100, 3, 0)
    results = []
    for layout in LAYOUTS:
        case = make_case(k, v, seqlens, starts=starts, layout=layout)
        results.append(gather(case, random_lists(case, 6), 6))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
    assert results[0][0].isfinite().all()


def test_ragged_blocks_and_padding() -> None:
    """Blocks of 0, 1 and many queries; rows shorter than the call; padding at the start."""
    _, k, v = make_qkv(4, 1, 90, 2, 2, 64)
    case = make_case(k, v, int32(90, 41, 13, 0), starts=int32(0, 7, 12, 0))
    offsets = int32(0, 9, 9, 24, 25, 40)
    lists = random_lists(case, 40, offsets)
    got = assert_equals_reference(case, lists, 40, offsets=offsets)
    lengths = lists[1].permute(2, 0, 1).flatten()
    assert torch.equal(got[2].diff(), lengths) and len(lengths.unique()) > 4


def test_some_blocks_of_a_call() -> None:
    _, k, v = make_qkv(2, 1, 90, 2, 2, 64)
    case, offsets = make_case(k, v, int32(90, 60)), int32(0, 9, 24, 40)
    indices, lengths = random_lists(case, 40, offsets)
    some = gather(case, (indices[:, 1:], lengths[:, 1:]), 40, offsets=offsets[1:])
    assert torch.equal(some[2].diff(), lengths[:, 1:].permute(2, 0, 1).flatten())
    whole = gather(case, (indices, lengths), 40, offsets=offsets)
    begin, end = whole[2][1:3].tolist()
    assert torch.equal(some[0][: end - begin], whole[0][begin:end])


def test_one_list_for_all_heads_by_a_stride_of_zero() -> None:
    _, k, v = make_qkv(2, 1, 80, 3, 3, 64)
    case = make_case(k, v, int32(80, 33))
    indices, lengths = random_lists(case, 3, num_lists=1)
    shared = indices.expand(-1, -1, 3, -1), lengths.expand(-1, -1, 3)
    got = assert_equals_reference(case, shared, 3)
    copied = gather(case, (shared[0].contiguous(), shared[1].contiguous()), 3)
    assert all(torch.equal(a, b) for a, b in zip(got, copied, strict=True))


def test_strides_of_lists_and_what_lies_behind_their_length() -> None:
    _, k, v = make_qkv(2, 1, 80, 2, 2, 64)
    case = make_case(k, v, int32(80, 33))
    indices, lengths = random_lists(case, 6)
    clean = gather(case, (indices, lengths), 6)
    place = torch.arange(indices.shape[-1])
    indices = torch.where(place < lengths[..., None], indices, 2**30)
    got = gather(case, (non_contiguous(indices), non_contiguous(lengths)), 6)
    assert all(torch.equal(a, b) for a, b in zip(got, clean, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("start", "num_pairs"), [(0, 32), (16, 20), (6, 5)])
def test_keys_rotate_to_their_rank(
    start: int, num_pairs: int, interleaved: bool, dtype: torch.dtype
) -> None:
    cos, sin = rope_tables(101, num_pairs, base=100.0)
    rope = SimpleNamespace(cos=cos, sin=sin, start=start, interleaved=interleaved)
    _, k, v = make_qkv(3, 1, 100, 2, 2, 64, dtype=dtype)
    case = make_case(k, v, int32(100, 61, 5), starts=int32(0, 30, 0), layout="paged_16")
    offsets = int32(0, 7, 20)
    lists = random_lists(case, 20, offsets)
    assert_equals_reference(case, lists, 20, offsets=offsets, rope=rope)


def test_nothing_to_gather() -> None:
    _, k, v = make_qkv(2, 1, 20, 2, 2, 64)
    case = make_case(k, v, int32(20, 0))
    none = torch.zeros(2, 1, 2, 0, dtype=torch.int32), torch.zeros(2, 1, 2, dtype=torch.int32)
    assert gather(case, none, 0)[2].tolist() == [0, 0, 0, 0, 0]
    empty = make_case(k[:0], v[:0], int32())
    assert gather(empty, (none[0][:0], none[1][:0]), 4)[2].tolist() == [0]
    no_block = torch.zeros(2, 0, 2, 8, dtype=torch.int32), torch.zeros(2, 0, 2, dtype=torch.int32)
    assert gather(case, no_block, 4, offsets=int32(0))[2].tolist() == [0]


@ONE_IMPLEMENTATION
@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 1 << 30), sizes=st.data())
def test_any_case(seed: int, sizes: st.DataObject) -> None:
    seqlen_q = sizes.draw(st.integers(1, 40), label="seqlen_q")
    batch = sizes.draw(st.integers(1, 3), label="batch")
    seqlens = int32(*(sizes.draw(st.integers(0, 90), label="seqlen") for _ in range(batch)))
    starts = int32(*(sizes.draw(st.integers(0, 90), label="start") for _ in range(batch)))
    cuts = sizes.draw(st.lists(st.integers(0, seqlen_q), max_size=3), label="cuts")
    offsets = int32(0, *sorted(cuts), seqlen_q)
    heads = sizes.draw(st.integers(1, 3), label="heads")
    dtype = sizes.draw(st.sampled_from(DTYPES), label="dtype")
    _, k, v = make_qkv(batch, 1, 90, heads, heads, 32, dtype=dtype, seed=seed)
    layout = sizes.draw(st.sampled_from(LAYOUTS), label="layout")
    case = make_case(k, v, seqlens, starts=torch.minimum(starts, seqlens), layout=layout)
    assert_equals_reference(case, random_lists(case, seqlen_q, offsets), seqlen_q, offsets=offsets)


def one_list(*entries: int) -> dict[str, Tensor]:
    return {
        "indices": int32(*entries).view(1, 1, 1, -1),
        "topk_length": int32(len(entries)).view(1, 1, 1),
    }


ROPE = rope_tables(4, 16)


@ONE_IMPLEMENTATION
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"indices": torch.zeros(1, 1, 1, 4)}, "indices: got float32, allowed: int32"),
        (
            {"indices": torch.zeros(1, 1, 4, dtype=torch.int32)},
            r"indices: got shape \[1, 1, 4\], allowed: \[batch, num_blocks, num_kv_heads, width\]",
        ),
        ({"topk_length": int32(9).view(1, 1, 1)}, "topk_length: got 9 at"),
        ({"cache_seqlens": int32(9, 9)}, "cache_seqlens: got "),
        (
            {name: torch.zeros(1, 8, 1, 20) for name in ("k_cache", "v_cache")},
            "head_dim: got 20, allowed: ",
        ),
        ({"v_cache": torch.zeros(1, 9, 1, 32)}, "v_cache: got "),
        ({"seqlen_q": -1}, "seqlen_q: got -1, allowed: an int >= 0"),
        ({"starts": int32(0, 0)}, "starts: got "),
        ({"q_block_offsets": int32(0, 3)}, "q_block_offsets: got 3 at 1, allowed: ascending"),
        ({"cos": ROPE[0]}, "sin: got None, allowed: a tensor, like cos"),
        (
            one_list(0, 1, 2, 6, 7) | {"cos": ROPE[0], "sin": ROPE[1]},
            "cos: got 4 positions, allowed: at least 5",
        ),
        (
            one_list(0, 1, 6),
            r"indices: got a list at \[0, 0, 0\] that does not end with all tokens of its block, "
            r"allowed: lists that do, for a dense kernel \(sparse_attention takes any\)",
        ),
        (one_list(0, 1, 7), r"indices: got a list at \[0, 0, 0\] that does not end"),
        (one_list(), r"indices: got a list at \[0, 0, 0\] that does not end"),
        (
            one_list(4, 7) | {"starts": int32(7)},
            r"indices: got a list at \[0, 0, 0\] that does not end",
        ),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "k_cache": torch.zeros(1, 8, 1, 32),
        "v_cache": torch.zeros(1, 8, 1, 32),
        "block_table": None,
        "cache_seqlens": int32(8),
        "starts": None,
        **one_list(0, 3, 6, 7),
        "q_block_offsets": None,
        "seqlen_q": 2,
        **rope_arguments(None),
    }
    torch.ops.kvselect.gather_tokens(**arguments)
    with pytest.raises(ValueError, match=message):
        torch.ops.kvselect.gather_tokens(**(arguments | change))


@ONE_IMPLEMENTATION
def test_room_that_int32_cannot_count_is_refused() -> None:
    """Heads that share a list: much room, little memory."""
    heads, width = 1 << 20, 1 << 12
    cache = torch.zeros(1, 8, 1, 32).expand(1, 8, heads, 32)
    with pytest.raises(ValueError, match="indices: got room for 4294967296 tokens, allowed: at"):
        torch.ops.kvselect.gather_tokens(
            k_cache=cache,
            v_cache=cache,
            block_table=None,
            cache_seqlens=int32(8),
            starts=None,
            indices=int32(0)
            .view(1, 1, 1, 1)
            .expand(1, 1, 1, width)
            .contiguous()
            .expand(1, 1, heads, width),
            topk_length=int32(0).view(1, 1, 1).expand(1, 1, heads),
            q_block_offsets=None,
            seqlen_q=0,
            **rope_arguments(None),
        )
