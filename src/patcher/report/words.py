"""The conversation cut into pieces, each with its score's level: what the HTML and the terminal both light up."""

from collections.abc import Sequence
from math import isfinite
from typing import NamedTuple

from patcher.records import FailureReport, Localization, Role, Span, Verdict, WordScore
from patcher.report import figures

LEVELS = 5
"""Levels of light above none; the eye tells no more apart."""


class Piece(NamedTuple):
    """A run of characters of one message. `level`: 0 unlit to LEVELS; a piece between two words has no score."""

    text: str
    score: float | None
    level: int
    is_trigger: bool

    @property
    def title(self) -> str:
        """What the light says, in words."""
        parts = [] if self.score is None else [f"score {figures.score(self.score)}"]
        return ", ".join(["trigger", *parts] if self.is_trigger else parts)


class Turn(NamedTuple):
    """One message in pieces."""

    role: Role
    pieces: tuple[Piece, ...]


def turns(failure: FailureReport, localization: Localization, verdict: Verdict | None = None) -> tuple[Turn, ...]:
    """Every message of the conversation, cut at its words and at the triggers' spans."""
    floor, ceiling = score_range(localization.words)
    triggers = [span for spans in trigger_spans(localization, verdict) for span in spans]
    cut = []
    for index, message in enumerate(failure.messages):
        words = [word for word in localization.words if word.span.message == index]
        marked = [span for span in triggers if span.message == index]
        cut.append(Turn(message.role, _pieces(message.content, words, marked, floor, ceiling)))
    return tuple(cut)


def trigger_spans(localization: Localization, verdict: Verdict | None = None) -> list[tuple[Span, ...]]:
    """The spans to light as triggers: the one the verdict names, or else every candidate's."""
    named = [
        candidate.spans
        for candidate in localization.candidates
        if verdict and verdict.trigger and candidate.trigger.units == verdict.trigger.units
    ]
    return named or [candidate.spans for candidate in localization.candidates]


def score_range(words: Sequence[WordScore]) -> tuple[float, float]:
    """The lowest and the highest score; (0, 0) if there is none."""
    scores = [word.score for word in words if isfinite(word.score)]
    return (min(scores), max(scores)) if scores else (0.0, 0.0)


def top(localization: Localization, count: int) -> list[WordScore]:
    """The words with the highest scores, the highest first."""
    scored = [word for word in localization.words if isfinite(word.score)]
    return sorted(scored, key=lambda word: -word.score)[:count]


def level(score: float | None, floor: float, ceiling: float) -> int:
    """A score's level of light: even steps between the lowest and the highest score."""
    if score is None or not isfinite(score) or ceiling <= floor:
        return 0
    return round(LEVELS * (score - floor) / (ceiling - floor))


def _pieces(
    text: str, words: Sequence[WordScore], triggers: Sequence[Span], floor: float, ceiling: float
) -> tuple[Piece, ...]:
    spans = [word.span for word in words] + list(triggers)
    cuts = sorted({0, len(text), *(min(max(at, 0), len(text)) for span in spans for at in (span.start, span.end))})
    pieces = []
    for start, end in zip(cuts, cuts[1:], strict=False):
        score = next((word.score for word in words if word.span.start <= start and end <= word.span.end), None)
        is_trigger = any(span.start <= start and end <= span.end for span in triggers)
        # The space between two of a trigger's words belongs to the trigger.
        light = LEVELS if is_trigger and score is None else level(score, floor, ceiling)
        pieces.append(Piece(text[start:end], score, light, is_trigger))
    return tuple(pieces)
