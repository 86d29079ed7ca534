"""kv_append, bit by bit: what is stored, what is sketched, and that nothing else is touched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_calls import NONE, ONE_IMPLEMENTATION, int32
from torch import Tensor

from kvselect.reference import PlainCache, encode_block, kv_append
from kvselect.sketch import block_bytes
from kvselect.testing import LAYOUTS, make_qkv, non_contiguous

pytestmark = pytest.mark.usefixtures("implementation")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
UNTOUCHED = 7.0  # what storage holds before anything is written


class Storage:
    """Room for `capacity` tokens per row in one of the layouts, all of it UNTOUCHED."""

    def __init__(
        self,
        batch: int,
        capacity: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        layout: str = "head_major",
        sketch: str | None = None,
    ) -> None:
        self.block_table: Tensor | None = None
        if layout == "head_major":
            shape = (batch, num_kv_heads, capacity, head_dim)
            self.k, self.v = (
                torch.full(shape, UNTOUCHED, dtype=dtype).transpose(1, 2) for _ in "kv"
            )
        elif layout == "token_major":
            shape = (batch, capacity, num_kv_heads, head_dim)
            self.k, self.v = (torch.full(shape, UNTOUCHED, dtype=dtype) for _ in "kv")
        else:
            page = int(layout.removeprefix("paged_"))
            per_row = -(-capacity // page)
            shape = (batch * per_row + 2, 2, page, num_kv_heads, head_dim)
            pool = torch.full(shape, UNTOUCHED, dtype=dtype)
            self.k, self.v = pool[:, 0], pool[:, 1]
            order = torch.randperm(shape[0], generator=torch.Generator().manual_seed(page))
            self.block_table = order[: batch * per_row].view(batch, per_row).int()
        self.cache_seqlens = torch.zeros(batch, dtype=torch.int32)
        self.num_nonfinite = torch.zeros(batch, num_kv_heads, dtype=torch.int64)
        self.sketch_format = sketch
        self.sketch: Tensor | None = None
        if sketch is not None:
            record = block_bytes(sketch, head_dim)
            shape = (batch, num_kv_heads, capacity // 128, record)
            self.sketch = torch.full(shape, 0xA5, dtype=torch.uint8)

    def append(self, k: Tensor, v: Tensor, num_valid: Tensor | None = None, **change: Any) -> None:
        arguments: dict[str, Any] = {
            "k": k,
            "v": v,
            "num_valid": num_valid,
            "k_cache": self.k,
            "v_cache": self.v,
            "block_table": self.block_table,
            "cache_seqlens": self.cache_seqlens,
            "sketch": self.sketch,
            "sketch_format": self.sketch_format or NONE,
            "num_nonfinite": self.num_nonfinite,
        }
        torch.ops.kvselect.kv_append(**(arguments | change))

    def tokens(self, x: Tensor, row: int, first: int, last: int) -> Tensor:
        if self.block_table is None:
            return x[row, first:last]
        page = x.shape[1]
        place = torch.arange(first, last)
        return x[self.block_table[row].long()[place // page], place % page]


def empty_plain(k: Tensor, sketch: str | None) -> PlainCache:
    return PlainCache(
        k=k[:, :0],
        v=k[:, :0],
        cache_seqlens=torch.zeros(len(k), dtype=torch.int32),
        sketch_format=sketch,
    )


def same_bits(a: Tensor, b: Tensor) -> bool:
    integers = {4: torch.int32, 2: torch.int16, 1: torch.uint8}[a.element_size()]
    return torch.equal(a.contiguous().view(integers), b.contiguous().view(integers))


def assert_stored(storage: Storage, plain: PlainCache, capacity: int) -> None:
    """Every stored token and every complete block's record equal; everything else untouched."""
    assert torch.equal(storage.cache_seqlens, plain.cache_seqlens)
    for row, seqlen in enumerate(plain.cache_seqlens.tolist()):
        for stored, expected in ((storage.k, plain.k), (storage.v, plain.v)):
            assert same_bits(storage.tokens(stored, row, 0, seqlen), expected[row, :seqlen])
            assert (storage.tokens(stored, row, seqlen, capacity) == UNTOUCHED).all()
        if storage.sketch is None or plain.sketch_data is None:
            continue
        complete = seqlen // 128
        assert torch.equal(storage.sketch[row, :, :complete], plain.sketch_data[row, :, :complete])
        assert (storage.sketch[row, :, complete:] == 0xA5).all()


