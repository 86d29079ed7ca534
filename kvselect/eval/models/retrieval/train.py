"""Train the embedded retrieval model: ``python -m kvselect.eval.models.retrieval.train --out DIR``.

One command runs the whole recipe on one thread (some 18 CPU minutes) and writes a checkpoint that
plain `transformers` loads: a 4-layer Llama with grouped query heads, RoPE and tied embeddings, 0.85
M parameters.

From random weights, looking a key up in a context does not form in minutes: recall is still near
0.1 after 400 steps. So training starts from a hand-made induction circuit
(`plant_induction_circuit`), and everything is trained from there on: 0.99 after some 50 steps. Four
stages, each with a fresh optimiser:

1. variable tracking alone on short contexts, because it does not form inside a mixture;
2. all tasks, contexts growing to the window of 512 tokens;
3. all tasks at half the learning rate, weighted towards what stage 2 leaves unfinished;
4. the same again, mostly multi-value: naming all three values of a key went from 0.83 to 0.93 of
the questions.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from kvselect.eval.tasks import dialect
from kvselect.eval.tasks.dialect import IntArray
from kvselect.eval.tasks.problems import (
    Problem,
    draw_chains,
    draw_multivalue,
    draw_needles,
    draw_variables,
)

WINDOW_TOKENS = 512
MAX_VALUES_PER_KEY = 4
GROUPS_PER_BATCH = 4  # one batch mixes this many drawings, each of one task


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One optimiser run: phases are (tokens, sequences per step, steps), `mixture` task weights."""

    mixture: dict[str, float]
    phases: tuple[tuple[int, int, int], ...]
    learning_rate: float
    seed: int
    needle_steps: int = 0  # plain needles first: they settle the planted circuit

    def schedule(self) -> list[tuple[int, int]]:
        return [(length, rows) for length, rows, steps in self.phases for _ in range(steps)]


RECIPE = (
    Stage(
        mixture={"variables": 1.0},
        phases=((64, 64, 250),),
        learning_rate=2e-3,
        seed=0,
        needle_steps=20,
    ),
    Stage(
        mixture={
            "needles": 2.0,
            "pair_keys": 2.0,
            "passkey": 1.0,
            "chains": 1.5,
            "multivalue": 2.0,
            "variables": 3.0,
        },
        phases=((64, 64, 150), (128, 48, 250), (256, 28, 250), (512, 14, 300)),
        learning_rate=2e-3,
        seed=0,
    ),
    Stage(
        mixture={
            "needles": 1.0,
            "pair_keys": 2.0,
            "passkey": 1.5,
            "chains": 1.0,
            "multivalue": 3.0,
            "variables": 2.0,
        },
        phases=((128, 48, 60), (256, 28, 120), (512, 14, 130)),
        learning_rate=1e-3,
        seed=1,
    ),
    Stage(
        mixture={
            "needles": 1.0,
            "pair_keys": 1.0,
            "passkey": 1.0,
            "chains": 1.0,
            "multivalue": 5.0,
            "variables": 2.0,
        },
        phases=((256, 28, 100), (512, 14, 400)),
        learning_rate=1e-3,
        seed=2,
    ),
)


# ------------------------------------------------------------------------------------------------
# training data


@dataclass(frozen=True, slots=True)
class Batch:
    """Training sequences.

    Attributes
    ----------
    tokens : int64 [rows, length]
    targets : int64 [rows, length, MAX_VALUES_PER_KEY]
        What may stand at each place, -1 where there is no (further) target; only answers have
        targets.
    """

    tokens: IntArray
    targets: IntArray


def assemble(rng: np.random.Generator, problem: Problem, length: int, bare_words: float) -> Batch:
    """Context and all questions of a problem, one after the other, `length` tokens in all."""
    questions, start = problem.questions, problem.question_words
    targets = np.full((*questions.shape, MAX_VALUES_PER_KEY), -1, np.int64)
    targets[:, :, start:, 0] = questions[:, :, start:]
    if problem.any_order:
        # One answer position that every value of the key is right for. Which one stands there must
        # not depend on the order in which they were told, and does not: values are drawn
        # independently of it.
        targets = targets[:, :, : start + 1]
        targets[:, :, start, : questions.shape[2] - start] = questions[:, :, start:]
        questions = questions[:, :, : start + 1]
    rows = len(questions)
    context = dialect.scatter(
        rng, problem.statements, length - questions.shape[1] * questions.shape[2], bare_words
    )
    no_targets = np.full((*context.shape, MAX_VALUES_PER_KEY), -1, np.int64)
    return Batch(
        tokens=np.concatenate([context, questions.reshape(rows, -1)], axis=1),
        targets=np.concatenate([no_targets, targets.reshape(rows, -1, MAX_VALUES_PER_KEY)], axis=1),
    )


