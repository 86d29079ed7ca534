"""A run's answers as they come: one line of JSON each, on disk before the next question is asked.

The first line says what was asked for, and a run goes on only with a journal of the same request. A
line that a kill cut short is dropped and its context answered again; lines that are damaged in any
other way make the whole file be kept aside under another name, and what is readable carried over.
"""

from __future__ import annotations

import fcntl
import json
import os
import zlib
from pathlib import Path
from types import TracebackType
from typing import Any

FORMAT = "kvselect-eval-journal-1"


class Journal:
    """The journal of one output folder, locked while it is open.

    Parameters
    ----------
    path : Path
        Its folder must exist.
    header : dict
        What was asked for; plain JSON values.

    Attributes
    ----------
    records : list of dict
        Everything found and everything appended, in order.
    kept_aside : Path or None
        Where a damaged file lies.
    num_damaged : int
        Its lines that could not be read.

    Raises
    ------
    ValueError
        If the file holds another request or another process writes to it.
    OSError
        If the file cannot be read or written.
    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path = path
        self.records: list[dict[str, Any]] = []
        self.kept_aside: Path | None = None
        self.num_damaged = 0
        self._file = path.open("a+b")
        try:
            self._lock()
            self._read(header)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def append(self, record: dict[str, Any]) -> None:
        """Write one record; it survives whatever happens to this process afterwards."""
        self._write(record)
        self.records.append(record)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(
                f"out: got {str(self.path.parent)!r}, into which another run is writing, allowed: "
                "a folder of its own"
            ) from None

    def _write(self, record: dict[str, Any]) -> None:
        self._file.write(_line(record))
        self._file.flush()
        os.fsync(self._file.fileno())

    def _read(self, header: dict[str, Any]) -> None:
        self._file.seek(0)
        data = self._file.read()
        whole = data.rfind(b"\n") + 1
        lines = data[:whole].splitlines()
        found = [_parsed(line) for line in lines]
        good = [record for record in found if record is not None]
        if good and found[0] is not None:
            refuse_other_request(self.path.parent, good[0].get("request"), header)
        self.num_damaged = len(found) - len(good)
        if self.num_damaged or (data and not lines):
            self._keep_aside()
            # Without the first line nobody knows what the others are answers to.
            good = good if found and found[0] is not None else []
            for record in good:
                self._write(record)
        elif whole < len(data):
            self._file.truncate(whole)
        self.records = good[1:]
        if not good:
            self._write({"kind": "header", "format": FORMAT, "request": header})

    def _keep_aside(self) -> None:
        """Move the file away and begin another of the same name, under the same lock."""
        self.kept_aside = keep_aside(self.path)
        damaged = self._file
        self._file = self.path.open("a+b")
        self._lock()
        damaged.close()


def notes_of(journal: Journal) -> list[str]:
    """What a reader must know of how the journal was found."""
    if journal.kept_aside is None:
        return []
    return [
        f"{journal.num_damaged} lines of {journal.path.name} were damaged; the file is kept as "
        f"{journal.kept_aside.name}, and what they held was answered again"
    ]


def keep_aside(path: Path, why: str = "damaged") -> Path:
    """Rename a file to a name that nothing has: NAME.damaged-1, -2 and so on."""
    number = 1
    while (aside := path.with_name(f"{path.name}.{why}-{number}")).exists():
        number += 1
    path.rename(aside)
    return aside


def move_aside(*paths: Path) -> None:
    """Rename what is there of another run to NAME.before-1, -2 and so on."""
    for path in paths:
        if path.exists():
            keep_aside(path, "before")


def require_same_request(path: Path, header: dict[str, Any]) -> None:
    """`refuse_other_request` for a journal that nobody has opened yet; changes nothing."""
    try:
        with path.open("rb") as file:
            first = _parsed(file.readline().rstrip(b"\n"))
    except OSError:
        return  # there is none; whether one can be made is found when it is
    if first is not None:
        refuse_other_request(path.parent, first.get("request"), header)


def refuse_other_request(folder: Path, found: Any, asked: dict[str, Any]) -> None:
    """ValueError unless both are the same request; names everything that differs."""
    found = found if isinstance(found, dict) else {}
    other = [
        f"{name} {_short(found.get(name))} (asked: {_short(asked.get(name))})"
        for name in dict.fromkeys([*asked, *found])
        if found.get(name) != asked.get(name)
    ]
    if other:
        raise ValueError(
            f"out: got {str(folder)!r}, which holds a run with another {'; '.join(other)}, "
            "allowed: a run of the same request, another folder, or --restart"
        )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _line(record: dict[str, Any]) -> bytes:
    body = json.dumps(record, separators=(",", ":"))
    return f'{{"crc":{zlib.crc32(body.encode())},"record":{body}}}\n'.encode()


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The record of a line; None if the line is not as `_line` writes it."""
    try:
        record = json.loads(line)["record"]
    except (ValueError, KeyError, TypeError):
        return None
    if not isinstance(record, dict) or _line(record) != line + b"\n":
        return None
    return record