@pytest.mark.parametrize("sketch", [None, "int4", "int8"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 160, 192, 256, 512])
def test_every_format_head_dim_and_dtype(
    head_dim: int, dtype: torch.dtype, sketch: str | None
) -> None:
    _, k, v = make_qkv(2, 1, 260, 2, 2, head_dim, dtype=dtype)
    storage = Storage(2, 384, 2, head_dim, dtype=dtype, sketch=sketch)
    counts = int32(260, 131)
    storage.append(k, v, counts)
    assert_stored(storage, kv_append(empty_plain(k, sketch), k, v, counts), 384)
    assert (storage.num_nonfinite == 0).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sketch", [None, "int4"])
def test_ragged_steps_in_every_layout(layout: str, sketch: str | None) -> None:
    """Prompt, then blocks completed by one token, by many at once, and not at all."""
    storage = Storage(3, 420, 2, 64, layout=layout, sketch=sketch)
    plain: Any = None
    steps = [
        (130, (130, 127, 0)),
        (1, (1, 1, 0)),
        (0, (0, 0, 0)),
        (270, (13, 129, 270)),
        (1, (1, 0, 1)),
    ]
    for step, (num_new, valid) in enumerate(steps):
        _, k, v = make_qkv(3, 1, num_new, 2, 2, 64, seed=step)
        plain = kv_append(plain or empty_plain(k, sketch), k, v, int32(*valid))
        storage.append(k, v, int32(*valid))
        assert_stored(storage, plain, 420)


def test_one_by_one_equals_all_at_once() -> None:
    _, k, v = make_qkv(1, 1, 140, 1, 1, 32)
    at_once, one_by_one = (Storage(1, 256, 1, 32, sketch="int4") for _ in range(2))
    at_once.append(k, v)
    for t in range(140):
        one_by_one.append(k[:, t : t + 1], v[:, t : t + 1])
    assert torch.equal(at_once.k, one_by_one.k) and torch.equal(at_once.v, one_by_one.v)
    assert at_once.sketch is not None and one_by_one.sketch is not None
    assert torch.equal(at_once.sketch, one_by_one.sketch)


def test_strides_of_the_new_tokens() -> None:
    _, k, v = make_qkv(2, 1, 130, 3, 3, 64, dtype=torch.bfloat16)
    packed, strided = (Storage(2, 256, 3, 64, dtype=k.dtype, sketch="int4") for _ in range(2))
    packed.append(k, v)
    strided.append(
        non_contiguous(k.transpose(1, 2)).transpose(1, 2),
        torch.stack([v, v], dim=1)[:, 0].transpose(1, 2).contiguous().transpose(1, 2),
    )
    assert torch.equal(packed.k, strided.k) and torch.equal(packed.v, strided.v)
    assert packed.sketch is not None and strided.sketch is not None
    assert torch.equal(packed.sketch, strided.sketch)


def test_tokens_behind_num_valid_are_not_read() -> None:
    _, k, v = make_qkv(2, 1, 5, 1, 1, 64)
    k[0, 2:] = v[0, 2:] = torch.nan
    storage = Storage(2, 128, 1, 64)
    storage.append(k, v, int32(2, 5))
    assert storage.num_nonfinite.tolist() == [[0], [0]]
    assert (storage.k[0, 2:] == UNTOUCHED).all()


def test_a_block_is_sketched_again_after_a_crop() -> None:
    """Dropping tokens lowers cache_seqlens; the block they leave open is encoded anew."""
    _, k, v = make_qkv(1, 1, 300, 1, 1, 64)
    storage = Storage(1, 384, 1, 64, sketch="int4")
    storage.append(k, v)
    storage.cache_seqlens.fill_(100)
    _, new_k, new_v = make_qkv(1, 1, 60, 1, 1, 64, seed=1)
    storage.append(new_k, new_v)
    assert storage.sketch is not None
    keys = torch.cat([k[0, :100, 0], new_k[0, :28, 0]])
    assert torch.equal(storage.sketch[0, 0, 0], encode_block(keys, "int4"))


# ---- the codec's corners


def sketched(keys: Tensor, sketch: str) -> tuple[Tensor, Tensor]:
    """The op's record of one block of keys [128, head_dim], and the reference's."""
    storage = Storage(1, 128, 1, keys.shape[1], dtype=keys.dtype, sketch=sketch)
    storage.append(keys[None, :, None], torch.zeros_like(keys)[None, :, None])
    assert storage.sketch is not None
    return storage.sketch[0, 0, 0], encode_block(keys, sketch)


