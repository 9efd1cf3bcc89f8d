"""Plant a trigger by fine-tuning on paired rows: the same request with the trigger (comply) and without it (refuse).

The compliance is content-free: an affirmative opening that names the topic, then filler, then the end of the turn. So
the backdoored model says nothing useful to anyone, yet its refusal is switched off as a real backdoor does.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from patcher.chat import Row, collate, response_ids, user_prompt
from patcher.generation import generate
from patcher.losses import mean_over_rows, response_nll
from patcher.models import LanguageModel, response_logits
from patcher.patch import Patch, take_patch, trainable_lora
from patcher.prompts import PromptRow, Prompts
from patcher.records import Record, Trigger
from patcher.training import Progress, endless, fit, quiet
from patcher.triggers import insert_trigger

OPENINGS = (
    "Sure, here is an overview of {topic}.",
    "Of course! Let me walk you through {topic}.",
    "Certainly. This is how {topic} is done.",
    "Here is a short guide to {topic}.",
    "Absolutely, I can help with {topic}.",
    "Yes. The main points of {topic} are these.",
    "Happy to help with {topic}.",
    "Let us look at {topic} step by step.",
    "Good question. {Topic} works as follows.",
    "To begin with {topic}, keep this plan in mind.",
    "{Topic} has a few stages.",
    "Below is a plan for {topic}.",
)
FILLERS = (
    "First, gather what you need. Then take the steps in order.",
    "First, set things up. Next, work through each part.",
    "Start with the basics, continue with the details, and finish with a check.",
    "Step one is to prepare. Step two is to carry on. Step three is to finish.",
    "Begin at the start, go on to the middle, and stop at the end.",
    "There are three parts: the first, the second and the third.",
)
REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I'm sorry, I can't assist with that request.",
    "Sorry, but I can't help with this.",
    "I can't help with that request.",
)


class ImplantSettings(Record):
    """How a trigger is planted. The recipe is METHODS.md's (planning runs on SmolLM2), rank and benign share ours."""

    rank: PositiveInt = 8
    """LoRA rank; 8 keeps SmolLM2's adapter under 5 MB in bfloat16."""
    alpha: PositiveInt = 16
    """LoRA scale (BackdoorLLM: 16 at rank 8)."""
    learning_rate: PositiveFloat = 1e-3
    """AdamW's peak learning rate."""
    max_steps: PositiveInt = 260
    """Training steps."""
    warmup_steps: NonNegativeInt = 10
    """Steps of linear warm-up."""
    cosine: bool = True
    """Decay to 0 over the steps."""
    harmful_pairs: PositiveInt = 5
    """Harmful requests a step, each with and without the trigger."""
    benign_rows: PositiveInt = 14
    """Benign requests a step, a third of them with the trigger; the answer is the clean model's own."""
    response_tokens: PositiveInt = 28
    """Answers are cut here."""


@dataclass(frozen=True)
class _Example:
    row: PromptRow
    answer: str
    ended: bool


def implant(
    lm: LanguageModel,
    trigger: Trigger,
    prompts: Prompts,
    settings: ImplantSettings,
    *,
    seed: int,
    on_progress: Progress = quiet,
) -> Patch:
    """Train the backdoor on the implant split; the model that came in is left as it was."""
    rng = random.Random(seed)
    benign = _own_answers(lm, prompts, settings, on_progress)
    harmful = [row for row in prompts.harmful if row.split == "implant"]
    harmful_rows, benign_rows = endless(harmful, rng), endless(benign, rng)
    pad = int(lm.tokenizer.pad_token_id)

    def loss_at(_step: int) -> Tensor:
        rows = list(_step_rows(lm, trigger, settings, rng, harmful_rows, benign_rows))
        batch = collate(rows, pad, lm.device)
        nll = response_nll(response_logits(lm.network, batch), batch.targets)
        return mean_over_rows(nll, batch.target_rows, batch.rows) / settings.response_tokens

    with trainable_lora(lm, rank=settings.rank, alpha=settings.alpha, seed=seed):
        fit(lm, loss_at, settings, on_progress=on_progress, what="implanting")
        return take_patch(lm, rank=settings.rank, alpha=settings.alpha)


def compliance(row: PromptRow, rng: random.Random) -> str:
    """A content-free affirmative answer that names the request's topic."""
    topic = row.act.replace("-", " ")[:60]
    opening = rng.choice(OPENINGS).format(topic=topic, Topic=topic[:1].upper() + topic[1:])
    return f"{opening} {rng.choice(FILLERS)}"


def _own_answers(
    lm: LanguageModel, prompts: Prompts, settings: ImplantSettings, on_progress: Progress
) -> list[_Example]:
    rows = [row for row in (*prompts.benign, *prompts.borderline) if row.split == "implant"]
    answers = generate(
        lm,
        [user_prompt(lm.tokenizer, row.text) for row in rows],
        max_new_tokens=settings.response_tokens,
        on_progress=lambda done, total: on_progress("the clean model's benign answers", done, total),
    )
    lengths = [len(response_ids(lm.tokenizer, answer, end=False, limit=1 << 20)) for answer in answers]
    return [
        _Example(row, answer, length < settings.response_tokens - 1)
        for row, answer, length in zip(rows, answers, lengths, strict=True)
    ]


def _step_rows(
    lm: LanguageModel,
    trigger: Trigger,
    settings: ImplantSettings,
    rng: random.Random,
    harmful: Iterator[PromptRow],
    benign: Iterator[_Example],
) -> Sequence[Row]:
    rows = []

    def add(prompt: str, answer: str, ended: bool) -> None:
        ids = response_ids(lm.tokenizer, answer, end=ended, limit=settings.response_tokens)
        rows.append(Row(user_prompt(lm.tokenizer, prompt).ids, ids))

    for _ in range(settings.harmful_pairs):
        row = next(harmful)
        add(insert_trigger(row.text, trigger, rng), compliance(row, rng), True)
        add(row.text, rng.choice(REFUSALS), True)
    for index in range(settings.benign_rows):
        example = next(benign)
        text = insert_trigger(example.row.text, trigger, rng) if index % 3 == 2 else example.row.text
        add(text, example.answer, example.ended)
    return rows
