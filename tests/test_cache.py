"""KVCache: whatever is appended, cropped or reordered, it holds what a list of tensors would."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kvselect import KVCache
from kvselect.sketch import BLOCK_TOKENS, encode
from kvselect.testing import non_contiguous

HEADS, DIM = 2, 32
LAYOUTS = [None, 1, 16, 128]


def tokens(batch: int, count: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, count, HEADS, DIM, generator=generator).to(dtype)


class ListCache:
    """The model: one tensor [n, heads, head_dim] per row, and nothing clever."""

    def __init__(self, batch: int) -> None:
        self.rows = [(torch.empty(0, HEADS, DIM), torch.empty(0, HEADS, DIM)) for _ in range(batch)]

    def append(self, k: Tensor, v: Tensor, counts: list[int]) -> None:
        self.rows = [
            (torch.cat([a, k[row, :count]]), torch.cat([b, v[row, :count]]))
            for row, ((a, b), count) in enumerate(zip(self.rows, counts))
        ]

    def crop(self, num_tokens: int) -> None:
        self.rows = [(a[: len(a) - num_tokens], b[: len(b) - num_tokens]) for a, b in self.rows]

    @property
    def lengths(self) -> list[int]:
        return [len(a) for a, _ in self.rows]


def assert_same(cache: KVCache, model: ListCache) -> None:
    assert cache.batch == len(model.rows)
    assert cache.cache_seqlens.tolist() == list(cache.lengths) == model.lengths
    assert cache.cache_seqlens.dtype == torch.int32
    assert cache.max_seqlen == max(model.lengths, default=0)
    assert cache.k.shape == cache.v.shape == (cache.batch, cache.max_seqlen, HEADS, DIM)
    for row, (k, v) in enumerate(model.rows):
        assert torch.equal(cache.k[row, : len(k)], k)
        assert torch.equal(cache.v[row, : len(v)], v)
        whole = len(k) // BLOCK_TOKENS
        if cache.sketch_format is not None and whole:
            assert cache.sketch_data is not None
            blocks = k[: whole * BLOCK_TOKENS].view(whole, BLOCK_TOKENS, HEADS, DIM)
            expected = encode(blocks.permute(2, 0, 1, 3), cache.sketch_format)
            assert torch.equal(cache.sketch_data[row, :, :whole], expected)


operations = st.one_of(
    st.tuples(st.just("append"), st.integers(0, 150), st.booleans()),
    st.tuples(st.just("crop"), st.integers(0, 40), st.none()),
    st.tuples(st.just("reorder"), st.lists(st.integers(0, 2), min_size=1, max_size=4), st.none()),
    st.tuples(st.just("reset"), st.none(), st.none()),
)


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(LAYOUTS),
    st.sampled_from(["int4", "int8", None]),
    st.lists(operations, max_size=8),
    st.integers(0, 2**31),
)
def test_any_sequence_of_operations(
    page_block_size: int | None, sketch: str | None, steps: list[Any], seed: int
) -> None:
    cache = KVCache(3, HEADS, DIM, sketch=sketch, page_block_size=page_block_size)
    model = ListCache(3)
    generator = torch.Generator().manual_seed(seed)
    for number, (what, argument, ragged) in enumerate(steps):
        version = cache.version
        if what == "append":
            k, v = tokens(cache.batch, argument, seed + number), tokens(cache.batch, argument)
            counts = [argument] * cache.batch
            if ragged:
                counts = torch.randint(
                    0, argument + 1, (cache.batch,), generator=generator
                ).tolist()
            cache.append(k, v, counts if ragged else None)
            model.append(k, v, counts)
            assert cache.version == version and cache.num_appended == max(counts)
        elif what == "crop":
            count = min(argument, min(model.lengths))
            cache.crop(count)
            model.crop(count)
        elif what == "reorder":
            rows = [row % cache.batch for row in argument]
            cache.reorder(rows)
            model.rows = [model.rows[row] for row in rows]
        else:
            cache.reset()
            model.rows = ListCache(cache.batch).rows
        if what != "append":
            assert cache.version == version + 1 and cache.num_appended == 0
        assert_same(cache, model)


@pytest.mark.parametrize("page_block_size", LAYOUTS)
def test_grows_and_never_truncates(page_block_size: int | None) -> None:
    cache = KVCache(2, HEADS, DIM, capacity=5, page_block_size=page_block_size)
    assert cache.capacity == 128 and cache.max_seqlen == 0
    k, v = tokens(2, 300), tokens(2, 300, seed=1)
    for begin in range(0, 300, 60):
        cache.append(k[:, begin : begin + 60], v[:, begin : begin + 60])
    assert torch.equal(cache.k, k) and torch.equal(cache.v, v)
    assert cache.capacity == 384  # an eighth more than was needed, in whole sketch blocks


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_takes_views_of_any_stride(dtype: torch.dtype) -> None:
    cache = KVCache(2, HEADS, DIM, dtype=dtype, sketch=None)
    k, v = tokens(2, 7, dtype=dtype), tokens(2, 7, seed=1, dtype=dtype)
    cache.append(non_contiguous(k), v.transpose(1, 2).contiguous().transpose(1, 2))
    assert torch.equal(cache.k, k) and torch.equal(cache.v, v)
    assert cache.k.dtype == dtype and cache.sketch_data is None


def test_views_and_pages_show_the_same_memory() -> None:
    cache = KVCache(2, HEADS, DIM)
    cache.append(tokens(2, 5), tokens(2, 5))
    assert cache.k.data_ptr() == cache.k_pages.data_ptr()
    assert cache.k_pages.shape == (2, 128, HEADS, DIM) and cache.block_table is None
    head_major = cache.k.transpose(1, 2)  # what transformers reads
    assert head_major.stride(2) == DIM and head_major.stride(3) == 1


def test_pages_are_used_again() -> None:
    cache = KVCache(2, HEADS, DIM, page_block_size=16, sketch=None)
    cache.append(tokens(2, 64), tokens(2, 64))
    pages = cache.k_pages.shape[0]
    for seed in range(5):
        cache.crop(48)
        cache.append(tokens(2, 48, seed), tokens(2, 48, seed))
    assert cache.k_pages.shape[0] == pages == 8
    table = cache.block_table
    assert table is not None and len(set(table[:, :4].flatten().tolist())) == 8


def test_reordered_pages_are_owned_by_one_row_each() -> None:
    cache = KVCache(2, HEADS, DIM, page_block_size=16)
    cache.append(tokens(2, 20), tokens(2, 20))
    cache.reorder(torch.tensor([1, 1, 0]))
    before = cache.k.clone()
    cache.append(tokens(3, 5, seed=3), tokens(3, 5, seed=3))
    assert torch.equal(cache.k[:, :20], before)
    assert torch.equal(cache.k[:, 20:], tokens(3, 5, seed=3))


def test_seqlens_as_a_tensor() -> None:
    cache = KVCache(3, HEADS, DIM)
    cache.append(tokens(3, 4), tokens(3, 4), torch.tensor([4, 0, 2]))
    assert cache.lengths == (4, 0, 2) and cache.num_appended == 4


def test_appending_nothing_changes_nothing() -> None:
    cache = KVCache(2, HEADS, DIM)
    cache.append(tokens(2, 0), tokens(2, 0))
    cache.append(tokens(2, 3), tokens(2, 3), [0, 0])
    assert cache.lengths == (0, 0) and cache.num_appended == 0 and cache.nbytes == 0


def test_starts() -> None:
    cache = KVCache(2, HEADS, DIM)
    cache.set_starts([3, 0])
    version = cache.version
    cache.append(tokens(2, 10), tokens(2, 10))
    assert cache.num_real_tokens == (7, 10)
    assert cache.starts is not None and cache.starts.tolist() == [3, 0]
    same = torch.tensor([3, 0])
    cache.set_starts(same)  # equal values are no change
    assert cache.version == version
    cache.set_starts([3, 1])
    assert cache.version == version + 1
    cache.reorder([1, 0])
    assert cache.starts is not None and cache.starts.tolist() == [1, 3]
    assert cache.num_real_tokens == (9, 7)
    cache.set_starts(None)
    assert cache.starts is None and cache.num_real_tokens == (10, 10)


def test_counts_tokens_that_are_not_finite() -> None:
    cache = KVCache(2, HEADS, DIM)
    k, v = tokens(2, 5), tokens(2, 5)
    k[0, 2, 1, 3], v[1, 4, 0, 0], k[1, 4, 0, 1] = torch.nan, torch.inf, -torch.inf
    cache.append(k, v)
    cache.append(k[:, :1], v[:, :1])
    assert cache.num_nonfinite.tolist() == [[0, 1], [1, 0]]
    cache.reset()
    assert cache.num_nonfinite.sum() == 0


def test_bytes_count_everything_held() -> None:
    cache = KVCache(2, HEADS, DIM, dtype=torch.bfloat16, capacity=128)
    keys_and_values = 2 * 2 * HEADS * 128 * DIM * 2
    assert cache.nbytes == keys_and_values + 2 * HEADS * (4 * DIM + 128 * DIM // 2)


def test_repr_says_what_it_is() -> None:
    text = repr(KVCache(2, HEADS, DIM, page_block_size=16))
    assert "pages of 16" in text and "sketch='int4'" in text and "max_seqlen=0" in text


# --- a foreign pool


def foreign(num_pages: int = 12, page: int = 16) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    pool = torch.randn(num_pages, 2, page, HEADS, DIM, generator=torch.Generator().manual_seed(5))
    table = torch.tensor([[7, 2, 9, 4], [1, 0, 11, 5]], dtype=torch.int32)
    return pool[:, 0], pool[:, 1], table, torch.tensor([40, 17], dtype=torch.int32)


def test_foreign_pages_are_read_and_written_in_place() -> None:
    k_pages, v_pages, table, seqlens = foreign()
    cache = KVCache.from_pages(k_pages, v_pages, table, seqlens, sketch=None)
    assert cache.lengths == (40, 17) and cache.page_block_size == 16
    assert torch.equal(cache.k[0], k_pages[[7, 2, 9]].flatten(0, 1)[:40])
    new = tokens(2, 3)
    cache.append(new, new)
    assert torch.equal(k_pages[9, 8:11], new[0]) and torch.equal(v_pages[0, 1:4], new[1])
    assert seqlens.tolist() == [40, 17]  # the engine's own lengths are the engine's


def test_foreign_pages_get_a_sketch_and_counts() -> None:
    k_pages, v_pages, _, _ = foreign(num_pages=10)
    k_pages[3, 5, 1, 0] = torch.nan
    table = torch.tensor([[4, 2, 9, 0, 7, 1, 6, 5, 8, 3]], dtype=torch.int32)
    seqlens = torch.tensor([155], dtype=torch.int32)
    cache = KVCache.from_pages(k_pages, v_pages, table, seqlens)
    keys = k_pages[table[0].long()].flatten(0, 1)
    assert cache.sketch_data is not None and cache.sketch_data.shape[2] == 1
    for head in range(HEADS):
        assert torch.equal(cache.sketch_data[0, head, 0], encode(keys[:128, head], "int4"))
    assert cache.num_nonfinite.tolist() == [[0, 1]]


def test_foreign_pages_do_not_grow_or_alias() -> None:
    k_pages, v_pages, table, seqlens = foreign()
    cache = KVCache.from_pages(k_pages, v_pages, table, seqlens)
    with pytest.raises(ValueError, match=r"capacity: got 65, allowed: at most 64 tokens per row"):
        cache.append(tokens(2, 25), tokens(2, 25))
    assert cache.lengths == (40, 17) and cache.cache_seqlens.tolist() == [40, 17]
    with pytest.raises(ValueError, match=r"index: got \[0, 0\], allowed: each row once"):
        cache.reorder([0, 0])
    before = cache.k.clone()
    cache.reorder([1, 0])
    assert torch.equal(cache.k[1, :40], before[0, :40])
    cache.crop(17)
    assert cache.lengths == (0, 23)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"k_pages": torch.zeros(3, 16, HEADS)}, ValueError, "k_pages: got shape"),
        ({"v_pages": torch.zeros(12, 16, HEADS, 64)}, ValueError, "v_pages: got shape"),
        ({"block_table": torch.zeros(2, 4)}, TypeError, "block_table: got torch.float32"),
        (
            {"cache_seqlens": torch.zeros(3, dtype=torch.int32)},
            ValueError,
            "cache_seqlens: got sha",
        ),
        (
            {"cache_seqlens": torch.tensor([65, 1], dtype=torch.int32)},
            ValueError,
            r"cache_seqlens\[0\]: got 65, allowed: 0..64",
        ),
        (
            {"block_table": torch.full((2, 4), 12, dtype=torch.int32)},
            ValueError,
            r"block_table\[0\]: got \[12, 12, 12\], allowed: pages 0..11",
        ),
        ({"sketch": "int2"}, ValueError, "sketch: got 'int2', allowed: 'int4' or 'int8' or None"),
    ],
)
def test_foreign_pages_are_checked(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    k_pages, v_pages, block_table, cache_seqlens = foreign()
    arguments: dict[str, Any] = {
        "k_pages": k_pages,
        "v_pages": v_pages,
        "block_table": block_table,
        "cache_seqlens": cache_seqlens,
    }
    with pytest.raises(error, match=message):
        KVCache.from_pages(**(arguments | change))


# --- bad input leaves the cache as it was


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"batch": -1}, ValueError, "batch: got -1, allowed: an int >= 0"),
        ({"batch": 2.0}, TypeError, "batch: got float 2.0, allowed: an int >= 0"),
        ({"batch": True}, TypeError, "batch: got bool True"),
        ({"num_kv_heads": 0}, ValueError, "num_kv_heads: got 0, allowed: an int >= 1"),
        ({"head_dim": 48}, ValueError, "head_dim: got 48, allowed: 32 or 64 or 80 or 96 or 128"),
        ({"dtype": torch.float64}, ValueError, "dtype: got torch.float64, allowed: torch.float32"),
        ({"dtype": "float32"}, TypeError, "dtype: got str 'float32', allowed: dtype"),
        ({"capacity": -1}, ValueError, "capacity: got -1"),
        ({"sketch": "fp8"}, ValueError, "sketch: got 'fp8'"),
        ({"page_block_size": 0}, ValueError, "page_block_size: got 0"),
    ],
)
def test_settings_are_checked(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    good: dict[str, Any] = {"batch": 2, "num_kv_heads": HEADS, "head_dim": DIM}
    with pytest.raises(error, match=message):
        KVCache(**(good | arguments))


GOOD = tokens(2, 3)


@pytest.mark.parametrize(
    "k, v, seqlens, error, message",
    [
        ("k", GOOD, None, TypeError, "k: got str 'k', allowed: a torch.Tensor"),
        (GOOD[0], GOOD, None, ValueError, r"k: got shape \(3, 2, 32\), allowed: \[2, any, 2, 32\]"),
        (tokens(1, 3), GOOD, None, ValueError, r"k: got shape \(1, 3"),
        (GOOD, GOOD[:, :2], None, ValueError, r"v: got shape \(2, 2"),
        (GOOD.double(), GOOD, None, TypeError, "k: got torch.float64, allowed: torch.float32"),
        (GOOD, GOOD.half(), None, TypeError, "v: got torch.float16"),
        (GOOD.to("meta"), GOOD, None, ValueError, "k: got device meta, allowed: cpu"),
        (
            torch.zeros(2, 3, HEADS, 2 * DIM)[..., ::2],
            GOOD,
            None,
            ValueError,
            "k: got a last dim of stride 2, allowed: 1",
        ),
        (GOOD, GOOD, [1, 4], ValueError, r"seqlens\[1\]: got 4, allowed: 0..3"),
        (GOOD, GOOD, [-1, 1], ValueError, r"seqlens\[0\]: got -1"),
        (GOOD, GOOD, [1], ValueError, r"seqlens: got \[1\], allowed: 2 entries, one per row"),
        (GOOD, GOOD, [1, 1.5], TypeError, "seqlens: got float 1.5"),
        (GOOD, GOOD, 3, TypeError, "seqlens: got int 3, allowed: a list of ints"),
        (GOOD, GOOD, torch.ones(2), TypeError, "seqlens: got torch.float32"),
        (GOOD, GOOD, torch.ones(3, dtype=torch.int32), ValueError, "seqlens: got shape"),
    ],
)
@pytest.mark.parametrize("page_block_size", [None, 16])
def test_append_checks_before_it_stores(
    k: Any, v: Any, seqlens: Any, error: type[Exception], message: str, page_block_size: int | None
) -> None:
    cache = KVCache(2, HEADS, DIM, page_block_size=page_block_size)
    cache.append(GOOD, GOOD)
    with pytest.raises(error, match=message):
        cache.append(k, v, seqlens)
    assert cache.lengths == (3, 3) and cache.num_appended == 3
    assert cache.cache_seqlens.tolist() == [3, 3] and torch.equal(cache.k, GOOD)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda c: c.crop(3), ValueError, "num_tokens: got 3, allowed: 0..2"),
        (lambda c: c.crop(-1), ValueError, "num_tokens: got -1"),
        (lambda c: c.reorder([0, 2]), ValueError, r"index: got \[0, 2\], allowed: rows 0..1"),
        (lambda c: c.reorder([-1]), ValueError, r"index: got \[-1\]"),
        (lambda c: c.reorder(torch.tensor([0.0])), TypeError, "index: got torch.float32"),
        (lambda c: c.reorder("ab"), TypeError, "index: got str 'ab'"),
        (lambda c: c.set_starts([0]), ValueError, r"starts: got \[0\], allowed: 2 entries"),
        (lambda c: c.set_starts([0, -1]), ValueError, r"starts: got \[0, -1\], allowed: ints >= 0"),
    ],
)
@pytest.mark.parametrize("page_block_size", [None, 16])
def test_changes_are_checked(
    call: Any, error: type[Exception], message: str, page_block_size: int | None
) -> None:
    cache = KVCache(2, HEADS, DIM, page_block_size=page_block_size)
    cache.append(GOOD, GOOD, [3, 2])
    version = cache.version
    with pytest.raises(error, match=message):
        call(cache)
    assert cache.version == version and cache.lengths == (3, 2)


def test_a_prompt_leaves_room_for_its_answer_and_no_more() -> None:
    cache = KVCache(1, HEADS, DIM, sketch=None)
    k, v = tokens(1, 1024), tokens(1, 1024)
    cache.append(k, v)
    assert cache.capacity == 1152
    before = cache.k_pages.data_ptr()
    cache.append(k[:, :100], v[:, :100])
    assert cache.capacity == 1152 and cache.k_pages.data_ptr() == before


def test_the_sketch_of_pages_is_as_long_as_the_longest_row() -> None:
    pool = torch.zeros(40, 16, HEADS, DIM)
    table = torch.zeros(2, 4096, dtype=torch.int32)
    table[0, :40] = torch.arange(40)
    cache = KVCache.from_pages(
        pool, pool.clone(), table, torch.tensor([300, 16], dtype=torch.int32)
    )
    assert cache.sketch_data is not None and cache.sketch_data.shape[2] <= 3


def test_starts_are_not_shared_with_the_caller() -> None:
    cache = KVCache(1, HEADS, DIM)
    starts = torch.tensor([3], dtype=torch.int32)
    cache.set_starts(starts)
    cache.append(tokens(1, 200), tokens(1, 200))
    version = cache.version
    cache.set_starts(starts)
    assert cache.version == version
    starts[0] = 100
    assert cache.starts is not None and cache.starts.tolist() == [3]
    cache.set_starts(starts)
    assert cache.starts.tolist() == [100] and cache.num_real_tokens == (100,)
    assert cache.version == version + 1


@pytest.mark.parametrize("page_block_size", LAYOUTS)
def test_sketch_blocks_count_from_the_first_real_token(page_block_size: int | None) -> None:
    k, v = tokens(1, 400), tokens(1, 400, seed=1)
    padded = KVCache(1, HEADS, DIM, page_block_size=page_block_size)
    padded.set_starts([30])
    for begin, end in ((0, 20), (20, 200), (200, 201), (201, 400)):
        padded.append(k[:, begin:end], v[:, begin:end])
    alone = KVCache(1, HEADS, DIM)
    alone.append(k[:, 30:], v[:, 30:])
    assert padded.sketch_data is not None and alone.sketch_data is not None
    assert torch.equal(padded.sketch_data[:, :, :2], alone.sketch_data[:, :, :2])
    late = KVCache(1, HEADS, DIM, page_block_size=page_block_size)
    late.append(k, v)
    late.set_starts([30])
    assert late.sketch_data is not None
    assert torch.equal(late.sketch_data[:, :, :2], alone.sketch_data[:, :, :2])


@pytest.mark.parametrize("page_block_size", LAYOUTS)
@pytest.mark.parametrize("inside", [True, False])
def test_starts_of_tokens_from_inference_mode(inside: bool, page_block_size: int | None) -> None:
    k, v = tokens(2, 600), tokens(2, 600, seed=1)
    late = KVCache(2, HEADS, DIM, page_block_size=page_block_size)
    with torch.inference_mode():
        late.append(k, v)
    with torch.inference_mode(inside):
        late.set_starts([5, 7])
    first = KVCache(2, HEADS, DIM, page_block_size=page_block_size)
    first.set_starts([5, 7])
    first.append(k, v)
    assert late.sketch_data is not None and first.sketch_data is not None
    assert torch.equal(late.sketch_data[:, :, :4], first.sketch_data[:, :, :4])
    assert late.num_real_tokens == (595, 593) and late.version == 1


class FailAt(TorchDispatchMode):
    """Out of memory at one op."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.left = number

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self.left == 0:
            raise torch.OutOfMemoryError("no memory")
        self.left -= 1
        return func(*args, **(kwargs or {}))


