"""Lists of prefill blocks by a dense kernel: what `sparse_attention` gives, and what is refused."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import hf_models
import pytest
import torch
from fake_cuda import FakeCuda, fake_cuda
from hypothesis import given, settings
from hypothesis import strategies as st
from op_calls import int32
from test_prefill import HEADS, ROPE, Call, small
from torch import Tensor

from kvselect import (
    KVCache,
    Rope,
    Selection,
    TokenSelect,
    attach,
    dense_kernel,
    prefill,
    reference,
    sparse_attention,
)
from kvselect.evictable_cache import EvictableKVCache
from kvselect.testing import TOLERANCE, make_qkv, rel_err

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# torch's CPU kernel has an exponential of fewer digits where elements have two bytes.
LSE_TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-5, torch.bfloat16: 1e-5}
COPIES: dict[str, Any] = {"implementation": "dense_kernel"}


def filled(
    k: Tensor, v: Tensor, seqlens: list[int], starts: list[int] | None = None, **options: Any
) -> KVCache:
    cache = KVCache(len(seqlens), k.shape[2], k.shape[3], dtype=k.dtype, sketch=None, **options)
    if starts is not None:
        cache.set_starts(starts)
    cache.append(k, v, seqlens=seqlens)
    return cache


def draw_lists(
    cache: KVCache, seqlen_q: int, offsets: list[int], seed: int = 0, share: float = 0.3
) -> Selection:
    """Tokens before each block at random, each head others and another number; then the block."""
    generator = torch.Generator().manual_seed(seed)
    num_blocks, longest = len(offsets) - 1, cache.max_seqlen + 1
    indices = torch.full((cache.batch, num_blocks, cache.num_kv_heads, longest), -1).int()
    lengths = torch.zeros(indices.shape[:3], dtype=torch.int32)
    starts = [0] * cache.batch if cache.starts is None else cache.starts.tolist()
    for row, seqlen in enumerate(cache.cache_seqlens.tolist()):
        for block in range(num_blocks):
            begin, end = (
                min(max(seqlen - seqlen_q + offset, starts[row]), seqlen)
                for offset in offsets[block : block + 2]
            )
            for head in range(cache.num_kv_heads):
                drawn = torch.rand(begin - starts[row], generator=generator) < share
                before = drawn.nonzero().flatten() + starts[row]
                listed = torch.cat([before, torch.arange(begin, end)])
                indices[row, block, head, : len(listed)] = listed.int()
                lengths[row, block, head] = len(listed)
    return Selection(indices, lengths, q_block_offsets=int32(*offsets))


def assert_equals_reference(
    q: Tensor, cache: KVCache, selection: Selection, rope: Rope | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    out, lse = sparse_attention(q, cache, selection, rope=rope, **COPIES, **options)
    want = reference.sparse_attention(q, cache, selection, rope=rope, **options)
    assert out.dtype == q.dtype and lse.dtype == torch.float32
    assert out.is_contiguous() and lse.is_contiguous()
    assert rel_err(out, want[0]) <= TOLERANCE[q.dtype]
    # A lone logit near 0 has no relative error; rotated to its rank, a key is rounded again.
    one = torch.ones(1)
    error = rel_err(torch.cat([lse.flatten(), one]), torch.cat([want[1].flatten(), one.double()]))
    assert error <= (LSE_TOLERANCE if rope is None else TOLERANCE)[q.dtype]
    return out, lse


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 160, 192, 256, 512])
def test_every_head_dim_and_dtype(head_dim: int, dtype: torch.dtype) -> None:
    q, k, v = make_qkv(3, 21, 97, 6, 2, head_dim, dtype=dtype)
    cache = filled(k, v, [97, 13, 50])
    assert_equals_reference(q, cache, draw_lists(cache, 21, [0, 8, 21]))


@pytest.mark.parametrize("group_size", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("page_block_size", [None, 16])
def test_groups_and_pages(group_size: int, page_block_size: int | None) -> None:
    q, k, v = make_qkv(2, 33, 80, 3 * group_size, 3, 64)
    cache = filled(k, v, [80, 41], page_block_size=page_block_size)
    assert_equals_reference(q, cache, draw_lists(cache, 33, [0, 16, 32, 33]))


def test_ragged_blocks_and_padding() -> None:
    q, k, v = make_qkv(4, 40, 90, 8, 2, 64)
    cache = filled(k, v, [90, 41, 13, 0], [0, 7, 12, 0])
    out, lse = assert_equals_reference(q, cache, draw_lists(cache, 40, [0, 9, 9, 24, 25, 40]))
    assert (out[3] == 0).all() and (lse[3] == -torch.inf).all()
    assert (out[1, :6] == 0).all() and (lse[1, :6] == -torch.inf).all()


def test_lists_of_one_length_go_together_and_give_what_they_give_apart() -> None:
    q, k, v = make_qkv(2, 16, 60, 4, 2, 64)
    cache = filled(k, v, [60, 60])
    indices = torch.cat([torch.arange(0, 20, 2), torch.arange(44, 60)]).int()
    selection = Selection(indices.expand(2, 2, 26), torch.full((2, 2), 26, dtype=torch.int32))
    together = assert_equals_reference(q, cache, selection)
    shorter = selection.topk_length.clone()
    other = selection.indices.clone()
    other[1, 1, :25], shorter[1, 1] = indices[1:], 25
    apart = assert_equals_reference(q, cache, Selection(other, shorter))
    assert rel_err(apart[0][0], together[0][0]) <= 2e-6


def test_one_list_for_all_heads() -> None:
    q, k, v = make_qkv(2, 12, 60, 6, 3, 64)
    cache = filled(k, v, [60, 35])
    drawn = draw_lists(cache, 12, [0, 5, 12])
    shared = Selection(
        drawn.indices[:, :, :1].expand(-1, -1, 3, -1),
        drawn.topk_length[:, :, :1].expand(-1, -1, 3),
        q_block_offsets=drawn.q_block_offsets,
    )
    assert_equals_reference(q, cache, shared)


def test_one_query_is_a_block() -> None:
    q, k, v = make_qkv(2, 1, 60, 6, 3, 64)
    cache = filled(k, v, [60, 35])
    assert_equals_reference(q, cache, draw_lists(cache, 1, [0, 1]))


def test_queries_of_any_stride() -> None:
    q, k, v = make_qkv(2, 12, 60, 6, 3, 64)
    cache = filled(k, v, [60, 35])
    selection = draw_lists(cache, 12, [0, 5, 12])
    want = sparse_attention(q, cache, selection, **COPIES)
    turned = q.transpose(1, 2).contiguous().transpose(1, 2)
    got = sparse_attention(turned, cache, selection, **COPIES)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_positions_by_rank(dtype: torch.dtype, interleaved: bool) -> None:
    inv_freq = 100.0 ** (-torch.arange(20, dtype=torch.float64) / 20)
    rope = Rope.from_frequencies(inv_freq, 101, start=16, interleaved=interleaved)
    q, k, v = make_qkv(3, 20, 100, 8, 2, 64, dtype=dtype)
    cache = filled(k, v, [100, 61, 5], [0, 30, 0])
    assert_equals_reference(q, cache, draw_lists(cache, 20, [0, 7, 20]), rope)


def test_sinks_join_afterwards() -> None:
    q, k, v = make_qkv(2, 12, 60, 6, 3, 64)
    cache = filled(k, v, [60, 8])
    sinks = torch.tensor([0.0, 3.0, -3.0, 30.0, -100.0, -torch.inf])
    selection = draw_lists(cache, 12, [0, 5, 12])
    out, _ = assert_equals_reference(q, cache, selection, sink_logits=sinks)
    assert rel_err(out, sparse_attention(q, cache, selection, **COPIES)[0]) > 0.05
    assert (out[1, :4] == 0).all()


def test_the_scale_is_used() -> None:
    q, k, v = make_qkv(1, 12, 60, 2, 1, 64)
    cache = filled(k, v, [60])
    assert_equals_reference(q, cache, draw_lists(cache, 12, [0, 12]), softmax_scale=0.2)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 1 << 30), sizes=st.data())
def test_any_case(seed: int, sizes: st.DataObject) -> None:
    seqlen_q = sizes.draw(st.integers(1, 40), label="seqlen_q")
    batch = sizes.draw(st.integers(1, 3), label="batch")
    seqlens = [sizes.draw(st.integers(0, 90), label="seqlen") for _ in range(batch)]
    starts = [sizes.draw(st.integers(0, seqlen), label="start") for seqlen in seqlens]
    cuts = sizes.draw(st.lists(st.integers(0, seqlen_q), max_size=3), label="cuts")
    offsets = [0, *sorted(cuts), seqlen_q]
    heads, group = sizes.draw(st.tuples(st.integers(1, 3), st.integers(1, 3)), label="heads")
    q, k, v = make_qkv(batch, seqlen_q, 90, heads * group, heads, 32, seed=seed)
    cache = filled(k, v, seqlens, starts)
    selection = draw_lists(cache, seqlen_q, offsets, seed, sizes.draw(st.floats(0, 1)))
    assert_equals_reference(q, cache, selection)


@settings(deadline=None, max_examples=60)
@given(
    offsets=st.lists(st.integers(0, 60), max_size=12).map(lambda x: (0, *sorted(x))),
    block_bytes=st.integers(0, 50),
    scratch_bytes=st.integers(1, 200),
)
def test_pieces_are_all_blocks_in_order_and_fit(
    offsets: tuple[int, ...], block_bytes: int, scratch_bytes: int
) -> None:
    covered = []
    for first, last in dense_kernel._pieces(offsets, block_bytes, scratch_bytes):
        sizes = {offsets[i + 1] - offsets[i] for i in range(first, last)}
        assert len(sizes) == 1 and 0 not in sizes
        assert last - first == 1 or (last - first) * block_bytes <= scratch_bytes
        covered += range(first, last)
    nonempty = [i for i in range(len(offsets) - 1) if offsets[i + 1] > offsets[i]]
    assert covered == nonempty


def test_scratch_memory_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = make_qkv(2, 40, 90, 4, 2, 64)
    cache = filled(k, v, [90, 70])
    selection = draw_lists(cache, 40, [0, 8, 16, 24, 32, 40])
    whole = sparse_attention(q, cache, selection, **COPIES)
    monkeypatch.setitem(dense_kernel.SCRATCH_BYTES, "cpu", 1)
    apart = sparse_attention(q, cache, selection, **COPIES)
    assert torch.equal(whole[0], apart[0]) and torch.equal(whole[1], apart[1])


def test_a_token_that_is_not_finite_makes_nan_of_its_block_only() -> None:
    """As the docstring says: of queries before it, too. sparse_attention keeps them apart."""
    q, k, v = make_qkv(1, 20, 60, 2, 1, 64)
    v[0, 55] = torch.nan
    cache = filled(k, v, [60])
    selection = draw_lists(cache, 20, [0, 10, 20])
    out, _ = sparse_attention(q, cache, selection, **COPIES)
    assert out[0, :10].isfinite().all() and out[0, 15:].isnan().all()
    ours, _ = sparse_attention(q, cache, selection)
    assert ours[0, :15].isfinite().all() and ours[0, 15:].isnan().all()


# ---- what is refused


def test_what_a_dense_kernel_cannot_do_is_refused() -> None:
    q, k, v = make_qkv(1, 4, 60, 2, 1, 64)
    cache = filled(k, v, [60])
    selection = draw_lists(cache, 4, [0, 4])
    with pytest.raises(ValueError, match="implementation: got 'fast', allowed: "):
        sparse_attention(q, cache, selection, implementation="fast")
    allowed = "a Selection with implementation='dense_kernel'"
    with pytest.raises(ValueError, match=f"selection: got None, allowed: {allowed}"):
        sparse_attention(q, cache, **COPIES)
    allowed = "none with torch's dense kernels, which have no cap"
    with pytest.raises(ValueError, match=f"softcap: got 30.0, allowed: {allowed}"):
        sparse_attention(q, cache, selection, softcap=30.0, **COPIES)
    shorter = Selection(selection.indices, selection.topk_length - 1, selection.q_block_offsets)
    with pytest.raises(ValueError, match=r"a list at \[0, 0, 0\] that does not end with all"):
        sparse_attention(q, cache, shorter, **COPIES)
    evictable = EvictableKVCache(1, 1, 64)
    evictable.append(k, v)
    allowed = "'sparse_attention' for a cache that drops tokens"
    with pytest.raises(ValueError, match=f"implementation: got 'dense_kernel', allowed: {allowed}"):
        sparse_attention(q, evictable, selection, **COPIES)


@pytest.mark.parametrize("offsets", [[0, 5], [2, 10], [0, 8, 4, 10], [0, 12], [0]])
def test_every_query_belongs_to_one_block(offsets: list[int]) -> None:
    """Nothing would be written for the others."""
    q, k, v = make_qkv(1, 10, 30, 2, 1, 64)
    cache = filled(k, v, [30])
    lists = torch.arange(30).int().expand(1, len(offsets) - 1, 1, 30)
    lengths = torch.full(lists.shape[:3], 30, dtype=torch.int32)
    selection = Selection(lists, lengths, q_block_offsets=int32(*offsets))
    with pytest.raises(ValueError, match=r"q_block_offsets: got .*, allowed: "):
        sparse_attention(q, cache, selection)
    message = r"q_block_offsets: got \(.*\), allowed: ascending from 0 to seqlen_q = 10"
    with pytest.raises(ValueError, match=message):
        sparse_attention(q, cache, selection, **COPIES)


def test_a_policy_knows_two_ways() -> None:
    with pytest.raises(ValueError, match="prefill_attention: got 'sdpa', allowed: "):
        TokenSelect(prefill_attention="sdpa")  # type: ignore[arg-type]


# ---- prefill


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("scope", ["kv_head", "layer"])
@pytest.mark.parametrize("window_anchor", ["block_start", "block_end"])
def test_a_prefill_gives_what_it_gives_with_our_kernel(
    positions: str, scope: str, window_anchor: str
) -> None:
    call = Call((150, 97, 80), 80, compact=positions == "compact")
    policy = small(positions=positions, scope=scope, window_anchor=window_anchor)
    want = call.run(policy)
    copying = dataclasses.replace(policy, prefill_attention="dense_kernel")
    state = copying.new_state(call.cache)
    got = prefill(call.q, call.cache, copying, state, q_unrotated=call.q_unrotated, rope=call.rope)
    assert rel_err(got[0], want[0]) <= 4e-6 and rel_err(got[1], want[1]) <= 4e-6
    kernels = state.prefill.attention_kernels
    assert kernels["sdpa"] >= 1 and state.prefill.to_dict()["attention_kernels"] == kernels


def test_dense_runs_and_decode_steps_stay_with_our_kernel() -> None:
    policy = small(prefill_attention="dense_kernel")
    call = Call()
    state = policy.new_state(call.cache)
    prefill(call.q, call.cache, policy, state, q_unrotated=call.q_unrotated, rope=ROPE)
    counts = state.prefill
    assert counts.attention_kernels["sparse_attention"] == counts.num_dense_calls > 0
    assert counts.attention_kernels["sdpa"] == counts.num_calls - counts.num_dense_calls > 0
    # A short call selects for every query as a decode step does.
    short = prefill(call.q[:, -3:], call.cache, policy, state, rope=ROPE)
    assert state.decode.num_calls == 1 and not state.decode.attention_kernels
    ours = small()
    want = prefill(call.q[:, -3:], call.cache, ours, ours.new_state(call.cache), rope=ROPE)
    assert torch.equal(short[0], want[0])


def test_a_prefill_refuses_a_block_whose_own_token_is_not_finite() -> None:
    """Such a token is never listed, so the list does not end with its block; our kernel can."""
    q, k, v = make_qkv(1, 150, 150, 4, HEADS, 32)
    k[0, 130, 1, 3] = torch.nan
    cache = filled(k, v, [150])
    policy = small(prefill_attention="dense_kernel")
    with pytest.raises(ValueError, match=r"a list at \[0, \d, 1\] that does not end with all"):
        prefill(q, cache, policy, policy.new_state(cache))
    ours = small()
    out, _ = prefill(q, cache, ours, ours.new_state(cache))
    assert out[0, :, :2].isfinite().all()


@torch.no_grad()
def test_an_attached_model_says_what_ran() -> None:
    ids = hf_models.tokens(1, 120)
    with attach(hf_models.model("llama"), hf_models.narrow()) as handle:
        want = handle.model(ids).logits
        assert "prefill attention" not in str(handle.report())
    policy = hf_models.narrow(prefill_attention="dense_kernel")
    with attach(hf_models.model("llama"), policy) as handle:
        got = handle.model(ids).logits
        report = handle.report()
        layer = next(layer for layer in report.layers if layer.selects)
        assert layer.prefill["attention_kernels"]["sdpa"] >= 1
        assert "prefill attention: sdpa (" in str(report)
        assert report.policy["prefill_attention"] == "dense_kernel"
    assert rel_err(got, want) <= 1e-5


@pytest.mark.parametrize("positions", hf_models.POSITIONS)
def test_verify_holds(positions: str) -> None:
    policy = hf_models.wide(positions, prefill_attention="dense_kernel")
    with attach(hf_models.model("llama"), policy) as handle:
        handle.verify()


# ---- a GPU's kernels, without a GPU


def varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    softmax_scale: float,
    causal: bool,
    softcap: float,
    return_attn_probs: bool,
) -> tuple[Tensor, Tensor, None]:
    """flash-attn's signature and conventions: lower right, lse [heads, rows], inf for nothing."""
    assert causal and return_attn_probs and k.shape[1] == 1
    out, lse = torch.zeros_like(q), torch.full((q.shape[1], len(q)), torch.inf)
    for number in range(len(cu_seqlens_q) - 1):
        first, last = cu_seqlens_q[number : number + 2].tolist()
        begin, end = cu_seqlens_k[number : number + 2].tolist()
        assert last - first <= max_seqlen_q and end - begin <= max_seqlen_k
        logits = softmax_scale * torch.einsum("qhd,kd->hqk", q[first:last], k[begin:end, 0])
        if softcap:
            logits = softcap * (logits / softcap).tanh()
        seen = torch.ones(last - first, end - begin).bool().tril(end - begin - (last - first))
        logits = logits.masked_fill(~seen, -torch.inf)
        some = seen.any(-1)
        weights = logits[:, some].softmax(-1)
        out[first:last][some] = torch.einsum("hqk,kd->qhd", weights, v[begin:end, 0])
        lse[:, first:last][:, some] = logits[:, some].logsumexp(-1)
    return out, lse, None


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """flash-attn as if it were installed and ran on CPU tensors."""
    package = SimpleNamespace(flash_attn_varlen_func=varlen)
    monkeypatch.setattr(dense_kernel, "_flash_attn_package", lambda: package)
    kernels = {("flash_attn", "cpu"): dense_kernel._flash_attn}
    monkeypatch.setattr(dense_kernel, "_KERNELS", kernels)
    monkeypatch.setattr("kvselect.attention.dense_kernel", lambda *_: "flash_attn")
    monkeypatch.setattr(dense_kernel, "dense_kernel", lambda *_: "flash_attn")


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_flash_attn_is_called_with_its_layout(softcap: float | None) -> None:
    q, k, v = make_qkv(4, 40, 90, 8, 2, 64)
    cache = filled(k, v, [90, 41, 13, 0], [0, 7, 12, 0])
    selection = draw_lists(cache, 40, [0, 9, 9, 24, 25, 40])
    assert_equals_reference(q, cache, selection, softcap=softcap)


