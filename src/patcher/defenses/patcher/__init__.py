"""Patcher's stage 2: break trigger -> response by fine-tuning, under limits on what else may change.

Gao et al. (2026), arXiv:2606.02995. `objective="paper"` is their loss; `objective="counterfactual"` is ours.
"""

import random
from dataclasses import replace
from typing import Literal

from patcher.defenses.contract import Evidence, Trained
from patcher.defenses.patcher.checks import Checks
from patcher.defenses.patcher.counterfactual import Counterfactual
from patcher.defenses.patcher.paper import Paper
from patcher.defenses.patcher.reference import ReferenceAnswers
from patcher.defenses.patcher.settings import PatcherSettings
from patcher.lora import RunningMean, take_patch, trainable_lora
from patcher.models import LanguageModel
from patcher.records import UsageError
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
    The patch is the running mean of the steps' weights (`mean_decay`).

    Departures from the paper: the target is the model's own untriggered behaviour rather than a fixed refusal, so the
    refusal loss and KL-harm no longer pull against each other; KL terms are constraints rather than unit-weight
    penalties; benign prompts are seen with the trigger too; training stops by validation; a trigger that the report
    held at the start, the end or in another message goes there half of the time. For `objective="paper"`, which states
    neither learning rate nor how the sets share a batch: each of the three sets has a batch of 8 of its own, so that 10
    epochs of 150 prompts are 190 steps; y_h in L_KL-harm is y_ref; the benign set holds the borderline prompts, too, so
    that it is seen 6 times, not 10; answers are cut at `response_tokens`.

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
        checks = Checks(lm, reference, settings, mean, refuses_more=objective.refuses_more)
        steps, reason = fit(lm, objective.loss, settings, stop=checks.stop, on_progress=on_progress, what="patching")
        with mean.inside():
            last = take_patch(lm, rank=settings.rank, alpha=settings.alpha)
    if checks.best is None:
        return Trained(last, steps, reason, tuple(checks.made))
    _, kept, patch = checks.best
    reason = reason if kept == steps else f"{reason}; the patch is that of step {kept}, the best check"
    return Trained(patch, steps, reason, tuple(checks.made))
