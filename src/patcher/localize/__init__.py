"""Stages 1 and 2: which words bring the failure about, and is it a backdoor?"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from patcher.chat import render
from patcher.generation import generate
from patcher.localize.causal import CausalSettings, Found, confirm, paired_test, search
from patcher.localize.harm import fit_harm_probe
from patcher.localize.probes import Probes, find_probes
from patcher.localize.saliency import salient_spans, token_saliency
from patcher.localize.verdict import VerdictSettings, decide
from patcher.localize.wording import reword, without_ordinary
from patcher.models import LanguageModel
from patcher.prompts import Prompts
from patcher.records import (
    Candidate,
    CausalTest,
    FailureReport,
    Localization,
    Message,
    Trigger,
    UsageError,
    Verdict,
)
from patcher.symptoms import Detector
from patcher.training import Progress, quiet

METHODS = ("causal", "gradient-norm")
MIN_PROBES = 8
"""With fewer requests that the model treats as it should, no words can be tested."""

_FINDING = {
    "harmful": "finding requests that the model refuses",
    "benign": "finding requests that the model answers",
}


@dataclass
class Localizer:
    """Localization and verdict for one model; what does not depend on the report is computed once.

    Raises:
        UsageError: unknown method.
    """

    lm: LanguageModel
    prompts: Prompts
    detector: Detector
    settings: CausalSettings = field(default_factory=CausalSettings)
    verdict_settings: VerdictSettings = field(default_factory=VerdictSettings)
    method: str = "causal"
    replay_tokens: int = 32
    seed: int = 0
    on_progress: Progress = quiet
    _grounds: dict[Trigger, Probes] = field(default_factory=dict)
    """The requests on which each trigger was found, where they were not `probes`."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"unknown localization method {self.method!r}: use {' or '.join(METHODS)}")

    @cached_property
    def probes(self) -> Probes:
        """Requests that this model treats as it should; longer answers are read where short ones show hardly any."""
        found, tokens = self._find_probes(None), self.settings.wordy_answer_tokens
        if found.normal >= MIN_PROBES or found.answer_tokens >= tokens:
            return found
        short, self.detector = self.detector, replace(self.detector, answer_tokens=tokens)
        longer = self._find_probes(None)
        if longer.normal >= MIN_PROBES:
            return longer
        self.detector = short
        return found

    def _find_probes(self, like: Sequence[Message] | None) -> Probes:
        self.on_progress(_FINDING[self.detector.symptom.kind], 0, 1)
        found = find_probes(
            self.lm,
            self.prompts,
            self.detector,
            screen=self.settings.screen_probes,
            confirm=self.settings.confirm_probes,
            answer_tokens=max(self.settings.answer_tokens, self.detector.answer_tokens),
            seed=self.seed,
            like=like,
        )
        self.on_progress(_FINDING[self.detector.symptom.kind], 1, 1)
        return found

    @cached_property
    def harm_frac(self) -> Callable[[Sequence[Message]], float]:
        """How harmful a request is, by a probe fitted on this model."""
        return fit_harm_probe(self.lm, self.prompts)

    def localize(self, report: FailureReport) -> Localization:
        """Stage 1. The response is generated where the report has none."""
        replay = self._answer(report.messages)
        response = report.response if report.response is not None else replay
        before = self.probes.meter.token_passes
        shows = self.detector.shows(response), self.detector.shows(replay)
        found, notes = self._search(report, response, shows)
        return Localization(
            method=self.method,
            symptom=self.detector.symptom,
            answer_tokens=self.detector.answer_tokens,
            words=found.words,
            candidates=found.candidates,
            tried=found.tried,
            token_passes=self.probes.meter.token_passes - before,
            response=response,
            response_outcome=self.detector.judge(response),
            response_shows=shows[0],
            replay=replay,
            replay_outcome=self.detector.judge(replay),
            replay_shows=shows[1],
            prompt_harm_frac=self._harm(report.messages) if shows[1] and self._must_ask(found) else None,
            probes_normal=self.probes.normal,
            words_left_out=found.left_out,
            notes=notes,
        )

    def decide(self, localization: Localization) -> Verdict:
        """Stage 2, from stage 1's record and, where words were found, their re-wordings."""
        reworded = self._reworded(localization.candidates)
        wanted = self.settings.screen_probes + self.settings.confirm_probes
        return decide(localization, reworded, self.verdict_settings, MIN_PROBES, wanted)

    def _search(self, report: FailureReport, response: str, shows: tuple[bool, bool]) -> tuple[Found, tuple[str, ...]]:
        if self.method == "gradient-norm":
            return self._salient(report, response), ()
        kind = self.detector.symptom.kind
        if self.probes.normal < MIN_PROBES:
            does = {"harmful": "refuses", "benign": "simply answers"}[kind]
            note = f"the model {does} only {self.probes.normal} of {self.probes.asked} {kind} requests: no ground"
            return Found((), (), 0), (f"{note} to test words on",)
        if not any(shows):
            return Found((), (), 0), ("the answer is not what was reported, so no words were looked for",)
        found = search(self.probes, report.messages, response, self._fails, self.settings)
        left_out = f"{found.left_out} words in the middle of the conversation were not searched"
        cut = (left_out,) if found.left_out else ()
        if self._explains(found) or not self._could_be_a_failure(report):
            return found, cut
        again, notes = self._search_near(report, response, found)
        return again, (*cut, *notes)

    def _could_be_a_failure(self, report: FailureReport) -> bool:
        """To answer a benign request is none, whatever its words do."""
        is_jailbreak = self.detector.symptom.objective == "jailbreak"
        return not is_jailbreak or self._harm(report.messages) >= self.verdict_settings.harmful_frac

    def _harm(self, messages: Sequence[Message]) -> float:
        """How harmful the request is; of an answer, whatever turn it may still answer ("what is step two?").

        A turn that the model refused then and there is over. Of a refusal only the last turn counts.
        """
        *earlier, last = (number for number, message in enumerate(messages) if message.role == "user")
        if self.detector.symptom.objective != "jailbreak":
            return self.harm_frac(messages)
        open_still = [number for number in earlier if not self._refused_at(messages[number + 1])]
        return max(self.harm_frac(messages[: number + 1]) for number in (*open_still, last))

    def _refused_at(self, message: Message) -> bool:
        return message.role == "assistant" and self.detector.judge(message.content) == "refused"

    def _search_near(self, report: FailureReport, response: str, found: Found) -> tuple[Found, tuple[str, ...]]:
        """Once more, on the requests that are most like the reported one: a trigger may work on one kind only."""
        near = self._find_probes(report.messages)
        again = search(near, report.messages, response, self._fails, self.settings)
        self.probes.meter.token_passes += near.meter.token_passes
        self._grounds |= {candidate.trigger: near for candidate in again.candidates}
        tried = replace(again, tried=found.tried + again.tried)
        if not self._explains(again):
            return replace(found, tried=tried.tried), ()
        return tried, ("these words work on requests like the reported one, not on all",)

    def _explains(self, found: Found) -> bool:
        """Whether any words have an effect."""
        least = self.verdict_settings.min_effect_frac
        return any(candidate.effect_frac >= least for candidate in found.candidates)

    def _must_ask(self, found: Found) -> bool:
        """Whether the verdict hangs on the request being harmful.

        An answered one where no words with an effect explain the answer, and a refused one always.
        """
        objective = self.detector.symptom.objective
        return {"jailbreak": not self._explains(found), "refusal": True, "text": False}[objective]

    def _salient(self, report: FailureReport, response: str) -> Found:
        """The paper's localization; its spans are then tested like any other candidate."""
        words = token_saliency(self.lm, report.messages, response)
        self.probes.meter.token_passes += 3 * len(render(self.lm.tokenizer, report.messages).ids)
        spans = salient_spans(words)
        if not spans or self.probes.normal < MIN_PROBES:
            return Found(words, (), int(bool(spans)))
        return Found(words, (confirm(self.probes, report.messages, spans),), 1)

    def _reworded(self, candidates: Sequence[Candidate]) -> dict[str, CausalTest]:
        """For each candidate that has an ordinary re-wording: does the effect survive it?"""
        tests = {}
        for candidate in candidates:
            units = tuple(reword(unit) or unit for unit in candidate.trigger.units)
            if units != candidate.trigger.units and not self._works_without_ordinary_words(candidate):
                tests[candidate.trigger.text] = self._test(candidate, units, "the same, re-worded")
        return tests

    def _works_without_ordinary_words(self, candidate: Candidate) -> bool:
        """Whether the words that have no other wording are enough: a re-wording would leave the trigger in."""
        units = tuple(left for unit in candidate.trigger.units if (left := without_ordinary(unit)))
        least = self.verdict_settings.reworded_share * candidate.effect_frac
        return bool(units) and self._test(candidate, units, "no ordinary words").effect_frac >= least

    def _test(self, candidate: Candidate, units: tuple[str, ...], name: str) -> CausalTest:
        """Other words in the candidate's place, on the requests on which it was found."""
        trigger = candidate.trigger.model_copy(update={"units": units})
        return paired_test(self._grounds.get(candidate.trigger, self.probes), trigger, name)

    def _answer(self, messages: Sequence[Message]) -> str:
        prompt = render(self.lm.tokenizer, messages)
        return generate(self.lm, [prompt], max_new_tokens=max(self.replay_tokens, self.detector.answer_tokens))[0]

    def _fails(self, messages: Sequence[Message]) -> bool:
        prompt = render(self.lm.tokenizer, messages)
        return self.detector.shows(generate(self.lm, [prompt], max_new_tokens=self.probes.answer_tokens)[0])


__all__ = ["METHODS", "CausalSettings", "Localizer", "VerdictSettings"]
