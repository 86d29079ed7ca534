"""Train the embedded language model: ``python -m kvselect.eval.models.code.train --out DIR``.

Its text is what every Python ships: the source of the standard library and the documentation topics
of ``help()``, but for what `perplexity.held_out` keeps for measuring. Some 12 CPU minutes on one
thread; a run that was killed goes on where it was, with the same command. The weights depend on the
version of Python, whose text differs; ``training.json`` records it.

Tokens are byte pairs (1024, made from the training text) rather than bytes: a trained window of 512
then spans 1.4 KB, a function and what stands around it, instead of a few lines, and an epoch takes
a third of the time. No text is outside the vocabulary: it holds all 256 bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from kvselect.eval.models import training
from kvselect.eval.models.induction import new_model, plant_induction_circuit
from kvselect.eval.perplexity import held_out, library_files

VOCAB_SIZE, WINDOW_TOKENS = 1024, 512
SPECIAL = ("<pad>", "<bos>", "<end>")
PAD, BOS, END = range(len(SPECIAL))


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Phases are (tokens, sequences per step, steps)."""

    phases: tuple[tuple[int, int, int], ...] = ((128, 48, 150), (256, 28, 200), (512, 14, 250))
    hidden_size: int = 128
    intermediate_size: int = 384
    num_layers: int = 4
    num_q_heads: int = 4
    matrix_rate: float = 0.02  # Muon
    other_rate: float = 3e-3  # AdamW, of embeddings and norms
    seed: int = 0

    def schedule(self) -> list[tuple[int, int]]:
        return [(length, rows) for length, rows, steps in self.phases for _ in range(steps)]


RECIPE = Recipe()


def training_texts() -> list[str]:
    """Files, then topics, in the order of their names; none that is held out."""
    files = [
        path.read_text(encoding="utf-8", errors="ignore")
        for path in library_files()
        if not held_out(path.name)
    ]
    return files + [topics[name] for name in sorted(topics) if not held_out(name)]


def new_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte pairs of these texts; puts BOS before a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", BOS)]
    )
    return tokenizer


@dataclass(frozen=True, slots=True)
class Corpus:
    """The training text in tokens, each file after a BOS.

    Attributes
    ----------
    tokens : int64 [num_tokens]
    num_bytes : int
    digest : str
        Of the texts.
    """

    tokens: npt.NDArray[np.int64]
    num_bytes: int
    digest: str


def read_corpus(tokenizer: Tokenizer, texts: list[str]) -> Corpus:
    """The texts through the tokenizer."""
    whole = [text.encode() for text in texts]
    tokens = np.concatenate([np.array(tokenizer.encode(text).ids, np.int64) for text in texts])
    return Corpus(
        tokens=tokens,
        num_bytes=sum(map(len, whole)),
        digest=hashlib.sha256(b"\0".join(whole)).hexdigest()[:16],
    )


def new_language_model(recipe: Recipe) -> LlamaForCausalLM:
    """Random weights with the planted circuit; takes torch's generator as it is."""
    model = new_model(
        vocab_size=VOCAB_SIZE,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_layers=recipe.num_layers,
        num_q_heads=recipe.num_q_heads,
        window_tokens=WINDOW_TOKENS,
        special=(PAD, BOS, END),
    )
    plant_induction_circuit(model)
    return model


def new_optimizers(recipe: Recipe, model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices, AdamW for the rest."""
    matrices, others = training.split_parameters(model)
    return [
        training.Muon(matrices, recipe.matrix_rate),
        torch.optim.AdamW(others, lr=recipe.other_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def training_step(
    recipe: Recipe, corpus: Corpus, model: LlamaForCausalLM, rng: np.random.Generator, step: int
) -> tuple[Tensor, int, list[tuple[str, float]]]:
    """Loss of every token of pieces drawn anywhere, each after a BOS in the place of its first."""
    length, rows = recipe.schedule()[step]
    begins = rng.integers(0, len(corpus.tokens) - length - 1, rows)
    tokens = torch.from_numpy(corpus.tokens[begins[:, None] + np.arange(length + 1)])
    tokens[:, 0] = BOS
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    loss = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
    bits_per_byte = loss.item() / np.log(2) * len(corpus.tokens) / corpus.num_bytes
    return loss, rows * length, [("bits_per_byte", float(bits_per_byte))]


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """As `AutoTokenizer` reads it."""
    tokenizer.save(str(directory / "tokenizer.json"), pretty=False)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[BOS],
        "eos_token": SPECIAL[END],
        "pad_token": SPECIAL[PAD],
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def train(out: Path, recipe: Recipe = RECIPE, **options: Any) -> bool:
    """Run the recipe, or go on with an interrupted run; False if stopped before its end.

    Parameters
    ----------
    options
        As `training.run` takes them.
    """
    texts = training_texts()
    tokenizer = new_tokenizer(texts)
    corpus = read_corpus(tokenizer, texts)
    torch.manual_seed(0)
    model = new_language_model(recipe)
    part = training.Part(
        seed=recipe.seed,
        num_steps=len(recipe.schedule()),
        optimizers=partial(new_optimizers, recipe),
        step=partial(training_step, recipe, corpus),
    )
    found = training.run(model, [part], out, f"{recipe} on {corpus.digest}", **options)
    if found is None:
        return False
    training.save_weights(model, out)
    save_tokenizer(tokenizer, out)
    text = {
        "texts": len(texts),
        "bytes": corpus.num_bytes,
        "tokens": len(corpus.tokens),
        "sha256": corpus.digest,
    }
    training.save_record(out, found, {"text": text})
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    train(arguments.out)


if __name__ == "__main__":
    main()
