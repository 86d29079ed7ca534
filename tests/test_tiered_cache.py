"""TieredKVCache: a KVCache whose tokens lie elsewhere; the same bits, and nothing that stays."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvselect import (
    Dense,
    KVCache,
    Rope,
    Selection,
    StreamingLLM,
    TieredKVCache,
    TokenSelect,
    decode_step,
    prefill,
    recovered_mass,
    score_tokens,
    sparse_attention,
)
from kvselect.testing import make_qkv, rope_tables
from kvselect.tiered_rows import Residency, TieredRows

SIZES = {"num_sink_tokens": 5, "num_recent_tokens": 130}
HEADS, GROUP, HEAD_DIM = 2, 2, 32


def selecting(**changes: Any) -> TokenSelect:
    settings: dict[str, Any] = {
        "topk": 40,
        "overselect": 1.25,
        "dense_below_tokens": 0,
        "q_block_size": 16,
        "max_age": 8,
        **SIZES,
    }
    return TokenSelect(**(settings | changes))


def tiered(batch: int = 2, resident_tokens: int = 230, **changes: Any) -> TieredKVCache:
    options: dict[str, Any] = {"resident_tokens": resident_tokens, **SIZES, **changes}
    cache = TieredKVCache(batch, HEADS, options.pop("head_dim", HEAD_DIM), **options)
    # Nobody may read a slot that no token was brought to.
    for store in cache._tiers.slots:
        store.fill_(torch.nan)
    return cache


def tokens(batch: int, count: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return make_qkv(batch, count, count, HEADS * GROUP, HEADS, HEAD_DIM, dtype=dtype, seed=seed)


class Twins:
    """A plain cache and a tiered one that live through the same."""

    def __init__(
        self, policy: Any, batch: int = 2, dtype: torch.dtype = torch.float32, **options: Any
    ) -> None:
        self.policy, self.dtype, self.options, self.seed = policy, dtype, {}, 0
        sketch = getattr(policy, "sketch", None)
        self.plain = KVCache(batch, HEADS, HEAD_DIM, dtype=dtype, sketch=sketch)
        self.tiered = tiered(batch, dtype=dtype, sketch=sketch, **options)
        self.caches = self.plain, self.tiered
        self.states = [policy.new_state(cache) for cache in self.caches]

    def call(self, count: int, seqlens: list[int] | None = None, **options: Any) -> Tensor:
        """Append and attend; both caches must give the same bits."""
        self.seed += 1
        q, k, v = tokens(self.plain.batch, count, self.seed, self.dtype)
        outs = []
        for cache, state in zip(self.caches, self.states):
            cache.append(k, v, seqlens)
            if count == 1:
                out, info = decode_step(q, cache, self.policy, state, **options)
                outs.append((out, info.lse))
            else:
                outs.append(prefill(q, cache, self.policy, state, **options))
        for plain, tier in zip(*outs):
            assert torch.equal(plain, tier) and not plain.isnan().any()
        assert not self.tiered.has_whole_rows
        return outs[0][0]

    def steps(self, count: int, **options: Any) -> None:
        for _ in range(count):
            self.call(1, **options)

    def change(self, name: str, *arguments: Any) -> None:
        for cache in self.caches:
            getattr(cache, name)(*arguments)


POLICIES = {
    "kv_head": selecting(),
    "layer": selecting(scope="layer"),
    "int8": selecting(sketch="int8"),
    "reusing": selecting(similarity_threshold=1e-6, similarity_on="rotated"),
    "mass floor": selecting(mass_target=0.9, topk_max=60),
    "dense rows": selecting(dense_below_tokens=225),
    "streaming": StreamingLLM(**SIZES, positions="original"),
    "dense": Dense(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", POLICIES)
def test_results_have_the_bits_of_a_cache_on_the_device(name: str, dtype: torch.dtype) -> None:
    twins = Twins(POLICIES[name], dtype=dtype)
    twins.change("set_starts", [0, 37])
    twins.call(190)
    twins.steps(60)  # from shorter than resident_tokens to longer
    twins.call(300)
    twins.steps(140)  # a sketch block becomes whole, and another
    twins.change("crop", 90)
    twins.steps(10)
    twins.change("reorder", [1, 0, 1])
    twins.steps(10)
    twins.call(5)  # each query selects by itself
    twins.steps(3)
    twins.change("set_starts", [7, 0, 0])
    twins.steps(3)
    assert torch.equal(twins.tiered.k, twins.plain.k) and torch.equal(twins.tiered.v, twins.plain.v)
    if twins.plain.sketch_data is not None:
        whole = min(twins.plain.num_real_tokens) // 128
        assert whole > 2
        ours, theirs = (cache.sketch_data for cache in twins.caches)
        assert ours is not None and theirs is not None
        assert torch.equal(ours[:, :, :whole], theirs[:, :, :whole])
    counts = twins.tiered.residency
    assert (counts.num_loads > 100) == (name == "dense")
    if name not in {"dense", "streaming"}:
        assert counts.num_found > 0 and counts.num_fetched > 0


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("extra", ["softcap", "sinks", "neither"])
@pytest.mark.parametrize("replacement", ["lru", "lru_s"])
def test_rotation_softcap_and_sink_logits(positions: str, extra: str, replacement: str) -> None:
    twins = Twins(selecting(positions=positions), replacement=replacement)
    options: dict[str, Any] = {"rope": Rope(*rope_tables(600, HEAD_DIM // 2))}
    if positions == "original":
        options = {}
    if extra == "softcap":
        options["softcap"] = 3.0
    if extra == "sinks":
        options["sink_logits"] = torch.tensor([0.5, 3.0, -1.0, 2.0])
    twins.call(180, **options)
    twins.steps(4, **options)
    twins.call(200, **options)
    twins.steps(8, **options)


def test_rows_that_grow_apart() -> None:
    twins = Twins(selecting())
    twins.call(400, [400, 250])
    for seqlens in ([1, 0], [0, 1], [1, 1], [0, 0], [1, 0]):
        q, k, v = tokens(2, 1, 50 + sum(seqlens), torch.float32)
        outs = []
        for cache, state in zip(twins.caches, twins.states):
            cache.append(k, v, seqlens)
            outs.append(decode_step(q, cache, twins.policy, state)[0])
        assert torch.equal(*outs)
    assert twins.tiered.lengths == (403, 252)


def test_empty_rows_attend_to_nothing() -> None:
    twins = Twins(selecting())
    twins.call(300, [300, 0])
    q = torch.ones(2, 1, HEADS * GROUP, HEAD_DIM)
    for cache, state in zip(twins.caches, twins.states):
        out, info = decode_step(q, cache, twins.policy, state)
        assert (out[1] == 0).all() and (info.lse[1] == -torch.inf).all()


def test_functions_of_one_layer_agree() -> None:
    twins = Twins(selecting())
    twins.call(400)
    twins.steps(3)
    q = tokens(2, 1, 99, torch.float32)[0]
    plain, tier = twins.caches
    for source in ("sketch", "keys"):
        scored = [score_tokens(q, cache, source=source, **SIZES) for cache in twins.caches]
        assert torch.equal(*scored)
    lists = torch.tensor([3, 50, 51, 200, 402], dtype=torch.int32).expand(2, HEADS, -1)
    selection = Selection(lists, torch.full((2, HEADS), 5, dtype=torch.int32))
    for function in (sparse_attention, recovered_mass):
        results = [function(q, cache, selection) for cache in twins.caches]
        for ours, theirs in zip(*results) if isinstance(results[0], tuple) else [results]:
            assert torch.equal(ours, theirs)
    for several in (1, 3):  # dense, of rows longer than what is resident
        q = tokens(2, several, 98, torch.float32)[0]
        assert torch.equal(sparse_attention(q, plain)[0], sparse_attention(q, tier)[0])
    assert not tier.has_whole_rows


def test_audits_read_every_key_and_change_nothing() -> None:
    twins = Twins(selecting())
    twins.call(400)
    twins.steps(5, audit=True)
    ours, theirs = (state.decode.exact_audit for state in twins.states)
    assert ours == theirs and ours is not None


CHANGES = st.one_of(
    st.tuples(st.just("steps"), st.integers(1, 12)),
    st.tuples(st.just("call"), st.sampled_from([2, 7, 40, 150])),
    st.tuples(st.just("ragged"), st.integers(0, 30)),
    st.tuples(st.just("crop"), st.integers(0, 140)),
    st.tuples(st.just("reorder"), st.lists(st.integers(0, 1), min_size=2, max_size=2)),
    st.tuples(st.just("set_starts"), st.lists(st.integers(0, 70), min_size=2, max_size=2)),
    st.tuples(st.just("audit"), st.just(0)),
)


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(["kv_head", "layer", "reusing", "dense rows"]),
    changes=st.lists(CHANGES, min_size=3, max_size=10),
)
def test_any_life_gives_the_same_bits(name: str, changes: list[tuple[str, Any]]) -> None:
    """Lists that leave tokens out, and no room but for one of them."""
    policy = POLICIES[name]
    needed = max(policy.capacity, policy.dense_below_tokens)
    twins = Twins(policy, resident_tokens=needed)
    twins.call(260)
    for what, value in changes:
        if what == "steps":
            twins.steps(value)
        elif what == "call":
            twins.call(value)
        elif what == "ragged":
            twins.change("append", *tokens(2, 30, value, torch.float32)[1:], [30, value])
        elif what == "crop":
            twins.change("crop", min(value, *twins.plain.lengths))
        elif what == "audit":
            twins.call(1, audit=twins.plain.max_seqlen > 300)
        else:
            twins.change(what, value)
        twins.call(1)


# --- what is resident -----------------------------------------------------------------------------


def window_of(cache: TieredKVCache) -> set[int]:
    return {p for p, slot in enumerate(cache._tiers._window_slot[0].tolist()) if slot >= 0}


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_fetched_rows_are_those_of_the_host_and_lists_follow_lru(data: Any) -> None:
    """Whatever lists come, whatever happens to the cache between them."""
    cache = tiered(1, resident_tokens=135 + data.draw(st.integers(20, 70)))
    plain = KVCache(1, HEADS, HEAD_DIM)
    _, k, v = tokens(1, 600, 0, torch.float32)
    cache.append(k, v)
    plain.append(k, v)
    cache.drop_whole_rows()
    num_slots = cache._tiers.num_listed_tokens
    kept: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(HEADS)]
    found = fetched = 0
    for step in range(data.draw(st.integers(1, 8))):
        if data.draw(st.booleans()):
            count = data.draw(st.integers(0, 60))
            cache.crop(count)
            plain.crop(count)
            for tenants in kept:
                for token in [t for t in tenants if t >= cache.max_seqlen]:
                    del tenants[token]
        _, k, v = tokens(1, 1, 100 + step, torch.float32)
        cache.append(k, v)
        plain.append(k, v)
        n = cache.max_seqlen
        far = st.sets(st.integers(0, n - 2), min_size=10, max_size=cache.resident_tokens - 135)
        listed = [[*sorted(data.draw(far)), n - 1] for _ in range(HEADS)]
        width = max(map(len, listed))
        padded = torch.tensor([[row + [-1] * (width - len(row)) for row in listed]])
        got = cache.fetch(padded.int())
        window = window_of(cache)
        for head, row in enumerate(listed):
            outside = [token for token in row if token not in window]
            absent = [token for token in outside if token not in kept[head]]
            found += len(outside) - len(absent)
            fetched += len(absent)
            for token in outside:
                if token in kept[head]:
                    kept[head].move_to_end(token)
            while len(kept[head]) + len(absent) > num_slots:
                kept[head].popitem(last=False)
            for token in outside:
                kept[head][token] = None
                kept[head].move_to_end(token)
            assert int(got.cache_seqlens[head]) == len(row)
            places = got.block_table[head, : len(row)].long()
            for pages, stored in ((got.k_pages, plain.k), (got.v_pages, plain.v)):
                assert torch.equal(pages[places, 0, 0], stored[0, row, head])
            held = cache._tiers._listed.token_in[head]
            assert set(held[held >= 0].tolist()) == kept[head].keys()
    counts = cache.residency
    assert (counts.num_found, counts.num_fetched) == (found, fetched)
    assert counts.fetched_bytes == fetched * 2 * HEAD_DIM * 4
    assert counts.hit_rate == (found / (found + fetched) if found + fetched else None)


@pytest.mark.parametrize("by_rank", [False, True])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_what_tokens_received_is_their_softmax(by_rank: bool, softcap: float | None) -> None:
    """Per list, summed over the query heads of the KV head; in what LRU-S takes for its scores."""
    cache = tiered(2, replacement="lru_s", block_tokens=16, sketch=None)
    q, k, v = tokens(2, 400, 3, torch.float32)
    cache.set_starts([0, 7])
    cache.append(k, v)
    cache.drop_whole_rows()
    listed = [70, 75, 80, 81, 90, 200, 399]
    lists = torch.tensor([*listed, -1], dtype=torch.int32).expand(2, HEADS, -1).contiguous()
    rope = Rope(*rope_tables(16, HEAD_DIM // 2)) if by_rank else None
    count = torch.full((2, HEADS), 7, dtype=torch.int32)
    sparse_attention(q[:, -1:], cache, Selection(lists, count), softcap=softcap, rope=rope)
    slots = cache._tiers._taken
    received = cache._tiers._received
    assert slots is not None and received is not None
    for row in range(2):
        for head in range(HEADS):
            keys, queries = k[row, listed, head].double(), q[row, -1].view(HEADS, GROUP, -1)[head]
            queries = queries.double()
            if rope is not None:
                keys = rope.rotate(keys[:, None], torch.arange(7))[:, 0].double()
                queries = rope.rotate(queries, 6).double()
            logits = HEAD_DIM**-0.5 * queries @ keys.T
            if softcap is not None:
                logits = softcap * (logits / softcap).tanh()
            wanted = logits.softmax(1).sum(0)
            got = received[2 * row + head]
            assert torch.allclose(got[:7].double(), wanted, atol=1e-5) and got[7] == 0
            # Blocks of 16 count from the row's first real token; 399 is in the window.
            start = 7 * row
            of = [(token - start) // 16 for token in listed[:6]]
            sums = [sum(float(w) for w, b in zip(wanted, of) if b == block) for block in of]
            slot = slots[0][2 * row + head, :6].tolist()
            if row == 1 and head == HEADS - 1:
                cache._tiers._settle_scores()
            if cache._tiers._received is None:
                scores = cache._tiers._listed._score[2 * row + head, slot]
                assert scores.tolist() == pytest.approx(sums, abs=1e-5)


def test_received_attention_is_for_lru_s_alone() -> None:
    with pytest.raises(
        ValueError, match=r"cache: got \"'lru'\", allowed: a cache with replacement"
    ):
        tiered(1).note_received(torch.zeros(2, 1))
    for changes, message in (
        ({"replacement": "lfu"}, "replacement: got 'lfu', allowed: 'lru' or 'lru_s'"),
        ({"block_tokens": 0}, "block_tokens: got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            tiered(1, **changes)


def test_attention_keeps_what_a_list_of_odds_and_ends_would_push_out() -> None:
    """Three tokens that get all attention every third step, and lists of others in between: LRU has
    forgotten them when they come back, LRU-S has not."""
    found = {}
    for replacement in ("lru", "lru_s"):
        cache = tiered(1, resident_tokens=136 + 128, sketch=None, replacement=replacement)
        _, k, v = tokens(1, 4000, 3, torch.float32)
        k[:, [200, 300, 400]] = 8.0  # of these; everything else is random
        cache.append(k, v)
        cache.drop_whole_rows()
        num_slots = cache._tiers.num_listed_tokens
        for step in range(30):
            width = num_slots // 2 - 4
            begin = 500 + step * width % 3000
            odds = list(range(begin, begin + width))
            listed = [200, 300, 400, *odds] if step % 3 == 0 else odds
            lists = torch.tensor([*listed, 3999], dtype=torch.int32).expand(1, HEADS, -1)
            count = torch.full((1, HEADS), len(listed) + 1, dtype=torch.int32)
            q = torch.ones(1, 1, HEADS * GROUP, HEAD_DIM)
            sparse_attention(q, cache, Selection(lists.contiguous(), count))
        found[replacement] = cache.residency.num_found
    assert found["lru_s"] - found["lru"] == 9 * 3 * HEADS  # all of them, each time they come back


def test_the_window_is_never_fetched() -> None:
    twins = Twins(StreamingLLM(**SIZES, positions="original"))
    twins.call(400)
    twins.steps(100)
    counts = twins.tiered.residency
    assert (counts.num_steps, counts.num_found, counts.num_fetched) == (100, 0, 0)
    assert counts.hit_rate is None


def test_the_same_list_twice_moves_nothing_the_second_time() -> None:
    cache = tiered(1)
    _, k, v = tokens(1, 500, 1, torch.float32)
    cache.append(k, v)
    cache.drop_whole_rows()
    lists = torch.tensor([[[70, 80, 499], [70, 100, 499]]], dtype=torch.int32)
    for expected in ((0, 4), (4, 4)):
        cache.fetch(lists)
        assert (cache.residency.num_found, cache.residency.num_fetched) == expected
    assert cache.residency.fetched_bytes_per_step == 4 * 2 * HEAD_DIM * 4 / 2
    cache.crop(0)
    cache.reorder([0, 0])
    cache.fetch(lists.expand(2, -1, -1))
    assert cache.residency.num_fetched == 4  # rows took them along


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_rows_move_between_host_and_device(device: str) -> None:
    """The storage by itself, which needs no op of ours."""
    rows = TieredRows(
        2,
        HEADS,
        HEAD_DIM,
        torch.bfloat16,
        torch.device(device),
        num_sink_tokens=5,
        num_recent_tokens=130,
        num_listed_tokens=64,
        residency=Residency(),
    )
    lengths = [500, 500]
    _, k, v = (x.to(device) for x in tokens(2, 500, 1, torch.bfloat16))
    rows.make_room(lengths)
    rows.store(k, v, [0, 0], lengths)
    rows.hold(lengths, lengths, [0, 0])
    stored = rows.tokens(lengths)
    assert stored[0].device.type == "cpu" and stored[0].is_pinned() == (device == "cuda")
    positions = torch.arange(470, 500).repeat(2, HEADS, 1)
    for shift in range(0, 300, 10):
        positions[..., :20] = torch.arange(100 + shift, 120 + shift)
        places = rows.fetch(positions).long().view(2, HEADS, -1)
        wanted = positions.to(device)[..., None].expand(-1, -1, -1, HEAD_DIM)
        for slots, appended in zip(rows.slots, (k, v)):
            assert slots.device.type == device
            expected = appended.transpose(1, 2).gather(2, wanted)
            assert torch.equal(slots[places, 0, 0], expected)
    rows.take_rows([1, 1], lengths)
    places = rows.fetch(positions).long().view(2, HEADS, -1)
    expected = k[1:].transpose(1, 2)[:, :, positions[0, 0]].expand(2, -1, -1, -1)
    assert torch.equal(rows.slots[0][places, 0, 0], expected)
    rows.load(lengths, lengths)
    assert torch.equal(rows.k_pages[:, :500], k[1:].expand(2, -1, -1, -1))
    assert torch.equal(rows.v_pages[:, :500], v[1:].expand(2, -1, -1, -1))


def test_tokens_that_come_in_the_place_of_cropped_ones_are_fetched() -> None:
    cache = tiered(1)
    _, k, v = tokens(1, 600, 1, torch.float32)
    for begin, end, dropped in ((0, 600, 0), (0, 300, 250)):
        cache.crop(dropped)
        cache.append(k[:, begin:end], v[:, begin:end])
        cache.drop_whole_rows()
        newest = cache.max_seqlen - 1
        lists = torch.tensor([[[300, 400, newest]] * HEADS], dtype=torch.int32)
        places = cache.fetch(lists).block_table[0].long()
        assert torch.equal(cache._tiers.slots[0][places, 0, 0], cache.k[0, [300, 400, newest], 0])
    assert cache.residency.num_found == HEADS  # token 300
    assert cache.residency.num_fetched == 3 * HEADS


def test_device_memory_stays_while_the_context_grows() -> None:
    cache = tiered(1)
    policy = selecting()
    state = policy.new_state(cache)
    pool = 2 * HEADS * HEAD_DIM * 4 * cache._tiers.num_slots
    window_pages = 2 + 4  # of 64 tokens: 5 and 130 tokens lie on so many at most
    assert cache._tiers.num_slots == 64 * window_pages + 128  # 95 listed tokens, in pages too
    assert cache.nbytes == pool

    q, k, v = tokens(1, 3000, 1, torch.float32)
    cache.append(k, v)
    sketch = cache.sketch_data
    assert sketch is not None
    assert cache.has_whole_rows
    assert cache.nbytes >= pool + 2 * 3000 * HEADS * HEAD_DIM * 4
    prefill(q, cache, policy, state)
    assert cache.nbytes == pool + sketch.nbytes

    q, k, v = tokens(1, 200, 2, torch.float32)
    for step in range(200):
        cache.append(k[:, step : step + 1], v[:, step : step + 1])
        decode_step(q[:, step : step + 1], cache, policy, state)
        assert cache.sketch_data is not None
        assert cache.nbytes == pool + cache.sketch_data.nbytes
    assert cache.host_nbytes >= 2 * 3200 * HEADS * HEAD_DIM * 4
    assert cache.residency.stored_bytes == 2 * 3200 * HEADS * HEAD_DIM * 4
    assert cache.residency.num_loads == 0  # the prompt came from the device


def test_whole_rows_last_until_the_last_reader_is_done() -> None:
    cache = tiered(1)
    _, k, v = tokens(1, 300, 3, torch.float32)
    cache.append(k, v)
    cache.drop_whole_rows()
    with cache.whole_rows():
        with cache.whole_rows():
            assert torch.equal(cache.k_pages[:, :300], k)
        assert cache.has_whole_rows and cache.block_table is None
        cache.append(k[:, :1], v[:, :1])
    assert not cache.has_whole_rows and cache.block_table is not None
    assert torch.equal(cache.k[:, 300:], k[:, :1])


def test_a_step_after_an_append_of_several_tokens_reads_whole_rows_and_the_next_does_not() -> None:
    twins = Twins(selecting())
    twins.call(300)
    q, k, v = tokens(2, 7, 4, torch.float32)
    outs = []
    for cache, state in zip(twins.caches, twins.states):
        cache.append(k, v)
        outs.append(decode_step(q[:, -1:], cache, twins.policy, state)[0])
    assert torch.equal(*outs) and twins.tiered.has_whole_rows
    twins.call(1)


def test_copies_live_on_by_themselves() -> None:
    twins = Twins(selecting())
    twins.call(300)
    twins.steps(5)
    copied = copy.deepcopy(twins.tiered)
    assert copied.residency is twins.tiered.residency  # of one report
    twins.steps(5)
    q, k, v = tokens(2, 1, 77, torch.float32)
    fresh = KVCache(2, HEADS, HEAD_DIM)
    fresh.append(copied.k, copied.v)
    outs = []
    for cache in (fresh, copied):
        cache.append(k, v)
        outs.append(decode_step(q, cache, twins.policy, twins.policy.new_state(cache))[0])
    assert torch.equal(*outs)


def test_steps_inside_and_outside_of_inference_mode_may_alternate() -> None:
    twins = Twins(selecting())
    for count in (300, 1, 1, 40, 1):
        with torch.inference_mode():
            twins.call(count)
            twins.change("reorder", [1, 0])
        twins.call(count)
        twins.change("crop", 3)


def test_what_is_appended_may_require_grad() -> None:
    cache = tiered(1)
    k = torch.randn(1, 1, HEADS, HEAD_DIM, requires_grad=True)
    with torch.no_grad():
        cache.append(k, k)
    assert not cache.k.requires_grad


@pytest.mark.parametrize("value", [torch.nan, 1e6])
@pytest.mark.parametrize("bad", [100, 525, 574])
def test_blocks_without_codes_are_scored_from_their_keys(bad: int, value: float) -> None:
    """A key is not finite, or too large for float16: in the prompt, in a step, and as the last one
    of a block whose first one leaves the window's pages with the next step."""
    twins = Twins(selecting(num_recent_tokens=128), num_recent_tokens=128)
    twins.change("set_starts", [63, 0])

    def call(count: int, seqlens: list[int] | None = None, bad: int | None = None) -> None:
        twins.seed += 1
        q, k, v = tokens(2, count, twins.seed, torch.float32)
        if bad is not None:
            k[0, bad, 1, 3] = value
        results = []
        for cache, state in zip(twins.caches, twins.states):
            cache.append(k, v, seqlens)
            if count > 1:
                results.append([prefill(q, cache, twins.policy, state)[0]])
            else:
                out, info = decode_step(q, cache, twins.policy, state)
                assert info.selection is not None
                results.append([out, info.selection.indices])
        for ours, theirs in zip(*results):
            assert torch.equal(ours.isnan(), theirs.isnan())
            assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())

    call(505, [505, 495], bad if bad < 505 else None)
    assert twins.tiered.has_whole_rows == (bad < 505)
    for position in range(505, 805):
        call(1, bad=0 if position == bad else None)
    twins.change("crop", 3)
    twins.change("reorder", [1, 0])
    call(1)
    assert twins.tiered.has_whole_rows
    twins.change("crop", 730)
    twins.change("reorder", [1, 1])
    assert not twins.tiered.has_whole_rows
    call(300)
    call(1)
    assert not twins.tiered.has_whole_rows


