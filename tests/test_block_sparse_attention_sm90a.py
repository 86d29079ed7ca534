"""block_sparse_attention in Hopper's own instructions, from one product to many items.

``pytest -m cuda`` runs it on a GPU of architecture 9.0; without one the same tests run on the CPU's
kernels, which shows that they ask for what is right. The order is that of a search: what fails
first says most, and `where_wrong` says in which part of the results the error lies.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from block_inputs import as_csr, as_lists, random_mask
from on_device import OpsOnDevice
from op_calls import int32
from torch import Tensor

from kvselect import block_sparse_attention, reference
from kvselect.testing import TOLERANCE, make_qkv, rel_err

# The lse of logits that the tensor cores add up in float32, in an order and with roundings of their
# own: looser than what is added up in registers.
LSE_TOLERANCE = 1e-5


@pytest.fixture(params=["auto", pytest.param("sm90a", marks=pytest.mark.cuda)])
def name(request: pytest.FixtureRequest) -> Iterator[str]:
    """The implementation that is asked for."""
    if request.param == "auto":
        yield "auto"
        return
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("no GPU of architecture 9.0")
    with OpsOnDevice("cuda"):
        yield "sm90a"


def errors_of(parts: dict[str, tuple[Tensor, Tensor]]) -> str:
    found = {what: rel_err(x, y) if y.numel() else 0.0 for what, (x, y) in parts.items()}
    return ", ".join(f"{what} {error:.1e}" for what, error in found.items())


def where_wrong(
    out: Tensor, lse: Tensor, expected_out: Tensor, expected_lse: Tensor, q_block_size: int
) -> str:
    """Errors of the worst blocks, and by what parts of the kernel own: queries of a warpgroup,
    panels of 64 channels, rows of a fragment."""
    worst = []
    for row in range(out.shape[0]):
        for head in range(out.shape[2]):
            for block in range(-(-out.shape[1] // q_block_size)):
                span = slice(block * q_block_size, (block + 1) * q_block_size)
                x, y = out[row, span, head].double(), expected_out[row, span, head].double()
                wrong_lse = (lse[row, span, head] - expected_lse[row, span, head]).abs()
                wrong_lse = wrong_lse.nan_to_num(0.0, posinf=torch.inf).max().item()
                error = (x - y).norm().item() / max(y.norm().item(), 1e-30)
                nonfinite = int((~x.isfinite()).sum())
                worst.append((error, row, head, block, wrong_lse, nonfinite))
    worst.sort(key=lambda one: (one[5] > 0, one[0]), reverse=True)
    lines = [
        f"row {row} head {head} q block {block}: out {error:.1e}, lse off by {wrong_lse:.1e}, "
        f"{nonfinite} not finite"
        for error, row, head, block, wrong_lse, nonfinite in worst[:6]
    ]
    lines.append(f"blocks off by more than 2e-2: {sum(w[0] > 2e-2 for w in worst)}/{len(worst)}")
    query = torch.arange(out.shape[1]) % q_block_size
    y = expected_out.to(out.dtype)
    by_group = {
        f"queries {64 * i}..": (out[:, query // 64 == i], y[:, query // 64 == i])
        for i in range(q_block_size // 64)
    }
    by_panel = {
        f"channels {c}..": (out[..., c : c + 64], y[..., c : c + 64])
        for c in range(0, out.shape[3], 64)
    }
    by_row = {
        f"rows {8 * i}.. of 16": (out[:, query % 16 // 8 == i], y[:, query % 16 // 8 == i])
        for i in range(2)
    }
    lines += [errors_of(by_group), errors_of(by_panel), errors_of(by_row)]
    lines.append(
        "lse right and out wrong: the values' descriptor, the weights' registers, the place that "
        "they lie in. lse wrong: the logits' descriptors, the mask, what a tile is made of."
    )
    return "\n".join(lines)


def check(q: Tensor, k: Tensor, v: Tensor, mask: Any, name: str, **options: Any) -> None:
    out, lse = block_sparse_attention(q, k, v, mask, implementation=name, **options)
    expected_out, expected_lse = reference.block_sparse_attention(q, k, v, mask, **options)
    seen = expected_lse > -torch.inf
    right = (
        rel_err(out, expected_out) <= TOLERANCE[q.dtype]
        and rel_err(lse[seen], expected_lse[seen]) <= LSE_TOLERANCE
        and bool((lse[~seen] == -torch.inf).all() and (out[~seen] == 0).all())
    )
    size = options.get("q_block_size", 128)
    assert right, where_wrong(out, lse, expected_out, expected_lse, size)


def picks(head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [1, 64, 1, head_dim] that each pick one of 64 keys, and which."""
    token = torch.randperm(64, generator=torch.Generator().manual_seed(2))
    keys = torch.zeros(1, 64, 1, head_dim, dtype=torch.bfloat16)
    keys[0, :, 0, :64] = torch.eye(64)
    queries = 64.0 * keys[:, token]
    return queries, keys, token


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_each_query_reads_its_own_token_and_channel(head_dim: int, name: str) -> None:
    q, k, token = picks(head_dim)
    everything = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    sizes: dict[str, Any] = {"q_block_size": 64, "kv_block_size": 64, "causal": False}
    sizes |= {"softmax_scale": 1.0, "implementation": name}
    number = torch.arange(64, dtype=torch.bfloat16)[None, :, None, None].expand(k.shape)
    read = block_sparse_attention(q, k, number.contiguous(), everything, **sizes)[0][0, :, 0]
    wrong = ((read - token[:, None]).abs() > 1e-3).nonzero().tolist()  # others weigh e^-64
    assert not wrong, [f"query {i} channel {c} read token {read[i, c]:g}" for i, c in wrong[:8]]
    channel = torch.arange(head_dim, dtype=torch.bfloat16).expand(k.shape).contiguous()
    read = block_sparse_attention(q, k, channel, everything, **sizes)[0][0, :, 0]
    wrong = ((read - torch.arange(head_dim)).abs() > 1e-3).nonzero().tolist()
    assert not wrong, [f"query {i} channel {c} read channel {read[i, c]:g}" for i, c in wrong[:8]]


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("q_block_size", [64, 128])
def test_one_item_of_one_tile_and_of_a_ring_of_them(
    head_dim: int, q_block_size: int, name: str
) -> None:
    for tokens in (64, 128, 256, 1500):
        q, k, v = make_qkv(1, q_block_size, tokens, 1, 1, head_dim, dtype=torch.bfloat16)
        mask = torch.ones(1, 1, 1, -(-tokens // 64), dtype=torch.bool)
        check(q, k, v, mask, name, q_block_size=q_block_size, kv_block_size=64, causal=False)


@pytest.mark.parametrize("dtype, causal", [(torch.bfloat16, True), (torch.float16, False)])
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize(
    "q_block_size, kv_block_size", [(64, 64), (64, 128), (128, 16), (128, 128)]
)
def test_equals_reference(
    dtype: torch.dtype,
    causal: bool,
    head_dim: int,
    q_block_size: int,
    kv_block_size: int,
    name: str,
) -> None:
    q, k, v = make_qkv(2, 150, 301, 4, 2, head_dim, dtype=dtype)
    mask = random_mask((2, 4, -(-150 // q_block_size), -(-301 // kv_block_size)))
    options = {"q_block_size": q_block_size, "kv_block_size": kv_block_size, "causal": causal}
    for form in (mask, as_lists(mask), as_csr(mask)):
        check(q, k, v, form, name, **options)
    check(q, k, v, mask, name, softcap=2.0, **options)


def test_more_items_than_thread_blocks(name: str) -> None:
    q, k, v = make_qkv(1, 300, 320, 96, 32, 64, dtype=torch.bfloat16)  # 480 items; 264 fit
    mask = random_mask((1, 96, 5, 5))
    check(q, k, v, mask, name, q_block_size=64, kv_block_size=64)


@pytest.mark.parametrize("causal", [True, False])
def test_ragged_rows_and_what_lies_behind_them(causal: bool, name: str) -> None:
    q, k, v = make_qkv(5, 150, 290, 2, 1, 128, dtype=torch.bfloat16)
    seqlens_q, seqlens_k = int32(150, 149, 1, 0, 33), int32(290, 217, 64, 30, 0)
    for row in range(5):
        q[row, seqlens_q[row] :] = torch.nan
        k[row, seqlens_k[row] :] = v[row, seqlens_k[row] :] = torch.nan
    mask = random_mask((5, 2, 2, 3), density=0.7)
    check(q, k, v, mask, name, causal=causal, seqlens_q=seqlens_q, cache_seqlens=seqlens_k)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_bad_values_show_to_those_who_see_them(bad: float, name: str) -> None:
    q, k, v = make_qkv(1, 128, 128, 2, 1, 128, dtype=torch.bfloat16)
    mask = torch.ones(1, 2, 1, 1, dtype=torch.bool)
    expected = block_sparse_attention(q, k, v, mask, implementation=name)[0]
    v[:, 37] = bad
    out = block_sparse_attention(q, k, v, mask, implementation=name)[0]
    assert torch.equal(out[:, :37], expected[:, :37]) and not out[:, 37:].isfinite().any()


def test_few_blocks_of_very_many(name: str) -> None:
    q, k, v = make_qkv(1, 64, 16 * 5000 - 5, 1, 1, 64, dtype=torch.bfloat16)
    lists = torch.tensor([[[[4999, -1, 4096, 0, 31, 4095, 31]]]], dtype=torch.int32)
    check(q, k, v, lists, name, q_block_size=64, kv_block_size=16)


def test_same_bits_twice_and_from_every_form(name: str) -> None:
    q, k, v = make_qkv(2, 300, 700, 4, 2, 128, dtype=torch.bfloat16)
    mask = random_mask((2, 4, 3, 6))
    expected = block_sparse_attention(q, k, v, mask, implementation=name)
    for form in (mask, as_lists(mask, seed=1), as_csr(mask)):
        for x, y in zip(
            block_sparse_attention(q, k, v, form, implementation=name), expected, strict=True
        ):
            assert torch.equal(x, y)


@pytest.mark.cuda
@pytest.mark.parametrize(
    "change, message",
    [
        ({"dtype": torch.float32}, "q: got float32, allowed: float16 or bfloat16"),
        ({"head_dim": 32}, "head_dim: got 32, allowed: 64 to 256"),
        ({"q_block_size": 32}, "q_block_size: got 32, allowed: 64, 128"),
        ({"offset": 1}, "q: got rows off 16-byte boundaries"),
    ],
)
def test_what_it_does_not_take(change: dict[str, Any], message: str, name: str) -> None:
    case: dict[str, Any] = {
        "dtype": torch.bfloat16,
        "head_dim": 64,
        "q_block_size": 64,
        "offset": 0,
    }
    case |= change
    if name == "auto":
        pytest.skip("takes all of it")
    q, k, v = make_qkv(1, 64, 64, 1, 1, case["head_dim"], dtype=case["dtype"])
    if case["offset"]:
        q = torch.cat([q.flatten(), q.flatten()[:8]])[1 : 1 + q.numel()].view(q.shape)
    mask = torch.ones(1, 1, -(-64 // case["q_block_size"]), 1, dtype=torch.bool)
    options = {"q_block_size": case["q_block_size"], "kv_block_size": 64}
    with pytest.raises(ValueError, match=message):
        block_sparse_attention(q, k, v, mask, implementation=name, **options)


@pytest.mark.cuda
def test_a_gpu_of_another_architecture_is_refused() -> None:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() == (9, 0):
        pytest.skip("no GPU that is not of architecture 9.0")
    q, k, v = (x.cuda() for x in make_qkv(1, 64, 64, 1, 1, 64, dtype=torch.bfloat16))
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device="cuda")
    with pytest.raises(ValueError, match="implementation: got 'sm90a'"):
        block_sparse_attention(q, k, v, mask, implementation="sm90a")


def test_what_is_wrong_is_said_by_block_warpgroup_and_panel() -> None:
    expected = torch.randn(1, 256, 2, 128)
    lse = torch.randn(1, 256, 2)
    out = expected.clone()
    out[0, 192:256, 1, 64:] += 1.0
    said = where_wrong(out, lse, expected, lse, 128)
    assert said.startswith("row 0 head 1 q block 1: out ") and "off by more than 2e-2: 1/4" in said
    assert "queries 0.. 0.0e+00" in said and "channels 0.. 0.0e+00" in said
