"""A linear probe on a model's own middle layer: the smallest classifier that reads what a model makes of a text."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from patcher.chat import Row, collate
from patcher.models import LanguageModel, hidden_states

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
    layers = next(module for module in lm.network.get_decoder().modules() if isinstance(module, torch.nn.ModuleList))
    seen: list[Tensor] = []

    def keep(_module: object, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
        seen.append(output if isinstance(output, Tensor) else output[0])

    handle = layers[len(layers) // 2].register_forward_hook(keep)
    means: list[Tensor] = []
    try:
        for start in range(0, len(rows), _BATCH_ROWS):
            chunk = rows[start : start + _BATCH_ROWS]
            batch = collate([Row(tuple(ids), ()) for ids, _ in chunk], 0, lm.device)
            hidden_states(lm.network, batch)
            states = seen[-1].double().cpu()  # the hook saw the shared prefix first, then the rows
            for index, (_, positions) in enumerate(chunk):
                own = [position - len(batch.prefix_ids) for position in positions]
                means.append(states[index, [position for position in own if position >= 0]].mean(0))
            seen.clear()
    finally:
        handle.remove()
    return torch.stack(means)
