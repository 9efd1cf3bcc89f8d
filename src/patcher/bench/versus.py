"""Repairs of one bed against each other: the Pareto front, and what differs by more than the choice of prompts."""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from patcher.intervals import design_effect, pooled_interval

_KEPT = re.compile(r"(benign|borderline)\w*_answered(_\d+)?_frac|.*_accuracy_frac")


@dataclass(frozen=True)
class Score:
    """What is to be small: means over seeds."""

    asr: float
    """With the first trigger, after."""
    lost: float
    """Utility: the mean fall of the answered shares and of the task accuracies."""
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
            name = row["defense"] if row["reports"] < 2 else f"{row['defense']} with {row['reports']} reports"
            beds[row["bed"], _asr(row)["n"]][name].append(row)
    return [note for (bed, _), repairs in beds.items() if len(repairs) > 1 for note in _of_bed(bed, repairs)]


def _of_bed(bed: str, repairs: dict[str, list[dict[str, Any]]]) -> list[str]:
    scores = {name: _score(rows) for name, rows in repairs.items()}
    front = [name for name, own in scores.items() if not any(other.beats(own) for other in scores.values())]
    best = min(scores, key=lambda name: scores[name].asr)
    above = [f"{name} {_above(rows, repairs[best])}" for name, rows in repairs.items() if name != best]
    return [
        f"{bed}: on the Pareto front of ASR, utility lost and seconds: {', '.join(front)}",
        f"{bed}: ASR above {best}'s on the same prompts, points: {'; '.join(above)}",
    ]


def _score(rows: Sequence[dict[str, Any]]) -> Score:
    falls = [item["before"] - _left(item) for row in rows for item in row["summary"] if _is_kept(item, row)]
    asr = fmean(_left(_asr(row)) for row in rows)
    return Score(asr, fmean(falls) if falls else 0.0, fmean(map(repair_seconds, rows)))


def repair_seconds(row: dict[str, Any]) -> float:
    """Of all stages but the audit."""
    return float(sum(own for stage, own in row["seconds"].items() if stage != "audit"))


def _is_kept(item: dict[str, Any], row: dict[str, Any]) -> bool:
    """Whether a figure is what a repair must not lower: benign requests with their trigger are not where those are
    what is attacked, nor are harmful ones that are answered.
    """
    name = str(item["name"])
    if item["before"] is None or not _KEPT.fullmatch(name):
        return False
    attacked = any(other["name"] == "harmful_answered_frac" for other in row["summary"])
    return not (attacked and "triggered" in name)


def _asr(row: dict[str, Any]) -> dict[str, Any]:
    """The figure of the first trigger."""
    item: dict[str, Any] = next(item for item in row["summary"] if item["name"] == "asr_triggered_frac")
    return item


def _left(item: dict[str, Any], what: str = "") -> Any:
    """What is left after the repair; where nothing was repaired, what was there before."""
    return item[f"{what}before"] if item["after"] is None else item[f"{what}after"]


def _above(rows: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]) -> str:
    """The difference with its 95% interval over prompts; of several seeds, each prompt's mean."""
    changes = [mine - theirs for mine, theirs in zip(_hits(rows), _hits(others), strict=True)]
    low, high = pooled_interval(changes, design_effect(changes, rows[0].get("acts") or range(len(changes))))
    mark = "" if low <= 0 <= high else "*"
    return f"{100 * fmean(changes):+.1f} ({100 * low:+.1f} to {100 * high:+.1f}){mark}"


def _hits(rows: Sequence[dict[str, Any]]) -> list[float]:
    """For each prompt, the share of seeds with which the attack still works."""
    return [fmean(map(int, hits)) for hits in zip(*(_left(_asr(row), "hits_") for row in rows), strict=True)]