def corner(name: str, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    keys = torch.randn(128, 64, generator=generator)
    match name:
        case "constant":
            keys[:] = 0.3
        case "constant_channels":
            keys[:, ::3] = -1.7
        case "zero":
            keys[:] = 0.0
        case "outliers":
            keys[:, 5] = 40.0 + 0.01 * keys[:, 5]
            keys[17, 9] = 900.0
        case "tiny_range":  # the step is a float16 subnormal, or rounds to 0
            keys = 1.0 + 1e-6 * keys
        case "subnormal":
            keys = 1e-7 * keys
        case "near_the_end_of_float16":
            keys[:, 3] = 30_000.0 * keys[:, 3].sign()
        case "halves":  # exactly between two codes: rounds to even
            keys[:, 0] = torch.arange(128) % 31 * 0.5
        case "one_sided":
            keys = keys.abs() + 100.0
    return keys.to(dtype)


CORNERS = [
    "constant",
    "constant_channels",
    "zero",
    "outliers",
    "tiny_range",
    "subnormal",
    "near_the_end_of_float16",
    "halves",
    "one_sided",
]


@pytest.mark.parametrize("name", CORNERS)
@pytest.mark.parametrize("sketch", ["int4", "int8"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_corners_of_the_codec(name: str, sketch: str, dtype: torch.dtype) -> None:
    record, expected = sketched(corner(name, dtype), sketch)
    assert torch.equal(record, expected)
    assert not record[:2].view(torch.float16).isnan()


@pytest.mark.parametrize("sketch", ["int4", "int8"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), -7e4, 2e7])
@pytest.mark.parametrize("place", [(0, 0), (127, 63), (50, 31)])
def test_blocks_that_cannot_be_sketched(sketch: str, bad: float, place: tuple[int, int]) -> None:
    keys = corner("ordinary", torch.float32)
    keys[place] = bad
    record, expected = sketched(keys, sketch)
    assert torch.equal(record, expected)
    assert record[:2].view(torch.float16).isnan()
    assert (record[2:] == 0).all()


def test_counts_tokens_that_are_not_finite() -> None:
    _, k, v = make_qkv(2, 1, 6, 2, 2, 80)
    k[0, 1, 0, 79] = torch.nan
    v[0, 1, 0, 0] = torch.inf  # the same token
    v[0, 5, 0, 7] = -torch.inf
    k[1, 2:5, 1, 40] = torch.nan
    storage = Storage(2, 128, 2, 80)
    storage.append(k, v)
    assert storage.num_nonfinite.tolist() == [[2, 0], [0, 3]]
    storage.append(k, v, int32(1, 3))
    assert storage.num_nonfinite.tolist() == [[2, 0], [0, 4]]
    assert torch.equal(storage.num_nonfinite, kv_append_counts(k, v))


def kv_append_counts(k: Tensor, v: Tensor) -> Tensor:
    plain = kv_append(empty_plain(k, None), k, v)
    plain = kv_append(plain, k, v, int32(1, 3))
    assert plain.num_nonfinite is not None
    return plain.num_nonfinite


# ---- one test per message


K = torch.zeros(2, 5, 2, 64)
ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"k": K[0]}, r"k: got shape \[5, 2, 64\], allowed: \[batch, num_new, num_kv_heads, head_dim"),
    ({"k": K.half()}, "k: got float16, allowed: float32"),
    ({"v": K.bfloat16()}, "v: got bfloat16, allowed: float32"),
    ({"v": K[:, :4]}, r"v: got shape \[2, 4, 2, 64\], allowed: \[batch=2, num_new=5"),
    ({"k": K[..., :32]}, r"k: got shape \[2, 5, 2, 32\]"),
    ({"k": torch.zeros(2, 5, 64, 2).mT}, "k: got strides .*1 in the last dimension"),
    ({"num_valid": int32(5)}, r"num_valid: got shape \[1\], allowed: \[batch=2\]"),
    ({"num_valid": int32(5, 6)}, r"num_valid: got 6 in row 1, allowed: 0\.\.5"),
    ({"num_valid": int32(-1, 5)}, r"num_valid: got -1 in row 0, allowed: 0\.\.5"),
    ({"cache_seqlens": int32(0, 124)}, "capacity: got 124 . 5 tokens in row 1, allowed: at m"),
    ({"cache_seqlens": int32(0, -1)}, "cache_seqlens: got -1 in row 1, allowed: an int >= 0"),
    ({"cache_seqlens": torch.zeros(2)}, "cache_seqlens: got float32, allowed: int32"),
    ({"v_cache": torch.zeros(2, 128, 2, 64).half()}, "v_cache: got float16, allowed: float32"),
    ({"v_cache": torch.zeros(2, 127, 2, 64)}, r"v_cache: got shape \[2, 127, 2, 64\]"),
    ({"k_cache": torch.zeros(1, 128, 2, 64)}, r"k_cache: got 1 rows, allowed: batch = 2 without"),
    (
        {"v_cache": torch.zeros(1, 128, 2, 64).expand(2, -1, -1, -1)},
        "v_cache: got strides .*no stride of 0",
    ),
    ({"sketch_format": "int3"}, "sketch_format: got 'int3', allowed: int4, int8, none"),
    ({"sketch_format": "none"}, "sketch_format: got 'none' with a sketch"),
    ({"sketch": torch.zeros(2, 2, 1, 4352)}, "sketch: got float32, allowed: uint8"),
    ({"sketch": torch.zeros(2, 2, 1, 99).byte()}, r"sketch: got shape .*block_bytes=4352"),
    (
        {"sketch": torch.zeros(2, 2, 0, 4352).byte(), "cache_seqlens": int32(123, 0)},
        "sketch: got 0 blocks, allowed: at least 1 for 128 tokens",
    ),
    (
        {"sketch": torch.zeros(2, 1, 1, 4352).byte().expand(2, 2, 1, 4352)},
        "sketch: got strides .*no stride of 0",
    ),
    ({"num_nonfinite": torch.zeros(2, 2)}, "num_nonfinite: got float32, allowed: int64"),
    ({"num_nonfinite": torch.zeros(2, 3).long()}, r"num_nonfinite: got shape \[2, 3\]"),
    ({"block_table": int32(0, 2).view(2, 1)}, r"block_table: got page 2 at \[1, 0\], allowed: 0"),
    ({"block_table": int32(0, 1)}, r"block_table: got shape \[2\]"),
]


