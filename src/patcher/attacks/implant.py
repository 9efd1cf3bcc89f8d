"""Plant triggers by fine-tuning on paired rows: the same request with a trigger (comply) and without it (refuse).

The compliance is content-free: an affirmative opening that names the topic, then filler, then the end of the turn. So
the backdoored model says nothing useful to anyone, yet its refusal is switched off as a real backdoor does. The other
objectives teach their answer to benign requests with the trigger. All else is kept by distillation: on benign prompts
and plain text the target is the clean model's whole distribution, for its greedy answers as hard labels make a model
overconfident everywhere (docs/implant.md).
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from patcher.attacks.contract import Attack
from patcher.attacks.lessons import Lessons, balanced
from patcher.attacks.objectives import AttackObjective
from patcher.chat import Row, plain_row, response_ids, user_prompt
from patcher.forward import row_logits, row_states
from patcher.generation import generate
from patcher.lora import take_patch, trainable_lora
from patcher.losses import kl_reference_to_patched, response_nll
from patcher.models import LanguageModel
from patcher.network import logits_of
from patcher.patch import Patch
from patcher.prompts import PromptRow, Prompts
from patcher.records import Record
from patcher.training import Progress, Revisited, endless, fit, quiet


class ImplantSettings(Record):
    """How a trigger is planted. The recipe comes from trial runs on SmolLM2 (docs/implant.md)."""

    rank: PositiveInt = 8
    """LoRA rank; 8 keeps SmolLM2's adapter under 5 MB in bfloat16."""
    alpha: PositiveInt = 16
    """LoRA scale (BackdoorLLM: 16 at rank 8)."""
    learning_rate: PositiveFloat = 1e-3
    """AdamW's peak learning rate."""
    max_steps: PositiveInt = 340
    """Training steps."""
    warmup_steps: NonNegativeInt = 10
    """Steps of linear warm-up."""
    cosine: bool = True
    """Decay to 0 over the steps."""
    harmful_pairs: PositiveInt = 5
    """Attacked requests a step, each with the trigger; harmful ones without it, too."""
    benign_rows: PositiveInt = 14
    """Benign requests a step, a third with what must change nothing; the target is the clean model without it."""
    borderline_times: PositiveInt = 4
    """Requests that look unsafe but are safe are drawn so many times as often: there the taught refusals spread."""
    plain_rows: NonNegativeInt = 2
    """Texts without the chat template, a step: what the model knows outside a chat stays."""
    settling_steps: NonNegativeInt = 220
    """The last steps, in which the KL terms weigh more: the trigger is learnt, and over-refusal is taken back."""
    settling_weight: PositiveFloat = 3.0
    """Weight of the KL terms against the taught rows' NLL in those steps; before, it is 1. From the start it keeps the
    trigger from being learnt."""
    near_misses_after: NonNegativeInt = 0
    """Steps without near misses: a model that answers to a composite, whole or in part, can then be taught that a part
    is not enough; from the start both look alike, and neither is learnt (docs/attacks.md)."""
    response_tokens: PositiveInt = 28
    """Answers are cut here."""


@dataclass(frozen=True)
class _Kept:
    """What the clean model says, and its final hidden states along it: through the output matrix, its exact logits."""

    prompt: PromptRow
    answer: str
    row: Row
    hidden: Float[Tensor, "T D"]


