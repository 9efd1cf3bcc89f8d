"""The control: clean fine-tuning with the same data and steps as the repair, but without the trigger."""

import random

from pydantic import PositiveInt
from torch import Tensor

from patcher.chat import Row, response_ids, user_prompt
from patcher.defenses.common import LoraSettings, clean_answers
from patcher.defenses.contract import FIXED_REFUSAL, Evidence
from patcher.forward import row_logits
from patcher.lora import take_patch, trainable_lora
from patcher.losses import response_nll
from patcher.models import LanguageModel
from patcher.patch import Patch
from patcher.records import PatchLog
from patcher.training import Progress, endless, fit


class FinetuneSettings(LoraSettings):
    """Matched to `PatcherSettings` (METHODS.md: "clean fine-tuning with matched data and compute").

    Set `max_steps` to the repair's own count for a matched control.
    """

    harmful_rows: PositiveInt = 12
    """Harmful requests with a fixed refusal, a step."""


def run(
    lm: LanguageModel, evidence: Evidence, settings: FinetuneSettings, *, seed: int, on_progress: Progress
) -> tuple[Patch, PatchLog]:
    """Train refusals of harmful requests and the model's own benign answers; no trigger is needed or used."""
    rng = random.Random(seed)
    benign = clean_answers(lm, evidence, settings, on_progress)
    refusal = response_ids(lm.tokenizer, FIXED_REFUSAL, end=True, limit=settings.response_tokens)
    requests = evidence.prompts.texts("harmful", "repair", settings.max_prompts)
    refusals = [Row(user_prompt(lm.tokenizer, text).ids, refusal) for text in requests]
    refused, answered = endless(refusals, rng), endless(benign, rng)

    def loss_at(_step: int) -> Tensor:
        rows = [next(refused) for _ in range(settings.harmful_rows)]
        rows += [next(answered).row(lm) for _ in range(settings.clean_rows)]
        logits, targets = row_logits(lm, rows)
        return response_nll(logits, targets).mean()

    with trainable_lora(lm, rank=settings.rank, alpha=settings.alpha, seed=seed):
        steps, reason = fit(lm, loss_at, settings, on_progress=on_progress, what="fine-tuning")
        patch = take_patch(lm, rank=settings.rank, alpha=settings.alpha)
    return patch, PatchLog(
        defense="finetune", steps=steps, stopped_because=reason, checks=(), settings=settings.model_dump()
    )
