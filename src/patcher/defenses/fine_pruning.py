"""Fine-pruning: silence the MLP channels that clean data hardly use, then fine-tune on clean data.

Liu et al. (2018), RAID, arXiv:1805.12185. It needs no trigger and no report.
"""

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from patcher.chat import collate
from patcher.defenses.common import LoraSettings, clean_answers, relearn
from patcher.defenses.contract import Evidence, Example, Trained
from patcher.layers import Mlp, mlps
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
    trained = relearn(lm, changed, clean, settings, seed=seed, what="fine-tuning", on_progress=on_progress)
    for layer, channels in zip(layers, silent, strict=True):  # what is pruned stays so: nothing is added there
        trained.patch.tensors[layer.out.removesuffix("weight") + "lora_A.weight"][:, channels] = 0.0
    return trained


@torch.no_grad()
def mean_activity(lm: LanguageModel, layers: list[Mlp], examples: list[Example]) -> list[Float[Tensor, " _"]]:
    """Of each layer's MLP channels, the mean |activation| over the examples' tokens, padding left out."""
    totals = [torch.zeros(layer.size) for layer in layers]
    count, mask = 0, torch.zeros(0)

    def add(number: int, entering: Tensor) -> None:
        totals[number] += entering[mask].abs().sum(dim=0).float().cpu()

    handles = [
        lm.network.get_submodule(layer.out.removesuffix(".weight")).register_forward_pre_hook(
            lambda _module, inputs, number=number: add(number, inputs[0])
        )
        for number, layer in enumerate(layers)
    ]
    try:
        for start in range(0, len(examples), _BATCH_ROWS):
            rows = [example.row(lm) for example in examples[start : start + _BATCH_ROWS]]
            batch = collate(rows, int(lm.tokenizer.pad_token_id), lm.device, lift=False)
            mask = batch.mask.bool()
            count += int(mask.sum())
            hidden_states(lm.network, batch)
    finally:
        for handle in handles:
            handle.remove()
    return [total / max(1, count) for total in totals]
