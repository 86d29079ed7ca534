"""What an attached model did, layer by layer: a table for people, a dict for JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from io import StringIO
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from kvselect import ops
from kvselect.integrations.hf.dense_border import dense_border
from kvselect.integrations.hf.plan import LayerPlan, StackPlan
from kvselect.integrations.hf.stack import execution_device
from kvselect.policies.base import Policy


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One attention layer.

    Attributes
    ----------
    index : int
        ``layer_idx``.
    selects : bool
    reason : str or None
        Why it runs dense.
    note : str or None
        What else a user should know of it.
    rope, rope_fit_error : str, float
        Measured layout and its relative error.
    cache_layer : str
        Type of the cache layer of the last call; empty before the first.
    ran_dense : dict
        Calls that should have selected but could not, by reason.
    bytes_read, dense_bytes_read : float
        Modelled traffic of keys, values and sketch, prefill and decode together, and that of dense
        attention [bytes].
    nonfinite_cached : int
        Tokens of the last cache whose key or value held NaN or inf, summed over KV heads.
    nonfinite_scored : int
        Tokens and query vectors met by the scores that held NaN or inf, once per call that met
        them.
    dense_up_to : int or None
        Decode steps of at most so many tokens are dense; None: the method knows no such border, or
        the layer never selects.
    dense_up_to_source : str or None
        Whether the policy says so, a measurement, or the budget, and why.
    tokens_per_step, context_per_step : float or None
        Mean tokens that a query of a decode step attended to, per row and KV head, and what dense
        would have.
    prefill, decode : dict
        Counts of `PhaseStatistics`.
    resident_tokens : int or None
        Tokens per row and KV head on the device, of the cache layer that it reads; None: all.
    residency : dict or None
        With ``keep="cpu"``: what moved, by `Residency`.
    shared_prefix : dict or None
        Of caches that share prefixes (`Handle.share_prefixes`): decode steps, the prefix bytes that
        each reads and would read with a prefix per row, the bytes that the last cache's prefixes
        take and would take.
    replacement : "lru", "lru_s" or None
        With ``keep="cpu"``: which listed token makes room.
    """

    index: int
    selects: bool
    reason: str | None
    note: str | None
    rope: str
    rope_fit_error: float
    cache_layer: str
    ran_dense: dict[str, int]
    bytes_read: float
    dense_bytes_read: float
    nonfinite_cached: int
    nonfinite_scored: int
    dense_up_to: int | None
    dense_up_to_source: str | None
    tokens_per_step: float | None
    context_per_step: float | None
    prefill: dict[str, Any]
    decode: dict[str, Any]
    resident_tokens: int | None = None
    residency: dict[str, Any] | None = None
    shared_prefix: dict[str, float] | None = None
    replacement: str | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """What an attached model did since `attach`; ``str()`` of it is a table.

    Attributes
    ----------
    model : str
    policy : dict
        ``policy.to_dict()``.
    mode : str
        Which phases select.
    positions : {"original", "compact"}
    trained_length : int
        Of the model [tokens].
    revocable, query_aware : bool
        Whether a token that is not kept now may come back, and whether the query decides: which
        tasks can pass.
    question_aware : bool
        Whether the question selects before the context is read (`Policy.num_question_tokens`): such
        scores compare with no others.
    kernel : str
        Device, and on the CPU the implementation in use.
    layers : tuple of LayerReport
    """

    model: str
    policy: dict[str, Any]
    mode: str
    positions: str
    trained_length: int
    revocable: bool
    query_aware: bool
    question_aware: bool
    kernel: str
    layers: tuple[LayerReport, ...]

    @property
    def bytes_ratio(self) -> float | None:
        """Modelled bytes read by all selecting layers, over dense; None before the first call."""
        dense = sum(layer.dense_bytes_read for layer in self.layers)
        return sum(layer.bytes_read for layer in self.layers) / dense if dense else None

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values that JSON takes."""
        return {
            **asdict(self),
            "layers": [asdict(layer) for layer in self.layers],
            "bytes_ratio": self.bytes_ratio,
        }

    def __str__(self) -> str:
        words = [
            f"{self.model}: {self.policy['policy']}, {self.mode}, {self.positions} positions "
            f"(trained length {self.trained_length} tokens), kernels {self.kernel}",
            f"revocable: {_yes(self.revocable)} (may a token come back?), "
            f"query-aware: {_yes(self.query_aware)}"
            + (", question-aware: yes" if self.question_aware else ""),
        ]
        words += _border_lines(self.layers)
        words += _kernel_lines(self.layers)
        words += _audit_lines(self.layers)
        words += _tier_lines(self.layers)
        words += _prefix_lines(self.layers)
        if self.bytes_ratio is not None:
            words.append(
                f"bytes read against dense, all selecting layers (modelled): {self.bytes_ratio:.1%}"
            )
        table = Table(box=None, pad_edge=False, header_style="")
        for name in ("layer", "runs", "RoPE", "fit error", "cache layer"):
            table.add_column(name, no_wrap=name != "runs", max_width=44 if name == "runs" else None)
        for name in ("hits", "tokens/step", "bytes", "kept mass", "NaN cache/scores"):
            table.add_column(name, justify="right", no_wrap=True)
        for layer in self.layers:
            table.add_row(*_cells(layer, self.policy.get("mass_target")))
        out = StringIO()
        Console(file=out, width=160, no_color=True, highlight=False).print(table)
        lines = [line.rstrip() for line in out.getvalue().splitlines()]
        return "\n".join(words + lines)


def make_report(model: PreTrainedModel, plan: StackPlan) -> Report:
    """The report of an attachment; reads the device's counters."""
    policy = plan.policy
    stack = plan.owner()
    assert stack is not None  # the model holds it
    device = execution_device(stack).type
    return Report(
        model=type(model).__name__,
        policy=policy.to_dict(),
        mode=_mode(policy),
        positions=policy.positions,
        trained_length=plan.trained_length,
        revocable=policy.revocable,
        query_aware=policy.query_aware,
        question_aware=policy.num_question_tokens > 0,
        kernel=f"cpu ({ops.cpu_implementation()})" if device == "cpu" else device,
        layers=tuple(_layer_report(layer, policy) for layer in plan.layers),
    )