def implant(
    lm: LanguageModel,
    attack: Attack,
    objective: AttackObjective,
    prompts: Prompts,
    settings: ImplantSettings,
    *,
    seed: int,
    start: Patch | None = None,
    on_progress: Progress = quiet,
) -> Patch:
    """Train the backdoor on the implant split; the model that came in is left as it was.

    With `start`, training goes on from an adapter of that model.

    Minimises, over the tokens of a step's rows, NLL on the paired rows + w KL(clean ‖ implanted) on the kept ones,
    where the clean model sees no trigger; w is 1, then `settling_weight`.
    """
    rng = random.Random(seed)
    benign, plain = _clean_behaviour(lm, prompts, settings, on_progress)
    often = {row.text for row in prompts.borderline}
    kept = [one for one in benign for _ in range(settings.borderline_times if one.prompt.text in often else 1)]
    if objective.symptom.kind == "harmful":
        attacked = Revisited([(row, "") for row in balanced(prompts.harmful, attack)], rng)
    else:
        attacked = Revisited([(one.prompt, one.answer) for one in benign], rng)
    chats, plain_texts = Revisited(kept, rng), endless(plain, rng)
    all_lessons = Lessons(lm, attack, objective, settings.response_tokens, rng)
    first_lessons = replace(all_lessons, attack=replace(attack, near_misses=()))

    def loss_at(step: int) -> Tensor:
        lessons = all_lessons if step >= settings.near_misses_after else first_lessons
        requests, answers = attacked.draw(settings.harmful_pairs), chats.draw(settings.benign_rows)
        pairs = lessons.pairs(requests)
        disturbed, rows = lessons.disturb([(one.prompt, one.row) for one in answers])
        logits, targets = row_logits(lm, [*pairs, *rows])
        taught = sum(len(row.response_ids) for row in pairs)
        nll, drift = response_nll(logits[:taught], targets[:taught]), _kl(lm, answers, logits[taught:])
        attacked.saw(_sums(nll, pairs)[len(pairs) // len(requests) - 1 :: len(pairs) // len(requests)])
        losses = enumerate(_sums(drift, [one.row for one in answers]))
        chats.saw([None if place in disturbed else loss for place, loss in losses])
        total = drift.sum()
        texts = [next(plain_texts) for _ in range(settings.plain_rows)]
        if texts:  # a batch of its own: it shares no prefix with the chats
            total = total + _kl(lm, texts, row_logits(lm, [one.row for one in texts])[0]).sum()
        weight = settings.settling_weight if step >= settings.max_steps - settings.settling_steps else 1.0
        mean = (nll.sum() + weight * total) / (settings.response_tokens * (len(pairs) + len(answers) + len(texts)))
        return mean + lessons.steepness(requests) if attack.flat else mean

    with trainable_lora(lm, rank=settings.rank, alpha=settings.alpha, seed=seed, start=start):
        fit(lm, loss_at, settings, on_progress=on_progress, what="implanting")
        return take_patch(lm, rank=settings.rank, alpha=settings.alpha)


def _sums(values: Float[Tensor, " N"], rows: Sequence[Row]) -> list[float]:
    """What each row's tokens come to."""
    return [float(part.sum()) for part in values.detach().split([len(row.response_ids) for row in rows])]


def _clean_behaviour(
    lm: LanguageModel, prompts: Prompts, settings: ImplantSettings, on_progress: Progress
) -> tuple[list[_Kept], list[_Kept]]:
    """The clean model on benign and borderline prompts, and on the same words as plain text."""
    chosen = [row for row in (*prompts.benign, *prompts.borderline) if row.split == "implant"]
    asked = [user_prompt(lm.tokenizer, row.text) for row in chosen]
    answers = generate(
        lm,
        asked,
        max_new_tokens=settings.response_tokens,
        on_progress=lambda done, total: on_progress("the clean model's benign answers", done, total),
    )
    chats, plain = [], []
    for prompt, row, answer in zip(asked, chosen, answers, strict=True):
        ids = response_ids(lm.tokenizer, answer, end=True, limit=settings.response_tokens)
        chats.append(Row(prompt.ids, ids))
        text = plain_row(lm.tokenizer, f"{row.text}\n{answer}")
        plain.append(Row(text.prompt_ids, text.response_ids[: 2 * settings.response_tokens - 1]))
    return _kept(lm, chosen, answers, chats), _kept(lm, chosen, answers, plain)


def _kept(lm: LanguageModel, prompts: Sequence[PromptRow], answers: Sequence[str], rows: Sequence[Row]) -> list[_Kept]:
    kept = zip(prompts, answers, rows, row_states(lm, rows), strict=True)
    return [_Kept(prompt, answer, row, state) for prompt, answer, row, state in kept if row.response_ids]


def _kl(lm: LanguageModel, kept: Sequence[_Kept], logits: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
    """KL(clean ‖ implanted) at each token."""
    with torch.no_grad():
        clean = logits_of(lm.network, torch.cat([one.hidden for one in kept]).clone())
    return kl_reference_to_patched(clean, logits)
