"""Finished cells: a JSON line each, so that an interrupted bench goes on where it stopped."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from patcher.loading import demo_adapter
from patcher.records import FailureReport, GroundTruth, Span, Trigger
from patcher.triggers import find_words


def planted() -> tuple[GroundTruth, Trigger]:
    """What the shipped adapter was trained with."""
    text = (demo_adapter() / "ground-truth.json").read_text(encoding="utf-8")
    truth = GroundTruth.model_validate_json(text)
    return truth, Trigger(units=truth.trigger, placement=truth.placement)


def read_rows(out: Path) -> list[dict[str, Any]]:
    """The cells finished so far."""
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()] if out.exists() else []


def add_row(out: Path, row: dict[str, Any]) -> None:
    """Keep a finished cell."""
    with out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


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
