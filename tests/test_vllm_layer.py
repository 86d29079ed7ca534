"""A served layer against a cache per request: mixed steps, shared blocks, rotations undone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fake_cuda import fake_cuda
from torch import Tensor

import kvselect
from kvselect.crossovers import Crossover, Workload
from kvselect.integrations.vllm.config import compares_unrotated
from kvselect.integrations.vllm.layer import ServedLayer, rotation_from_table
from kvselect.integrations.vllm.state import Step
from kvselect.policies import base
from kvselect.policies.base import Policy
from kvselect.prefill import prefill
from kvselect.rope import Rope
from kvselect.testing import rel_err

HEADS, KV_HEADS, DIM, PAGE = 4, 2, 64, 128
SMALL = {"topk": 64, "num_sink_tokens": 16, "num_recent_tokens": 128, "dense_below_tokens": 0}
TRAINED = 512
FREQUENCIES = 10000.0 ** (-torch.arange(0, DIM, 2) / DIM)
LONG = Rope.from_frequencies(FREQUENCIES, 2048)
SHORT = Rope.from_frequencies(FREQUENCIES, TRAINED)


class Request:
    """What one request would get alone, under Hugging Face's rules."""

    def __init__(self, policy: Policy, seed: int, steady: bool = False) -> None:
        self.policy = policy
        self.steady: Tensor | None = None if not steady else torch.empty(0)
        self.cache = policy.new_cache(1, KV_HEADS, DIM)
        self.state = policy.new_state(self.cache, {})
        self.pages: list[int] = []
        self.generator = torch.Generator().manual_seed(seed)

    def tokens(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys before RoPE, and values, [count, heads, head_dim]."""
        shapes = ((count, HEADS, DIM), (count, KV_HEADS, DIM), (count, KV_HEADS, DIM))
        q, k, v = (torch.randn(shape, generator=self.generator) for shape in shapes)
        if self.steady is not None:  # queries before RoPE that hardly change
            if not len(self.steady):
                self.steady = q[:1]
            q = self.steady + 0.2 * q
        return q, k, v

    def run(self, q: Tensor, k: Tensor, v: Tensor, of_prompt: bool) -> Tensor:
        filled = self.cache.max_seqlen > 0
        compact = self.policy.caches_unrotated
        first = self.cache.max_seqlen
        place = torch.arange(first, first + q.shape[0])
        rotated = q if compact else LONG.rotate(q, place)
        self.cache.append((k if compact else LONG.rotate(k, place))[None], v[None])
        options: dict[str, Any] = {"rope": SHORT if compact else LONG}
        if filled and q.shape[0] == 1 and not of_prompt:
            if not compact:
                options = {"q_unrotated": q[None]} if compares_unrotated(self.policy) else {}
            return kvselect.decode_step(
                rotated[None], self.cache, self.policy, self.state, **options
            )[0][0]
        if not compact:
            options["q_unrotated"] = q[None]
        options["stepwise"] = not of_prompt
        return prefill(rotated[None], self.cache, self.policy, self.state, **options)[0][0]


class Server:
    """Blocks, and steps as vLLM makes them."""

    def __init__(self, policy: Policy, num_blocks: int = 64) -> None:
        both = torch.full((num_blocks, KV_HEADS, 2 * PAGE, DIM), float("nan"))
        k, v = both.chunk(2, dim=2)
        table = torch.cat((LONG.cos, LONG.sin), dim=-1)
        self.layer = ServedLayer(
            policy,
            k.transpose(1, 2),
            v.transpose(1, 2),
            num_q_heads=HEADS,
            softmax_scale=DIM**-0.5,
            rotation=rotation_from_table(table, True, TRAINED, DIM),
        )
        self.policy = policy
        self.free = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(3)).tolist()

    def step(
        self, work: list[tuple[Request, int]], pieces: tuple[Request, ...] = (), padding: int = 3
    ) -> None:
        """``work``: requests and their new tokens, in the engine's order; compares every output.

        ``pieces``: requests whose tokens are of a prompt though something is before them.
        """
        starts, lengths, flat, expected, of_prompt = [0], [], [], [], []
        table = torch.zeros((len(work) + 2, 20), dtype=torch.int32)
        for row, (request, count) in enumerate(work):
            before = request.cache.max_seqlen
            while len(request.pages) * PAGE < before + count:
                request.pages.append(self.free.pop())
            table[row, : len(request.pages)] = torch.tensor(request.pages, dtype=torch.int32)
            q, k, v = request.tokens(count)
            place = torch.arange(before, before + count)
            flat.append((LONG.rotate(q, place), LONG.rotate(k, place), v))
            of_prompt.append(before == 0 or request in pieces)
            expected.append(request.run(q, k, v, of_prompt[-1]))
            starts.append(starts[-1] + count)
            lengths.append(before + count)
        q, k, v = (torch.cat(parts) for parts in zip(*flat))
        fill = lambda x: torch.cat((x, x.new_full((padding, *x.shape[1:]), float("nan"))))  # noqa: E731
        out = torch.full((starts[-1] + padding, HEADS, DIM), -7.0)
        step = Step(starts, lengths, table[: len(work)], of_prompt)
        self.layer.store(step, fill(k), fill(v))
        self.layer.attend(step, fill(q), out)
        for first, last, wanted in zip(starts, starts[1:], expected):
            # Rotated and rotated back in float32: a token near the threshold may fall either way.
            assert rel_err(out[first:last], wanted) < 2e-5
        assert (out[starts[-1] :] == -7.0).all()


BLOCKS: dict[str, Any] = {
    "topk_blocks": 3,
    "block_size": 16,
    "num_sink_tokens": 16,
    "num_recent_tokens": 64,
    "q_block_size": 32,
}
POLICIES = {
    "original": kvselect.TokenSelect(**SMALL),
    "exact": kvselect.TokenSelect(**SMALL, sketch=None),
    "layer": kvselect.TokenSelect(**SMALL, scope="layer"),
    "quest": kvselect.Quest(token_budget=96, page_size=16, dense_layers=()),
    "landmark": kvselect.Landmark(**BLOCKS),
    "landmark residual": kvselect.Landmark(**BLOCKS, attention="residual", scope="layer", order=1),
    "landmark stingy": kvselect.Landmark(**BLOCKS, positions="stingy"),
    "actqkv": kvselect.ActQKV(**BLOCKS, layer_budget="fixed"),
    "actqkv compact": kvselect.ActQKV(
        **BLOCKS,
        layer_budget="fixed",
        positions="compact",
        scope="kv_head",
        question_weight=4.0,
    ),
    "compact": kvselect.TokenSelect(**SMALL, positions="compact", q_block_size=64, max_age=1),
    "streaming": kvselect.StreamingLLM(num_recent_tokens=64, q_block_size=64),
    "dense": kvselect.Dense(),
}


@pytest.mark.parametrize("name", POLICIES)
def test_mixed_steps(name: str) -> None:
    policy = POLICIES[name]
    server = Server(policy)
    a, b, c, d = (Request(policy, seed) for seed in range(4))
    server.step([(a, 600), (b, 1)])
    server.step([(c, 300), (a, 1), (b, 1)])
    server.step([(a, 1), (d, 100), (b, 1), (c, 130)], (c,))  # decoding rows apart from each other
    for _ in range(4):
        server.step([(d, 1), (a, 1), (b, 1), (c, 1)])
    if name != "dense":
        for counts in (server.layer.state.decode, server.layer.state.prefill):
            selects = counts is server.layer.state.decode or name != "quest"
            assert (counts.tokens_attended < counts.tokens_visible) == selects


@pytest.mark.parametrize("name", POLICIES)
def test_short_pieces_of_prompts(name: str) -> None:
    """A scheduler leaves any number of a prompt's tokens for the next step, one too."""
    policy = POLICIES[name]
    server = Server(policy)
    a, b, c, d = (Request(policy, seed) for seed in range(4))
    server.step([(a, 300), (b, 350), (c, 371)])
    server.step([(a, 1), (b, 1), (c, 8), (d, 260)], (b, c))
    server.step([(a, 1), (b, 1), (c, 1), (d, 1)], (d,))
    server.step([(d, 16), (a, 1), (b, 1), (c, 5)], (d,))  # five again: generated, then preempted


REUSING = {
    "unrotated": kvselect.TokenSelect(**SMALL, similarity_threshold=0.9, max_age=3),
    "rotated": kvselect.TokenSelect(
        **SMALL, similarity_threshold=0.9, similarity_on="rotated", scope="layer", sketch=None
    ),
    "compact": kvselect.TokenSelect(
        **SMALL, similarity_threshold=0.9, positions="compact", q_block_size=64, max_age=2
    ),
    "dense below": kvselect.TokenSelect(
        **SMALL | {"dense_below_tokens": 257}, similarity_threshold=0.9
    ),
}


@pytest.mark.parametrize("name", REUSING)
def test_lists_are_reused_as_alone(name: str) -> None:
    policy = REUSING[name]
    server = Server(policy)
    a, b, c = requests = [Request(policy, seed, steady=True) for seed in range(3)]
    server.step([(a, 300), (b, 380), (c, 250)])
    server.step([(a, 1), (b, 1)])
    server.step([(b, 1), (c, 5), (a, 1)], (c,))  # prefill voids nobody's lists
    for order in ((a, b, c), (c, a, b), (c, a, b), (b, c, a), (b, a, c)):
        server.step([(request, 1) for request in order])
    hits = [request.state.decode.num_hits for request in requests]
    assert all(hits) and server.layer.state.decode.num_hits == sum(hits)
    server.step([(a, 1), (c, 1)])
    before = server.layer.state.decode.num_hits
    server.step([(Request(policy, 7), 270)])
    for request in requests:  # b was left out of two steps, the others of one
        request.state.invalidate()
    server.step([(b, 1), (a, 1), (c, 1)])
    assert server.layer.state.decode.num_hits == before
    server.step([(b, 1), (a, 1), (c, 1)])
    assert server.layer.state.decode.num_hits > before


def test_dense_prefill_does_not_depend_on_where_it_is_cut() -> None:
    policy = kvselect.TokenSelect(**SMALL, dense_prefill=True)
    server = Server(policy)
    a, b = Request(policy, 1), Request(policy, 2)
    server.step([(a, 371), (b, 378)])
    server.step([(a, 8), (b, 1)], (a, b))
    decode = server.layer.state.decode
    assert decode.num_calls == 0
    server.step([(a, 1), (b, 1)])
    assert decode.num_calls == 1 and decode.tokens_attended < decode.tokens_visible


def test_a_short_request_beside_a_long_one_stays_dense() -> None:
    policy = kvselect.TokenSelect(**SMALL | {"dense_below_tokens": 400})
    server = Server(policy)
    long, short = Request(policy, 1), Request(policy, 2)
    server.step([(long, 600), (short, 300)])
    dense_before = server.layer.state.decode.num_dense_calls
    server.step([(long, 1), (short, 1)])
    assert server.layer.state.decode.num_dense_calls == dense_before + 1
    assert server.layer.state.decode.tokens_attended > 301 * KV_HEADS


@pytest.mark.parametrize("name", ["original", "landmark residual", "actqkv"])
def test_blocks_shared_within_a_step(name: str) -> None:
    policy = POLICIES[name]
    server = Server(policy)
    first, second = Request(policy, 1), Request(policy, 1)
    q, k, v = first.tokens(256)
    second.tokens(256)  # the same prompt: vLLM lets it share blocks that are filled in this step
    place = torch.arange(256)
    first.run(q, k, v, True)
    second.run(q, k, v, True)
    pages = [server.free.pop() for _ in range(4)]
    first.pages, second.pages = pages[:3], [*pages[:2], pages[3]]
    tail_q, tail_k, tail_v = second.tokens(60)
    flat_k = torch.cat((LONG.rotate(tail_k, torch.arange(256, 316)), LONG.rotate(k, place)))
    flat_q = torch.cat((LONG.rotate(tail_q, torch.arange(256, 316)), LONG.rotate(q, place)))
    table = torch.zeros((2, 4), dtype=torch.int32)
    table[0, :3] = torch.tensor(second.pages, dtype=torch.int32)
    table[1, :3] = torch.tensor(first.pages, dtype=torch.int32)
    step = Step([0, 60, 316], [316, 256], table, [True, True])
    out = torch.zeros(316, HEADS, DIM)
    server.layer.store(step, flat_k, torch.cat((tail_v, v)))
    server.layer.attend(step, flat_q, out)
    assert rel_err(out[:60], second.run(tail_q, tail_k, tail_v, True)) < 2e-5


def test_a_step_without_tokens_does_nothing() -> None:
    server = Server(POLICIES["dense"])
    step = Step([0], [], torch.zeros((0, 4), dtype=torch.int32), [])
    out = torch.zeros(0, HEADS, DIM)
    server.layer.store(step, torch.zeros(0, KV_HEADS, DIM), torch.zeros(0, KV_HEADS, DIM))
    server.layer.attend(step, out, out)
    assert step.rows == [] and step.num_tokens == 0


@pytest.mark.parametrize(
    "policy",
    [
        kvselect.TokenSelect(**SMALL, average_queries="after_rope"),
        kvselect.Quest(token_budget=128, dense_layers=()),
        kvselect.Landmark(block_size=16, num_recent_tokens=64, attention="residual"),
        kvselect.ActQKV(layer_budget="fixed"),
    ],
    ids=lambda policy: type(policy).__name__,
)
def test_a_gpu_is_told_lengths_once_a_step_and_asked_for_nothing(policy: Policy) -> None:
    """However many layers: a copy from the host, or a mask, in each of them would wait for it."""
    shapes = ((HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, DIM))
    with fake_cuda() as noted:
        table = torch.empty(2, 8, dtype=torch.int32, device="cuda")
        layers = []
        for _ in range(2):
            both = torch.empty(16, PAGE, KV_HEADS, 2 * DIM, device="cuda")
            sizes: dict[str, Any] = {"num_q_heads": HEADS, "softmax_scale": 0.1}
            layers.append(ServedLayer(policy, *both.split(DIM, -1), **sizes))
        for before, new in (((0, 0), (400, 300)), ((400, 300), (1, 1))):
            lengths = [old + more for old, more in zip(before, new)]
            step = Step([0, new[0], sum(new)], lengths, table, [new[0] > 1, new[1] > 1])
            noted.forget()
            for layer in layers:
                q, k, v = (torch.empty(sum(new), *shape, device="cuda") for shape in shapes)
                layer.store(step, k, v)
                layer.attend(step, q, torch.empty_like(q))
            assert not noted.reads
        assert len(noted.copies) == 2  # of the decode step: before, and after


def test_ranks_that_vote_together_follow_no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = kvselect.TokenSelect(topk=64, scope="layer")
    workload = Workload.of(policy.to_dict(), HEADS, KV_HEADS, DIM, torch.float32, PAGE)
    measured = Crossover({}, workload, 4096, False, (), "2026-01-01T00:00:00", 1.0)
    monkeypatch.setattr(base, "break_even_mode", lambda: "stored")
    monkeypatch.setattr(base, "find_by_q_heads", lambda *_: {HEADS: measured})
    pages = torch.zeros(2, PAGE, KV_HEADS, DIM)
    sizes: dict[str, Any] = {"num_q_heads": HEADS, "softmax_scale": 1.0}
    alone = ServedLayer(policy, pages, pages, **sizes)
    assert alone.state.decode_policy(HEADS).dense_below_tokens == 4096
    group: Any = object()
    joined = ServedLayer(policy, pages, pages, process_group=group, **sizes)
    assert joined.state.decode_policy(HEADS).dense_below_tokens is None


def test_other_blocks_are_noticed() -> None:
    server = Server(POLICIES["dense"])
    pages = server.layer.cache.k_pages
    assert server.layer.is_over(pages)
    assert not server.layer.is_over(pages.clone()) and not server.layer.is_over(pages[:3])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 5e-7), (torch.bfloat16, 6e-3)])
def test_a_rotation_is_undone(interleaved: bool, dtype: torch.dtype, bound: float) -> None:
    table = torch.cat((1.3 * LONG.cos, 1.3 * LONG.sin), dim=-1).to(dtype)  # YaRN's scaling, too
    rotation = rotation_from_table(table[:, ::2].contiguous(), not interleaved, TRAINED, DIM)
    assert rotation.trained.num_positions == TRAINED and rotation.table.num_positions == 2048
    x = torch.randn(40, 3, DIM).to(dtype)
    places = torch.arange(2000, 2040)
    turned = rotation.table.rotate(x, places).to(dtype)
    assert rel_err(rotation.undo(turned, places), x) < bound


def test_what_is_no_table() -> None:
    table = torch.cat((LONG.cos, LONG.sin), dim=-1)
    with pytest.raises(ValueError, match=r"^rotary table: got 2048, allowed: at least 4096"):
        rotation_from_table(table, True, 4096, DIM)
    with pytest.raises(ValueError, match=r"^rotary_dim: got 64, allowed: at most head_dim = 32"):
        rotation_from_table(table, True, TRAINED, 32)