@pytest.mark.usefixtures("stand_in")
def test_an_infinite_sum_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """flash-attn says inf where a sum is NaN; here what saw something has NaN then."""
    q, k, v = make_qkv(1, 10, 30, 2, 1, 64)
    cache = filled(k, v, [30])
    real = varlen

    def with_nan(*args: Any, **options: Any) -> tuple[Tensor, Tensor, None]:
        out, lse, _ = real(*args, **options)
        out[3], lse[:, 3] = torch.nan, torch.inf
        return out, lse, None

    package = SimpleNamespace(flash_attn_varlen_func=with_nan)
    monkeypatch.setattr(dense_kernel, "_flash_attn_package", lambda: package)
    out, lse = sparse_attention(q, cache, draw_lists(cache, 10, [0, 10]), **COPIES)
    assert out[0, 3].isnan().all() and lse[0, 3].isnan().all() and lse[0, 4:].isfinite().all()


def test_lists_shorter_than_their_blocks_give_nan_where_nobody_looks() -> None:
    """As a GPU's gather leaves them: no row for the first queries, for which kernels say 0."""
    cu_seqlens = int32(0, 3, 3, 7, 9)  # 2 heads, a row, 2 blocks of 4 queries
    out, lse = torch.zeros(4, 4, 2, 32), torch.zeros(4, 4, 2)
    lse[0, 0] = lse[1] = lse[3, :2] = -torch.inf
    seeing = torch.tensor([[[True] * 4, [False, False, True, True]]])
    got = dense_kernel._nan_where_short(out, lse, cu_seqlens, seeing)
    short = torch.zeros(4, 4, dtype=torch.bool)
    short[0, 0] = short[1, 2:] = True
    assert torch.equal(got[1].isnan(), short[..., None].expand(4, 4, 2))
    assert torch.equal(got[0].isnan(), short[..., None, None].expand(4, 4, 2, 32))
    assert (got[1][3, :2] == -torch.inf).all()  # before its row


