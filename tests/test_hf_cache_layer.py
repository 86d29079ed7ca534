"""KVSelectLayer behaves as transformers' DynamicLayer does, and says when its tokens changed."""

from __future__ import annotations

from typing import Any

import hf_models
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from kvselect.bench.watch import WriteWatch
from kvselect.integrations.hf.attached_layer import LatentLayer
from kvselect.integrations.hf.cache_layer import KVSelectLayer
from kvselect.integrations.hf.static_layer import KVSelectStaticLayer
from kvselect.integrations.hf.upgrade_cache import upgrade_cache
from kvselect.policies.phase_statistics import PhaseStatistics
from kvselect.policies.token_select import TokenSelect
from kvselect.storage import grown

HEADS, HEAD_DIM = 2, 32


def new_tokens(batch: int, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Keys and values as transformers hands them over: transposed views."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, batch, count, HEADS, HEAD_DIM)
    keys, values = torch.randn(shape, generator=generator).transpose(2, 3)
    return keys, values


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 70)),
        st.tuples(st.just("crop"), st.integers(0, 90)),
        st.tuples(st.just("reorder"), st.integers(0, 99)),
        st.tuples(st.just("repeat"), st.integers(1, 3)),
        st.tuples(st.just("select"), st.integers(0, 99)),
        st.tuples(st.just("mask"), st.integers(0, 99)),
        st.tuples(st.just("reset"), st.just(0)),
    ),
    max_size=12,
)


@settings(deadline=None, max_examples=150)
@given(operations=OPERATIONS, sketch=st.sampled_from(["int4", "int8", None]))
def test_any_sequence_of_operations_equals_dynamic_layer(
    operations: list[tuple[str, int]], sketch: str | None
) -> None:
    ours, theirs = KVSelectLayer(sketch), DynamicLayer()
    batch = 2
    for step, (name, number) in enumerate(operations):
        version, held = ours.version, ours.get_seq_length()
        draw = torch.Generator().manual_seed(number)
        if name == "append":
            keys, values = new_tokens(batch, number, seed=step)
            got, expected = ours.update(keys, values), theirs.update(keys, values)
            assert got[0] is ours.keys
            assert got[1] is ours.values
            assert torch.equal(got[0], expected[0])
            assert torch.equal(got[1], expected[1])
        elif name == "crop":
            ours.crop(-number)
            if theirs.is_initialized:  # older versions fail on an empty layer
                theirs.crop(-number)
        elif name == "reorder":
            rows = torch.randint(0, batch, (batch,), generator=draw)
            ours.reorder_cache(rows)
            theirs.reorder_cache(rows)
        elif name == "repeat" and batch * number <= 6:
            ours.batch_repeat_interleave(number)
            theirs.batch_repeat_interleave(number)
            batch = batch * number if held else batch
        elif name in ("select", "mask"):
            count = 1 + number % batch
            rows = torch.randperm(batch, generator=draw)[:count]
            if name == "mask":
                chosen = torch.zeros(batch, dtype=torch.bool)
                chosen[rows] = True
                rows = chosen
            ours.batch_select_indices(rows)
            theirs.batch_select_indices(rows)
            batch = count if held else batch
        elif name == "reset":
            ours.reset()
            theirs = DynamicLayer()  # older versions only zero what they hold
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.get_mask_sizes(3) == theirs.get_mask_sizes(3)
        assert ours.get_max_length() == theirs.get_max_length()
        assert ours.is_initialized == theirs.is_initialized or held == 0
        if ours.get_seq_length():
            assert torch.equal(ours.keys, theirs.keys)
            assert torch.equal(ours.values, theirs.values)
        if name == "append":
            assert ours.version == version
        elif held and (name != "crop" or number) and name != "repeat":
            assert ours.version > version


