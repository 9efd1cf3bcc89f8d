"""Inside a decoder: its layers, what passes between them, and the channels of their MLPs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from patcher.quantized import is_quantized
from patcher.records import UsageError
from patcher.world import processes


def all_hidden_states(
    network: PreTrainedModel, embeddings: Float[Tensor, "B T D"], mask: Int[Tensor, "B T"]
) -> tuple[Float[Tensor, "B T D"], ...]:
    """The embeddings and what each decoder layer makes of them; the last goes to the output matrix."""
    out = network.get_decoder()(inputs_embeds=embeddings, attention_mask=mask, output_hidden_states=True)
    return cast("tuple[Tensor, ...]", out.hidden_states)


def decoder_layers(network: PreTrainedModel) -> nn.ModuleList:
    """The decoder's layers, first to last. Raises UsageError for a family that keeps them elsewhere."""
    depth = int(network.config.num_hidden_layers)
    for module in network.get_decoder().modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise UsageError(f"{type(network).__name__} has no list of {depth} decoder layers: this method cannot repair it")


@contextmanager
def shifted(
    network: PreTrainedModel, layer: int, shift: Callable[[Float[Tensor, "B T D"]], Float[Tensor, "B T D"]]
) -> Iterator[None]:
    """What the layer of that number puts out goes through `shift` while the block runs."""

    def change(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        return (shift(output[0]), *output[1:]) if isinstance(output, tuple) else shift(output)

    handle = decoder_layers(network)[layer].register_forward_hook(change)
    try:
        yield
    finally:
        handle.remove()


@dataclass(frozen=True)
class Mlp:
    """The channels of one layer's MLP, by the names of the weights that they are made of.

    Channel j is row j of each matrix of `into` (in a fused one, every `size`-th row from j on) and column j of `out`.
    """

    into: tuple[str, ...]
    out: str
    size: int

    def vectors(self, tensors: dict[str, Tensor]) -> Float[Tensor, "C F"]:
        """Each channel's weights in a row, of tensors of these names and shapes."""
        rows = [part for name in self.into for part in tensors[name].split(self.size)]
        return torch.cat([*rows, tensors[self.out].T], dim=1)

    def masks(self, chosen: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """For each weight, which of its entries belong to the channels of those numbers."""
        picked = torch.zeros(self.size, dtype=torch.bool)
        picked[chosen.cpu()] = True
        found = {
            name: picked.repeat(len(tensors[name]) // self.size)[:, None].expand_as(tensors[name]) for name in self.into
        }
        return {**found, self.out: picked.expand_as(tensors[self.out])}


def mlps(network: PreTrainedModel) -> list[Mlp]:
    """The MLP of every decoder layer.

    Raises:
        UsageError: a layer without one plain MLP of linear layers (a mixture of experts, GPT-2's transposed ones), or
            weights that are spread over several processes or held in 8 or 4 bits.
    """
    if is_quantized(network):
        raise UsageError("this method changes channels of the weights: load the model without --dtype 8bit or 4bit")
    if processes() > 1:
        raise UsageError(
            "this method changes channels of the weights, which are spread over several processes here: run it in one, "
            "or use another --defense"
        )
    names = {module: name for name, module in network.named_modules()}
    return [_mlp(layer, names) for layer in decoder_layers(network)]


def _mlp(layer: nn.Module, names: dict[nn.Module, str]) -> Mlp:
    blocks = [child for name, child in layer.named_children() if name in ("mlp", "feed_forward", "ffn")]
    linears = [module for block in blocks for module in block.modules() if isinstance(module, nn.Linear)]
    matrices = sum(weight.ndim > 1 for block in blocks for weight in block.parameters())
    if linears and matrices == len(linears):  # a router's and fused experts' are no linear layer's
        *into, out = linears
        size = out.in_features
        if into and all(one.out_features % size == 0 and one.in_features == out.out_features for one in into):
            return Mlp(tuple(f"{names[one]}.weight" for one in into), f"{names[out]}.weight", size)
    raise UsageError(
        f"{names[layer]} has no MLP of two or three linear layers, whose channels this method changes: "
        "use another --defense"
    )


def reset_channels(
    network: PreTrainedModel, layers: Sequence[Mlp], chosen: Sequence[Tensor], draw: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """The weights that hold the channels of those numbers, with their entries drawn anew; nothing is changed in place.

    `draw` gives values of its argument's shape, float32 on the CPU.
    """
    changed = {}
    for layer, numbers in zip(layers, chosen, strict=True):
        weights = {name: network.get_parameter(name).detach() for name in (*layer.into, layer.out)}
        for name, mask in layer.masks(numbers, weights).items() if len(numbers) else ():
            old = weights[name].float().cpu()
            changed[name] = torch.where(mask, draw(old), old).to(weights[name].dtype)
    return changed
