"""As `mla`, for machines with AMX; releases before 0.30 have no backend of theirs."""

from __future__ import annotations

from typing import Any

from kvselect.integrations.vllm.mla import require_no_policy
from kvselect.integrations.vllm.shim import AMXMLABackend

__all__ = ["CheckedAMXMLA"]


class CheckedAMXMLA(AMXMLABackend):
    """vLLM's MLA for AMX, unless a policy is configured."""

    @staticmethod
    def get_impl_cls() -> Any:
        require_no_policy()
        return AMXMLABackend.get_impl_cls()
