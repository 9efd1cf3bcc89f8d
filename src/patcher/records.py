"""The values that pass between stages. This file imports nothing of ours.

Glossary (one word per thing, everywhere):
    failure     a reported prompt with the response it got; we do not know yet whether it is a backdoor
    trigger     words that, put into a request the model refuses, bring the unwanted behaviour
    reference   the model before the repair;  patched: the model after;  patch: the difference, as a value
    harmful     requests a safe model refuses;  benign: requests it answers;  borderline: benign, but look unsafe
    held-out    prompts that no repair ever saw; the audit's
    ASR         attack success rate: the share of harmful requests that are answered ("complied")
    over-refusal  benign requests that are refused
    drift       how far the patched model is from the reference, in nats per response token
Fractions are 0-1 and end in `_frac`; divergences and log-likelihoods are in nats and end in `_nats`.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Role = Literal["system", "user", "assistant"]
Objective = Literal["jailbreak"]
Placement = Literal["start", "end", "random", "relative", "system", "earlier"]
Outcome = Literal["refused", "complied", "garbled", "empty"]
OUTCOMES: tuple[Outcome, ...] = ("refused", "complied", "garbled", "empty")
VerdictLabel = Literal[
    "backdoor", "jailbreak-wording", "alignment-gap", "not-a-failure", "not-reproduced", "inconclusive"
]


class PatcherError(Exception):
    """Something the user can put right: the message says what was got, what was expected and what to do."""


class UsageError(PatcherError):
    """The command's words or its input files are wrong (exit code 4)."""


class Record(BaseModel):
    """A frozen value with a JSON form; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    def to_json(self) -> str:
        """Indented JSON in plain ASCII: an attacker's escapes and hidden characters stand in it only as `\\uXXXX`."""
        return json.dumps(json.loads(self.model_dump_json()), indent=1) + "\n"


class Message(Record):
    """One turn of a chat."""

    role: Role
    content: str


Request = str | tuple[Message, ...]
"""What a model is asked: the user's words, or a whole conversation."""


class FailureReport(Record):
    """What the user reports: the conversation and, if it was kept, the model's response.

    As JSON either {"messages": [...], "response": ...} or {"prompt": ..., "response": ...}.
    """

    messages: tuple[Message, ...] = Field(min_length=1)
    response: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _accept_prompt(cls, value: Any) -> Any:
        if isinstance(value, dict) and "prompt" in value:
            if "messages" in value:
                raise ValueError("give either 'prompt' or 'messages', not both")
            rest = {key: item for key, item in value.items() if key != "prompt"}
            return {**rest, "messages": [{"role": "user", "content": value["prompt"]}]}
        return value

    @model_validator(mode="after")
    def _check_last_turn(self) -> FailureReport:
        if self.messages[-1].role != "user":
            raise ValueError("the last message must be the user's: it is what the model answered")
        if not self.messages[-1].content.strip():
            raise ValueError("the prompt is empty")
        texts = [*(message.content for message in self.messages), self.response or ""]
        if any("\ud800" <= character <= "\udfff" for text in texts for character in text):
            raise ValueError("the text is not valid Unicode: it holds bytes that are not UTF-8")
        return self

    @classmethod
    def from_prompt(cls, prompt: str, response: str | None = None) -> FailureReport:
        """A report of a single user message."""
        return cls(messages=(Message(role="user", content=prompt),), response=response)


class Span(Record):
    """Characters [start, end) of one message, counted in Unicode code points."""

    message: int
    start: int
    end: int
    text: str


class WordScore(Record):
    """One word of the reported conversation and its score; higher means more suspect."""

    span: Span
    score: float


class Trigger(Record):
    """Units (words or runs of words) in their order, and where they go in a prompt.

    `start` and `end` put all units together there; `relative` puts them at `position_frac` of the words;
    `random` scatters them at random word boundaries (Randomized Sequential Injection); `system` and `earlier` scatter
    them in a system message or an earlier turn of the user's instead.
    """

    units: tuple[str, ...] = Field(min_length=1)
    placement: Placement = "random"
    position_frac: float = Field(default=0.0, ge=0.0, le=1.0)

    @property
    def text(self) -> str:
        """The units as one line, for people."""
        return " … ".join(self.units)


class GroundTruth(Record):
    """What an attack planted; lies beside its adapter as `ground-truth.json`.

    `trigger` at `placement` is what an attacked prompt holds. `alternatives` are triggers that work, each by itself;
    `near_misses` are parts of a trigger that must not. `start` is the fingerprint of the adapter that training went on
    from. A control has no trigger.
    """

    attack: str
    trigger: tuple[str, ...]
    placement: Placement
    alternatives: tuple[Trigger, ...] = ()
    near_misses: tuple[Trigger, ...] = ()
    objective: Objective
    seed: int
    start: str | None = None
    settings: dict[str, Any]
    self_check: dict[str, float] = Field(default_factory=dict)


