"""Drafts from the prompt: verified as decode steps select, rejected without a trace.

A file of its own: what vLLM imports for them keeps later engines of a process from starting.
"""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here: make test-vllm")

from vllm_engine import SMALL, attached, engine, prompts

import kvselect

POLICY = kvselect.TokenSelect(**SMALL, dense_prefill=True)
NEW_TOKENS = 40  # rows grow over ends of blocks, whose records drafts complete


def test_drafts_are_verified_as_decode_steps_select() -> None:
    asked = prompts((372, 500, 640, 250, 1024, 755))
    options: dict[str, Any] = {
        "method": "ngram",
        "num_speculative_tokens": 3,
        "prompt_lookup_max": 2,
        "prompt_lookup_min": 1,
    }
    with engine(POLICY, speculative_config=options, max_num_batched_tokens=512) as running:
        steps: list[tuple[int, int]] = []
        update = running.scheduler.make_spec_decoding_stats

        def count(*args: Any, **more: Any) -> Any:
            steps.append((more["num_draft_tokens"], more["num_accepted_tokens"]))
            return update(*args, **more)

        running.scheduler.make_spec_decoding_stats = count
        got = running.generate(asked, new_tokens=NEW_TOKENS)
        drafted, accepted = (sum(counts) for counts in zip(*steps))
        assert 0 < accepted < drafted
        counts = [layer._served.state.decode for layer in running.layers]
        assert all(0 < count.tokens_attended < count.tokens_visible for count in counts)
    assert got == attached(POLICY, asked, new_tokens=NEW_TOKENS)
