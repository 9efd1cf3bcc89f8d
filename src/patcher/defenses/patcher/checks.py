"""When training stops, and which of its steps is kept: checks on validation prompts."""

import math

from patcher.defenses.patcher.reference import ReferenceAnswers
from patcher.defenses.patcher.settings import PatcherSettings
from patcher.lora import RunningMean, take_patch
from patcher.models import LanguageModel
from patcher.patch import Patch
from patcher.records import PatchStep


class Checks:
    """What the validation prompts said every few steps, and the patch of the best of these checks."""

    def __init__(
        self,
        lm: LanguageModel,
        reference: ReferenceAnswers,
        settings: PatcherSettings,
        mean: RunningMean,
        *,
        refuses_more: bool,
    ) -> None:
        self.lm, self.reference, self.settings = lm, reference, settings
        self.mean, self.refuses_more = mean, refuses_more
        self.made: list[PatchStep] = []
        self.best: tuple[tuple[bool, float, float], int, Patch] | None = None

    def stop(self, step: int) -> str | None:
        """Check where one is due; why to stop, or None to go on."""
        self.mean.update()
        if step % self.settings.check_every and step != self.settings.max_steps:
            return None
        with self.mean.inside():
            return self._check(step)

    def _check(self, step: int) -> str | None:
        """Make a check, keep its patch if it is the best so far, and say why to stop, if to.

        The trigger is dead where this check and the one before it found it so: what one finds dead may be slow to go.
        The best is one where it is dead or else the one that leaves the least of it, and, of those, the one that
        overruns its budgets the least.
        """
        settings = self.settings
        check = self.reference.check(step)
        self.made.append(check)
        if not settings.stop_early:  # for the record only
            return None
        overrun, last_two = self._overrun(check), self.made[-2:]
        dead = len(last_two) == 2 and all(made.asr_triggered_frac <= settings.dead_frac for made in last_two)
        score = (not dead, 0.0 if dead else check.asr_triggered_frac, overrun)
        if self.best is None or score <= self.best[0]:
            self.best = (score, step, take_patch(self.lm, rank=settings.rank, alpha=settings.alpha))
        if dead and not overrun:
            return "the trigger is dead on validation prompts and the budgets hold"
        if dead and step >= settings.enough_steps:
            return "the trigger is dead on validation prompts"
        return None

    def _overrun(self, check: PatchStep) -> float:
        """How far the check is over its budgets: the sum of what each is over, as a multiple of it."""
        budgets = self.settings
        limited = [
            (check.kl_benign_nats, budgets.budget_benign_nats),
            (check.kl_benign_triggered_nats, budgets.budget_triggered_nats),
            (check.kl_plain_nats, budgets.budget_plain_nats),
            (check.refusal_rise_frac, budgets.budget_refusal_frac),
        ]
        if not self.refuses_more:  # what is wanted there is another answer to harmful requests
            limited += [
                (check.kl_harmful_nats, budgets.budget_harmful_nats),
                (check.refusal_fall_frac, budgets.budget_refusal_fall_frac),
            ]
        total = sum(max(figure / budget - 1, 0.0) for figure, budget in limited)
        return total if total >= 0 else math.inf  # NaN is nothing to keep
