"""The vLLM tests: `make test-vllm`. One process, one thread pool, the embedded model."""

from __future__ import annotations

import os

# Before vLLM is imported, which reads most of them once.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # tests look inside the engine
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_CI_ENV", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
