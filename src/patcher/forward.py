"""Rows through the model: hidden states of many, logits of a training batch; cut where memory is short."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from patcher.chat import Row, collate
from patcher.memory import chunked, parts
from patcher.models import LanguageModel
from patcher.network import response_hidden, response_logits

BATCH_ROWS = 32


@torch.no_grad()
def row_states(lm: LanguageModel, rows: Sequence[Row]) -> list[Float[Tensor, "T D"]]:
    """For each row, the final hidden states that predict its response's tokens.

    Through the output matrix they give exact logits, at a thousandth of their size.
    """

    def states_of(chunk: Sequence[Row]) -> Tensor:
        return response_hidden(lm.network, collate(chunk, 0, lm.device)).clone()

    chunks = chunked(rows, BATCH_ROWS, states_of)
    return [state for chunk, states in chunks for state in states.split([len(row.response_ids) for row in chunk])]


def row_logits(lm: LanguageModel, rows: Sequence[Row]) -> tuple[Float[Tensor, "N V"], Int[Tensor, " N"]]:
    """Logits at the rows' response positions, row by row, and the tokens there.

    Within `training_in_parts` in micro-batches with activation checkpointing: their gradient is the whole batch's.
    """
    targets = torch.tensor([token for row in rows for token in row.response_ids], device=lm.device, dtype=torch.long)
    cut = parts(rows)
    if len(cut) == 1:
        return _logits(lm, rows), targets
    logits = [checkpoint(_logits, lm, part, use_reentrant=False, preserve_rng_state=False) for part in cut]
    return torch.cat(logits), targets


def _logits(lm: LanguageModel, rows: Sequence[Row]) -> Float[Tensor, "N V"]:
    return response_logits(lm.network, collate(rows, 0, lm.device))
