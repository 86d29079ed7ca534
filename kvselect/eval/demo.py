"""The main job on the embedded model: retrieval from contexts 16 times longer than trained for."""

from __future__ import annotations

from kvselect.eval.results import Length
from kvselect.eval.runner import Request
from kvselect.eval.tasks import find_tasks
from kvselect.policies.base import Policy
from kvselect.policies.dense import Dense
from kvselect.policies.streaming_llm import StreamingLLM
from kvselect.policies.token_select import TokenSelect

TASKS = ("niah_single", "niah_multikey", "niah_multivalue", "chain", "vt")
WINDOWS = (1, 4, 16)
SAMPLES = 24
# A single needle makes one question per context: fewer of them keep the job within minutes.
MAX_CONTEXTS = 8

_SINKS, _OVERSELECT = 4, 1.5
_SKETCH_RECENT = 128  # recent tokens that a sketch needs


def demo_policies(window_tokens: int = 512) -> dict[str, Policy]:
    """Dense, and three policies of the same budget of tokens: 4/9 of a trained window, 228 of 512.

    topk is an eighth of the window, a quarter is recent; the int4 sketch picks 1.5 times topk. A
    window below 512 leaves too few recent tokens for a sketch: there 1.5 times as many are scored
    with the keys themselves. The crossover below which dense is faster is switched off: the job is
    to show selection, at every length.
    """
    topk, recent = window_tokens // 8, window_tokens // 4
    picked = int(_OVERSELECT * topk)
    sketched = recent >= _SKETCH_RECENT

    def token_select(positions: str) -> TokenSelect:
        return TokenSelect(
            topk=topk if sketched else picked,
            num_sink_tokens=_SINKS,
            num_recent_tokens=recent,
            q_block_size=64,
            sketch="int4" if sketched else None,
            overselect=_OVERSELECT if sketched else 1.0,
            positions="compact" if positions == "compact" else "original",
            dense_below_tokens=0,
        )

    return {
        "Dense": Dense(),
        "StreamingLLM": StreamingLLM(
            num_sink_tokens=_SINKS, num_recent_tokens=picked + recent, q_block_size=64
        ),
        "TokenSelect original": token_select("original"),
        "TokenSelect compact": token_select("compact"),
    }


def demo_request(window_tokens: int, samples: int = SAMPLES, seed: int = 0) -> Request:
    """Five tasks at 1, 4 and 16 trained windows under four policies."""
    return Request(
        tasks=tuple(find_tasks(TASKS)),
        lengths=tuple(Length(label=f"{n}x", tokens=n * window_tokens) for n in WINDOWS),
        policies=demo_policies(window_tokens),
        samples=samples,
        max_contexts=MAX_CONTEXTS,
        seed=seed,
    )
