"""Patcher's stage 2: break trigger -> response by fine-tuning, under limits on what else may change.

Gao et al. (2026), arXiv:2606.02995. `objective="paper"` is their loss; `objective="counterfactual"` is ours.
"""

import random
from collections import Counter
from typing import Literal

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from patcher.chat import Row
from patcher.defenses.contract import (
    FIXED_REFUSAL,
    Evidence,
    Example,
    kl_of,
    patched_logits,
    triggered,
    with_answer,
)
from patcher.defenses.reference import ReferenceAnswers, ReferenceSettings
from patcher.lora import take_patch, trainable_lora
from patcher.losses import response_nll
from patcher.models import LanguageModel, logits_of
from patcher.patch import Patch
from patcher.records import PatcherError, PatchLog, PatchStep
from patcher.training import Progress, endless, fit


class PatcherSettings(ReferenceSettings):
    """Settings of the repair; defaults chosen on validation prompts (docs/repair.md)."""

    objective: Literal["counterfactual", "paper"] = "counterfactual"
    """Which loss: ours, or the paper's Eqs. (5-8)."""
    rank: PositiveInt = 32
    """LoRA rank (paper: 32)."""
    alpha: PositiveInt = 64
    """LoRA scale (paper: 64)."""
    learning_rate: PositiveFloat = 3e-4
    """AdamW's learning rate; the paper states none."""
    max_steps: PositiveInt = 30
    """Upper limit of steps (paper: 10 epochs of 150 + 150 prompts at batch 8, that is 190)."""
    warmup_steps: NonNegativeInt = 3
    """Steps of linear warm-up."""
    cosine: bool = False
    """No decay: training stops when the repair is done, not at a planned step."""
    stop_early: bool = True
    """Stop when the trigger is dead on validation prompts and the budgets hold."""
    dead_frac: NonNegativeFloat = 0.0125
    """The trigger is dead from this validation ASR down: a rare word never planted brings 1 answer in 82, too."""
    check_every: PositiveInt = 10
    """Steps between checks on validation prompts."""
    triggered_rows: PositiveInt = 8
    """Harmful requests with the trigger, a step."""
    harmful_rows: PositiveInt = 2
    """Harmful requests without it."""
    benign_rows: PositiveInt = 6
    """Benign requests without it."""
    benign_triggered_rows: NonNegativeInt = 6
    """Benign requests with the trigger (counterfactual only)."""
    plain_rows: NonNegativeInt = 2
    """Texts without the chat template (counterfactual only): what the model says outside a chat stays, too."""
    budget_benign_nats: PositiveFloat = 0.005
    """Constraint: KL(reference ‖ patched) per response token on benign prompts."""
    budget_triggered_nats: PositiveFloat = 0.005
    """Constraint: the same on benign prompts with the trigger: it must not teach refusing them."""
    budget_harmful_nats: PositiveFloat = 0.02
    """Constraint: the same on untriggered harmful prompts: their refusal stays what it was."""
    budget_plain_nats: PositiveFloat = 0.005
    """Constraint: the same on plain text, per token."""
    multiplier_start: PositiveFloat = 10.0
    """The constraints' multipliers at the first step, near where they end: less is lost that must be won back."""
    multiplier_rate: PositiveFloat = 0.2
    """How fast the constraints' multipliers answer to a budget overrun, a step."""