@pytest.mark.usefixtures("stand_in")
def test_an_older_flash_attn_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = make_qkv(1, 10, 30, 2, 1, 64)
    cache = filled(k, v, [30])

    def older(*args: Any, **options: Any) -> tuple[Tensor, Tensor, None]:
        out, lse, _ = varlen(*args, **options)
        return out, lse[None], None

    package = SimpleNamespace(flash_attn_varlen_func=older)
    monkeypatch.setattr(dense_kernel, "_flash_attn_package", lambda: package)
    with pytest.raises(ValueError, match=r"shape of lse: got \(1, 2, 10\), allowed: \(2, 10\), as"):
        sparse_attention(q, cache, draw_lists(cache, 10, [0, 10]), **COPIES)


def test_which_kernel_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda, half = torch.device("cpu"), torch.device("cuda"), torch.bfloat16
    monkeypatch.setattr(dense_kernel, "_flash_attn_package", lambda: SimpleNamespace())
    assert dense_kernel.dense_kernel(cpu, half, 0.0) == "sdpa"
    assert dense_kernel.dense_kernel(cuda, half, 30.0) == "flash_attn"
    assert dense_kernel.dense_kernel(cuda, torch.float32, 0.0) == "sdpa"
    monkeypatch.setattr(dense_kernel, "_flash_attn_package", lambda: None)
    assert dense_kernel.dense_kernel(cuda, half, 0.0) == "sdpa"
    with pytest.raises(ValueError, match=r"softcap: got 30.0, allowed: none with torch's dense"):
        dense_kernel.dense_kernel(cuda, half, 30.0)


