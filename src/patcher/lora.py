"""LoRA layers that are trained inside a model, and what they become: a Patch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from patcher.models import LanguageModel
from patcher.patch import Patch, check_base
from patcher.records import UsageError


@contextmanager
def trainable_lora(
    lm: LanguageModel, *, rank: int, alpha: int, seed: int, start: Patch | None = None
) -> Iterator[None]:
    """Put trainable LoRA layers into every linear layer but the output; they are gone after the block, however it ends.

    `lm.network` itself then computes the patched model. Training goes on from `start`, where there is one.

    Raises:
        UsageError: `start` was made for another base, or has another rank, scale or set of layers.
    """
    if start is not None:
        check_start(start, lm, rank, alpha)
    network = lm.network
    targets = target_layers(network)
    flags = {name: parameter.requires_grad for name, parameter in network.named_parameters()}
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), lora_dropout=0.0, bias="none")
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            LoraModel(network, {"default": config}, "default")
        for parameter in lora_parameters(lm):  # in bfloat16 an optimizer's small steps would be rounded away
            parameter.data = parameter.data.float()
        if start is not None:
            _fill(dict(_lora(network)), start)
        yield
    finally:  # by hand, not by peft's unload(): an interrupt may come before it can
        for name, module in targets.items():
            network.set_submodule(name, module)
        vars(network).pop("peft_config", None)
        network.eval()
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(flags[name])
            parameter.grad = None


def target_layers(network: PreTrainedModel) -> dict[str, nn.Module]:
    """The layers that are trained, by name: linear ones but the output, and no router of experts."""
    head = network.get_output_embeddings()
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head and not name.endswith("router")
    }


def lora_parameters(lm: LanguageModel) -> list[nn.Parameter]:
    """What is trained inside `trainable_lora`."""
    return [parameter for _, parameter in _lora(lm.network)]


class RunningMean:
    """The exponential moving average of what is trained inside `trainable_lora`, over the steps so far.

    One step's weights wander; their mean does so less (Polyak & Juditsky 1992; freed of its start as Adam's moments
    are, arXiv:1412.6980). With a decay of 0 it is the last step's weights.
    """

    def __init__(self, lm: LanguageModel, decay: float) -> None:
        self._parameters, self._decay, self._weight = lora_parameters(lm), decay, 0.0
        self._sums = [torch.zeros_like(parameter) for parameter in self._parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights of the step just made."""
        self._weight = self._decay * self._weight + 1 - self._decay
        for total, parameter in zip(self._sums, self._parameters, strict=True):
            total.mul_(self._decay).add_(parameter, alpha=1 - self._decay)

    @contextmanager
    def inside(self) -> Iterator[None]:
        """The mean in the place of the last step's weights, which are back after the block."""
        last = [parameter.data for parameter in self._parameters]
        try:
            for total, parameter in zip(self._sums, self._parameters, strict=True):
                parameter.data = total / self._weight
            yield
        finally:
            for data, parameter in zip(last, self._parameters, strict=True):
                parameter.data = data


def effective_weight(lm: LanguageModel, name: str) -> Tensor:
    """The weight of that name inside `trainable_lora`, with what its LoRA layer adds; differentiable."""
    layer: Any = lm.network.get_submodule(name.removesuffix(".weight"))
    weight: Tensor = layer.base_layer.weight
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    added: Tensor = layer.scaling["default"] * (up @ down)
    return weight + added.to(weight.dtype)


def _lora(network: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The LoRA layers' parameters, by the names that a patch gives them."""
    named = network.named_parameters()
    return [(name.replace(".default.", "."), parameter) for name, parameter in named if ".lora_" in name]


def check_start(patch: Patch, lm: LanguageModel, rank: int, alpha: int) -> None:
    """Raises UsageError when training at that rank and scale cannot go on from the patch."""
    check_base(patch, lm)
    if (patch.rank, patch.alpha) != (rank, alpha):
        raise UsageError(
            f"the adapter to start from has rank {patch.rank} and alpha {patch.alpha}; expected rank {rank} and alpha "
            f"{alpha}: set them to its own"
        )


def _fill(parameters: dict[str, nn.Parameter], patch: Patch) -> None:
    if patch.tensors.keys() != parameters.keys():
        raise UsageError(
            f"the adapter to start from has {len(patch.tensors)} tensors, expected {len(parameters)}: start from one "
            "of the same layers"
        )
    for name, parameter in parameters.items():
        parameter.data.copy_(patch.tensors[name])


def take_patch(lm: LanguageModel, *, rank: int, alpha: int) -> Patch:
    """Copy the LoRA layers' present values out of the network."""
    tensors = {name: parameter.detach().cpu().clone() for name, parameter in _lora(lm.network)}
    return Patch(tensors, rank, alpha, lm.fingerprint, lm.source)
