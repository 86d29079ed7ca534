"""The file of `kvselect capture`: queries, keys and values of a model's layers; docs/capture.md."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvselect.checks import STORAGE_DTYPES, require
from kvselect.rope import Rope

__all__ = ["FORMAT", "Dump", "DumpFileError", "LayerDump", "load_dump", "save_dump"]

FORMAT = "kvselect-capture-1"
METADATA_KEY = "kvselect"


class DumpFileError(ValueError):
    """A dump is missing, damaged, or of another program."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerDump:
    """One layer's decode steps on one context.

    Query ``j`` sits at position ``num_tokens - num_queries + j`` and sees keys up to its own.

    Attributes
    ----------
    index : int
        As the model counts its layers.
    q, q_unrotated : Tensor, [num_queries, num_q_heads, head_dim]
        At its position, and before RoPE; the same tensor in a layer without rotation.
    k, k_unrotated : Tensor, [num_tokens, num_kv_heads, head_dim]
    v : Tensor, [num_tokens, num_kv_heads, stored_head_dim]
        As kvselect stores it: narrow heads are filled up with zeros.
    softmax_scale, softcap : float
        As `Queries` has them; 0: no cap.
    sink_logits : Tensor, [num_q_heads], float32, or None
    rope : Rope or None
        With frequencies, so that `Rope.rotate_at` goes to any position; None: no rotation.
    """

    index: int
    q: Tensor
    q_unrotated: Tensor
    k: Tensor
    k_unrotated: Tensor
    v: Tensor
    softmax_scale: float
    softcap: float = 0.0
    sink_logits: Tensor | None = None
    rope: Rope | None = None

    @property
    def num_tokens(self) -> int:
        return self.k.shape[0]

    @property
    def group_size(self) -> int:
        """Query head ``h`` reads KV head ``h // group_size``."""
        return self.q.shape[1] // self.k.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        """By their names in the file."""
        found = {"q": self.q, "k": self.k, "v": self.v}
        if self.rope is not None:
            found |= {"q_unrotated": self.q_unrotated, "k_unrotated": self.k_unrotated}
        return found


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Dump:
    """A file's content.

    Attributes
    ----------
    about : dict
        Where it comes from: model, policy, source, machine, commit; docs/capture.md.
    contexts : dict, tokens -> list of LayerDump
        The layers of every captured length.
    """

    about: dict[str, Any]
    contexts: Mapping[int, Sequence[LayerDump]]


