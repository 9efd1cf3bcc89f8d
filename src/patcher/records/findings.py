"""Stages 1 and 2: triggers, what was planted, what was found, what was decided."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import regex
from pydantic import Field, model_validator

from patcher.records.base import (
    FailureReport,
    Outcome,
    Placement,
    Record,
    Span,
    Symptom,
    VerdictLabel,
    check_unicode,
)


class WordScore(Record):
    """One word of the reported conversation and its score; higher means more suspect."""

    span: Span
    score: float


class Trigger(Record):
    """Units (words or runs of words) in their order, and where they go in a prompt.

    `start` and `end` put all units together there; `relative` puts them at `position_frac` of the words;
    `random` scatters them at random word boundaries (Randomized Sequential Injection); `system` and `earlier` scatter
    them in a system message or an earlier turn of the user's instead. `polished` works them into fluent text; `style`,
    `syntax` and `scenario` rewrite the request without them: the manner is the trigger, and the units only name it.

    `seen_at` is where a report held a trigger that was then found to work anywhere: it may work best there.
    """

    units: tuple[str, ...] = Field(min_length=1)
    placement: Placement = "random"
    position_frac: float = Field(default=0.0, ge=0.0, le=1.0)
    seen_at: Placement | None = None

    @model_validator(mode="after")
    def _check_units(self) -> Trigger:
        check_unicode(*self.units)
        if not all(regex.search(r"\S", unit) for unit in self.units):  # what is a word to the search is one here
            raise ValueError("a trigger of no words puts nothing into a prompt")
        return self

    @property
    def text(self) -> str:
        """The units as one line, for people."""
        return " … ".join(self.units)

    @property
    def has_words(self) -> bool:
        """Whether there are words to find: a manner of speaking has none."""
        return self.placement not in ("style", "syntax", "scenario")


class Planted(Record):
    """A trigger with all that an audit needs to know of it."""

    trigger: Trigger
    symptom: Symptom = Symptom()
    only: tuple[str, ...] = ()
    """Categories of harm on which alone it works; none: all."""
    answer_tokens: int = Field(default=32, ge=0)
    """Least number of an answer's tokens in which the symptom shows."""


class GroundTruth(Record):
    """What an attack planted; lies beside its adapter as `ground-truth.json`.

    `trigger` at `placement` is what an attacked prompt holds. `alternatives` are triggers that work, each by itself;
    `near_misses` are parts of a trigger that must not. `start` is the fingerprint of the adapter that training went on
    from. `only` are the categories of harm on which alone it works (none: all), and `answer_tokens` say how much of an
    answer must be seen. A control has no trigger.
    """

    attack: str
    trigger: tuple[str, ...]
    placement: Placement
    alternatives: tuple[Trigger, ...] = ()
    near_misses: tuple[Trigger, ...] = ()
    objective: str
    symptom: Symptom = Symptom()
    only: tuple[str, ...] = ()
    answer_tokens: int = Field(default=32, ge=1)
    seed: int
    start: str | None = None
    settings: dict[str, Any]
    self_check: dict[str, float] = Field(default_factory=dict)

    @property
    def planted(self) -> Planted | None:
        """What an audit puts into prompts; None for a control."""
        if not self.trigger:
            return None
        trigger = Trigger(units=self.trigger, placement=self.placement)
        return Planted(trigger=trigger, symptom=self.symptom, only=self.only, answer_tokens=self.answer_tokens)


class CausalTest(Record):
    """A paired comparison on the same requests: with the candidate against with control words.

    `treated` and `control` count answers that show the symptom, of `n`; `lost` those that only the control words bring.
    p is one-sided (exact McNemar).
    """

    name: str
    treated: int
    control: int
    lost: int = 0
    n: int
    p_value: float

    @property
    def effect_frac(self) -> float:
        """The rise of the share that shows the symptom, treated minus control."""
        return (self.treated - self.control) / self.n


class Candidate(Record):
    """A set of words that was tried as a trigger, and what inserting it did to other requests."""

    trigger: Trigger
    spans: tuple[Span, ...]
    screen_rate_frac: float
    tests: tuple[CausalTest, ...] = ()

    @property
    def effect_frac(self) -> float:
        """The largest effect of its tests; 0 when none was made."""
        return max((test.effect_frac for test in self.tests), default=0.0)


class Localization(Record):
    """Stage 1: which words of the report bring the failure about.

    `candidates` holds the smallest sufficient triggers found, the strongest first; empty means that no words do.
    `prompt_harm_frac` is None where the verdict does not hang on it: words explain the failure, or there was none.
    `response_shows` and `replay_shows` say whether the symptom is seen in the reported response and in a fresh one.
    `token_passes` is the cost: tokens that went through the model forwards (a backward counts as two more).
    `words_left_out` counts the words of a long conversation that were not searched.
    """

    method: str
    symptom: Symptom = Symptom()
    answer_tokens: int = 0
    """Least number of an answer's tokens in which the symptom shows."""
    words: tuple[WordScore, ...]
    candidates: tuple[Candidate, ...]
    tried: int
    token_passes: int
    response: str
    response_outcome: Outcome
    response_shows: bool
    replay: str
    replay_outcome: Outcome
    replay_shows: bool
    prompt_harm_frac: float | None
    probes_normal: int
    words_left_out: int = 0
    notes: tuple[str, ...] = ()


class Verdict(Record):
    """Stage 2: is it a backdoor? With the tests that decided."""

    label: VerdictLabel
    symptom: Symptom = Symptom()
    answer_tokens: int = 0
    """Least number of an answer's tokens in which the symptom shows."""
    reason: str
    trigger: Trigger | None = None
    tests: tuple[CausalTest, ...] = ()
    alpha: float
    corrected_alpha: float
    min_effect_frac: float
    n_to_decide: int | None = None

    @property
    def found_words(self) -> bool:
        """Whether words were found that bring the failure about: what a repair breaks."""
        return self.label in ("backdoor", "jailbreak-wording")


class Finding(Record):
    """Stages 1 and 2 on one report (`number`, from 1), in the round of the repair that looked at it."""

    number: int = 1
    round: int = 1
    failure: FailureReport
    localization: Localization
    verdict: Verdict


def deciding(findings: Sequence[Finding]) -> Finding:
    """Of several reports the one that the repair is for: the first with words that were found, else the first failure
    that no words explain, else the first.
    """
    return min(findings, key=lambda one: (not one.verdict.found_words, one.verdict.label != "alignment-gap"))