def test_reset_forgets_everything() -> None:
    twins = Twins(selecting())
    twins.call(400)
    twins.steps(5)
    twins.change("reset")
    assert twins.tiered.lengths == (0, 0)
    twins.call(1)
    twins.call(350)
    twins.steps(5)


# --- what is refused ------------------------------------------------------------------------------


def test_windows_and_capacity_are_checked() -> None:
    with pytest.raises(ValueError, match=r"resident_tokens: got 135, allowed: an int >= 136"):
        tiered(resident_tokens=135)
    with pytest.raises(ValueError, match="num_recent_tokens: got 100, allowed: an int >= 128 with"):
        tiered(num_recent_tokens=100)
    assert tiered(num_recent_tokens=100, sketch=None).sketch_format is None
    with pytest.raises(ValueError, match="num_sink_tokens: got -1, allowed: an int >= 0"):
        tiered(num_sink_tokens=-1)
    with pytest.raises(ValueError, match="num_recent_tokens: got 0, allowed: an int >= 1"):
        tiered(num_recent_tokens=0, sketch=None)


def test_a_policy_with_a_larger_window_is_refused() -> None:
    cache = tiered()
    allowed = "at most 130, as the TieredKVCache was made"
    with pytest.raises(ValueError, match=f"num_recent_tokens: got 131, allowed: {allowed}"):
        selecting(num_recent_tokens=131).new_state(cache)
    with pytest.raises(ValueError, match="num_sink_tokens: got 6, allowed: at most 5"):
        selecting(num_sink_tokens=6).new_state(cache)
    _, k, v = tokens(2, 300, 1, torch.float32)
    cache.append(k, v)
    with pytest.raises(ValueError, match="num_recent_tokens: got 200, allowed: at most 130"):
        score_tokens(tokens(2, 1, 2, torch.float32)[0], cache, num_recent_tokens=200)


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        (selecting(sketch=None), "sketch=None scores every key"),
        (selecting(num_segments=2), "num_segments: pools are scored from their keys"),
    ],
)
def test_policies_that_read_what_they_do_not_list_are_refused(policy: Any, reason: str) -> None:
    allowed = rf"None with this TokenSelect \({reason}\); 'cpu' goes with StreamingLLM, and with"
    with pytest.raises(ValueError, match=f"keep: got 'cpu', allowed: {allowed}"):
        policy.new_state(tiered(sketch=policy.sketch))


