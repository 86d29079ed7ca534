"""One run as one HTML page that needs nothing else: pictures, every number, how it was made."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from kvselect.eval.charts import SERIES, Chart, svg, title_of
from kvselect.eval.results import CLAIM_SAMPLES, EFFECTIVE_SCORE, Cell, Length, Macro, Results

_LIGHT = {
    "page": "#fefefe",
    "ink": "#1f2328",
    "muted": "#656d76",
    "rule": "#d8dee4",
    "shade": "#f4f6f8",
    "good": "#116329",
    "bad": "#a40e26",
} | {f"series-{index}": colour for index, colour in enumerate(SERIES)}
_DARK = {
    "page": "#14171c",
    "ink": "#e6e8eb",
    "muted": "#9aa4af",
    "rule": "#343b44",
    "shade": "#1c2128",
    "good": "#6bd08a",
    "bad": "#ff8a94",
    "series-0": "#c9cdd2",
    "series-6": "#4fa3e0",
}

_STYLE = """
:root { color-scheme: light dark; --font: system-ui, -apple-system, "Segoe UI", sans-serif; LIGHT }
@media screen and (prefers-color-scheme: dark) { :root { DARK } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.5rem 4rem; max-width: 76rem; background: var(--page);
  color: var(--ink); font: 16px/1.5 var(--font); }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .3rem; }
p { margin: .3rem 0 .8rem; max-width: 60rem; }
.about, figcaption, .note { color: var(--muted); font-size: .92em; }
figure { margin: .8rem 0 0; }
svg { display: block; width: 100%; min-width: 44rem; height: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .84rem; font-variant-numeric: tabular-nums;
  line-height: 1.35; }
th, td { padding: .28rem .45rem; text-align: right; white-space: nowrap; vertical-align: top;
  border-bottom: 1px solid var(--rule); }
