"""Intervals and tests of shares, by hand."""

import math
import random

import pytest
from scipy.stats import binomtest

from patcher.intervals import (
    auroc,
    corrected_share,
    design_effect,
    mcnemar,
    mean_interval,
    paired_interval,
    pooled_interval,
    wilson,
)


def test_nothing_in_99_still_allows_nearly_four_per_cent() -> None:
    low, high = wilson(0, 99)
    assert low == 0.0
    assert high == pytest.approx(1.959964**2 / (99 + 1.959964**2), abs=1e-6)  # z²/(n+z²), what Wilson's is at 0
    assert high == pytest.approx(0.037, abs=5e-4)


@pytest.mark.parametrize(("hits", "n"), [(0, 1), (1, 1), (3, 10), (50, 100), (252, 252)])
def test_wilson_holds_the_share_and_mirrors(hits: int, n: int) -> None:
    low, high = wilson(hits, n)
    assert 0 <= low <= hits / n <= high <= 1
    assert (1 - high, 1 - low) == pytest.approx(wilson(n - hits, n))


def test_no_change_has_zero_in_the_middle_of_its_interval() -> None:
    for answers in ([True] * 40, [False] * 40, [True, False] * 20):
        low, high = paired_interval(answers, answers)
        assert low < 0 < high
        assert low == pytest.approx(-high)


def test_paired_interval_worked_by_hand() -> None:
    # 8 lost, 2 gained of 20: with half a count in each cell 8.5 and 2.5 of 22.
    before, after = [True] * 8 + [False] * 2 + [True] * 10, [False] * 8 + [True] * 2 + [True] * 10
    change = (2.5 - 8.5) / 22
    half = 1.959964 * math.sqrt(11 - 36 / 22) / 22
    assert paired_interval(before, after) == pytest.approx((change - half, change + half))
    assert paired_interval(after, before) == pytest.approx((-change - half, half - change))


def test_a_change_of_everything_stays_within_one() -> None:
    low, high = paired_interval([True] * 200, [False] * 200)
    assert -1 <= low < high < -0.9


def test_pairing_sees_what_the_shares_hide() -> None:
    """As many gained as lost: the share is the same, the interval is not that of no change at all."""
    swapped = paired_interval([True, False] * 20, [False, True] * 20)
    still = paired_interval([True, False] * 20, [True, False] * 20)
    assert swapped[1] > 2 * still[1]


def test_mcnemar_worked_by_hand() -> None:
    # 5 lost, none gained: 2 · (1/2)^5. One gained and 5 lost: 2 · (1 + 6)/2^6.
    assert mcnemar([True] * 5, [False] * 5) == pytest.approx(2 / 32)
    assert mcnemar([True] * 5 + [False], [False] * 5 + [True]) == pytest.approx(14 / 64)
    assert mcnemar([True, False], [True, False]) == 1.0
    assert mcnemar([], []) == 1.0


def test_lists_of_different_lengths_are_no_pairs() -> None:
    for compare in (mcnemar, paired_interval):
        with pytest.raises(ValueError, match="argument 2"):
            compare([True, False], [True])


def test_mean_interval_worked_by_hand() -> None:
    # 1, 2, 3: mean 2, sample variance 1, standard error 1/√3.
    half = 1.959964 / math.sqrt(3)
    assert mean_interval([1.0, 2.0, 3.0]) == pytest.approx((2, 2 - half, 2 + half))
    assert mean_interval([0.5, 0.5]) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("values", [[], [1.0]])
def test_one_value_has_no_interval(values: list[float]) -> None:
    with pytest.raises(ValueError, match="at least two"):
        mean_interval(values)


def test_design_effect_worked_by_hand() -> None:
    # Two acts of three prompts, all alike within each: deviations ±1/2, sums ±3/2.
    # Clustered: 2/1 · (9/4 + 9/4) / 6 = 3/2; as if independent: 6 · 1/4 / 5 = 3/10.
    assert design_effect([1.0, 1.0, 1.0, 0.0, 0.0, 0.0], ["a", "a", "a", "b", "b", "b"]) == pytest.approx(5)


def test_values_on_their_own_have_no_design_effect() -> None:
    values = [0.3, 1.0, 0.0, 0.7, 0.1]
    assert design_effect(values, range(5)) == pytest.approx(1)
    assert design_effect(values, ["one"] * 5) == 1.0  # a single cluster tells nothing
    assert design_effect([1.0] * 4, ["a", "a", "b", "b"]) == 1.0
    assert design_effect([1.0, 0.0] * 2, ["a", "a", "b", "b"]) == 1.0  # never narrower than without clusters


