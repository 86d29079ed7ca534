"""What makes two runs the same: model, template, seed, samples, policies, versions."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

from kvselect import ops
from kvselect.eval.machine import commit, version_of

TEMPLATES = {"dialect": "dialect-1", "prose": "prose-1"}  # raise when the wording of tasks changes
_VALUES_PER_TENSOR = 256


def fingerprint(model: Any) -> str:
    """16 hex digits of a model: its configuration, and of every tensor name, shape, dtype and 256
    values."""
    config = {k: v for k, v in model.config.to_dict().items() if not k.startswith("_")}
    for told in ("transformers_version", "dtype"):  # who saved it, and what it was loaded as
        config.pop(told, None)
    state = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in model.state_dict().items():
        state.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        values = tensor.detach().flatten()
        values = values[:: max(1, values.numel() // _VALUES_PER_TENSOR)][:_VALUES_PER_TENSOR]
        state.update(values.to("cpu", torch.float64).numpy().tobytes())
    return state.hexdigest()[:16]


def code_identity() -> dict[str, Any]:
    """Versions, commit and kernels: what may change answers without being asked for."""
    return {
        "kvselect": version_of("kvselect"),
        "commit": commit(),
        "torch": str(torch.__version__),
        "transformers": version_of("transformers"),
        "cpu_implementation": ops.cpu_implementation(),
    }
