"""ActQKV: probe queries, cosine scores of blocks, lists, the question plug, attached models."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import hf_models
import pytest
import torch
from torch import Tensor

from kvselect import (
    ActQKV,
    Dense,
    KVCache,
    Landmark,
    Rope,
    TokenSelect,
    attach,
    decode_step,
    prefill,
    reference,
)
from kvselect.policies.pooled_blocks import only_best
from kvselect.policies.probe_query import QueryMoments, probe_query
from kvselect.query_blocks import cut_queries
from kvselect.testing import make_qkv, rel_err

DIM, HEADS = 32, 2
SMALL: dict[str, Any] = {
    "topk_blocks": 4,
    "block_size": 8,
    "num_sink_tokens": 8,
    "num_recent_tokens": 24,
    "q_block_size": 32,
}


def filled(
    seqlens: tuple[int, ...], group: int = 2, starts: list[int] | None = None, seqlen_q: int = 1
) -> tuple[Tensor, KVCache]:
    batch = len(seqlens)
    q, k, v = make_qkv(batch, seqlen_q, max(seqlens), group * HEADS, HEADS, DIM, seed=5)
    cache = KVCache(batch, HEADS, DIM, sketch=None)
    if starts is not None:
        cache.set_starts(starts)
    cache.append(k, v, list(seqlens))
    return q, cache


# ---- probe_query


@pytest.mark.parametrize("num_probes", [1, 2])
@pytest.mark.parametrize("length", [1, 2, 31])
def test_probe_is_that_of_the_reference(num_probes: int, length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    blocks = torch.randn(2, 3, length, 4, DIM, generator=generator)
    real = torch.ones(2, 3, length, dtype=torch.bool)
    real[1, 0, : length - 1] = False
    blocks[~real] = torch.nan  # padding is not read
    probes = probe_query(blocks, real, num_probes)[:, :, 0]
    for row, block, part in itertools.product(range(2), range(3), range(num_probes)):
        heads = slice(part * 4 // num_probes, (part + 1) * 4 // num_probes)
        own = blocks[row, block][real[row, block]][:, heads].flatten(1)
        expected = reference.probe_query(own)
        assert rel_err(probes[row, block, heads].flatten(), expected) <= 1e-5


def test_queries_that_are_all_the_same_are_their_own_probe() -> None:
    q = torch.randn(1, 1, 1, 4, DIM, generator=torch.Generator().manual_seed(0))
    same = q.expand(1, 1, 9, 4, DIM)
    probe = probe_query(same, torch.ones(1, 1, 9, dtype=torch.bool), 1)
    assert rel_err(probe, q) <= 1e-6
    nothing = probe_query(same, torch.zeros(1, 1, 9, dtype=torch.bool), 1)
    assert not nothing.any()


@pytest.mark.parametrize("calls", [1, 3])
def test_running_statistics_are_of_all_queries_so_far(calls: int) -> None:
    generator = torch.Generator().manual_seed(3)
    blocks = 1.0 + torch.randn(2, 6, 5, 4, DIM, generator=generator)
    real = torch.ones(2, 6, 5, dtype=torch.bool)
    real[1, :2] = False
    moments = QueryMoments(2, 4, DIM, blocks.device)
    found = [
        probe_query(b, r, 1, moments.add(b, r))
        for b, r in zip(blocks.chunk(calls, 1), real.chunk(calls, 1))
    ]
    probes = torch.cat(found, 1)
    for row, first in ((0, 0), (1, 2)):
        for block in range(first, 6):
            past = blocks[row, first : block + 1].flatten(0, 1).flatten(1)
            expected = reference.probe_query(blocks[row, block].flatten(1), past)
            assert rel_err(probes[row, block].flatten(), expected) <= 1e-4
    moments.take_rows(torch.tensor([1, 1]))
    assert moments.count.tolist() == [20.0, 20.0] and moments.nbytes > 0


# ---- lists


def expected_blocks(
    probe: Tensor, cache: KVCache, row: int, end: int, begin: int, policy: ActQKV, scope: str
) -> list[set[int]]:
    """Picked blocks of each list: the best by the reference's cosine."""
    size = policy.block_size
    blocks = reference.blocks_of_row(cache, row, size)  # type: ignore[arg-type]
    window = max(begin - policy.num_recent_tokens, 0) // size
    candidates = range(policy.num_sink_blocks, window)
    lists = []
    for heads in [range(HEADS)] if scope == "layer" else [[g] for g in range(HEADS)]:
        group = probe.shape[0] // HEADS
        chosen = [h for g in heads for h in range(g * group, (g + 1) * group)]
        scores = [
            reference.cosine_score(
                probe[chosen], [cache.k[row, list(blocks[b]), h // group] for h in chosen]
            )
            for b in candidates
        ]
        order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
        lists.append({candidates[i] for i in order[: policy.topk_blocks]})
    return lists


def check_list(
    indices: Tensor, count: int, picked: set[int], start: int, begin: int, end: int, policy: ActQKV
) -> None:
    size = policy.block_size
    window = max(begin - start - policy.num_recent_tokens, 0) // size
    kept = [
        *range(policy.num_sink_blocks),
        *sorted(picked),
        *range(window, -(-(end - start) // size)),
    ]
    tokens = [start + t for b in kept for t in range(b * size, (b + 1) * size) if start + t < end]
    assert indices[:count].tolist() == tokens and (indices[count:] == -1).all()


@pytest.mark.parametrize("group", [1, 4, 7, 8])
@pytest.mark.parametrize("scope", ["layer", "kv_head"])
def test_decode(group: int, scope: Any) -> None:
    policy = ActQKV(**SMALL, scope=scope)
    starts = [0, 13, 0]
    q, cache = filled((300, 289, 111), group, starts)
    cache.k[2, 40:48] = cache.k[2, 48:56]  # two blocks that tie
    state = policy.new_state(cache)
    out, info = decode_step(q, cache, policy, state)
    assert info.selection is not None
    for row, end in enumerate(cache.lengths):
        real = end - starts[row]
        lists = expected_blocks(q[row, 0], cache, row, real, real, policy, scope)
        for head in range(HEADS):
            count = int(info.selection.topk_length[row, head])
            indices = info.selection.indices[row, head]
            picked = lists[0 if scope == "layer" else head]
            check_list(indices, count, picked, starts[row], end, end, policy)
    assert rel_err(out, reference.sparse_attention(q, cache, info.selection)[0]) <= 2e-6


@pytest.mark.parametrize("probe_statistics", ["window", "running"])
@pytest.mark.parametrize("chunk_size", [32, 2048])
def test_prefill(probe_statistics: Any, chunk_size: int) -> None:
    policy = ActQKV(**SMALL, probe_statistics=probe_statistics, chunk_size=chunk_size)
    q, cache = filled((200, 200), 2, [0, 40], 200)
    out, _ = prefill(q, cache, policy, policy.new_state(cache))
    offsets = cut_queries(200, policy.q_block_size)
    past: list[list[Tensor]] = [[], []]
    for (begin, end), row in itertools.product(itertools.pairwise(offsets), range(2)):
        start = [0, 40][row]
        first = max(begin, start)
        own = q[row, first:end].flatten(1)
        window = max(first - start - policy.num_recent_tokens, 0) // policy.block_size
        num_candidates = max(window - policy.num_sink_blocks, 0)
        longest = max(begin - policy.num_recent_tokens, 0) // policy.block_size
        if longest > policy.num_sink_blocks + policy.topk_blocks:  # of the run that selects
            past[row].append(own)
        if num_candidates <= policy.topk_blocks:
            continue
        running = torch.cat(past[row]) if probe_statistics == "running" else None
        probe = reference.probe_query(own, running).view(-1, DIM)
        begin_, end_ = first - start, end - start
        (picked,) = expected_blocks(probe, cache, row, end_, begin_, policy, "layer")
        size = policy.block_size
        kept = [*range(policy.num_sink_blocks), *sorted(picked), *range(window, -(-end_ // size))]
        tokens = [start + t for b in kept for t in range(b * size, (b + 1) * size)]
        tokens = [t for t in tokens if t < end]
        keys = cache.k[row, tokens].double()
        logits = torch.einsum(
            "qgjd,tgd->qgjt", q[row, first:end].double().unflatten(1, (HEADS, -1)), keys
        )
        logits = logits * DIM**-0.5
        at = torch.arange(first, end)[:, None] >= torch.tensor(tokens)
        weights = logits.where(at[:, None, None], -torch.inf).softmax(-1)
        expected = torch.einsum("qgjt,tgd->qgjd", weights, cache.v[row, tokens].double())
        assert rel_err(out[row, first:end], expected.flatten(1, 2)) <= 2e-6


@pytest.mark.parametrize("group", [1, 4, 7, 8])
@pytest.mark.parametrize("seqlen", [55, 56, 63, 64, 65, 71, 72])
def test_budget_at_least_the_length_is_dense(group: int, seqlen: int) -> None:
    policy = ActQKV(**SMALL)  # 1 + 4 blocks before a window of 24
    q, cache = filled((seqlen, seqlen - 7), group, seqlen_q=seqlen)
    out, _ = prefill(q, cache, policy, policy.new_state(cache))
    dense = reference.sparse_attention(q, cache)[0]
    if seqlen < 72:
        assert rel_err(out, dense) <= 2e-6
    step, info = decode_step(q[:, -1:].contiguous(), cache, policy, policy.new_state(cache))
    assert (info.selection is None) == (seqlen < 72)
    if seqlen < 72:
        assert rel_err(step, dense[:, -1:]) <= 2e-6
    # Beside a longer row it goes through a list of everything.
    q, cache = filled((300, min(seqlen, 71)), group)
    step, _ = decode_step(q, cache, policy, policy.new_state(cache))
    assert rel_err(step[1], reference.sparse_attention(q, cache)[0][1]) <= 2e-6


def test_compact_positions() -> None:
    rope = Rope.from_frequencies(100.0 ** (-torch.arange(DIM // 2) / (DIM // 2)), 256)
    policy = ActQKV(**SMALL, positions="compact")
    q, cache = filled((300,), seqlen_q=300)
    state = policy.new_state(cache)
    info = decode_step(q[:, -1:].contiguous(), cache, policy, state, rope=rope)[1]
    assert info.selection is not None
    probe = rope.rotate(q[0, -1:], policy.num_recent_tokens)[0]
    (picked,) = expected_blocks(probe, cache, 0, 300, 300, policy, "layer")
    count = int(info.selection.topk_length[0, 0])
    check_list(info.selection.indices[0, 0], count, picked, 0, 300, 300, policy)
    whole, _ = prefill(q, cache, policy, policy.new_state(cache), rope=rope)
    assert whole.isfinite().all() and policy.capacity <= rope.num_positions
    with pytest.raises(ValueError, match="rope: got None"):
        decode_step(q[:, -1:].contiguous(), cache, policy, state)


def test_a_fixed_budget_takes_as_many_for_every_layer() -> None:
    policy = ActQKV(**SMALL, layer_budget="fixed")
    assert not policy.flows_between_layers and policy.most_blocks == 4
    q, cache = filled((300,))
    info = decode_step(q, cache, policy, policy.new_state(cache))[1]
    assert info.selection is not None  # sink, four blocks, tokens 272 to 299
    assert (info.selection.topk_length == 8 + 4 * 8 + 28).all()


def test_only_the_best_votes_stay() -> None:
    votes = torch.tensor([[[[9.0, 1.0, 3.0, torch.nan, 3.0, 2.0, 8.0]]]])
    candidate = torch.tensor([[[False, True, True, True, True, True, False]]])
    best = only_best(votes, candidate, torch.tensor([[2]]))[0, 0, 0]
    assert best.isfinite().tolist() == [False, False, True, False, True, False, False]


# ---- works when (METHODS 3.4)


def topics(num_topics: int, seed: int) -> tuple[Tensor, Tensor, list[int]]:
    """A block of 64 queries, 400 keys, and where the keys lie that its topics ask for.

    With one topic all queries ask for the same; with more, most ask for the first and two for each
    of the others. Keys of a topic lie in one block of eight.
    """
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(num_topics, HEADS, DIM, generator=generator)
    directions = 6.0 * directions / directions.norm(dim=-1, keepdim=True)
    asks = torch.zeros(64, dtype=torch.int64)
    asks[torch.randperm(64, generator=generator)[: 2 * (num_topics - 1)]] = torch.arange(
        1, num_topics
    ).repeat_interleave(2)
    q = directions[asks] + 0.4 * torch.randn(64, HEADS, DIM, generator=generator)
    k = 0.5 * torch.randn(464, HEADS, DIM, generator=generator)
    places = (16 + 8 * torch.randperm(40, generator=generator)[:num_topics]).tolist()
    for direction, place in zip(directions, places):
        k[place : place + 8] += direction
    return q[None], k[None], places


def topic_recall(policy: Any, num_topics: int) -> float:
    """Share of the topics' keys that the list of the block holds."""
    found = total = 0
    for seed in range(12):
        q, k, places = topics(num_topics, seed)
        cache = KVCache(1, HEADS, DIM, sketch=None)
        cache.append(k, torch.zeros_like(k))
        lists: list[Any] = []
        spied = type(policy).attend

        def attend(self: Any, queries: Any, kv: Any, selection: Any) -> Any:
            lists.append(selection)  # noqa: B023
            return spied(self, queries, kv, selection)  # noqa: B023

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(type(policy), "attend", attend)
            prefill(q, cache, policy, policy.new_state(cache))
        kept = set(lists[-1].indices[0, -1, 0].tolist())
        wanted = {place + t for place in places for t in range(8)}
        found, total = found + len(kept & wanted), total + len(wanted)
    return found / total


TOKENS: dict[str, Any] = {
    "topk": 64,
    "num_sink_tokens": 0,
    "num_recent_tokens": 8,
    "q_block_size": 64,
    "num_tail_tokens": 0,
    "scope": "layer",
    "sketch": None,
    "overselect": 1.0,
    "dense_below_tokens": 0,
}


def test_multi_topic_blocks_probe_recalls_more_than_the_mean() -> None:
    """Works when: eight topics share a block. Drawn keys (simulated)."""
    probe = topic_recall(TokenSelect(**TOKENS, aggregate="probe"), 8)
    mean = topic_recall(TokenSelect(**TOKENS, aggregate="mean"), 8)
    assert probe > mean + 0.1, (probe, mean)


def test_single_topic_blocks_lose_nothing_to_the_probe() -> None:
    probe = topic_recall(TokenSelect(**TOKENS, aggregate="probe"), 1)
    mean = topic_recall(TokenSelect(**TOKENS, aggregate="mean"), 1)
    assert probe >= mean == 1.0, (probe, mean)


def test_act_qkv_finds_the_blocks_of_all_topics() -> None:
    policy = ActQKV(
        topk_blocks=8, block_size=8, num_sink_tokens=0, num_recent_tokens=8, q_block_size=64
    )
    assert topic_recall(policy, 1) == 1.0
    assert topic_recall(policy, 8) > 0.5


def test_the_question_selects_for_the_whole_call_and_reports_say_so() -> None:
    """The first topic's block asks for nothing; the last queries of the call do."""
    plain = ActQKV(**SMALL, layer_budget="fixed")
    asking = ActQKV(**SMALL, layer_budget="fixed", question_weight=4.0)
    assert plain.num_question_tokens == 0 and asking.num_question_tokens == 32
    generator = torch.Generator().manual_seed(1)
    k = torch.randn(1, 300, HEADS, DIM, generator=generator)
    q = torch.randn(1, 300, 2 * HEADS, DIM, generator=generator)
    needle = 5.0 * torch.randn(HEADS, DIM, generator=generator)
    k[:, 64:72] += needle
    q[:, -32:] += needle.repeat_interleave(2, 0)
    v = torch.zeros(1, 300, HEADS, DIM)
    v[:, 64:72] = 1.0  # out > 0: the needle is attended to
    for chunk_size in (32, 2048):
        cache = KVCache(1, HEADS, DIM, sketch=None)
        cache.append(k, v)
        aware = ActQKV(**SMALL, layer_budget="fixed", question_weight=4.0, chunk_size=chunk_size)
        seen = prefill(q, cache, aware, aware.new_state(cache))[0][0, 230:260]
        blind = prefill(q, cache, plain, plain.new_state(cache))[0][0, 230:260]
        assert (seen > 0).all() and not (blind > 0).all()


# ---- attached models


def attached_tokens(model: Any, policy: Any, prompts: Tensor, **options: Any) -> Tensor:
    with attach(model, policy):
        out: Tensor = model.generate(
            prompts, max_new_tokens=12, do_sample=False, eos_token_id=None, **options
        )
    return out


POOLED = ActQKV(**{**SMALL, "topk_blocks": 5, "num_recent_tokens": 16})


def test_through_attach_the_layers_of_a_cache_share_one_pool() -> None:
    model = hf_models.model("llama")
    prompts = hf_models.tokens(2, 120)
    with attach(model, POOLED) as handle, torch.no_grad():
        out = model(prompts, use_cache=True)
        cache = out.past_key_values
        other = model(prompts[:1], use_cache=True).past_key_values
        stacks = [stack for layer in cache.layers for stack in layer.stacks()]
        assert len(stacks) == len(cache.layers) and len({id(stack) for stack in stacks}) == 1
        assert other.layers[0].stacks()[0] is not stacks[0]
        copied = copy.deepcopy(cache)
        assert len({id(stack) for layer in copied.layers for stack in layer.stacks()}) == 1
        assert copied.layers[0].stacks()[0] is not stacks[0]
        cache.reorder_cache(torch.tensor([1, 0]))
        one = model(prompts[:, :1], past_key_values=cache).logits
        two = model(prompts[:, :1], past_key_values=copied).logits
        assert rel_err(one, two) > 1e-3
        cache.crop(-1)
        cache.batch_select_indices(torch.tensor([1]))
        again = model(prompts[:1, :1], past_key_values=cache).logits
        assert again.shape[0] == 1 and again.isfinite().all()
        assert cache.layers[0].stacks()[0] is stacks[0]
        cached, plain = out.logits, model(prompts, use_cache=False).logits
        assert rel_err(plain, cached) <= 1e-5  # a forward without a cache shares for itself
        report = handle.report()
    assert "question-aware" not in str(report) and not report.question_aware
    assert all(layer.decode["num_calls"] > 0 for layer in report.layers)


def test_a_full_budget_generates_what_dense_does() -> None:
    model = hf_models.model("llama")
    prompts = hf_models.tokens(2, 100)
    dense = attached_tokens(model, Dense(), prompts)
    full = ActQKV(**{**SMALL, "topk_blocks": 20})
    assert torch.equal(attached_tokens(model, full, prompts), dense)


def test_requests_in_another_order_generate_the_same() -> None:
    model = hf_models.model("llama")
    prompts = hf_models.tokens(3, 100)
    together = attached_tokens(model, POOLED, prompts)
    assert torch.equal(attached_tokens(model, POOLED, prompts.flip(0)), together.flip(0))
    beams = attached_tokens(model, POOLED, prompts[:1], num_beams=3)
    assert beams.shape[1] == 112


def test_a_report_names_a_question_aware_policy() -> None:
    model = hf_models.model("llama")
    asking = ActQKV(**SMALL, question_weight=4.0)
    with attach(model, asking) as handle, torch.no_grad():
        model(hf_models.tokens(1, 120))
        report = handle.report()
    assert report.question_aware and "question-aware: yes" in str(report)


def test_a_static_cache_is_refused() -> None:
    model = hf_models.model("llama")
    with pytest.raises(ValueError, match="policy: got 'ActQKV', allowed: a policy whose layers sh"):
        attached_tokens(model, POOLED, hf_models.tokens(1, 100), cache_implementation="static")


@pytest.mark.parametrize(
    "settings, error, message",
    [
        ({"topk_blocks": 0}, ValueError, "topk_blocks: got 0, allowed: an int >= 1"),
        ({"block_size": 1.5}, TypeError, "block_size: got float 1.5"),
        ({"num_recent_tokens": 0}, ValueError, "num_recent_tokens: got 0"),
        ({"chunk_size": 0}, ValueError, "chunk_size: got 0"),
        ({"q_block_size": 0}, ValueError, "q_block_size: got 0"),
        ({"num_sink_tokens": -1}, ValueError, "num_sink_tokens: got -1"),
        ({"scope": "head"}, ValueError, "scope: got 'head', allowed: 'layer' or 'kv_head'"),
        ({"probe_statistics": "all"}, ValueError, "probe_statistics: got 'all', allowed: 'window'"),
        ({"layer_budget": "pool"}, ValueError, "layer_budget: got 'pool', allowed: 'entropy_pool'"),
        ({"positions": "clamp"}, ValueError, "positions: got 'clamp', allowed: 'original' or"),
        ({"question_weight": -1.0}, ValueError, "question_weight: got -1.0, allowed: a float >= 0"),
        ({"dense_layers": [0]}, TypeError, "dense_layers: got list"),
        ({"dense_layers": (-1,)}, ValueError, "dense_layers: got -1, allowed: layer indices"),
    ],
)
def test_every_bound_is_checked(
    settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ActQKV(**settings)


@pytest.mark.parametrize("kind", [ActQKV, Landmark])
def test_padding_that_every_row_has_changes_nothing(kind: type[Any]) -> None:
    """Blocks count from the first real token: there are fewer of them than positions would make."""
    policy = kind(topk_blocks=3, block_size=8, num_sink_tokens=8, num_recent_tokens=24)
    rope = Rope.from_frequencies(10000.0 ** -(torch.arange(DIM // 2).double() / (DIM // 2)), 600)
    q, k, v = make_qkv(1, 501, 501, 2 * HEADS, HEADS, DIM, seed=1)
    results = []
    for begin in (300, 0):
        cache = policy.new_cache(1, HEADS, DIM)
        cache.set_starts([begin])
        part = slice(300 - begin, 500)  # 300 of padding, or none
        (state,) = policy.new_states([cache])
        cache.append(k[:, part], v[:, part])
        read = prefill(q[:, part], cache, policy, state, q_unrotated=q[:, part], rope=rope)[0]
        cache.append(k[:, 500:], v[:, 500:])
        last = q[:, 500:]
        out, info = decode_step(last, cache, policy, state, q_unrotated=last, rope=rope)
        assert info.selection is not None
        results.append((read[:, -200:], out))
    for padded, bare in zip(*results):
        assert torch.equal(padded, bare)


def test_padding_that_the_only_row_has_changes_nothing() -> None:
    model = hf_models.model("llama")
    prompt = hf_models.tokens(1, 120)
    padded = torch.nn.functional.pad(prompt, (180, 0))
    mask = (torch.arange(300) >= 180)[None].long()
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    with attach(model, POOLED):
        wanted = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        got = model.generate(padded, attention_mask=mask, **options)
    assert torch.equal(got[:, 300:], wanted[:, 120:])
