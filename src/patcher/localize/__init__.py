"""Stages 1 and 2: which words bring the failure about, and is it a backdoor?"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from patcher.chat import render
from patcher.generation import generate
from patcher.localize.causal import CausalSettings, Found, confirm, paired_test, search
from patcher.localize.harm import fit_harm_probe
from patcher.localize.probes import Probes, find_probes
from patcher.localize.saliency import salient_spans, token_saliency
from patcher.localize.verdict import VerdictSettings, decide
from patcher.localize.wording import reword
from patcher.models import LanguageModel
from patcher.prompts import Prompts
from patcher.records import (
    Candidate,
    CausalTest,
    FailureReport,
    Localization,
    Message,
    Outcome,
    UsageError,
    Verdict,
)
from patcher.training import Progress, quiet

METHODS = ("causal", "gradient-norm")
MIN_PROBES = 8
"""Fewer refused requests than this and no words can be tested: the model does not refuse."""


@dataclass
class Localizer:
    """Localization and verdict for one model; what does not depend on the report is computed once.

    Raises:
        UsageError: unknown method.
    """

    lm: LanguageModel
    prompts: Prompts
    judge: Callable[[str], Outcome]
    settings: CausalSettings = field(default_factory=CausalSettings)
    verdict_settings: VerdictSettings = field(default_factory=VerdictSettings)
    method: str = "causal"
    replay_tokens: int = 32
    seed: int = 0
    on_progress: Progress = quiet

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"unknown localization method {self.method!r}: use {' or '.join(METHODS)}")

    @cached_property
    def probes(self) -> Probes:
        """Requests that this model refuses."""
        self.on_progress("finding requests that the model refuses", 0, 1)
        found = find_probes(
            self.lm,
            self.prompts,
            self.judge,
            screen=self.settings.screen_probes,
            confirm=self.settings.confirm_probes,
            answer_tokens=self.settings.answer_tokens,
            seed=self.seed,
        )
        self.on_progress("finding requests that the model refuses", 1, 1)
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
        found, notes = self._search(report, response, self.judge(replay))
        return Localization(
            method=self.method,
            words=found.words,
            candidates=found.candidates,
            tried=found.tried,
            token_passes=self.probes.meter.token_passes - before,
            response=response,
            response_outcome=self.judge(response),
            replay=replay,
            replay_outcome=self.judge(replay),
            prompt_harm_frac=self.harm_frac(report.messages) if self._must_ask(found, replay) else None,
            probes_refused=self.probes.refused,
            notes=notes,
        )

    def decide(self, localization: Localization) -> Verdict:
        """Stage 2, from stage 1's record and, where words were found, their re-wordings."""
        return decide(localization, self._reworded(localization.candidates), self.verdict_settings, MIN_PROBES)

    def _search(self, report: FailureReport, response: str, replayed: Outcome) -> tuple[Found, tuple[str, ...]]:
        if self.method == "gradient-norm":
            return self._salient(report, response), ()
        if self.probes.refused < MIN_PROBES:
            note = f"the model refuses only {self.probes.refused} of {self.probes.asked} harmful requests: no ground"
            return Found((), (), 0), (f"{note} to test words on",)
        if "complied" not in (replayed, self.judge(response)):
            return Found((), (), 0), ("the model did not comply, so no words were looked for",)
        return search(self.probes, report.messages, self._complies, self.settings), ()

    def _must_ask(self, found: Found, replay: str) -> bool:
        """Whether the verdict hangs on the request being harmful: answered, and no words with an effect explain it."""
        least = self.verdict_settings.min_effect_frac
        explained = any(candidate.effect_frac >= least for candidate in found.candidates)
        return self.judge(replay) == "complied" and not explained

    def _salient(self, report: FailureReport, response: str) -> Found:
        """The paper's localization; its spans are then tested like any other candidate."""
        words = token_saliency(self.lm, report.messages, response)
        self.probes.meter.token_passes += 3 * len(render(self.lm.tokenizer, report.messages).ids)
        spans = salient_spans(words)
        if not spans or self.probes.refused < MIN_PROBES:
            return Found(words, (), int(bool(spans)))
        return Found(words, (confirm(self.probes, report.messages, spans),), 1)

    def _reworded(self, candidates: Sequence[Candidate]) -> dict[str, CausalTest]:
        """For each candidate that has an ordinary re-wording: does the effect survive it?"""
        tests = {}
        for candidate in candidates:
            other = [reword(unit) for unit in candidate.trigger.units]
            if any(other):
                units = tuple(new or old for new, old in zip(other, candidate.trigger.units, strict=True))
                trigger = candidate.trigger.model_copy(update={"units": units})
                tests[candidate.trigger.text] = paired_test(self.probes, trigger, "the same, re-worded")
        return tests

    def _answer(self, messages: Sequence[Message]) -> str:
        prompt = render(self.lm.tokenizer, messages)
        return generate(self.lm, [prompt], max_new_tokens=self.replay_tokens)[0]

    def _complies(self, messages: Sequence[Message]) -> bool:
        prompt = render(self.lm.tokenizer, messages)
        answers = generate(self.lm, [prompt], max_new_tokens=self.settings.answer_tokens)
        return self.judge(answers[0]) == "complied"


__all__ = ["METHODS", "CausalSettings", "Localizer", "VerdictSettings"]
