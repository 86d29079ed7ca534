"""MLA is vLLM's own, or refused in one sentence: kvselect does not serve it.

vLLM asks another backend for it, so that a policy would be ignored in silence.
"""

from __future__ import annotations

from typing import Any

from kvselect.checks import require
from kvselect.integrations.vllm.config import configured_policy
from kvselect.integrations.vllm.shim import AMXMLABackend, CPUMLABackend, get_current_vllm_config

__all__ = ["CheckedAMXMLA", "CheckedCPUMLA"]


def _require_no_policy() -> None:
    policy = configured_policy(additional_config=get_current_vllm_config().additional_config)
    allowed = "models without MLA, or no policy (kvselect selects keys, not latents, under vLLM)"
    require(policy is None, "attention", "MLA", allowed)


class CheckedCPUMLA(CPUMLABackend):
    """vLLM's reference MLA, unless a policy is configured."""

    @staticmethod
    def get_impl_cls() -> Any:
        _require_no_policy()
        return CPUMLABackend.get_impl_cls()


class CheckedAMXMLA(AMXMLABackend):
    """vLLM's MLA for AMX, unless a policy is configured."""

    @staticmethod
    def get_impl_cls() -> Any:
        _require_no_policy()
        return AMXMLABackend.get_impl_cls()
