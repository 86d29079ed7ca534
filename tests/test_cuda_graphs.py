"""One captured decode step serves every length: replayed, it gives the bits of eager steps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fake_cuda import fake_cuda
from torch import Tensor

from kvselect import KVCache, Policy, TokenSelect, decode_step, ops, prefill
from kvselect.fixed_cache import FixedKVCache

SMALL: dict[str, Any] = {"topk": 64, "num_sink_tokens": 16, "num_recent_tokens": 128}
NUM_STEPS, NUM_WARM = 140, 3  # a sketch block is finished on the way


@pytest.fixture(params=[False, True])
def overlap(request: pytest.FixtureRequest) -> Iterator[bool]:
    if not ops.build_info()["cuda_loaded"]:
        pytest.skip("the CUDA module is not loaded")
    ops.set_cuda_overlap(request.param)
    yield request.param
    ops.set_cuda_overlap(False)


class Steps:
    """Decode steps on a filled cache; the next token's tensors stay where they are."""

    def __init__(self, policy: Policy, batch: int) -> None:
        self.policy = policy
        self.cache = FixedKVCache(
            batch, 2, 64, capacity=1024, dtype=torch.bfloat16, device="cuda", sketch="int4"
        )
        self.state = policy.new_state(self.cache)
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to("cuda", torch.bfloat16)

        prompt = random(batch, 600, 2, 64)
        with self.cache.known_lengths():
            self.cache.append(prompt, random(batch, 600, 2, 64))
            prefill(random(batch, 600, 8, 64), self.cache, policy, self.state)
        self.inputs = random(NUM_STEPS, batch, 1, 12, 64)  # query heads, then keys, then values
        self.token = torch.empty_like(self.inputs[0])

    def __call__(self) -> tuple[Tensor, Tensor]:
        q, k, v = self.token.split([8, 2, 2], dim=2)
        self.cache.append(k, v)
        out, info = decode_step(q, self.cache, self.policy, self.state)
        assert info.selection is not None
        return out, info.selection.indices


@pytest.mark.cuda
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "settings",
    [{}, {"scope": "layer"}, {"similarity_threshold": 0.9}, {"sketch": None}],
    ids=["default", "layer", "selection cache", "exact keys"],
)
def test_replays_are_eager_steps_bit_for_bit(
    overlap: bool, batch: int, settings: dict[str, Any]
) -> None:
    policy = TokenSelect(**SMALL, **settings)
    eager, captured = Steps(policy, batch), Steps(policy, batch)
    graph = torch.cuda.CUDAGraph()
    for step, token in enumerate(eager.inputs):
        eager.token.copy_(token)
        expected = [x.clone() for x in eager()]
        captured.token.copy_(token)
        if step < NUM_WARM:
            got = captured()
        else:
            if step == NUM_WARM:  # captured, not run: the replay is this step
                with torch.cuda.graph(graph):
                    got = captured()
            graph.replay()
        for x, y in zip(got, expected, strict=True):
            assert torch.equal(x, y), f"step {step}"


def test_a_growing_cache_is_not_for_captured_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lengths are the host's, which a replay does not run."""
    with fake_cuda():
        cache = KVCache(1, 2, 64, device="cuda")
        k = torch.zeros(1, 4, 2, 64, device="cuda")
        cache.append(k, k)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        allowed = r"KVCache: got 'a stream under capture', allowed: .*FixedKVCache"
        with pytest.raises(ValueError, match=allowed):
            cache.append(k, k)
        assert cache.max_seqlen == 4
        fixed = FixedKVCache(1, 2, 64, capacity=64, device="cuda")
        fixed.append(k, k)
