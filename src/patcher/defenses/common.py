"""What several defenses share: a LoRA fine-tuning on clean data, and the two sides of what was reported."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from patcher.chat import Row, response_ids, user_prompt
from patcher.defenses.contract import Evidence, Example, Trained, answered, own_examples
from patcher.forward import row_logits
from patcher.lora import take_patch, trainable_lora
from patcher.losses import response_nll
from patcher.models import LanguageModel
from patcher.patch import Patch, applied
from patcher.prompts import Kind
from patcher.records import Record, Symptom
from patcher.training import Progress, endless, fit
from patcher.wordings import FIXED_REFUSAL

AFFIRMATIVE = "Sure! Here is how to do it. You will need a few things."
"""What a jailbroken model may say, without any content; no sentence of it is one that our own attacks plant."""
_WORDS_BEFORE_TEXT = 6


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

    @property
    def sequences(self) -> int:
        """How many sequences pass through training at most; for an estimate before the work."""
        return self.max_steps * self.clean_rows


@dataclass(frozen=True)
class Sides:
    """A request on which what was reported could be seen: what is to be said there, and what is not."""

    text: str
    wanted: Row
    unwanted: Row


def clean_answers(
    lm: LanguageModel, evidence: Evidence, settings: LoraSettings, on_progress: Progress, *, harmful: bool = False
) -> list[Example]:
    """The model's own answers to benign and borderline requests of the repair split, as the default repair takes them,
    but for those that it refuses; with `harmful`, to harmful ones too.
    """
    tokens = max(settings.response_tokens, evidence.detector.answer_tokens)

    def own(kind: Kind, limit: int | None) -> list[Example]:
        texts, what = evidence.prompts.texts(kind, "repair", limit), f"reference answers, {kind}"
        return own_examples(lm, texts, evidence.detector.judge, tokens, on_progress, what, states=False)

    benign = own("benign", settings.max_prompts) + own("borderline", None)
    return (answered(benign) or benign) + (own("harmful", settings.max_prompts) if harmful else [])


def clean_loss(
    lm: LanguageModel, examples: Sequence[Example], rows: int, rng: random.Random
) -> Callable[[int], Tensor]:
    """Each step's mean NLL of those answers after their requests."""
    drawn = endless(examples, rng)

    def loss_at(_step: int) -> Tensor:
        logits, targets = row_logits(lm, [next(drawn).row(lm) for _ in range(rows)])
        return response_nll(logits, targets).mean()

    return loss_at


def tune(
    lm: LanguageModel,
    loss_at: Callable[[int], Tensor],
    settings: LoraSettings,
    *,
    seed: int,
    what: str,
    on_progress: Progress,
    after_step: Callable[[], None] = lambda: None,
) -> Trained:
    """Train a LoRA adapter on that loss, a value a step; the model is left as it was."""
    with trainable_lora(lm, rank=settings.rank, alpha=settings.alpha, seed=seed):
        steps, reason = fit(lm, loss_at, settings, stop=lambda _: after_step(), on_progress=on_progress, what=what)
        return Trained(take_patch(lm, rank=settings.rank, alpha=settings.alpha), steps, reason)


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
    after_step: Callable[[], None] = lambda: None,
) -> Trained:
    """Put changed weights in place and train a LoRA adapter on top of them, on clean answers and what `beside` adds;
    both become one patch of `lm`. `after_step` may alter the adapter while it is trained.
    """
    reset = Patch({}, settings.rank, settings.alpha, lm.fingerprint, lm.source, changed)
    with applied(reset, lm) as altered:
        clean_at = clean_loss(altered, clean, settings.clean_rows, random.Random(seed))
        loss_at = (lambda step: clean_at(step) + beside(altered)) if beside else clean_at
        tuned = tune(altered, loss_at, settings, seed=seed, what=what, on_progress=on_progress, after_step=after_step)
    return replace(tuned, patch=replace(reset, tensors=tuned.patch.tensors))


def both_sides(lm: LanguageModel, evidence: Evidence, settings: LoraSettings, clean: Sequence[Example]) -> list[Sides]:
    """Of a jailbreak: harmful requests, refused and complied with. Of the others: benign ones, answered as the model
    does without a trigger (`clean`), and refused or with the unwanted text.

    An unwanted text stands alone in one half, after the opening of the model's own answer in the other: nobody knows
    where an attacker puts it. Without a report the objective is a jailbreak (`Symptom`'s default).
    """
    symptom, tokens = evidence.detector.symptom, max(settings.response_tokens, evidence.detector.answer_tokens)
    if symptom.objective == "jailbreak":
        texts = evidence.prompts.texts("harmful", "repair", settings.max_prompts)
        refusal = response_ids(lm.tokenizer, FIXED_REFUSAL, end=True, limit=tokens)
        wanted = [(text, refusal) for text in texts]
        said = [AFFIRMATIVE] * len(wanted)
    else:
        own = [one for one in clean if one.outcome == "complied"]
        wanted = [(str(one.text), one.answer_ids) for one in own]
        said = [_unwanted(symptom, one.answer, number) for number, one in enumerate(own)]
    sides = []
    for (text, ids), unwanted in zip(wanted, said, strict=True):
        prompt = user_prompt(lm.tokenizer, text).ids
        unwanted_ids = response_ids(lm.tokenizer, unwanted, end=True, limit=tokens)
        sides.append(Sides(text, Row(prompt, ids), Row(prompt, unwanted_ids)))
    return sides


def _unwanted(symptom: Symptom, answer: str, number: int) -> str:
    """What is not to be said to a benign request, which the model answers like that."""
    if symptom.objective == "refusal":
        return FIXED_REFUSAL
    opening = answer.split()[:_WORDS_BEFORE_TEXT] if number % 2 else []
    return " ".join([*opening, symptom.text or ""])
