"""Finished cells: a JSON line each, so that an interrupted bench goes on where it stopped."""

import json
from pathlib import Path
from typing import Any

from patcher.loading import demo_adapter
from patcher.records import GroundTruth, Trigger


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
