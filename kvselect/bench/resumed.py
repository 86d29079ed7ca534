"""Long benches of the evaluation go on where they were killed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvselect.eval.journal import Journal, move_aside, require_same_request

__all__ = ["resumed"]


@contextmanager
def resumed(path: Path, header: dict[str, Any]) -> Iterator[Journal]:
    """The journal of a killed run of the same request; that of another is moved aside."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        require_same_request(path, header)
    except ValueError:
        move_aside(path)
    with Journal(path, header) as journal:
        if journal.records:
            print(f"going on with {len(journal.records)} lines of {path}")
        yield journal