def save_dump(path: Path, dump: Dump) -> None:
    """Write the file whole or not at all.

    Raises
    ------
    OSError
        If it cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    layers: dict[str, Any] = {}
    for tokens, listed in dump.contexts.items():
        for layer in listed:
            for name, tensor in layer.tensors().items():
                tensors[f"{tokens}.{layer.index}.{name}"] = tensor.contiguous()
            rope = layer.rope
            if rope is not None:
                assert rope.inv_freq is not None
                tensors[f"layer.{layer.index}.inv_freq"] = rope.inv_freq.clone()  # layers share it
            if layer.sink_logits is not None:
                tensors[f"layer.{layer.index}.sink_logits"] = layer.sink_logits.clone()
            layers[str(layer.index)] = {
                "softmax_scale": layer.softmax_scale,
                "softcap": layer.softcap,
                "kv_head_of_q_head": [h // layer.group_size for h in range(layer.q.shape[1])],
                "rope": None
                if rope is None
                else {
                    "start": rope.start,
                    "interleaved": rope.interleaved,
                    "scaling": rope.scaling,
                },
            }
    contexts = {
        str(tokens): {
            "query_positions": [tokens - listed[0].q.shape[0], tokens],
            "layers": [layer.index for layer in listed],
        }
        for tokens, listed in dump.contexts.items()
    }
    told = {"format": FORMAT, **dump.about, "contexts": contexts, "layers": layers}
    partial = path.with_name(path.name + ".partial")
    try:
        save_file(tensors, partial, metadata={METADATA_KEY: json.dumps(told)})
        os.replace(partial, path)
    except SafetensorError as error:  # how safetensors reports an OSError
        raise OSError(str(error)) from error
    finally:
        partial.unlink(missing_ok=True)


def load_dump(path: str | Path) -> Dump:
    """Read what `save_dump` wrote; everything in it is checked.

    Raises
    ------
    DumpFileError
        If the file is missing, damaged, or of another program, or tensors do not fit together.
    """
    path = Path(path)
    allowed = "a file that kvselect capture wrote"
    if not path.is_file():
        raise DumpFileError(f"dump: got {str(path)!r}, which is not a file, allowed: {allowed}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise DumpFileError(
            f"dump: got {str(path)!r}, which is damaged ({error}), allowed: {allowed}"
        ) from error
    try:
        about = json.loads(metadata.get(METADATA_KEY, "{}"))
        require(isinstance(about, dict), "metadata", type(about).__name__, "a JSON object")
        require(about.get("format") == FORMAT, "format", about.get("format"), repr(FORMAT))
        layers, told = about.pop("layers"), about.pop("contexts")
        contexts = {
            int(tokens): [
                _layer(int(tokens), context, int(index), layers[str(index)], tensors)
                for index in context["layers"]
            ]
            for tokens, context in told.items()
        }
        require(bool(contexts), "contexts", "none", "at least one")
    except (KeyError, TypeError, AttributeError) as error:
        raise DumpFileError(
            f"dump: got {str(path)!r}, whose metadata lacks or misspells {error}, allowed: "
            f"{allowed} (format {FORMAT!r})"
        ) from error
    except ValueError as error:
        raise DumpFileError(f"dump: got {str(path)!r}, where {error}; so not {allowed}") from error
    return Dump(about=about, contexts=contexts)


def _layer(
    tokens: int,
    context: Mapping[str, Any],
    index: int,
    told: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> LayerDump:
    """One layer's tensors, checked against each other and the metadata."""

    def tensor(name: str) -> Tensor:
        full = f"{tokens}.{index}.{name}"
        require(full in tensors, full, None, "a tensor")
        found = tensors[full]
        require(found.dtype in STORAGE_DTYPES, full, found.dtype, "float32, float16 or bfloat16")
        require(found.ndim == 3, full, list(found.shape), "3 dimensions")
        return found

    q, k, v = tensor("q"), tensor("k"), tensor("v")
    first, last = context["query_positions"]
    heads = told["kv_head_of_q_head"]
    group_size = q.shape[1] // max(k.shape[1], 1)
    where = f"{tokens}.{index}"
    require(q.shape[0] == last - first >= 1, f"{where}.q", list(q.shape), f"{last - first} queries")
    require(last == tokens == k.shape[0], f"{where}.k", list(k.shape), f"{tokens} tokens")
    require(q.shape[2] == k.shape[2], f"{where}.q", list(q.shape), f"head_dim {k.shape[2]}")
    require(k.shape[:2] == v.shape[:2], f"{where}.v", list(v.shape), "tokens and heads of k")
    map_fits = heads == [h // max(group_size, 1) for h in range(q.shape[1])]
    map_fits &= group_size >= 1 and q.shape[1] % max(k.shape[1], 1) == 0
    require(map_fits, "kv_head_of_q_head", heads, "runs of equal length, one per KV head")
    scale = float(told["softmax_scale"])
    require(0.0 < scale < float("inf"), "softmax_scale", scale, "a float > 0")
    for name, one in (("q", q), ("k", k), ("v", v)):
        require(bool(one.isfinite().all()), f"{where}.{name}", "NaN or inf", "finite numbers")
    rope = None
    if told["rope"] is not None:
        name = f"layer.{index}.inv_freq"
        require(name in tensors, name, None, "a tensor")
        inv_freq = tensors[name].float()
        settings = told["rope"]
        fits = inv_freq.ndim == 1 and settings["start"] + 2 * inv_freq.shape[0] <= q.shape[2]
        require(fits, name, list(inv_freq.shape), f"frequencies for head_dim {q.shape[2]}")
        rope = Rope.from_frequencies(
            inv_freq,
            1,
            scaling=settings["scaling"],
            start=settings["start"],
            interleaved=settings["interleaved"],
        )
    unrotated = {"q": q, "k": k}
    if rope is not None:
        for name, rotated in (("q", q), ("k", k)):
            unrotated[name] = tensor(f"{name}_unrotated")
            fits = unrotated[name].shape == rotated.shape
            got = list(unrotated[name].shape)
            require(fits, f"{where}.{name}_unrotated", got, f"the shape of {name}")
    return LayerDump(
        index=index,
        q=q,
        q_unrotated=unrotated["q"],
        k=k,
        k_unrotated=unrotated["k"],
        v=v,
        softmax_scale=scale,
        softcap=float(told["softcap"]),
        sink_logits=tensors.get(f"layer.{index}.sink_logits"),
        rope=rope,
    )
