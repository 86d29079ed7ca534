"""Load a local checkpoint, or say in one paragraph why it cannot be loaded."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvselect.eval.tasks import dialect

# Where a path is asked for, "embedded:NAME" is a model inside the package, and "embedded" the one
# of them that every default means.
EMBEDDED = "embedded"
EMBEDDED_MODELS = {
    "retrieval-small": "0.5 M parameters, window 256",
    "retrieval": "0.9 M parameters, window 512: what `embedded` means",
    "code": "a language model of Python's standard library, 1.1 M parameters, window 512",
}


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged or incomplete."""


def is_embedded(name: str | Path) -> bool:
    """Whether this names a model inside the package, there or not, rather than a folder."""
    return str(name) == EMBEDDED or str(name).startswith(f"{EMBEDDED}:")


def embedded_model_path(name: str = EMBEDDED) -> Path:
    """The folder of a model that comes with kvselect; plain `transformers` loads it.

    Parameters
    ----------
    name : str
        "embedded:NAME" with a name of `EMBEDDED_MODELS`, or "embedded", which is the base of the
        retrieval models.

    Raises
    ------
    CheckpointError
        If there is no such model; names those that there are.
    """
    inside = "retrieval" if name == EMBEDDED else name.removeprefix(f"{EMBEDDED}:")
    if inside not in EMBEDDED_MODELS:
        allowed = ", ".join([EMBEDDED, *(f"{EMBEDDED}:{known}" for known in EMBEDDED_MODELS)])
        raise CheckpointError(f"model: got {name!r}, allowed: {allowed}, or a checkpoint's folder")
    return Path(__file__).resolve().parent / "models" / inside.replace("-", "_")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A loaded model with its tokenizer.

    Attributes
    ----------
    name : str
        Of the folder, for tables.
    window_tokens : int
        The context length it was trained for, as its config says.
    speaks_dialect : bool
        Its tokenizer is the dialect of `tasks/dialect.py`; otherwise tasks are asked in prose.
    """

    name: str
    model: Any
    tokenizer: Any
    window_tokens: int
    speaks_dialect: bool


# One of these is in every folder that `save_pretrained` of any tokenizer wrote.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
    "tokenizer_config.json",
)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No log lines or bars from `transformers`: what matters is raised, once, by us."""
    verbosity = transformers.logging.get_verbosity()
    progress = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity(logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if progress:
            transformers.logging.enable_progress_bar()


def load_checkpoint(path: str | Path, *, dtype: str = "auto", device: str = "cpu") -> Checkpoint:
    """Read model and tokenizer from a folder, or of a model of the package ("embedded:NAME").

    Nothing is downloaded.

    Parameters
    ----------
    path : str or Path
    dtype : str
        "auto" (as stored), "float32", "float16" or "bfloat16".
    device : str
        As torch spells it.

    Raises
    ------
    CheckpointError
        If the folder, its config, weights or tokenizer is missing, unreadable or does not fit
        together.
    """
    embedded = is_embedded(path)
    folder = embedded_model_path(str(path)) if embedded else Path(path).expanduser()
    allowed = (
        f"a folder with a checkpoint of a causal language model, {EMBEDDED!r}, or "
        f"{EMBEDDED}:NAME of {', '.join(EMBEDDED_MODELS)}"
    )
    if not (folder / "config.json").is_file():
        problem = "has no config.json" if folder.is_dir() else "is not a folder"
        raise CheckpointError(f"model: got {str(path)!r}, which {problem}, allowed: {allowed}")
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise CheckpointError(
            f"model: got {str(path)!r}, which has no tokenizer (none of "
            f"{', '.join(_TOKENIZER_FILES)}), allowed: {allowed}, with the tokenizer beside it"
        )
    try:
        with _quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model, loading = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype="auto" if dtype == "auto" else getattr(torch, dtype),
                local_files_only=True,
                output_loading_info=True,
            )
            model = model.to(device).eval()
    except Exception as error:  # the libraries share no base class for a damaged file
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"model: got {str(path)!r}, which does not load "
            f"({type(error).__name__}: {reason[:300]}), allowed: {allowed}"
        ) from error
    # transformers only warns about these and goes on with random weights.
    missing = sorted(map(str, [*loading["missing_keys"], *loading["mismatched_keys"]]))
    if missing:
        raise CheckpointError(
            f"model: got {str(path)!r}, whose weights lack or misshape {len(missing)} tensors, "
            f"first {missing[0]!r}, allowed: {allowed}"
        )
    vocabulary = {word: index for index, word in enumerate(dialect.vocabulary())}
    text_config = model.config.get_text_config()
    return Checkpoint(
        name=_shown_name(str(path)) if embedded else folder.resolve().name,
        model=model,
        tokenizer=tokenizer,
        window_tokens=int(text_config.max_position_embeddings),
        speaks_dialect=tokenizer.get_vocab() == vocabulary,
    )


def _shown_name(name: str) -> str:
    return "Embedded model" if name == EMBEDDED else f"Embedded {name.split(':', 1)[1]}"
