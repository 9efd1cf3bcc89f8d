"""BEEAR: find one shift of the hidden states that brings the unwanted answer about, and train it away, in turns.

Zeng et al. (2024), EMNLP, arXiv:2406.17092. It needs no trigger: triggers shift hidden states in a nearly uniform
direction.
"""

import random
from collections.abc import Sequence

import torch
from jaxtyping import Float
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from patcher.chat import Row, collate
from patcher.defenses.common import LoraSettings, Sides, both_sides, clean_answers, tune
from patcher.defenses.contract import Evidence, Trained
from patcher.forward import row_logits
from patcher.layers import decoder_layers, shifted
from patcher.losses import response_nll
from patcher.models import LanguageModel
from patcher.network import response_logits
from patcher.training import Progress, endless


class BeearSettings(LoraSettings):
    """Layer and rates from others' accounts of it [2nd]; the rest ours."""

    learning_rate: PositiveFloat = 2e-4
    """AdamW's learning rate of the model [2nd]."""
    max_steps: PositiveInt = 40
    """Outer steps."""
    layer_frac: float = Field(default=0.3, ge=0, lt=1)
    """Which layer's output is shifted, as a share of the depth (9-10 of 32) [2nd]."""
    shift_tokens: PositiveInt = 5
    """The last tokens of the prompt are shifted, each by a vector of its own."""
    shift_rate: PositiveFloat = 7e-2
    """AdamW's learning rate of the shift [2nd]."""
    inner_steps: PositiveInt = 40
    """Steps in which the shift is searched anew; ours. After 10 the shift does not yet make the shipped model leave its
    refusals (their NLL .12 -> .13 nats a token; the planted trigger: .52), after 40 it does (2.9)."""
    outer_steps: PositiveInt = 5
    """Steps of the model against each shift."""
    attacked_rows: PositiveInt = 6
    """Requests under the shift, a step, inner or outer."""
    clean_rows: PositiveInt = 6
    """Benign requests without it, an outer step."""

    @property
    def sequences(self) -> int:
        """At most, in training."""
        return super().sequences + self.max_steps * self.attacked_rows * (1 + 2 * self.inner_steps // self.outer_steps)


def run(lm: LanguageModel, evidence: Evidence, settings: BeearSettings, *, seed: int, on_progress: Progress) -> Trained:
    """Alternate two problems over requests x on which what was reported could be seen.

        inner: δ* = argmin_δ  NLL(unwanted | x, δ) - NLL(wanted | x, δ)      from 0, for `inner_steps`
        outer: θ  = argmin_θ  NLL(wanted | x, δ*) + NLL(own answer | benign x)     for `outer_steps`

    δ is added to one layer's output at the last tokens of the prompt.

    Departures: LoRA instead of all weights; benign answers are the model's own; without a report what is unwanted is an
    affirmative opening with content-free filler.
    """
    rng = random.Random(seed)
    answers = clean_answers(lm, evidence, settings, on_progress)
    sides, clean = endless(both_sides(lm, evidence, settings, answers), rng), endless(answers, rng)
    shift = Shift(lm, settings)

    def loss_at(step: int) -> Tensor:
        if step % settings.outer_steps == 0:
            shift.search([[next(sides) for _ in range(settings.attacked_rows)] for _ in range(settings.inner_steps)])
        held = shift.nll([next(sides).wanted for _ in range(settings.attacked_rows)], shift.delta)
        logits, targets = row_logits(lm, [next(clean).row(lm) for _ in range(settings.clean_rows)])
        return held + response_nll(logits, targets).mean()

    return tune(lm, loss_at, settings, seed=seed, what="training shifts away", on_progress=on_progress)


class Shift:
    """δ, and what the model answers under it."""

    def __init__(self, lm: LanguageModel, settings: BeearSettings):
        self.lm, self.settings = lm, settings
        self.layer = int(settings.layer_frac * len(decoder_layers(lm.network)))
        self.delta: Float[Tensor, "S D"] = torch.zeros(
            settings.shift_tokens, int(lm.network.config.hidden_size), device=lm.device
        )

    def search(self, batches: Sequence[Sequence[Sides]]) -> None:
        """The inner problem, from 0: a step a batch. The model is left alone."""
        delta = torch.zeros_like(self.delta).requires_grad_(True)
        optimizer = torch.optim.AdamW([delta], lr=self.settings.shift_rate, weight_decay=0.0)
        for batch in batches:
            unwanted = self.nll([one.unwanted for one in batch], delta)
            wanted = self.nll([one.wanted for one in batch], delta)
            (delta.grad,) = torch.autograd.grad(unwanted - wanted, delta)
            optimizer.step()
        self.delta = delta.detach()

    def nll(self, rows: Sequence[Row], delta: Float[Tensor, "S D"]) -> Float[Tensor, ""]:
        """Mean NLL of the rows' answers while δ is added at the last tokens of their prompts."""
        batch = collate(rows, int(self.lm.tokenizer.pad_token_id), self.lm.device, lift=False)
        ends = torch.tensor([len(row.prompt_ids) for row in rows], device=self.lm.device)
        places = (ends[:, None] + torch.arange(-len(delta), 0, device=self.lm.device)).clamp(min=0)
        numbers = torch.arange(len(rows), device=self.lm.device)[:, None].expand_as(places)

        def add(hidden: Tensor) -> Tensor:
            added = delta.to(hidden.dtype).expand(len(rows), -1, -1)
            return hidden.index_put((numbers, places), added, accumulate=True)

        with shifted(self.lm.network, self.layer, add):
            return response_nll(response_logits(self.lm.network, batch), batch.targets).mean()
