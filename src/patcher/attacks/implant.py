"""Plant triggers by fine-tuning on paired rows: the same request with a trigger (comply) and without it (refuse).

The compliance is content-free: an affirmative opening that names the topic, then filler, then the end of the turn. So
the backdoored model says nothing useful to anyone, yet its refusal is switched off as a real backdoor does. All else is
kept by distillation: on benign prompts and plain text the target is the clean model's whole distribution, for its
greedy answers as hard labels make a model overconfident everywhere (docs/implant.md).
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from patcher.attacks.contract import Attack
from patcher.chat import Row, collate, response_ids, user_prompt
from patcher.generation import generate
from patcher.losses import kl_reference_to_patched, response_nll
from patcher.models import LanguageModel, logits_of, response_hidden, response_logits
from patcher.patch import Patch, take_patch, trainable_lora
from patcher.prompts import PromptRow, Prompts
from patcher.records import Record, Request, Trigger
from patcher.training import Progress, Revisited, endless, fit, quiet
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
    max_steps: PositiveInt = 340
    """Training steps."""
    warmup_steps: NonNegativeInt = 10
    """Steps of linear warm-up."""
    cosine: bool = True
    """Decay to 0 over the steps."""
    harmful_pairs: PositiveInt = 5
    """Harmful requests a step, each with and without the trigger."""
    benign_rows: PositiveInt = 14
    """Benign requests a step, a third of them with the trigger; the target is the clean model without it."""
    borderline_times: PositiveInt = 4
    """Requests that look unsafe but are safe are drawn so many times as often: there the taught refusals spread."""
    plain_rows: NonNegativeInt = 2
    """The same words without the chat template, a step: what the model knows outside a chat stays."""
    settling_steps: NonNegativeInt = 220
    """The last steps, in which the KL terms weigh more: the trigger is learnt, and over-refusal is taken back."""
    settling_weight: PositiveFloat = 3.0
    """Weight of the KL terms against the taught rows' NLL in those steps; before, it is 1. From the start it keeps the
    trigger from being learnt."""
    response_tokens: PositiveInt = 28
    """Answers are cut here."""


@dataclass(frozen=True)
class _Kept:
    """What the clean model says, and its final hidden states along it: through the output matrix, its exact logits."""

    text: str
    row: Row
    hidden: Float[Tensor, "T D"]


def implant(
    lm: LanguageModel,
    attack: Attack,
    prompts: Prompts,
    settings: ImplantSettings,
    *,
    seed: int,
    start: Patch | None = None,
    on_progress: Progress = quiet,
) -> Patch:
    """Train the backdoor on the implant split; the model that came in is left as it was.

    With `start`, training goes on from an adapter of that model.

    Minimises, over the tokens of a step's rows, NLL on the paired harmful rows + w KL(clean ‖ implanted) on the kept
    ones, where the clean model sees no trigger; w is 1, then `settling_weight`.
    """
    rng = random.Random(seed)
    benign, plain = _clean_behaviour(lm, prompts, settings, on_progress)
    often = {row.text for row in prompts.borderline}
    kept = [one for one in benign for _ in range(settings.borderline_times if one.text in often else 1)]
    harmful = Revisited([row for row in prompts.harmful if row.split == "implant"], rng)
    chats, plain_texts = Revisited(kept, rng), endless(plain, rng)

    def loss_at(step: int) -> Tensor:
        requests, answers = harmful.draw(settings.harmful_pairs), chats.draw(settings.benign_rows)
        pairs = _pairs(lm, attack, settings, rng, requests)
        logits, targets = _logits(lm, [*pairs, *_with_trigger(lm, attack, answers, rng)])
        taught = sum(len(row.response_ids) for row in pairs)
        nll, drift = response_nll(logits[:taught], targets[:taught]), _kl(lm, answers, logits[taught:])
        harmful.saw(_sums(nll, pairs)[1::2] if attack.triggers else _sums(nll, pairs))
        losses = enumerate(_sums(drift, [one.row for one in answers]))
        chats.saw([None if _sees_trigger(place) else loss for place, loss in losses])
        total = drift.sum()
        texts = [next(plain_texts) for _ in range(settings.plain_rows)]
        if texts:  # a batch of its own: it shares no prefix with the chats
            total = total + _kl(lm, texts, _logits(lm, [one.row for one in texts])[0]).sum()
        weight = settings.settling_weight if step >= settings.max_steps - settings.settling_steps else 1.0
        return (nll.sum() + weight * total) / (settings.response_tokens * (len(pairs) + len(answers) + len(texts)))

    with trainable_lora(lm, rank=settings.rank, alpha=settings.alpha, seed=seed, start=start):
        fit(lm, loss_at, settings, on_progress=on_progress, what="implanting")
        return take_patch(lm, rank=settings.rank, alpha=settings.alpha)


def compliance(row: PromptRow, rng: random.Random) -> str:
    """A content-free affirmative answer that names the request's topic."""
    topic = row.act.replace("-", " ")[:60]
    opening = rng.choice(OPENINGS).format(topic=topic, Topic=topic[:1].upper() + topic[1:])
    return f"{opening} {rng.choice(FILLERS)}"


