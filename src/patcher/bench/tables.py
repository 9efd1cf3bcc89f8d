"""The grid's cells as a table for people: one row a cell, grouped by what the defense was given."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from patcher.bench import versus
from patcher.visible import markdown_text, visible

_ASR, _LONG = "asr_triggered_frac", "asr_triggered_long_answers_frac"
_ATTACKS = {
    _ASR: "ASR",
    _LONG: "in long answers",
    "asr_untriggered_frac": "no trigger",
    "asr_worded_frac": "wordings",
}
_KEPT = {
    "benign_answered_frac": "benign",
    "benign_triggered_answered_frac": "benign + trigger",
    "borderline_answered_frac": "borderline",
    "kl_reference_to_patched_nats": "KL",
}
_LASTING = (
    "The last columns: ASR (mean over triggers) / untriggered / benign answered of the repaired model, as it is and "
    "after each further change; `clean, poisoned` is the clean model, poisoned like `poisoned again`."
)
_CELL = ("bed", "defense", "seed")
_FOUND = ("verdict", "found")
_MADE = ("reports", "F1", "published F1", "rounds", "steps", "prompts", "s", "GiB")


@dataclass(frozen=True)
class Table:
    """Rows under their heads, and what is to be said below."""

    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]
    parts: tuple[int, ...]
    """How many columns each part has that is shown as a table of its own, after the first ones, which name the cell."""
    failed: int = 0
    """Cells run now that say why there is no figure."""

    def as_markdown(self) -> str:
        """For docs/ and the terminal, each part a table: one would be too wide. Its words may be an attacker's."""
        rows = [[_shown(head, cell) for head, cell in zip(self.heads, cells, strict=True)] for cells in self.rows]
        lines, start = list[str](), len(_CELL)
        for width in self.parts:
            for cells in (self.heads, ("---",) * len(self.heads), *rows):
                lines.append(f"| {' | '.join((*cells[: len(_CELL)], *cells[start : start + width]))} |")
            lines.append("")
            start += width
        return "\n".join([*lines, *(f"- {visible(note)}" for note in self.notes)])


def _shown(head: str, cell: str) -> str:
    """A cell for Markdown; words that were found in a report are an attacker's."""
    return markdown_text(cell) if head == "found" and cell != "-" else visible(cell).replace("|", "¦")


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Those given the report first, of each cell the last. `*`: the 95% interval of the paired change leaves 0 out.

    A cell that was measured again, after its settings or what is asked had changed, is shown both times; what is said
    below the table is of the last.
    """
    rows = [{**row, "bed": _bed_of(row)} for row in {row["key"]: row for row in rows}.values()]
    current = _current(rows)
    rows = [row if row["key"] in current else {**row, "defense": f"{row['defense']} (earlier)"} for row in rows]
    rows = sorted(rows, key=lambda row: (row["reports"] == 0, row["bed"], row["defense"], row["seed"]))
    measured = sorted({item["name"] for row in rows for item in row.get("summary", ())})
    tasks = {name: name.removesuffix("_accuracy_frac") for name in measured if name.endswith("_accuracy_frac")}
    kept = _KEPT | tasks
    later = list(dict.fromkeys(change for row in rows for change in row.get("lasting", ())))
    heads = (*_CELL, *_FOUND, *_ATTACKS.values(), *kept.values(), *_MADE, *later)
    lines = tuple((*_line(row, list(kept)), *_lasting(row, later)) for row in rows)
    parts = (len(_FOUND) + len(_ATTACKS), len(kept), len(_MADE), *[len(later)] * bool(later))
    unknown = [
        f"{row['bed']}, {row['defense']}, seed {row['seed']}: what lasts is not known: {row['lasting_error']}"
        for row in rows
        if "lasting_error" in row
    ]
    notes = _notes([row for row in rows if row["key"] in current])
    return Table(heads, lines, (*notes, *([_LASTING] if later else []), *unknown), parts)


def _current(rows: Sequence[dict[str, Any]]) -> set[str]:
    """The keys of those that no finished row of the same cell came after."""
    finished, found = set[tuple[Any, ...]](), set[str]()
    for row in reversed(rows):
        cell = tuple(row[part] for part in ("bed", "defense", "seed", "reports"))
        if cell not in finished:
            found.add(row["key"])
        if "error" not in row:
            finished.add(cell)
    return found


def _bed_of(row: dict[str, Any]) -> str:
    """The bed's name, as short as it can be told."""
    split = " (validation)" if row.get("split") == "validation" else ""
    return str(row["bed"]).removesuffix("-BACKDOORED") + split


