"""How much faster does generate() write after a long context, and where does the time go?

A random Llama of the 1B class (weights are random numbers, so quality is not measured here). The
caches are filled directly with random keys and values, the same in every layer, instead of reading
the context. transformers' own sdpa attention on its own cache writes a few tokens, the same model
attached to TokenSelect all of them; each token is timed from one forward pass to the next, sampling
and Python included. Before that `verify()` compares both on a short prompt. Memory is left to the
C library as it is in any process: nothing is kept warm for anybody.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.initialization import no_init_weights

import kvselect
from kvselect.bench import results
from kvselect.bench.measure import clock_name, clock_of, quantiles, threads
from kvselect.bench.memory import require_memory
from kvselect.bench.request import (
    add_sizes,
    check_sizes,
    one_count,
    parse,
    progress_bar,
    script_parser,
    shape_of,
)
from kvselect.bench.watch import stage_ms
from kvselect.checks import require, require_int
from kvselect.integrations.hf import KVSelectLayer

SDPA, OURS = "transformers, sdpa", "kvselect TokenSelect int4"
WATCHED_TOKENS, WATCHED_SDPA_TOKENS = 6, 2
LINEAR = dict.fromkeys(("aten.mm", "aten.addmm", "aten.linear"), "linear layers")
TORCH_ATTENTION = dict.fromkeys(
    (
        "aten._scaled_dot_product_flash_attention_for_cpu",
        "aten._scaled_dot_product_attention_math",
        "aten.bmm",
        "aten._softmax",
    ),
    "attention",
) | dict.fromkeys(
    ("aten.cat", "aten.clone", "aten.copy_", "aten._to_copy"), "copies of the cache and masks"
)


def config_of(options: argparse.Namespace, max_tokens: int) -> LlamaConfig:
    """Shapes of a 1B Llama by default."""
    return LlamaConfig(
        hidden_size=options.q_heads * options.head_dim,
        intermediate_size=4 * options.q_heads * options.head_dim,
        num_hidden_layers=options.layers,
        num_attention_heads=options.q_heads,
        num_key_value_heads=options.kv_heads,
        head_dim=options.head_dim,
        vocab_size=options.vocabulary,
        max_position_embeddings=max_tokens,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )


def random_model(config: LlamaConfig, dtype: torch.dtype) -> LlamaForCausalLM:
    """Gaussian weights from one tile: drawing a billion numbers takes longer than the bench."""
    with no_init_weights():
        model = LlamaForCausalLM(config).to(dtype)
    tile = 0.02 * torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    for name, weight in model.named_parameters():
        if name.endswith("norm.weight"):
            weight.data.fill_(1.0)
            continue
        flat = weight.data.view(-1)
        for begin in range(0, flat.numel(), tile.numel()):
            part = flat[begin : begin + tile.numel()]
            part.copy_(tile[: part.numel()])
    return model.eval()


def new_cache(config: LlamaConfig, k: Tensor, v: Tensor, ours: bool) -> DynamicCache:
    """Every layer holds ``k`` and ``v``, [1, num_kv_heads, tokens, head_dim]."""
    cache = DynamicCache(config=config)
    if ours:
        cache.layers = [KVSelectLayer("int4") for _ in range(config.num_hidden_layers)]
    for index in range(config.num_hidden_layers):
        cache.update(k.clone(), v.clone(), index)
    return cache


class Stopwatch:
    """A logits processor that only notes when it is called: once per token."""

    def __init__(self, number: int, on_token: Callable[[], object]) -> None:
        self._now, self._on_token = clock_of(number), on_token
        self.at: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.at.append(self._now())
        self._on_token()
        return scores

    @property
    def token_ms(self) -> list[float]:
        """Of every token but the first, whose pass also warms up."""
        return [1e3 * (b - a) for a, b in zip(self.at, self.at[1:])]


def write(model: LlamaForCausalLM, cache: DynamicCache, count: int, watch: Any = None) -> Tensor:
    """``count`` tokens after everything that the cache holds and one token more."""
    length = cache.get_seq_length() + 1
    return model.generate(
        torch.ones(1, length, dtype=torch.int64),
        attention_mask=torch.ones(1, length, dtype=torch.int64),
        past_key_values=cache,
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        logits_processor=[] if watch is None else [watch],
    )


def stages_of(
    model: LlamaForCausalLM,
    cache: DynamicCache,
    token_ms: list[float],
    count: int,
    others: Mapping[str, str],
) -> dict[str, float]:
    """Milliseconds per token of each stage, from ``count`` more tokens that are watched."""
    total_ms = count * sum(token_ms) / len(token_ms)
    found = stage_ms(lambda: write(model, cache, count), total_ms, LINEAR | dict(others))
    return {stage: ms / count for stage, ms in found.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = script_parser(__doc__, __file__)
    add_sizes(parser, tokens="64k", rounds=64, heads=(32, 8, 64))
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--sdpa-tokens", type=int, default=4, help="timed with sdpa (4)")
    quick: dict[str, object] = {"tokens": "2k", "rounds": 8, "topk": 256, "sdpa_tokens": 2}
    quick |= {"layers": 2, "vocabulary": 1024, "q_heads": 4, "kv_heads": 2}
    options = parse(parser, arguments, quick=quick)
    tokens, shape = one_count(options.tokens, "tokens"), shape_of(options)
    number = one_count(options.threads, "threads")
    count = options.rounds  # new tokens
    check_sizes((tokens,), (number,), topk=options.topk, rounds=count, shortest=128)
    require_int(options.layers, "layers", 1)
    require_int(options.sdpa_tokens, "sdpa-tokens", 1)
    require(count >= 2, "rounds", count, "an int >= 2")

    config = config_of(options, tokens + count + WATCHED_TOKENS + 3)
    hidden, item = config.hidden_size, shape.torch_dtype.itemsize
    attention = 2 * hidden * (shape.num_q_heads + shape.num_kv_heads) * shape.head_dim
    per_layer = attention + 3 * hidden * config.intermediate_size
    weights = options.layers * per_layer + config.vocab_size * hidden
    caches = options.layers * shape.cache_bytes(tokens, "int4") * 9 // 8  # grows by an eighth
    require_memory(
        "layers",
        f"{options.layers} at {tokens} tokens",
        weights * item + caches + 8 * shape.row_bytes * tokens * shape.group_size + (1 << 30),
    )
    model = random_model(config, shape.torch_dtype)
    num_parameters = sum(weight.numel() for weight in model.parameters())
    generator = torch.Generator().manual_seed(1)
    size = (1, shape.num_kv_heads, tokens, shape.head_dim)
    k, v = (torch.randn(size, generator=generator).to(shape.torch_dtype) for _ in range(2))

    samples: dict[str, list[float]] = {}
    stages: dict[str, dict[str, float]] = {}
    policy = kvselect.TokenSelect(topk=options.topk, dense_below_tokens=0)
    began = time.perf_counter()
    with threads(number), progress_bar() as on_progress:
        on_progress("transformers, sdpa: cache", 0.0)
        watch = Stopwatch(number, lambda: on_progress(SDPA, 0.5 / (options.sdpa_tokens + 1)))
        cache = new_cache(config, k, v, ours=False)
        write(model, cache, options.sdpa_tokens + 1, watch)
        samples[SDPA] = watch.token_ms
        stages[SDPA] = stages_of(model, cache, samples[SDPA], WATCHED_SDPA_TOKENS, TORCH_ATTENTION)
        del cache
        with kvselect.attach(model, policy) as handle:
            handle.verify()
            on_progress("kvselect: cache", 0.0)
            cache = new_cache(config, k, v, ours=True)
            watch = Stopwatch(number, lambda: on_progress(OURS, 0.4 / count))
            write(model, cache, count, watch)
            samples[OURS] = watch.token_ms
            stages[OURS] = stages_of(model, cache, samples[OURS], WATCHED_TOKENS, {})
            report = handle.report().to_dict()
    sdpa_ms = quantiles(samples[SDPA]).median
    rows = []
    for name, found in samples.items():
        median, p20, p80 = quantiles(found)
        rows.append(
            {
                "contender": name,
                "tokens": tokens,
                "threads": number,
                "clock": clock_name(number),
                "layers": options.layers,
                "parameters": num_parameters,
                "new_tokens_timed": len(found),
                "median_ms": median,
                "p20_ms": p20,
                "p80_ms": p80,
                "tokens_per_s": 1e3 / median,
                "over_sdpa": sdpa_ms / median,
                "samples_ms": found,
                "stages_ms": stages[name],
                "report": report if name == OURS else None,
            }
        )
    title = (
        f"generate() after {tokens} tokens: {options.layers} layers, {num_parameters / 1e9:.2f} B "
        f"parameters, {shape}, {number} thread(s), {clock_name(number)} time; random weights"
    )
    columns = ["", "tokens/s", "ms per token", "p20-p80", "times sdpa", "tokens timed"]
    cells = [
        [
            row["contender"],
            f"{row['tokens_per_s']:.2f}",
            f"{row['median_ms']:.1f}",
            f"{row['p20_ms']:.1f}-{row['p80_ms']:.1f}",
            f"{row['over_sdpa']:.1f}",
            str(row["new_tokens_timed"]),
        ]
        for row in rows
    ]
    results.print_table(title, columns, cells)
    for name, parts in stages.items():
        total = sum(parts.values())
        shares = (f"{stage} {100 * ms / total:.0f} %" for stage, ms in parts.items())
        print(f"{name}, share of the time: {', '.join(shares)}")
    settings = vars(options) | {"seconds": time.perf_counter() - began}
    print("written:", results.save(options.out, parser.description or "", settings, rows))


if __name__ == "__main__":
    main()
