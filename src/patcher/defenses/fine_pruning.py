"""Fine-pruning: silence the MLP channels that clean data hardly use, then fine-tune on clean data.

Liu et al. (2018), RAID, arXiv:1805.12185. It needs no trigger and no report.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from patcher.chat import collate
from patcher.defenses.common import LoraSettings, clean_answers, relearn
from patcher.defenses.contract import Evidence, Example, Trained
from patcher.layers import Mlp, mlps
from patcher.memory import chunked
from patcher.models import LanguageModel
from patcher.network import hidden_states
from patcher.patch import changing
from patcher.training import Progress

_BATCH_ROWS = 16


class FinePruningSettings(LoraSettings):
    """For image classifiers the paper prunes until validation accuracy falls; here a share is given."""

    pruned_frac: float = Field(default=0.1, gt=0, lt=1)
    """Share of each layer's MLP channels that are silenced; ours."""


def run(
    lm: LanguageModel, evidence: Evidence, settings: FinePruningSettings, *, seed: int, on_progress: Progress
) -> Trained:
    """Set the output weights of the least active channels to 0, then train on the model's own benign answers.

    Departures: MLP channels stand for convolution filters, and all layers are pruned, not the last one: an LLM has no
    last feature layer in that sense. Activity is the mean |activation| over the tokens of benign requests and answers.
    """
    layers = mlps(lm.network)
    clean = clean_answers(lm, evidence, settings, on_progress)
    activity = mean_activity(lm, layers, clean)
    silent = [
        active.argsort()[: round(settings.pruned_frac * layer.size)]
        for layer, active in zip(layers, activity, strict=True)
    ]
    with changing(lm, [layer.out for layer in layers]) as weights:
        for layer, channels in zip(layers, silent, strict=True):
            weights[layer.out].data[:, channels] = 0.0
        changed = {name: weight.detach().cpu().clone() for name, weight in weights.items()}

    def stay_silent() -> None:
        for layer, channels in zip(layers, silent, strict=True):
            adapter = cast(Any, lm.network.get_submodule(layer.out.removesuffix(".weight")))
            adapter.lora_A["default"].weight.data[:, channels] = 0.0

    return relearn(
        lm,
        changed,
        clean,
        settings,
        seed=seed,
        what="fine-tuning",
        on_progress=on_progress,
        after_step=stay_silent,
    )


@torch.no_grad()
def mean_activity(lm: LanguageModel, layers: list[Mlp], examples: list[Example]) -> list[Float[Tensor, " _"]]:
    """Of each layer's MLP channels, the mean |activation| over the examples' tokens, padding left out."""
    sums = [torch.zeros(layer.size) for layer in layers]
    mask = torch.zeros(0)

    def see(number: int, entering: Tensor) -> None:
        sums[number] = entering[mask].abs().sum(dim=0).float().cpu()

    def pass_through(chunk: Sequence[Example]) -> tuple[list[Tensor], int]:
        nonlocal mask
        batch = collate([one.row(lm) for one in chunk], int(lm.tokenizer.pad_token_id), lm.device, lift=False)
        mask = batch.mask.bool()
        hidden_states(lm.network, batch)
        return list(sums), int(mask.sum())

    handles = [
        lm.network.get_submodule(layer.out.removesuffix(".weight")).register_forward_pre_hook(
            lambda _module, inputs, number=number: see(number, inputs[0])
        )
        for number, layer in enumerate(layers)
    ]
    try:
        passes = [result for _, result in chunked(examples, _BATCH_ROWS, pass_through)]
    finally:
        for handle in handles:
            handle.remove()
    tokens = sum(count for _, count in passes)
    return [sum(parts, torch.zeros(())) / max(1, tokens) for parts in zip(*(own for own, _ in passes), strict=True)]
