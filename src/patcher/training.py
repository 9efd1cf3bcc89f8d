"""The one fine-tuning loop - steps, learning rate, clipping, progress, stopping - and the order of its examples."""

import math
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Generic, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from patcher.lora import lora_parameters
from patcher.memory import training_in_parts
from patcher.models import LanguageModel
from patcher.records import PatcherError
from patcher.sharding import agree
from patcher.world import processes

Item = TypeVar("Item")


@runtime_checkable
class Optimization(Protocol):
    """What the loop reads from a method's settings."""

    learning_rate: float
    max_steps: int
    warmup_steps: int
    cosine: bool


Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


def quiet(_what: str, _done: int, _total: int) -> None:
    """No progress shown."""


def fit(
    lm: LanguageModel,
    loss_at: Callable[[int], Tensor],
    settings: Optimization,
    *,
    stop: Callable[[int], str | None] = lambda _step: None,
    on_progress: Progress = quiet,
    what: str = "training",
) -> tuple[int, str]:
    """Train the LoRA layers in `lm.network` with AdamW until `stop` gives a reason or the steps are used up.

    `loss_at(step)` builds a batch and returns its loss; `stop(steps_done)` runs after each step.

    Returns:
        Steps done and why it stopped.

    Raises:
        PatcherError: the loss is not finite.
    """
    optimizer = torch.optim.AdamW(lora_parameters(lm), lr=settings.learning_rate, weight_decay=0.0)

    def factor(step: int) -> float:
        warm = min(1.0, (step + 1) / max(1, settings.warmup_steps))
        done = torch.tensor(step / settings.max_steps)
        return warm * float(0.5 * (1 + torch.cos(torch.pi * done))) if settings.cosine else warm

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    rows: int | None = None
    for step in range(settings.max_steps):
        optimizer.zero_grad(set_to_none=True)
        loss, rows = _backward(lm, loss_at, step, rows)
        if not math.isfinite(loss):
            raise PatcherError(f"{what} diverged at step {step}: the loss is {loss}; lower the learning rate")
        agree(lora_parameters(lm))
        torch.nn.utils.clip_grad_norm_(lora_parameters(lm), 1.0)
        optimizer.step()
        schedule.step()
        on_progress(what, step + 1, settings.max_steps)
        if reason := stop(step + 1):
            return step + 1, reason
    return settings.max_steps, "the step limit was reached"


_FIRST_PART_ROWS = 8


def _backward(
    lm: LanguageModel, loss_at: Callable[[int], Tensor], step: int, rows: int | None
) -> tuple[float, int | None]:
    """Add one batch's gradient; the loss, and in parts of how many rows it was computed.

    What does not fit the device is tried again on the next examples in parts of 8 rows, 4, 2, 1, as `row_logits` cuts
    them.

    Raises:
        torch.OutOfMemoryError: a single row does not fit, or the weights are spread and all processes must go along.
    """
    while True:
        try:
            return _attempt(loss_at, step, rows), rows
        except torch.OutOfMemoryError:
            if rows == 1 or processes() > 1:
                raise
            rows = rows // 2 if rows else _FIRST_PART_ROWS
        for parameter in lora_parameters(lm):
            parameter.grad = None


def _attempt(loss_at: Callable[[int], Tensor], step: int, rows: int | None) -> float:
    """One try. A function of its own: when it fails, the batch's graph goes with its frame, before the next try."""
    with training_in_parts(rows):
        loss = loss_at(step)
    loss.backward()
    return loss.item()


def endless(items: Sequence[Item], rng: Random) -> Iterator[Item]:
    """The items in a fresh random order, again and again. Raises PatcherError when there are none."""
    if not items:
        raise PatcherError(
            "there is nothing to train on: no prompt of the repair split had an answer of the kind needed"
        )
    while True:
        yield from rng.sample(items, len(items))


class Revisited(Generic[Item]):
    """Items in a fresh random order, again and again; every other one is of the eighth that were worst when last seen.

    Most examples are learnt early and teach nothing more; the few at the boundary decide (prioritized replay: Schaul et
    al. 2016, arXiv:1511.05952, here by rank and without their correction of the bias, which is wanted).
    """

    def __init__(self, items: Sequence[Item], rng: Random):
        self._items, self._rng = items, rng
        self._fresh = endless(range(len(items)), rng)
        self._losses: dict[int, float] = {}
        self._drawn: list[int] = []

    def draw(self, count: int) -> list[Item]:
        """The next items."""
        worst = sorted(self._losses, key=lambda number: -self._losses[number])[: max(1, len(self._items) // 8)]
        self._drawn = [
            self._rng.choice(worst) if place % 2 and self._losses else next(self._fresh) for place in range(count)
        ]
        return [self._items[number] for number in self._drawn]

    def saw(self, losses: Sequence[float | None]) -> None:
        """The losses of the items last drawn, in their order; None leaves an item's as it was."""
        seen = zip(self._drawn, losses, strict=True)
        self._losses.update((number, loss) for number, loss in seen if loss is not None)
