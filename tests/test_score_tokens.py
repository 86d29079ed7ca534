"""score_tokens against the float64 reference: every shape, option, layout and defect."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from op_calls import ONE_IMPLEMENTATION, Case, int32, make_case, score
from torch import Tensor

from kvselect.reference import BLOCK_TOKENS, QueryBlocks, score_query_blocks, sketched_keys
from kvselect.testing import LAYOUTS, make_qkv, rel_err, rope_tables

# Scores are float32 whatever the keys are. exp turns the rounding of a logit (2^-24 of about 10,
# and of the products it sums) into a relative error of the score, hence twice STYLE.md's bound.
TOLERANCE = 4e-6

pytestmark = pytest.mark.usefixtures("implementation")


def queries(
    batch: int, num_blocks: int, num_vectors: int, heads: int, dim: int, seed: int
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2.0 * torch.randn(batch, num_blocks, num_vectors, heads, dim, generator=generator)


def case_of(
    seqlens: Tensor,
    num_kv_heads: int = 2,
    head_dim: int = 64,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **options: Any,
) -> Case:
    longest = int(seqlens.max())
    _, k, v = make_qkv(
        len(seqlens), 1, longest, num_kv_heads, num_kv_heads, head_dim, dtype=dtype, seed=seed
    )
    return make_case(k, v, seqlens, **options)


def assert_equals_reference(
    case: Case, q: Tensor, blocks: QueryBlocks, *, rope: Any = None, **options: Any
) -> None:
    scores, lse, num_nonfinite = score(case, q, blocks, rope=rope, **options)
    expected = score_query_blocks(
        q, case.plain, blocks, softmax_scale=q.shape[-1] ** -0.5, rope=rope, **options
    )
    assert scores.dtype == lse.dtype == torch.float32
    assert torch.equal(scores.isnan(), expected.scores.isnan())
    assert rel_err(scores.nan_to_num(0.0), expected.scores.nan_to_num(0.0)) <= TOLERANCE
    assert rel_err(lse, expected.lse) <= TOLERANCE
    assert torch.equal(num_nonfinite, expected.num_nonfinite)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 160, 192, 256, 512])
def test_every_head_dim_and_dtype(head_dim: int, dtype: torch.dtype) -> None:
    seqlens = int32(97, 0, 1, 70)
    case = case_of(seqlens, head_dim=head_dim, dtype=dtype)
    blocks = QueryBlocks(cache_seqlens=seqlens, seqlen_q=1, num_sink_tokens=3, num_recent_tokens=17)
    assert_equals_reference(case, queries(4, 1, 1, 6, head_dim, seed=1), blocks)


@pytest.mark.parametrize("exact_bfloat16", [False, True])
def test_queries_that_bfloat16_holds_and_others(exact_bfloat16: bool) -> None:
    """Kernels may multiply in bfloat16 only where that rounds nothing."""
    seqlens = int32(75)
    case = case_of(seqlens, dtype=torch.bfloat16, head_dim=96)
    q = queries(1, 1, 3, 6, 96, seed=1)
    if exact_bfloat16:
        q = q.bfloat16().float()
    blocks = QueryBlocks(cache_seqlens=seqlens, seqlen_q=1)
    assert_equals_reference(case, q, blocks)


@pytest.mark.parametrize("group_size", [1, 4, 7, 8])
@pytest.mark.parametrize("num_vectors", [1, 3, 9])
def test_groups_and_vectors(group_size: int, num_vectors: int) -> None:
    seqlens = int32(67, 5)
    case = case_of(seqlens, num_kv_heads=3)
    blocks = QueryBlocks(cache_seqlens=seqlens, seqlen_q=1, num_recent_tokens=8)
    q = queries(2, 1, num_vectors, 3 * group_size, 64, seed=group_size)
    assert_equals_reference(case, q, blocks)
    assert_equals_reference(case, q, blocks, max_vote=True)


@pytest.mark.parametrize("seqlen", [1, 2, 3, 63, 64, 65, 127, 128, 129, 257])
def test_lengths_around_tiles(seqlen: int) -> None:
    seqlens = int32(seqlen)
    case = case_of(seqlens, num_kv_heads=1, head_dim=32)
    blocks = QueryBlocks(cache_seqlens=seqlens, seqlen_q=1)
    assert_equals_reference(case, queries(1, 1, 1, 2, 32, seed=2), blocks)


@pytest.mark.parametrize("num_vectors", [1, 9])  # weights kept, or made again
@pytest.mark.parametrize("softcap", [0.5, 5.0])
@pytest.mark.parametrize("options", [{}, {"max_vote": True}, {"normalise_candidates_only": True}])
def test_capped_logits_and_sinks(options: dict[str, Any], softcap: float, num_vectors: int) -> None:
    seqlens = int32(1100, 0, 40)
    case = case_of(seqlens, head_dim=32)
    blocks = QueryBlocks(cache_seqlens=seqlens, seqlen_q=1, num_sink_tokens=3, num_recent_tokens=17)
    q = 3 * queries(3, 1, num_vectors, 6, 32, seed=1)
    sinks = torch.tensor([0.0, 3.0, -3.0, 30.0, -100.0, -torch.inf])
    plain, _, _ = score(case, q, blocks, **options)
    for added in (
        {"softcap": softcap},
        {"sink_logits": sinks},
        {"softcap": 5.0, "sink_logits": sinks},
    ):
        assert_equals_reference(case, q, blocks, **options, **added)
        capped, _, _ = score(case, q, blocks, **options, **added)
        changes = "softcap" in added or not options.get("normalise_candidates_only")
        assert (rel_err(capped, plain) > 0.01) == changes


def test_sinks_take_their_share() -> None:
    """Scores are shares of each head's attention: a large sink logit leaves nothing to tokens."""
    seqlens = int32(50)
    case = case_of(seqlens, head_dim=32)
    blocks = QueryBlocks(cache_seqlens=seqlens, seqlen_q=1)
    q = queries(1, 1, 1, 2, 32, seed=1)
    scores, _, _ = score(case, q, blocks, sink_logits=torch.tensor([-torch.inf, 90.0]))
    assert scores[0, 0, 0].sum() == pytest.approx(1.0, abs=1e-5)
    assert scores[0, 0, 1].sum() < 1e-30