def test_it_has_the_attributes_that_transformers_reads() -> None:
    layer = KVSelectLayer()
    assert isinstance(layer, DynamicLayer)
    assert not layer.is_sliding
    assert layer.is_croppable
    assert not layer.is_compileable
    assert layer.get_seq_length() == 0
    assert layer.get_mask_sizes(4) == (4, 0)
    assert layer.keys is None


def test_update_copies_only_the_new_tokens() -> None:
    layer = KVSelectLayer(None)
    layer.update(*new_tokens(2, 100))
    before = layer.keys.data_ptr()
    layer.update(*new_tokens(2, 5, seed=1))
    assert layer.keys.data_ptr() == before
    assert layer.keys.shape == (2, HEADS, 105, HEAD_DIM)


def test_a_positive_crop_raises() -> None:
    layer = KVSelectLayer()
    layer.update(*new_tokens(1, 4))
    with pytest.raises(ValueError, match="tokens_to_remove: got 2, allowed: 0 or a negative int"):
        layer.crop(2)
    assert layer.get_seq_length() == 4


def test_crop_takes_a_number_in_a_tensor() -> None:
    layer = KVSelectLayer()
    layer.update(*new_tokens(1, 4))
    layer.crop(torch.tensor(-3))  # type: ignore[arg-type]
    assert layer.get_seq_length() == 1


def test_crop_of_more_than_there_is_leaves_nothing() -> None:
    layer = KVSelectLayer()
    layer.update(*new_tokens(1, 4))
    layer.crop(-9)
    assert layer.get_seq_length() == 0
    layer.update(*new_tokens(1, 3))
    assert layer.get_seq_length() == 3


@pytest.mark.parametrize("method", ["offload", "prefetch"])
def test_offloading_raises(method: str) -> None:
    with pytest.raises(ValueError, match="offloading: got True, allowed: False"):
        getattr(KVSelectLayer(), method)()


def test_an_offloading_cache_raises() -> None:
    cache = DynamicCache(config=hf_models.config("llama"))
    cache.offloading = True
    with pytest.raises(ValueError, match=r"past_key_values.offloading: got True, allowed: False"):
        upgrade_cache(cache, [None] * 3)


def test_values_of_another_length_raise() -> None:
    keys, values = new_tokens(1, 4)
    with pytest.raises(ValueError, match=r"value_states: got .*, allowed: the shape of the keys"):
        KVSelectLayer().update(keys, values[:, :, :3])


@pytest.mark.parametrize(
    ("key_dim", "value_dim", "stored"), [(16, 16, 32), (24, 16, 32), (40, 64, 64)]
)
def test_heads_are_filled_up_to_what_kernels_take(
    key_dim: int, value_dim: int, stored: int
) -> None:
    layer = KVSelectLayer(None)
    k, v = torch.randn(2, 3, 4, key_dim), torch.randn(2, 3, 4, value_dim)
    keys, values = layer.update(k, v)
    assert torch.equal(keys, k) and torch.equal(values, v)
    assert layer.keys is keys and layer.values is values
    cache = layer.cache
    assert cache is not None and cache.head_dim == stored
    assert (cache.k[..., key_dim:] == 0).all() and (cache.v[..., value_dim:] == 0).all()
    layer.update(k[:, :, :1], v[:, :, :1])
    assert layer.keys.shape == (2, 3, 5, key_dim) and layer.values.shape == (2, 3, 5, value_dim)


def test_heads_beyond_what_kernels_take_raise() -> None:
    with pytest.raises(ValueError, match="head_dim: got 528, allowed: at most 512"):
        KVSelectLayer(None).update(torch.zeros(1, 1, 1, 528), torch.zeros(1, 1, 1, 64))


def test_several_layers_may_read_the_keys_of_one() -> None:
    policy, statistics = TokenSelect(), (PhaseStatistics(), PhaseStatistics())
    layer = KVSelectLayer("int4")
    layer.update(*new_tokens(2, 4))
    first = layer.state(1, policy, statistics)
    second = layer.state(3, policy, statistics)
    assert first is not second
    assert layer.state(1, policy, statistics) is first


