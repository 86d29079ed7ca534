"""The entry point ``vllm.general_plugins``: called in every process of a server, more than once."""

from __future__ import annotations

from kvselect.checks import require
from kvselect.integrations.vllm import shim
from kvselect.integrations.vllm.config import POLICY_VARIABLE, configured_policy

__all__ = ["BACKEND", "register"]

BACKEND = "kvselect.integrations.vllm.backend.SelectingBackend"


def register() -> None:
    """Put our backend in the place of vLLM's CPU attention, by its path: nothing is imported yet.

    Until a policy is configured it is vLLM's own.

    Raises
    ------
    ValueError, TypeError
        If the environment names a policy that cannot be served, or the platform is not the CPU.
    """
    policy = configured_policy()
    if shim.is_cpu_platform():
        shim.override_cpu_attention(BACKEND)
        return
    platform = shim.platform_name()
    require(policy is None, "vLLM platform", platform, f"cpu with {POLICY_VARIABLE} set")
