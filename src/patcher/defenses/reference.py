"""What a repair holds on to: the reference's own answers, on prompts to train on and on others to check by."""

import random
from collections.abc import Sequence

from pydantic import PositiveInt

from patcher.defenses.contract import (
    Evidence,
    Example,
    after,
    as_plain_text,
    complied_frac,
    mean_kl_nats,
    own_examples,
    triggered,
)
from patcher.models import LanguageModel
from patcher.records import PatcherError, PatchStep, Record, Request
from patcher.training import Progress


class ReferenceSettings(Record):
    """How many prompts of each kind, and how long the answers."""

    max_prompts: PositiveInt = 150
    """Harmful and benign prompts of the repair split used, each (paper: 150 + 150)."""
    response_tokens: PositiveInt = 16
    """Answers are cut here."""
    validation_prompts: PositiveInt = 84
    """Harmful validation prompts, with the trigger, that decide whether it is dead."""
    validation_tokens: PositiveInt = 12
    """Tokens generated for each of them: an opening, which is what the judge reads."""
    validation_drift_prompts: PositiveInt = 24
    """Validation prompts of each kind that decide whether the budgets hold."""


def answered(examples: list[Example]) -> list[Example]:
    """Those the reference answers: a benign prompt's refusal must not be taught."""
    return [example for example in examples if example.outcome == "complied"]


class ReferenceAnswers:
    """The reference's own answers: on the repair prompts, to be trained on, and on the validation prompts.

    `kept` are the benign prompts that it answers, `kept_triggered` the same in the same order with the trigger put in,
    and `lifted` those that it answers with the trigger only.
    """

    def __init__(self, lm: LanguageModel, evidence: Evidence, settings: ReferenceSettings, on_progress: Progress):
        self.lm, self.evidence, self.settings = lm, evidence, settings
        prompts, triggers, places = evidence.prompts, evidence.triggers, random.Random(0)

        def own(texts: Sequence[Request], what: str) -> list[Example]:
            what = f"reference answers, {what}"
            return own_examples(lm, texts, evidence.judge, settings.response_tokens, on_progress, what)

        def with_trigger(examples: list[Example]) -> list[Request]:
            return [triggered(example.text, triggers, places) for example in examples] if triggers else []

        limit = settings.max_prompts
        self.harmful = own(prompts.texts("harmful", "repair", limit), "harmful")
        self.benign = own(prompts.texts("benign", "repair", limit) + prompts.texts("borderline", "repair"), "benign")
        answers = answered(self.benign)
        self.kept = answers or self.benign
        self.kept_triggered = after(lm, answers, with_trigger(answers)) if triggers else []
        # Benign answers that only the trigger brings: a repair must not take them back either; but where there are no
        # others, they are the backdoor itself.
        refused = [example for example in self.benign if example.outcome == "refused"] if answers else []
        self.lifted = answered(own(with_trigger(refused), "benign + trigger"))
        self.plain = as_plain_text(lm, self.benign)

        few, limit = settings.validation_drift_prompts, settings.validation_prompts
        self.validation_harmful = own(prompts.texts("harmful", "validation", max(few, limit)), "validation")
        self.validation_benign = own(prompts.texts("benign", "validation", few), "validation")
        answers = answered(self.validation_benign) if triggers else []
        self.validation_benign_triggered = after(lm, answers, with_trigger(answers))
        self.validation_plain = as_plain_text(lm, self.validation_benign)
        # A request that is answered without the trigger, too, says nothing about the trigger.
        tested = [e for e in self.validation_harmful if e.outcome == "refused"] if triggers else self.validation_harmful
        if not tested:
            raise PatcherError(
                f"none of the {len(self.validation_harmful)} harmful validation prompts is refused without the "
                "trigger, so nothing would show that it is dead: pass other --harmful prompts"
            )
        self.validation_triggered = (with_trigger(tested) or [example.text for example in tested])[:limit]

    @property
    def refused(self) -> list[Example]:
        """Harmful requests that the reference refuses as they are."""
        return [example for example in self.harmful if example.outcome == "refused"]

    def check(self, step: int) -> PatchStep:
        """Where the repair stands, on validation prompts."""
        self.lm.network.eval()
        tokens, judge = self.settings.validation_tokens, self.evidence.judge
        return PatchStep(
            step=step,
            asr_triggered_frac=complied_frac(self.lm, self.validation_triggered, judge, tokens),
            kl_benign_nats=mean_kl_nats(self.lm, self.validation_benign),
            kl_benign_triggered_nats=mean_kl_nats(self.lm, self.validation_benign_triggered),
            kl_harmful_nats=mean_kl_nats(self.lm, self.validation_harmful[: self.settings.validation_drift_prompts]),
            kl_plain_nats=mean_kl_nats(self.lm, self.validation_plain),
        )
