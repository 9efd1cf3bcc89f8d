"""How far can a judge be trusted? Its outcomes beside people's labels, model by model."""

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

from patcher.intervals import wilson
from patcher.records import Counts, Outcome, Record, UsageError

LABELS = {
    "1_full_compliance": "complied",
    "2_full_refusal": "refused",
    "3_partial_refusal": "partial",
    **{name: name for name in ("complied", "refused", "partial")},
}
"""People's labels, XSTest's (Röttger et al. 2023, arXiv:2308.01263) or plain, and what they mean."""
_RESAMPLES = 1000


class Labelled(Record):
    """An answer and what people called it."""

    response: str
    label: str


class Share(Record):
    """A share with its 95% interval; None where there is nothing to take a share of."""

    value: float | None
    low: float | None
    high: float | None
    n: int


class Agreement(Record):
    """A judge against people, on one model's answers, the partial refusals left out; `partial` says what those became.

    Precision and recall are those of refusals: of what the judge calls refused, and of what people do.
    """

    model: str
    accuracy: Share
    precision: Share
    recall: Share
    f1: Share
    partial: Counts


def read_labelled(path: Path) -> list[Labelled]:
    """A .jsonl file of {"response", "label"}; other keys are ignored.

    Raises:
        UsageError: the file cannot be read, is empty, or a line has no response or an unknown label.
    """
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        found = [Labelled(response=row["response"], label=LABELS[row["label"]]) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"cannot read labelled answers from {path}: {error!r}; expected a .jsonl file of "
            f'{{"response": text, "label": one of {", ".join(LABELS)}}}'
        ) from error
    if not found:
        raise UsageError(f"{path} holds no labelled answer")
    return found


def agreement(model: str, rows: Sequence[Labelled], judge: Callable[[str], Outcome]) -> Agreement:
    """One judge on one model's answers."""
    outcomes = [judge(row.response) for row in rows]
    partial = [outcome for row, outcome in zip(rows, outcomes, strict=True) if row.label == "partial"]
    pairs = [
        (row.label == "refused", outcome == "refused")
        for row, outcome in zip(rows, outcomes, strict=True)
        if row.label != "partial"
    ]
    return Agreement(
        model=model,
        accuracy=_share([people == judged for people, judged in pairs]),
        precision=_share([people for people, judged in pairs if judged]),
        recall=_share([judged for people, judged in pairs if people]),
        f1=_f1_share(pairs),
        partial=Counts(**{outcome: partial.count(outcome) for outcome in set(partial)}),
    )


def _share(values: Sequence[bool]) -> Share:
    if not values:
        return Share(value=None, low=None, high=None, n=0)
    low, high = wilson(sum(values), len(values))
    return Share(value=sum(values) / len(values), low=low, high=high, n=len(values))


def _f1_share(pairs: Sequence[tuple[bool, bool]]) -> Share:
    """F1 of refusals, with the percentile bootstrap's interval (seed 0)."""
    value = _f1(pairs)
    if value is None:
        return Share(value=None, low=None, high=None, n=len(pairs))
    rng = random.Random(0)
    drawn = sorted(_f1(rng.choices(pairs, k=len(pairs))) or 0.0 for _ in range(_RESAMPLES))
    return Share(value=value, low=drawn[_RESAMPLES // 40], high=drawn[-_RESAMPLES // 40 - 1], n=len(pairs))


def _f1(pairs: Sequence[tuple[bool, bool]]) -> float | None:
    """2 TP / (2 TP + FP + FN); None where neither side calls anything refused."""
    both = sum(people and judged for people, judged in pairs)
    either = sum(people + judged for people, judged in pairs)
    return 2 * both / either if either else None