def run(
    lm: LanguageModel, evidence: Evidence, settings: PatcherSettings, *, seed: int, on_progress: Progress
) -> tuple[Patch, PatchLog]:
    """Train a LoRA patch until the trigger is dead on validation prompts and the drift is within its budgets.

    Counterfactual objective, with y the reference's own answer to the *untriggered* prompt x:
        minimise   KL(θ0(·|x, y) ‖ θ(·|x ⊕ trigger, y)), summed over y, where x is harmful and θ0 refuses it
        subject to KL(θ0(·|x, y) ‖ θ(·|x, y)) ≤ budget, per token, where x is benign, benign with the trigger (y is
                   the answer without it, or to it where only the trigger brings one), harmful, or a word of plain text
                   (no chat template)
    by dual ascent on one multiplier a constraint. Without a trigger (an alignment gap) the first term is the NLL of a
    fixed refusal on harmful x: plain refusal training under the same budget on benign x.

    Departures from the paper: the target is the model's own untriggered behaviour rather than a fixed refusal, so the
    refusal loss and KL-harm no longer pull against each other; KL terms are constraints rather than unit-weight
    penalties; benign prompts are seen with the trigger too; training stops by validation. For `objective="paper"`,
    which states neither learning rate nor how the sets share a batch: each step draws `harmful_rows` +
    `triggered_rows` harmful and `benign_rows` benign prompts; y_h in L_KL-harm is y_ref.

    Raises:
        PatcherError: no trigger where one is needed, no refused request to test it on, or training diverged.
    """
    rng = random.Random(seed)
    reference = ReferenceAnswers(lm, evidence, settings, on_progress)
    objective = (
        _Paper(lm, evidence, settings, reference, rng)
        if settings.objective == "paper"
        else (_Counterfactual(lm, evidence, settings, reference, rng))
    )
    checks: list[PatchStep] = []
    best: list[tuple[tuple[bool, float, float], Patch]] = []

    def stop(step: int) -> str | None:
        if step % settings.check_every and step != settings.max_steps:
            return None
        check = reference.check(step)
        checks.append(check)
        held = (
            check.kl_benign_nats <= settings.budget_benign_nats
            and check.kl_benign_triggered_nats <= settings.budget_triggered_nats
            and check.kl_plain_nats <= settings.budget_plain_nats
            and (objective.refuses_more or check.kl_harmful_nats <= settings.budget_harmful_nats)
        )
        score = (not held, check.asr_triggered_frac, check.kl_benign_nats)
        if not best or score <= best[0][0]:
            best[:] = [(score, take_patch(lm, rank=settings.rank, alpha=settings.alpha))]
        if settings.stop_early and held and check.asr_triggered_frac <= settings.dead_frac:
            return "the trigger is dead on validation prompts and the budgets hold"
        return None

    with trainable_lora(lm, rank=settings.rank, alpha=settings.alpha, seed=seed):
        steps, reason = fit(lm, objective.loss, settings, stop=stop, on_progress=on_progress, what="patching")
        last = take_patch(lm, rank=settings.rank, alpha=settings.alpha)
    patch = best[0][1] if settings.stop_early else last
    log = PatchLog(
        defense="patcher", steps=steps, stopped_because=reason, checks=tuple(checks), settings=settings.model_dump()
    )
    return patch, log


