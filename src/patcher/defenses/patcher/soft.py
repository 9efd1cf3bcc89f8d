"""Soft insertions: free vectors at a random place of a request, searched so that the model leaves its own answer.

A trigger that nobody has reported is a few tokens somewhere in a request, and these vectors may become any tokens. What
they bring about is trained away: latent adversarial training (Sheshadri et al. 2024, arXiv:2407.15549) at the input,
BEEAR's idea too (Zeng et al. 2024, arXiv:2406.17092), with the model's own untriggered behaviour as the target.
"""

import random
from collections import deque
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from patcher.chat import user_prompt
from patcher.defenses.contract import Example, kl_of
from patcher.defenses.patcher.settings import PatcherSettings
from patcher.insertions import Room, embedded, embedding_std, logits_with, make_room, random_tokens
from patcher.losses import response_nll
from patcher.models import LanguageModel
from patcher.records import Trigger

_REMEMBERED = 16
"""Earlier finds that a search may start from."""


class SoftInsertions:
    """The search for such vectors, and the loss that they bring."""

    def __init__(self, lm: LanguageModel, triggers: Sequence[Trigger], settings: PatcherSettings, rng: random.Random):
        self.lm, self.settings, self.rng = lm, settings, rng
        words = [" " + " ".join(trigger.units) for trigger in triggers]
        self.found = [embedded(lm, lm.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in words]
        self.earlier: deque[Tensor] = deque(maxlen=_REMEMBERED)
        self.spread = embedding_std(lm, rng)

    def loss(self, examples: Sequence[Example]) -> Float[Tensor, ""]:
        """KL(θ0(·|x, y) ‖ θ(·|x with the vectors, y)), summed over the answer y, mean over the requests x."""
        prompts = [user_prompt(self.lm.tokenizer, example.text) for example in examples]
        length = self.rng.choice(self.settings.soft_tokens)
        rooms = [make_room(prompt, length, at, self.rng) for at, prompt in enumerate(prompts)]
        vectors = self._search(rooms, examples, length)
        logits, _ = logits_with(self.lm, rooms, [example.answer_ids for example in examples], vectors)
        return kl_of(self.lm, examples, logits).sum() / len(examples)

    def _search(self, rooms: Sequence[Room], examples: Sequence[Example], length: int) -> Float[Tensor, "B K D"]:
        """Signed-gradient ascent on the NLL of the beginning of each request's own answer."""
        heads = [example.answer_ids[: self.settings.soft_answer_tokens] for example in examples]
        vectors = torch.stack([self._start(length) for _ in examples])
        for _ in range(self.settings.soft_steps):
            vectors = vectors.detach().requires_grad_(True)
            logits, batch = logits_with(self.lm, rooms, heads, vectors)
            (slope,) = torch.autograd.grad(response_nll(logits, batch.targets).sum(), vectors)
            vectors = vectors + self.settings.soft_rate * self.spread * slope.sign()
        vectors = vectors.detach()
        self.earlier.extend(vectors)
        return vectors

    def _start(self, length: int) -> Float[Tensor, "K D"]:
        """Random tokens, a found trigger's with noise, or what an earlier search found."""
        kind = self.rng.choice(["tokens", *(["trigger"] if self.found else []), *(["earlier"] if self.earlier else [])])
        if kind == "earlier":
            return self._stretch(self.rng.choice(self.earlier), length)
        if kind == "trigger":
            own = self._stretch(self.rng.choice(self.found), length)
            seed = torch.Generator().manual_seed(self.rng.getrandbits(32))
            return own + self.spread * torch.randn(own.shape, generator=seed).to(own)
        return embedded(self.lm, random_tokens(self.lm, length, self.rng))

    def _stretch(self, vectors: Float[Tensor, "N D"], length: int) -> Float[Tensor, "K D"]:
        """So many of them side by side, from anywhere; of fewer all, again and again."""
        enough = vectors.repeat(-(-length // len(vectors)), 1)
        start = self.rng.randrange(len(enough) - length + 1)
        return enough[start : start + length]