@pytest.mark.parametrize("seqlen", [600, 2300])  # short of a tile of whole blocks, and beyond it
@pytest.mark.parametrize("sketch", ["int4", "int8"])
def test_sketch_logits_are_capped(sketch: str, seqlen: int) -> None:
    seqlens = int32(seqlen)
    case = case_of(seqlens, head_dim=32, sketch=sketch)
    blocks = QueryBlocks(
        cache_seqlens=seqlens, seqlen_q=1, num_sink_tokens=3, num_recent_tokens=140
    )
    q = 3 * queries(1, 1, 1, 4, 32, seed=1)
    got, _, _ = score(case, q, blocks, sketch=True, softcap=2.0)
    options = {"softmax_scale": 32**-0.5, "source": "sketch"}
    expected = score_query_blocks(q, case.plain, blocks, softcap=2.0, **options).scores
    plain = score_query_blocks(q, case.plain, blocks, **options).scores
    assert rel_err(got, expected) <= 2e-2 < 0.1 < rel_err(plain, expected)


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_a_cap_does_not_hide_what_is_not_finite(bad: float) -> None:
    seqlens = int32(60)
    _, k, v = make_qkv(1, 1, 60, 2, 2, 32)
    k[0, 7, 1, 3] = bad
    case = make_case(k, v, seqlens)
    blocks = QueryBlocks(cache_seqlens=seqlens, seqlen_q=1, num_recent_tokens=9)
    assert_equals_reference(case, queries(1, 1, 1, 4, 32, seed=1), blocks, softcap=5.0)


