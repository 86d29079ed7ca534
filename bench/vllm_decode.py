"""How many tokens a second does vLLM's CPU build decode with selection, and without?

Layers of Llama 8B's shape with random weights behind vLLM's own engine: scheduler, projections, MLP
and sampling included. Contexts are random keys and values, put in place of the prefill, which would
take hours; the decode steps are vLLM's. Random keys are the worst case for kept mass: attention
over them is flat. Needs vLLM (docs/serving.md): run it with that environment's Python.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvselect import Dense, TokenSelect
from kvselect.bench import results
from kvselect.bench.request import parse, parse_counts, script_parser
from kvselect.policies.base import Policy

VOCABULARY = 1024
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": VOCABULARY,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True)
class Row:
    contender: str
    requests: int
    tokens: int
    tokens_per_s: float
    step_ms: float
    p20_ms: float
    p80_ms: float
    samples_ms: list[float]
    over_vllm: float
    tokens_attended_share: float
    kept_mass: float | None


def write_model(folder: Path, layers: int, tokens: int) -> None:
    config = CONFIG | {"num_hidden_layers": layers, "max_position_embeddings": tokens}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def random_contexts(runner: Any) -> None:
    """Have steps of many tokens store random keys and values and compute nothing else."""
    model, forward = runner.model, runner.model.forward
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn((2**22,), generator=generator).to(torch.bfloat16)

    def draw(num_tokens: int, heads: int, dim: int) -> torch.Tensor:
        need = num_tokens * heads * dim
        first = int(torch.randint(0, 2**12, (1,), generator=generator)) * 64
        flat = pool.roll(-first).repeat(-(-need // pool.numel()))[:need]
        return flat.view(num_tokens, heads, dim)

    def stored(input_ids: Any, positions: Any, *more: Any, **options: Any) -> Any:
        if positions.shape[-1] <= 256:
            return forward(input_ids, positions, *more, **options)
        context = runner.vllm_config.compilation_config.static_forward_context
        for name, layer in context.items():
            num_tokens = positions.shape[-1]
            sizes = (num_tokens, layer.num_kv_heads, layer.head_size)
            torch.ops.vllm.unified_kv_cache_update(draw(*sizes), draw(*sizes), name)
        hidden = runner.model_config.get_hidden_size()
        return torch.zeros((positions.shape[-1], hidden), dtype=torch.bfloat16)

    model.forward = stored


def run(
    policy: Policy | None, folder: Path, requests: int, tokens: int, steps: int
) -> tuple[list[float], float, float | None]:
    """Milliseconds of each decode step; share of tokens attended and kept mass, where known."""
    from vllm import LLM, SamplingParams, TokensPrompt
    from vllm.distributed import cleanup_dist_env_and_memory

    room = tokens + 128
    blocks = requests * -(-room // 128) + 8
    extra = {} if policy is None else {"additional_config": {"kvselect": policy.to_dict()}}
    llm: Any = LLM(
        model=str(folder),
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=room,
        max_num_seqs=requests,
        max_num_batched_tokens=room,
        num_gpu_blocks_override=blocks,
        enable_prefix_caching=False,
        disable_log_stats=True,
        **extra,
    )
    engine = llm.llm_engine
    worker = engine.model_executor.driver_worker
    random_contexts(getattr(worker, "worker", worker).model_runner)
    generator = torch.Generator().manual_seed(1)
    sampling = SamplingParams(temperature=0.0, max_tokens=steps + requests + 8, ignore_eos=True)
    sampling.detokenize = False
    for index in range(requests):
        ids = torch.randint(3, VOCABULARY, (tokens,), generator=generator).tolist()
        engine.add_request(str(index), TokensPrompt(prompt_token_ids=ids), sampling)
    scheduler = engine.engine_core.engine_core.scheduler
    while len(scheduler.running) < requests or any(
        request.num_computed_tokens < tokens for request in scheduler.running
    ):
        engine.step()
    for _ in range(2):  # buffers
        engine.step()
    samples = []
    for _ in range(steps):
        begin = time.perf_counter()
        engine.step()
        samples.append((time.perf_counter() - begin) * 1e3)
    attended, mass = 1.0, None
    context = engine.vllm_config.compilation_config.static_forward_context
    served = [layer.impl._served for layer in context.values()]
    if policy is not None:
        counts = [layer.state.decode for layer in served]
        visible = sum(count.tokens_visible for count in counts)
        attended = sum(count.tokens_attended for count in counts) / visible
        masses = [count.kept_mass for count in counts if count.kept_mass is not None]
        mass = statistics.fmean(masses) if masses else None
    del llm, engine, worker, scheduler, context, served
    gc.collect()
    cleanup_dist_env_and_memory()
    return samples, attended, mass


def main(arguments: Sequence[str] | None = None) -> None:
    parser = script_parser(__doc__, __file__)
    parser.add_argument("--tokens", default="32k", help="of each context")
    parser.add_argument("--requests", default="4,8", help="at once")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12)
    quick = {"tokens": "4k", "requests": "2", "layers": 1, "steps": 3}
    options = parse(parser, arguments, quick=quick)
    # In this process, so that contexts can be put in place; before vLLM is imported.
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="8", VLLM_LOGGING_LEVEL="ERROR"
    )
    contenders: dict[str, Policy | None] = {
        "vLLM": None,
        "kvselect Dense": Dense(),
        "kvselect TokenSelect()": TokenSelect(dense_below_tokens=0),
    }
    rows = []
    for tokens in parse_counts(options.tokens, "tokens"):
        for requests in parse_counts(options.requests, "requests"):
            with tempfile.TemporaryDirectory() as name:
                write_model(Path(name), options.layers, tokens + 128)
                base = 0.0
                for contender, policy in contenders.items():
                    samples, share, mass = run(policy, Path(name), requests, tokens, options.steps)
                    median = statistics.median(samples)
                    base = base or median
                    tenths = statistics.quantiles(samples, n=10)
                    rows.append(
                        Row(
                            contender,
                            requests,
                            tokens,
                            requests / median * 1e3,
                            median,
                            tenths[1],
                            tenths[7],
                            samples,
                            base / median,
                            share,
                            mass,
                        )
                    )
    columns = ["contender", "requests", "tokens", "tokens/s", "step ms", "over vLLM", "kept mass"]
    threads = torch.get_num_threads()
    results.print_table(
        f"{options.layers} layers of Llama 8B's shape, bfloat16, {threads} threads",
        columns,
        [
            [
                row.contender,
                str(row.requests),
                str(row.tokens),
                f"{row.tokens_per_s:.1f}",
                f"{row.step_ms:.0f}",
                f"{row.over_vllm:.2f}",
                "-" if row.kept_mass is None else f"{row.kept_mass:.3f}",
            ]
            for row in rows
        ],
    )
    config = {**vars(options), "threads": threads}
    print("written:", results.save(options.out, parser.description or "", config, rows))


if __name__ == "__main__":
    main()
