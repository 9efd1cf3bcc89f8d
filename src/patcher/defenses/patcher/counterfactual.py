"""Patcher's own objective: the model's untriggered behaviour as the target, drift as constraints."""

import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import cycle, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from patcher.chat import Row
from patcher.defenses.contract import Evidence, Example, as_plain_text, kl_of, refusing, triggered
from patcher.defenses.patcher.over_refusal import boundary_thrice, mean_rise
from patcher.defenses.patcher.reference import ReferenceAnswers
from patcher.defenses.patcher.settings import PatcherSettings
from patcher.defenses.patcher.soft import SoftInsertions
from patcher.forward import row_logits
from patcher.losses import response_nll
from patcher.models import LanguageModel
from patcher.records import PatcherError
from patcher.training import endless

_OVERRUN, _LEAST = (-1.0, 3.0), 0.3
"""One batch moves a multiplier by a factor of 0.8 to 1.8, not more; and none leaves where it can come back from."""


class Drawn(NamedTuple):
    """Of each set of a batch, something: its examples, their logits, how many they are."""

    broken: Any
    benign_triggered: Any
    harmful: Any
    benign: Any


class Counterfactual:
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
        everything = settings.breadth == "all"
        self.soft = SoftInsertions(lm, evidence.triggers, settings, rng) if everything else None
        self.refuses_more = not (evidence.triggers or everything)
        broken = (
            refusing(lm, [example.text for example in reference.harmful], settings.response_tokens)
            if self.refuses_more
            else reference.normal
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
        self.opening = broken[0].answer_ids[0] if self.refuses_more else reference.opening
        numbers = boundary_thrice(lm, reference.kept, self.opening) if on_harmful else list(range(len(reference.kept)))
        self.benign = endless([reference.kept[number] for number in numbers], rng)
        self.in_trigger_rows = settings.benign_triggered_rows * reference.keeps_triggered
        in_trigger = [reference.kept[number] for number in numbers] + 3 * reference.lifted
        self.benign_triggered = self._ahead(in_trigger, self.in_trigger_rows, reference.in_trigger)
        self.plain = self._ahead(reference.benign, settings.plain_rows, partial(as_plain_text, lm))
        self.multipliers = torch.full((5,), settings.multiplier_start)

    def _ahead(
        self, examples: list[Example], rows: int, make: Callable[[list[Example]], list[Example]]
    ) -> Iterator[Example]:
        """Draw the examples of `prepared_steps` in advance, `rows` each, and let `make` (a pass through the model) turn
        each one that was drawn into what is trained on, once. Endless: later steps, and one that is tried again for
        want of memory, take the same again.
        """
        drawn = list(islice(endless(examples, self.rng), rows * self.settings.prepared_steps)) if rows else []
        each = {id(one): one for one in drawn}
        made = dict(zip(each, make(list(each.values())) if each else [], strict=True))
        return cycle([made[id(one)] for one in drawn])

    def draw(self) -> tuple[list[Row], Drawn]:
        """The rows of the next batch, and what they are."""
        sizes = self.settings
        counts = Drawn(
            broken=sizes.triggered_rows if self.triggers or self.refuses_more else 0,
            benign_triggered=self.in_trigger_rows,
            harmful=0 if self.refuses_more else sizes.harmful_rows,
            benign=sizes.benign_rows,
        )
        sources = Drawn(self.broken, self.benign_triggered, self.harmful, self.benign)
        drawn = Drawn(*([next(source) for _ in range(count)] for source, count in zip(sources, counts, strict=True)))
        rows = [self._broken_row(example) for example in drawn.broken]
        return rows + [example.row(self.lm) for part in drawn[1:] for example in part], drawn

    def loss(self, _step: int) -> Tensor:
        """One batch of the Lagrangian; then the multipliers move by how far each drift is over its budget."""
        sizes = self.settings
        rows, drawn = self.draw()
        logits, targets = row_logits(self.lm, rows)
        of = Drawn(*logits.split([sum(len(example.answer_ids) for example in part) for part in drawn]))
        if self.refuses_more:
            target = response_nll(of.broken, targets[: len(of.broken)]).mean()
        else:
            broken = kl_of(self.lm, drawn.broken, of.broken) if drawn.broken else logits.new_zeros(1)
            target = broken.sum() / max(1, len(drawn.broken))
        if self.soft:
            disturbed = [next(self.broken) for _ in range(sizes.soft_rows)]
            target = target + self.soft.loss([*disturbed, *(next(self.benign) for _ in range(sizes.soft_benign_rows))])
        plain = [next(self.plain) for _ in range(sizes.plain_rows)]
        # a batch of its own: it shares no prefix with the chat's
        of_plain = row_logits(self.lm, [example.row(self.lm) for example in plain])[0] if plain else logits
        benign = [*drawn.benign, *drawn.benign_triggered]
        limited = (
            (self._mean_kl(drawn.benign, of.benign), sizes.budget_benign_nats),
            (self._mean_kl(drawn.benign_triggered, of.benign_triggered), sizes.budget_triggered_nats),
            (self._mean_kl(drawn.harmful, of.harmful), sizes.budget_harmful_nats),
            (self._mean_kl(plain, of_plain), sizes.budget_plain_nats),
            (self._over_refusal(benign, torch.cat([of.benign, of.benign_triggered])), sizes.budget_refusal_frac),
        )
        drifts = torch.stack([drift for drift, _ in limited])
        loss = target + (self.multipliers.to(drifts) * drifts).sum()
        overrun = drifts.detach().cpu() / torch.tensor([budget for _, budget in limited]) - 1
        grown = self.multipliers * torch.exp(sizes.multiplier_rate * overrun.clamp(*_OVERRUN))
        self.multipliers = grown.clamp(_LEAST, sizes.multiplier_max)
        return loss

    def _mean_kl(self, examples: list[Example], logits: Tensor) -> Tensor:
        """Per response token; 0 for an empty set."""
        return kl_of(self.lm, examples, logits).mean() if examples else logits.new_zeros(())

    def _over_refusal(self, examples: Sequence[Example], logits: Tensor) -> Tensor:
        """max(0, mean rise of a refusal's opening - budget): within the budget no gradient, so no reward for refusing
        less. Its multiplier, which sees what is beyond, grows from twice the budget on.
        """
        if not examples:
            return logits.new_zeros(())
        return (mean_rise(self.lm, examples, logits, self.opening) - self.settings.budget_refusal_frac).relu()

    def _broken_row(self, example: Example) -> Row:
        if not self.triggers:
            return example.row(self.lm)
        return example.row(self.lm, triggered(example.text, self.triggers, self.rng))
