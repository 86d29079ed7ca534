"""How many tokens per second does a whole model decode after a long context, dense and attached?

A random Llama of the 8B class (weights are random numbers, so quality is not measured here) on
static caches filled with random keys and values. One decode step, end to end: embedding to logits,
all layers. On a GPU every contender is one CUDA graph where it can be captured; the step is rewound
before each call, so that all calls are the same one. Stock transformers stands in two forms: its
sdpa attention, which reads the whole cache through a mask, and the best that its hooks allow:
torch's fused attention without a mask and without copies of keys for the group.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.initialization import no_init_weights

import kvselect
from kvselect.bench import results
from kvselect.bench.contenders import folded
from kvselect.bench.expected import expected_us
from kvselect.bench.graphs import (
    DeviceSamples,
    as_reason,
    copy_gb_per_s,
    interleaved_replays,
)
from kvselect.bench.layer import Shape
from kvselect.bench.measure import Contender, interleaved_ms, read_gb_per_s, threads
from kvselect.bench.memory import HEADROOM, free_device_bytes, require_cuda
from kvselect.bench.request import (
    add_device,
    add_sizes,
    check_sizes,
    one_count,
    parse,
    script_parser,
    shape_of,
)
from kvselect.bench.results import Skipped
from kvselect.checks import require, require_int
from kvselect.integrations.hf.static_layer import KVSelectStaticLayer
from kvselect.machine import free_bytes
from kvselect.testing import rel_err

SDPA = "transformers, sdpa"
FUSED = "transformers, fused attention without a mask"
OUR_DENSE, OURS = "kvselect dense", "kvselect TokenSelect int4"
HOOK = "kvselect_bench_fused"
NO_ROOM = "needs"  # memory; how such a reason begins
FILL_TOKENS = 16384  # of keys and values drawn at once
# Of logits between dense contenders: errors of one rounding per layer and op add up.
BOUND = {torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.25}


def config_of(options: argparse.Namespace, room: int) -> LlamaConfig:
    """Shapes of Llama-3-8B by default."""
    return LlamaConfig(
        hidden_size=options.q_heads * options.head_dim,
        intermediate_size=options.intermediate,
        num_hidden_layers=options.layers,
        num_attention_heads=options.q_heads,
        num_key_value_heads=options.kv_heads,
        head_dim=options.head_dim,
        vocab_size=options.vocabulary,
        max_position_embeddings=room,
        rope_theta=500_000.0,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )


def num_parameters(options: argparse.Namespace) -> int:
    """Of the model that `config_of` describes, norms left out."""
    hidden = options.q_heads * options.head_dim
    attention = 2 * hidden * (options.q_heads + options.kv_heads) * options.head_dim
    per_layer = attention + 3 * hidden * options.intermediate
    return int(options.layers * per_layer + 2 * options.vocabulary * hidden)


def random_model(config: LlamaConfig, shape: Shape) -> LlamaForCausalLM:
    """Gaussian weights, drawn where they stay."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(shape.torch_dtype)
    try:
        with torch.device(shape.device), no_init_weights():
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    generator = torch.Generator(shape.device).manual_seed(0)
    for name, weight in model.named_parameters():
        if name.endswith("norm.weight"):
            weight.data.fill_(1.0)
        else:
            weight.data.normal_(0.0, 0.02, generator=generator)
    return model.eval().requires_grad_(False)


