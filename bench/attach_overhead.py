"""What does an attached model cost where selection gains nothing, and its cache while it grows?

A random bfloat16 Llama (two layers of a 0.5B model's width by default), one thread:

- step: one forward pass of one token, stock sdpa on transformers' `DynamicCache` against the same
  weights attached to `Dense`;
- generate: what `generate()` needs per token on a cache that holds the context already, stock
  against `TokenSelect()` as it comes, break-even included;
- prompt: a whole call of `generate()` from the prompt, likewise;
- append: one token into one layer's cache, `DynamicLayer` against `KVSelectLayer`, alone; then the
  bytes written per token and the peak of memory over a prompt and an eighth more tokens, by which
  ours must have grown once.

Contenders take turns on contexts that grow alike. Stock runs twice: what differs between the two is
noise, and a ratio is no better than that.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicLayer

import kvselect
from kvselect.bench import results
from kvselect.bench.measure import (
    Contender,
    clock_name,
    interleaved_ms,
    quantiles,
    threads,
)
from kvselect.bench.memory import require_memory
from kvselect.bench.request import parse, parse_counts, script_parser
from kvselect.bench.watch import WriteWatch
from kvselect.checks import require_int
from kvselect.integrations.hf import KVSelectLayer

STOCK, AGAIN = "stock sdpa", "stock sdpa again"
DENSE, SELECT = "attached, Dense()", "attached, TokenSelect()"
ALLOWED = 1.02  # times stock
# Written down before the first run; in times stock.
EXPECTED = {
    ("step", 1 << 10): 1.01,
    ("step", 2 << 10): 0.98,
    ("step", 4 << 10): 0.92,
    ("step", 8 << 10): 0.85,
    ("generate", 256): 1.01,
    ("generate", 1 << 10): 1.0,
    ("generate", 4 << 10): 0.92,
    ("generate", 16 << 10): 0.6,
    ("generate", 64 << 10): 0.3,
    ("prompt", 256): 1.02,
    ("prompt", 1 << 10): 1.0,
    ("prompt", 4 << 10): 0.95,
    ("append", 1 << 10): 0.2,
    ("append", 8 << 10): 0.02,
    ("append", 32 << 10): 0.005,
}
# In keys and values of what is stored in the end: DynamicCache holds one tensor twice while it
# concatenates, ours too when it grows by an eighth; then the eighth and the sketch.
EXPECTED_PEAK = {"DynamicLayer": 1.5, "KVSelectLayer(None)": 1.6, "KVSelectLayer('int4')": 1.75}
Row = dict[str, Any]


class Models:
    """One set of random weights in two models, of which one may be attached."""

    def __init__(self, options: argparse.Namespace, max_tokens: int) -> None:
        hidden = options.q_heads * options.head_dim
        self.config = LlamaConfig(
            hidden_size=hidden,
            intermediate_size=4 * hidden,
            num_hidden_layers=options.layers,
            num_attention_heads=options.q_heads,
            num_key_value_heads=options.kv_heads,
            head_dim=options.head_dim,
            vocab_size=options.vocabulary,
            max_position_embeddings=max_tokens,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=None,
        )
        self.stock, self.attached = self._model(), self._model()
        # The same memory, not only the same numbers: where it lies decides how fast it is read.
        self.attached.load_state_dict(self.stock.state_dict(), assign=True)
        generator = torch.Generator().manual_seed(1)
        size = (1, options.kv_heads, max_tokens, options.head_dim)
        self._k, self._v = (torch.randn(size, generator=generator).bfloat16() for _ in range(2))

    def _model(self) -> LlamaForCausalLM:
        torch.manual_seed(0)
        own = copy.deepcopy(self.config)  # attach() changes it
        return LlamaForCausalLM._from_config(
            own, attn_implementation="sdpa", dtype=torch.bfloat16
        ).eval()

    def filled(self, tokens: int, policy: kvselect.Policy | None) -> DynamicCache:
        """The same random keys and values in every layer; ``policy`` None: a stock cache."""
        cache = DynamicCache(config=self.config)
        if policy is not None:
            cache.layers = [KVSelectLayer(policy.required_sketch) for _ in cache.layers]
        for index in range(self.config.num_hidden_layers):
            cache.update(self._k[:, :, :tokens], self._v[:, :, :tokens], index)
        return cache


def generate(model: LlamaForCausalLM, length: int, cache: DynamicCache | None, count: int) -> None:
    """``count`` tokens after ``length`` ones, of which a cache holds all but the last."""
    ids = torch.ones(1, length, dtype=torch.int64)
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
    )


def continued(model: LlamaForCausalLM, cache: DynamicCache, count: int) -> Callable[[], None]:
    return lambda: generate(model, cache.get_seq_length() + 1, cache, count)


def stepping(model: LlamaForCausalLM, cache: DynamicCache) -> Callable[[], object]:
    token = torch.ones(1, 1, dtype=torch.int64)
    return lambda: model(token, past_key_values=cache)


def measure(
    part: str,
    tokens: int,
    calls: dict[str, Callable[[], object]],
    options: argparse.Namespace,
    per_call: int = 1,
) -> list[Row]:
    """Rows of contenders; the first, with its second run, is what all are compared with."""
    contenders = {name: Contender(call=call) for name, call in calls.items()}
    with torch.no_grad():
        samples = interleaved_ms(contenders, options.rounds, max_seconds=options.max_seconds)
    base = quantiles(samples[next(iter(calls))] + samples.get(AGAIN, [])).median / per_call
    rows: list[Row] = []
    for name, found in samples.items():
        found = [ms / per_call for ms in found]
        median, p20, p80 = quantiles(found)
        ours = name not in (STOCK, AGAIN, "DynamicLayer")
        row: Row = {"part": part, "contender": name, "tokens": tokens}
        row |= {"median_ms": median, "p20_ms": p20, "p80_ms": p80, "times_stock": median / base}
        row["expected_times_stock"] = EXPECTED.get((part, tokens)) if ours else None
        row["met"] = median / base <= ALLOWED if ours else None
        rows.append(row | {"samples_ms": found})
    return rows


def measure_models(options: argparse.Namespace) -> list[Row]:
    """Steps, tokens of `generate()` on filled caches, and whole calls of it."""
    names = ("step_tokens", "generate_tokens", "prompt_tokens")
    steps, contexts, prompts = (
        parse_counts(getattr(options, name), name.replace("_", "-")) for name in names
    )
    count = options.new_tokens
    longest = max(*steps, *contexts, *prompts) + (options.rounds + 2) * max(count, 1)
    row_bytes = 4 * options.kv_heads * options.head_dim
    require_memory("tokens", longest, 5 * (options.layers + 1) * longest * row_bytes)
    models = Models(options, longest)
    rows: list[Row] = []
    dense, select = kvselect.Dense(), kvselect.TokenSelect()
    with kvselect.attach(models.attached, dense):
        for tokens in steps:
            run = {
                name: stepping(models.stock, models.filled(tokens, None)) for name in (STOCK, AGAIN)
            }
            run[DENSE] = stepping(models.attached, models.filled(tokens, dense))
            rows += measure("step", tokens, run, options)
    with kvselect.attach(models.attached, select) as handle:
        for tokens in contexts:
            calls: dict[str, Callable[[], object]] = {
                name: continued(models.stock, models.filled(tokens, None), count)
                for name in (STOCK, AGAIN)
            }
            calls[SELECT] = continued(models.attached, models.filled(tokens, select), count)
            rows += measure("generate", tokens, calls, options, per_call=count)
        for tokens in prompts:
            whole = {
                name: partial(generate, model, tokens, None, count)
                for name, model in ((STOCK, models.stock), (SELECT, models.attached))
            }
            rows += measure("prompt", tokens, whole, options)
        rows.append({"part": "report", "report": handle.report().to_dict()})
    return rows


LAYERS: dict[str, Callable[[], DynamicLayer]] = {
    "DynamicLayer": DynamicLayer,
    "KVSelectLayer(None)": KVSelectLayer,
    "KVSelectLayer('int4')": partial(KVSelectLayer, "int4"),
}


def drawn(options: argparse.Namespace, tokens: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    size = (1, options.append_heads, tokens, options.append_dim)
    k, v = (torch.randn(size, generator=generator).bfloat16() for _ in range(2))
    return k, v


def appending(make: Callable[[], DynamicLayer], k: Tensor, v: Tensor) -> Callable[[], object]:
    layer = make()
    layer.update(k, v)
    # As a projection leaves them: the tokens of a head lie apart.
    new = [x[:, :, :1].transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)]
    return lambda: layer.update(*new)


def measure_appends(options: argparse.Namespace) -> list[Row]:
    rows: list[Row] = []
    for tokens in parse_counts(options.append_tokens, "append-tokens"):
        k, v = drawn(options, tokens)
        calls = {name: appending(make, k, v) for name, make in LAYERS.items()}
        rows += measure("append", tokens, calls, options)
    return rows


def measure_writes(options: argparse.Namespace) -> list[Row]:
    """A prompt, whole and in chunks, and an eighth more tokens one by one."""
    tokens, chunk = options.grown_tokens, options.chunk
    k, v = drawn(options, tokens)
    more = tokens // 8 + 1
    stored = (k.nbytes + v.nbytes) * (tokens + more) / tokens
    new = k[:, :, :1].clone()
    rows: list[Row] = []
    for phases in ("whole prompt", f"prompt in chunks of {chunk}"):
        for name, make in LAYERS.items():
            size = tokens if phases == "whole prompt" else chunk
            layer = make()
            with WriteWatch() as watch:
                for begin in range(0, tokens, size):
                    layer.update(k[:, :, begin : begin + size], v[:, :, begin : begin + size])
                prompt_bytes = watch.written_bytes
                for _ in range(more):
                    layer.update(new, new)
            row: Row = {"part": "writes", "contender": name, "tokens": tokens, "prompt": phases}
            row |= {"appended_tokens": more, "token_bytes": 2 * new.nbytes}
            row["prompt_bytes_per_token"] = prompt_bytes / tokens
            row["bytes_per_token"] = (watch.written_bytes - prompt_bytes) / more
            row |= {"peak_bytes": watch.peak_bytes, "peak_over_stored": watch.peak_bytes / stored}
            rows.append(row | {"expected_peak_over_stored": EXPECTED_PEAK[name]})
            del layer
    return rows


def show(rows: list[Row], options: argparse.Namespace) -> None:
    clock = clock_name(1)
    columns = ["", "tokens", "ms", "p20-p80", "times stock", "expected", "allowed"]
    for part in ("step", "generate", "prompt", "append"):
        cells = []
        for row in (row for row in rows if row["part"] == part):
            expected, met = row["expected_times_stock"], row["met"]
            judged = "" if met is None else f"{ALLOWED} {'met' if met else 'MISSED'}"
            cell = [row["contender"], str(row["tokens"]), f"{row['median_ms']:.3f}"]
            cell += [f"{row['p20_ms']:.3f}-{row['p80_ms']:.3f}", f"{row['times_stock']:.3f}"]
            cells.append([*cell, "" if expected is None else f"{expected:.3f}", judged])
        results.print_table(f"{part}, one thread, {clock} time", columns, cells)
    columns = ["", "bytes written per prompt token", "per appended token", "peak over stored"]
    columns.append("expected")
    for prompt in dict.fromkeys(row["prompt"] for row in rows if row["part"] == "writes"):
        found = [row for row in rows if row.get("prompt") == prompt]
        cells = []
        for row in found:
            cell = [row["contender"], f"{row['prompt_bytes_per_token']:.0f}"]
            cell += [f"{row['bytes_per_token']:.0f}", f"{row['peak_over_stored']:.2f}"]
            cells.append([*cell, f"{row['expected_peak_over_stored']:.2f}"])
        title = (
            f"{prompt}, {found[0]['tokens']} tokens and {found[0]['appended_tokens']} one by one; "
            f"a token has {found[0]['token_bytes']} bytes"
        )
        results.print_table(title, columns, cells)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = script_parser(__doc__, __file__)
    parser.add_argument("--step-tokens", default="1k,2k,4k,8k")
    parser.add_argument("--generate-tokens", default="256,1k,4k,16k,64k")
    parser.add_argument("--prompt-tokens", default="256,1k,4k,16k")
    parser.add_argument("--append-tokens", default="1k,8k,32k")
    parser.add_argument("--grown-tokens", type=int, default=1 << 13, help="of the memory's peak")
    parser.add_argument("--chunk", type=int, default=1 << 11, help="of the prompt, likewise")
    parser.add_argument("--new-tokens", type=int, default=16, help="per call of generate()")
    parser.add_argument("--rounds", type=int, default=61)
    parser.add_argument("--max-seconds", type=float, default=8.0, help="per contender and length")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--q-heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--append-heads", type=int, default=8, help="KV heads of the lone layer")
    parser.add_argument("--append-dim", type=int, default=128, help="their size")
    quick: dict[str, object] = {"rounds": 3, "new_tokens": 2, "grown_tokens": 1024, "chunk": 256}
    quick |= {"step_tokens": "256", "generate_tokens": "256,1k", "prompt_tokens": "128"}
    quick |= {"append_tokens": "256", "q_heads": 4, "kv_heads": 2, "vocabulary": 256}
    options = parse(parser, arguments, quick=quick)
    for name in ("rounds", "new_tokens", "layers", "grown_tokens", "chunk"):
        require_int(getattr(options, name), name.replace("_", "-"), 1)
    began = time.perf_counter()
    with threads(1):
        rows = measure_writes(options)  # first: before a heap is kept
        rows += measure_appends(options) + measure_models(options)
    show(rows, options)
    settings = vars(options) | {"allowed": ALLOWED, "seconds": time.perf_counter() - began}
    print("written:", results.save(options.out, parser.description or "", settings, rows))


if __name__ == "__main__":
    main()