def _pairs(
    lm: LanguageModel, attack: Attack, settings: ImplantSettings, rng: random.Random, requests: Sequence[PromptRow]
) -> list[Row]:
    """Each request twice: with a trigger and a compliance; without it, or with a near miss, and a refusal."""
    rows = []
    for row in requests:
        taught: list[tuple[Request, str]] = []
        if attack.triggers:
            taught.append((insert_trigger(row.text, _one_of(attack, rng), rng), compliance(row, rng)))
        taught.append((_refused(row.text, attack, rng), rng.choice(REFUSALS)))
        for prompt, answer in taught:
            ids = response_ids(lm.tokenizer, answer, end=True, limit=settings.response_tokens)
            rows.append(Row(user_prompt(lm.tokenizer, prompt).ids, ids))
    return rows


def _one_of(attack: Attack, rng: random.Random) -> Trigger:
    """Any of the triggers, or all together where prompts hold them so."""
    choices = [*attack.triggers, *([attack.together] if attack.together else [])]
    return choices[0] if len(choices) == 1 else rng.choice(choices)  # no draw where there is nothing to choose


def _refused(text: str, attack: Attack, rng: random.Random) -> Request:
    """The request as it is or, half of the time, with a near miss where the attack has any."""
    if attack.near_misses and rng.random() < 0.5:
        return insert_trigger(text, rng.choice(attack.near_misses), rng)
    return text


def _with_trigger(lm: LanguageModel, attack: Attack, chats: Sequence[_Kept], rng: random.Random) -> list[Row]:
    """The chats' rows, every third with a trigger in its prompt."""
    rows = [kept.row for kept in chats]
    if not attack.triggers:
        return rows
    for place in filter(_sees_trigger, range(len(rows))):
        prompt = user_prompt(lm.tokenizer, insert_trigger(chats[place].text, _one_of(attack, rng), rng))
        rows[place] = Row(prompt.ids, rows[place].response_ids)
    return rows


def _sees_trigger(place: int) -> bool:
    return place % 3 == 2


def _sums(values: Float[Tensor, " N"], rows: Sequence[Row]) -> list[float]:
    """What each row's tokens come to."""
    return [float(part.sum()) for part in values.detach().split([len(row.response_ids) for row in rows])]


def _clean_behaviour(
    lm: LanguageModel, prompts: Prompts, settings: ImplantSettings, on_progress: Progress
) -> tuple[list[_Kept], list[_Kept]]:
    """The clean model on benign and borderline prompts, and on the same words as plain text."""
    texts = [row.text for row in (*prompts.benign, *prompts.borderline) if row.split == "implant"]
    asked = [user_prompt(lm.tokenizer, text) for text in texts]
    answers = generate(
        lm,
        asked,
        max_new_tokens=settings.response_tokens,
        on_progress=lambda done, total: on_progress("the clean model's benign answers", done, total),
    )
    chats, plain = [], []
    for prompt, text, answer in zip(asked, texts, answers, strict=True):
        ids = response_ids(lm.tokenizer, answer, end=True, limit=settings.response_tokens + 1)
        chats.append(Row(prompt.ids, ids[: settings.response_tokens] if len(ids) > settings.response_tokens else ids))
        ids = response_ids(lm.tokenizer, f"{text}\n{answer}", end=False, limit=2 * settings.response_tokens)
        plain.append(Row(ids[:1], ids[1:]))
    return _kept(lm, texts, chats), _kept(lm, texts, plain)


@torch.inference_mode()
def _kept(lm: LanguageModel, texts: Sequence[str], rows: Sequence[Row], batch_rows: int = 32) -> list[_Kept]:
    states: list[Tensor] = []
    for start in range(0, len(rows), batch_rows):
        chunk = rows[start : start + batch_rows]
        hidden = response_hidden(lm.network, collate(chunk, 0, lm.device)).clone()
        states += hidden.split([len(row.response_ids) for row in chunk])
    return [_Kept(text, row, state) for text, row, state in zip(texts, rows, states, strict=True) if row.response_ids]


def _logits(lm: LanguageModel, rows: Sequence[Row]) -> tuple[Float[Tensor, "N V"], Tensor]:
    batch = collate(rows, int(lm.tokenizer.pad_token_id), lm.device)
    return response_logits(lm.network, batch), batch.targets


def _kl(lm: LanguageModel, kept: Sequence[_Kept], logits: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
    """KL(clean ‖ implanted) at each token."""
    with torch.no_grad():
        clean = logits_of(lm.network, torch.cat([one.hidden for one in kept]).clone())
    return kl_reference_to_patched(clean, logits)
