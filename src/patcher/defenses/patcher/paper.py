"""The paper's objective, Gao et al. (2026), arXiv:2606.02995, Eqs. (5-8)."""

import random

import torch
from torch import Tensor

from patcher.chat import Row
from patcher.defenses.contract import Evidence, Example, kl_of, refusing, triggered
from patcher.defenses.patcher.reference import ReferenceAnswers
from patcher.defenses.patcher.settings import PatcherSettings
from patcher.forward import row_logits
from patcher.losses import response_nll
from patcher.models import LanguageModel
from patcher.records import PatcherError
from patcher.training import endless


class Paper:
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
        texts = [example.text for example in reference.harmful]
        self.harmful = endless(refusing(lm, texts, settings.response_tokens), rng)
        self.benign = endless(reference.benign, rng)

    def draw(self) -> tuple[list[Row], tuple[list[Example], list[Example], list[Example]]]:
        """The rows of the next batch, and its three sets: harmful with the trigger, harmful, benign."""
        triggered_set = [next(self.harmful) for _ in range(self.settings.triggered_rows)]
        harmful = [next(self.harmful) for _ in range(self.settings.harmful_rows)]
        safe = [next(self.benign) for _ in range(self.settings.benign_rows)]
        rows = [example.row(self.lm, triggered(example.text, self.triggers, self.rng)) for example in triggered_set]
        return rows + [example.row(self.lm) for example in (*harmful, *safe)], (triggered_set, harmful, safe)

    def loss(self, _step: int) -> Tensor:
        """One batch of Eq. (8)."""
        rows, (triggered_set, harmful, safe) = self.draw()
        logits, targets = row_logits(self.lm, rows)
        ends = [sum(len(example.answer_ids) for example in part) for part in (triggered_set, harmful, safe)]
        on_trigger, on_harm, on_safe = logits.split(ends)
        refusals = response_nll(torch.cat([on_trigger, on_harm]), targets[: ends[0] + ends[1]])
        refuse = refusals.sum() / (len(triggered_set) + len(harmful))
        kl_harm = kl_of(self.lm, harmful, on_harm).sum() / len(harmful)
        return refuse + kl_harm + kl_of(self.lm, safe, on_safe).sum() / len(safe)
