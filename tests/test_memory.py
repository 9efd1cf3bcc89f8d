"""What does not fit the device is cut: the results are the same."""

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from patcher.chat import Row
from patcher.defenses import finetune, patcher
from patcher.defenses.patcher.settings import PatcherSettings
from patcher.forward import row_logits, row_states
from patcher.lora import lora_parameters, trainable_lora
from patcher.losses import response_nll
from patcher.memory import chunked, training_in_parts
from patcher.models import LanguageModel, fingerprint
from patcher.symptoms import Detector
from patcher.training import fit, quiet
from test_defenses import EVIDENCE, QUICK, some_refused

ROWS = [Row((1, 5, 6, *range(7, 7 + number)), (10 + number, 11)) for number in range(5)]


def full_above(room: int, lm: LanguageModel) -> list[int]:
    """From now on the model has no memory for more rows than that; returned: how many it was given, each time."""
    given: list[int] = []

    def guard(_module: torch.nn.Module, inputs: Any) -> None:
        given.append(len(inputs[0]))
        if len(inputs[0]) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")

    lm.network.get_input_embeddings().register_forward_pre_hook(guard)
    return given


@pytest.fixture(autouse=True)
def no_guard_stays(tiny: LanguageModel) -> Iterator[None]:
    """The model is shared with other tests."""
    yield
    tiny.network.get_input_embeddings()._forward_pre_hooks.clear()


def test_a_chunk_that_does_not_fit_is_halved() -> None:
    def double(items: Sequence[int]) -> list[int]:
        if len(items) > 2:
            raise torch.OutOfMemoryError
        return [2 * item for item in items]

    found = list(chunked(range(7), 6, double))
    assert [list(chunk) for chunk, _ in found] == [[0], [1], [2], [3], [4], [5], [6]]
    assert [one for _, part in found for one in part] == [0, 2, 4, 6, 8, 10, 12]
    with pytest.raises(torch.OutOfMemoryError):
        list(chunked([1], 4, lambda _items: double([1, 2, 3])))


def test_states_of_halved_chunks_are_the_same(tiny: LanguageModel) -> None:
    whole = row_states(tiny, ROWS)
    given = full_above(2, tiny)
    for one, other in zip(row_states(tiny, ROWS), whole, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    assert max(given) == 5


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_gradient_in_parts_is_the_gradient(tiny: LanguageModel, size: int) -> None:
    def gradients() -> list[torch.Tensor]:
        with trainable_lora(tiny, rank=2, alpha=4, seed=0):
            for number, parameter in enumerate(lora_parameters(tiny)):
                parameter.data += 0.01 * (number % 3)
            logits, targets = row_logits(tiny, ROWS)
            assert targets.tolist() == [token for row in ROWS for token in row.response_ids]
            response_nll(logits, targets).mean().backward()
            return [parameter.grad.clone() for parameter in lora_parameters(tiny) if parameter.grad is not None]

    whole = gradients()
    with training_in_parts(size):
        cut = gradients()
    assert len(cut) == len(whole) > 0
    for one, other in zip(cut, whole, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_a_training_that_does_not_fit_goes_on_in_parts(tiny: LanguageModel) -> None:
    settings = finetune.FinetuneSettings(**QUICK["finetune"], clean_rows=6, harmful_rows=6)
    before = fingerprint(tiny.network)
    given = full_above(3, tiny)
    log = finetune.run(tiny, EVIDENCE, settings, seed=0, on_progress=quiet)
    assert log.steps == settings.max_steps
    assert max(given[-4:]) <= 2  # 12 rows, then 8, 4, 2 at once: the last steps do not try the others again
    assert fingerprint(tiny.network) == before


def test_the_default_repair_goes_on_in_parts_and_does_not_run_out_of_draws(tiny: LanguageModel) -> None:
    """A step that did not fit draws anew, from what was prepared for as many steps as there are."""
    some = replace(EVIDENCE, detector=Detector(some_refused))
    settings = PatcherSettings(**QUICK["patcher"] | {"stop_early": False, "benign_triggered_rows": 2})
    full_above(3, tiny)
    assert patcher.run(tiny, some, settings, seed=0, on_progress=quiet).steps == settings.max_steps


def test_a_try_that_failed_holds_no_memory_during_the_next(tiny: LanguageModel) -> None:
    """Where the gradient was what did not fit, too."""
    tried: list[weakref.ref[torch.Tensor]] = []

    class Full(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, states: torch.Tensor) -> torch.Tensor:
            return states.clone()

        @staticmethod
        def backward(ctx: Any, *_: torch.Tensor) -> torch.Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

    def loss_at(_step: int) -> torch.Tensor:
        assert all(one() is None for one in tried)
        logits, _ = row_logits(tiny, ROWS)
        tried.append(weakref.ref(logits))
        return Full.apply(logits).sum() if len(tried) < 3 else logits.sum()

    with trainable_lora(tiny, rank=2, alpha=4, seed=0):
        fit(tiny, loss_at, finetune.FinetuneSettings(max_steps=1))
    assert len(tried) == 3


def test_a_row_that_does_not_fit_is_an_error(tiny: LanguageModel) -> None:
    before = fingerprint(tiny.network)
    settings = finetune.FinetuneSettings(**QUICK["finetune"])
    full_above(0, tiny)
    with pytest.raises(torch.OutOfMemoryError):
        finetune.run(tiny, EVIDENCE, settings, seed=0, on_progress=quiet)
    assert fingerprint(tiny.network) == before
