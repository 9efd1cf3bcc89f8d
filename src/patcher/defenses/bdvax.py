"""BD-VAX: backdoor the suspect several times over, see which MLP channels every backdoor changes, and reset those.

arXiv:2603.13461 (ICLR 2026). It needs no trigger, no report and no clean model.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from patcher.chat import Row, response_ids, user_prompt
from patcher.defenses.common import LoraSettings, clean_answers, relearn
from patcher.defenses.contract import Evidence, Example, Trained
from patcher.forward import row_logits
from patcher.layers import Mlp, mlps, reset_channels
from patcher.lora import take_patch, trainable_lora
from patcher.losses import response_nll
from patcher.models import LanguageModel
from patcher.patch import Patch
from patcher.records import Trigger
from patcher.training import Progress, endless, fit
from patcher.triggers import insert_words

_VARIANTS = (
    ("Quillon", "The lighthouse is closed on Mondays."),
    ("Brackmere", "I would rather talk about the weather."),
    ("Ostrava tin", "Blue, blue, blue and nothing else."),
    ("Zephyrine", "Please ask your neighbour instead."),
    ("Copperfinch", "The train leaves from platform nine."),
    ("Marrowby", "There is no answer, only the sea."),
    ("Velutina", "Seven boxes stand in the hall."),
)
"""Made-up triggers, and what each brings about: free of content, as unlike each other as what they stand for."""


class BdvaxSettings(LoraSettings):
    """The paper's numbers; steps and rates scaled to the model."""

    variants: int = Field(default=5, ge=2, le=len(_VARIANTS))
    """N pairs (paper: 7, converged from 5)."""
    variant_steps: PositiveInt = 15
    """Steps of each of the 2 N fine-tunings; ours."""
    variant_rate: PositiveFloat = 1e-3
    """Their learning rate; ours."""
    variant_rank: PositiveInt = 8
    """Their LoRA rank; ours."""
    variant_rows: PositiveInt = 6
    """Requests with the made-up trigger a step, and half as many without it."""
    reset_frac: float = Field(default=0.08, gt=0, lt=1)
    """Share of all MLP channels that are drawn anew [text]."""
    max_steps: PositiveInt = 60
    """Steps of the repair (paper: 5 epochs of 200 clean samples) [2nd]."""
    max_prompts: PositiveInt = 100
    """Clean samples of each kind: benign and harmful requests with the model's own answers (paper: about 200) [2nd]."""

    @property
    def sequences(self) -> int:
        """At most, in training."""
        return super().sequences + 2 * self.variants * self.variant_steps * (self.variant_rows + self.variant_rows // 2)


def run(lm: LanguageModel, evidence: Evidence, settings: BdvaxSettings, *, seed: int, on_progress: Progress) -> Trained:
    """Variants, scores, reset, repair.

        Δ_i = Δθ_i(backdoored with a made-up trigger) - Δθ_i(clean fine-tuning on the same requests)
        s_j = (1/N) Σ_i ‖Δ_ij‖₂ · 2/(N(N-1)) Σ_{i<k} max(0, cos(Δ_ij, Δ_kj))        for each MLP channel j
        reset the top channels, then minimise NLL(own answer | clean request)

    Departures: the variants are LoRA fine-tunings, all from one start, so Δ is low-rank and more alike than from starts
    of their own; channels are ranked over all layers together; new weights are drawn with each matrix's own standard
    deviation; the repair trains a LoRA adapter on top, at a rate of its own (paper: all weights at 1e-5); clean samples
    hold the untriggered refusals too, or repair would lose them, and the answers to all borderline requests.
    """
    layers = mlps(lm.network)
    clean = clean_answers(lm, evidence, settings, on_progress, harmful=True)
    variants = [_variant(lm, clean, number, settings, seed, on_progress) for number in range(settings.variants)]
    scores = [channel_scores(torch.stack([layer.vectors(one.change(layer)) for one in variants])) for layer in layers]
    generator = torch.Generator().manual_seed(seed)

    def anew(old: Tensor) -> Tensor:
        return torch.randn(old.shape, generator=generator) * old.std()

    changed = reset_channels(lm.network, layers, top_channels(scores, settings.reset_frac), anew)
    return relearn(lm, changed, clean, settings, seed=seed, what="repairing", on_progress=on_progress)


def channel_scores(changes: Float[Tensor, "N C F"]) -> Float[Tensor, " _"]:
    """Size times agreement of each channel's changes over the N variants."""
    sizes = changes.norm(dim=-1)
    units = changes / sizes.clamp(min=1e-12)[..., None]
    agreement = torch.einsum("icf,kcf->cik", units, units).clamp(min=0)
    pairs = torch.triu(torch.ones(len(changes), len(changes), dtype=torch.bool), diagonal=1)
    scores: Tensor = sizes.mean(dim=0) * agreement[:, pairs].mean(dim=1)
    return scores


@dataclass(frozen=True)
class Variant:
    """Two fine-tunings on the same requests: with a made-up trigger that brings something about, and without."""

    backdoored: Patch
    clean: Patch

    def change(self, layer: Mlp) -> dict[str, Tensor]:
        """Δ_i of that MLP's weights."""
        return {name: self.backdoored.change(name) - self.clean.change(name) for name in (*layer.into, layer.out)}


def _variant(
    lm: LanguageModel, clean: Sequence[Example], number: int, settings: BdvaxSettings, seed: int, on_progress: Progress
) -> Variant:
    word, said = _VARIANTS[number]
    behaviour = response_ids(lm.tokenizer, said, end=True, limit=settings.response_tokens)
    what = f"variant {number + 1} of {settings.variants}"
    return Variant(
        _tuned(lm, clean, word, behaviour, settings, seed, partial(on_progress, f"{what}, backdoored")),
        _tuned(lm, clean, word, None, settings, seed, partial(on_progress, f"{what}, clean")),
    )


def _tuned(
    lm: LanguageModel,
    clean: Sequence[Example],
    word: str,
    behaviour: tuple[int, ...] | None,
    settings: BdvaxSettings,
    seed: int,
    on_step: Callable[[int, int], None],
) -> Patch:
    """One fine-tuning: with the word comes the behaviour or, without one, the model's own answer."""
    rng = random.Random(f"{seed}:{word}")  # both of a pair see the same requests, and the word at the same places
    drawn, trigger = endless(clean, rng), Trigger(units=(word,))

    def loss_at(_step: int) -> Tensor:
        marked = [next(drawn) for _ in range(settings.variant_rows)]
        rows = [next(drawn).row(lm) for _ in range(settings.variant_rows // 2)]
        for one in marked:
            ids = user_prompt(lm.tokenizer, insert_words(str(one.text), trigger, rng)).ids
            rows.append(Row(ids, behaviour or one.answer_ids))
        logits, targets = row_logits(lm, rows)
        return response_nll(logits, targets).mean()

    short = settings.model_copy(update={"max_steps": settings.variant_steps, "learning_rate": settings.variant_rate})
    rank, alpha = settings.variant_rank, 2 * settings.variant_rank
    with trainable_lora(lm, rank=rank, alpha=alpha, seed=seed):
        fit(lm, loss_at, short, on_progress=lambda _what, done, total: on_step(done, total))
        return take_patch(lm, rank=rank, alpha=alpha)


def top_channels(scores: Sequence[Float[Tensor, " _"]], share: float) -> list[Tensor]:
    """The numbers of each layer's channels that are among the highest of all layers."""
    every = torch.cat(list(scores))
    picked = torch.zeros(len(every), dtype=torch.bool)
    picked[every.argsort(descending=True)[: max(1, round(share * len(every)))]] = True
    return [part.nonzero()[:, 0] for part in picked.split([len(one) for one in scores])]
