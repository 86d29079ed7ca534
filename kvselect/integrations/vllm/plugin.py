"""The entry point ``vllm.general_plugins``: called in every process of a server, more than once."""

from __future__ import annotations

from kvselect.checks import require
from kvselect.integrations.vllm import shim
from kvselect.integrations.vllm.config import POLICY_VARIABLE, configured_policy, require_cuda

__all__ = ["CPU_BACKENDS", "CUDA_BACKEND", "CUDA_CHOICE", "register"]

CPU_BACKENDS = {
    "CPU_ATTN": "kvselect.integrations.vllm.cpu_backend.SelectingCPUBackend",
    "CPU_MLA": "kvselect.integrations.vllm.mla.CheckedCPUMLA",
    "AMX_MLA": "kvselect.integrations.vllm.amx_mla.CheckedAMXMLA",
}
CUDA_BACKEND = "kvselect.integrations.vllm.cuda_backend.SelectingCudaBackend"
CUDA_CHOICE = "kvselect.integrations.vllm.cuda_choice"


def register() -> None:
    """Tell vLLM of our backends, by path: nothing is imported yet.

    On the CPU they take the place of vLLM's, and are vLLM's own until a policy is configured. On
    CUDA there is one more, ``CUSTOM``, which the user picks; the others refuse a policy.

    Raises
    ------
    ValueError, TypeError
        If the environment names a policy that cannot be served, or the platform is another one.
    """
    policy = configured_policy()
    platform = shim.platform_name()
    if platform == "cpu":
        shim.override_backends(CPU_BACKENDS)
    elif platform == "cuda":
        if policy is not None:
            require_cuda()
        others = {name: f"{CUDA_CHOICE}.{name}" for name in shim.vllm_backends()}
        shim.override_backends({"CUSTOM": CUDA_BACKEND} | others, keep_others=policy is None)
    else:
        allowed = f"cpu or cuda with {POLICY_VARIABLE} set"
        require(policy is None, "vLLM platform", platform, allowed)