def test_latents_follow_their_rows() -> None:
    layer = LatentLayer()
    layer.announce("unrotated", None, None)
    layer.update(torch.randn(2, 1, 6, 32), torch.randn(2, 1, 6, 8))
    keys = layer.keys
    layer.validity = torch.tensor([[False] * 2 + [True] * 4, [True] * 3 + [False] * 3])
    with pytest.raises(ValueError, match="cache layer: got '6 unrotated keys', allowed: rotated"):
        layer.update(torch.randn(2, 1, 1, 32), torch.randn(2, 1, 1, 8))
    layer.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(layer.keys, keys.flip(0)) and not layer.validity[1, 0]
    layer.batch_repeat_interleave(2)
    assert layer.validity.shape == (4, 6)
    layer.batch_select_indices(torch.tensor([2]))
    layer.crop(-1)
    assert layer.validity.tolist() == [[False] * 2 + [True] * 3]
    assert layer.validity_of(7).tolist() == [[False] * 2 + [True] * 5]
    layer.reset()
    assert layer.rope_state is None and layer.validity is None and layer.get_seq_length() == 0


def test_the_state_of_a_policy_follows_its_rows() -> None:
    policy, statistics = TokenSelect(), (PhaseStatistics(), PhaseStatistics())
    layer = KVSelectLayer("int4")
    layer.update(*new_tokens(2, 4))
    state = layer.state(0, policy, statistics)
    assert state.prefill is statistics[0]
    assert state.decode is statistics[1]
    layer.update(*new_tokens(2, 1))
    assert layer.state(0, policy, statistics) is state
    layer.reorder_cache(torch.tensor([1, 0]))
    assert (
        layer.state(0, policy, statistics) is state
    )  # its lists are void by version, its counts are not
    layer.batch_repeat_interleave(2)
    assert layer.state(0, policy, statistics) is not state  # allocated per row
    state = layer.state(0, policy, statistics)
    assert layer.state(0, TokenSelect(topk=7), statistics) is not state
    layer.reset()
    layer.update(*new_tokens(2, 4))
    assert layer.state(0, policy, statistics) is not state


def test_rotated_and_unrotated_keys_do_not_mix() -> None:
    layer = KVSelectLayer(None)
    layer.announce("unrotated", None, None)
    layer.update(*new_tokens(1, 4))
    message = "cache layer: got '4 unrotated keys', allowed: rotated keys or an empty cache"
    with pytest.raises(ValueError, match=message):
        layer.announce("rotated", None, None)
    with pytest.raises(ValueError, match=message):
        layer.update(*new_tokens(1, 1))  # nobody announced it: a model that is not attached
    assert layer.get_seq_length() == 4
    layer.crop(-4)
    layer.announce("rotated", None, None)
    layer.update(*new_tokens(1, 2))
    assert layer.rope_state == "rotated"


def test_another_sketch_is_built_from_the_stored_keys() -> None:
    layer = KVSelectLayer(None)
    keys, values = new_tokens(2, 300)
    layer.update(keys, values)
    version = layer.version
    layer.announce("rotated", "int4", None)
    assert layer.version > version
    assert layer.cache is not None
    assert layer.cache.sketch_format == "int4"
    assert torch.equal(layer.keys, keys)
    fresh = KVSelectLayer("int4")
    fresh.update(keys, values)
    assert fresh.cache is not None
    assert layer.cache.sketch_data is not None
    assert fresh.cache.sketch_data is not None
    assert torch.equal(layer.cache.sketch_data, fresh.cache.sketch_data)


def test_validity_follows_rows_and_length() -> None:
    layer = KVSelectLayer(None)
    layer.update(*new_tokens(2, 3))
    layer.validity = torch.tensor([[True, True, False], [True, False, True]])
    layer.update(*new_tokens(2, 2))
    layer.reorder_cache(torch.tensor([1, 1]))
    validity = layer.validity_of(5)
    assert validity is not None
    assert validity.tolist() == [[True, False, True, True, True]] * 2
    layer.crop(-4)
    validity = layer.validity_of(1)
    assert validity is not None
    assert validity.tolist() == [[True]] * 2
    layer.reset()
    assert layer.validity is None


