"""Intervals and tests for shares measured on the same prompts before and after."""

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence

import numpy
from scipy.optimize import brentq
from scipy.stats import binomtest

Z95 = 1.959964
_DRAWS = 20_000
_TINY = 1e-9


def design_effect(values: Sequence[float], clusters: Sequence[Hashable]) -> float:
    """How many times the variance of a mean grows because the values of a cluster go together; at least 1 (Kish 1965).

    Phrasings of one act are answered alike, so that six of them say less than six acts would: clustered standard
    errors (Miller 2024, arXiv:2411.00640). Values that are all the same tell nothing of it: 1.
    """
    n, mean = len(values), sum(values) / max(1, len(values))
    sums: dict[Hashable, float] = defaultdict(float)
    for value, cluster in zip(values, clusters, strict=True):
        sums[cluster] += value - mean
    spread = sum((value - mean) ** 2 for value in values)
    count = len(sums)
    if count < 2 or spread == 0:
        return 1.0
    clustered = count / (count - 1) * sum(total**2 for total in sums.values()) / n
    return max(1.0, clustered / (spread / (n - 1)))


def wilson(hits: int, n: int, effect: float = 1.0) -> tuple[float, float]:
    """95% interval of a share (Wilson 1927): 0 of 99 still allows 3.7%. `effect`: the design effect."""
    share, worth = hits / n, n / effect
    square = Z95**2 / worth
    centre = (share + square / 2) / (1 + square)
    half = Z95 * math.sqrt(share * (1 - share) / worth + square / (4 * worth)) / (1 + square)
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_interval(before: Sequence[bool], after: Sequence[bool], effect: float = 1.0) -> tuple[float, float]:
    """95% interval of the change of a share on the same prompts (Agresti & Min 2005: half a count in each cell)."""
    return pooled_interval([float(now) - float(was) for was, now in zip(before, after, strict=True)], effect)


def pooled_interval(changes: Sequence[float], effect: float = 1.0) -> tuple[float, float]:
    """95% interval of the mean of each prompt's change, itself a mean over seeds; with one seed, `paired_interval`.

    It is about other prompts, with these seeds: what another seed would bring, the seeds' own means show.
    """
    n, total = len(changes) + 2, sum(changes)
    spread = sum(change**2 for change in changes) + 1.0 - total**2 / n
    half = Z95 * math.sqrt(effect * max(0.0, spread)) / n
    return max(-1.0, total / n - half), min(1.0, total / n + half)


def mcnemar(before: Sequence[bool], after: Sequence[bool]) -> float:
    """Two-sided exact McNemar p-value of a change on the same prompts, as if no two were alike."""
    gained = sum(b < a for b, a in zip(before, after, strict=True))
    lost = sum(b > a for b, a in zip(before, after, strict=True))
    return float(binomtest(gained, gained + lost, 0.5).pvalue) if gained + lost else 1.0


def mean_interval(values: Sequence[float], effect: float = 1.0) -> tuple[float, float, float]:
    """Mean and its 95% normal interval. Raises ValueError for fewer than two values."""
    n = len(values)
    if n < 2:
        raise ValueError(f"an interval needs at least two values, got {n}")
    mean = sum(values) / n
    half = Z95 * math.sqrt(effect * sum((value - mean) ** 2 for value in values) / (n - 1) / n)
    return mean, mean - half, mean + half


def corrected_share(
    hits: int, n: int, seen: tuple[int, int], false_alarms: tuple[int, int], effect: float = 1.0
) -> tuple[float, float, float]:
    """A share measured by an imperfect judge, corrected for its known error, with a 95% interval.

    (p - f) / (s - f), with s the judge's sensitivity and f its false-alarm rate, each (count, of how many people
    labelled), cut to 0-1 (Rogan & Gladen 1978, doi:10.1093/oxfordjournals.aje.a112510). The interval takes all three to
    be uncertain: percentiles over draws from their Jeffreys posteriors, seed 0.

    Raises:
        ValueError: the judge calls as many of the others so as of those that are: nothing can be corrected.
    """
    s, f = (count / of for count, of in (seen, false_alarms))
    if s <= f:
        raise ValueError(f"a judge with sensitivity {s:.2f} and false alarms {f:.2f} tells nothing apart")
    rng = numpy.random.default_rng(0)

    def drawn(count: float | int, of: float | int) -> numpy.ndarray:
        return rng.beta(count + 0.5, of - count + 0.5, _DRAWS)

    shares, sensitivity, alarms = drawn(hits / effect, n / effect), drawn(*seen), drawn(*false_alarms)
    apart = sensitivity > alarms
    corrected = numpy.clip((shares - alarms)[apart] / (sensitivity - alarms)[apart], 0.0, 1.0)
    low, high = numpy.quantile(corrected, (0.025, 0.975))
    return min(1.0, max(0.0, (hits / n - f) / (s - f))), float(low), float(high)


def auroc(positives: Sequence[float], negatives: Sequence[float]) -> tuple[float, float, float]:
    """How often a positive's score is above a negative's (a tie counts half), and its 95% interval.

    Newcombe (2006), Statistics in Medicine 25:559, method 5: the interval holds each θ from which the measured share is
    1.96 standard errors away or less, so that a perfect separation of a few models still says how few they are.

    Raises:
        ValueError: one side is empty.
    """
    m, n = len(positives), len(negatives)
    if not m or not n:
        raise ValueError(f"an AUROC needs scores of both kinds, got {m} and {n}")
    found = sum((a > b) + 0.5 * (a == b) for a in positives for b in negatives) / (m * n)

    def excess(theta: float) -> float:
        """Squared distance from `found`, less 1.96 squared standard errors."""
        others = (m + n) / 2 - 1
        factor = 1 + others * ((1 - theta) / (2 - theta) + theta / (1 + theta))
        return (found - theta) ** 2 - Z95**2 * theta * (1 - theta) * factor / (m * n)

    low = float(brentq(excess, 0.0, found - _TINY)) if found > 0 else 0.0
    high = float(brentq(excess, found + _TINY, 1.0)) if found < 1 else 1.0
    return found, low, high