def test_flash_attn_counts_where_it_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    found = dense_kernel._flash_attn_package.__wrapped__
    package = SimpleNamespace()
    monkeypatch.setattr(dense_kernel.importlib, "import_module", {"flash_attn": package}.get)
    assert found() is package

    def broken(name: str) -> object:
        raise ImportError(f"{name}: undefined symbol")

    monkeypatch.setattr(dense_kernel.importlib, "import_module", broken)
    assert found() is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_torchs_cuda_kernels_take_our_layout_without_waiting(
    dtype: torch.dtype, head_dim: int
) -> None:
    """Shapes and devices on fake CUDA tensors: nothing is computed, nothing read back."""
    noted: FakeCuda
    with fake_cuda() as noted:
        q = torch.empty(2, 24, 4, head_dim, dtype=dtype, device="cuda")
        cache = KVCache(2, HEADS, head_dim, dtype=dtype, device="cuda", sketch=None)
        tokens = torch.empty(2, 90, HEADS, head_dim, dtype=dtype, device="cuda")
        cache.append(tokens, tokens)
        indices = torch.empty(2, 2, HEADS, 64, dtype=torch.int32, device="cuda")
        lengths = torch.empty(2, 2, HEADS, dtype=torch.int32, device="cuda")
        offsets = torch.empty(3, dtype=torch.int32, device="cuda")
        noted.forget()
        out, lse = dense_kernel.attend_gathered(
            q, cache, cache.cache_seqlens, indices, lengths, offsets, (0, 16, 24), 0.1, None, 0.0
        )
        assert (out.shape, out.dtype, out.device) == (q.shape, dtype, q.device)
        assert (lse.shape, lse.dtype, lse.device) == (q.shape[:-1], torch.float32, q.device)
    assert noted.ops == ["gather_tokens"] * 2 and not noted.reads and not noted.copies