def layer_types(cache: Any) -> list[type]:
    return [type(layer) for layer in cache.layers]


def test_only_empty_plain_layers_are_upgraded() -> None:
    cache = DynamicCache(config=hf_models.config("qwen2_mixed"))
    kind = type(cache)
    upgrade_cache(cache, ["int4", None, "int8"])
    assert type(cache) is kind
    assert layer_types(cache) == [KVSelectLayer, DynamicSlidingWindowLayer, KVSelectLayer]
    assert cache.layers[2].sketch == "int8"
    before = list(cache.layers)
    upgrade_cache(cache, ["int4", None, "int8"])
    assert all(a is b for a, b in zip(before, cache.layers))

    filled = DynamicCache()
    filled.update(*new_tokens(1, 4), 0)
    upgrade_cache(filled, [None, None])
    assert layer_types(filled) == [DynamicLayer, KVSelectLayer]


def test_a_cache_without_layers_gets_all_of_them() -> None:
    cache = DynamicCache()
    upgrade_cache(cache, ["int4", None, "int4"], frozenset({1}))
    assert layer_types(cache) == [KVSelectLayer, DynamicLayer, KVSelectLayer]
    assert cache.get_seq_length() == 0
    assert cache.get_mask_sizes(5, 0) == (5, 0)


def test_static_layers_keep_their_room() -> None:
    config = hf_models.config("llama")
    cache = StaticCache(config=config, max_cache_len=32)
    upgrade_cache(cache, ["int4"] * 3, frozenset({0}), frozenset({1}))
    assert layer_types(cache) == [StaticLayer, StaticLayer, KVSelectStaticLayer]
    keys, values = cache.layers[2].update(*new_tokens(2, 4))
    assert keys.shape == values.shape == (2, 2, 32, 32)
    assert cache.layers[2].get_max_length() == 32 and int(cache.layers[2].get_seq_length()) == 4


# ---- memory while it grows


def test_growing_never_holds_keys_and_values_twice() -> None:
    count = 1 << 17  # 32 MiB of keys: large enough to be seen beside everything else
    layer = KVSelectLayer(None)
    layer.update(*new_tokens(1, count))
    k, v = new_tokens(1, layer.cache.capacity - count + 1, seed=1)  # type: ignore[union-attr]
    with WriteWatch() as watch:
        keys, values = layer.update(k, v)
    one = layer.cache.k_pages.nbytes  # type: ignore[union-attr]
    assert one < watch.peak_bytes < 1.5 * one  # both at once: 2
    assert torch.equal(keys[:, :, count:], k) and torch.equal(values[:, :, count:], v)


@pytest.mark.parametrize("failing", [1, 2], ids=["keys", "values"])
def test_a_layer_that_finds_no_memory_to_grow_stays_as_it_was(
    failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, theirs, calls = KVSelectLayer("int4"), DynamicLayer(), 0
    first, more = new_tokens(2, 128), new_tokens(2, 400, seed=1)
    for each in (layer, theirs):
        each.update(*first)

    def without_memory(*arguments: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise RuntimeError("not enough memory")
        return grown(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr("kvselect.storage.grown", without_memory)
        with pytest.raises(RuntimeError, match="not enough memory"):
            layer.update(*more)
    assert layer.get_seq_length() == 128
    assert_equal(layer.keys, theirs.keys)
    assert_equal(layer.values, theirs.values)
    for _ in range(2):
        for mine, other in zip(layer.update(*more), theirs.update(*more)):
            assert torch.equal(mine, other)


def assert_equal(mine: Tensor | None, other: Tensor | None) -> None:
    assert mine is not None and other is not None and torch.equal(mine, other)
