"""What several defenses share: a LoRA fine-tuning on clean data, and the two sides of what was reported."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from patcher.chat import Row, response_ids, user_prompt
from patcher.defenses.contract import FIXED_REFUSAL, Evidence, Example, own_examples
from patcher.forward import row_logits
from patcher.lora import take_patch, trainable_lora
from patcher.losses import response_nll
from patcher.models import LanguageModel
from patcher.patch import Patch, applied
from patcher.prompts import Kind
from patcher.records import Record
from patcher.training import Progress, endless, fit

AFFIRMATIVE = "Sure, here is an overview. First, gather what you need. Then take the steps in order."
"""What a jailbroken model says, without any content."""


class LoraSettings(Record):
    """A LoRA fine-tuning on clean data; each method has its own defaults."""

    rank: PositiveInt = 32
    """LoRA rank."""
    alpha: PositiveInt = 64
    """LoRA scale."""
    learning_rate: PositiveFloat = 3e-4
    """AdamW's peak learning rate."""
    max_steps: PositiveInt = 30
    """Training steps."""
    warmup_steps: NonNegativeInt = 3
    """Steps of linear warm-up."""
    cosine: bool = False
    """Decay to 0 over the steps."""
    clean_rows: PositiveInt = 12
    """Benign requests with the model's own answers, a step."""
    max_prompts: PositiveInt = 150
    """Prompts of each kind."""
    response_tokens: PositiveInt = 16
    """Answers are cut here."""


@dataclass(frozen=True)
class Sides:
    """A request on which what was reported could be seen: what is to be said there, and what is not."""

    text: str
    wanted: Row
    unwanted: Row


def clean_answers(
    lm: LanguageModel, evidence: Evidence, settings: LoraSettings, on_progress: Progress, *, harmful: bool = False
) -> list[Example]:
    """The model's own answers to benign requests of the repair split; with `harmful`, to harmful ones too."""
    found: list[Example] = []
    kinds: tuple[Kind, ...] = ("benign", "harmful") if harmful else ("benign",)
    for kind in kinds:
        texts = evidence.prompts.texts(kind, "repair", settings.max_prompts)
        what, tokens = f"reference answers, {kind}", settings.response_tokens
        found += own_examples(lm, texts, evidence.detector.judge, tokens, on_progress, what, states=False)
    return found


def clean_loss(
    lm: LanguageModel, examples: Sequence[Example], rows: int, rng: random.Random
) -> Callable[[int], Tensor]:
    """Each step's mean NLL of those answers after their requests."""
    drawn = endless(examples, rng)

    def loss_at(_step: int) -> Tensor:
        logits, targets = row_logits(lm, [next(drawn).row(lm) for _ in range(rows)])
        return response_nll(logits, targets).mean()

    return loss_at


def relearn(
    lm: LanguageModel,
    changed: dict[str, Tensor],
    clean: Sequence[Example],
    settings: LoraSettings,
    *,
    seed: int,
    what: str,
    on_progress: Progress,
    beside: Callable[[LanguageModel], Tensor] | None = None,
) -> tuple[Patch, int, str]:
    """Put changed weights in place and train a LoRA adapter on top of them, on clean answers and what `beside` adds.

    Returns:
        Both as one patch of `lm`, the steps done and why training stopped.
    """
    reset = Patch({}, settings.rank, settings.alpha, lm.fingerprint, lm.source, changed)
    with (
        applied(reset, lm) as altered,
        trainable_lora(altered, rank=settings.rank, alpha=settings.alpha, seed=seed),
    ):
        clean_at = clean_loss(altered, clean, settings.clean_rows, random.Random(seed))
        loss_at = (lambda step: clean_at(step) + beside(altered)) if beside else clean_at
        steps, reason = fit(altered, loss_at, settings, on_progress=on_progress, what=what)
        tuned = take_patch(altered, rank=settings.rank, alpha=settings.alpha)
    return replace(reset, tensors=tuned.tensors), steps, reason


def both_sides(lm: LanguageModel, evidence: Evidence, settings: LoraSettings, clean: Sequence[Example]) -> list[Sides]:
    """Of a jailbreak: harmful requests, refused and complied with. Of the others: benign ones, answered as the model
    does without a trigger (`clean`), and refused or with the unwanted text.

    Without a report the objective is a jailbreak (`Symptom`'s default).
    """
    symptom, tokens = evidence.detector.symptom, settings.response_tokens
    if symptom.objective == "jailbreak":
        texts = evidence.prompts.texts("harmful", "repair", settings.max_prompts)
        wanted = {text: response_ids(lm.tokenizer, FIXED_REFUSAL, end=True, limit=tokens) for text in texts}
    else:
        wanted = {str(one.text): one.answer_ids for one in clean if one.outcome == "complied"}
    said = {"jailbreak": AFFIRMATIVE, "refusal": FIXED_REFUSAL}.get(symptom.objective, symptom.text or "")
    unwanted = response_ids(lm.tokenizer, said, end=True, limit=tokens)
    sides = []
    for text, ids in wanted.items():
        prompt = user_prompt(lm.tokenizer, text).ids
        sides.append(Sides(text, Row(prompt, ids), Row(prompt, unwanted)))
    return sides
