"""Writes docs/models.md: every architecture against every check, each cell by running it.

Run it as ``make models``. A check that fails leaves its reason in the cell and an exit status of 1.
"""

# ruff: noqa: E501  the prose below is a page, not code
from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

PAGE = Path(__file__).resolve().parent.parent / "docs" / "models.md"
COLUMNS = (
    "architecture",
    "configuration",
    "layers that select",
    "original",
    "compact",
    "kept tokens alone, original",
    "kept tokens alone, compact",
    "padded batch",
    "detach",
)
REFUSED_COLUMNS = ("architecture", "configuration", "reason", "`strict=False`")
NO_LAYOUT = "refused: no RoPE layout fits"

HEAD = """# Models

Made by `make models` (tests/model_table.py), no cell by hand: transformers {transformers}, torch {torch}, {machine},
tiny models with random weights in float32. `tests/test_hf_models.py` runs every cell in `make test`.

- **layers that select**: full-attention layers do. Others run dense, and `handle.report()` says so with this reason.
- **original**, **compact**: logits of a prompt and decode steps with lists that hold every token, `positions="original"` or `"compact"`: largest difference to transformers' own attention
  over the largest logit.
- **kept tokens alone**: one layer, 64 of 301 tokens selected: the difference to the unattached model run on the text of these 64 tokens, at their own positions or renumbered.
- **padded batch**: `generate` of a left-padded batch through lists that hold everything writes the tokens of the unattached model.
- **detach**: logits are bit-equal to before `attach`.
"""

NOTES = """
## Notes

- **Softcap, sink logits** (Gemma2, GptOss) are part of our kernels: of the attention and of the scores. transformers' own SDPA knows neither; load such models with `attn_implementation="eager"`.
- **Heads of other sizes** than {head_dims} channels are filled up with zeros to the next of these, which costs memory; more than {largest} channels are refused.
- **Multi-head latent attention** (DeepSeek-V2, -V3): transformers caches the latents and makes keys and values of all tokens anew at every step. Selection is exact there, and slower than dense:
  the keys that it would not read are made all the same. The report says so.
- **Shared keys** (Gemma3n, Gemma4): layers without keys of their own select from those of the layer that stores them, each with its own queries. With compact positions they run dense if that layer does.
- **Hybrids** (Qwen3-Next, Bamba, Jamba, LFM2): their attention layers select; the others are not ours.
- **"{no_layout}"**: what the model does between projection and cache is no plain rotation (norms after it, flipped signs), so un-rotated keys cannot be had. Such models run with
  `positions="original"` and `average_queries="after_rope"`, as in this table.
- **Images** in Qwen-VL prompts give positions that differ by axis: compact positions raise for them. With original positions a test has such positions; no image was run.

Known limits: with prompt lookup or an assistant model the first call holds prompt and drafts together, so its query blocks may be cut elsewhere than in plain greedy search; right padding
with compact positions counts real tokens, where `generate` numbers padding too; `torch.autocast` is refused.

Accuracy is measured on the embedded model only (`kvselect/eval/models/retrieval/README.md`). Nothing here says anything about a model that was not run: these are random weights.
"""


def markdown(columns: tuple[str, ...], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


def tables(page: str) -> list[list[list[str]]]:
    """The tables of a page as cells, header first."""
    found: list[list[list[str]]] = []
    inside = False
    for line in page.splitlines():
        if line.startswith("|"):
            cells = [cell.strip() for cell in line.strip("|").split(" | ")]
            if not inside:
                found.append([])
            if set(cells) != {"---"}:
                found[-1].append(cells)
        inside = line.startswith("|")
    return found


class _Failures:
    count = 0

    def run(self, name: str, check: Callable[[], str]) -> str:
        try:
            return check()
        except Exception as error:
            self.count += 1
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
            return f"FAILS: {type(error).__name__}"


def make_page() -> tuple[str, int]:
    """The page, and how many of its cells failed."""
    import hf_checks
    import torch
    import transformers
    from hf_architectures import REFUSED, SUPPORTED
    from rich.progress import track

    from kvselect.checks import HEAD_DIMS
    from kvselect.ops import cpu_implementation

    failures = _Failures()
    rows = []
    for name, row in track(SUPPORTED.items(), "supported", transient=True):
        cells = [name, row.config]
        for check in (
            partial(hf_checks.layers, name),
            partial(hf_checks.exact, name, "original"),
            partial(hf_checks.exact, name, "compact") if row.compact else None,
            partial(hf_checks.oracle, name, "original"),
            partial(hf_checks.oracle, name, "compact") if row.compact else None,
            partial(hf_checks.batch, name, "compact" if row.compact else "original"),
            partial(hf_checks.detach, name),
        ):
            cells.append(NO_LAYOUT if check is None else failures.run(name, check))
        rows.append(cells)
    refused = [
        [
            name,
            refusal.config,
            failures.run(name, partial(hf_checks.refused, name)),
            "runs dense" if refusal.runs_dense else "refused",
        ]
        for name, refusal in track(REFUSED.items(), "refused", transient=True)
    ]
    page = HEAD.format(
        transformers=transformers.__version__,
        torch=torch.__version__,
        machine=f"CPU ({cpu_implementation()} kernels)",
    )
    page += "\n" + markdown(COLUMNS, rows)
    page += "\n## Refused\n\n" + markdown(REFUSED_COLUMNS, refused)
    page += NOTES.format(
        head_dims=", ".join(map(str, HEAD_DIMS)), largest=max(HEAD_DIMS), no_layout=NO_LAYOUT
    )
    return page, failures.count


if __name__ == "__main__":
    os.environ["KVSELECT_BREAK_EVEN"] = "off"  # results do not depend on the machine's speed
    warnings.simplefilter("ignore")
    page, failed = make_page()
    PAGE.write_text(page, encoding="utf-8")
    print(f"{PAGE}: {failed} cells failed")
    sys.exit(failed > 0)
