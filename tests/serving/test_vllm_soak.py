"""A thousand requests of random lengths, with aborts and preemptions: no leak, no wrong answer.

``KVSELECT_SOAK_REQUESTS`` says how many: 1000, which take half a minute, or any number from 200,
below which nothing may be preempted. ``KVSELECT_SOAK_SEED`` (4): which prompts, lengths and order.
"""

from __future__ import annotations

import os
import random
import resource
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here: make test-vllm")

from vllm import TokensPrompt
from vllm_engine import SMALL, attached, engine, greedy, prompts

import kvselect

REQUESTS = int(os.environ.get("KVSELECT_SOAK_REQUESTS", "1000"))
SEED = int(os.environ.get("KVSELECT_SOAK_SEED", "4"))
BLOCKS = 24
NEW_TOKENS = 24
POLICY = kvselect.TokenSelect(**SMALL, dense_prefill=True)  # does not depend on where it is cut


def test_a_thousand_requests() -> None:
    assert REQUESTS >= 200
    chance = random.Random(SEED)
    # Every other one is about to need one more block: what preempts others when there is none.
    lengths = tuple(
        128 * chance.randrange(1, 6) - chance.randrange(4) if even else chance.randrange(16, 700)
        for even in 12 * (True, False)
    )
    asked = prompts(lengths, seed=SEED + 5)
    wanted = attached(POLICY, asked, new_tokens=NEW_TOKENS)
    answers: dict[str, tuple[int, list[int]]] = {}
    options: dict[str, Any] = {
        "num_gpu_blocks_override": BLOCKS,
        "max_model_len": 1024,
        "max_num_batched_tokens": 512,
        "enable_prefix_caching": True,
    }
    with engine(POLICY, **options) as running:
        core, scheduler = running.llm.llm_engine, running.scheduler
        preempt, schedule, aborted = scheduler._preempt_request, scheduler.schedule, 0
        answered: dict[str, int] = {}  # by preempted requests, when they first were
        short_pieces = 0

        def count(request: Any, *args: Any, **more: Any) -> Any:
            answered.setdefault(request.request_id.split("-")[0], request.num_output_tokens)
            return preempt(request, *args, **more)

        def look(*args: Any, **more: Any) -> Any:
            nonlocal short_pieces
            output = schedule(*args, **more)
            for name, num_new in output.num_scheduled_tokens.items():
                request = scheduler.requests[name]
                before = request.num_computed_tokens - num_new  # counted already
                short_pieces += 0 < before < request.num_prompt_tokens and num_new <= 16
            return output

        scheduler._preempt_request, scheduler.schedule = count, look
        open_requests: dict[str, int] = {}
        started, memory_half_way = 0, 0
        while started < REQUESTS or core.has_unfinished_requests():
            while started < REQUESTS and len(open_requests) < 24:
                which = chance.randrange(len(asked))
                name = f"r{started}"
                prompt = TokensPrompt(prompt_token_ids=asked[which])
                core.add_request(name, prompt, greedy(chance.randrange(1, NEW_TOKENS + 1)))
                open_requests[name] = which
                started += 1
            for output in core.step():
                if output.finished:
                    name = output.request_id
                    which = open_requests.pop(name)
                    answers[name] = (which, list(output.outputs[0].token_ids))
            if open_requests and chance.random() < 0.1:
                name = chance.choice(list(open_requests))
                core.abort_request([name])
                open_requests.pop(name)
                aborted += 1
            if started >= REQUESTS // 2 and not memory_half_way:
                memory_half_way = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == BLOCKS - 1
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory_half_way
    assert grown < 128 * 1024  # KiB, of the peak: allocators round it up
    assert aborted > 0 and len(answers) + aborted == REQUESTS
    assert 0 < len(answered) < REQUESTS // 2 and short_pieces > 0
    different = set()
    for name, (which, tokens) in answers.items():
        # What a preempted request had generated is prefilled again, densely, where decode steps
        # had selected: it may go on differently.
        exact = answered.get(name, len(tokens))
        assert tokens[:exact] == wanted[which][:exact], name
        if tokens != wanted[which][: len(tokens)]:
            different.add(name)
    assert len(different) <= len(answered) // 10  # none, of 90
