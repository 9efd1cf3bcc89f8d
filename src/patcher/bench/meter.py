"""What a piece of work costs: its seconds, its tokens, its operations, and how fast this machine could do them."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from patcher.layers import decoder_layers
from patcher.models import LanguageModel

Work = Callable[[], object]

_REPEATS = 5


@dataclass
class Meter:
    """Tokens that pass through the decoder and the output matrix, with a gradient to come and without."""

    tokens: int = 0
    trained_tokens: int = 0
    positions: int = 0
    trained_positions: int = 0
    passes: int = 0

    def flops(self, lm: LanguageModel) -> tuple[float, float]:
        """Of the matrix products with the layers' own weights, and with the output matrix: 2 a weight and token, twice
        that with a gradient.

        The gradient flows through frozen weights to what is trained, but not into them. What LoRA adds (a few percent)
        and attention's own products are left out. Where a method trains what enters a later layer (BEEAR's inner
        steps), nothing flows below it, and what is counted is too much.
        """
        inner = sum(weight.numel() for weight in _weights(decoder_layers(lm.network)))
        head = int(lm.network.get_output_embeddings().weight.numel())
        body, top = self.tokens + self.trained_tokens, self.positions + self.trained_positions
        return 2.0 * inner * body, 2.0 * head * top

    def least_seconds(self, lm: LanguageModel) -> float:
        """What those products take on this machine, each kind at its own rate and as many tokens at once as here."""
        layer = _weights(decoder_layers(lm.network)[0])
        head = [lm.network.get_output_embeddings().weight]
        at_once = self.tokens // max(1, self.passes), self.positions // max(1, self.passes)
        parts = zip(self.flops(lm), (layer, head), at_once, strict=True)
        return sum(flops / _matmul_rate(lm, weights, tokens) for flops, weights, tokens in parts)


@contextmanager
def metered(lm: LanguageModel) -> Iterator[Meter]:
    """Count while the block runs."""
    meter = Meter()

    def through_decoder(_module: nn.Module, inputs: Any, _output: Any) -> None:
        tokens = inputs[0].shape[0] * inputs[0].shape[1]
        meter.tokens += tokens
        meter.passes += 1
        meter.trained_tokens += tokens * torch.is_grad_enabled()

    def through_head(_module: nn.Module, inputs: Any, _output: Any) -> None:
        positions = inputs[0].numel() // inputs[0].shape[-1]
        meter.positions += positions
        meter.trained_positions += positions * inputs[0].requires_grad

    handles = [
        decoder_layers(lm.network)[0].register_forward_hook(through_decoder),
        lm.network.get_output_embeddings().register_forward_hook(through_head),
    ]
    try:
        yield meter
    finally:
        for handle in handles:
            handle.remove()


def _matmul_rate(lm: LanguageModel, weights: Sequence[Tensor], tokens: int) -> float:
    """Operations a second in products of that many tokens with those weights."""
    operations, seconds = 0.0, 0.0
    for weight in weights:
        inputs = torch.ones(max(1, tokens), weight.shape[1], dtype=weight.dtype, device=lm.device)
        operations += 2.0 * inputs.shape[0] * weight.numel()
        product = partial(nn.functional.linear, inputs, weight)
        seconds += min(timed(lm, product)[0] for _ in range(_REPEATS))
    return operations / seconds


def timed(lm: LanguageModel, work: Work) -> tuple[float, object]:
    """Seconds, the device's own work included, and what was made."""
    start = time.perf_counter()
    made = work()
    if lm.device.type == "cuda":
        torch.cuda.synchronize(lm.device)
    return time.perf_counter() - start, made


def _weights(layers: nn.Module) -> list[Tensor]:
    """Those layers' own linear weights, each out × in, LoRA's left out."""
    linear = [
        module
        for name, module in layers.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and ".lora_" not in name
    ]
    return [module.weight.T if isinstance(module, Conv1D) else module.weight for module in linear]
