"""The entry point ``vllm.general_plugins``: called in every process of a server, more than once."""

from __future__ import annotations

from kvselect.checks import require
from kvselect.integrations.vllm import shim
from kvselect.integrations.vllm.config import POLICY_VARIABLE, configured_policy

__all__ = ["BACKENDS", "register"]

BACKENDS = {
    "CPU_ATTN": "kvselect.integrations.vllm.backend.SelectingBackend",
    "CPU_MLA": "kvselect.integrations.vllm.mla.CheckedCPUMLA",
    "AMX_MLA": "kvselect.integrations.vllm.amx_mla.CheckedAMXMLA",
}


def register() -> None:
    """Put our backends in the place of vLLM's CPU attention, by path: nothing is imported yet.

    Until a policy is configured they are vLLM's own.

    Raises
    ------
    ValueError, TypeError
        If the environment names a policy that cannot be served, or the platform is not the CPU.
    """
    policy = configured_policy()
    if shim.is_cpu_platform():
        shim.override_backends(BACKENDS)
        return
    platform = shim.platform_name()
    require(policy is None, "vLLM platform", platform, f"cpu with {POLICY_VARIABLE} set")
