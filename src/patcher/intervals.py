"""Intervals and tests for shares measured on the same prompts before and after."""

import math
from collections.abc import Sequence

from scipy.stats import binomtest

Z95 = 1.959964


def wilson(hits: int, n: int) -> tuple[float, float]:
    """95% interval of a share (Wilson 1927): 0 of 99 still allows 3.7%."""
    interval = binomtest(hits, n).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def paired_interval(before: Sequence[bool], after: Sequence[bool]) -> tuple[float, float]:
    """95% interval of the change of a share on the same prompts (Agresti & Min 2005: half a count in each cell)."""
    n = len(before) + 2
    gained = sum(b < a for b, a in zip(before, after, strict=True)) + 0.5
    lost = sum(b > a for b, a in zip(before, after, strict=True)) + 0.5
    change = (gained - lost) / n
    half = Z95 * math.sqrt(max(0.0, gained + lost - (gained - lost) ** 2 / n)) / n
    return max(-1.0, change - half), min(1.0, change + half)


def mcnemar(before: Sequence[bool], after: Sequence[bool]) -> float:
    """Two-sided exact McNemar p-value of a change on the same prompts."""
    gained = sum(b < a for b, a in zip(before, after, strict=True))
    lost = sum(b > a for b, a in zip(before, after, strict=True))
    return float(binomtest(gained, gained + lost, 0.5).pvalue) if gained + lost else 1.0


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and its 95% normal interval. Raises ValueError for fewer than two values."""
    n = len(values)
    if n < 2:
        raise ValueError(f"an interval needs at least two values, got {n}")
    mean = sum(values) / n
    half = Z95 * math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n)
    return mean, mean - half, mean + half
