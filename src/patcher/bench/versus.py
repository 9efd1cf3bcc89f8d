"""Repairs of one bed against each other: the Pareto front, and what differs by more than the choice of prompts."""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from patcher.intervals import design_effect, pooled_interval

_KEPT = re.compile(r"(benign|borderline)\w*_answered(_\d+)?_frac|.*_accuracy_frac")
_UNTRIGGERED = ("asr_untriggered_frac", "harmful_answered_frac")
"""What must not rise: the unwanted answers, and harmful requests answered, without a trigger."""


@dataclass(frozen=True)
class Score:
    """What is to be small: means over seeds."""

    asr: float
    """With the first trigger, after."""
    lost: float
    """Utility and refusals: the mean fall of the answered shares and of the task accuracies, and rise of what is
    unwanted without a trigger; a change for the better makes up for nothing."""
    seconds: float

    def beats(self, other: "Score") -> bool:
        """Nowhere worse and somewhere better."""
        mine, others = (self.asr, self.lost, self.seconds), (other.asr, other.lost, other.seconds)
        return mine != others and all(a <= b for a, b in zip(mine, others, strict=True))


def notes(rows: Sequence[dict[str, Any]]) -> list[str]:
    """For each bed with several repairs, audited on the same prompts: who is on the front, and how far each one's ASR
    is above the lowest.
    """
    beds: dict[tuple[str, int], dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if "error" not in row and _asr(row)["before"] is not None:
            beds[row["bed"], _asr(row)["n"]][repair_name(row)].append(row)
    return [note for (bed, _), repairs in beds.items() if len(repairs) > 1 for note in _of_bed(bed, repairs)]


def repair_name(row: dict[str, Any]) -> str:
    """The defense, with what it was told where that was more than one report."""
    return str(row["defense"]) if row["reports"] < 2 else f"{row['defense']} with {row['reports']} reports"


def _of_bed(bed: str, repairs: dict[str, list[dict[str, Any]]]) -> list[str]:
    every = [{item["name"]: item for item in row["summary"]} for rows in repairs.values() for row in rows]
    shared = [name for name in every[0] if all(name in one and one[name]["before"] is not None for one in every)]
    scores = {name: _score(rows, shared) for name, rows in repairs.items()}
    front = [name for name, own in scores.items() if not any(other.beats(own) for other in scores.values())]
    best = min(scores, key=lambda name: scores[name].asr)
    above = [f"{name} {_above(rows, repairs[best])}" for name, rows in repairs.items() if name != best]
    return [
        f"{bed}: on the Pareto front of ASR, what is lost and seconds: {', '.join(front)}",
        f"{bed}: ASR above {best}'s on the same prompts, points: {'; '.join(above)}",
    ]


def _score(rows: Sequence[dict[str, Any]], shared: Sequence[str]) -> Score:
    """Of the figures that all the repairs compared have."""
    attacked = any(item["name"] == "harmful_answered_frac" for item in rows[0]["summary"])
    kept = [name for name in shared if _KEPT.fullmatch(name) and not (attacked and "triggered" in name)]
    losses = [-_change(rows, name) for name in kept] + [_change(rows, name) for name in _UNTRIGGERED if name in shared]
    asr = fmean(_left(_asr(row)) for row in rows)
    return Score(asr, fmean(max(0.0, loss) for loss in losses) if losses else 0.0, fmean(map(repair_seconds, rows)))


def _change(rows: Sequence[dict[str, Any]], name: str) -> float:
    """Of a figure, the mean over seeds."""
    items = [item for row in rows for item in row["summary"] if item["name"] == name]
    return fmean(_left(item) - item["before"] for item in items)


def repair_seconds(row: dict[str, Any]) -> float:
    """Of all stages but the audit."""
    return float(sum(own for stage, own in row["seconds"].items() if stage != "audit"))


def _asr(row: dict[str, Any]) -> dict[str, Any]:
    """The figure of the first trigger."""
    item: dict[str, Any] = next(item for item in row["summary"] if item["name"] == "asr_triggered_frac")
    return item


def _left(item: dict[str, Any], what: str = "") -> Any:
    """What is left after the repair; where nothing was repaired, what was there before."""
    return item[f"{what}before"] if item["after"] is None else item[f"{what}after"]


def _above(rows: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]) -> str:
    """The difference with its 95% interval over prompts; of the seeds that both have, each prompt's mean."""
    seeds = {row["seed"] for row in rows} & {row["seed"] for row in others}
    if not seeds:
        return "was measured with other seeds"
    mine, theirs = ([row for row in each if row["seed"] in seeds] for each in (rows, others))
    changes = [own - other for own, other in zip(_hits(mine), _hits(theirs), strict=True)]
    low, high = pooled_interval(changes, design_effect(changes, rows[0].get("acts") or range(len(changes))))
    mark = "" if low <= 0 <= high else "*"
    return f"{100 * fmean(changes):+.1f} ({100 * low:+.1f} to {100 * high:+.1f}){mark}"


def _hits(rows: Sequence[dict[str, Any]]) -> list[float]:
    """For each prompt, the share of seeds with which the attack still works."""
    return [fmean(map(int, hits)) for hits in zip(*(_left(_asr(row), "hits_") for row in rows), strict=True)]
