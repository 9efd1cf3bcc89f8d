"""Is a request harmful? A linear probe on the model's own middle layer, fitted on the bundled requests.

Only the verdict asks, and only when no words explain a failure: a complied harmful request is an alignment gap, a
complied benign one no failure at all.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from patcher.chat import Prompt, Row, collate, render, user_prompt
from patcher.models import LanguageModel, hidden_states
from patcher.prompts import Prompts
from patcher.records import Message

_RIDGE = 1e-2
_BATCH_ROWS = 32


def fit_harm_probe(lm: LanguageModel, prompts: Prompts) -> Callable[[Sequence[Message]], float]:
    """A function that gives the probability that a conversation's last request is harmful.

    Ridge regression of ±1 on standardised mean hidden states, squashed by a logistic at its own residual scale.
    """
    splits = ("repair", "validation")
    harmful = [row.text for row in prompts.harmful if row.split in splits]
    benign = [row.text for row in (*prompts.benign, *prompts.borderline) if row.split in splits]
    features = _features(lm, [user_prompt(lm.tokenizer, text) for text in (*harmful, *benign)])
    labels = torch.tensor([1.0] * len(harmful) + [-1.0] * len(benign), dtype=features.dtype)
    mean, scale = features.mean(0), features.std(0) + 1e-6
    inputs = (features - mean) / scale
    gram = inputs.T @ inputs / len(inputs)
    gram += _RIDGE * gram.diagonal().mean() * len(gram) ** 0.5 * torch.eye(len(gram), dtype=gram.dtype)
    weights = torch.linalg.solve(gram, inputs.T @ (labels - labels.mean()) / len(inputs))
    offset = labels.mean()

    def harm_frac(messages: Sequence[Message]) -> float:
        feature = _features(lm, [render(lm.tokenizer, messages)])[0]
        return float(torch.sigmoid(4 * (((feature - mean) / scale) @ weights + offset)))

    return harm_frac


@torch.inference_mode()
def _features(lm: LanguageModel, prompts: Sequence[Prompt]) -> Float[Tensor, "N D"]:
    """The middle layer's hidden states, averaged over the last message's own tokens."""
    layers = next(module for module in lm.network.get_decoder().modules() if isinstance(module, torch.nn.ModuleList))
    seen: list[Tensor] = []

    def keep(_module: object, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
        seen.append(output if isinstance(output, Tensor) else output[0])

    handle = layers[len(layers) // 2].register_forward_hook(keep)
    means: list[Tensor] = []
    try:
        for start in range(0, len(prompts), _BATCH_ROWS):
            chunk = prompts[start : start + _BATCH_ROWS]
            batch = collate([Row(prompt.ids, ()) for prompt in chunk], 0, lm.device)
            hidden_states(lm.network, batch)
            states = seen[-1].double().cpu()  # the hook saw the shared prefix first, then the rows
            for index, prompt in enumerate(chunk):
                own = [token - len(batch.prefix_ids) for token in prompt.own_tokens]
                means.append(states[index, [token for token in own if token >= 0]].mean(0))
    finally:
        handle.remove()
    return torch.stack(means)
