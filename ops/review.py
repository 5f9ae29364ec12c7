"""What a person's looks at a few samples say of all of them: intervals of proportions, plain and stratified."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import norm

RAREST = 0.02  # a stratum is never planned as if its error rate were nearer 0 or 1 than this


class Rate(NamedTuple):
    """An estimated proportion and its confidence interval, each in [0, 1]."""

    rate: float
    low: float
    high: float


def wilson_interval(errors: float, looked: float, level: float = 0.95) -> Rate:
    """Proportion of errors among samples looked at, with Wilson's score interval.

    Parameters
    ----------
    errors, looked : number
        0 ≤ errors ≤ looked.
    level : float in (0, 1)
        Confidence level, two-sided.

    Returns
    -------
    Rate
        (nan, 0, 1) where nothing was looked at.

    Notes
    -----
    Wilson 1927; recommended over the normal approximation by Brown, Cai and DasGupta 2001.
    With p = errors/n: (p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n).
    """
    _check_level(level)
    if not 0 <= errors <= looked:
        raise ValueError(f"errors {errors}: expected a number in [0, looked = {looked}]")
    if looked == 0:
        return Rate(math.nan, 0.0, 1.0)
    z, p = float(norm.ppf(0.5 + level / 2)), errors / looked
    centre = p + z * z / (2 * looked)
    half = z * math.sqrt(p * (1 - p) / looked + z * z / (4 * looked * looked))
    scale = 1 + z * z / looked
    return Rate(p, max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale))


def stratified_rate(sizes: Sequence[int], errors: Sequence[int], looked: Sequence[int], level: float = 0.95) -> Rate:
    """Error rate of a population from random looks within each of its strata.

    Parameters
    ----------
    sizes : sequence of H int
        Samples of each stratum, the ones not looked at too; at least one of them above 0.
    errors, looked : sequence of H int
        Errors found among the samples looked at, drawn at random within the stratum.
    level : float in (0, 1)

    Returns
    -------
    Rate
        `rate` is Σ W_h p_h with W_h the stratum's share of the population; a stratum not looked at yet counts with the
        middle of what is possible, 0.5, and its interval is [0, 1].

    Notes
    -----
    The stratified estimator of Cochran 1977, eq. 5.1. The interval recovers each stratum's variance from its Wilson
    limits (l_h, u_h), as Zou, Huang and Zhang 2009 do for linear functions of proportions:
    low = rate − √Σ W_h² (p_h − l_h)², high = rate + √Σ W_h² (u_h − p_h)². Unlike the normal approximation it has a width
    where no error was found. No finite population correction: it is conservative when most samples were looked at.
    """
    _check_level(level)
    if not len(sizes) == len(errors) == len(looked):
        raise ValueError(
            f"sizes, errors, looked: {len(sizes)}, {len(errors)}, {len(looked)} strata, expected as many of each"
        )
    total = sum(sizes)
    if total <= 0:
        raise ValueError("sizes: expected a population of at least one sample")
    rate = below = above = 0.0
    for size, wrong, seen in zip(sizes, errors, looked):
        p, low, high = wilson_interval(wrong, seen, level)
        p = 0.5 if seen == 0 else p
        share = size / total
        rate += share * p
        below += (share * (p - low)) ** 2
        above += (share * (high - p)) ** 2
    return Rate(rate, max(0.0, rate - math.sqrt(below)), min(1.0, rate + math.sqrt(above)))


def allocate(sizes: Sequence[int], guesses: Sequence[float], total: int) -> np.ndarray:
    """How many samples to look at in each stratum, so that the estimate varies least.

    Parameters
    ----------
    sizes : sequence of H int
    guesses : sequence of H float in [0, 1]
        What the error rate of each stratum may be; a wrong guess costs precision, not correctness.
    total : int
        Looks in all, at least 0; fewer are planned where the population is smaller.

    Returns
    -------
    looks : ndarray of shape (H,), int64
        At most the stratum's size, at least one where there are samples and `total` allows; their sum is `total` or
        the population.

    Notes
    -----
    Neyman's allocation (Cochran 1977, eq. 5.26): n_h ∝ N_h √(p_h (1 − p_h)).
    """
    population = np.asarray(sizes, np.int64)
    guess = np.clip(np.asarray(guesses, np.float64), RAREST, 1 - RAREST)
    weights = population * np.sqrt(guess * (1 - guess))
    looks = np.zeros(len(population), np.int64)
    for _ in range(min(int(total), int(population.sum()))):
        # The largest deficit first (Sainte-Laguë); strata without a look come before all others.
        open_ = looks < population
        need = np.where(open_, np.where(looks == 0, np.inf, weights / (2 * looks + 1)), -np.inf)
        ties = np.flatnonzero(need == need.max())
        looks[ties[np.argmax(weights[ties])]] += 1
    return looks


def look_order(looks: Sequence[int]) -> np.ndarray:
    """Stratum of each look, in an order whose every beginning is spread over the strata as `looks` is.

    Parameters
    ----------
    looks : sequence of H int

    Returns
    -------
    strata : ndarray of shape (sum of looks,), int64
        Stratum h occurs looks[h] times. The first occurrences of all strata come first, the largest stratum's first.
    """
    strata = np.repeat(np.arange(len(looks)), looks)
    within = np.concatenate([np.arange(count) for count in looks]) if len(looks) else np.empty(0)
    counts = np.asarray(looks, np.float64)[strata]
    place = np.where(within == 0, -1.0, (within + 0.5) / np.maximum(counts, 1))
    return strata[np.lexsort((strata, -counts, place))].astype(np.int64)


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level {level}: expected a number in (0, 1)")
