"""Prompt sets: bundled, from a file, or from a Hugging Face dataset; split by act, so that none of a kind crosses."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Literal, TypeVar

from patcher.reading import parse_json, read_lines
from patcher.records import UsageError

Kind = Literal["harmful", "benign", "borderline"]
KINDS: tuple[Kind, ...] = ("harmful", "benign", "borderline")
Split = Literal["implant", "repair", "validation", "held-out"]
_SHARE: tuple[tuple[Split, float], ...] = (("repair", 0.35), ("validation", 0.5), ("held-out", 1.0))
"""Cumulated shares of a user's own set; nothing of it is for implanting."""


Item = TypeVar("Item")


def evenly_spaced(items: Sequence[Item], limit: int | None) -> list[Item]:
    """At most so many of them, evenly over all: neighbours are about the same thing."""
    if limit is None or limit >= len(items):
        return list(items)
    return [items[index * len(items) // limit] for index in range(limit)]


@dataclass(frozen=True)
class PromptRow:
    """One prompt, the act (or topic) it is about, and the split that act is in."""

    text: str
    act: str
    category: str
    split: Split


@dataclass(frozen=True)
class Prompts:
    """The three kinds of prompts a repair and its audit need."""

    harmful: tuple[PromptRow, ...]
    benign: tuple[PromptRow, ...]
    borderline: tuple[PromptRow, ...]

    def rows(self, kind: Kind, split: Split, limit: int | None = None) -> list[PromptRow]:
        """Prompts of one kind and split, spread evenly over it when limited."""
        return evenly_spaced([row for row in getattr(self, kind) if row.split == split], limit)

    def texts(self, kind: Kind, split: Split, limit: int | None = None) -> list[str]:
        """The words of those prompts."""
        return [row.text for row in self.rows(kind, split, limit)]

    def only(self, categories: Sequence[str]) -> Prompts:
        """The harmful prompts of those categories, and all others; with no category, everything."""
        if not categories:
            return self
        return replace(self, harmful=tuple(row for row in self.harmful if row.category in categories))

    def auditing(self, split: Split) -> Prompts:
        """A copy in which that split stands in for the held-out one: to choose settings on, never to quote."""

        def moved(rows: Sequence[PromptRow]) -> tuple[PromptRow, ...]:
            asked = tuple(replace(row, split="held-out") for row in rows if row.split == split)
            return (*(row for row in rows if row.split != "held-out"), *asked)

        return self if split == "held-out" else Prompts(*map(moved, (self.harmful, self.benign, self.borderline)))

    def hidden_from_repair(self) -> Prompts:
        """What a defense may see: the repair and validation splits, nothing else."""
        seen = ("repair", "validation")
        harmful, benign, borderline = (
            tuple(row for row in rows if row.split in seen) for rows in (self.harmful, self.benign, self.borderline)
        )
        return Prompts(harmful, benign, borderline)


@cache
def bundled(kind: Kind) -> tuple[PromptRow, ...]:
    """The project's own prompts of one kind."""
    text = resources.files("patcher").joinpath("data", f"{kind}.jsonl").read_text(encoding="utf-8")
    return tuple(PromptRow(**json.loads(line)) for line in text.splitlines())


def load_prompts(harmful: str | None = None, benign: str | None = None) -> Prompts:
    """The bundled prompts, or the user's own in place of the harmful or benign ones.

    A source is a file (.txt: a prompt a line; .jsonl: objects with `text`, `prompt` or `instruction`, optionally `act`)
    or a Hugging Face dataset as `name[:split[:column]]` (needs the package `datasets`).
    """
    return Prompts(
        harmful=bundled("harmful") if harmful is None else _own(harmful),
        benign=bundled("benign") if benign is None else _own(benign),
        borderline=bundled("borderline"),
    )


def _own(source: str) -> tuple[PromptRow, ...]:
    if not source.strip():
        raise UsageError("the name of the prompts is empty: expected a file or NAME:SPLIT:COLUMN of a dataset")
    path = Path(source)
    if not path.exists() and (path.suffix.lower() in (".txt", ".json", ".jsonl", ".csv") or source[0] in "./~"):
        raise UsageError(f"there is no file {source}")
    pairs = _read_file(path) if path.exists() else _read_dataset(source)
    # a prompt counts once, however often it stands there; white space at its ends makes no other
    acts = {text.strip(): " ".join(act.split()) for text, act in pairs if text.strip()}
    rows = tuple(PromptRow(text, act, "own", _split_of(act)) for text, act in acts.items())
    for split in ("repair", "validation", "held-out"):
        if sum(row.split == split for row in rows) < 8:
            raise UsageError(
                f"{source} gives fewer than 8 prompts for the {split} split, of {len(rows)} prompts of "
                f"{len({*acts.values()})} acts: give at least 100 prompts (those of one act stay together)"
            )
    return rows


def _read_file(path: Path) -> list[tuple[str, str]]:
    try:
        lines = read_lines(path)
        if path.suffix.lower() == ".txt":
            return [(line, line) for line in lines]
        return [_pair(parse_json(line), path) for line in lines]
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read prompts from {path}: {error}; expected .txt or .jsonl in UTF-8") from error


def _pair(row: object, path: Path) -> tuple[str, str]:
    if isinstance(row, dict):
        for key in ("text", "prompt", "instruction"):
            if isinstance(row.get(key), str):
                act = row.get("act")
                return row[key], row[key] if act in (None, "") else str(act)
    raise UsageError(f"{path}: expected objects with a 'text', 'prompt' or 'instruction', got {str(row)[:80]}")


def _read_dataset(source: str) -> list[tuple[str, str]]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise UsageError(
            f"{source} is no file here, and reading a Hugging Face dataset needs `pip install datasets`"
        ) from None
    name, *rest = source.split(":")
    split, column = (*rest, *("train", "prompt")[len(rest) :])[:2]
    try:
        rows = load_dataset(name, split=split)
        return [(str(text), str(text)) for text in rows[column]]
    except Exception as error:  # the hub client raises many classes; all mean the same to the user
        raise UsageError(f"cannot read column {column!r}, split {split!r} of dataset {name!r}: {error}") from error


def _split_of(act: str) -> Split:
    """The split of an act, by its hash: always the same one, whatever else the set holds."""
    point = int(hashlib.sha256(act.encode()).hexdigest()[:8], 16) / 0xFFFFFFFF
    return next(split for split, upto in _SHARE if point <= upto)
