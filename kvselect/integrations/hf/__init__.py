"""Hugging Face transformers: `attach` a selection policy to a causal language model, reversibly."""

from kvselect.integrations.hf.attach import Handle, attach
from kvselect.integrations.hf.cache_layer import KVSelectLayer
from kvselect.integrations.hf.plan import CopiedModelError
from kvselect.integrations.hf.report import Report
from kvselect.integrations.hf.verify import VerificationError, VerifyResult

__all__ = [
    "CopiedModelError",
    "Handle",
    "KVSelectLayer",
    "Report",
    "VerificationError",
    "VerifyResult",
    "attach",
]
