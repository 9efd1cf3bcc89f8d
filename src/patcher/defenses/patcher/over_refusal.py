"""Over-refusal as one number: how much likelier than the reference's a benign prompt's answer opens like a refusal.

A repair's over-refusals arise where the reference comes near to refusing, and a mean KL over all prompts hardly sees
them. The first token decides most of it (Qi et al. 2024, arXiv:2406.05946).
"""

from collections import Counter
from collections.abc import Sequence
from itertools import accumulate

import torch
from jaxtyping import Float
from torch import Tensor

from patcher.chat import Row, response_ids
from patcher.defenses.contract import Example
from patcher.forward import BATCH_ROWS, row_logits
from patcher.memory import chunked
from patcher.models import LanguageModel
from patcher.network import logits_of
from patcher.wordings import FIXED_REFUSAL


def refusal_opening(lm: LanguageModel, refused: Sequence[Example]) -> int:
    """The token that most of the reference's refusals open with; a fixed refusal's where it refuses nothing."""
    openings = Counter(example.answer_ids[0] for example in refused).most_common(1)
    return openings[0][0] if openings else response_ids(lm.tokenizer, FIXED_REFUSAL, end=False, limit=1)[0]


@torch.no_grad()
def reference_logprobs(lm: LanguageModel, examples: Sequence[Example], opening: int) -> Float[Tensor, " B"]:
    """The reference's log-probability of that opening, for each example."""
    first = logits_of(lm.network, torch.stack([example.hidden[0] for example in examples]).clone())
    return first.float().log_softmax(-1)[:, opening]


def boundary_thrice(lm: LanguageModel, examples: Sequence[Example], opening: int) -> list[int]:
    """Each example's number, and twice more those of the third that the reference comes nearest to refusing."""
    likely = reference_logprobs(lm, examples, opening).tolist()
    order = sorted(range(len(examples)), key=lambda number: -likely[number])
    return [*range(len(examples)), *2 * order[: (len(examples) + 2) // 3]]


def mean_rise(
    lm: LanguageModel, examples: Sequence[Example], logits: Float[Tensor, "N V"], opening: int
) -> Float[Tensor, ""]:
    """Mean rise of that opening's probability over the examples, reference to `logits` (of all answers' tokens)."""
    starts = [0, *accumulate(len(example.answer_ids) for example in examples[:-1])]
    return (logits[starts].float().softmax(-1)[:, opening] - reference_logprobs(lm, examples, opening).exp()).mean()


@torch.no_grad()
def mean_rise_now(lm: LanguageModel, examples: Sequence[Example], opening: int) -> float:
    """`mean_rise` of the model as it stands, which is run for it; 0 for no examples."""

    def rise_of(chunk: Sequence[Example]) -> float:
        first = [Row(example.prompt_ids, example.answer_ids[:1]) for example in chunk]
        now = row_logits(lm, first)[0].float().softmax(-1)[:, opening]
        return float((now - reference_logprobs(lm, chunk, opening).exp()).sum())

    return sum(rise for _, rise in chunked(examples, BATCH_ROWS, rise_of)) / max(1, len(examples))
