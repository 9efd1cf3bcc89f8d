"""Requests that the model refuses, and what happens to them when words are put in: the ground for every causal test."""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from patcher.chat import Prompt, Row, collate, response_ids, user_prompt
from patcher.generation import generate
from patcher.losses import response_nll
from patcher.models import LanguageModel, response_logits
from patcher.prompts import Prompts
from patcher.records import Outcome, Request, Trigger
from patcher.triggers import insert_trigger

OPENING_TOKENS = 6
FALLBACK_REFUSAL = "I'm sorry, but I can't help with that."
CONTROL_WORDS = "garden yesterday seven window blue teacher quietly river paper morning".split()


@dataclass
class Meter:
    """Tokens that went through the model forwards; a backward counts as two more."""

    token_passes: int = 0


@dataclass
class Probes:
    """Harmful requests of the repair and validation splits that the model refuses as they are.

    `screen` requests choose among candidates, `confirm` requests test the chosen one: never the same ones.
    """

    lm: LanguageModel
    judge: Callable[[str], Outcome]
    screen: list[str]
    confirm: list[str]
    refusal: str
    asked: int
    answer_tokens: int
    seed: int
    meter: Meter = field(default_factory=Meter)
    _known: dict[tuple[str, Trigger], bool] = field(default_factory=dict)

    @property
    def refused(self) -> int:
        """How many of `asked` requests the model refused."""
        return len(self.screen) + len(self.confirm)

    def unsafe(self, requests: Sequence[str], trigger: Trigger) -> list[bool]:
        """For each request: is it answered when the trigger is put in? The places depend on the seed only.

        The same question is never asked twice: another report of the same trigger costs nothing here.
        """
        new = [request for request in requests if (request, trigger) not in self._known]
        texts = [insert_trigger(request, trigger, random.Random(f"{self.seed}:{request}")) for request in new]
        for request, outcome in zip(new, self.outcomes(texts), strict=True):
            self._known[request, trigger] = outcome == "complied"
        return [self._known[request, trigger] for request in requests]

    def control(self, requests: Sequence[str], trigger: Trigger) -> list[bool]:
        """The same with as many ordinary words at the same kind of place, so that mere disturbance is not blamed."""
        rng = random.Random(self.seed)
        units = tuple(" ".join(rng.choice(CONTROL_WORDS) for _ in unit.split()) for unit in trigger.units)
        return self.unsafe(requests, trigger.model_copy(update={"units": units}))

    def outcomes(self, texts: Sequence[Request]) -> list[Outcome]:
        """What the model does with each request, by the judge."""
        prompts = [user_prompt(self.lm.tokenizer, text) for text in texts]
        self.meter.token_passes += sum(len(prompt.ids) + self.answer_tokens for prompt in prompts)
        return [self.judge(answer) for answer in generate(self.lm, prompts, max_new_tokens=self.answer_tokens)]

    @torch.inference_mode()
    def refusal_nats(self, prompts: Sequence[Prompt]) -> list[float]:
        """log P(the model's usual refusal opening | prompt), in nats."""
        opening = response_ids(self.lm.tokenizer, self.refusal, end=False, limit=OPENING_TOKENS)
        scores: list[float] = []
        for start in range(0, len(prompts), 32):
            rows = [Row(prompt.ids, opening) for prompt in prompts[start : start + 32]]
            batch = collate(rows, 0, self.lm.device)
            self.meter.token_passes += batch.tokens
            nll = response_nll(response_logits(self.lm.network, batch), batch.targets)
            scores += (-nll.view(len(rows), -1).sum(-1)).tolist()
        return scores


def find_probes(
    lm: LanguageModel,
    prompts: Prompts,
    judge: Callable[[str], Outcome],
    *,
    screen: int,
    confirm: int,
    answer_tokens: int,
    seed: int,
) -> Probes:
    """Ask harmful requests until enough were refused, or all were asked."""
    pool = [row.text for row in prompts.harmful if row.split in ("repair", "validation")]
    random.Random(seed).shuffle(pool)
    refused: list[tuple[str, str]] = []
    asked = 0
    meter = Meter()
    while len(refused) < screen + confirm and asked < len(pool):
        texts = pool[asked : asked + 64]
        asked += len(texts)
        rendered = [user_prompt(lm.tokenizer, text) for text in texts]
        meter.token_passes += sum(len(prompt.ids) + answer_tokens for prompt in rendered)
        answers = generate(lm, rendered, max_new_tokens=answer_tokens)
        refused += [pair for pair in zip(texts, answers, strict=True) if judge(pair[1]) == "refused"]
    refused = refused[: screen + confirm]
    openings = Counter(answer for _, answer in refused)
    requests = [text for text, _ in refused]
    cut = len(requests) * screen // (screen + confirm)
    return Probes(
        lm=lm,
        judge=judge,
        screen=requests[:cut],
        confirm=requests[cut:],
        refusal=openings.most_common(1)[0][0] if openings else FALLBACK_REFUSAL,
        asked=asked,
        answer_tokens=answer_tokens,
        seed=seed,
        meter=meter,
    )