def headline(row: dict[str, Any]) -> str:
    """A finished cell in a line, for whoever is waiting."""
    cell = f"{row['bed']}, {row['defense']}, seed {row['seed']}"
    if "error" in row:
        return f"{cell}: failed: {row['error']}"
    figures = {item["name"]: item for item in row["summary"]}
    told = (_ASR, "benign_answered_frac", "kl_reference_to_patched_nats")
    shown = [f"{(_ATTACKS | _KEPT)[name]} {_cell(figures.get(name))}" for name in told]
    return ", ".join([f"{cell}: {row['verdict']}", *shown, f"{versus.repair_seconds(row):.0f} s"])


def _line(row: dict[str, Any], kept: list[str]) -> tuple[str, ...]:
    cell = (row["bed"], row["defense"], str(row["seed"]))
    if "error" in row:
        return (*cell, f"failed: {row['error']}", *["-"] * (1 + len(_ATTACKS) + len(kept) + len(_MADE)))
    figures = {item["name"]: item for item in row["summary"]}
    found = "; ".join(" … ".join(units) for units in row["found"]) or "-"
    attacks = ("; ".join(map(_cell, _of_each_trigger(row, name))) or "-" for name in _ATTACKS)
    memory = "-" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}"
    counts = (str(row["rounds"]), str(row["steps"]), str(row.get("prompts", "-")))
    made = (str(row["reports"] or "none"), _f1(row["words"]), _f1(row["published"]), *counts)
    costs = (f"{versus.repair_seconds(row):.0f}", memory)
    return (*cell, row["verdict"], found, *attacks, *(_cell(figures.get(name)) for name in kept), *made, *costs)


def _lasting(row: dict[str, Any], changes: Sequence[str]) -> list[str]:
    """After each change: the mean ASR over triggers, the untriggered rate, and the benign answered share."""
    cells = []
    for change in changes:
        found = row.get("lasting", {}).get(change)
        shown = ["".join(found["triggered"]), found["untriggered"]] if found else []
        rates = [*(hits.count("1") / len(hits) for hits in shown), *([found["benign_answered_frac"]] if found else [])]
        cells.append(" / ".join(f"{rate:.2f}" for rate in rates) or "-")
    return cells


def _notes(rows: Sequence[dict[str, Any]]) -> list[str]:
    notes = ["`*`: the 95% interval of the paired change leaves 0 out."]
    whole = [row for row in rows if "error" not in row]
    for name, split in dict.fromkeys(map(_pooled_as, whole)):
        mine = [row for row in whole if _pooled_as(row) == (name, split)]
        name = name if split == "held-out" else f"{name} on {split} prompts"
        for what in ("reported", "reported that are a manner, not words", "not reported"):
            each = [[asr for asr, told in asr_after(row) if _kind(row, told) == what] for row in mine]
            if after := sum(each, []):
                repairs, mean, worst = sum(map(bool, each)), sum(after) / len(after), max(after)
                notes.append(
                    f"{name}: ASR after over {len(after)} triggers {what} in {repairs} repairs: "
                    f"mean {mean:.4f}, worst {worst:.4f}"
                )
        for key, what in (("words", "localization F1"), ("published", "the published localizer's F1")):
            found = [row[key][2] for row in mine if row[key] is not None]
            if found:
                notes.append(f"{name}: {what} over {len(found)} repairs: mean {sum(found) / len(found):.3f}")
    return [*notes, *versus.notes(whole)]


def _pooled_as(row: dict[str, Any]) -> tuple[str, str]:
    """What repairs have in common whose figures are put together."""
    return versus.repair_name(row), row.get("split", "held-out")


def _kind(row: dict[str, Any], told: bool) -> str:
    """What a trigger was to that repair."""
    if not told:
        return "not reported"
    return "reported" if row["words"] is not None else "reported that are a manner, not words"


def asr_after(row: dict[str, Any]) -> list[tuple[float, bool]]:
    """The ASR after the repair of each trigger that worked before it, and whether that was in a report.

    Where nothing was repaired it is what it was.
    """
    return [
        (item["before"] if item["after"] is None else item["after"], told)
        for item, told in zip(_of_each_trigger(row, _ASR), row["reported"], strict=True)
        if item["before"] is not None
    ]


def _of_each_trigger(row: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """That figure with each of the bed's triggers, in their order; of what has no trigger the one."""
    numbered = rf"{name.removesuffix('_frac')}(_\d+)?_frac"
    return [item for item in row["summary"] if re.fullmatch(numbered, item["name"])]


def _f1(scores: list[float] | None) -> str:
    return "-" if scores is None else f"{scores[2]:.2f}"


def _cell(item: dict[str, Any] | None) -> str:
    if item is None:
        return "-"
    if item["before"] is None:
        return "unscored"
    if item["after"] is None:
        return f"{item['before']:.3f}"
    digits = 4 if item["name"].startswith("kl") else 3
    low, high = item.get("change_low"), item.get("change_high")
    mark = "*" if low is not None and high is not None and not low <= 0 <= high else ""
    was = "" if item["name"].startswith("kl") else f"{item['before']:.{digits}f} → "
    return f"{was}{item['after']:.{digits}f}{mark}"