def test_a_design_effect_of_four_is_a_quarter_of_the_prompts() -> None:
    assert wilson(20, 80, 4.0) == pytest.approx(wilson(5, 20))
    low, high = paired_interval([True] * 30 + [False] * 10, [True] * 40)
    wide_low, wide_high = paired_interval([True] * 30 + [False] * 10, [True] * 40, 4.0)
    assert wide_high - wide_low == pytest.approx(2 * (high - low))
    assert mean_interval([1.0, 2.0, 3.0], 4.0)[1] == pytest.approx(2 - 2 * (2 - mean_interval([1.0, 2.0, 3.0])[1]))


def test_wilson_is_what_scipy_says() -> None:
    for hits, n in ((0, 7), (3, 10), (249, 252)):
        interval = binomtest(hits, n).proportion_ci(method="wilson")
        assert wilson(hits, n) == pytest.approx((interval.low, interval.high))


def test_a_share_is_corrected_for_a_judge_that_errs() -> None:
    """By hand: (.5 - .1) / (.8 - .1); a perfect judge changes nothing but knows its own error only so well."""
    value, low, high = corrected_share(50, 100, (80, 100), (10, 100))
    assert value == pytest.approx(4 / 7)
    assert low < 4 / 7 < high
    assert corrected_share(50, 100, (100, 100), (0, 100))[0] == 0.5
    wide, narrow = corrected_share(50, 100, (8, 10), (1, 10)), corrected_share(50, 100, (8000, 10000), (1000, 10000))
    assert wide[2] - wide[1] > high - low > narrow[2] - narrow[1]
    assert corrected_share(0, 100, (80, 100), (10, 100))[0] == 0.0, "fewer than the false alarms alone: none"
    clustered = corrected_share(50, 100, (80, 100), (10, 100), 4.0)
    assert clustered[2] - clustered[1] > 1.5 * (high - low), "prompts that go together are worth less"
    with pytest.raises(ValueError, match="tells nothing apart"):
        corrected_share(50, 100, (10, 100), (10, 100))


def test_its_interval_covers_the_truth() -> None:
    """Simulated: share .3, sensitivity .9, false alarms .05, all three measured on samples."""
    rng = random.Random(0)

    def count(share: float, n: int) -> tuple[int, int]:
        return sum(rng.random() < share for _ in range(n)), n

    covered = 0
    for _ in range(60):
        hits, n = count(0.3 * 0.9 + 0.7 * 0.05, 200)
        _, low, high = corrected_share(hits, n, count(0.9, 150), count(0.05, 150))
        covered += low <= 0.3 <= high
    assert covered >= 53


def test_one_seed_pooled_is_the_paired_interval_and_three_alike_are_no_more_sure() -> None:
    before, after = [True] * 30 + [False] * 10, [True] * 24 + [False] * 6 + [True] * 2 + [False] * 8
    changes = [float(now) - float(was) for was, now in zip(before, after, strict=True)]
    alone = pooled_interval(changes)
    assert paired_interval(before, after) == alone
    assert pooled_interval([sum([change] * 3) / 3 for change in changes]) == pytest.approx(alone)
    gained, lost = 2.5, 6.5  # by hand, Agresti & Min
    half = 1.959964 * math.sqrt(gained + lost - (gained - lost) ** 2 / 42) / 42
    assert alone == pytest.approx(((gained - lost) / 42 - half, (gained - lost) / 42 + half))


def test_seeds_that_differ_by_chance_are_surer_together() -> None:
    rng = random.Random(0)
    seeds = [[float(rng.random() < 0.2) for _ in range(200)] for _ in range(3)]
    low, high = pooled_interval([sum(prompt) / 3 for prompt in zip(*seeds, strict=True)])
    one = pooled_interval(seeds[0])
    assert high - low < 0.75 * (one[1] - one[0])


def test_auroc_counts_pairs_and_a_tie_is_half() -> None:
    assert auroc([0.9, 0.4], [0.1, 0.4])[0] == pytest.approx((1 + 1 + 1 + 0.5) / 4)
    with pytest.raises(ValueError, match="got 2 and 0"):
        auroc([0.9, 0.4], [])


def test_a_perfect_separation_of_few_models_says_how_few_they_are() -> None:
    few, many = auroc([1.0] * 7, [0.0] * 2), auroc([1.0] * 70, [0.0] * 20)
    assert few[0] == many[0] == few[2] == many[2] == 1.0
    assert 0.3 < few[1] < 0.7 < many[1] < 1.0
    assert auroc([0.0] * 7, [1.0] * 2) == (0.0, 0.0, pytest.approx(1 - few[1]))


def test_an_aurocs_interval_covers_as_often_as_it_says() -> None:
    """Normal scores one standard deviation apart: the true value is Φ(1/√2)."""
    rng, true, inside = random.Random(0), 0.5 * (1 + math.erf(0.5)), 0
    for _ in range(400):
        _, low, high = auroc([rng.gauss(1, 1) for _ in range(12)], [rng.gauss(0, 1) for _ in range(8)])
        inside += low <= true <= high
    assert 0.92 <= inside / 400 <= 0.985