@pytest.mark.parametrize("sketch", [None, "int4", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_layout_gives_the_same_bits(sketch: str | None, dtype: torch.dtype) -> None:
    seqlens, starts = int32(300, 129, 260, 1), int32(0, 0, 131, 0)
    blocks = QueryBlocks(
        cache_seqlens=seqlens,
        seqlen_q=1,
        starts=starts,
        num_sink_tokens=2,
        num_recent_tokens=20,
    )
    q = queries(4, 1, 2, 4, 64, seed=3)
    results = []
    for layout in LAYOUTS:
        case = case_of(seqlens, dtype=dtype, layout=layout, starts=starts)
        if sketch is not None:  # encoded from all keys: padding holds real keys in a real cache
            case.plain.sketch_format = sketch
            case.plain = make_case(case.plain.k, case.plain.v, seqlens, sketch=sketch).plain
            case.plain.starts = starts
        results.append(score(case, q, blocks, sketch=sketch is not None))
    for result in results[1:]:
        for got, first in zip(result, results[0], strict=True):
            assert torch.equal(got, first)
    assert results[0][0].isfinite().all()


def test_head_major_strides_of_a_larger_buffer() -> None:
    """A view into a wider cache: no stride but that of the last dim is the packed one."""
    seqlens = int32(50, 33)
    case = case_of(seqlens)
    wide = torch.full((5, 7, 90, 3, 64 + 8), float("nan"))
    view = wide[1:5:2, 1, ::1, 1:, 4:68][:, :60]
    view[:, :50] = case.plain.k
    q = queries(2, 1, 1, 4, 64, seed=4)
    blocks = QueryBlocks(cache_seqlens=seqlens, seqlen_q=1)
    packed = score(case, q, blocks)
    case.stored = case.stored._replace(k_cache=view)
    for got, expected in zip(score(case, q, blocks), packed, strict=True):
        assert torch.equal(got, expected)


RULES = ["decode", "block_start", "block_end"]


@pytest.mark.parametrize("window_rule", RULES)
@pytest.mark.parametrize("normalise_candidates_only", [False, True])
@pytest.mark.parametrize("sinks, recent", [(0, 0), (4, 0), (0, 16), (4, 16), (200, 16), (4, 200)])
def test_window_rules_and_ragged_blocks(
    window_rule: str, normalise_candidates_only: bool, sinks: int, recent: int
) -> None:
    seqlens, starts = int32(90, 41, 13, 0), int32(0, 7, 12, 0)
    case = case_of(seqlens, starts=starts)
    blocks = QueryBlocks(
        cache_seqlens=seqlens,
        seqlen_q=40,
        starts=starts,
        offsets=int32(0, 9, 9, 24, 25, 40),
        window_rule=window_rule,
        num_sink_tokens=sinks,
        num_recent_tokens=recent,
    )
    assert_equals_reference(
        case,
        queries(4, 5, 2, 4, 64, seed=5),
        blocks,
        normalise_candidates_only=normalise_candidates_only,
    )


def test_offsets_may_leave_queries_out() -> None:
    """Scoring needs no cover of all queries: a call may ask for some blocks only."""
    seqlens = int32(60)
    blocks = QueryBlocks(
        cache_seqlens=seqlens, seqlen_q=20, offsets=int32(3, 5, 11), window_rule="block_start"
    )
    assert_equals_reference(case_of(seqlens), queries(1, 2, 1, 2, 64, seed=6), blocks)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("start, num_pairs", [(0, 32), (0, 8), (16, 20), (6, 5)])
@pytest.mark.parametrize("local", [False, True])
def test_compact_positions(interleaved: bool, start: int, num_pairs: int, local: bool) -> None:
    seqlens, starts = int32(83, 30, 3), int32(0, 11, 0)
    case = case_of(seqlens, starts=starts)
    cos, sin = rope_tables(60, num_pairs, base=100.0)
    rope = SimpleNamespace(cos=cos, sin=sin, start=start, interleaved=interleaved)
    blocks = QueryBlocks(
        cache_seqlens=seqlens,
        seqlen_q=1,
        starts=starts,
        num_sink_tokens=5,
        num_recent_tokens=16,
    )
    q_local = queries(3, 1, 2, 4, 64, seed=8) if local else None
    q = queries(3, 1, 2, 4, 64, seed=7)
    for keep in (0, 10, 1000):
        if keep == 1000:
            cos, sin = rope_tables(90, num_pairs, base=100.0)
            rope = SimpleNamespace(cos=cos, sin=sin, start=start, interleaved=interleaved)
        assert_equals_reference(case, q, blocks, rope=rope, keep=keep, q_local=q_local)


def test_compact_positions_in_a_prefill_block() -> None:
    seqlens = int32(83)
    cos, sin = rope_tables(90, 32)
    blocks = QueryBlocks(
        cache_seqlens=seqlens,
        seqlen_q=30,
        offsets=int32(0, 14, 30),
        window_rule="block_start",
        num_sink_tokens=5,
        num_recent_tokens=16,
    )
    assert_equals_reference(
        case_of(seqlens),
        queries(1, 2, 2, 4, 64, seed=9),
        blocks,
        rope=SimpleNamespace(cos=cos, sin=sin, start=0, interleaved=False),
        keep=12,
        q_local=queries(1, 2, 2, 4, 64, seed=10),
    )


def test_local_queries_without_rotation() -> None:
    seqlens = int32(50)
    blocks = QueryBlocks(cache_seqlens=seqlens, seqlen_q=1, num_sink_tokens=5, num_recent_tokens=10)
    assert_equals_reference(
        case_of(seqlens),
        queries(1, 1, 2, 4, 64, seed=11),
        blocks,
        q_local=queries(1, 1, 2, 4, 64, seed=12),
    )


# ---- the sketch


def logit_bound(case: Case, q: Tensor, row: int, kv_head: int) -> Tensor:
    """How far each token's scaled logit may be from the decoded sketch's: the query is rounded.

    int4: products q * step become int8 per block; int8: 16 bits. Rounding errs by half a unit, and
    codes count from the middle of their range. Returns [seqlen], for q [head_dim].
    """
    sketch_format = case.plain.sketch_format
    levels, top = (15, 127) if sketch_format == "int4" else (255, 32639)
    seqlen, head_dim = int(case.plain.cache_seqlens[row]), q.shape[-1]
    bound = torch.zeros(seqlen, dtype=torch.float64)
    assert case.plain.sketch_data is not None
    for block in range(seqlen // BLOCK_TOKENS):
        data = case.plain.sketch_data[row, kv_head, block]
        step = data[: 2 * head_dim].view(torch.half).double()
        lo = data[2 * head_dim : 4 * head_dim].view(torch.half).double()
        tokens = slice(block * BLOCK_TOKENS, (block + 1) * BLOCK_TOKENS)
        decoded = sketched_keys(case.plain, row, kv_head)[tokens]
        codes = ((decoded - lo) / step.clamp_min(1e-30)).round()
        unit = (q.double() * step).abs().max() / top
        bound[tokens] = 0.5 * unit * (codes - levels / 2).abs().sum(-1)
    return bound * head_dim**-0.5


def assert_inside_bound(case: Case, q: Tensor, blocks: QueryBlocks) -> None:
    """Logits of candidates lie near the decoded sketch's, the others at the keys'.

    One query head per KV head and one vector: a logit is log(score) + lse. Scores that float32
    cannot hold are left out.
    """
    head_dim = q.shape[-1]
    scores, lse, num_nonfinite = score(case, q, blocks, sketch=True)
    assert (num_nonfinite == 0).all()
    far_from_the_keys = 0.0
    for row in range(q.shape[0]):
        at = blocks.range(row, 0)
        for head in range(q.shape[3]):
            vector = q[row, 0, 0, head].double()
            logits = scores[row, 0, head, : at.end].double().log() + lse[row, 0, 0, head]
            exact = case.plain.k[row, : at.end, head].double() @ vector * head_dim**-0.5
            decoded = sketched_keys(case.plain, row, head) @ vector * head_dim**-0.5
            bound = logit_bound(case, vector, row, head) + 2e-5 * max(1.0, float(exact.abs().max()))
            held = scores[row, 0, head, : at.end] > 1e-37
            middle = held & (torch.arange(at.end) >= at.sink_end)
            middle &= torch.arange(at.end) < at.window_start
            assert ((logits - decoded).abs() <= bound)[middle].all()
            assert ((logits - exact).abs() <= bound)[held & ~middle].all()
            far_from_the_keys = max(far_from_the_keys, float((decoded - exact)[middle].abs().max()))
    assert far_from_the_keys > 1e-3  # or else the keys themselves had been scored


@pytest.mark.parametrize("sketch", ["int4", "int8"])
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 160, 192, 256, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sketch_logits_stay_inside_the_analytic_bound(
    sketch: str, head_dim: int, dtype: torch.dtype
) -> None:
    seqlens = int32(420, 128)
    case = case_of(seqlens, head_dim=head_dim, dtype=dtype, sketch=sketch)
    blocks = QueryBlocks(cache_seqlens=seqlens, seqlen_q=1, num_sink_tokens=7, num_recent_tokens=50)
    assert_inside_bound(case, queries(2, 1, 1, 2, head_dim, seed=13), blocks)


@pytest.mark.parametrize("sketch", ["int4", "int8"])
@pytest.mark.parametrize("rise", [1.0, 60.0])
def test_tiles_of_whole_sketch_blocks(sketch: str, rise: float) -> None:
    """Weighed against their first block, however far the logits of a later block rise above it."""
    seqlens = int32(3300, 2048)
    case = case_of(seqlens, head_dim=32, seed=30)
    k = case.plain.k.clone()
    k[:, 11 * BLOCK_TOKENS : 12 * BLOCK_TOKENS] *= rise
    case = make_case(k, case.plain.v, seqlens, sketch=sketch)
    blocks = QueryBlocks(cache_seqlens=seqlens, seqlen_q=1, num_sink_tokens=4, num_recent_tokens=9)
    assert_inside_bound(case, queries(2, 1, 1, 2, 32, seed=31), blocks)


@pytest.mark.parametrize("sketch", ["int4", "int8"])
@pytest.mark.parametrize("token", [1400, 2150])  # in a tile of whole blocks, and in the last one
def test_a_logit_of_codes_that_falls_to_minus_infinity(sketch: str, token: int) -> None:
    """Its weight would be 0 as if it had been scored: it has no score instead."""
    k = torch.full((1, 2200, 1, 32), 1e-3)
    k[:, token] = -4e4
    case = make_case(k, k, int32(2200), sketch=sketch)
    blocks = QueryBlocks(cache_seqlens=int32(2200), seqlen_q=1)
    q = torch.full((1, 1, 1, 2, 32), 2e33)
    scores, _, num_nonfinite = score(case, q, blocks, sketch=True)
    assert scores[0, 0, 0, token].isnan() and (num_nonfinite >= 1).all()
    assert scores[0, 0, 0, :1024].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_queries_as_the_model_made_them(dtype: torch.dtype) -> None:
    """Queries of any dtype of a cache score as their float32 values do, to the bit."""
    seqlens = int32(700, 33)
    case = case_of(seqlens, dtype=dtype, sketch="int4")
    blocks = QueryBlocks(cache_seqlens=seqlens, seqlen_q=1, num_recent_tokens=8)
    q = queries(2, 1, 2, 4, 64, seed=32).to(dtype)
    for got, wide in zip(
        score(case, q, blocks, sketch=True),
        score(case, q.float(), blocks, sketch=True),
        strict=True,
    ):
        assert torch.equal(got, wide)


@pytest.mark.parametrize("sketch", ["int4", "int8"])
@pytest.mark.parametrize("num_vectors, group_size", [(1, 1), (1, 4), (3, 7), (2, 8)])
def test_sketch_scores_of_groups(sketch: str, num_vectors: int, group_size: int) -> None:
    seqlens, starts = int32(300, 256, 100, 0), int32(0, 130, 3, 0)
    case = case_of(seqlens, sketch=sketch)
    case.plain.starts = starts
    blocks = QueryBlocks(
        cache_seqlens=seqlens,
        seqlen_q=1,
        starts=starts,
        num_sink_tokens=3,
        num_recent_tokens=40,
    )
    q = queries(4, 1, num_vectors, 2 * group_size, 64, seed=14)
    scores, lse, _ = score(case, q, blocks, sketch=True)
    expected = score_query_blocks(q, case.plain, blocks, softmax_scale=0.125, source="sketch")
    # int4 rounds products of the query to 8 bits: about 1 part in 127 per channel, averaging out
    assert rel_err(scores, expected.scores) <= (3e-2 if sketch == "int4" else 2e-4)
    assert rel_err(lse, expected.lse) <= (1e-2 if sketch == "int4" else 1e-4)


@pytest.mark.parametrize("sketch", ["int4", "int8"])
def test_columns_do_not_see_each_other(sketch: str) -> None:
    """A head's weights are the same bits alone and among others, straddled blocks included."""
    seqlens = int32(330)
    case = case_of(seqlens, num_kv_heads=1, sketch=sketch)
    blocks = QueryBlocks(cache_seqlens=seqlens, seqlen_q=1, num_sink_tokens=9, num_recent_tokens=60)
    q = queries(1, 1, 7, 1, 64, seed=15)
    _, together, _ = score(case, q, blocks, sketch=True)
    for vector in range(7):
        alone = score(case, q[:, :, vector : vector + 1], blocks, sketch=True)[1]
        assert torch.equal(alone[:, :, 0], together[:, :, vector])


def test_sketch_in_prefill_blocks() -> None:
    """Blocks that end inside the new tokens are masked by position; unfinished ones use keys."""
    seqlens = int32(300, 210)
    case = case_of(seqlens, sketch="int8")
    blocks = QueryBlocks(
        cache_seqlens=seqlens,
        seqlen_q=150,
        offsets=int32(0, 50, 100, 150),
        window_rule="block_start",
        num_sink_tokens=4,
        num_recent_tokens=16,
    )
    q = queries(2, 3, 2, 4, 64, seed=16)
    scores, _, _ = score(case, q, blocks, sketch=True)
    expected = score_query_blocks(q, case.plain, blocks, softmax_scale=0.125, source="sketch")
    assert rel_err(scores, expected.scores) <= 2e-4
    assert torch.equal(scores == 0, expected.scores == 0)


def test_constant_channels_and_zero_queries_in_a_sketch() -> None:
    seqlens = int32(256)
    _, k, v = make_qkv(1, 1, 256, 1, 1, 64)
    k[:, :, :, :60] = 1.5
    k[:, 128:] = -2.0
    case = make_case(k, v, seqlens, sketch="int4")
    q = queries(1, 1, 2, 1, 64, seed=17)
    q[0, 0, 1] = 0.0
    blocks = QueryBlocks(cache_seqlens=seqlens, seqlen_q=1)
    scores, lse, _ = score(case, q, blocks, sketch=True)
    expected = score_query_blocks(q, case.plain, blocks, softmax_scale=0.125, source="sketch")
    assert rel_err(scores, expected.scores) <= 3e-2
    assert rel_err(lse[:, :, 1], torch.tensor([[[256.0]]]).log()) <= TOLERANCE


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e6])
def test_block_without_codes_is_scored_from_its_keys(bad: float) -> None:
    seqlens = int32(384)
    _, k, v = make_qkv(1, 1, 384, 1, 1, 64)
    k[0, 200, 0, 5] = bad
    case = make_case(k, v, seqlens, sketch="int4")
    q = queries(1, 1, 1, 1, 64, seed=18)
    q[..., 5] = 1e-5
    blocks = QueryBlocks(cache_seqlens=seqlens, seqlen_q=1, num_recent_tokens=10)
    scores, _, num_nonfinite = score(case, q, blocks, sketch=True)
    expected = score_query_blocks(q, case.plain, blocks, softmax_scale=0.125, source="sketch")
    assert torch.equal(scores.isnan(), expected.scores.isnan())
    assert torch.equal(num_nonfinite, expected.num_nonfinite)
    logits = scores[0, 0, 0, 128:256].double()
    exact = expected.scores[0, 0, 0, 128:256]
    ratio = (logits / exact)[exact.isfinite()]
    assert ratio.std() <= 1e-5 * ratio.mean()  # only the normaliser differs, by other blocks' codes


# ---- what is not finite, and nothing at all


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("max_vote", [False, True])
def test_keys_that_are_not_finite(bad: float, max_vote: bool) -> None:
    seqlens, starts = int32(60, 60), int32(0, 30)
    _, k, v = make_qkv(2, 1, 60, 2, 2, 64)
    for position in (1, 30, 59):  # sink, candidate, recent
        k[0, position, 0, 3] = bad
    k[1, 5, 1, 3] = bad  # in the padding: nobody looks
    case = make_case(k, v, seqlens, starts=starts)
    blocks = QueryBlocks(
        cache_seqlens=seqlens,
        seqlen_q=1,
        starts=starts,
        num_sink_tokens=4,
        num_recent_tokens=8,
    )
    assert_equals_reference(case, queries(2, 1, 2, 8, 64, seed=19), blocks, max_vote=max_vote)


def test_all_keys_not_finite() -> None:
    seqlens = int32(20)
    _, k, v = make_qkv(1, 1, 20, 1, 1, 64)
    case = make_case(k * float("nan"), v, seqlens)
    blocks = QueryBlocks(cache_seqlens=seqlens, seqlen_q=1)
    scores, lse, num_nonfinite = score(case, queries(1, 1, 1, 2, 64, seed=20), blocks)
    assert scores.isnan().all()
    assert (lse == -torch.inf).all()
    assert num_nonfinite.item() == 20


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("max_vote", [False, True])
def test_queries_that_are_not_finite(bad: float, max_vote: bool) -> None:
    seqlens = int32(40, 40)
    q = queries(2, 1, 3, 4, 64, seed=21)
    q[0, 0, 0, 0, 0] = bad
    q[0, 0, 1, 3, 63] = bad
    q[1, 0, :, 2:] = bad  # every vector of KV head 1
    blocks = QueryBlocks(cache_seqlens=seqlens, seqlen_q=1, num_sink_tokens=2, num_recent_tokens=9)
    case = case_of(seqlens)
    assert_equals_reference(case, q, blocks, max_vote=max_vote)
    q_local = queries(2, 1, 3, 4, 64, seed=22)
    q_local[0, 0, 2, 1, 1] = bad
    assert_equals_reference(case, q, blocks, max_vote=max_vote, q_local=q_local)
    scores, _, num_nonfinite = score(case, q, blocks)
    assert (scores[1, 0, 1] == 0).all()
    assert num_nonfinite.tolist() == [[[1, 1]], [[0, 6]]]


def test_empty_rows() -> None:
    seqlens = int32(0, 5)
    starts = int32(0, 5)  # row 1 holds padding alone
    case = case_of(seqlens, starts=starts)
    blocks = QueryBlocks(cache_seqlens=seqlens, seqlen_q=1, starts=starts)
    q = queries(2, 1, 1, 4, 64, seed=23)
    scores, lse, num_nonfinite = score(case, q, blocks, max_seqlen_k=9)
    assert scores.shape == (2, 1, 2, 9)
    assert (scores == 0).all()
    assert (lse == -torch.inf).all()
    assert (num_nonfinite == 0).all()


def test_first_prefill_block_sees_nothing() -> None:
    seqlens = int32(12)
    case = case_of(seqlens)
    blocks = QueryBlocks(
        cache_seqlens=seqlens, seqlen_q=12, offsets=int32(0, 6, 12), window_rule="block_start"
    )
    scores, lse, _ = score(case, queries(1, 2, 1, 2, 64, seed=24), blocks)
    assert (scores[0, 0] == 0).all()
    assert (lse[0, 0] == -torch.inf).all()
    assert scores[0, 1, 0].sum() == pytest.approx(1.0)


def test_scores_beyond_the_length_are_zero() -> None:
    seqlens = int32(7)
    blocks = QueryBlocks(cache_seqlens=seqlens, seqlen_q=1)
    q = queries(1, 1, 1, 2, 64, seed=25)
    scores, _, _ = score(case_of(seqlens), q, blocks, max_seqlen_k=70)
    assert (scores[..., 7:] == 0).all()
    assert (scores[..., :7] > 0).all()


def test_equal_and_huge_logits() -> None:
    seqlens = int32(100)
    _, k, v = make_qkv(1, 1, 100, 1, 1, 64)
    blocks = QueryBlocks(cache_seqlens=seqlens, seqlen_q=1)
    zero = torch.zeros(1, 1, 1, 2, 64)
    scores, lse, _ = score(make_case(k, v, seqlens), zero, blocks)
    assert rel_err(scores, torch.full_like(scores, 0.02)) <= TOLERANCE
    assert rel_err(lse, torch.full_like(lse, 100.0).log()) <= TOLERANCE
    huge = queries(1, 1, 1, 2, 64, seed=26) * 1e4
    scores, lse, _ = score(make_case(k, v, seqlens), huge, blocks)
    assert scores.isfinite().all() and lse.isfinite().all()
    assert scores.sum() == pytest.approx(2.0, rel=1e-6)


def test_scale_is_applied_once() -> None:
    seqlens = int32(40)
    case = case_of(seqlens)
    q = queries(1, 1, 1, 2, 64, seed=27)
    blocks = QueryBlocks(cache_seqlens=seqlens, seqlen_q=1)
    scores, lse, _ = score(case, q, blocks, scale=0.7)
    expected = score_query_blocks(q, case.plain, blocks, softmax_scale=0.7)
    assert rel_err(scores, expected.scores) <= 5 * TOLERANCE  # logits five times as large
    assert rel_err(lse, expected.lse) <= TOLERANCE


# ---- reused lists


def test_hit_leaves_lists_alone() -> None:
    seqlens = int32(80, 61)
    case = case_of(seqlens)
    q = queries(2, 1, 1, 4, 64, seed=28)
    blocks = QueryBlocks(cache_seqlens=seqlens, seqlen_q=1)
    every = score(case, q, blocks)
    hit = torch.tensor([[1, 0], [0, 7]], dtype=torch.int32)
    some = score(case, q, blocks, hit=hit)
    for row, head in ((0, 1), (1, 0)):
        assert torch.equal(some[0][row, 0, head], every[0][row, 0, head])
        heads = slice(2 * head, 2 * head + 2)
        assert torch.equal(some[1][row, 0, 0, heads], every[1][row, 0, 0, heads])
    assert (some[1][0, 0, 0, :2] == -torch.inf).all()
    assert (some[2] == 0).all()


# ---- one test per message


def bad_call(**change: Any) -> None:
    seqlens = int32(130, 20)
    case = case_of(seqlens, sketch="int4")
    q = queries(2, 2, 1, 4, 64, seed=29)
    blocks = QueryBlocks(
        cache_seqlens=seqlens, seqlen_q=8, offsets=int32(0, 4, 8), window_rule="block_start"
    )
    score(case, change.pop("q", q), blocks, **change)


ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"num_sink_tokens": -1}, "num_sink_tokens: got -1, allowed: an int >= 0"),
    ({"num_recent_tokens": -2}, "num_recent_tokens: got -2, allowed: an int >= 0"),
    ({"keep": -1}, "keep: got -1, allowed: an int >= 0"),
    ({"max_seqlen_k": -1}, "max_seqlen_k: got -1, allowed: an int >= 0"),
    ({"max_seqlen_k": 129}, r"max_seqlen_k: got 129, allowed: at least cache_seqlens\[0\] = 130"),
    ({"seqlen_q": -1}, "seqlen_q: got -1, allowed: an int >= 0"),
    ({"window_rule": "end"}, "window_rule: got 'end', allowed: decode, block_start, block_end"),
    ({"q": torch.zeros(2, 2, 1, 4, 64).double()}, "q: got float64, allowed: float32, float16"),
    ({"q": torch.zeros(2, 2, 4, 64)}, r"q: got shape \[2, 2, 4, 64\], allowed: \[batch, num_blo"),
    ({"q": torch.zeros(2, 3, 1, 4, 64)}, r"q: got shape \[2, 3, 1, 4, 64\], .*num_blocks=2"),
    ({"q": torch.zeros(2, 2, 1, 4, 32)}, r"q: got shape .*head_dim=64"),
    ({"q": torch.zeros(2, 2, 1, 3, 64)}, "num_q_heads: got 3, allowed: a multiple of num_kv_head"),
    ({"q": torch.zeros(2, 2, 2049, 4, 64)}, "num_vectors: got 2049, allowed: at most 2048 with 4"),
    ({"q": torch.zeros(2, 2, 1, 4, 65)[..., :64]}, r"q: got strides .*a contiguous tensor"),
    ({"q_local": torch.zeros(2, 2, 2, 4, 64)}, r"q_local: got shape \[2, 2, 2, 4, 64\]"),
    ({"q_local": torch.zeros(2, 2, 1, 4, 64).half()}, "q_local: got float16, allowed: float32"),
    ({"k_cache": torch.zeros(2, 130, 64)}, r"k_cache: got shape \[2, 130, 64\], allowed: \[num_b"),
    ({"k_cache": torch.zeros(3, 130, 2, 64)}, "k_cache: got 3 rows, allowed: batch = 2 without"),
    ({"k_cache": torch.zeros(2, 130, 2, 64).long()}, "k_cache: got int64, allowed: float32, flo"),
    ({"k_cache": torch.zeros(2, 130, 64, 2).mT}, r"k_cache: got strides .*1 in the last dim"),
    ({"k_cache": torch.zeros(2, 130, 2, 48)}, "head_dim: got 48, allowed: 32, 64, 80, 96, 128"),
    ({"k_cache": torch.zeros(2, 130, 0, 64)}, "num_kv_heads: got 0, allowed: an int >= 1"),
    ({"k_cache": torch.zeros(2, 129, 2, 64)}, "cache_seqlens: got 130 tokens in row 0, allowed: "),
    ({"cache_seqlens": int32(130)}, r"cache_seqlens: got shape \[1\], allowed: \[batch=2\]"),
    ({"cache_seqlens": torch.tensor([130, 20])}, "cache_seqlens: got int64, allowed: int32"),
    ({"cache_seqlens": int32(130, -1)}, "cache_seqlens: got -1 in row 1, allowed: an int >= 0"),
    ({"cache_seqlens": int32(9, 0, 9, 0)[::2]}, r"cache_seqlens: got strides \[2\]"),
    ({"starts": int32(0, 0, 0)}, r"starts: got shape \[3\], allowed: \[batch=2\]"),
    ({"block_table": int32(0, 1)}, r"block_table: got shape \[2\], allowed: \[batch=2, max_num_"),
    ({"block_table": int32(0, 1).view(2, 1).long()}, "block_table: got int64, allowed: int32"),
    ({"block_table": int32(0, 2).view(2, 1)}, r"block_table: got page 2 at \[1, 0\], allow"),
    ({"block_table": int32(-1, 1).view(2, 1)}, r"block_table: got page -1 at \[0, 0\]"),
    ({"q_block_offsets": int32(0, 5, 4)}, "q_block_offsets: got 4 at 2, allowed: ascending from"),
    ({"q_block_offsets": int32(0, 5, 9)}, "q_block_offsets: got 9 at 2, allowed: ascending from"),
    ({"q_block_offsets": int32()}, "q_block_offsets: got no entry"),
    ({"q_block_offsets": torch.tensor([0, 4, 8])}, "q_block_offsets: got int64, allowed: int32"),
    ({"sketch": True, "sketch_format": "int2"}, "sketch_format: got 'int2', allowed: int4, int8"),
    ({"sketch": True, "sketch_format": "none"}, "sketch_format: got 'none' with a sketch"),
    ({"sketch": True, "sketch_format": "int8"}, r"sketch: got shape .*block_bytes=8448"),
    ({"cos": torch.zeros(200, 32)}, "sin: got None, allowed: a tensor, like cos"),
    ({"sin": torch.zeros(200, 32)}, "sin: got a tensor, allowed: None, like cos"),
]


