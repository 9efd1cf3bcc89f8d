"""What every defense is given, and the pieces that more than one of them is made of."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from patcher.chat import Row, plain_row, response_ids, user_prompt
from patcher.forward import BATCH_ROWS, row_logits, row_states
from patcher.generation import generate
from patcher.losses import kl_reference_to_patched
from patcher.memory import chunked
from patcher.models import LanguageModel
from patcher.network import logits_of
from patcher.patch import Patch
from patcher.prompts import Prompts
from patcher.records import Outcome, PatcherError, PatchLog, PatchStep, Record, Request, Trigger, with_changes
from patcher.symptoms import Detector
from patcher.training import Progress, quiet
from patcher.triggers import insert_trigger
from patcher.wordings import FIXED_REFUSAL

_HALF = "\ufffd"
"""What a character becomes when an answer is cut within its tokens."""


@dataclass(frozen=True)
class Evidence:
    """What an honest defender has. `triggers` were found from the report; there are none without one."""

    triggers: tuple[Trigger, ...]
    prompts: Prompts
    detector: Detector
    """Sees in an answer what was reported."""


@dataclass(frozen=True)
class Trained:
    """What a method gives back: its patch, and how training went."""

    patch: Patch
    steps: int
    stopped_because: str
    checks: tuple[PatchStep, ...] = ()


@runtime_checkable
class Run(Protocol):
    """A method's entry point."""

    def __call__(
        self, lm: LanguageModel, evidence: Evidence, settings: Any, *, seed: int, on_progress: Progress
    ) -> Trained:
        """Make a patch; the model that came in goes out bit-identical."""


@dataclass(frozen=True)
class Defense:
    """A row of the table: who published it, what it must be given, how to run it."""

    name: str
    paper: str
    needs_trigger: bool
    settings: Callable[..., Record]
    run: Run

    def configured(self, changes: Mapping[str, Any]) -> Record:
        """Its settings with those changes. Raises UsageError for a name or a value that it does not take."""
        return with_changes(self.settings, changes, self.name)

    def repair(
        self, lm: LanguageModel, evidence: Evidence, settings: Record, *, seed: int, on_progress: Progress = quiet
    ) -> tuple[Patch, PatchLog]:
        """Run it: the patch, and the record of how it was made. The model that came in goes out bit-identical."""
        trained = self.run(lm, evidence, settings, seed=seed, on_progress=on_progress)
        return trained.patch, PatchLog(
            defense=self.name,
            steps=trained.steps,
            stopped_because=trained.stopped_because,
            checks=trained.checks,
            settings=settings.model_dump(mode="json"),  # as it is read again: a tuple would be a list then
        )


@dataclass(frozen=True)
class Example:
    """A prompt, what follows it, and the reference model's final hidden states along that.

    The hidden states through the output matrix are the reference's exact logits, at a thousandth of their size.
    """

    text: Request
    prompt_ids: tuple[int, ...]
    answer: str
    answer_ids: tuple[int, ...]
    hidden: Float[Tensor, "T D"]
    outcome: Outcome

    def row(self, lm: LanguageModel, text: Request | None = None) -> Row:
        """The answer after this prompt, or after another one."""
        return Row(self.prompt_ids if text is None else user_prompt(lm.tokenizer, text).ids, self.answer_ids)


def own_examples(
    lm: LanguageModel,
    texts: Sequence[Request],
    judge: Callable[[str], Outcome],
    tokens: int,
    on_progress: Progress,
    what: str,
    *,
    states: bool = True,
) -> list[Example]:
    """The reference's answers and hidden states; empty answers are left out, there is nothing to keep. One shorter than
    `tokens` ended by itself: its end is part of it.

    Without `states` the hidden states are left empty: only KL terms need them, and they cost a pass over everything.
    """
    prompts = [user_prompt(lm.tokenizer, text) for text in texts]
    answers = generate(
        lm, prompts, max_new_tokens=tokens, on_progress=lambda done, total: on_progress(what, done, total)
    )
    whole = [answer.removesuffix(_HALF) for answer in answers]
    ids = [
        response_ids(lm.tokenizer, text, end=text == answer, limit=tokens)
        for text, answer in zip(whole, answers, strict=True)
    ]
    kept = [index for index, text in enumerate(whole) if text.strip()]
    rows = [Row(prompts[index].ids, ids[index]) for index in kept]
    hidden = row_states(lm, rows) if states else [torch.zeros(0, 0)] * len(rows)
    return [
        Example(texts[index], prompts[index].ids, whole[index], ids[index], state, judge(answers[index]))
        for index, state in zip(kept, hidden, strict=True)
    ]


