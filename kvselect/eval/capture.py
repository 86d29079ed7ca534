"""Queries, keys and values of a model that reads a context and then decodes, token by token."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from kvselect.cache import KVCache
from kvselect.checks import require
from kvselect.eval.checkpoint import Checkpoint
from kvselect.eval.dump import Dump, LayerDump
from kvselect.eval.identity import fingerprint
from kvselect.eval.machine import describe
from kvselect.eval.memory import available_bytes, estimate, in_units
from kvselect.eval.request import default_policies
from kvselect.eval.tasks import Task, dialect_sample, prose_sample
from kvselect.integrations.hf import attach
from kvselect.integrations.hf.rotations import frequencies_hold, layer_rotations
from kvselect.policies.base import Policy, PolicyState
from kvselect.policies.dense import Dense
from kvselect.queries import Queries
from kvselect.rope import Rope
from kvselect.selection import Selection

__all__ = [
    "Text",
    "capturable_layers",
    "capture",
    "dump_bytes",
    "prompt_text",
    "reading_policy",
    "require_layers",
    "require_room",
    "task_text",
]


@dataclass(frozen=True, slots=True)
class Text:
    """What a model reads, and where it comes from (for the file's metadata)."""

    tokens: list[int]
    source: dict[str, Any]


def prompt_text(checkpoint: Checkpoint, path: Path, num_tokens: int) -> Text:
    """The first tokens of a text file.

    Raises
    ------
    ValueError
        If it cannot be read, or has fewer.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        allowed = "a text file in UTF-8"
        raise ValueError(f"prompt-file: got {str(path)!r} ({error}), allowed: {allowed}") from error
    tokens = checkpoint.tokenizer.encode(text)
    allowed = f"at most {len(tokens)} tokens, which {path.name} has"
    require(num_tokens <= len(tokens), "lengths", num_tokens, allowed)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return Text(tokens[:num_tokens], {"file": path.name, "digest": digest})


def task_text(
    checkpoint: Checkpoint, task: Task, num_tokens: int, num_queries: int, *, seed: int = 0
) -> Text:
    """A sample's context, then its questions, each with its right answer, as in a conversation.

    The conversation ends after ``num_queries`` tokens; the context takes the rest of
    ``num_tokens``, or a little less. One that is shorter is asked after by fewer tokens, so that
    the last queries of the context count.

    Raises
    ------
    ValueError
        If the task does not fit into the length, or the queries leave no context.
    """
    allowed = f"an int in 1..{num_tokens - 2} at {num_tokens} tokens"
    require(1 <= num_queries <= num_tokens - 2, "queries", num_queries, allowed)
    length = num_tokens - num_queries
    if checkpoint.speaks_dialect:
        sample = dialect_sample(task, length, seed=seed, max_questions=num_queries)
        words = checkpoint.tokenizer.get_vocab()
        answers = [[words[word] for word in one.answer] for one in sample.questions]
    else:
        sample = prose_sample(task, length, checkpoint.tokenizer, seed=seed)
        encode = checkpoint.tokenizer.encode
        answers = [
            encode(" ".join(one.answer), add_special_tokens=False) for one in sample.questions
        ]
    asked: list[int] = []
    for question, answer in zip(sample.questions, answers):
        asked += [*map(int, question.tokens), *answer]
    tokens = [*map(int, sample.context), *asked[:num_queries]]
    return Text(tokens, {"task": task.name, "seed": seed, "digest": sample.digest()})


def reading_policy(checkpoint: Checkpoint, num_tokens: int) -> Policy:
    """Dense inside the trained window; beyond it compact selection, as `kvselect eval` has it.

    Dense attention makes nonsense of hidden states beyond the window, hence of the keys of all
    layers but the first.
    """
    if num_tokens <= checkpoint.window_tokens:
        return Dense()
    policies = default_policies(checkpoint.window_tokens).values()
    return next(p for p in reversed(list(policies)) if p.positions == "compact")


def dump_bytes(
    checkpoint: Checkpoint, lengths: Sequence[int], num_queries: int, num_layers: int
) -> int:
    """Size of the file, but for its header."""
    config = checkpoint.model.config.get_text_config()
    num_heads = config.num_attention_heads
    num_kv_heads = getattr(config, "num_key_value_heads", None) or num_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    row = head_dim * checkpoint.model.dtype.itemsize * num_layers
    return sum(
        row * (3 * tokens * num_kv_heads + 2 * num_queries * num_heads) for tokens in lengths
    )


def require_room(
    checkpoint: Checkpoint, policies: Mapping[int, Policy], size: int, free_disk: int
) -> None:
    """ValueError, with the numbers, unless everything fits into memory, and the file on its disk.

    Parameters
    ----------
    policies : mapping
        By the number of tokens that are read under it.
    size : int
        Of the file [bytes].
    free_disk : int
        Where the file goes [bytes].
    """
    longest = max(policies)
    room = max(estimate(checkpoint.model, [p], n).total_bytes for n, p in policies.items())
    free = available_bytes(next(checkpoint.model.parameters()).device)
    if free is not None and room + size > free:
        raise ValueError(
            f"lengths: got {longest}, which takes about {in_units(room + size)} beside the weights "
            f"({in_units(size)} of them captured), allowed: what fits into the {in_units(free)} "
            "that are free (shorter contexts, fewer layers, a smaller dtype)"
        )
    if size > free_disk:
        raise ValueError(
            f"out: got a file of about {in_units(size)}, allowed: the {in_units(free_disk)} that "
            "are free there (fewer layers or lengths)"
        )


@dataclass(slots=True)
class _Steps:
    """What one layer's decode steps asked, and the cache of the last of them."""

    q: list[Tensor] = field(default_factory=list)
    cache: KVCache | None = None
    softmax_scale: float = 0.0
    softcap: float = 0.0
    sink_logits: Tensor | None = None


class _Recorder:
    """Sees the decode steps of a policy: every forward pass meets the layers in one order."""

    def __init__(self) -> None:
        self.layers: list[_Steps] = []
        self._calls = 0

    def begin(self, num_layers: int) -> None:
        """Forget what was seen."""
        self.layers = [_Steps() for _ in range(num_layers)]
        self._calls = 0

    def watching(self, policy: Policy) -> Policy:
        """The same policy; its selections are unchanged."""
        base: Any = type(policy)
        recorder = self

        class Watched(base):
            __slots__ = ()

            def select(
                self, state: PolicyState, queries: Queries, cache: KVCache
            ) -> Selection | None:
                if queries.phase == "decode" and recorder.layers:
                    recorder._add(queries, cache)
                found: Selection | None = base.select(self, state, queries, cache)
                return found

        if not hasattr(policy, "average_queries"):
            # Says that queries before RoPE will be asked for, so that `attach` refuses a model
            # whose rotation it cannot undo.
            Watched.average_queries = "before_rope"
        names = [one.name for one in dataclasses.fields(policy)]
        watched: Policy = Watched(**{name: getattr(policy, name) for name in names})
        return watched

    def _add(self, queries: Queries, cache: KVCache) -> None:
        steps = self.layers[self._calls % len(self.layers)]
        self._calls += 1
        steps.q.append(queries.q[0, 0].to("cpu", copy=True))
        steps.cache, steps.softmax_scale = cache, queries.softmax_scale
        steps.softcap, steps.sink_logits = queries.softcap, queries.sink_logits


def capturable_layers(checkpoint: Checkpoint) -> dict[int, str | None]:
    """Every attention layer of the model, and why it cannot be captured; None: it can.

    Raises
    ------
    UnsupportedModelError
        If the model cannot be attached to.
    """
    with attach(checkpoint.model, Dense(), break_even="off") as handle:
        return {
            layer.index: None if layer.selects else layer.reason for layer in handle.report().layers
        }


def require_layers(known: Mapping[int, str | None], wanted: Sequence[int] | None) -> list[int]:
    """The layers to capture; ``wanted`` None: all of ``known`` that can be.

    Raises
    ------
    ValueError
        Naming the first that does not exist or cannot be captured.
    """
    fine = [index for index, why in known.items() if why is None]
    for index in fine if wanted is None else wanted:
        told = f"{index} ({known[index]})" if index in known else index
        require(index in fine, "layers", told, f"of {', '.join(map(str, fine)) or 'none'}")
    require(bool(fine), "layers", "none that attends to everything", "at least one")
    return fine if wanted is None else list(wanted)


def capture(
    checkpoint: Checkpoint,
    texts: Sequence[Text],
    policies: Sequence[Policy],
    num_queries: int,
    *,
    layers: Sequence[int] | None = None,
    on_progress: Callable[[str, int], None] = lambda what, amount: None,
) -> Dump:
    """Read each text but its last ``num_queries`` tokens, then those one by one, as decoding does.

    Parameters
    ----------
    texts : list of Text
        Of different lengths.
    policies : list of Policy
        Under which each is read.
    num_queries : int
        At least 1, fewer than any text has tokens.
    layers : list of int or None
        None: all that can be captured.
    on_progress : (what, tokens) -> None
        The amounts add up to the tokens of all texts.

    Raises
    ------
    UnsupportedModelError, ValueError
        As `attach`; if a layer does not exist or cannot be captured.
    """
    wanted = require_layers(capturable_layers(checkpoint), layers)
    contexts: dict[int, list[LayerDump]] = {}
    for text, policy in zip(texts, policies, strict=True):
        num_tokens = len(text.tokens)
        allowed = f"an int in 1..{num_tokens - 2} (with {num_tokens} tokens)"
        require(1 <= num_queries <= num_tokens - 2, "queries", num_queries, allowed)
        require(num_tokens not in contexts, "lengths", f"{num_tokens} twice", "each once")
        contexts[num_tokens] = _context(checkpoint, text, policy, num_queries, wanted, on_progress)
    config = checkpoint.model.config
    about = {
        "model": {
            "name": checkpoint.name,
            "type": config.model_type,
            "fingerprint": fingerprint(checkpoint.model),
            "dtype": str(checkpoint.model.dtype).removeprefix("torch."),
            "window_tokens": checkpoint.window_tokens,
        },
        "read": [
            {"tokens": len(text.tokens), "policy": policy.to_dict(), "source": text.source}
            for text, policy in zip(texts, policies)
        ],
        **describe(),
    }
    return Dump(about=about, contexts=contexts)


def _context(
    checkpoint: Checkpoint,
    text: Text,
    policy: Policy,
    num_queries: int,
    wanted: Sequence[int],
    on_progress: Callable[[str, int], None],
) -> list[LayerDump]:
    model = checkpoint.model
    device = next(model.parameters()).device
    ids = torch.tensor(text.tokens, device=device)[None]
    begin = len(text.tokens) - num_queries
    recorder = _Recorder()
    with (
        attach(model, recorder.watching(policy), break_even="off") as handle,
        torch.inference_mode(),
    ):
        cache = DynamicCache(config=model.config)
        model(ids[:, :begin], past_key_values=cache, use_cache=True, logits_to_keep=1)
        on_progress(f"{len(text.tokens)} tokens", begin)
        plans = {layer.index: layer for layer in handle._plan.layers if layer.selects}
        recorder.begin(len(plans))
        for place in range(begin, len(text.tokens)):
            model(ids[:, place : place + 1], past_key_values=cache, use_cache=True)
            on_progress(f"{len(text.tokens)} tokens", 1)
        rotations = layer_rotations(handle)
        holds = frequencies_hold(handle, len(text.tokens))
    found = []
    for steps, (index, plan) in zip(recorder.layers, plans.items(), strict=True):
        if index not in wanted:
            continue
        cached_unrotated, rope = plan.rotates_itself, rotations[index]
        allowed = "contexts within the trained window, where the model keeps its frequencies"
        fits = holds or cached_unrotated or rope is None
        require(fits, "lengths", len(text.tokens), allowed)
        found.append(_layer(index, steps, plan.head_dim, cached_unrotated, rope))
    return found


def _layer(
    index: int, steps: _Steps, head_dim: int, cached_unrotated: bool, rope: Rope | None
) -> LayerDump:
    assert steps.cache is not None
    q = torch.stack(steps.q)[..., :head_dim]
    k = steps.cache.k[0, ..., :head_dim].to("cpu", copy=True)
    v = steps.cache.v[0].to("cpu", copy=True)
    places = torch.arange(k.shape[0])
    q_other, k_other = q, k
    if rope is not None:
        own = places[-len(q) :]
        if cached_unrotated:
            q_other, k_other = rope.rotate_at(q, own), rope.rotate_at(k, places)
        else:
            inverse = Rope.from_frequencies(
                rope.inv_freq,  # type: ignore[arg-type]
                1,
                scaling=1.0 / rope.scaling,
                start=rope.start,
                interleaved=rope.interleaved,
            )
            q_other, k_other = inverse.rotate_at(q, -own), inverse.rotate_at(k, -places)
        q_other, k_other = q_other.to(q.dtype), k_other.to(k.dtype)
    if cached_unrotated:
        q, q_other, k, k_other = q_other, q, k_other, k
    sinks = steps.sink_logits
    return LayerDump(
        index=index,
        q=q,
        q_unrotated=q_other,
        k=k,
        k_unrotated=k_other,
        v=v,
        softmax_scale=float(steps.softmax_scale),
        softcap=float(steps.softcap),
        sink_logits=None if sinks is None else sinks.to("cpu", copy=True),
        rope=rope,
    )
