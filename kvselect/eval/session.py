"""One policy on its own view of a model: read a context, answer questions about it, be counted and
timed."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from kvselect.eval.audit import Audit, audited
from kvselect.eval.checkpoint import Checkpoint
from kvselect.eval.tasks import Question, grade
from kvselect.integrations.hf import attach
from kvselect.policies.base import Policy
from kvselect.sketch import bytes_per_token


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What decode steps read, over all selecting layers; sums, so that contexts add up.

    Attributes
    ----------
    tokens_attended, num_lists : float
        Their ratio: tokens attended per step, layer and KV head.
    bytes_read, dense_bytes_read : float
        Of keys, values and sketch, and what dense attention reads (modelled).
    num_hits, num_misses : int
        Of the selection cache.
    """

    tokens_attended: float
    num_lists: float
    bytes_read: float
    dense_bytes_read: float
    num_hits: int
    num_misses: int

    def since(self, earlier: Traffic) -> Traffic:
        """What was added after `earlier`."""
        names = Traffic.__slots__
        return Traffic(**{name: getattr(self, name) - getattr(earlier, name) for name in names})

    @staticmethod
    def total(parts: Iterable[Traffic]) -> Traffic:
        """The sum of several."""
        listed, names = list(parts), Traffic.__slots__
        return Traffic(**{name: sum(getattr(part, name) for part in listed) for name in names})

    @property
    def tokens_per_step(self) -> float:
        return self.tokens_attended / self.num_lists if self.num_lists else 0.0

    @property
    def bytes_ratio(self) -> float:
        return self.bytes_read / self.dense_bytes_read if self.dense_bytes_read else 1.0

    @property
    def hit_rate(self) -> float | None:
        """Share of the lists looked up that were reused; None: the policy reuses none."""
        looked_up = self.num_hits + self.num_misses
        return self.num_hits / looked_up if looked_up else None


class Session:
    """One policy on its own view of the model, attached while the session is open.

    Parameters
    ----------
    label : str
    model : PreTrainedModel
        A view that no other session uses (`share_weights`).
    policy : Policy
    """

    def __init__(self, label: str, model: Any, policy: Policy) -> None:
        self.label = label
        self.model = model
        self.policy = policy
        self.audit = Audit()
        self.cache: Any = None
        self._context: Tensor | None = None
        self._handle = attach(model, audited(policy, self.audit), break_even="off")

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc: object) -> None:
        self.forget()
        self._handle.detach()

    def forget(self) -> None:
        """Give the memory of the cache back."""
        self.cache = None
        self.audit.forget_layers()

    def step(self, tokens: Tensor) -> Tensor:
        """Append tokens [n] to the cache; logits [vocab_size] after the last of them."""
        output = self.model(
            input_ids=tokens[None], past_key_values=self.cache, use_cache=True, logits_to_keep=1
        )
        logits: Tensor = output.logits[0, -1]
        return logits

    def timed_step(self, tokens: Tensor) -> float:
        """`step`, in seconds of wall time."""
        _finish(tokens.device)
        begin = time.perf_counter()
        self.step(tokens)
        _finish(tokens.device)
        return time.perf_counter() - begin

    def prefill(self, context: Tensor) -> float:
        """Read a context into a new cache; seconds of wall time."""
        self.forget()
        self.cache = DynamicCache(config=self.model.config)
        self._context = context
        return self.timed_step(context)

    def selecting_layers(self) -> list[int]:
        """Indices of the layers that the policy serves, in the order of `Audit.masses`."""
        return [layer.index for layer in self._handle.report().layers if layer.selects]

    def traffic(self) -> Traffic:
        """Of all decode steps so far."""
        config = self.model.config.get_text_config()
        head_dim = getattr(config, "head_dim", None)
        head_dim = head_dim or config.hidden_size // config.num_attention_heads
        key_bytes = head_dim * self.model.dtype.itemsize
        sketch = self.policy.required_sketch
        scan_bytes = key_bytes if sketch is None else bytes_per_token(sketch, head_dim)
        parts = []
        for layer in self._handle.report().layers:
            if not layer.selects:
                continue
            counts: dict[str, Any] = layer.decode
            visible, per_step = counts["tokens_visible"], layer.context_per_step
            parts.append(
                Traffic(
                    tokens_attended=counts["tokens_attended"],
                    num_lists=round(visible / per_step) if per_step else 0,
                    bytes_read=counts["tokens_attended"] * 2.0 * key_bytes
                    + counts["tokens_scanned"] * scan_bytes
                    + counts["tokens_scored_from_keys"] * key_bytes,
                    dense_bytes_read=visible * 2.0 * key_bytes,
                    num_hits=counts["num_hits"],
                    num_misses=counts["num_misses"],
                )
            )
        return Traffic.total(parts)

    def cache_bytes(self) -> int:
        """Memory of the session's cache, sketch and room to grow included."""
        total = 0
        for layer in self.cache.layers:
            own = getattr(layer, "cache", None)  # of the layers that we replaced
            total += layer.keys.nbytes + layer.values.nbytes if own is None else own.nbytes
        return total

    def crop_to(self, num_tokens: int) -> None:
        """Forget everything after the context.

        A cache whose tokens were dropped with the question in sight reads the context again, so
        that an eviction meets every question as the first.
        """
        surplus = self.cache.get_seq_length() - num_tokens
        saw_question = getattr(self.policy, "evict_at", None) == "decode"
        dropped = any(getattr(layer, "has_dropped", False) for layer in self.cache.layers)
        if dropped and saw_question:
            assert self._context is not None and len(self._context) == num_tokens
            self.prefill(self._context)
        elif surplus > 0:
            self.cache.crop(-surplus)