def draw_batch(rng: np.random.Generator, task: str, rows: int, length: int) -> Batch:
    """Sequences of one task with random difficulty; questions fill about half of the length."""

    def uniform(low: int, high: int) -> int:
        return int(rng.integers(low, max(low, high) + 1))

    bare_words = float(rng.choice([0.0, 0.0, 0.05, 0.15]))
    room, question_room = length - 1, int(0.55 * length)
    if task in ("needles", "pair_keys", "passkey"):
        key_words = 2 if task == "pair_keys" else 1
        value_words = 5 if task == "passkey" else uniform(1, 4)
        words = 1 + key_words + value_words
        # Half of the drawings may fill the context with statements, so that noise is no crutch.
        num_keys = uniform(
            1, min(dialect.NUM_NAMES, room // (words * (2 if rng.random() < 0.5 else 3)))
        )
        num_questions = max(
            1, min(num_keys, question_room // words, (room - num_keys * words) // words)
        )
        problem = draw_needles(
            rng,
            rows,
            num_keys,
            num_questions,
            key_words=key_words,
            value_words=value_words,
            digits=task == "passkey",
        )
    elif task == "chains":
        num_hops = uniform(1, 6)
        answer_words = num_hops + 2
        num_chains = uniform(
            1, min(dialect.NUM_NAMES // (num_hops + 1), room // (3 * num_hops + answer_words))
        )
        num_questions = max(1, min(num_chains, question_room // answer_words))
        problem = draw_chains(rng, rows, num_chains, num_hops, num_questions)
    elif task == "multivalue":
        num_values = uniform(1, MAX_VALUES_PER_KEY)
        num_keys = uniform(1, min(dialect.NUM_NAMES, room // (3 * num_values + 3)))
        num_questions = max(1, min(num_keys, question_room // 3))
        problem = draw_multivalue(rng, rows, num_keys, num_values, num_questions)
    elif task == "variables":
        num_hops = uniform(0, 2)
        members = num_hops + 1
        num_roots = uniform(1, min(dialect.NUM_NAMES // members, room // (6 * members)))
        problem = draw_variables(rng, rows, num_roots, num_hops, num_roots * members)
    else:
        raise ValueError(f"task: got {task!r}, allowed: the names in RECIPE")
    return assemble(rng, problem, length, bare_words)


# ------------------------------------------------------------------------------------------- model
# and its start


def new_model() -> LlamaForCausalLM:
    """The architecture, randomly initialised with a scale that suits 128 channels."""
    config = LlamaConfig(
        vocab_size=dialect.VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,  # 32 was clearly worse: too few slow RoPE dimensions to match keys with
        hidden_act="silu",
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        max_position_embeddings=WINDOW_TOKENS,
        tie_word_embeddings=True,
        attention_bias=False,
        mlp_bias=False,
        bos_token_id=dialect.BOS,
        eos_token_id=dialect.END,
        pad_token_id=dialect.PAD,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2:
                continue
            std = 0.1 if "embed" in name else parameter.shape[1] ** -0.5
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                std *= 0.2 / math.sqrt(2 * config.num_hidden_layers)
            parameter.normal_(0.0, std)
    return model


@torch.no_grad()
def plant_induction_circuit(
    model: LlamaForCausalLM,
    *,
    num_copy_layers: int = 3,
    constant_share: float = 0.7,
    num_fast_pairs: int = 6,
    fast_key: float = 3.0,
    slow_frequency: float = 0.02,
    match_gain: float = 3.0,
    previous_gain: float = 0.6,
    copy_gains: tuple[float, float] = (3.0, 1.5),
) -> None:
    """Write a look-up circuit into the weights, to be trained further like everything else.

    - Embeddings get a common component of relative size `constant_share` along one direction `u`. A
    projection that
      reads `u` alone gives every token the same vector.
    - Layer 0, query heads 0 and 1: such a constant key in the `num_fast_pairs` fastest RoPE pairs,
    and the same
      vector turned by -1 or -2 positions as query: they attend to the token one and two places
      back. What they read (the token's content, seen through `tag`) is written to two subspaces,
      `before_1` and `before_2`.
    - Layers 1 to `num_copy_layers`, one head per KV head. The first finds places whose `before_1`
    equals the
      current token ("what followed this word?"), the second those whose `before_2` equals the
      current `before_1` (the same, one word later), so that pairs of words can be told apart. Both
      copy the token found there. Matching uses only RoPE pairs turning slower than `slow_frequency`
      radians per token: at any distance of the window the match survives the rotation.
    """
    config = model.config
    hidden, head_dim = config.hidden_size, config.head_dim
    group_size = config.num_attention_heads // config.num_key_value_heads
    half = head_dim // 2
    theta = float(config.rope_parameters["rope_theta"])
    frequencies = theta ** -(torch.arange(0, head_dim, 2).float() / head_dim)
    generator = torch.Generator().manual_seed(7)

    embeddings = model.model.embed_tokens.weight
    u = torch.randn(hidden, generator=generator)
    u /= u.norm()
    embeddings.sub_((embeddings @ u)[:, None] * u)
    embeddings.add_(constant_share * embeddings.norm(dim=1).mean() * u)
    constant = constant_share / math.sqrt(1 + constant_share**2) * math.sqrt(hidden)
    rms = embeddings.norm(dim=1).mean().item() / math.sqrt(hidden)

    def content_rows(count: int) -> Tensor:
        """`count` orthonormal rows [count, hidden], all orthogonal to u."""
        columns = torch.randn(hidden, count + 1, generator=generator)
        columns[:, 0] = u
        return torch.linalg.qr(columns)[0][:, 1:].T

    def blend(weight: Tensor, rows: slice, planted: Tensor) -> None:
        """Keep a tenth of the random weights: training needs something to break symmetries with."""
        weight[rows] *= 0.1
        weight[rows] += planted

    def head(index: int) -> slice:
        return slice(index * head_dim, (index + 1) * head_dim)

    slow = (frequencies < slow_frequency).nonzero()[:, 0]
    slow_dims = torch.cat([slow, slow + half])  # RoPE pairs channel i with channel i + half
    num_slow = len(slow_dims)
    tag = content_rows(num_slow)
    before = content_rows(2 * num_slow)
    before_1, before_2 = before[:num_slow], before[num_slow:]
    content = content_rows(head_dim)

    first = model.model.layers[0].self_attn
    key = torch.zeros(head_dim)
    key[:num_fast_pairs] = fast_key
    # On both sides: cancels the 1/sqrt(head_dim) of the logits.
    reads_constant = u / constant * head_dim**0.25
    blend(first.k_proj.weight, head(0), key[:, None] * reads_constant)
    for query_head, distance in enumerate((1, 2)):
        angle = -distance * frequencies
        turned = torch.cat(
            [
                key[:half] * angle.cos() - key[half:] * angle.sin(),
                key[:half] * angle.sin() + key[half:] * angle.cos(),
            ]
        )
        blend(first.q_proj.weight, head(query_head), turned[:, None] * reads_constant)
    write = previous_gain * rms * math.sqrt(hidden / num_slow)
    first.v_proj.weight[:num_slow] = tag
    first.o_proj.weight[:, :num_slow] = write * before_1.T
    first.o_proj.weight[:, head_dim : head_dim + num_slow] = write * before_2.T

    for index in range(1, 1 + num_copy_layers):
        layer = model.model.layers[index].self_attn
        copy_gain = copy_gains[0] if index == 1 else copy_gains[1]
        for kv_head, (reads_query, reads_key) in enumerate(((tag, before_1), (before_1, before_2))):
            query_head = kv_head * group_size
            query, key_rows = torch.zeros(head_dim, hidden), torch.zeros(head_dim, hidden)
            query[slow_dims] = match_gain * reads_query
            key_rows[slow_dims] = reads_key
            blend(layer.q_proj.weight, head(query_head), query)
            blend(layer.k_proj.weight, head(kv_head), key_rows)
            layer.v_proj.weight[head(kv_head)] = content
            layer.o_proj.weight[:, head(query_head)] = (
                copy_gain * rms * math.sqrt(hidden / head_dim) * content.T
            )


# ---------------------------------------------------------------------------------------- training


def new_optimizer(model: nn.Module, learning_rate: float) -> torch.optim.AdamW:
    """AdamW that decays the matrices only: neither embeddings nor norms."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and "embed" not in name else others).append(parameter)
    groups = [
        {"params": matrices, "weight_decay": 0.05},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98))


def learning_rate_factor(step: int, num_steps: int) -> float:
    """20 steps up, flat for 60 % of the run, then linearly down to 2 %."""
    warm_up = min(1.0, (step + 1) / 20)
    if step < 0.6 * num_steps:
        return warm_up
    return warm_up * max(0.02, (num_steps - step) / (0.4 * num_steps))


def answer_loss(model: LlamaForCausalLM, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Cross entropy at the answer places, averaged over the targets of a place.

    Returns
    -------
    loss : Tensor, [], float32
    hit : Tensor, [num_answers], bool; the likeliest word is among the targets
    row : Tensor, [num_answers], int64; the sequence of the batch that each answer is from
    """
    tokens = torch.from_numpy(batch.tokens)
    targets = torch.from_numpy(batch.targets)[:, 1:]
    is_answer = targets[..., 0] >= 0
    with torch.autocast("cpu", torch.bfloat16):
        states = model.model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state[is_answer]
    logits = states.float() @ model.model.embed_tokens.weight.T
    targets = targets[is_answer]
    present = targets >= 0
    log_likelihood = logits.log_softmax(-1).gather(1, targets.clamp_min(0))
    loss = -((log_likelihood * present).sum(1) / present.sum(1)).mean()
    hit = (logits.argmax(-1, keepdim=True) == targets).any(1)
    return loss, hit, is_answer.nonzero()[:, 0]


def run_stage(model: LlamaForCausalLM, stage: Stage) -> Iterator[tuple[int, dict[str, float]]]:
    """Train in place; each step yields its tokens and the running accuracy of every task."""
    rng = np.random.default_rng(stage.seed)
    optimizer = new_optimizer(model, stage.learning_rate)
    schedule = stage.schedule()
    tasks = list(stage.mixture)
    weights = np.array(list(stage.mixture.values()))
    weights /= weights.sum()
    accuracy: dict[str, float] = {}
    for step, (length, rows) in enumerate(schedule):
        for group in optimizer.param_groups:
            group["lr"] = stage.learning_rate * learning_rate_factor(step, len(schedule))
        if step < stage.needle_steps:
            drawn = ["needles"] * GROUPS_PER_BATCH
        else:
            drawn = [tasks[i] for i in rng.choice(len(tasks), GROUPS_PER_BATCH, p=weights)]
        parts = [draw_batch(rng, task, rows // GROUPS_PER_BATCH, length) for task in drawn]
        batch = Batch(
            tokens=np.concatenate([part.tokens for part in parts]),
            targets=np.concatenate([part.targets for part in parts]),
        )
        optimizer.zero_grad()
        loss, hit, row = answer_loss(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        for index, task in enumerate(drawn):
            now = hit[row // (rows // GROUPS_PER_BATCH) == index].float().mean().item()
            accuracy[task] = 0.9 * accuracy.get(task, now) + 0.1 * now
        yield batch.tokens.size, accuracy


# ------------------------------------------------------------------------------------------ export


def save_tokenizer(directory: Path) -> None:
    """A word-level tokenizer: words between blanks, special tokens by their written form."""
    special = ("<pad>", "<bos>", "<end>")
    vocabulary = {word: index for index, word in enumerate(dialect.vocabulary())}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": vocabulary[word],
                "content": word,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for word in special
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<pad>"},
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<end>",
        "pad_token": "<pad>",
        "unk_token": "<pad>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": WINDOW_TOKENS,
    }
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer, indent=None) + "\n")
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def save_checkpoint(model: LlamaForCausalLM, directory: Path) -> None:
    """Float32 safetensors, configs and tokenizer, as plain `transformers` loads them."""
    directory.mkdir(parents=True, exist_ok=True)
    model.generation_config.do_sample = False
    model.save_pretrained(directory)
    save_tokenizer(directory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = new_model()
    plant_induction_circuit(model)
    record = []
    for number, stage in enumerate(RECIPE, start=1):
        num_steps, num_tokens = len(stage.schedule()), 0
        cpu = time.process_time()
        accuracy: dict[str, float] = {}
        for step, (tokens, accuracy) in enumerate(run_stage(model, stage), start=1):
            num_tokens += tokens
            if step % 25 == 0 or step == num_steps:
                shown = " ".join(f"{task} {value:.3f}" for task, value in accuracy.items())
                seconds = time.process_time() - cpu
                print(f"stage {number} step {step}/{num_steps} {seconds:.0f} s {shown}", flush=True)
        record.append(
            {
                "stage": number,
                "seed": stage.seed,
                "steps": num_steps,
                "tokens": num_tokens,
                "cpu_seconds": round(time.process_time() - cpu, 1),
                "running_accuracy": {task: round(value, 4) for task, value in accuracy.items()},
            }
        )
        save_checkpoint(model, arguments.out)
    training = {
        "stages": record,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "threads": arguments.threads,
    }
    (arguments.out / "training.json").write_text(json.dumps(training, indent=2) + "\n")


if __name__ == "__main__":
    main()