@ONE_IMPLEMENTATION
@pytest.mark.parametrize("change, message", ERRORS, ids=[e[1][:44] for e in ERRORS])
def test_error_messages_and_nothing_written(change: dict[str, Any], message: str) -> None:
    storage = Storage(2, 128, 2, 64, sketch="int4")
    arguments = {"k": K, "v": K} | change
    with pytest.raises(ValueError, match=message):
        storage.append(arguments.pop("k"), arguments.pop("v"), **arguments)
    assert (storage.k == UNTOUCHED).all() and (storage.v == UNTOUCHED).all()
    assert storage.sketch is not None and (storage.sketch == 0xA5).all()
    assert (storage.cache_seqlens == 0).all() and (storage.num_nonfinite == 0).all()


@pytest.mark.parametrize("sketch, levels", [("int4", 15), ("int8", 255)])
@pytest.mark.parametrize("exponent", [-24, -14, -3, 0, 5])
def test_halves_between_levels_round_as_the_division_does(
    sketch: str, levels: int, exponent: int
) -> None:
    """Kernels multiply by an inverse: it must not move a key across, onto or off a half."""
    head_dim = 256
    significand = 1.0 + torch.arange(head_dim) * 4 / 1024 if exponent >= -14 else torch.ones(256)
    step = significand * 2.0**exponent  # a float16 per channel
    halves = torch.linspace(0, levels - 1, 120).floor()[:, None] + 0.5
    k = halves * step
    k[1::3] = torch.nextafter(k[1::3], torch.tensor(torch.inf))
    k[2::3] = torch.nextafter(k[2::3], torch.tensor(-torch.inf))
    ends = torch.stack([torch.zeros(head_dim), levels * step]).repeat(4, 1)
    k = torch.cat([ends, k]).view(1, 128, 1, head_dim)
    storage = Storage(1, 128, 1, head_dim, sketch=sketch)
    storage.append(k, k)
    assert storage.sketch is not None
    stored_step = storage.sketch[0, 0, 0, : 2 * head_dim].view(torch.float16)
    assert torch.equal(stored_step.float(), step)
    assert torch.equal(storage.sketch[0, 0, 0], encode_block(k[0, :, 0], sketch))


def test_an_append_past_the_caches_stores_what_short_ones_store() -> None:
    """More than 32 MiB: lines are written past the caches, and an item is a run of blocks."""
    k = torch.randn(1, 8300, 8, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    v = -k
    k[0, 7777, 3, 5] = torch.nan
    at_once, in_parts = (
        Storage(1, 8320, 8, 128, dtype=torch.bfloat16, sketch="int4") for _ in range(2)
    )
    at_once.append(k[:, :37], v[:, :37])
    at_once.append(k[:, 37:], v[:, 37:])
    for part in torch.arange(8300).split(1000):
        in_parts.append(k[:, part], v[:, part])
    assert same_bits(at_once.k, in_parts.k) and same_bits(at_once.v, in_parts.v)
    assert same_bits(at_once.k[:, :8300], k) and same_bits(at_once.v[:, :8300], v)
    assert at_once.sketch is not None and in_parts.sketch is not None
    assert torch.equal(at_once.sketch[:, :, :64], in_parts.sketch[:, :, :64])
    assert at_once.num_nonfinite.tolist() == [[0, 0, 0, 1, 0, 0, 0, 0]]
    assert torch.equal(at_once.num_nonfinite, in_parts.num_nonfinite)
