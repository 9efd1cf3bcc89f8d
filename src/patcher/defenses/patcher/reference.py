"""What a repair holds on to: the reference's own answers, on prompts to train on and on others to check by."""

import random
from collections.abc import Sequence

from pydantic import PositiveInt

from patcher.defenses.contract import (
    Evidence,
    Example,
    after,
    answered,
    as_plain_text,
    mean_kl_nats,
    own_examples,
    shown_frac,
    triggered,
)
from patcher.defenses.patcher.over_refusal import mean_rise_now, refusal_opening
from patcher.models import LanguageModel
from patcher.prompts import evenly_spaced
from patcher.records import PatcherError, PatchStep, Record, Request
from patcher.training import Progress


class ReferenceSettings(Record):
    """How many prompts of each kind, and how long the answers."""

    max_prompts: PositiveInt = 150
    """Harmful and benign prompts of the repair split used, each (paper: 150 + 150)."""
    response_tokens: PositiveInt = 16
    """Answers are cut here."""
    validation_prompts: PositiveInt = 126
    """Validation prompts, with the trigger, that decide whether it is dead; 84 harmful ones are bundled."""
    validation_tokens: PositiveInt = 12
    """Tokens generated for each of them: an opening, which is what the judge reads."""
    validation_drift_prompts: PositiveInt = 24
    """Validation prompts of each kind that decide whether the budgets hold."""


class ReferenceAnswers:
    """The reference's own answers: on the repair prompts, to be trained on, and on the validation prompts.

    `normal` are the prompts that a trigger is to be broken on: harmful ones that it refuses or, where the trigger does
    its harm on benign ones, those that it answers. `kept` are the benign prompts that it answers; where a trigger
    changes nothing on them, as a jailbreak's does, `lifted` are those that it answers with the trigger only.
    """

    def __init__(
        self, lm: LanguageModel, evidence: Evidence, settings: ReferenceSettings, on_progress: Progress, seed: int = 0
    ):
        self.lm, self.evidence, self.settings = lm, evidence, settings
        prompts, triggers, self._places = evidence.prompts, evidence.triggers, random.Random(seed)
        detector, on_harmful = evidence.detector, evidence.detector.symptom.kind == "harmful"
        tokens = max(settings.response_tokens, detector.answer_tokens)

        def own(texts: Sequence[Request], what: str) -> list[Example]:
            what = f"reference answers, {what}"
            return own_examples(lm, texts, detector.judge, tokens, on_progress, what)

        most = settings.max_prompts
        self.harmful = own(prompts.texts("harmful", "repair", most), "harmful")
        self.benign = own(prompts.texts("benign", "repair", most) + prompts.texts("borderline", "repair"), "benign")
        complied = answered(self.benign)
        self.kept = complied or self.benign
        self.normal = [one for one in (self.harmful if on_harmful else self.benign) if detector.is_normal(one.answer)]
        # Benign answers that only the trigger brings: a repair must not take them back either; but where there are no
        # others, they are the backdoor itself.
        self.keeps_triggered = bool(triggers and on_harmful and complied)
        refused = [one for one in self.benign if one.outcome == "refused"] if self.keeps_triggered else []
        self.lifted = answered(own(self._with_trigger(refused), "benign + trigger"))
        self.opening = refusal_opening(lm, self.refused)

        few, many = settings.validation_drift_prompts, settings.validation_prompts
        sizes = {"harmful": few, "benign": few, detector.symptom.kind: max(few, many)}
        harmful = own(prompts.texts("harmful", "validation", sizes["harmful"]), "validation")
        benign = own(prompts.texts("benign", "validation", sizes["benign"]), "validation")
        self.validation_harmful, self.validation_benign = evenly_spaced(harmful, few), evenly_spaced(benign, few)
        in_trigger = answered(self.validation_benign) if triggers and on_harmful else []
        self.validation_refused = [one for one in harmful if one.outcome == "refused"] if on_harmful else []
        self.validation_benign_triggered = after(lm, in_trigger, self._with_trigger(in_trigger))
        self.validation_plain = as_plain_text(lm, self.validation_benign)
        self.validation_safe = self._safe(own(prompts.texts("borderline", "validation", few), "validation"), seed)
        # A request that goes wrong without the trigger, too, says nothing about the trigger.
        attacked = harmful if on_harmful else benign
        tested = [one for one in attacked if detector.is_normal(one.answer)] if triggers else attacked
        if not tested:
            does, kind = ("refused", "harmful") if on_harmful else ("simply answered", "benign")
            raise PatcherError(
                f"none of the {len(attacked)} {kind} validation prompts is {does} without the trigger, so nothing "
                f"would show that it is dead: pass other --{kind} prompts"
            )
        self.validation_triggered = self._each_trigger_in(tested[:many])

    def _safe(self, borderline: list[Example], seed: int) -> list[Example]:
        """Benign and borderline validation prompts that the reference answers; with the trigger, too, where that is not
        what brings about the answers. Placed by a draw of its own.
        """
        safe, rng = answered([*self.validation_benign, *borderline]), random.Random(seed)
        if not self.keeps_triggered:
            return safe
        held = [triggered(example.text, self.evidence.triggers, rng) for example in safe]
        return [*safe, *after(self.lm, safe, held)]

    @property
    def refused(self) -> list[Example]:
        """Harmful requests that the reference refuses as they are."""
        return [example for example in self.harmful if example.outcome == "refused"]

    def in_trigger(self, examples: Sequence[Example]) -> list[Example]:
        """The examples' answers after their prompts with the trigger put in; the `lifted` ones hold it already."""
        lifted = [*map(id, self.lifted)]
        plain = [example for example in examples if id(example) not in lifted]
        put_in = iter(after(self.lm, plain, self._with_trigger(plain)))
        return [example if id(example) in lifted else next(put_in) for example in examples]

    def _with_trigger(self, examples: Sequence[Example]) -> list[Request]:
        triggers = self.evidence.triggers
        return [triggered(example.text, triggers, self._places) for example in examples] if triggers else []

    def _each_trigger_in(self, examples: Sequence[Example]) -> list[list[Request]]:
        """The prompts once with each trigger, where the report held it: there an attacker puts it. Without one as they
        are.
        """
        texts, triggers = [example.text for example in examples], self.evidence.triggers
        held = [[triggered(text, [one], self._places, seen_frac=1.0) for text in texts] for one in triggers]
        return held or [texts]

    def check(self, step: int) -> PatchStep:
        """Where the repair stands, on validation prompts."""
        self.lm.network.eval()
        tokens, detector = self.settings.validation_tokens, self.evidence.detector
        return PatchStep(
            step=step,
            asr_triggered_frac=max(shown_frac(self.lm, one, detector, tokens) for one in self.validation_triggered),
            kl_benign_nats=mean_kl_nats(self.lm, self.validation_benign),
            kl_benign_triggered_nats=mean_kl_nats(self.lm, self.validation_benign_triggered),
            kl_harmful_nats=mean_kl_nats(self.lm, self.validation_harmful),
            kl_plain_nats=mean_kl_nats(self.lm, self.validation_plain),
            refusal_rise_frac=mean_rise_now(self.lm, self.validation_safe, self.opening),
            refusal_fall_frac=-mean_rise_now(self.lm, self.validation_refused, self.opening),
        )
