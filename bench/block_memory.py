"""How much device memory and traffic does InfLLM's block memory take, up to a million tokens?

Keys and values of one layer lie in host memory (`TieredKVCache`), the device keeps sinks, window
and the tokens that lists named lately, by LRU and by InfLLM's LRU-S. Keys are drawn (simulated),
queries drift from step to step with a cosine of 0.95, or come back every 12 steps; no prompt is
attended to, so that blocks stand by their mean keys: what is measured is where tokens lie, not
which are found. Host and device are both this machine's memory, so bytes are what a link would
carry.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvselect.bench.layer import Shape, StructuredLayer
from kvselect.bench.measure import quantiles, threads
from kvselect.bench.request import parse, script_parser
from kvselect.bench.results import print_table, save
from kvselect.decode import decode_step
from kvselect.lru_slots import Replacement
from kvselect.policies.block_policy import BlockState
from kvselect.policies.infllm import InfLLM
from kvselect.tiered_cache import TieredKVCache

COLUMNS = [
    "tokens",
    "queries",
    "makes room",
    "device MB",
    "statistics MB",
    "host MB",
    "rows found",
    "KB to the\ndevice a step",
    "of what\nlists read",
    "CPU ms\na step",
]
DRIFT = 0.95
PERIOD = 12
REPLACEMENTS: tuple[Replacement, ...] = ("lru", "lru_s")


@dataclass(frozen=True, slots=True)
class Row:
    """One length; bytes of one layer."""

    tokens: int
    queries: str
    replacement: Replacement
    device_bytes: int
    statistics_bytes: int
    host_bytes: int
    hit_rate: float
    fetched_bytes_per_step: float
    listed_bytes_per_step: float
    step_ms: list[float]


def measure(
    tokens: int,
    policy: InfLLM,
    shape: Shape,
    steps: int,
    seed: int,
    queries: str,
    replacement: Replacement,
) -> Row:
    """Decode steps after ``tokens`` tokens; the first, which finds an empty device, not counted."""
    layer = StructuredLayer(shape, seed)
    recent = policy.num_recent_tokens + policy.num_margin_tokens
    cache = TieredKVCache(
        shape.batch,
        shape.num_kv_heads,
        shape.head_dim,
        dtype=shape.torch_dtype,
        capacity=tokens + steps + 1,
        sketch=None,
        num_sink_tokens=policy.num_sink_tokens,
        num_recent_tokens=recent,
        resident_tokens=3 * policy.capacity,
        replacement=replacement,
        block_tokens=policy.block_size,
    )
    state = policy.new_state(cache)
    assert isinstance(state, BlockState)
    for k, v in layer.tokens(tokens):
        cache.append(k, v)
        policy.update(state, cache)
    cache.drop_whole_rows()
    drawn = layer.draw_query()
    recurring = [layer.draw_query() for _ in range(PERIOD)]
    taken, before, counts = [], (0, 0, 0), cache.residency
    for step in range(steps + 1):
        ((k, v),) = layer.tokens(1)
        cache.append(k, v)
        if queries == "periodic":
            drawn = recurring[step % PERIOD]
        q, _ = layer.query(drawn, cache)
        start = time.thread_time()
        decode_step(q, cache, policy, state)
        taken.append(1e3 * (time.thread_time() - start))
        drawn = layer.drifted(drawn, DRIFT)
        if step == 0:
            before = counts.num_found, counts.num_fetched, counts.fetched_bytes
            attended = int(state.decode.tokens_attended)
    found, fetched = counts.num_found - before[0], counts.num_fetched - before[1]
    listed = (int(state.decode.tokens_attended) - attended) / steps
    return Row(
        tokens=tokens,
        queries=queries,
        replacement=replacement,
        device_bytes=cache.nbytes,
        statistics_bytes=state.blocks.nbytes,
        host_bytes=cache.host_nbytes,
        hit_rate=found / max(found + fetched, 1),
        fetched_bytes_per_step=(counts.fetched_bytes - before[2]) / steps,
        listed_bytes_per_step=2 * listed * shape.head_dim * shape.torch_dtype.itemsize,
        step_ms=taken[1:],
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every length and write the JSON."""
    parser = script_parser(__doc__, __file__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[65536, 262144, 1048576])
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--recent", type=int, default=4096, help="window of the policy [tokens]")
    parser.add_argument("--topk-blocks", type=int, default=16)
    choices = ["drift", "periodic"]
    parser.add_argument("--queries", nargs="+", choices=choices, default=choices)
    options = parse(
        parser, arguments, {"tokens": [2048, 4096], "steps": 4, "recent": 512, "topk_blocks": 4}
    )
    shape = Shape(num_q_heads=4, num_kv_heads=2, head_dim=64)
    policy = InfLLM(
        positions="original", num_recent_tokens=options.recent, topk_blocks=options.topk_blocks
    )
    with threads(1), torch.inference_mode():
        rows = [
            measure(n, policy, shape, options.steps, 0, queries, replacement)
            for n in options.tokens
            for queries in options.queries
            for replacement in REPLACEMENTS
        ]
    print_table(
        f"InfLLM, {policy.topk_blocks} blocks of {policy.block_size}, window "
        f"{policy.num_recent_tokens}, 2 KV heads of 64, {shape.dtype}; one layer, simulated keys",
        COLUMNS,
        [
            [
                f"{row.tokens}",
                row.queries,
                row.replacement,
                f"{row.device_bytes / 1e6:.1f}",
                f"{row.statistics_bytes / 1e6:.1f}",
                f"{row.host_bytes / 1e6:.1f}",
                f"{100 * row.hit_rate:.1f} %",
                f"{row.fetched_bytes_per_step / 1e3:.1f}",
                f"{100 * row.fetched_bytes_per_step / row.listed_bytes_per_step:.1f} %",
                f"{quantiles(row.step_ms)[0]:.1f}",
            ]
            for row in rows
        ],
    )
    question = (__doc__ or "").split("\n", 1)[0]
    save(options.out, question, vars(options) | {"policy": policy.to_dict()}, rows)


if __name__ == "__main__":
    main()