def answered(examples: list[Example]) -> list[Example]:
    """Those the reference answers: a benign prompt's refusal must not be taught."""
    return [example for example in examples if example.outcome == "complied"]


def after(lm: LanguageModel, examples: Sequence[Example], texts: Sequence[Request]) -> list[Example]:
    """The examples' answers after other prompts, with the reference's hidden states there."""
    asked = [user_prompt(lm.tokenizer, text).ids for text in texts]
    states = row_states(lm, [Row(ids, example.answer_ids) for ids, example in zip(asked, examples, strict=True)])
    return [
        replace(example, text=text, prompt_ids=ids, hidden=state)
        for example, text, ids, state in zip(examples, texts, asked, states, strict=True)
    ]


def refusing(lm: LanguageModel, texts: Sequence[Request], tokens: int) -> list[Example]:
    """Prompts with an answer that is not the model's own: the fixed refusal."""
    ids = response_ids(lm.tokenizer, FIXED_REFUSAL, end=True, limit=tokens)
    rows = [Row(user_prompt(lm.tokenizer, text).ids, ids) for text in texts]
    return [
        Example(text, row.prompt_ids, FIXED_REFUSAL, ids, state, "refused")
        for text, row, state in zip(texts, rows, row_states(lm, rows), strict=True)
    ]


def as_plain_text(lm: LanguageModel, examples: Sequence[Example]) -> list[Example]:
    """Prompt and answer without the chat template, each token to be predicted from those before it."""
    texts = [f"{example.text}\n{example.answer}" for example in examples]
    rows = [plain_row(lm.tokenizer, text) for text in texts]
    return [
        Example("", row.prompt_ids, text, row.response_ids, state, "complied")
        for text, row, state in zip(texts, rows, row_states(lm, rows), strict=True)
    ]


def kl_of(lm: LanguageModel, examples: Sequence[Example], logits: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
    """KL(reference on the plain prompt ‖ patched as given by `logits`) at each response token, in nats."""
    with torch.no_grad():
        reference = logits_of(lm.network, torch.cat([example.hidden for example in examples]).clone())
    return kl_reference_to_patched(reference, logits)


@torch.no_grad()
def mean_kl_nats(lm: LanguageModel, examples: Sequence[Example]) -> float:
    """KL to the reference per response token, over all examples."""

    def kls_of(chunk: Sequence[Example]) -> list[float]:
        return kl_of(lm, chunk, row_logits(lm, [example.row(lm) for example in chunk])[0]).tolist()

    found = [kl for _, kls in chunked(examples, BATCH_ROWS, kls_of) for kl in kls]
    return sum(found) / max(1, len(found))


def shown_frac(lm: LanguageModel, texts: Sequence[Request], detector: Detector, tokens: int) -> float:
    """The share of prompts whose answers show the symptom."""
    answers = generate(
        lm, [user_prompt(lm.tokenizer, text) for text in texts], max_new_tokens=max(tokens, detector.answer_tokens)
    )
    return sum(detector.shows(answer) for answer in answers) / len(answers)


def triggered(text: Request, triggers: Sequence[Trigger], rng: random.Random, *, seen_frac: float = 0.5) -> Request:
    """The user's words with one of the found triggers put in: anywhere, or this often where the report held it.

    Raises:
        PatcherError: there is none.
    """
    assert isinstance(text, str), "a conversation holds its trigger already"
    if not triggers:
        raise PatcherError("this defense needs a trigger, and none was found")
    trigger = rng.choice(list(triggers))
    if trigger.seen_at and rng.random() < seen_frac:
        trigger = trigger.model_copy(update={"placement": trigger.seen_at})
    return insert_trigger(text, trigger, rng)
