"""An engine over the embedded model, and what `attach` gives for the same prompts."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

import kvselect
from kvselect.eval.checkpoint import embedded_model_path, load_checkpoint
from kvselect.eval.tasks import TASKS, dialect, dialect_sample
from kvselect.policies.base import Policy

MAX_LEN = 4096
NEW_TOKENS = 8
# Lengths around blocks of 128, around the budget of SMALL, and far beyond the window of 512.
LENGTHS = (40, 127, 128, 129, 200, 255, 256, 257, 300, 384, 511, 640, 777, 1024, 1500, 2047)

SMALL: dict[str, Any] = {
    "topk": 64,
    "num_sink_tokens": 16,
    "num_recent_tokens": 128,
    "q_block_size": 64,
    "dense_below_tokens": 0,
}


def prompts(lengths: tuple[int, ...] = LENGTHS, seed: int = 3) -> list[list[int]]:
    """Retrieval questions, each of so many tokens."""
    words = {word: i for i, word in enumerate(dialect.vocabulary())}
    found = []
    for index, length in enumerate(lengths):
        sample = dialect_sample(TASKS["niah_multikey"], length, seed=seed, index=index)
        question = sample.questions[0]
        asked = [*sample.context.tolist(), *(int(token) for token in question.tokens)]
        assert len(words) == 512 and max(asked) < 512
        found.append(asked[-length:])
    return found


class Engine:
    """Holds vLLM's LLM, and lets go of it: destroyed later it would take another one's groups."""

    def __init__(self, llm: Any) -> None:
        self.llm: Any = llm

    def generate(self, asked: list[list[int]], new_tokens: int = NEW_TOKENS) -> list[list[int]]:
        from vllm import TokensPrompt

        inputs = [TokensPrompt(prompt_token_ids=tokens) for tokens in asked]
        outputs = self.llm.generate(inputs, greedy(new_tokens), use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    @property
    def layers(self) -> list[Any]:
        """The attention implementations of the model."""
        context = self.llm.llm_engine.vllm_config.compilation_config.static_forward_context
        return [layer.impl for layer in context.values()]

    @property
    def scheduler(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core.scheduler


@contextmanager
def engine(policy: Policy | None, **options: Any) -> Iterator[Engine]:
    """A vLLM engine in this process, gone afterwards."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    arguments: dict[str, Any] = {
        "model": str(embedded_model_path()),
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": MAX_LEN,
        "hf_overrides": {"max_position_embeddings": MAX_LEN},
        "max_num_seqs": 16,
        "max_num_batched_tokens": 16384,
        "enable_prefix_caching": False,
        "seed": 0,
    }
    if policy is not None:
        arguments["additional_config"] = {"kvselect": policy.to_dict()}
    running = Engine(None)
    try:
        running.llm = LLM(**(arguments | options))
        yield running
    finally:
        running.llm = None
        gc.collect()
        cleanup_dist_env_and_memory()


def greedy(new_tokens: int) -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)


def attached(
    policy: Policy,
    asked: list[list[int]],
    new_tokens: int = NEW_TOKENS,
    model: Any = None,
    hits: list[int] | None = None,
) -> list[list[int]]:
    """The same prompts one by one under Hugging Face; ``model``: None is the embedded one.

    ``hits``: takes the lists that the selection cache reused, of all layers, prompt by prompt.
    """
    if model is None:
        model = load_checkpoint("embedded").model
    model.generation_config.eos_token_id = None
    found = []
    with kvselect.attach(model, policy) as handle:
        for tokens in asked:
            before = _hits(handle)
            ids = torch.tensor([tokens])
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
            )
            found.append(out[0, len(tokens) :].tolist())
            if hits is not None:
                hits.append(_hits(handle) - before)
    return found


def stored(folder: Path, family: str, config: dict[str, Any]) -> dict[str, Any]:
    """Options of an engine over random weights of this architecture."""
    sizes: dict[str, Any] = {
        "vocab_size": 512,
        "hidden_size": 256,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 1024,
        "initializer_range": 0.2,  # logits far apart: what is attended to decides
        "tie_word_embeddings": False,
    }
    torch.manual_seed(0)
    made = getattr(transformers, f"{family}TextConfig", None)
    made = (made or getattr(transformers, f"{family}Config"))(**sizes | config)
    getattr(transformers, f"{family}ForCausalLM")(made).save_pretrained(folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))  # what it did not know too
    return {"model": str(folder), "hf_overrides": {}, "max_model_len": 1024}


def _hits(handle: Any) -> int:
    return sum(layer.decode["num_hits"] for layer in handle.report().layers if layer.decode)