def share_weights(model: Any) -> Any:
    """A second model object over the same parameters and buffers: hooks of one do not reach the
    other."""
    memo = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def stop_tokens(checkpoint: Checkpoint) -> set[int]:
    """Ids that end a generation."""
    config = checkpoint.model.generation_config
    ids = [] if config is None or config.eos_token_id is None else config.eos_token_id
    return set(ids) if isinstance(ids, list) else {int(ids)}


def answer(session: Session, question: Question, device: torch.device, stop: set[int]) -> list[int]:
    """Ask one question on the session's cache, greedily; the cache is as before afterwards."""
    before = session.cache.get_seq_length()
    logits = session.step(torch.as_tensor(question.tokens, device=device))
    if question.top_words:
        tokens = logits.topk(len(question.answer)).indices.tolist()
    else:
        tokens = [int(logits.argmax())]
        while len(tokens) < question.max_new_tokens and tokens[-1] not in stop:
            logits = session.step(torch.tensor(tokens[-1:], device=device))
            tokens.append(int(logits.argmax()))
    session.crop_to(before)
    return tokens


def graded(checkpoint: Checkpoint, question: Question, tokens: list[int]) -> tuple[float, str]:
    """Score in [0, 1] and text of generated tokens: words in the dialect, otherwise decoded."""
    if checkpoint.speaks_dialect:
        words = checkpoint.tokenizer.convert_ids_to_tokens(tokens)
        return grade(question, " ".join(words)), " ".join(words)
    text = checkpoint.tokenizer.decode(tokens, skip_special_tokens=True)
    return grade(question, text), text


def time_decode(
    sessions: Sequence[Session], token: Tensor, timed_steps: int
) -> dict[str, list[float]]:
    """Wall times of `timed_steps` decode steps of each session [s], one step of each in turn, after
    one to warm up. The caches are as before afterwards."""
    order = list(sessions)
    seconds: dict[str, list[float]] = {session.label: [] for session in order}
    for session in order:
        session.audit.enabled = False
    for step in range(1 + timed_steps):
        for session in order:
            taken = session.timed_step(token)
            if step > 0:
                seconds[session.label].append(taken)
        order = order[1:] + order[:1]
    for session in order:
        session.crop_to(session.cache.get_seq_length() - 1 - timed_steps)
        session.audit.enabled = True
    return seconds
