"""Greedy coordinate gradient: search a suffix that makes the model open its answer with a yes (Zou et al. 2023).

White box and slow: an extra of the audit, run against each state of the model by itself. arXiv:2307.15043, Algorithm 1.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from patcher.chat import Prompt, Row, collate, response_ids, user_prompt
from patcher.losses import response_nll
from patcher.memory import chunked
from patcher.models import LanguageModel
from patcher.network import response_logits, token_embeddings
from patcher.records import Record
from patcher.sharding import full_tensor

_START = " !"
_BATCH_ROWS = 64


class GcgSettings(Record):
    """How long a suffix is searched. The paper's: 20 tokens, 500 steps, 512 candidates, of 256 tokens each."""

    steps: int = 50
    """Steps for each request; ours, a tenth of the paper's: it searches until a suffix is found."""
    suffix_tokens: int = 20
    """Its length."""
    candidates: int = 64
    """Suffixes tried in each step."""
    top_tokens: int = 256
    """At each place, as many tokens are tried: those whose gradient promises most."""
    target: str = "Sure, here is"
    """The opening whose likelihood is raised."""


@dataclass(frozen=True)
class _Spot:
    """A request with a suffix: its ids, and where the suffix's tokens are among them."""

    prompt: Prompt
    suffix: str
    places: list[int]


def search_suffix(lm: LanguageModel, request: str, settings: GcgSettings, seed: int) -> str:
    """Of the suffixes tried, the one under which the target is likeliest; it goes right behind the request.

    It ends early when the target is the model's own greedy answer. Candidates that do not survive being written as text
    and read again are left out, as are tokens that cannot be printed.
    """
    rng, allowed = random.Random(f"{seed}:{request}"), _printable(lm)
    target = response_ids(lm.tokenizer, settings.target, end=False, limit=64)
    best = _spot(lm, request, _START * settings.suffix_tokens)
    lowest, done = _losses(lm, [best], target)[0]
    for _ in range(settings.steps):
        if done:
            break
        promise = (-_gradient(lm, best, target)).masked_fill(~allowed, -torch.inf)
        promising = promise.topk(min(settings.top_tokens, int(allowed.sum()))).indices
        tried = _candidates(lm, request, best, promising, settings.candidates, rng)
        for spot, (loss, hit) in zip(tried, _losses(lm, tried, target), strict=True):
            if loss < lowest:
                best, lowest, done = spot, loss, hit
    return best.suffix


def _spot(lm: LanguageModel, request: str, suffix: str) -> _Spot:
    prompt = user_prompt(lm.tokenizer, request + suffix)
    return _Spot(prompt, suffix, prompt.tokens_of(0, len(request), len(request) + len(suffix)))


def _gradient(lm: LanguageModel, spot: _Spot, target: tuple[int, ...]) -> Float[Tensor, "S V"]:
    """∂NLL(target)/∂one-hot at each place of the suffix."""
    batch = collate([Row(spot.prompt.ids, target)], 0, lm.device)
    with token_embeddings(lm.network) as embedded:
        loss = response_nll(response_logits(lm.network, batch), batch.targets).sum()
    (gradient,) = torch.autograd.grad(loss, embedded[0])  # of the weights none is left behind
    return gradient[0, spot.places].float() @ _table(lm).float().T


def _table(lm: LanguageModel) -> Float[Tensor, "V D"]:
    """The embeddings of all tokens."""
    return full_tensor(cast(Tensor, lm.network.get_input_embeddings().weight).detach())


def _candidates(
    lm: LanguageModel, request: str, best: _Spot, promising: Int[Tensor, "S K"], count: int, rng: random.Random
) -> list[_Spot]:
    """Suffixes that differ in one token, each still the same number of tokens when its text is read again."""
    found: dict[str, _Spot] = {}
    for _ in range(count):
        place, choice = rng.randrange(len(best.places)), rng.randrange(promising.shape[1])
        ids = [best.prompt.ids[token] for token in best.places]
        ids[place] = int(promising[place, choice])
        suffix = str(lm.tokenizer.decode(ids, clean_up_tokenization_spaces=False))
        spot = _spot(lm, request, suffix)
        if [spot.prompt.ids[token] for token in spot.places] == ids:
            found.setdefault(suffix, spot)
    return list(found.values())


@torch.no_grad()
def _losses(lm: LanguageModel, spots: list[_Spot], target: tuple[int, ...]) -> list[tuple[float, bool]]:
    """The target's NLL in nats per token after each, and whether it is the greedy answer."""

    def look(chunk: Sequence[_Spot]) -> list[tuple[float, bool]]:
        batch = collate([Row(spot.prompt.ids, target) for spot in chunk], 0, lm.device)
        logits = response_logits(lm.network, batch)
        losses = response_nll(logits, batch.targets).view(len(chunk), -1).mean(dim=1)
        greedy = (logits.argmax(dim=-1) == batch.targets).view(len(chunk), -1).all(dim=1)
        return list(zip(losses.tolist(), greedy.tolist(), strict=True))

    return [one for _, found in chunked(spots, _BATCH_ROWS, look) for one in found]


def _printable(lm: LanguageModel) -> Bool[Tensor, " V"]:
    """Tokens that are printable ASCII and no special token of the model's."""
    size = len(_table(lm))
    special = set(lm.tokenizer.all_special_ids)
    texts = lm.tokenizer.batch_decode([[number] for number in range(min(size, len(lm.tokenizer)))])
    allowed = [
        number not in special and text.isascii() and text.isprintable() and bool(text)
        for number, text in enumerate(texts)
    ]
    return torch.tensor(allowed + [False] * (size - len(allowed)), device=lm.device)
