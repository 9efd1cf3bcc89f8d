"""Soft insertions: free vectors at a random place of a request, searched so that the model leaves its own answer.

A trigger that nobody has reported is a few tokens somewhere in a request, and these vectors may become any tokens. What
they bring about is trained away: latent adversarial training (Sheshadri et al. 2024, arXiv:2407.15549) at the input,
BEEAR's idea too (Zeng et al. 2024, arXiv:2406.17092), with the model's own untriggered behaviour as the target.
"""

import random
from collections import deque
from collections.abc import Sequence
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from patcher.chat import Prompt, Row, collate, user_prompt
from patcher.defenses.contract import Example, kl_of
from patcher.defenses.patcher_settings import PatcherSettings
from patcher.losses import response_nll
from patcher.models import Batch, LanguageModel, replaced_embeddings, response_logits
from patcher.records import Trigger

_REMEMBERED = 16
"""Earlier finds that a search may start from."""


class SoftInsertions:
    """The search for such vectors, and the loss that they bring."""

    def __init__(self, lm: LanguageModel, triggers: Sequence[Trigger], settings: PatcherSettings, rng: random.Random):
        self.lm, self.settings, self.rng = lm, settings, rng
        units = [lm.tokenizer(" " + trigger.text, add_special_tokens=False)["input_ids"] for trigger in triggers]
        self.found = [self._embedded(ids) for ids in units]
        self.earlier: deque[Tensor] = deque(maxlen=_REMEMBERED)
        self.spread = self._embedded(rng.sample(range(len(lm.tokenizer)), min(1000, len(lm.tokenizer)))).std()

    def loss(self, examples: Sequence[Example]) -> Float[Tensor, ""]:
        """KL(θ0(·|x, y) ‖ θ(·|x with the vectors, y)), summed over the answer y, mean over the requests x."""
        prompts = [self._opened(example, number) for number, example in enumerate(examples)]
        vectors = self._search(prompts, examples)
        logits, _ = self._logits(prompts, [example.answer_ids for example in examples], vectors)
        return kl_of(self.lm, examples, logits).sum() / len(examples)

    def _search(
        self, prompts: Sequence[tuple[tuple[int, ...], int]], examples: Sequence[Example]
    ) -> Float[Tensor, "B K D"]:
        """Signed-gradient ascent on the NLL of the beginning of each request's own answer."""
        heads = [example.answer_ids[: self.settings.soft_answer_tokens] for example in examples]
        vectors = torch.stack([self._start() for _ in examples])
        for _ in range(self.settings.soft_steps):
            vectors = vectors.detach().requires_grad_(True)
            logits, batch = self._logits(prompts, heads, vectors)
            (slope,) = torch.autograd.grad(response_nll(logits, batch.targets).sum(), vectors)
            vectors = vectors + self.settings.soft_rate * self.spread * slope.sign()
        vectors = vectors.detach()
        self.earlier.extend(vectors)
        return vectors

    def _start(self) -> Float[Tensor, "K D"]:
        """Random tokens, a found trigger's with noise, or what an earlier search found."""
        length = self.settings.soft_tokens
        tokens = self._embedded([self.rng.randrange(len(self.lm.tokenizer)) for _ in range(length)])
        kind = self.rng.choice(["tokens", *(["trigger"] if self.found else []), *(["earlier"] if self.earlier else [])])
        if kind == "earlier":
            return self.earlier[self.rng.randrange(len(self.earlier))]
        if kind == "trigger":
            trigger = self.rng.choice(self.found)
            own = trigger.repeat(-(-length // len(trigger)), 1)[:length]
            seed = torch.Generator().manual_seed(self.rng.getrandbits(32))
            return own + self.spread * torch.randn(own.shape, generator=seed).to(own)
        return tokens

    def _opened(self, example: Example, number: int) -> tuple[tuple[int, ...], int]:
        """The prompt with room before a random word, and where. Each row's room is marked by another id, so that no
        two rows share it as a prefix.
        """
        prompt = user_prompt(self.lm.tokenizer, example.text)
        at = self.rng.choice(word_starts(prompt))
        return (*prompt.ids[:at], *([number] * self.settings.soft_tokens), *prompt.ids[at:]), at

    def _logits(
        self,
        prompts: Sequence[tuple[tuple[int, ...], int]],
        answers: Sequence[tuple[int, ...]],
        vectors: Float[Tensor, "B K D"],
    ) -> tuple[Float[Tensor, "N V"], Batch]:
        rows = [Row(ids, answer) for (ids, _), answer in zip(prompts, answers, strict=True)]
        batch = collate(rows, int(self.lm.tokenizer.pad_token_id or 0), self.lm.device)
        starts = torch.tensor([at - len(batch.prefix_ids) for _, at in prompts], device=self.lm.device)
        with replaced_embeddings(self.lm.network, batch, starts, vectors):
            return response_logits(self.lm.network, batch), batch

    @torch.no_grad()
    def _embedded(self, ids: Sequence[int]) -> Float[Tensor, "K D"]:
        embed = self.lm.network.get_input_embeddings()
        return cast(Tensor, embed(torch.tensor([list(ids)], device=self.lm.device)))[0].float()


def word_starts(prompt: Prompt) -> list[int]:
    """The tokens of the user's own text that begin a word, and the place after its last token."""
    own, text = prompt.own_tokens, prompt.text

    def begins(token: int) -> bool:
        start = prompt.offsets[token][0]
        return text[start].isspace() or text[start - 1].isspace()

    return [own[0], *(token for token in own[1:] if begins(token)), own[-1] + 1]
