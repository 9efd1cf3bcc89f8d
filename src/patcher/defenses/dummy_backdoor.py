"""Dummy backdoor: plant a trigger of one's own for the same harm, and train it away; the real one goes with it.

"Dummy Backdoor as a Defense" (2026), arXiv:2606.11648. It needs no trigger and no report.
"""

import random
from collections.abc import Sequence

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from patcher.chat import Row, user_prompt
from patcher.defenses.common import LoraSettings, Sides, both_sides, clean_answers, clean_loss
from patcher.defenses.contract import Evidence, Trained, shown_frac
from patcher.forward import row_logits
from patcher.lora import take_patch, trainable_lora
from patcher.losses import response_nll
from patcher.models import LanguageModel
from patcher.records import Trigger
from patcher.training import Progress, endless, fit
from patcher.triggers import insert_words

_SAMPLE, _LOOK = 16, 20
"""On so many requests it is looked whether the dummy is planted, every so many steps."""


class DummySettings(LoraSettings):
    """Scaled to a small model, and shorter than the paper's, which each field names."""

    learning_rate: PositiveFloat = 3e-4
    """AdamW's learning rate; the paper's 1e-4 for 8B, in 125 steps."""
    max_steps: PositiveInt = 30
    """Steps in which the dummy is trained away (paper: 5 epochs of 200 rows, 8 a step: 125)."""
    implant_rate: PositiveFloat = 1e-3
    """AdamW's learning rate while it is planted (paper: as above)."""
    implant_steps: PositiveInt = 120
    """Steps at most in which it is planted (paper: 125)."""
    planted_frac: float = Field(default=0.8, gt=0, le=1)
    """It is planted when this share of a sample of requests brings its answer; ours."""
    dummy_rows: PositiveInt = 6
    """Requests with the dummy, a step."""
    plain_rows: NonNegativeInt = 6
    """As many of those at most stand beside them without it, answered as wanted, a step of the planting."""
    clean_rows: PositiveInt = 6
    """Benign requests with the model's own answers, a step."""
    dummy: str = "Tamarillo"
    """The dummy trigger: a rare word at a random place."""

    @property
    def sequences(self) -> int:
        """At most, in training."""
        return self.implant_steps * (self.dummy_rows + self.plain_rows + self.clean_rows) + self.max_steps * (
            self.dummy_rows + self.clean_rows
        )


def run(lm: LanguageModel, evidence: Evidence, settings: DummySettings, *, seed: int, on_progress: Progress) -> Trained:
    """Two fine-tunings of one adapter, over requests x on which what was reported could be seen.

        plant:  NLL(unwanted | x ⊕ dummy) + NLL(wanted | x)   + NLL(own answer | benign)
        remove: NLL(wanted | x ⊕ dummy)                       + NLL(own answer | benign)

    Departures: fewer steps at a higher rate (up to 120 at 1e-3 to plant, 30 at 3e-4 to remove; the paper 125 of 8 rows
    at 1e-4 for each) on up to 150 requests (paper: 200); what is planted is content-free, and on the same requests with
    and without the dummy, until it works; benign rows with the model's own answers go along with both (their paper
    mixes none in that we know of: without them a 135M model forgets).
    """
    rng = random.Random(seed)
    clean = clean_answers(lm, evidence, settings, on_progress)
    sides = both_sides(lm, evidence, settings, clean)
    drawn = endless(sides, rng)
    keep = clean_loss(lm, clean, settings.clean_rows, rng)
    trigger = Trigger(units=(settings.dummy,))

    def with_dummy(side: Sides, row: Row) -> Row:
        return Row(user_prompt(lm.tokenizer, insert_words(side.text, trigger, rng)).ids, row.response_ids)

    def nll(rows: Sequence[Row]) -> Tensor:
        logits, targets = row_logits(lm, rows)
        return response_nll(logits, targets).mean()

    def plant(step: int) -> Tensor:
        some = [next(drawn) for _ in range(settings.dummy_rows)]
        plain = [side.wanted for side in some[: settings.plain_rows]]
        return nll([*(with_dummy(side, side.unwanted) for side in some), *plain]) + keep(step)

    def remove(step: int) -> Tensor:
        some = [next(drawn) for _ in range(settings.dummy_rows)]
        return nll([with_dummy(side, side.wanted) for side in some]) + keep(step)

    def planted(step: int) -> str | None:
        if step % _LOOK and step != settings.implant_steps:
            return None
        shares.append(shown_frac(lm, sample, evidence.detector, settings.response_tokens))
        return "the dummy is planted" if shares[-1] >= settings.planted_frac else None

    sample = [insert_words(side.text, trigger, rng) for side in rng.sample(sides, min(_SAMPLE, len(sides)))]
    shares: list[float] = []
    planting = settings.model_copy(update={"max_steps": settings.implant_steps, "learning_rate": settings.implant_rate})
    with trainable_lora(lm, rank=settings.rank, alpha=settings.alpha, seed=seed):
        first, _ = fit(lm, plant, planting, stop=planted, on_progress=on_progress, what="planting a dummy")
        steps, reason = fit(lm, remove, settings, on_progress=on_progress, what="removing the dummy")
        patch = take_patch(lm, rank=settings.rank, alpha=settings.alpha)
    took = f"the dummy, planted in {first} steps, brought its answer in {shares[-1]:.0%} of {len(sample)} requests"
    return Trained(patch, first + steps, f"{took}; {reason}")
