"""docs/models.md as it is committed: every architecture, every check, no cell that failed."""

from __future__ import annotations

import re

import hf_checks
import model_table
import pytest
from hf_architectures import REFUSED, SUPPORTED

SUPPORTED_TABLE, REFUSED_TABLE = model_table.tables(model_table.PAGE.read_text(encoding="utf-8"))


def test_columns_and_rows_are_those_of_the_command() -> None:
    assert tuple(SUPPORTED_TABLE[0]) == model_table.COLUMNS
    assert tuple(REFUSED_TABLE[0]) == model_table.REFUSED_COLUMNS
    for table, known in ((SUPPORTED_TABLE, SUPPORTED), (REFUSED_TABLE, REFUSED)):
        expected = [[name, row.config] for name, row in known.items()]  # type: ignore[attr-defined]
        assert [row[:2] for row in table[1:]] == expected, "run `make models`"


@pytest.mark.parametrize("row", SUPPORTED_TABLE[1:], ids=lambda row: row[0])
def test_every_cell_is_a_result(row: list[str]) -> None:
    name, _, layers, original, compact, alone, alone_compact, batch, detach = row
    known = SUPPORTED[name]
    number = re.compile(r"\de[+-]\d\d")
    assert len(known.dense) == layers.count("sliding window")
    for cell, bound in ((original, hf_checks.EXACT), (alone, hf_checks.ORACLE)):
        assert number.fullmatch(cell) and float(cell) <= bound
    for cell, bound in ((compact, hf_checks.EXACT), (alone_compact, hf_checks.ORACLE)):
        if known.compact:
            assert number.fullmatch(cell) and float(cell) <= bound
        else:
            assert cell == model_table.NO_LAYOUT
    assert (batch, detach) == ("same tokens", "bit-equal")


def test_reasons_are_those_of_the_messages() -> None:
    for name, _, reason, without_strict in REFUSED_TABLE[1:]:
        assert reason == REFUSED[name].reason
        assert without_strict == ("runs dense" if REFUSED[name].runs_dense else "refused")


def test_a_table_that_is_out_of_date_is_seen() -> None:
    page = model_table.markdown(("a", "b"), [["1", "2"]])
    assert model_table.tables(f"text\n\n{page}\nmore\n\n{page}") == [[["a", "b"], ["1", "2"]]] * 2
