"""How far can a judge be trusted? Its outcomes beside people's labels, model by model."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path

from patcher.intervals import wilson
from patcher.reading import parse_json, read_lines
from patcher.records import OUTCOMES, Counts, JudgeErrorRates, Outcome, Record, UsageError

LABELS: dict[str, str] = {
    "1_full_compliance": "complied",
    "2_full_refusal": "refused",
    "3_partial_refusal": "partial",
    **{name: name for name in OUTCOMES},
}
"""People's labels, XSTest's (Röttger et al. 2023, arXiv:2308.01263) or plain, and what they mean."""
_RESAMPLES = 1000


class Labelled(Record):
    """An answer and what people called it; `second` is another person's label, given without sight of the first."""

    prompt: str = ""
    response: str
    label: str
    second: str | None = None


class Share(Record):
    """A share with its 95% interval; None where there is nothing to take a share of."""

    value: float | None
    low: float | None
    high: float | None
    n: int


class Agreement(Record):
    """A judge against people, on one model's answers, the partial refusals left out; `partial` says what those became.

    Precision and recall are those of refusals: of what the judge calls refused, and of what people do. Where two people
    labelled, `kappa` is their own agreement (Cohen 1960), and the `disputed` answers, which they call differently, are
    left out.
    """

    model: str
    accuracy: Share
    precision: Share
    recall: Share
    f1: Share
    partial: Counts
    kappa: float | None = None
    disputed: int = 0


def read_labelled(path: Path) -> list[Labelled]:
    """A .jsonl file of {"response", "label"}, perhaps with "prompt" and "second"; other keys are ignored.

    Raises:
        UsageError: the file cannot be read, is empty, or a line has no response or an unknown label.
    """
    try:
        rows = [parse_json(line) for line in read_lines(path)]
        if odd := [row for row in rows if not isinstance(row, dict)]:
            raise ValueError(f"a line holds a {type(odd[0]).__name__}")
        found = [
            Labelled(
                prompt=row.get("prompt", ""),
                response=row["response"],
                label=LABELS[row["label"]],
                second=LABELS[row["second"]] if row.get("second") else None,
            )
            for row in rows
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"cannot read labelled answers from {path}: {error!r}; expected a .jsonl file of "
            f'{{"response": text, "label": one of {", ".join(LABELS)}}}'
        ) from error
    if not found:
        raise UsageError(f"{path} holds no labelled answer")
    return found


def fitted_on(judge: str) -> list[Labelled]:
    """The labelled answers that `trained:FILE,FILE` is fitted on; no other judge is. Raises UsageError."""
    kind, _, files = judge.partition(":")
    paths = files.split(",") if kind == "trained" and files else []
    return [row for path in paths for row in read_labelled(Path(path))]


def agreement(
    model: str, rows: Sequence[Labelled], judge: Callable[[Sequence[str], Sequence[str]], list[Outcome]]
) -> Agreement:
    """One judge on one model's answers."""
    twice = [(row.label, row.second) for row in rows if row.second]
    every, rows = rows, [row for row in rows if row.second in (None, row.label)]
    outcomes = judge([row.prompt for row in rows], [row.response for row in rows])
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
        kappa=cohens_kappa(twice) if twice else None,
        disputed=len(every) - len(rows),
    )


def cohens_kappa(pairs: Sequence[tuple[str, str | None]]) -> float:
    """How much more two people agree than by chance: (p_o - p_e) / (1 - p_e) (Cohen 1960); 1 where all is one label."""
    observed = sum(first == second for first, second in pairs) / len(pairs)
    labels = {label for pair in pairs for label in pair}
    shares = [[sum(pair[side] == label for pair in pairs) / len(pairs) for label in labels] for side in (0, 1)]
    chance = sum(first * second for first, second in zip(*shares, strict=True))
    return 1.0 if chance == 1.0 else (observed - chance) / (1 - chance)


def judge_error(
    name: str, rows: Sequence[Labelled], judge: Callable[[Sequence[str], Sequence[str]], list[Outcome]]
) -> JudgeErrorRates:
    """The judge's error over all answers, for `corrected_share`, of what an ASR counts: complied and partial.

    Left out is what people call partial or call differently.

    Raises:
        UsageError: people call none complied, or none refused.
    """
    rows = [row for row in rows if row.second in (None, row.label)]
    outcomes = judge([row.prompt for row in rows], [row.response for row in rows])
    called = {
        label: [
            outcome in ("complied", "partial")
            for row, outcome in zip(rows, outcomes, strict=True)
            if row.label == label
        ]
        for label in ("complied", "refused")
    }
    if not all(called.values()):
        raise UsageError("to know a judge's error takes answers that people call complied and some they call refused")
    return JudgeErrorRates(
        judge=name,
        complied_n=len(called["complied"]),
        complied_seen=sum(called["complied"]),
        refused_n=len(called["refused"]),
        refused_missed=sum(called["refused"]),
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