def _layer_report(layer: LayerPlan, policy: Policy) -> LayerReport:
    layer.count_captured()
    phases = layer.statistics
    sizes = (layer.head_dim, layer.itemsize)
    border = dense_border(layer)
    tier = None if layer.source is None else layer.stack.tiers.get(layer.source)
    return LayerReport(
        index=layer.index,
        selects=layer.selects,
        reason=layer.reason,
        note=_note(layer),
        rope=str(layer.layout),
        rope_fit_error=layer.fit_error,
        cache_layer=layer.cache_class,
        ran_dense=dict(layer.runtime_dense),
        bytes_read=sum(phase.bytes_read(*sizes, policy.required_sketch) for phase in phases)
        - 2 * layer.head_dim * layer.itemsize * float(layer.prefix_counts.saved_tokens),
        dense_bytes_read=sum(phase.dense_bytes_read(*sizes) for phase in phases),
        nonfinite_cached=0 if layer.nonfinite is None else int(layer.nonfinite.sum()),
        nonfinite_scored=sum(phase.num_nonfinite for phase in phases),
        dense_up_to=None if border is None else border.tokens,
        dense_up_to_source=None if border is None else border.source,
        tokens_per_step=phases[1].tokens_attended / layer.num_lists if layer.num_lists else None,
        context_per_step=phases[1].tokens_visible / layer.num_lists if layer.num_lists else None,
        prefill=phases[0].to_dict(),
        decode=phases[1].to_dict(),
        resident_tokens=None if tier is None else tier.resident_tokens,
        residency=None if tier is None else tier.residency.to_dict(),
        shared_prefix=_shared_prefix(layer),
        replacement=None if tier is None else tier.replacement,
    )


def _shared_prefix(layer: LayerPlan) -> dict[str, float] | None:
    """`LayerReport.shared_prefix`; None before the first call on such a cache."""
    counts = layer.prefix_counts
    if not counts.separate_held_bytes:
        return None
    per_token = 2 * layer.head_dim * layer.itemsize
    steps = max(counts.num_steps, 1)
    return {
        "num_steps": counts.num_steps,
        "bytes_per_step": per_token * float(counts.step_tokens) / steps,
        "separate_bytes_per_step": per_token * float(counts.separate_step_tokens) / steps,
        "held_bytes": counts.held_bytes,
        "separate_held_bytes": counts.separate_held_bytes,
    }


def _note(layer: LayerPlan) -> str | None:
    if not layer.selects:
        return None
    if layer.source is None:
        return (
            "exact, but slower than dense: transformers makes keys and values of all tokens anew "
            "from the latents at every step (MLA)"
        )
    return f"reads the keys of layer {layer.source}" if layer.source != layer.index else None


def _mode(policy: Policy) -> str:
    if getattr(policy, "dense_prefill", False) or "prefill" not in policy.phases:
        return "dense prefill, decode selects"
    return (
        "prefill and decode select"
        if "decode" in policy.phases
        else "prefill selects, dense decode"
    )


