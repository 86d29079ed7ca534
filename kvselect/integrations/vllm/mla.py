"""MLA is vLLM's own, or refused in one sentence: kvselect does not serve it.

vLLM asks another backend for it, so that a policy would be ignored in silence.
"""

from __future__ import annotations

from typing import Any

from kvselect.checks import require
from kvselect.integrations.vllm.config import configured_policy
from kvselect.integrations.vllm.shim import CPUMLABackend, get_current_vllm_config

__all__ = ["CheckedCPUMLA", "require_no_policy"]


def require_no_policy() -> None:
    """ValueError if there is one."""
    policy = configured_policy(additional_config=get_current_vllm_config().additional_config)
    allowed = "models without MLA, or no policy (kvselect selects keys, not latents, under vLLM)"
    require(policy is None, "attention", "MLA", allowed)


class CheckedCPUMLA(CPUMLABackend):
    """vLLM's reference MLA, unless a policy is configured."""

    @staticmethod
    def get_impl_cls() -> Any:
        require_no_policy()
        return CPUMLABackend.get_impl_cls()
