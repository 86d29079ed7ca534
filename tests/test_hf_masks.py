"""The mask of the name "kvselect": ranges of keys instead of queries times keys."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, MistralConfig
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    create_causal_mask,
    create_sliding_window_causal_mask,
    or_masks,
    packed_sequence_mask_function,
    sdpa_mask,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
)

from kvselect.integrations.hf.masks import (
    KeyRange,
    key_range_mask,
    mask_kind,
    read_mask,
    visible_block,
)


def bools(*rows: str) -> Tensor:
    """A padding mask from rows such as "..xx": x is a real token."""
    return torch.tensor([[letter == "x" for letter in row] for row in rows])


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (causal_mask_function, "causal"),
        (sliding_window_causal_mask_function(4), "sliding"),
        (chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.int)), "foreign"),
        (bidirectional_mask_function, "foreign"),
        (sliding_window_bidirectional_mask_function(4), "foreign"),
        (and_masks(causal_mask_function, causal_mask_function), "foreign"),
        (or_masks(sliding_window_causal_mask_function(4), causal_mask_function), "foreign"),
        (and_masks(sliding_window_causal_mask_function(4), causal_mask_function), "foreign"),
        (
            and_masks(packed_sequence_mask_function(torch.zeros(1, 4)), causal_mask_function),
            "foreign",
        ),
        (lambda b, h, q, k: k <= q, "foreign"),
    ],
)
def test_patterns_are_recognised(function: Any, kind: str) -> None:
    assert mask_kind(function) == kind


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("q_length", "q_offset"), [(1, 0), (1, 9), (5, 0), (5, 9)])
def test_without_padding_the_range_is_everything(batch: int, q_length: int, q_offset: int) -> None:
    mask = key_range_mask(batch, q_length, q_offset + q_length, q_offset=q_offset)
    assert mask.dtype == torch.int32
    assert mask.shape == (batch, 1, 1, 2)
    keys = read_mask(mask)
    assert isinstance(keys, KeyRange)
    assert keys.starts.tolist() == [0] * batch
    assert keys.ends.tolist() == [q_offset + q_length] * batch
    assert keys.starts.is_contiguous()
    assert keys.validity is None


@pytest.mark.parametrize(
    ("rows", "q_length", "starts"),
    [
        (("xxxxx", "..xxx", "....x"), 5, [0, 2, 4]),
        (("xxxxx", "..xxx", "....x"), 1, [0, 2, 4]),
        ((".....", "..xxx"), 5, [5, 2]),  # a chunk that lies wholly in a row's padding
        ((".....", "..xxx"), 2, [5, 2]),
        ((".", "x"), 1, [1, 0]),
    ],
)
def test_left_padding_is_a_start(rows: tuple[str, ...], q_length: int, starts: list[int]) -> None:
    padding = bools(*rows)
    width = padding.shape[1]
    keys = read_mask(
        key_range_mask(
            len(rows), q_length, width, q_offset=width - q_length, attention_mask=padding
        )
    )
    assert isinstance(keys, KeyRange)
    assert keys.starts.tolist() == starts
    assert keys.ends.tolist() == [width] * len(rows)
    assert keys.validity is None


@pytest.mark.parametrize(
    "rows", [("xxx..", "xxxxx"), ("..x.x", "xxxxx"), ("x....", ".xxxx"), ("xx.xx", ".....")]
)
def test_holes_make_the_mask_wide(rows: tuple[str, ...]) -> None:
    padding = bools(*rows)
    mask = key_range_mask(2, 5, 5, attention_mask=padding)
    assert mask.shape == (2, 1, 1, 7)
    keys = read_mask(mask)
    assert isinstance(keys, KeyRange)
    assert keys.validity is not None
    assert torch.equal(keys.validity, padding)


def test_a_decode_step_finds_holes_where_looking_costs_no_transfer() -> None:
    keys = read_mask(key_range_mask(1, 1, 5, q_offset=4, attention_mask=bools("xx.xx")))
    assert isinstance(keys, KeyRange)
    assert torch.equal(keys.validity, bools("xx.xx"))


def test_a_mask_shorter_than_the_keys_hides_the_rest() -> None:
    keys = read_mask(key_range_mask(1, 1, 5, q_offset=4, attention_mask=bools("xxx")))
    assert isinstance(keys, KeyRange)
    assert keys.validity is not None
    assert keys.validity.tolist() == [[True, True, True, False, False]]


def test_offsets_may_live_on_the_device() -> None:
    offset = torch.tensor(3)
    unpadded = read_mask(key_range_mask(2, 2, 16, q_offset=offset))
    padded = read_mask(
        key_range_mask(2, 2, 16, q_offset=offset, attention_mask=bools(".xxxx", "xxxxx"))
    )
    assert isinstance(unpadded, KeyRange)
    assert isinstance(padded, KeyRange)
    assert unpadded.ends.tolist() == padded.ends.tolist() == [5, 5]
    assert padded.starts.tolist() == [1, 0]
    assert padded.validity is None


def test_a_foreign_pattern_comes_as_transformers_makes_it() -> None:
    function = chunked_causal_mask_function(2, torch.zeros(1, dtype=torch.int))
    mask = key_range_mask(
        1, 5, 5, mask_function=function, allow_is_causal_skip=True, dtype=torch.float32, config=None
    )
    assert mask.dtype == torch.bool
    assert torch.equal(mask, sdpa_mask(1, 5, 5, mask_function=function, allow_is_causal_skip=False))
    assert read_mask(mask) is mask


def test_a_users_own_mask_stays_as_it_is() -> None:
    mask = torch.zeros(1, 1, 3, 3)
    assert read_mask(mask) is mask


@pytest.mark.parametrize("mask", [None, torch.ones(2, 5), torch.ones(2, 5, dtype=torch.int32)])
def test_anything_else_is_refused(mask: Tensor | None) -> None:
    with pytest.raises(TypeError, match=r"attention_mask: got .*, allowed: "):
        read_mask(mask)


@pytest.mark.parametrize(
    ("rows", "window", "q_length"),
    [
        (rows, window, q_length)
        for rows in (None, ("xxxxxxxx", "...xxxxx"), ("xxxxx.xx", ".xxxxx.."))
        for window in (None, 1, 3, 20)
        for q_length in (1, 3, 8)
        # holes in a decode step of a full layer are the cache layer's to remember
        if rows is None or "." not in rows[0] or q_length > 1 or window
    ],
)
def test_visible_blocks_equal_transformers_masks(
    rows: tuple[str, ...] | None, window: int | None, q_length: int
) -> None:
    padding = None if rows is None else bools(*rows)
    function = (
        causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    )
    sizes: dict[str, Any] = {
        "batch_size": 2,
        "q_length": q_length,
        "kv_length": 8,
        "q_offset": 8 - q_length,
        "mask_function": function,
        "attention_mask": padding,
    }
    keys = read_mask(key_range_mask(**sizes))
    assert isinstance(keys, KeyRange)
    expected = sdpa_mask(**sizes, allow_is_causal_skip=False)
    parts = [
        visible_block(keys, q_length, 8, begin, min(begin + 2, q_length), window)
        for begin in range(0, q_length, 2)
    ]
    assert torch.equal(
        torch.cat(parts, dim=2).expand(2, -1, -1, -1), expected.expand(2, -1, -1, -1)
    )


@pytest.mark.parametrize("stored", [0, 3, 6, 30])
@pytest.mark.parametrize("padded", [False, True])
def test_sliding_layers_see_their_shifted_window(stored: int, padded: bool) -> None:
    """A sliding cache layer shows keys from an offset on; the range is in their coordinates."""
    window, new = 5, 2
    config = MistralConfig(num_hidden_layers=1, sliding_window=window)
    cache = DynamicCache(config=config)
    if stored:
        cache.update(torch.zeros(2, 1, stored, 4), torch.zeros(2, 1, stored, 4), 0)
    padding = torch.ones(2, stored + new, dtype=torch.bool)
    padding[1, : stored // 2] = False
    arguments: dict[str, Any] = {
        "config": config,
        "inputs_embeds": torch.zeros(2, new, 4),
        "attention_mask": padding if padded else None,
        "past_key_values": cache,
    }
    config._attn_implementation = "eager"
    expected = create_sliding_window_causal_mask(**arguments)[:, 0] == 0
    kv_length, kv_offset = cache.get_mask_sizes(new, 0)
    keys = read_mask(
        key_range_mask(
            2,
            new,
            kv_length,
            q_offset=stored,
            kv_offset=kv_offset,
            mask_function=sliding_window_causal_mask_function(window),
            attention_mask=arguments["attention_mask"],
        )
    )
    assert isinstance(keys, KeyRange)
    assert (keys.validity is not None) == padded
    assert torch.equal(
        visible_block(keys, new, kv_length, 0, new, window)[:, 0], expected.expand(2, -1, -1)
    )


def test_causal_masks_reach_us_through_transformers() -> None:
    """transformers calls the registered function, with the pattern objects that we compare to."""
    from transformers import AttentionMaskInterface

    AttentionMaskInterface.register("kvselect", key_range_mask)
    config = MistralConfig(num_hidden_layers=1, sliding_window=None)
    config._attn_implementation_internal = "kvselect"
    mask = create_causal_mask(
        config=config,
        inputs_embeds=torch.zeros(2, 3, 4),
        attention_mask=bools(".xx", "xxx"),
        past_key_values=None,
    )
    keys = read_mask(mask)
    assert isinstance(keys, KeyRange)
    assert keys.starts.tolist() == [1, 0]
