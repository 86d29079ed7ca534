"""EngineKVCache: an engine's pages give what a cache of one's own gives, whoever shares them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_calls import int32
from torch import Tensor

import kvselect
from kvselect.engine_cache import EngineKVCache, sketch_share
from kvselect.policies.base import Policy
from kvselect.prefill import prefill
from kvselect.rope import Rope
from kvselect.testing import make_qkv

HEADS, KV_HEADS, DIM = 4, 2, 64
POLICY = {"topk": 64, "num_sink_tokens": 16, "num_recent_tokens": 128, "dense_below_tokens": 0}


def pool(num_blocks: int, page: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Keys and values as vLLM's CPU platform lays them out: head-major, NaN where nothing is."""
    both = torch.full((num_blocks, KV_HEADS, 2 * page, DIM), float("nan"), dtype=dtype)
    k, v = both.chunk(2, dim=2)
    return k.transpose(1, 2), v.transpose(1, 2)


class Engine:
    """Requests whose pages are scattered over a pool, and each request's own cache beside it."""

    def __init__(self, policy: Policy, page: int = 128, num_blocks: int = 40) -> None:
        self.policy, self.page = policy, page
        self.shared = EngineKVCache(*pool(num_blocks, page), sketch=policy.required_sketch)
        self.state = policy.new_state(self.shared, {})
        self.free = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(5)).tolist()
        self.pages: list[list[int]] = []
        self.own: list[kvselect.KVCache] = []
        self.own_states: list[Any] = []

    def start(self, shared_with: int | None = None, num_shared_pages: int = 0) -> int:
        """A request; its first pages may be another's."""
        self.pages.append([] if shared_with is None else self.pages[shared_with][:num_shared_pages])
        self.own.append(self.policy.new_cache(1, KV_HEADS, DIM))
        self.own_states.append(self.policy.new_state(self.own[-1], {}))
        return len(self.pages) - 1

    def take(self, requests: list[int], num_new: int) -> None:
        """Room for the new tokens, and the engine's rows."""
        for request in requests:
            need = -(-(self.own[request].max_seqlen + num_new) // self.page)
            while len(self.pages[request]) < need:
                self.pages[request].append(self.free.pop())
        lengths = [self.own[request].max_seqlen for request in requests]
        width = max(len(self.pages[request]) for request in requests) + 2
        table = torch.full((len(requests), width), -1, dtype=torch.int32)
        for row, request in enumerate(requests):
            pages = torch.tensor(self.pages[request], dtype=torch.int32)
            table[row, : len(pages)] = pages
        self.shared.serve(table, int32(*lengths), lengths)

    def append(self, requests: list[int], k: Tensor, v: Tensor) -> None:
        self.take(requests, k.shape[1])
        self.shared.append(k, v)
        for row, request in enumerate(requests):
            self.own[request].append(k[row : row + 1], v[row : row + 1])

    def step(self, requests: list[int], seed: int, rope: Rope | None = None) -> None:
        q, k, v = make_qkv(len(requests), 1, 1, HEADS, KV_HEADS, DIM, seed=seed)
        self.append(requests, k, v)
        got, _ = kvselect.decode_step(q, self.shared, self.policy, self.state, rope=rope)
        for row, request in enumerate(requests):
            own, state = self.own[request], self.own_states[request]
            expected, _ = kvselect.decode_step(q[row : row + 1], own, self.policy, state, rope=rope)
            assert torch.equal(got[row : row + 1], expected), f"request {request}"

    def chunk(self, request: int, num_new: int, seed: int, rope: Rope | None = None) -> None:
        q, k, v = make_qkv(1, num_new, num_new, HEADS, KV_HEADS, DIM, seed=seed)
        self.append([request], k, v)
        got, _ = prefill(q, self.shared, self.policy, self.state, rope=rope)
        own, state = self.own[request], self.own_states[request]
        expected, _ = prefill(q, own, self.policy, state, rope=rope)
        assert torch.equal(got, expected), f"request {request}"


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("page", [128, 256])
@pytest.mark.parametrize("sketch", ["int4", "int8", None])
def test_ragged_rows_equal_caches_of_their_own(page: int, sketch: str | None) -> None:
    engine = Engine(kvselect.TokenSelect(**POLICY, sketch=sketch), page)
    first, second, third = engine.start(), engine.start(), engine.start()
    engine.chunk(first, 300, 1)
    engine.chunk(second, 700, 2)
    engine.step([first, second], 3)
    engine.chunk(third, 130, 4)
    engine.chunk(first, 90, 5)  # a chunk that begins inside a block and completes it
    for seed in range(6, 12):
        engine.step([second, third, first], seed)  # rows in another order than before
    engine.step([third], 12)


def test_decode_steps_complete_blocks() -> None:
    engine = Engine(kvselect.TokenSelect(**POLICY))
    requests = [engine.start(), engine.start()]
    engine.chunk(requests[0], 380, 1)
    engine.chunk(requests[1], 383, 2)
    for seed in range(6):  # 384 and 385 tokens: the last block is read from its record then
        engine.step(requests, 10 + seed)


def test_who_shares_a_page_shares_its_records() -> None:
    engine = Engine(kvselect.TokenSelect(**POLICY))
    first = engine.start()
    engine.chunk(first, 520, 1)
    second = engine.start(shared_with=first, num_shared_pages=3)
    own = engine.own[second]
    k, v = engine.own[first].k[:, :384], engine.own[first].v[:, :384]
    own.append(k, v)  # the hit brings these to the engine's row for nothing
    engine.chunk(second, 77, 2)
    for seed in range(3, 6):
        engine.step([second, first], seed)


def test_a_page_given_to_another_request_is_written_anew() -> None:
    engine = Engine(kvselect.TokenSelect(**POLICY))
    first = engine.start()
    engine.chunk(first, 512, 1)
    engine.free += engine.pages[first]  # aborted or preempted
    second = engine.start()
    engine.chunk(second, 450, 2)
    assert set(engine.pages[second]) <= set(engine.pages[first])
    for seed in range(3, 6):
        engine.step([second], seed)


def test_compact_positions_and_streaming() -> None:
    frequencies = 10000.0 ** (-torch.arange(0, DIM, 2) / DIM)
    rope = Rope.from_frequencies(frequencies, 512)
    settings = POLICY | {"positions": "compact", "q_block_size": 64, "max_age": 1}
    streaming = kvselect.StreamingLLM(num_recent_tokens=64, q_block_size=64)
    for policy in (kvselect.TokenSelect(**settings), streaming):
        engine = Engine(policy)
        requests = [engine.start(), engine.start()]
        engine.chunk(requests[0], 700, 1, rope)
        engine.chunk(requests[1], 200, 2, rope)
        for seed in range(3, 6):
            engine.step(requests, seed, rope)


def test_what_it_refuses() -> None:
    with pytest.raises(
        ValueError, match=r"^page_block_size: got 192, allowed: a multiple of 128 with"
    ):
        EngineKVCache(*pool(2, 192))
    cache = EngineKVCache(*pool(2, 192), sketch=None)
    for call in (lambda: cache.crop(1), lambda: cache.reorder([0]), cache.reset):
        with pytest.raises(ValueError, match=r"^EngineKVCache: got '\w+', allowed: serve, append"):
            call()
    with pytest.raises(ValueError, match=r"^EngineKVCache: got 'set_starts'"):
        cache.set_starts([0])
    cache.serve(int32(0).view(1, 1), int32(0), [0])
    _, k, v = make_qkv(1, 1, 193, HEADS, KV_HEADS, DIM)
    with pytest.raises(ValueError, match=r"^seqlens: got \[1\], allowed: None"):
        cache.append(k, v, [1])
    with pytest.raises(ValueError, match=r"^capacity: got 193, allowed: at most 192 tokens"):
        cache.append(k, v)
    with pytest.raises(ValueError, match=r"^cache_seqlens"):
        cache.serve(int32(0).view(1, 1), int32(0, 0), [0])


def test_ops_refuse_records_that_cannot_lie_with_pages() -> None:
    k_pages, v_pages = pool(2, 128)
    _, k, v = make_qkv(1, 1, 1, HEADS, KV_HEADS, DIM)
    bad = torch.zeros(1, KV_HEADS, dtype=torch.int64)
    sketch = torch.zeros(2, KV_HEADS, 1, 128 * DIM // 2 + 4 * DIM, dtype=torch.uint8)

    def append(k_pages: Tensor, v_pages: Tensor, table: Tensor | None, **options: Any) -> None:
        arguments = {"sketch": sketch, "starts": None} | options
        torch.ops.kvselect.kv_append(
            k, v, None, k_pages, v_pages, table, int32(0), arguments["sketch"], "int4", bad,
            arguments["starts"], True,
        )  # fmt: skip

    table = int32(1, 0).view(1, 2)
    append(k_pages, v_pages, table)
    message = r"sketch_in_pages: got true, allowed: false without a sketch or a block_table"
    for change in ({"sketch": None}, {"starts": int32(0)}):
        with pytest.raises(ValueError, match=message):
            append(k_pages, v_pages, table, **change)
    with pytest.raises(ValueError, match=message):
        append(k_pages[:1], v_pages[:1], None)
    with pytest.raises(ValueError, match="with page_block_size 64, allowed: false, or a multiple"):
        append(k_pages[:, :64], v_pages[:, :64], table)
    with pytest.raises(ValueError, match="sketch"):
        append(k_pages, v_pages, table, sketch=sketch[:1])


def test_share_of_a_sketch() -> None:
    assert sketch_share(None, 128, 2) == 0.0
    assert sketch_share("int4", 128, 2) == 68 / 512
