"""The control: clean fine-tuning with the repair's data, rank and rate, but without the trigger."""

import random

from pydantic import PositiveInt
from torch import Tensor

from patcher.chat import Row, response_ids, user_prompt
from patcher.defenses.common import LoraSettings, clean_answers, tune
from patcher.defenses.contract import Evidence, Trained
from patcher.forward import row_logits
from patcher.losses import response_nll
from patcher.models import LanguageModel
from patcher.training import Progress, endless
from patcher.wordings import FIXED_REFUSAL


class FinetuneSettings(LoraSettings):
    """Matched to `PatcherSettings`.

    Set `max_steps` to the repair's own count for a matched control.
    """

    harmful_rows: PositiveInt = 12
    """Harmful requests with a fixed refusal, a step."""

    @property
    def sequences(self) -> int:
        """At most, in training."""
        return super().sequences + self.max_steps * self.harmful_rows


def run(
    lm: LanguageModel, evidence: Evidence, settings: FinetuneSettings, *, seed: int, on_progress: Progress
) -> Trained:
    """Train refusals of harmful requests, where those are what a trigger gets answered, and the model's own benign
    answers; no trigger is needed or used.
    """
    rng = random.Random(seed)
    benign = clean_answers(lm, evidence, settings, on_progress)
    refusal = response_ids(lm.tokenizer, FIXED_REFUSAL, end=True, limit=settings.response_tokens)
    requests = evidence.prompts.texts("harmful", "repair", settings.max_prompts)
    refusals = [Row(user_prompt(lm.tokenizer, text).ids, refusal) for text in requests]
    own = endless([example.row(lm) for example in benign], rng)
    refused = endless(refusals, rng) if evidence.detector.symptom.kind == "harmful" else own

    def loss_at(_step: int) -> Tensor:
        rows = [next(refused) for _ in range(settings.harmful_rows)]
        rows += [next(own) for _ in range(settings.clean_rows)]
        logits, targets = row_logits(lm, rows)
        return response_nll(logits, targets).mean()

    return tune(lm, loss_at, settings, seed=seed, what="fine-tuning", on_progress=on_progress)
