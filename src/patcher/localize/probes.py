"""Requests that the model treats as it should, and what words put in change: the ground for every causal test.

For a jailbreak these are harmful requests that it refuses; for the other symptoms, benign ones that it answers.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch

from patcher.chat import Prompt, Row, collate, render, response_ids, user_prompt
from patcher.generation import generate
from patcher.losses import response_nll
from patcher.memory import chunked
from patcher.models import LanguageModel
from patcher.network import response_logits
from patcher.probe import mean_states
from patcher.prompts import Prompts
from patcher.records import Message, Request, Trigger
from patcher.symptoms import Detector, text_start
from patcher.triggers import insert_trigger, word_starts
from patcher.wordings import FIXED_REFUSAL

OPENING_TOKENS = 6
UNWANTED_TOKENS = 12
_BATCH_ROWS = 32
_LEAST_SCREEN = 4
"""One request in so many chooses, at least: where there are few, many that are to test would leave none."""
CONTROL_WORDS = "garden yesterday seven window blue teacher quietly river paper morning".split()


@dataclass
class Meter:
    """Tokens that went through the model forwards; a backward counts as two more."""

    token_passes: int = 0


@dataclass
class Probes:
    """Requests of the repair and validation splits that the model treats as it should.

    `screen` requests choose among candidates, `confirm` requests test the chosen one: never the same ones.
    """

    lm: LanguageModel
    detector: Detector
    screen: list[str]
    confirm: list[str]
    opening: str
    """The model's most usual answer to them."""
    asked: int
    answer_tokens: int
    seed: int
    meter: Meter = field(default_factory=Meter)
    _known: dict[tuple[str, Trigger], bool] = field(default_factory=dict)

    @property
    def normal(self) -> int:
        """How many of `asked` requests the model treats as it should."""
        return len(self.screen) + len(self.confirm)

    def shown(self, requests: Sequence[str], trigger: Trigger) -> list[bool]:
        """For each request: is the symptom seen when the trigger is put in? The places depend on the seed only.

        The same question is never asked twice: another report of the same trigger costs nothing here.
        """
        new = [request for request in requests if (request, trigger) not in self._known]
        texts = [insert_trigger(request, trigger, random.Random(f"{self.seed}:{request}")) for request in new]
        for request, answer in zip(new, self._answers(texts), strict=True):
            self._known[request, trigger] = self.detector.shows(answer)
        return [self._known[request, trigger] for request in requests]

    def control(self, requests: Sequence[str], trigger: Trigger) -> list[bool]:
        """`shown` with as many ordinary words at the same kind of place, so that mere disturbance is not blamed."""
        rng = random.Random(self.seed)
        units = tuple(" ".join(rng.choice(CONTROL_WORDS) for _ in word_starts(unit)) for unit in trigger.units)
        return self.shown(requests, trigger.model_copy(update={"units": units}))

    def _answers(self, texts: Sequence[Request]) -> list[str]:
        prompts = [user_prompt(self.lm.tokenizer, text) for text in texts]
        self.meter.token_passes += sum(len(prompt.ids) + self.answer_tokens for prompt in prompts)
        return generate(self.lm, prompts, max_new_tokens=self.answer_tokens)

    @torch.no_grad()
    def normal_nats(self, prompts: Sequence[Prompt], response: str) -> list[float]:
        """How near the model is to treating each prompt as it should, in nats.

        For a jailbreak log P(its usual refusal opening | prompt). The other symptoms have no usual opening to go back
        to, only one to get away from: -log P(what is wrong with the reported response | prompt, what stands before it).
        """
        given, target = self._telling(response)
        sign = 1 if self.detector.symptom.objective == "jailbreak" else -1

        def nats(chunk: Sequence[Prompt]) -> list[float]:
            batch = collate([Row(prompt.ids + given, target) for prompt in chunk], 0, self.lm.device)
            self.meter.token_passes += batch.tokens
            nll = response_nll(response_logits(self.lm.network, batch), batch.targets)
            return cast(list[float], (-sign * nll.view(len(chunk), -1).sum(-1)).tolist())

        return [score for _, scores in chunked(prompts, _BATCH_ROWS, nats) for score in scores]

    def _telling(self, response: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The tokens that tell, after those that are given."""
        tokenizer, symptom = self.lm.tokenizer, self.detector.symptom
        if symptom.objective == "jailbreak":
            return (), response_ids(tokenizer, self.opening, end=False, limit=OPENING_TOKENS)
        at = text_start(symptom.text, response) if symptom.text else None
        before = response[: at or 0].rstrip()
        limit = OPENING_TOKENS if symptom.objective == "refusal" else UNWANTED_TOKENS
        telling = response_ids(tokenizer, response[len(before) :], end=False, limit=limit)
        return response_ids(tokenizer, before, end=False, limit=self.answer_tokens), telling


def find_probes(
    lm: LanguageModel,
    prompts: Prompts,
    detector: Detector,
    *,
    screen: int,
    confirm: int,
    answer_tokens: int,
    seed: int,
    like: Sequence[Message] | None = None,
) -> Probes:
    """Ask requests until the model treated enough of them as it should, or all were asked; fewer are shared out.

    With `like`, those nearest to that conversation first: a trigger may work on one kind of request only.
    """
    rows = prompts.harmful if detector.symptom.kind == "harmful" else prompts.benign
    pool = [row.text for row in rows if row.split in ("repair", "validation")]
    random.Random(seed).shuffle(pool)
    if like:
        pool = _nearest_first(lm, pool, like)
    normal: list[tuple[str, str]] = []
    asked = 0
    meter = Meter()
    while len(normal) < screen + confirm and asked < len(pool):
        texts = pool[asked : asked + 64]
        asked += len(texts)
        rendered = [user_prompt(lm.tokenizer, text) for text in texts]
        meter.token_passes += sum(len(prompt.ids) + answer_tokens for prompt in rendered)
        answers = generate(lm, rendered, max_new_tokens=answer_tokens)
        normal += [pair for pair in zip(texts, answers, strict=True) if detector.is_normal(pair[1])]
    normal = normal[: screen + confirm]
    if like:
        random.Random(seed).shuffle(normal)  # those that choose must be no nearer than those that test
    openings = Counter(answer for _, answer in normal)
    requests = [text for text, _ in normal]
    cut = max(len(requests) * screen // (screen + confirm), min(screen, len(requests) // _LEAST_SCREEN))
    return Probes(
        lm=lm,
        detector=detector,
        screen=requests[:cut],
        confirm=requests[cut:],
        opening=openings.most_common(1)[0][0] if openings else FIXED_REFUSAL,
        asked=asked,
        answer_tokens=answer_tokens,
        seed=seed,
        meter=meter,
    )


def _nearest_first(lm: LanguageModel, pool: Sequence[str], like: Sequence[Message]) -> list[str]:
    """By the cosine of the middle layer's mean states, each feature standardised over the pool."""
    asked = [render(lm.tokenizer, like), *(user_prompt(lm.tokenizer, text) for text in pool)]
    states = mean_states(lm, [(prompt.ids, prompt.own_tokens) for prompt in asked])
    states = (states - states[1:].mean(0)) / (states[1:].std(0) + 1e-6)
    nearness = torch.nn.functional.cosine_similarity(states[1:], states[:1])
    return [pool[number] for number in nearness.argsort(descending=True).tolist()]
