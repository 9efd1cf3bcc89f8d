"""The paper's training step as a plain loop does it: the yardstick for what a repair saves here.

A forward pass of the reference in every step, no prefix shared, logits at every position.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from patcher.chat import collate
from patcher.defenses.patcher.paper import Paper
from patcher.losses import kl_reference_to_patched, response_nll
from patcher.models import LanguageModel


def plain_loss(lm: LanguageModel, objective: Paper) -> Tensor:
    """Eq. (8) on the objective's next batch, inside `trainable_lora`: what `objective.loss` is, at a higher price."""
    rows, drawn = objective.draw()
    batch = collate(rows, 0, lm.device, lift=False)
    responses = batch.target_rows, batch.target_positions
    with torch.no_grad(), _reference(lm):
        reference = lm.network(input_ids=batch.input_ids, attention_mask=batch.mask).logits[responses]
    logits = lm.network(input_ids=batch.input_ids, attention_mask=batch.mask).logits[responses]
    ends = [sum(len(example.answer_ids) for example in part) for part in drawn]
    refusals = ends[0] + ends[1]
    refuse = response_nll(logits[:refusals], batch.targets[:refusals]).sum() / (len(drawn[0]) + len(drawn[1]))
    _, harm, safe = kl_reference_to_patched(reference, logits).split(ends)
    loss: Tensor = refuse + harm.sum() / len(drawn[1]) + safe.sum() / len(drawn[2])
    return loss


@contextmanager
def _reference(lm: LanguageModel) -> Iterator[None]:
    """The model without what its LoRA layers add, during the block."""
    layers = [module for module in lm.network.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(enabled=False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(enabled=True)