def test_lists_that_do_not_fit_or_lack_the_newest_token_are_refused() -> None:
    cache = tiered(1, resident_tokens=136)
    _, k, v = tokens(1, 900, 1, torch.float32)
    cache.append(k, v)
    cache.drop_whole_rows()
    num_slots = cache._tiers.num_listed_tokens
    longest = torch.arange(300, 300 + num_slots + 1, dtype=torch.int32)
    lists = torch.cat([longest, torch.tensor([899], dtype=torch.int32)]).expand(1, HEADS, -1)
    allowed = rf"at most {num_slots} \(raise resident_tokens\)"
    with pytest.raises(ValueError, match=f"got {num_slots + 1}, allowed: {allowed}"):
        cache.fetch(lists)
    assert cache.fetch(lists[..., 1:]).block_table.shape == (HEADS, num_slots + 1)
    allowed = r"lists with the newest token \(keep='cpu', compact positions\)"
    with pytest.raises(ValueError, match=f"selection: got 'a list without it', allowed: {allowed}"):
        cache.fetch(lists[..., 2:-1], by_rank=True)
    assert cache.fetch(lists[..., 2:-1]).cache_seqlens.tolist() == [num_slots - 1] * HEADS


def test_pages_that_are_not_there_cannot_be_read() -> None:
    cache = tiered(1)
    _, k, v = tokens(1, 300, 1, torch.float32)
    cache.append(k, v)
    assert torch.equal(cache.k_pages[:, :300], k) and torch.equal(cache.v_pages[:, :300], v)
    cache.drop_whole_rows()
    for name in ("k_pages", "v_pages"):
        allowed = r"a place inside of cache.whole_rows\(\) \(most tokens are on the host\)"
        with pytest.raises(ValueError, match=f"{name}: got 'a TieredKVCache', allowed: {allowed}"):
            getattr(cache, name)


def test_nothing_changes_where_nothing_is_kept_elsewhere() -> None:
    cache = KVCache(1, HEADS, HEAD_DIM)
    cache.require_window(10**6, 10**6)
    pages = cache.k_pages
    with cache.whole_rows():
        assert cache.k_pages is pages
    assert cache.keep is None and tiered().keep == "cpu"


@pytest.mark.parametrize("replacement", ["lru", "lru_s"])
def test_a_step_of_no_rows(replacement: str) -> None:
    cache = tiered(0, replacement=replacement, sketch=None)
    q, k, v = tokens(0, 1, 0, torch.float32)
    cache.append(k, v)
    lists = torch.full((0, HEADS, 1), -1, dtype=torch.int32)
    chosen = Selection(lists, torch.zeros(0, HEADS, dtype=torch.int32))
    assert sparse_attention(q, cache, chosen)[0].shape == q.shape