@ONE_IMPLEMENTATION
@pytest.mark.parametrize("change, message", ERRORS, ids=[e[1][:44] for e in ERRORS])
def test_error_messages(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bad_call(**change)


@ONE_IMPLEMENTATION
def test_errors_of_rotation_tables() -> None:
    table = torch.zeros(200, 32)

    def call(cos: Tensor, sin: Tensor, **options: Any) -> None:
        rope = SimpleNamespace(cos=cos, sin=sin, start=options.pop("start", 0), interleaved=False)
        bad_call(rope=rope, **options)

    with pytest.raises(ValueError, match="cos: got float64, allowed: float32"):
        call(table.double(), table)
    with pytest.raises(ValueError, match=r"sin: got shape \[199, 32\]"):
        call(table, table[:199])
    with pytest.raises(ValueError, match="rope_start: got 2 with 32 pairs, allowed: rotated"):
        call(table, table, start=2)
    with pytest.raises(ValueError, match="cos: got 20 positions, allowed: at least 50"):
        call(table[:20], table[:20], keep=10, num_sink_tokens=4, num_recent_tokens=32)


@ONE_IMPLEMENTATION
def test_errors_of_the_sketch_and_hit() -> None:
    with pytest.raises(ValueError, match="sketch: got 0 blocks, allowed: at least 1 for 130 tok"):
        seqlens = int32(130)
        case = case_of(seqlens, sketch="int4")
        assert case.plain.sketch_data is not None
        case.plain.sketch_data = case.plain.sketch_data[:, :, :0]
        blocks = QueryBlocks(cache_seqlens=seqlens, seqlen_q=1)
        score(case, queries(1, 1, 1, 2, 64, seed=30), blocks, sketch=True)
    with pytest.raises(ValueError, match="hit: got 4 lists, allowed: 1 or num_kv_heads = 2"):
        bad_call(hit=torch.zeros(2, 4, dtype=torch.int32))
    with pytest.raises(
        ValueError, match=r"hit: got shape \[3, 2\], allowed: \[batch=2, num_lists\]"
    ):
        bad_call(hit=torch.zeros(3, 2, dtype=torch.int32))


def reuse_arguments(q: Tensor, num_kv_heads: int, num_lists: int) -> dict[str, Any]:
    """A selection cache whose lists all hit: the query is its own anchor."""
    batch = q.shape[0]
    return {
        "softcap": 0.0,
        "sink_logits": None,
        "ranking": None,
        "sketch_in_pages": False,
        "hit": torch.full((batch, num_lists), 7, dtype=torch.int32),
        "compared_q": q,
        "cache_nonfinite": torch.zeros(batch, num_kv_heads, dtype=torch.int64),
        "similarity": "min",
        "similarity_threshold": 0.9,
        "max_age": 4,
        "dense_limit": 0,
        "anchor_query": q[:, 0].float().clone(),
        "age": torch.zeros(batch, num_lists, dtype=torch.int32),
        "expected_seqlens": torch.full((batch,), -1, dtype=torch.int32),
        "known_nonfinite": torch.zeros(batch, num_lists, dtype=torch.int64),
        "reuse_counts": torch.zeros(2, dtype=torch.int64),
    }


@pytest.mark.parametrize("num_lists", [1, 2])
def test_a_scan_decides_which_lists_it_leaves_alone(num_lists: int) -> None:
    """The rule is that of selection_cache_step, whose tests ask both."""
    seqlens = int32(80, 61, 33)
    case = case_of(seqlens)
    q = queries(3, 1, 1, 4, 64, seed=28)
    blocks = QueryBlocks(cache_seqlens=seqlens, seqlen_q=1)
    every = score(case, q, blocks)
    reuse = reuse_arguments(q[:, 0], 2, num_lists)
    reuse["expected_seqlens"] = seqlens - int32(0, 0, 1)  # the last row's lists are void
    reuse["anchor_query"][1, 3] *= -1.0  # a head of row 1 turned away
    reuse["age"][0, -1] = 4 * (num_lists - 1)  # too old: the second list of row 0
    some = score(case, q, blocks, **reuse)
    want = [[1], [0], [0]] if num_lists == 1 else [[1, 0], [1, 0], [0, 0]]
    assert reuse["hit"].tolist() == want
    assert reuse["reuse_counts"].tolist() == ([1, 160] if num_lists == 1 else [2, 80 + 61])
    assert reuse["expected_seqlens"].tolist() == [81, 62, 34]
    for row in range(3):
        for head in range(2):
            heads = slice(2 * head, 2 * head + 2)
            if want[row][head % num_lists]:
                assert (some[1][row, 0, 0, heads] == -torch.inf).all()
                assert some[2][row, 0, head] == 0
            else:
                assert torch.equal(some[0][row, 0, head], every[0][row, 0, head])
                assert torch.equal(some[1][row, 0, 0, heads], every[1][row, 0, 0, heads])


SCORED = queries(2, 1, 1, 4, 64, seed=29)
REUSE_ERRORS: list[tuple[dict[str, Any], str]] = [
    (
        {"compared_q": SCORED[:, 0].half(), "anchor_query": SCORED[:, 0, 0]},
        "compared_q: got float16, allowed: float32",
    ),
    (
        {"compared_q": SCORED[:, 0, :, :2], "anchor_query": SCORED[:, 0, 0, :2].contiguous()},
        r"compared_q: got shape \[2, 1, 2, 64\], allowed: \[batch=2, seqlen_q=1, num_q_heads=4, h",
    ),
    (
        {"age": torch.zeros(2, 1).int(), "known_nonfinite": torch.zeros(2, 1).long()},
        "age: got 1 lists, allowed: as many as hit, 2",
    ),
    (
        {"cache_nonfinite": torch.zeros(2, 1).long(), "age": torch.zeros(2, 1).int()}
        | {"known_nonfinite": torch.zeros(2, 1).long()},
        r"cache_nonfinite: got shape \[2, 1\], allowed: \[batch=2, num_kv_heads=2\]",
    ),
    ({"max_age": 0}, "max_age: got 0, allowed: an int >= 1"),
    ({"blocks": 2}, "q: got 2 blocks of queries, allowed: 1 with a selection cache"),
]


@ONE_IMPLEMENTATION
@pytest.mark.parametrize("change, message", REUSE_ERRORS, ids=[e[1][:44] for e in REUSE_ERRORS])
def test_errors_of_the_selection_cache(change: dict[str, Any], message: str) -> None:
    seqlens = int32(130, 20)
    reuse = reuse_arguments(SCORED[:, 0], 2, 2) | change
    num_blocks = reuse.pop("blocks", 1)
    offsets = None if num_blocks == 1 else int32(0, 1, 2)
    blocks = QueryBlocks(cache_seqlens=seqlens, seqlen_q=num_blocks, offsets=offsets)
    before = {name: value.clone() for name, value in reuse.items() if isinstance(value, Tensor)}
    with pytest.raises(ValueError, match=message):
        score(case_of(seqlens), SCORED.repeat(1, num_blocks, 1, 1, 1), blocks, **reuse)
    assert all(torch.equal(reuse[name], value) for name, value in before.items())
