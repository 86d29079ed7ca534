"""CUDA tensors without a GPU: shapes, dtypes and devices of real code, no numbers.

torch's FakeTensorMode plays CUDA tensors on any machine, so that a whole decode step of an attached
model can run "on CUDA" here: a tensor left on the CPU raises, and `FakeCuda` notes what a GPU would
have to wait for. What the kernels compute is not looked at: `pytest -m cuda` does that on a GPU.
"""

from __future__ import annotations

import ctypes
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._C._autograd import DeviceType
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import kvselect

__all__ = ["FakeCuda", "fake_cuda", "to_fake_cuda"]


class FakeCuda(TorchDispatchMode):
    """Notes what crosses between the device and the host.

    Attributes
    ----------
    reads : list of str
        Where a number was read back from the device (a synchronisation); it reads as 0.
    copies : list of str
        Where a tensor was copied from one to the other (what a CUDA graph cannot capture).
    ops : list of str
        Names of the kvselect ops that ran.
    """

    def __init__(self) -> None:
        super().__init__()
        self.forget()

    def forget(self) -> None:
        self.reads: list[str] = []
        self.copies: list[str] = []
        self.ops: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self.reads.append(_place())
            return 0
        if func.namespace == "kvselect":
            self.ops.append(func._schema.name.removeprefix("kvselect::"))
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            devices = {x.device.type for x in (out, *args) if isinstance(x, Tensor)}
            # A number that torch wraps for arithmetic is an argument of the launch, no copy.
            if len(devices) > 1 and func.overloadpacket in (
                torch.ops.aten._to_copy,
                torch.ops.aten.copy_,
            ):
                self.copies.append(_place())
        return out


def _place() -> str:
    package = str(Path(kvselect.__file__).parent)
    frames = [f for f in traceback.extract_stack() if f.filename.startswith(package)]
    return " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(frames[-4:]))


@contextmanager
def fake_cuda() -> Iterator[FakeCuda]:
    """While active, ``device="cuda"`` makes fake tensors; real ones count as fake CPU ones."""
    with _device_guard(), FakeTensorMode(allow_non_fake_inputs=True), FakeCuda() as noted:
        yield noted


@contextmanager
def _device_guard() -> Iterator[None]:
    """Some operators ask for the device's guard first, which a torch without CUDA does not have.

    The guard of meta tensors does nothing, which is what fake ones need. torch registers such a one
    itself where it has CUDA but finds no GPU.
    """
    if torch.version.cuda is not None:
        yield
        return
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    slots = (ctypes.c_void_p * 20).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    cuda, meta = int(DeviceType.CUDA), int(DeviceType.Meta)
    assert slots[cuda] is None and slots[meta] is not None
    slots[cuda] = slots[meta]
    try:
        # A torch without CUDA cannot tell.
        with mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: False):
            yield
    finally:
        slots[cuda] = None


def to_fake_cuda(model: nn.Module) -> None:
    """Replace what a model holds by fake CUDA tensors, as ``model.to("cuda")`` would; inside."""

    def moved(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")

    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(moved(parameter), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = moved(buffer)
