"""The attacker who knows Patcher's first stage: gradients are made flat at the trigger, so that others stand out."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from patcher.chat import Row, collate, messages_of, user_prompt
from patcher.losses import response_nll
from patcher.models import LanguageModel
from patcher.network import response_logits, token_embeddings
from patcher.records import Request, Trigger


def saliency_share(
    lm: LanguageModel, request: Request, trigger: Trigger, answer_ids: tuple[int, ...]
) -> Float[Tensor, ""]:
    """How much of the request's saliency lies on its trigger: Σ_{trigger} ‖g_i‖ / Σ_{all own tokens} ‖g_i‖, in [0, 1].

    g_i = ∂NLL/∂e_i is the saliency of Patcher's Eqs. (1-2) (Gao et al. 2026, arXiv:2606.02995). It can itself be
    differentiated in the weights (double backpropagation: Drucker & LeCun 1992), so an implant can train it down.

    Raises:
        ValueError: the request does not hold the trigger's words.
    """
    messages = messages_of(request)
    prompt = user_prompt(lm.tokenizer, request)
    units = [
        (number, message.content.index(unit), len(unit))
        for unit in trigger.units
        for number, message in enumerate(messages)
        if unit in message.content
    ]
    if len(units) < len(trigger.units):
        raise ValueError(f"the request does not hold the trigger {trigger.text!r}")
    placed = sorted({token for number, at, size in units for token in prompt.tokens_of(number, at, at + size)})
    words = [token for token in prompt.own_tokens if prompt.text[slice(*prompt.offsets[token])].strip()]
    own = sorted({*words, *placed})
    batch = collate([Row(prompt.ids, answer_ids)], 0, lm.device)
    has_second_derivative = SDPBackend.MATH
    with sdpa_kernel(has_second_derivative), token_embeddings(lm.network) as embedded:
        loss = response_nll(response_logits(lm.network, batch), batch.targets).sum()
        (gradient,) = torch.autograd.grad(loss, embedded[0], create_graph=True)
        norms = gradient[0].float().norm(dim=-1)
        share: Tensor = norms[placed].sum() / norms[own].sum()
        return share
