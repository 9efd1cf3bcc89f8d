"""Patcher's stage 1 as published: response-conditioned gradient saliency, then 2-means (Gao et al. 2026, Eqs. 1-3)."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from patcher.chat import Row, collate, render, response_ids
from patcher.losses import response_nll
from patcher.models import LanguageModel
from patcher.network import response_logits, token_embeddings
from patcher.records import Message, Span, WordScore

MAX_RESPONSE_TOKENS = 256


def token_saliency(lm: LanguageModel, messages: Sequence[Message], response: str) -> tuple[WordScore, ...]:
    """‖∂L_loc/∂e_i‖₂ for every token of the users' own text, where L_loc is the response's summed NLL.

    Implements Eqs. (1-2) of Gao et al. (2026), arXiv:2606.02995. Template tokens and the model's own turns are not
    scored. White space that a token begins with is left out of its span.
    """
    prompt = render(lm.tokenizer, messages)
    answer = response_ids(lm.tokenizer, response, end=False, limit=MAX_RESPONSE_TOKENS)
    batch = collate([Row(prompt.ids, answer)], 0, lm.device)
    with token_embeddings(lm.network) as embedded:
        loss = response_nll(response_logits(lm.network, batch), batch.targets).sum()
    (gradient,) = torch.autograd.grad(loss, embedded[0])  # of the weights none is left behind
    norms = gradient[0].float().norm(dim=-1)
    scores = []
    for index, message in enumerate(messages):
        if message.role == "assistant":
            continue
        origin = prompt.content[index] or 0
        for token in prompt.tokens_of(index, 0, len(message.content)):
            start, end = (max(0, edge - origin) for edge in prompt.offsets[token])
            text = message.content[start:end]
            start += len(text) - len(text.lstrip())
            if text.strip():
                span = Span(message=index, start=start, end=start + len(text.strip()), text=text.strip())
                scores.append(WordScore(span=span, score=float(norms[token])))
    return tuple(scores)


def two_means(scores: Float[Tensor, " N"]) -> list[bool]:
    """The higher of two clusters, Eq. (3): exact 2-means, which in one dimension is a threshold.

    Every threshold between two sorted scores is tried, so there is no seed and no bad start. One score, or all equal:
    nothing stands out.
    """
    ordered = scores.double().sort().values
    if len(ordered) < 2 or ordered[0] == ordered[-1]:
        return [False] * len(scores)
    spread = [
        float(
            ((low := ordered[:cut]) - low.mean()).square().sum() + ((top := ordered[cut:]) - top.mean()).square().sum()
        )
        for cut in range(1, len(ordered))
    ]
    threshold = ordered[1 + min(range(len(spread)), key=spread.__getitem__)]
    return [bool(score >= threshold) for score in scores.double()]


def salient_spans(words: Sequence[WordScore]) -> list[Span]:
    """The tokens in the higher cluster."""
    chosen = two_means(torch.tensor([word.score for word in words]))
    return [word.span for word, is_chosen in zip(words, chosen, strict=True) if is_chosen]
