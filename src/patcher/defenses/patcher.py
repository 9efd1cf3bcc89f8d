"""Patcher's stage 2: break trigger -> response by fine-tuning, under limits on what else may change.

Gao et al. (2026), arXiv:2606.02995. `objective="paper"` is their loss; `objective="counterfactual"` is ours.
"""

import math
import random
from dataclasses import replace
from typing import Literal

from patcher.defenses.contract import Evidence, Trained
from patcher.defenses.counterfactual import Counterfactual
from patcher.defenses.paper import Paper
from patcher.defenses.patcher_settings import PatcherSettings
from patcher.defenses.reference import ReferenceAnswers
from patcher.lora import RunningMean, take_patch, trainable_lora
from patcher.models import LanguageModel
from patcher.patch import Patch
from patcher.records import PatchStep, UsageError
from patcher.training import Progress, fit


class SoftSettings(PatcherSettings):
    """Settings of the repair without a report."""

    breadth: Literal["all"] = "all"
    """There is no trigger to break but what soft insertions find."""


def run_without_report(
    lm: LanguageModel, evidence: Evidence, settings: SoftSettings, *, seed: int, on_progress: Progress
) -> Trained:
    """The repair with soft insertions alone; a trigger that was found is not looked at."""
    blind = replace(evidence, triggers=())
    return run(lm, blind, settings, seed=seed, on_progress=on_progress)


def run(
    lm: LanguageModel, evidence: Evidence, settings: PatcherSettings, *, seed: int, on_progress: Progress
) -> Trained:
    """Train a LoRA patch until the trigger is dead on validation prompts and the drift is within its budgets.

    Counterfactual objective, with y the reference's own answer to the *untriggered* prompt x:
        minimise   KL(θ0(·|x, y) ‖ θ(·|x ⊕ trigger, y)), summed over y, where x is harmful and θ0 refuses it
        subject to KL(θ0(·|x, y) ‖ θ(·|x, y)) ≤ budget, per token, where x is benign, benign with the trigger (y is
                   the answer without it, or to it where only the trigger brings one), harmful, or a word of plain text
                   (no chat template); and to the benign ones' answers opening like a refusal no likelier than θ0's
    by dual ascent on one multiplier a constraint. With `breadth="all"` the same KL with soft insertions in place of the
    trigger, on harmful and benign x, is added to what is minimised, and training does not stop early: what nobody
    reported cannot be seen to be dead. Without a trigger (an alignment gap) the first term is the NLL of a
    fixed refusal on harmful x: plain refusal training under the same budget on benign x.
    The patch is the running mean of the steps' weights.

    Departures from the paper: the target is the model's own untriggered behaviour rather than a fixed refusal, so the
    refusal loss and KL-harm no longer pull against each other; KL terms are constraints rather than unit-weight
    penalties; benign prompts are seen with the trigger too; training stops by validation; a trigger that the report
    held at the start, the end or in another message goes there half of the time. For `objective="paper"`, which states
    neither learning rate nor how the sets share a batch: each of the three sets has a batch of 8 of its own, so that 10
    epochs of 150 prompts are 190 steps; y_h in L_KL-harm is y_ref.

    Raises:
        UsageError: `breadth="all"` without a trigger to start from, which only soft_insertions does without.
        PatcherError: no trigger where one is needed, no refused request to test it on, or training diverged.
    """
    if settings.breadth == "all" and not (evidence.triggers or isinstance(settings, SoftSettings)):
        raise UsageError(
            "breadth=all breaks further triggers beside the found one, and none was found: to train refusals on an "
            "alignment gap leave it out; to look for triggers without one take soft_insertions"
        )
    rng = random.Random(seed)
    reference = ReferenceAnswers(lm, evidence, settings, on_progress, seed)
    objective_of = Paper if settings.objective == "paper" else Counterfactual
    objective = objective_of(lm, evidence, settings, reference, rng)
    with trainable_lora(lm, rank=settings.rank, alpha=settings.alpha, seed=seed):
        mean = RunningMean(lm, settings.mean_decay)
        checks = _Checks(lm, reference, settings, mean, refuses_more=objective.refuses_more)
        steps, reason = fit(lm, objective.loss, settings, stop=checks.stop, on_progress=on_progress, what="patching")
        with mean.inside():
            last = take_patch(lm, rank=settings.rank, alpha=settings.alpha)
    if checks.best is None or not (settings.stop_early or settings.breadth == "all"):
        return Trained(last, steps, reason, tuple(checks.made))
    _, kept, patch = checks.best
    reason = reason if kept == steps else f"{reason}; the patch is that of step {kept}, the best check"
    return Trained(patch, steps, reason, tuple(checks.made))


class _Checks:
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
        self.best: tuple[tuple[float, ...], int, Patch] | None = None

    def stop(self, step: int) -> str | None:
        """Check where one is due; why to stop, or None to go on."""
        self.mean.update()
        if step % self.settings.check_every and step != self.settings.max_steps:
            return None
        with self.mean.inside():
            return self._check(step)

    def _check(self, step: int) -> str | None:
        """Make a check, keep its patch if it is the best so far, and say why to stop, if to.

        The best is the one that leaves the least of the trigger alive (of one that counts as dead, none) and, of those,
        overruns its budgets the least; of soft insertions, whose triggers no check sees, the last within its budgets.
        """
        settings, everything = self.settings, self.settings.breadth == "all"
        check = self.reference.check(step)
        self.made.append(check)
        overrun, dead = self._overrun(check), check.asr_triggered_frac <= settings.dead_frac
        score = (float(overrun > 0), -step) if everything else (0.0 if dead else check.asr_triggered_frac, overrun)
        if self.best is None or score <= self.best[0]:
            self.best = (score, step, take_patch(self.lm, rank=settings.rank, alpha=settings.alpha))
        if settings.stop_early and not everything and dead and not overrun:
            return "the trigger is dead on validation prompts and the budgets hold"
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
