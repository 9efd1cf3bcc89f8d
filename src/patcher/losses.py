"""The terms that methods add up; one function per equation.

All take logits (or log-probabilities) at *response* positions only, as `network.response_logits` returns them:
prompts and padding are already gone, so no mask can be forgotten.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional


def response_nll(logits: Float[Tensor, "N V"], targets: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Negative log-likelihood of each response token, in nats. Its sum is Eq. (1) of Gao et al. (2026)."""
    return functional.cross_entropy(logits.float(), targets, reduction="none")


def kl_reference_to_patched(
    reference_logits: Float[Tensor, "N V"], patched_logits: Float[Tensor, "N V"]
) -> Float[Tensor, " N"]:
    """KL(reference ‖ patched) at each response position, in nats; exactly 0 when the logits are equal.

    The forward direction, as in Eqs. (6-7) of Gao et al. (2026): what the reference would say must stay likely.
    """
    reference = functional.log_softmax(reference_logits.float(), dim=-1)
    patched = functional.log_softmax(patched_logits.float(), dim=-1)
    return (reference.exp() * (reference - patched)).sum(-1)


def consistency(states: Sequence[Float[Tensor, "B T D"]], mask: Int[Tensor, "B T"]) -> Float[Tensor, ""]:
    """1 - cos(h_l, h_{l+1}), mean over neighbouring layers and the tokens that are not padding; 0 when all are equal.

    Min et al. (2025), arXiv:2411.12768 (CROW), the layer consistency loss.
    """
    real = mask.bool()
    pairs = zip(states[:-1], states[1:], strict=True)
    return torch.stack(
        [
            (1 - functional.cosine_similarity(low[real].float(), high[real].float(), dim=-1)).mean()
            for low, high in pairs
        ]
    ).mean()
