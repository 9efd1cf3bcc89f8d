"""The equations, by hand."""

import math

import pytest
import torch

from patcher.losses import kl_reference_to_patched, response_nll

P = torch.tensor([[0.5, 0.25, 0.25]])
Q = torch.tensor([[0.25, 0.5, 0.25]])
R = torch.tensor([[0.8, 0.1, 0.1]])


def test_kl_of_equal_logits_is_exactly_zero() -> None:
    logits = 30 * torch.randn(50, 97, generator=torch.Generator().manual_seed(0))
    assert torch.equal(kl_reference_to_patched(logits, logits.clone()), torch.zeros(50))


def test_kl_worked_by_hand() -> None:
    # 0.5 ln(0.5/0.25) + 0.25 ln(0.25/0.5) + 0.25 ln(0.25/0.25) = 0.25 ln 2
    assert kl_reference_to_patched(P.log(), Q.log()).item() == pytest.approx(0.25 * math.log(2), abs=1e-6)


def test_kl_weighs_by_the_reference() -> None:
    forward = 0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(0.25 / 0.1)
    backward = 0.8 * math.log(0.8 / 0.5) + 0.2 * math.log(0.1 / 0.25)
    assert kl_reference_to_patched(P.log(), R.log()).item() == pytest.approx(forward, abs=1e-6)
    assert kl_reference_to_patched(R.log(), P.log()).item() == pytest.approx(backward, abs=1e-6)
    assert abs(forward - backward) > 0.02


def test_kl_ignores_a_shift_of_the_logits_and_is_never_negative() -> None:
    generator = torch.Generator().manual_seed(1)
    reference, patched = torch.randn(20, 11, generator=generator), torch.randn(20, 11, generator=generator)
    divergence = kl_reference_to_patched(reference, patched)
    assert (divergence >= 0).all()
    assert torch.allclose(divergence, kl_reference_to_patched(reference + 5, patched - 3), atol=1e-5)


def test_kl_and_nll_of_half_precision_are_computed_in_float32() -> None:
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(2)).bfloat16()
    assert kl_reference_to_patched(logits, logits).dtype == torch.float32
    assert response_nll(logits, torch.zeros(4, dtype=torch.long)).dtype == torch.float32


def test_nll_worked_by_hand() -> None:
    logits = torch.stack([P[0].log(), torch.tensor([0.0, math.log(3.0), float("-inf")])])
    nll = response_nll(logits, torch.tensor([0, 1]))
    assert nll.tolist() == pytest.approx([math.log(2), math.log(4 / 3)], abs=1e-6)


def test_a_wrong_shape_is_refused_while_tests_run() -> None:
    """The shapes in the signatures are checked: this holds the suite's own import hook."""
    with pytest.raises(Exception, match="(?s)beartype|type"):
        response_nll(torch.zeros(3, 5), torch.zeros(4, dtype=torch.long))
