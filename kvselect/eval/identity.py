"""What makes two runs the same: the model, the wording of tasks, the code."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

import kvselect
from kvselect import ops
from kvselect.eval.machine import version_of

TEMPLATES = {"dialect": "dialect-1", "prose": "prose-1"}  # raise when the wording of tasks changes
_VALUES_PER_TENSOR = 256


def fingerprint(model: Any) -> str:
    """16 hex digits of a model: its configuration, and of every tensor name, shape, dtype and 256
    values."""
    config = {k: v for k, v in model.config.to_dict().items() if not k.startswith("_")}
    # Who saved it and how, and what it was loaded as, which the tensors tell.
    for told in ("transformers_version", "architectures", "dtype"):
        config.pop(told, None)
    state = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in model.state_dict().items():
        state.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        values = tensor.detach().flatten()
        values = values[:: max(1, values.numel() // _VALUES_PER_TENSOR)][:_VALUES_PER_TENSOR]
        state.update(values.to("cpu", torch.float64).numpy().tobytes())
    return state.hexdigest()[:16]


def code_identity() -> dict[str, Any]:
    """Versions, and a digest of kvselect's own files: what may change answers unasked.

    Not the commit: a checkout counts as changed as soon as somebody writes results into it.
    """
    root = Path(kvselect.__file__).resolve().parent
    state = hashlib.sha256()
    for path in sorted([*root.rglob("*.py"), *root.glob("*.so")]):
        state.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return {
        "kvselect": version_of("kvselect"),
        "files": state.hexdigest()[:16],
        "torch": str(torch.__version__),
        "transformers": version_of("transformers"),
        "cpu_implementation": ops.cpu_implementation(),
    }
