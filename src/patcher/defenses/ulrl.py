"""ULRL: unlearn clean data, see which neurons move most, set those back to chance and learn again.

UnLearn and ReLearn was made for image classifiers; here it is carried over to language models. It needs no trigger and
no report.
"""

import random
from collections.abc import Iterator
from dataclasses import replace

import torch
from jaxtyping import Float
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from patcher.defenses.common import LoraSettings, clean_answers, relearn
from patcher.defenses.contract import Evidence, Example, Trained
from patcher.forward import row_logits
from patcher.layers import Mlp, mlps, reset_channels
from patcher.lora import effective_weight
from patcher.losses import response_nll
from patcher.models import LanguageModel
from patcher.patch import changing
from patcher.records import PatcherError
from patcher.training import Progress, endless


class UlrlSettings(LoraSettings):
    """The authors' code [code], unless said."""

    unlearn_rate: PositiveFloat = 0.01
    """SGD's learning rate of the ascent [code]."""
    unlearn_clip: PositiveFloat = 20.0
    """The gradient's norm is clipped here [code]."""
    unlearn_steps: PositiveInt = 60
    """Steps at most; ours."""
    unlearned_frac: float = Field(default=0.2, ge=0, lt=1)
    """Unlearning ends when no more than this share of a batch's tokens is foreseen [code]."""
    outlier_z: PositiveFloat = 3.5
    """A channel is suspicious from this modified z-score on [code]."""
    max_suspicious_frac: float = Field(default=0.02, gt=0, lt=1)
    """Share of all channels at most, the highest first; the code takes 2 of a last layer's neurons."""
    unlike_weight: NonNegativeFloat = 0.1
    """α: how much it costs to become like the original again; theirs lie between .001 and .7 [code]."""

    @property
    def sequences(self) -> int:
        """At most, in training."""
        return super().sequences + self.unlearn_steps * self.clean_rows


def run(lm: LanguageModel, evidence: Evidence, settings: UlrlSettings, *, seed: int, on_progress: Progress) -> Trained:
    """Unlearn, pick channels, relearn.

        unlearn: W' by ascent on NLL(own answer | benign), SGD
        pick:    channels j with Σ|W'_j - W_j| an outlier above the median: .6745 (s_j - median) / MAD > z
        relearn: from W with those channels drawn from U(±sqrt(2/fan_in)), NLL(own answer | benign)
                 + α mean_j cos(w_j, W_j) over them

    Departures: the ascent moves the MLPs' matrices only, and is over when one batch says so; a neuron is an MLP channel
    of any layer (rows of the matrices into it, column of the one out of it), not an output row of the classifier, which
    in a language model is a token; the outliers are those of all layers together, up to 2% of the channels instead of 2
    neurons, and so their cosines are averaged, not summed; relearning trains a LoRA adapter on top.

    Raises:
        PatcherError: the ascent diverged.
    """
    rng = random.Random(seed)
    layers = mlps(lm.network)
    clean = clean_answers(lm, evidence, settings, on_progress)
    moved = unlearn(lm, clean, layers, settings, rng, on_progress)
    chosen = suspicious(moved, settings.outlier_z, settings.max_suspicious_frac)
    names = [name for layer in layers for name in (*layer.into, layer.out)]
    original = {name: lm.network.get_parameter(name).detach() for name in names}
    generator = torch.Generator().manual_seed(seed)

    def chance(old: Tensor) -> Tensor:
        bound: float = (2 / old.shape[1]) ** 0.5
        return (2 * torch.rand(old.shape, generator=generator) - 1) * bound

    changed = reset_channels(lm.network, layers, chosen, chance)

    def likeness(altered: LanguageModel) -> Tensor:
        alike = [*_likeness(altered, layers, chosen, original)]
        return settings.unlike_weight * torch.cat(alike).mean() if alike else torch.zeros(())

    trained = relearn(
        lm, changed, clean, settings, seed=seed, what="learning again", on_progress=on_progress, beside=likeness
    )
    reset = f"{sum(map(len, chosen))} of {sum(layer.size for layer in layers)} channels were drawn anew"
    return replace(trained, stopped_because=f"{reset}; {trained.stopped_because}")


def unlearn(
    lm: LanguageModel,
    clean: list[Example],
    layers: list[Mlp],
    settings: UlrlSettings,
    rng: random.Random,
    on_progress: Progress,
) -> list[Float[Tensor, " _"]]:
    """Σ|ΔW| of each layer's channels after the ascent; the model is left as it was."""
    names = [name for layer in layers for name in (*layer.into, layer.out)]
    original = {name: lm.network.get_parameter(name).detach() for name in names}
    drawn = endless(clean, rng)
    with changing(lm, names) as weights:
        for weight in weights.values():
            weight.requires_grad_(True)
        # half precision would round most of a step away
        exact = {name: values.to(torch.float32, copy=True) for name, values in original.items()}
        optimizer = torch.optim.SGD(exact.values(), lr=settings.unlearn_rate, maximize=True)
        for step in range(settings.unlearn_steps):
            logits, targets = row_logits(lm, [next(drawn).row(lm) for _ in range(settings.clean_rows)])
            foreseen = float((logits.argmax(dim=-1) == targets).float().mean())
            if foreseen <= settings.unlearned_frac:
                break
            gradients = torch.autograd.grad(response_nll(logits, targets).mean(), [*weights.values()])
            for values, gradient in zip(exact.values(), gradients, strict=True):
                values.grad = gradient.float()
            torch.nn.utils.clip_grad_norm_(exact.values(), settings.unlearn_clip)
            optimizer.step()
            for name, values in exact.items():
                weights[name].data.copy_(values)
            on_progress("unlearning", step + 1, settings.unlearn_steps)
        changes = {name: (values - original[name].float()).cpu() for name, values in exact.items()}
    return [layer.vectors(changes).abs().sum(dim=1) for layer in layers]


def suspicious(moved: list[Float[Tensor, " _"]], z: float, most_frac: float) -> list[Tensor]:
    """The numbers of each layer's channels that moved most, by their modified z-scores over all layers."""
    every = torch.cat(moved)
    if not every.isfinite().all():
        raise PatcherError("unlearning diverged: lower unlearn_rate or unlearn_clip")
    centre = every.median()
    spread = (every - centre).abs().median().clamp(min=1e-12)
    scores = 0.6745 * (every - centre) / spread
    floor = scores.sort(descending=True).values[max(1, int(most_frac * len(every))) - 1]
    return [part.nonzero()[:, 0] for part in ((scores > z) & (scores >= floor)).split([len(one) for one in moved])]


def _likeness(
    lm: LanguageModel, layers: list[Mlp], chosen: list[Tensor], original: dict[str, Tensor]
) -> Iterator[Float[Tensor, " J"]]:
    """cos(w_j, W_j) of the chosen channels of each layer, where w holds what LoRA has added so far."""
    for layer, numbers in zip(layers, chosen, strict=True):
        if len(numbers):
            names = (*layer.into, layer.out)
            now = {name: effective_weight(lm, name) for name in names}
            was = layer.vectors({name: original[name] for name in names})[numbers]
            yield torch.nn.functional.cosine_similarity(layer.vectors(now)[numbers].float(), was.float(), dim=1)