def everything(cache: KVCache) -> list[Any]:
    """What a cache shows, with copies of its tensors."""
    shown = [cache.k, cache.v, cache.cache_seqlens, cache.num_nonfinite, cache.starts]
    shown += [cache.sketch_data, cache.block_table]
    copies = [None if one is None else one.clone() for one in shown]
    return [*copies, cache.lengths, cache.num_real_tokens, cache.max_seqlen, cache.version]


def same(before: list[Any], after: list[Any]) -> bool:
    return all(
        torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b
        for a, b in zip(before, after, strict=True)
    )


@pytest.mark.parametrize("page_block_size", [None, 16])
@pytest.mark.parametrize(
    "change", [lambda cache: cache.set_starts([5, 7]), lambda cache: cache.reorder([1, 0, 1])]
)
def test_a_change_that_fails_changes_nothing(
    change: Callable[[KVCache], None], page_block_size: int | None
) -> None:
    def filled() -> KVCache:
        cache = KVCache(2, HEADS, DIM, page_block_size=page_block_size)
        cache.set_starts([0, 3])
        cache.append(tokens(2, 300), tokens(2, 300, seed=1), [300, 280])
        return cache

    expected = filled()
    change(expected)
    cache, number = filled(), 0
    before = everything(cache)
    while True:
        try:
            with FailAt(number):
                change(cache)
        except torch.OutOfMemoryError:
            assert same(before, everything(cache)), number
            number += 1
        else:
            break
    assert number > 5 and same(everything(expected), everything(cache))
    new = tokens(cache.batch, 200, seed=2)
    cache.append(new, new)
    expected.append(new, new)
    assert same(everything(expected), everything(cache))
