"""Results in the form of lm-evaluation-harness, one file per policy: for tools that read those."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from kvselect.eval.results import Results, write_whole


def lm_eval_dict(results: Results, policy: str) -> dict[str, Any]:
    """What ``lm_eval --output_path`` writes for one model: here the model under one policy.

    Metrics are named by context length, as the harness's RULER tasks name theirs:
    ``results[task]["4096,none"]``, the standard error of the mean in ``"4096_stderr,none"``.
    """
    found: dict[str, dict[str, Any]] = {}
    counts: dict[str, int] = {}
    for task in results.tasks:
        row: dict[str, Any] = {"alias": task}
        for length in results.lengths:
            cell = results.cell(task, length, policy)
            if cell is None:
                continue
            count, mean = len(cell.outcomes), cell.score
            spread = sum((score - mean) ** 2 for score in cell.outcomes)
            error = math.sqrt(spread / (count - 1) / count) if count > 1 else "N/A"
            row[f"{length.tokens},none"] = mean
            row[f"{length.tokens}_stderr,none"] = error
            counts[task] = counts.get(task, 0) + count
        if len(row) > 1:
            found[task] = row
    metrics = {str(length.tokens): True for length in results.lengths}
    told = results.policies[policy]
    return {
        "results": found,
        "group_subtasks": {task: [] for task in found},
        "configs": {
            task: {
                "task": task,
                "output_type": "generate_until",
                "num_fewshot": 0,
                "metadata": {"version": results.config.get("template")},
            }
            for task in found
        },
        "versions": {task: results.config.get("template") for task in found},
        "n-shot": dict.fromkeys(found, 0),
        "higher_is_better": {task: dict(metrics) for task in found},
        "n-samples": {task: {"original": n, "effective": n} for task, n in counts.items()},
        "config": {
            "model": "kvselect",
            "model_args": {"pretrained": results.model, "policy": told},
            "model_dtype": results.config.get("dtype"),
            "device": results.config.get("device"),
            "batch_size": 1,
            "limit": results.config.get("samples"),
            "random_seed": results.config.get("seed"),
            "numpy_seed": results.config.get("seed"),
        },
        "git_hash": results.environment.get("commit"),
        "date": results.environment.get("begun"),
        "model_source": "kvselect",
        "model_name": f"{results.model} {policy}",
    }


def save_lm_eval(results: Results, folder: Path) -> list[Path]:
    """Write ``results_<policy>.json`` for every policy; returns the paths."""
    paths = []
    for policy in results.policies:
        name = re.sub(r"[^A-Za-z0-9.=+-]+", "_", policy)
        paths.append(folder / f"results_{name}.json")
        write_whole(paths[-1], json.dumps(lm_eval_dict(results, policy), indent=1) + "\n")
    return paths
