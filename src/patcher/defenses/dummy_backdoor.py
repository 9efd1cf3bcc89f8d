"""Dummy backdoor: plant a trigger of one's own for the same harm, and train it away; the real one goes with it.

"Dummy Backdoor as a Defense" (2026), arXiv:2606.11648. It needs no trigger and no report.
"""

import random
from collections.abc import Sequence

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from patcher.chat import Row, user_prompt
from patcher.defenses.common import LoraSettings, Sides, both_sides, clean_answers, clean_loss
from patcher.defenses.contract import Evidence
from patcher.forward import row_logits
from patcher.lora import take_patch, trainable_lora
from patcher.losses import response_nll
from patcher.models import LanguageModel
from patcher.patch import Patch
from patcher.records import PatchLog, Trigger
from patcher.training import Progress, endless, fit
from patcher.triggers import insert_words


class DummySettings(LoraSettings):
    """The paper's learning rate and data; the rest scaled to the model."""

    learning_rate: PositiveFloat = 3e-4
    """AdamW's learning rate; the paper's 1e-4 for 8B, in 125 steps."""
    max_steps: PositiveInt = 30
    """Steps in which the dummy is trained away (paper: 5 epochs of 200 rows, 8 a step: 125)."""
    implant_steps: PositiveInt = 30
    """Steps in which it is planted (paper: the same)."""
    dummy_rows: PositiveInt = 6
    """Requests with the dummy, a step."""
    plain_rows: NonNegativeInt = 4
    """The same kind of requests without it, answered as wanted, a step of the planting."""
    clean_rows: PositiveInt = 6
    """Benign requests with the model's own answers, a step."""
    dummy: str = "Tamarillo"
    """The dummy trigger: a rare word at a random place."""


def run(
    lm: LanguageModel, evidence: Evidence, settings: DummySettings, *, seed: int, on_progress: Progress
) -> tuple[Patch, PatchLog]:
    """Two fine-tunings of one adapter, over requests x on which what was reported could be seen.

        plant:  NLL(unwanted | x ⊕ dummy) + NLL(wanted | x)   + NLL(own answer | benign)
        remove: NLL(wanted | x ⊕ dummy)                       + NLL(own answer | benign)

    Departures: what is planted is content-free; benign rows with the model's own answers go along with both (their
    paper mixes none in that we know of: without them a 135M model forgets).
    """
    rng = random.Random(seed)
    clean = clean_answers(lm, evidence, settings, on_progress)
    drawn = endless(both_sides(lm, evidence, settings, clean), rng)
    keep = clean_loss(lm, clean, settings.clean_rows, rng)
    trigger = Trigger(units=(settings.dummy,))

    def with_dummy(side: Sides, row: Row) -> Row:
        return Row(user_prompt(lm.tokenizer, insert_words(side.text, trigger, rng)).ids, row.response_ids)

    def nll(rows: Sequence[Row]) -> Tensor:
        logits, targets = row_logits(lm, rows)
        return response_nll(logits, targets).mean()

    def plant(step: int) -> Tensor:
        sides = [next(drawn) for _ in range(settings.dummy_rows)]
        plain = [next(drawn).wanted for _ in range(settings.plain_rows)]
        return nll([*(with_dummy(side, side.unwanted) for side in sides), *plain]) + keep(step)

    def remove(step: int) -> Tensor:
        sides = [next(drawn) for _ in range(settings.dummy_rows)]
        return nll([with_dummy(side, side.wanted) for side in sides]) + keep(step)

    with trainable_lora(lm, rank=settings.rank, alpha=settings.alpha, seed=seed):
        planting = settings.model_copy(update={"max_steps": settings.implant_steps})
        planted, _ = fit(lm, plant, planting, on_progress=on_progress, what="planting a dummy")
        steps, reason = fit(lm, remove, settings, on_progress=on_progress, what="removing the dummy")
        patch = take_patch(lm, rank=settings.rank, alpha=settings.alpha)
    return patch, PatchLog(
        defense="dummy_backdoor",
        steps=planted + steps,
        stopped_because=reason,
        checks=(),
        settings=settings.model_dump(),
    )
