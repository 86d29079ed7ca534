"""Runs every kvselect op that a test calls on another device, on copies of its tensors.

Tests build their inputs on the CPU, where the float64 reference is. Inside `OpsOnDevice` an op sees
the same sizes, strides and surrounding memory on the device, and what it writes is copied back. So
one test serves all devices.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

__all__ = ["OpsOnDevice"]


class _Copies:
    """Tensors of one call on the device; views of one memory stay views of one memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stores: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def of(self, tensor: Tensor) -> Tensor:
        store = tensor.untyped_storage()
        if store._cdata not in self._stores:
            copy = torch.empty(store.nbytes(), dtype=torch.uint8, device=self.device)
            copy.untyped_storage().copy_(store, False)
            self._stores[store._cdata] = (store, copy.untyped_storage())
        empty = torch.empty(0, dtype=tensor.dtype, device=self.device)
        copied = self._stores[store._cdata][1]
        return empty.set_(copied, tensor.storage_offset(), tensor.size(), tensor.stride())

    def copy_back(self, tensor: Tensor) -> None:
        original, copied = self._stores[tensor.untyped_storage()._cdata]
        original.copy_(copied, False)


class OpsOnDevice(TorchDispatchMode):
    """While active, ``torch.ops.kvselect`` runs on `device`; `calls` counts the ops by name."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = torch.device(device)
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor)]
        if func.namespace != "kvselect" or not tensors:
            return func(*args, **kwargs)
        name = func._schema.name.removeprefix("kvselect::")
        self.calls[name] = self.calls.get(name, 0) + 1
        copies = _Copies(self.device)
        moved = tree_map_only(Tensor, copies.of, (args, kwargs))
        results = func(*moved[0], **moved[1])
        for argument, value in zip(func._schema.arguments, args):
            self._copy_back(copies, argument, value)
        for argument in func._schema.arguments:
            if argument.name in kwargs:
                self._copy_back(copies, argument, kwargs[argument.name])
        return tree_map_only(Tensor, Tensor.cpu, results)

    @staticmethod
    def _copy_back(copies: _Copies, argument: Any, value: object) -> None:
        written = argument.alias_info is not None and argument.alias_info.is_write
        if written and isinstance(value, Tensor):
            copies.copy_back(value)