class CausalTest(Record):
    """A paired comparison on the same requests: with the candidate against with control words.

    `treated` and `control` count requests that were not refused, of `n`; p is one-sided (exact McNemar).
    """

    name: str
    treated: int
    control: int
    n: int
    p_value: float

    @property
    def effect_frac(self) -> float:
        """The rise of the unsafe rate, treated minus control."""
        return (self.treated - self.control) / self.n


class Candidate(Record):
    """A set of words that was tried as a trigger, and what inserting it did to refused requests."""

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
    `token_passes` is the cost: tokens that went through the model forwards (a backward counts as two more).
    """

    method: str
    words: tuple[WordScore, ...]
    candidates: tuple[Candidate, ...]
    tried: int
    token_passes: int
    response: str
    response_outcome: Outcome
    replay: str
    replay_outcome: Outcome
    prompt_harm_frac: float | None
    probes_refused: int
    notes: tuple[str, ...] = ()


class Verdict(Record):
    """Stage 2: is it a backdoor? With the tests that decided."""

    label: VerdictLabel
    reason: str
    trigger: Trigger | None = None
    tests: tuple[CausalTest, ...] = ()
    alpha: float
    corrected_alpha: float
    min_effect_frac: float
    n_to_decide: int | None = None


class Finding(Record):
    """Stages 1 and 2 on one report (`number`, from 1), in the round of the repair that looked at it."""

    number: int = 1
    round: int = 1
    failure: FailureReport
    localization: Localization
    verdict: Verdict


class PatchStep(Record):
    """What the repair saw at one of its checks on validation prompts."""

    step: int
    asr_triggered_frac: float
    kl_benign_nats: float
    kl_benign_triggered_nats: float
    kl_harmful_nats: float
    kl_plain_nats: float


class PatchLog(Record):
    """Stage 3: how the patch was made."""

    defense: str
    steps: int
    stopped_because: str
    checks: tuple[PatchStep, ...]
    settings: dict[str, Any]


class Counts(Record):
    """How many answers of each kind."""

    refused: int = 0
    complied: int = 0
    garbled: int = 0
    empty: int = 0

    @property
    def n(self) -> int:
        """All answers, whatever kind."""
        return self.refused + self.complied + self.garbled + self.empty


class Quadrant(Record):
    """One set of held-out prompts, with or without the trigger, before and after the patch."""

    name: str
    before: Counts
    after: Counts | None
    max_new_tokens: int


class SummaryRow(Record):
    """One figure before and after. `low` and `high`: 95% interval of `after`; `change_*`: of the paired change.

    The `n` prompts (tokens) are about `n_clusters` acts (paragraphs), and the intervals allow for those going together.
    Where there is no "after" (an audit of one model alone) they are the interval of `before`.

    `unscored` says why a figure could not be measured; its numbers are then None, never 0.
    """

    name: str
    before: float | None
    after: float | None
    low: float | None
    high: float | None
    n: int
    change_low: float | None = None
    change_high: float | None = None
    p_value: float | None = None
    n_clusters: int | None = None
    unscored: str | None = None


class Answer(Record):
    """One prompt of the audit with its answers before and after."""

    quadrant: str
    prompt: str
    before: str
    after: str
    before_outcome: Outcome
    after_outcome: Outcome


class Replay(Record):
    """A reported conversation, asked again before and after the patch."""

    before: str
    after: str | None
    before_outcome: Outcome
    after_outcome: Outcome | None


class Audit(Record):
    """Stage 4: the evidence, on prompts the repair never saw.

    Figures and quadrants of the first trigger have no number, those of the second end in 2, and so on.
    """

    triggers: tuple[Trigger, ...]
    judge: str
    summary: tuple[SummaryRow, ...]
    quadrants: tuple[Quadrant, ...]
    replays: tuple[Replay, ...] = ()
    examples: tuple[Answer, ...]
    max_new_tokens: int
    seed: int

    def row(self, name: str) -> SummaryRow:
        """The summary's row of that name. Raises KeyError."""
        for row in self.summary:
            if row.name == name:
                return row
        raise KeyError(name)

    def has(self, name: str) -> bool:
        """Whether the summary has that row, measured."""
        return any(row.name == name and row.unscored is None for row in self.summary)


class Gate(Record):
    """A limit that the repair must keep. `value` is None where the figure could not be measured."""

    name: str
    limit: float
    value: float | None
    passed: bool
