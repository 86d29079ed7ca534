"""CUDA as far as it needs no GPU: refusals, the switch, the harness of ``pytest -m cuda``."""

from __future__ import annotations

import pytest
import torch
from on_device import OpsOnDevice

from kvselect import ops, reference
from kvselect.testing import rel_err


def test_ops_on_device_sees_strides_and_copies_back_what_is_written() -> None:
    """On a second piece of CPU memory: the same views, the same bits, and nothing else changed."""
    wide = torch.full((3, 5, 7, 64), torch.nan)
    out, lse = wide[:, 1:4, ::2, 8:40], torch.randn(3, 4, 3).transpose(1, 2)
    out.copy_(torch.randn(out.shape))
    with OpsOnDevice("cpu") as harness:
        got = torch.ops.kvselect.merge_splits(out, lse)
    assert harness.calls == {"merge_splits": 1}
    for x, y in zip(got, torch.ops.kvselect.merge_splits(out, lse), strict=True):
        assert torch.equal(x, y)
    assert rel_err(got[0], reference.merge_splits(out, lse)[0]) <= 2e-6

    seqlens = torch.tensor([10], dtype=torch.int32)
    indices = torch.tensor([[[[1, 4, -1, -1], [2, -1, -1, -1]]]], dtype=torch.int32)
    lengths, kept = torch.tensor([[[2, 1]]], dtype=torch.int32), torch.zeros(1, 1, 2)
    hit = torch.ones(1, 2, dtype=torch.int32)
    with OpsOnDevice("cpu"):
        torch.ops.kvselect.select_tokens(
            torch.zeros(1, 1, 2, 10),
            seqlens,
            None,
            None,
            1,
            "decode",
            1,
            1,
            1,
            1,
            hit,
            indices,
            lengths,
            kept_score=kept,
        )
    assert indices.tolist() == [[[[1, 4, 9, -1], [2, 9, -1, -1]]]]
    assert lengths.tolist() == [[[3, 2]]] and kept.isnan().all()


CPU_OPS = sorted(
    name
    for name in torch._C._dispatch_get_registrations_for_dispatch_key("CPU")
    if name.startswith("kvselect::")
)


@pytest.mark.skipif(bool(ops.build_info()["cuda_loaded"]), reason="the CUDA module is loaded")
@pytest.mark.parametrize("name", CPU_OPS)
def test_without_the_cuda_module_cuda_tensors_are_refused(name: str) -> None:
    packet, _, overload = name.removeprefix("kvselect::").partition(".")
    op = getattr(getattr(torch.ops.kvselect, packet), overload or "default")
    arguments = [
        None if "None" in str(a.type) or a.type.kind() == "OptionalType" else example(a)
        for a in op._schema.arguments
    ]
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    message = f"{name}: got CUDA tensors, allowed: tensors on the CPU \\("
    with pytest.raises(ValueError, match=message):
        op.redispatch(keys, *arguments)


def example(argument: torch.Argument) -> object:
    kind = str(argument.type)
    return {"Tensor": torch.zeros(1), "str": "", "float": 1.0, "bool": False}.get(kind, 1)


def test_overlap_is_a_setting_of_the_cuda_module() -> None:
    with pytest.raises(TypeError, match="on: got int 1, allowed"):
        ops.set_cuda_overlap(1)  # type: ignore[arg-type]
    if ops.build_info()["cuda_loaded"]:
        ops.set_cuda_overlap(True)
        ops.set_cuda_overlap(False)
    else:
        with pytest.raises(ValueError, match="on: got True, allowed: with the CUDA module loaded"):
            ops.set_cuda_overlap(True)


@pytest.mark.cuda
def test_mixes_of_devices_are_named() -> None:
    out, lse = torch.zeros(2, 3, 32), torch.zeros(2, 3)
    with pytest.raises(ValueError, match="partial_lse: got a tensor on cpu, allowed: cuda:0"):
        torch.ops.kvselect.merge_splits(out.cuda(), lse)
    with pytest.raises(ValueError, match="partial_out: got a tensor on cpu, allowed: one CUDA"):
        torch.ops.kvselect.merge_splits(out, lse.cuda())


@pytest.mark.cuda
@pytest.mark.parametrize("overlap", [False, True])
def test_overlap_changes_no_bit(overlap: bool) -> None:
    out, lse = torch.randn(9, 50, 64).cuda(), torch.randn(9, 50).cuda()
    expected = torch.ops.kvselect.merge_splits(out, lse)
    ops.set_cuda_overlap(overlap)
    try:
        for x, y in zip(torch.ops.kvselect.merge_splits(out, lse), expected, strict=True):
            assert torch.equal(x, y)
    finally:
        ops.set_cuda_overlap(False)