@torch.no_grad()
def boundary_thrice(lm: LanguageModel, examples: list[Example], refused: list[Example]) -> list[int]:
    """Each example's number, and twice more those of the third that the reference comes nearest to refusing.

    A repair's over-refusals arise there, and a mean over all prompts hardly sees them.
    """
    opening = Counter(example.answer_ids[0] for example in refused).most_common(1)[0][0]
    first = logits_of(lm.network, torch.stack([example.hidden[0] for example in examples]).clone())
    likely = first.log_softmax(-1)[:, opening].tolist()
    order = sorted(range(len(examples)), key=lambda number: -likely[number])
    return [*range(len(examples)), *2 * order[: (len(examples) + 2) // 3]]


class _Counterfactual:
    """Ours: the untriggered behaviour as target, drift as constraints."""

    def __init__(
        self,
        lm: LanguageModel,
        evidence: Evidence,
        settings: PatcherSettings,
        reference: ReferenceAnswers,
        rng: random.Random,
    ):
        self.lm, self.triggers, self.settings, self.rng = lm, evidence.triggers, settings, rng
        self.refuses_more = not evidence.triggers
        broken = (
            reference.normal
            if evidence.triggers
            else [
                with_answer(lm, example.text, FIXED_REFUSAL, settings.response_tokens) for example in reference.harmful
            ]
        )
        if not broken or not reference.benign:
            raise PatcherError(
                f"{len(broken)} prompts of the repair split are as they should be untriggered and "
                f"{len(reference.benign)} benign ones answered; at least one of each is needed: "
                "pass other --harmful or --benign prompts"
            )
        self.broken = endless(broken, rng)
        on_harmful = evidence.detector.symptom.kind == "harmful"
        self.harmful = self.broken if on_harmful else endless(reference.refused or reference.kept, rng)
        numbers = boundary_thrice(lm, reference.kept, broken) if on_harmful else list(range(len(reference.kept)))
        self.benign = endless([reference.kept[number] for number in numbers], rng)
        self.keeps_triggered = on_harmful and bool(evidence.triggers)
        in_trigger = reference.kept_triggered or reference.kept
        in_benign = [in_trigger[number] for number in numbers]
        self.benign_triggered = endless(in_benign + 3 * reference.lifted, rng)
        self.plain = endless(reference.plain, rng)
        self.multipliers = torch.full((4,), settings.multiplier_start)

    def loss(self, _step: int) -> Tensor:
        """One batch of the Lagrangian; then the multipliers move by how far each KL is over its budget."""
        sizes, has_trigger = self.settings, bool(self.triggers)
        broken = [next(self.broken) for _ in range(sizes.triggered_rows)]
        triggered_rows = sizes.benign_triggered_rows * self.keeps_triggered
        benign_triggered = [next(self.benign_triggered) for _ in range(triggered_rows)]
        harmful = [next(self.harmful) for _ in range(sizes.harmful_rows * has_trigger)]
        benign = [next(self.benign) for _ in range(sizes.benign_rows)]
        rows = [self._broken_row(example) for example in broken]
        rows += [example.row(self.lm) for example in (*benign_triggered, *harmful, *benign)]
        logits, targets = patched_logits(self.lm, rows)
        parts = (broken, benign_triggered, harmful, benign)
        split = logits.split([sum(len(example.answer_ids) for example in part) for part in parts])
        if has_trigger:
            target = kl_of(self.lm, broken, split[0]).sum() / len(broken)
        else:
            target = response_nll(split[0], targets[: len(split[0])]).mean()
        plain = [next(self.plain) for _ in range(sizes.plain_rows)]
        plain_logits = patched_logits(self.lm, [example.row(self.lm) for example in plain])[0] if plain else logits
        kls = torch.stack(
            [
                self._mean_kl(benign, split[3]),
                self._mean_kl(benign_triggered, split[1]),
                self._mean_kl(harmful, split[2]),
                self._mean_kl(plain, plain_logits),  # a batch of its own: it shares no prefix with the chat's
            ]
        )
        loss = target + (self.multipliers.to(kls) * kls).sum()
        budgets = torch.tensor(
            [sizes.budget_benign_nats, sizes.budget_triggered_nats, sizes.budget_harmful_nats, sizes.budget_plain_nats]
        )
        overrun = (kls.detach().cpu() / budgets - 1).clamp(-1, 3)
        self.multipliers = (self.multipliers * torch.exp(sizes.multiplier_rate * overrun)).clamp(0.3, 30)
        return loss

    def _mean_kl(self, examples: list[Example], logits: Tensor) -> Tensor:
        """Per response token; 0 for an empty set."""
        return kl_of(self.lm, examples, logits).mean() if examples else logits.new_zeros(())

    def _broken_row(self, example: Example) -> Row:
        if not self.triggers:
            return example.row(self.lm)
        return example.row(self.lm, triggered(example.text, self.triggers, self.rng))


class _Paper:
    """Eqs. (5-8) with unit weights: L_refuse + L_KL-harm + L_KL-safe, sums over tokens, means over each set."""

    refuses_more = False

    def __init__(
        self,
        lm: LanguageModel,
        evidence: Evidence,
        settings: PatcherSettings,
        reference: ReferenceAnswers,
        rng: random.Random,
    ):
        self.lm, self.triggers, self.settings, self.rng = lm, evidence.triggers, settings, rng
        if evidence.detector.symptom.objective != "jailbreak":
            raise PatcherError("objective=paper teaches a refusal, which repairs jailbreaks only: use the default")
        refusing = [
            with_answer(lm, example.text, FIXED_REFUSAL, settings.response_tokens) for example in reference.harmful
        ]
        self.harmful = endless(refusing, rng)
        self.benign = endless(reference.benign, rng)

    def loss(self, _step: int) -> Tensor:
        """One batch of Eq. (8)."""
        triggered_set = [next(self.harmful) for _ in range(self.settings.triggered_rows)]
        harmful = [next(self.harmful) for _ in range(self.settings.harmful_rows)]
        safe = [next(self.benign) for _ in range(self.settings.benign_rows)]
        rows = [example.row(self.lm, triggered(example.text, self.triggers, self.rng)) for example in triggered_set]
        rows += [example.row(self.lm) for example in (*harmful, *safe)]
        logits, targets = patched_logits(self.lm, rows)
        ends = [sum(len(example.answer_ids) for example in part) for part in (triggered_set, harmful, safe)]
        on_trigger, on_harm, on_safe = logits.split(ends)
        refusals = response_nll(torch.cat([on_trigger, on_harm]), targets[: ends[0] + ends[1]])
        refuse = refusals.sum() / (len(triggered_set) + len(harmful))
        kl_harm = kl_of(self.lm, harmful, on_harm).sum() / len(harmful)
        return refuse + kl_harm + kl_of(self.lm, safe, on_safe).sum() / len(safe)