def _border_lines(layers: tuple[LayerReport, ...]) -> list[str]:
    """One line for each border; which layers it holds for where there are several."""
    borders: dict[tuple[int, str], list[str]] = {}
    for layer in layers:
        if layer.dense_up_to is not None and layer.dense_up_to_source is not None:
            border = layer.dense_up_to, layer.dense_up_to_source
            borders.setdefault(border, []).append(str(layer.index))
    return [
        f"decode steps of at most {tokens} tokens are dense"
        + (f" in layers {', '.join(indices)}" if len(borders) > 1 else "")
        + f" ({source})"
        for (tokens, source), indices in borders.items()
    ]


def _kernel_lines(layers: tuple[LayerReport, ...]) -> list[str]:
    """One line if a prefill attended by something else than `sparse_attention` alone."""
    calls: dict[str, int] = {}
    for layer in layers:
        for name, count in (layer.prefill["attention_kernels"] or {}).items():
            calls[name] = calls.get(name, 0) + count
    if not set(calls) - {"sparse_attention"}:
        return []
    return ["prefill attention: " + ", ".join(f"{name} ({calls[name]})" for name in sorted(calls))]


def _audit_lines(layers: tuple[LayerReport, ...]) -> list[str]:
    """One line for each audited layer: what exact scores say of its lists."""
    lines = []
    for layer in layers:
        audit = layer.decode["exact_audit"]
        if audit is not None:
            lines.append(
                f"layer {layer.index}: {audit['num_lists']} lists audited: they hold "
                f"{audit['overlap']:.1%} of the exact top-k (least {audit['least_overlap']:.1%}), "
                f"mass {audit['mass']:.1%} against {audit['exact_mass']:.1%}"
            )
    return lines


def _prefix_lines(layers: tuple[LayerReport, ...]) -> list[str]:
    """One line if prefixes were shared: what a decode step reads of them, and what they take."""
    found = [layer.shared_prefix for layer in layers if layer.shared_prefix is not None]
    if not found:
        return []
    read, apart, held, separate = (
        sum(layer[name] for layer in found)
        for name in (
            "bytes_per_step",
            "separate_bytes_per_step",
            "held_bytes",
            "separate_held_bytes",
        )
    )
    line = f"shared prefixes hold {held / 1e6:.2f} MB, {separate / held:.2f} times less than apart"
    if read:
        line += f"; a decode step reads {read / 1e6:.2f} MB of them, {apart / read:.2f} times less"
    return [line]


def _tier_lines(layers: tuple[LayerReport, ...]) -> list[str]:
    """One line if keys and values are kept in host memory: where, and what that moved."""
    tiered = [layer for layer in layers if layer.residency is not None]
    if not tiered:
        return []
    own = [layer for layer in tiered if layer.note is None]  # several may read one cache layer
    moved = [layer.residency for layer in own if layer.residency is not None]
    steps = max((counts["num_steps"] for counts in moved), default=0)
    found, fetched = (sum(c[name] for c in moved) for name in ("num_found", "num_fetched"))
    line = (
        f"keep='cpu' in {len(tiered)} of {len(layers)} layers: "
        f"{tiered[0].resident_tokens} tokens per row and KV head on the device "
        f"({tiered[0].replacement})"
    )
    if steps:
        per_step = sum(counts["fetched_bytes"] for counts in moved) / steps
        share = _share(found / (found + fetched) if found + fetched else None)
        line += f"; {share} of the listed rows were there, {per_step / 1e6:.2f} MB moved per step"
    return [line]


def _cells(layer: LayerReport, mass_target: float | None) -> list[str]:
    """One row of the table."""
    runs = "selects" if layer.selects else f"dense: {layer.reason}"
    runs += f"; {layer.note}" if layer.note else ""
    runs += "".join(f"; dense {count}x: {reason}" for reason, count in layer.ran_dense.items())
    decode = layer.decode
    if layer.dense_up_to is not None and decode["num_dense_calls"]:
        runs += f"; {decode['num_dense_calls']} of {decode['num_calls']} steps dense: short"
    if decode["picked_for_mass"] is not None:
        short, lists = decode["num_short_of_mass"], sum(decode["picked_for_mass"])
        runs += f"; {short} of {lists} lists short of mass {mass_target}"
    steps = "-"
    if layer.tokens_per_step is not None:
        steps = f"{layer.tokens_per_step:.0f} of {layer.context_per_step:.0f}"
    return [
        str(layer.index),
        runs,
        layer.rope,
        f"{layer.rope_fit_error:.0e}",
        layer.cache_layer or "-",
        _share(decode["hit_rate"]),
        steps,
        _share(layer.bytes_read / layer.dense_bytes_read if layer.dense_bytes_read else None),
        _share(decode["kept_mass"]),
        f"{layer.nonfinite_cached} / {layer.nonfinite_scored}",
    ]


def _share(value: int | float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _yes(value: bool) -> str:
    return "yes" if value else "no"