def twin(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The same weights in the same memory under modules of their own."""
    shared = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def fused_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of one query over the whole room of a static cache that is full."""
    rows = folded(query.transpose(1, 2), key.shape[1])
    out = scaled_dot_product_attention(rows, key, value, scale=scaling)
    return out.reshape(query.shape[0], 1, query.shape[1], query.shape[3]), None


class Step:
    """One decode step of a model on a static cache, the same again and again.

    Parameters
    ----------
    model : LlamaForCausalLM
    shape : Shape
    tokens : int
        In the cache before the step.
    ours : bool
        The cache is kvselect's.
    """

    def __init__(self, model: LlamaForCausalLM, shape: Shape, tokens: int, ours: bool) -> None:
        self.model, self._tokens = model, tokens
        # The step fills the last place: whoever reads the whole room reads what there is.
        self.cache = StaticCache(config=model.config, max_cache_len=tokens + 1)
        if ours:
            layers = range(model.config.num_hidden_layers)
            self.cache.layers = [KVSelectStaticLayer(tokens + 1, "int4") for _ in layers]
        self._ids = torch.ones(shape.batch, 1, dtype=torch.int64, device=shape.device)
        generator = torch.Generator(shape.device).manual_seed(1)
        size = (shape.batch, shape.num_kv_heads, -1, shape.head_dim)
        for index in range(model.config.num_hidden_layers):
            for begin in range(0, tokens, FILL_TOKENS):
                count = min(FILL_TOKENS, tokens - begin)
                drawn = (*size[:2], count, size[3])
                k, v = (
                    torch.randn(
                        drawn,
                        generator=generator,
                        device=shape.device,
                        dtype=shape.torch_dtype,
                    )
                    for _ in range(2)
                )
                self.cache.update(k, v, index)

    def rewind(self, tokens: int | None = None) -> None:
        """Back to the cache before the step, on the device; or to so many tokens."""
        length = self._tokens if tokens is None else tokens
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(length)
            if isinstance(layer, KVSelectStaticLayer):
                assert layer.cache is not None
                layer.cache.cache_seqlens.fill_(length)

    @torch.no_grad()
    def count(self) -> None:
        """A call of two tokens: from then on the report of an attached model counts steps here."""
        last = slice(self._tokens - 1, self._tokens)
        kept = [
            (layer.keys[:, :, last].clone(), layer.values[:, :, last].clone())
            for layer in self.cache.layers
        ]
        self.rewind(self._tokens - 1)
        pair = self._ids.expand(-1, 2)
        self.model(input_ids=pair, past_key_values=self.cache, use_cache=True)
        self.rewind(self._tokens - 1)
        for index, (k, v) in enumerate(kept):
            self.cache.update(k, v, index)

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """Logits of the next token, [batch, 1, vocabulary]."""
        logits: Tensor = self.model(
            input_ids=self._ids, past_key_values=self.cache, use_cache=True
        ).logits
        return logits


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRow:
    """One contender.

    Attributes
    ----------
    tokens_per_s : float
        Of all rows, by the clock: launch included.
    over_best_dense : float
        Time by the clock of the faster form of stock transformers over this row's.
    interleaved : bool
        Its peers took turns with it; else memory held one cache at a time.
    kept_mass : float or None
        By the votes of the steps, mean over layers; None: everything.
    expected_ms : float
        Of the step model: weights at the measured bandwidth, and a step of every layer.
    """

    contender: str
    tokens: int
    batch: int
    layers: int
    parameters: int
    tokens_per_s: float
    over_best_dense: float
    interleaved: bool
    kept_mass: float | None
    logits_error: float | None
    expected_ms: float
    over_expected: float
    timing: results.Timing


class Bench:
    """Steps of one size: who takes part, compared, timed."""

    def __init__(self, options: argparse.Namespace, shape: Shape, tokens: int) -> None:
        self.options, self.shape, self.tokens = options, shape, tokens
        self.skipped: list[Skipped] = []
        self.reports: dict[str, Callable[[], float | None]] = {}
        self.errors: dict[str, float | None] = {}
        self._expected_logits: Tensor | None = None
        self._cleanup = ExitStack()

    def skip(self, name: str, reason: str) -> None:
        self.skipped.append(Skipped(tokens=self.tokens, contender=name, reason=reason))

    @property
    def cache_bytes(self) -> int:
        """Of our cache; stock ones are smaller."""
        return self.options.layers * self.shape.cache_bytes(self.tokens + 1, "int4")

    @property
    def fixed_bytes(self) -> int:
        """Weights, and what steps and graphs need."""
        weights = num_parameters(self.options) * self.shape.torch_dtype.itemsize
        logits = 16 * self.shape.batch * self.shape.num_q_heads * self.tokens
        # transformers' sdpa makes copies of keys and values for the group.
        copies = 2 * self.shape.row_bytes * self.shape.group_size * self.tokens * self.shape.batch
        return weights + logits + copies + (2 << 30 if self.shape.on_cuda else 1 << 28)

    def free(self) -> int | None:
        return free_device_bytes(self.shape.device) if self.shape.on_cuda else free_bytes()

    def run(self) -> list[ModelRow]:
        """Rows of whoever could take part; `skipped` says who could not, and why."""
        free = self.free()
        allowed = None if free is None else int(HEADROOM * free)
        needed = self.fixed_bytes + self.cache_bytes
        if allowed is not None and needed > allowed:
            reason = f"{NO_ROOM} {needed / 1e9:.1f} GB, of {allowed / 1e9:.1f} GB that are free"
            for name in (SDPA, FUSED, OUR_DENSE, OURS):
                self.skip(name, reason)
            return []
        together = allowed is None or needed + self.cache_bytes <= allowed
        config = config_of(self.options, self.tokens + 2)
        model = random_model(config, self.shape)
        groups = [self._stock, self._attached]
        samples: dict[str, DeviceSamples] = {}
        bandwidth = self._bandwidth()
        with self._cleanup:
            if together:
                everybody = {**self._stock(model), **self._attached(model)}
                samples |= self._measure(everybody)
            else:
                for group in groups:
                    contenders = dict(group(model))
                    samples |= self._measure(contenders)
                    contenders.clear()
                    if self.shape.on_cuda:
                        torch.cuda.empty_cache()
            return self._rows(samples, bandwidth, together)

    def _bandwidth(self) -> float:
        if self.shape.on_cuda:
            return copy_gb_per_s(torch.device(self.shape.device))
        return read_gb_per_s(1)

    def _stock(self, model: LlamaForCausalLM) -> Mapping[str, Contender]:
        found: dict[str, Contender] = {}
        step: Step | None = None
        for name, implementation in ((SDPA, "sdpa"), (FUSED, HOOK)):
            try:
                other = twin(model)
                other.set_attn_implementation(implementation)
                if step is None:
                    step = Step(other, self.shape, self.tokens, ours=False)
                one = copy.copy(step)  # one cache serves both
                one.model = other
                found[name] = self._checked(name, one, dense=True)
            except Exception as error:
                self.skip(name, as_reason(error))
        return found

    def _attached(self, model: LlamaForCausalLM) -> Mapping[str, Contender]:
        """Ours on one cache; a policy that cannot be attached here says why."""
        policies: dict[str, Any] = {
            OUR_DENSE: kvselect.Dense(),
            OURS: kvselect.TokenSelect(topk=self.options.topk, dense_below_tokens=0),
        }
        found: dict[str, Contender] = {}
        step: Step | None = None
        for name, policy in policies.items():
            try:
                other = twin(model)
                handle = self._cleanup.enter_context(kvselect.attach(other, policy))
                handle.verify()
                if step is None:
                    step = Step(other, self.shape, self.tokens, ours=True)
                one = copy.copy(step)
                one.model = other
                one.count()
                found[name] = self._checked(name, one, dense=name == OUR_DENSE)
                if name == OURS:  # the cache counts for whoever reads it, and dense steps keep all
                    self.reports[name] = partial(_kept_mass, handle)
            except Exception as error:
                self.skip(name, as_reason(error))
        return found

    def _checked(self, name: str, step: Step, dense: bool) -> Contender:
        """Logits of dense contenders agree with those of the first."""
        step.rewind()
        logits = step()
        require(bool(torch.isfinite(logits).all()), name, "logits", "finite ones")
        if self._expected_logits is None:
            self._expected_logits = logits.clone()
        error = rel_err(logits, self._expected_logits)
        self.errors[name] = error
        bound = BOUND[self.shape.torch_dtype]
        allowed = f"at most {bound} from {SDPA}"
        require(not dense or error <= bound, f"{name}, logits", f"{error:.1e}", allowed)
        return Contender(call=step, prepare=step.rewind)

    def _measure(self, contenders: Mapping[str, Contender]) -> dict[str, DeviceSamples]:
        if not contenders:
            return {}
        rounds = self.options.rounds
        if self.shape.on_cuda:
            return interleaved_replays(
                contenders,
                rounds,
                cold=lambda: None,  # weights and caches are far larger than L2
                bound=BOUND[self.shape.torch_dtype],
                max_seconds=20.0,
                on_fail=lambda name, error: self.skip(name, as_reason(error)),
            )
        found = interleaved_ms(contenders, rounds)
        return {name: DeviceSamples(ms, ms, "") for name, ms in found.items()}

    def _rows(
        self, samples: Mapping[str, DeviceSamples], bandwidth: float, together: bool
    ) -> list[ModelRow]:
        shape, options = self.shape, self.options
        weights = num_parameters(options) * shape.torch_dtype.itemsize
        timed = {}
        for name, found in samples.items():
            kept = kvselect.TokenSelect(topk=options.topk)
            listed = min(kept.num_sink_tokens + kept.keep + kept.num_recent_tokens, self.tokens)
            attended = listed if name == OURS else self.tokens
            num_bytes = 2 * shape.row_bytes * attended
            if name == OURS:
                num_bytes += int(shape.sketch_bytes("int4") * self.tokens)
            design = "int4" if name == OURS else "dense"
            layer_us = expected_us(design, shape, self.tokens, attended, bandwidth)
            expected_ms = weights / bandwidth / 1e6 + options.layers * layer_us / 1e3
            on_gpu = shape.on_cuda
            timed[name] = (
                expected_ms,
                results.timing(
                    found.event_ms,
                    weights + options.layers * shape.batch * num_bytes,
                    bandwidth,
                    1,
                    wall_ms=found.wall_ms if on_gpu else None,
                    not_captured=found.not_captured if on_gpu else None,
                ),
            )

        def clock_ms(name: str) -> float:
            found = timed[name][1]
            return found.median_ms if found.wall_ms is None else found.wall_ms

        dense = [clock_ms(name) for name in (SDPA, FUSED) if name in timed]
        rows = []
        for name, (expected_ms, found) in timed.items():
            ms = clock_ms(name)
            rows.append(
                ModelRow(
                    contender=name,
                    tokens=self.tokens,
                    batch=shape.batch,
                    layers=options.layers,
                    parameters=num_parameters(options),
                    tokens_per_s=1e3 * shape.batch / ms,
                    over_best_dense=min(dense, default=float("nan")) / ms,
                    interleaved=together,
                    kept_mass=self.reports.get(name, lambda: None)(),
                    logits_error=self.errors.get(name),
                    expected_ms=expected_ms,
                    over_expected=ms / expected_ms,
                    timing=found,
                )
            )
        return rows


def _kept_mass(handle: Any) -> float | None:
    """Mean over the layers that select."""
    masses = [layer.decode["kept_mass"] for layer in handle.report().layers if layer.selects]
    known = [mass for mass in masses if mass is not None]
    return mean(known) if known else None


COLUMNS = (
    "",
    "tokens/s",
    "ms by the\nclock",
    "ms",
    "expected\nms",
    "over\nexpected",
    "x floor",
    "x best\ndense",
    "kept\nmass",
    "graph",
)


def cells(row: ModelRow) -> list[str]:
    found = row.timing
    return [
        row.contender,
        f"{row.tokens_per_s:.1f}",
        f"{1e3 * row.batch / row.tokens_per_s:.3f}",
        f"{found.median_ms:.3f}",
        f"{row.expected_ms:.3f}",
        f"{row.over_expected:.2f}",
        f"{found.times_floor:.2f}",
        f"{row.over_best_dense:.2f}",
        "–" if row.kept_mass is None else f"{row.kept_mass:.3f}",
        {None: "–", "": "yes"}.get(found.not_captured, "no"),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = script_parser(__doc__, __file__)
    add_sizes(parser, tokens="8k", rounds=20)
    add_device(parser)
    parser.add_argument("--intermediate", type=int, default=14336)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.set_defaults(layers=32)
    quick: dict[str, object] = {"tokens": "2k", "rounds": 2, "topk": 64, "layers": 2}
    quick |= {"q_heads": 4, "kv_heads": 2, "head_dim": 32, "intermediate": 256}
    quick |= {"vocabulary": 512, "dtype": "float32"}
    options = parse(parser, arguments, quick=quick)
    tokens, shape = one_count(options.tokens, "tokens"), shape_of(options)
    number = one_count(options.threads, "threads")
    check_sizes((tokens,), (number,), topk=options.topk, rounds=options.rounds, shortest=128)
    for name in ("layers", "intermediate", "vocabulary"):
        require_int(getattr(options, name), name, 1)
    if shape.on_cuda:
        require_cuda(shape.device)
    AttentionInterface.register(HOOK, fused_attention)
    bench = Bench(options, shape, tokens)
    with threads(number):
        rows = bench.run()
    title = (
        f"one decode step after {tokens} tokens: {options.layers} layers, "
        f"{num_parameters(options) / 1e9:.2f} B parameters, {shape}, {shape.device}; random weights"
    )
    results.print_table(title, COLUMNS, [cells(row) for row in rows])
    results.print_skipped(bench.skipped)
    question = parser.description or ""
    path = results.save(options.out, question, vars(options), rows, bench.skipped)
    print("written:", path)
    ours = [one for one in bench.skipped if one.contender in (OUR_DENSE, OURS)]
    if any(not one.reason.startswith(NO_ROOM) for one in ours):
        raise SystemExit(f"left out, and should not be: {', '.join(one.contender for one in ours)}")


if __name__ == "__main__":
    main()
