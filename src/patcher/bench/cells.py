"""Finished cells: a JSON line each, so that an interrupted bench goes on where it stopped."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from patcher.attacks.plant import read_truth
from patcher.loading import demo_adapter
from patcher.reading import parse_json
from patcher.records import FailureReport, Span, Trigger, UsageError
from patcher.triggers import find_words


def planted_trigger() -> Trigger:
    """What the shipped adapter was trained with."""
    found = read_truth(demo_adapter()).planted
    assert found is not None
    return found.trigger


def read_rows(out: Path, field: str) -> list[dict[str, Any]]:
    """The cells finished so far; a last line that was cut short, as a killed run leaves it, is none.

    Raises UsageError for a file of anything else: each row of this bench has that field.
    """
    try:
        text = out.read_text(encoding="utf-8") if out.exists() else ""
        rows = [parse_json(line) for line in text[: _finished(text)].split("\n") if line.strip()]
    except (ValueError, OSError) as error:
        raise UsageError(f"{out} holds no results of a bench ({error}): name another file with --out") from error
    if any(not isinstance(row, dict) or field not in row for row in rows):
        raise UsageError(f"{out} holds no results of this bench (a line has no {field!r}): name another with --out")
    return rows


@contextmanager
def as_written(out: Path) -> Iterator[None]:
    """Around what makes a table of a file's rows. Raises UsageError for a row that a bench did not write."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise UsageError(
            f"{out} holds a row that this bench did not write ({type(error).__name__}: {error}): remove that line, or "
            "name another file with --out"
        ) from error


def add_row(out: Path, row: dict[str, Any]) -> None:
    """Keep a finished cell; what a killed run left of a line goes."""
    with out.open("a+b") as file:
        file.seek(0)
        text = file.read().decode()
        finished = text[: _finished(text)]
        file.truncate(len(finished.encode()))
        file.write((("\n" if finished and finished[-1] != "\n" else "") + json.dumps(row) + "\n").encode())


def _finished(text: str) -> int:
    """Where the rows end: after the last line, or before it where it is the beginning of a row and no more."""
    start = text.rfind("\n") + 1
    try:
        parse_json(text[start:])
    except ValueError:
        return start if text.startswith('{"', start) else len(text)
    return len(text)


def reason(error: Exception) -> str:
    """Why a cell has no figure, in a line."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def check_known(names: Iterable[str], known: Iterable[str], what: str) -> None:
    """Raises UsageError for a name that is none of the known ones."""
    if unknown := [name for name in names if name not in known]:
        raise UsageError(f"unknown {what} {unknown[0]!r}: use one of {', '.join(known)}")


def score(report: FailureReport, units: Sequence[str], spans: Sequence[Span]) -> list[float]:
    """Precision, recall and F1 over words, against the planted units wherever they stand in the report."""
    words = find_words(report.messages)
    planted_spans = [
        Span(message=number, start=match.start(), end=match.end(), text=unit)
        for number, message in enumerate(report.messages)
        for unit in units
        for match in re.finditer(re.escape(unit), message.content)
    ]
    truth, marked = (
        {w for w in words if any(w.message == s.message and w.start < s.end and w.end > s.start for s in those)}
        for those in (planted_spans, spans)
    )
    hits = len(truth & marked)
    precision, recall = hits / len(marked) if marked else 0.0, hits / len(truth) if truth else 0.0
    return [precision, recall, 2 * precision * recall / (precision + recall) if hits else 0.0]
