"""Every other backend of vLLM's CUDA platform, by its name: vLLM's own class, or a refusal.

vLLM finds a backend by the path of its class. The plug-in registers ``kvselect.integrations.vllm.
cuda_choice.<name>``, so that a policy is not ignored in silence where another backend is picked.
Without a policy the class is vLLM's own, untouched; so are those of `BESIDE_CUSTOM` where the user
picked ours.
"""

from __future__ import annotations

from typing import Any

from kvselect.checks import require
from kvselect.integrations.vllm import shim
from kvselect.integrations.vllm.config import configured_policy

BESIDE_CUSTOM = ("FLASH_ATTN", "TRITON_ATTN", "FLASHINFER")
"""For vision towers and for layers of other kinds. Models that pick one of the others themselves,
as some do whose values are narrower than their keys, would have no layer that selects.
"""


def __getattr__(name: str) -> Any:
    path = None if name.startswith("__") else shim.backend_path(name)
    if path is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    vllm_config = shim.get_current_vllm_config_or_none()
    if vllm_config is not None:
        policy = configured_policy(additional_config=vllm_config.additional_config)
        beside = name in BESIDE_CUSTOM and shim.asked_backend(vllm_config) == "CUSTOM"
        fits = policy is None or beside
        allowed = "CUSTOM with a policy of kvselect (--attention-backend CUSTOM)"
        require(fits, "attention backend", name, allowed)
    return shim.class_of(path)