th { font-weight: 600; vertical-align: bottom; white-space: normal; }
td.words, th.words { text-align: left; }
td.wrap { white-space: normal; overflow-wrap: anywhere; text-align: left; }
tbody tr.first td { border-top: 2px solid var(--muted); }
tbody tr:hover td { background: var(--shade); }
small { color: var(--muted); font-size: .92em; }
.good { color: var(--good); } .bad { color: var(--bad); }
@media print {
  @page { size: A4; margin: 11mm; }
  body { padding: 0; max-width: none; font-size: 11px; }
  p, figcaption { max-width: none; }
  h1 { font-size: 18px; } h2 { break-after: avoid; font-size: 14px; margin-top: 1.2rem; }
  figure, tr { break-inside: avoid; }
  svg { min-width: 0; max-height: 92mm; }
  table { font-size: 8px; }
  th, td { padding: .12rem .28rem; }
  thead { display: table-header-group; }
  .scroll { overflow: visible; }
}
"""


def page(results: Results, made: Sequence[Chart]) -> str:
    """The page.

    Parameters
    ----------
    results : Results
    made : list of Chart
        What `charts` drew of them.

    Notes
    -----
    Every shown number stands in a ``<data value=...>`` element with all its digits, and the whole
    result file in the script element "results".
    """
    heading = f"{escape(results.model)}: what is found, and what it costs"
    parts = [
        f"<h1>{heading}</h1>",
        f'<p class="about">{_about(results)}</p>',
        *(f'<p class="note">{escape(note)}</p>' for note in results.notes),
    ]
    if not results.complete:
        parts.append('<p class="bad">This run is not complete.</p>')
    parts += ["<h2>At a glance</h2>", _means_table(results)]
    parts += ["<h2>Effective length</h2>", _effective_table(results)]
    for chart in made:
        parts.append(f"<h2>{escape(chart.title)}</h2>")
        parts.append(
            f'<figure><div class="scroll">{svg(chart)}</div>'
            f"<figcaption>{escape(chart.caption)}</figcaption></figure>"
        )
    parts += ["<h2>Every task</h2>", _cells_table(results)]
    parts += _mass_tables(results)
    parts += ["<h2>How it was made</h2>", _made_table(results)]
    return document(heading, parts, results.to_dict())


def document(title: str, parts: Sequence[str], stored: dict[str, Any], style: str = "") -> str:
    """A page of these elements that needs nothing else: light, dark and printed.

    ``title`` and ``parts``: HTML. ``stored``: kept whole in the script element "results".
    ``style``: CSS behind that of every page.
    """
    common = _STYLE.replace("LIGHT", _variables(_LIGHT)).replace("DARK", _variables(_DARK))
    kept = json.dumps(stored).replace("<", "\\u003c")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{common}{style}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + f'\n<script type="application/json" id="results">{kept}</script>\n</body>\n</html>\n'
    )


def _variables(values: dict[str, str]) -> str:
    return " ".join(f"--{name}: {value};" for name, value in values.items())


def _about(results: Results) -> str:
    counts = sorted({len(cell.outcomes) for cell in results.cells}) or [0]
    told = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
    config, machine = results.config, results.environment.get("machine", {})
    facts = [
        f"trained on {results.window_tokens} tokens",
        f"{told} questions per task and length, seed {config.get('seed')}",
        f"{config.get('dtype')} on {machine.get('cuda') or machine.get('cpu')}",
        f"commit {str(results.environment.get('commit'))[:12]}",
        str(results.environment.get("begun", "")),
    ]
    claim = (
        "" if counts[0] >= CLAIM_SAMPLES else f" A demonstration: a claim needs {CLAIM_SAMPLES}."
    )
    return escape(" · ".join(fact for fact in facts if fact) + "." + claim)


# ---- numbers


def number(value: float | int | None, shown: str) -> str:
    """A number with all its digits for machines and a few for people."""
    return "–" if value is None else f'<data value="{json.dumps(value)}">{shown}</data>'


def _share(value: float | None, digits: int = 1) -> str:
    return number(value, "" if value is None else f"{100 * value:.{digits}f}")


def _points(value: float) -> str:
    return number(value, f"{100 * value:+.1f}".replace("-", "−"))


def _range(low: float, high: float) -> str:
    return f"{_share(low)}–{_share(high)}"


def _difference(found: tuple[float, float, float] | None) -> str:
    if found is None:
        return "–"
    mean, low, high = found
    return f"{_points(mean)}<br><small>{_points(low)} to {_points(high)}</small>"


def _score(score: float, interval: tuple[float, float]) -> str:
    return f"{_share(score)}<br><small>{_range(*interval)}</small>"


def _length(length: Length) -> str:
    tokens = number(length.tokens, str(length.tokens))
    if length.label == str(length.tokens):
        return tokens
    return f"{escape(length.label)} <small>{tokens}</small>"


def row(cells: Iterable[str], *, words: int, first: bool = False) -> str:
    shown = "".join(
        f'<td class="words">{cell}</td>' if index < words else f"<td>{cell}</td>"
        for index, cell in enumerate(cells)
    )
    return f'<tr class="first">{shown}</tr>' if first else f"<tr>{shown}</tr>"


def table(caption: str, head: Sequence[str], rows: Sequence[str], *, words: int) -> str:
    titles = "".join(
        f'<th class="words">{title}</th>' if index < words else f"<th>{title}</th>"
        for index, title in enumerate(head)
    )
    return (
        f'<p class="note">{caption}</p>'
        f'<div class="scroll"><table><thead><tr>{titles}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


_COSTS = (
    "mass kept %",
    "tokens read",
    "bytes read %",
    "hits %",
    "ms per token",
    "read in s",
    "cache MB",
)


def _costs(found: Cell | Macro) -> list[str]:
    return [
        _share(found.kept_mass),
        number(found.tokens_attended, f"{found.tokens_attended:.0f}"),
        _share(found.bytes_ratio),
        _share(found.hit_rate),
        number(found.decode_ms, f"{found.decode_ms:.2f}"),
        number(found.prefill_s, f"{found.prefill_s:.2f}"),
        number(found.cache_bytes, f"{found.cache_bytes / 1e6:.1f}"),
    ]


_VERDICTS = {"better": "good", "no loss": "good", "loss": "bad"}


def _means_table(results: Results) -> str:
    rows = []
    for length in results.lengths:
        first = True
        for policy in results.policies:
            mean = results.macro(length, policy)
            if mean is None:
                continue
            verdict = mean.verdict or "–"
            cells = [
                _length(length) if first else "",
                escape(policy),
                f'<span class="{_VERDICTS.get(verdict, "")}">{verdict}</span>',
                number(mean.num_samples, str(mean.num_samples)),
                _score(mean.score, mean.interval),
                _difference(mean.difference),
                *_costs(mean),
            ]
            rows.append(row(cells, words=3, first=first))
            first = False
    against = escape(results.baseline or "a baseline")
    caption = (
        f"Means over tasks. Difference to {against} in points, on the same questions, with its "
        "95 % interval (paired bootstrap). “No loss”: it lies above −1 point; “better”: above 0; "
        "“loss”: below −1; “both fail”: neither reaches 10 %."
    )
    head = ["context", "policy", "verdict", "questions", "score %", f"against {against}", *_COSTS]
    return table(caption, head, rows, words=3)


def _effective_table(results: Results) -> str:
    rows = []
    for policy in results.policies:
        found = [results.effective_tokens(task, policy) for task in (None, *results.tasks)]
        told = ["none" if tokens is None else number(tokens, str(tokens)) for tokens in found]
        rows.append(row([escape(policy), *told], words=1))
    caption = (
        f"Tokens up to which a policy scores at least {100 * EFFECTIVE_SCORE:.0f} %, of the "
        "lengths that ran; “none”: not even at the shortest."
    )
    head = ["policy", "mean of tasks", *(escape(title_of(task)) for task in results.tasks)]
    return table(caption, head, rows, words=1)


def _cells_table(results: Results) -> str:
    rows = []
    for task in results.tasks:
        for length in results.lengths:
            first = True
            for policy in results.policies:
                cell = results.cell(task, length, policy)
                if cell is None:
                    continue
                right = sum(cell.outcomes)
                cells = [
                    escape(title_of(task)) if first else "",
                    _length(length) if first else "",
                    escape(policy),
                    f"{number(right, f'{right:g}')} of "
                    f"{number(len(cell.outcomes), str(len(cell.outcomes)))}",
                    _score(cell.score, cell.interval),
                    _difference(results.difference(cell)),
                    *_costs(cell),
                    number(cell.context_tokens, f"{cell.context_tokens:.0f}"),
                ]
                rows.append(row(cells, words=3, first=first))
                first = False
    caption = (
        "Score: mean of what each question earned, below it the 95 % interval (Wilson). Mass, "
        "tokens and bytes are per decode step, mean over layers and heads; hits: lists that the "
        "selection cache reused; “–”: the policy reuses none, or there is nothing to compare with."
    )
    against = f"against {escape(results.baseline or 'a baseline')}"
    head = ["task", "context", "policy", "right", "score %", against, *_COSTS, "context tokens"]
    return table(caption, head, rows, words=3)


def _mass_tables(results: Results) -> list[str]:
    rows = []
    for task in results.tasks:
        for length in results.lengths:
            for policy in results.policies:
                cell = results.cell(task, length, policy)
                if cell is None or not cell.mass_by_head:
                    continue
                layers = [
                    " ".join(_share(mass, 0) for mass in heads) for heads in cell.mass_by_head
                ]
                told = [escape(title_of(task)), escape(length.label), escape(policy), *layers]
                rows.append(row(told, words=3))
    if not rows:
        return []
    num_layers = max(len(cell.mass_by_head) for cell in results.cells)
    indices = list(results.layers) or list(range(num_layers))
    head = ["task", "context", "policy", *(f"layer {index}" for index in indices)]
    caption = "Kept mass in %, one number per KV head."
    return ["<h2>Kept mass, every layer and head</h2>", table(caption, head, rows, words=3)]


def _made_table(results: Results) -> str:
    told: list[tuple[str, Any]] = []
    for name, value in {**results.environment, **results.config}.items():
        if isinstance(value, dict):
            told += [(f"{name}: {inner}", given) for inner, given in value.items()]
        else:
            told.append((name, value))
    for policy, settings in results.policies.items():
        given = ", ".join(f"{name}={value}" for name, value in settings.items())
        told.append((f"policy {policy}", given))
    rows = [
        f'<tr><td class="words">{escape(name.replace("_", " "))}</td>'
        f'<td class="wrap">{escape(str(value))}</td></tr>'
        for name, value in told
    ]
    return table("Request, machine, versions, policies.", ["", ""], rows, words=2)
