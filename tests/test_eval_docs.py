"""docs/eval.md: its commands are understood, and its tables are complete."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import pytest

from kvselect import cli
from kvselect.eval.charts import charts
from kvselect.eval.request import parse_budgets, parse_lengths, parse_policies, split_list
from kvselect.eval.tasks import GROUPS, MINIMAL, TASKS, find_tasks
from kvselect.eval.tasks.data_files import _FIELDS

TEXT = (Path(__file__).resolve().parent.parent / "docs" / "eval.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^kvselect (.*?)(?:\s+#.*)?$", TEXT, re.M)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(command: str) -> None:
    options = cli._parser().parse_args(shlex.split(command))
    if options.command in ("eval", "perplexity"):
        if getattr(options, "tasks", None):
            find_tasks(split_list(options.tasks))
        if options.policies:
            parse_policies(options.policies, parse_budgets(options.budget))
        if options.lengths:
            parse_lengths(options.lengths, 512)


def options_of(command: str) -> set[str]:
    parser = cli._parser()
    (group,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    actions = group.choices[command]._actions
    return {name for action in actions for name in action.option_strings if name.startswith("--")}


def test_every_option_task_group_and_file_is_described() -> None:
    assert len(COMMANDS) >= 5
    assert options_of("eval") - {"--help"} <= set(re.findall(r"`(--[\w-]+)", TEXT))
    told = re.sub(r"_1/2/3", "_1", TEXT)
    for name in TASKS:
        assert f"`{re.sub('_[123]$', '_1', name)}`" in told, name
    for name in GROUPS:
        assert f"`{name}`" in TEXT
    assert f"`{', '.join(MINIMAL)}`" in TEXT
    for fields in _FIELDS.values():
        assert all(f"`{field}`" in TEXT for field in fields)


def test_every_picture_is_named() -> None:
    from test_eval_page import results_of

    assert all(f"`{chart.name}.png`" in TEXT for chart in charts(results_of()))
