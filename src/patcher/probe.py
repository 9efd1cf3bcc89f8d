"""A linear probe on a model's own middle layer: the smallest classifier that reads what a model makes of a text."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from patcher.chat import Row, collate
from patcher.layers import decoder_layers
from patcher.memory import chunked
from patcher.models import LanguageModel
from patcher.network import hidden_states

_RIDGE = 1e-2
_BATCH_ROWS = 32


def fit_probe(features: Float[Tensor, "N D"], labels: Sequence[bool]) -> Callable[[Float[Tensor, "M D"]], list[float]]:
    """A function that gives each text's probability of being so labelled.

    Ridge regression of ±1 on standardised features, squashed by a logistic (slope 4).
    """
    targets = torch.tensor([1.0 if label else -1.0 for label in labels], dtype=features.dtype)
    mean, scale = features.mean(0), features.std(0) + 1e-6
    inputs = (features - mean) / scale
    gram = inputs.T @ inputs / len(inputs)
    gram += _RIDGE * gram.diagonal().mean() * len(gram) ** 0.5 * torch.eye(len(gram), dtype=gram.dtype)
    weights = torch.linalg.solve(gram, inputs.T @ (targets - targets.mean()) / len(inputs))
    offset = targets.mean()

    def probability(others: Float[Tensor, "M D"]) -> list[float]:
        return [float(value) for value in torch.sigmoid(4 * (((others - mean) / scale) @ weights + offset))]

    return probability


@torch.no_grad()
def mean_states(lm: LanguageModel, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Float[Tensor, "N D"]:
    """The middle layer's hidden states of each row (token ids, positions), averaged over its positions."""
    layers = decoder_layers(lm.network)
    seen: list[Tensor] = []

    def keep(_module: object, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
        seen.append(output if isinstance(output, Tensor) else output[0])

    handle = layers[len(layers) // 2].register_forward_hook(keep)

    def means_of(chunk: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Tensor]:
        seen.clear()
        rows = [Row(tuple(ids), ()) for ids, _ in chunk]
        hidden_states(lm.network, collate(rows, 0, lm.device, lift=False))  # a position may be in what rows share
        states = seen[-1].cpu().double()  # Apple GPUs have no doubles
        return [states[row, list(places)].mean(0) for row, (_, places) in enumerate(chunk)]

    try:
        return torch.stack([mean for _, means in chunked(rows, _BATCH_ROWS, means_of) for mean in means])
    finally:
        handle.remove()
