"""Tests and intervals that hold at every look: two models on the same items, watched while the
answers come in.

A fixed-sample interval that is looked at again and again excludes the truth far more often than it
says. What is here may be looked at after every item, and stopped at any time for any reason: the
chance that it is ever wrong, over all looks together, is at most ALPHA. Two bets are kept:

**An e-value for "no difference"** (binary scores). Under the null a discordant pair falls either
way with probability 1/2, whatever came before, so a factor 2 q(side) is a fair bet on it where q is
fixed before the pair is seen. With q the predictive share (a + count) / (2 a + n) of a Beta(a, a)
mixture the product is e = 2^n B(a + b, a + c) / B(a, a), n = b + c: a martingale from 1, so that
P(e is ever 1 / alpha or more) <= alpha (Ville 1939; Robbins 1970, Annals of Mathematical Statistics
41, 1397, for mixtures).

**A confidence sequence for the difference** (scores from 0 to 1): the hedged capital process of
Waudby-Smith and Ramdas (2024, "Estimating means of bounded random variables by betting", JRSS B 86,
1, doi 10.1093/jrsssb/qkad009; Theorem 3 with theta = 1/2 and predictable plug-in bets cut at
c = 1/2). For a candidate mean m of x = (1 + candidate - base) / 2 it is max(K+, K-) / 2, where K+
multiplies 1 + min(l, c / m) (x - m) and K- multiplies 1 - min(l, c / (1 - m)) (x - m), with bets l
that look at earlier items only. At the true mean both are martingales from 1. K+ never rises in m
and K- never falls, so what is not rejected is an interval, and one grid over m finds both its ends.

What must hold: items come in an order that says nothing of their scores. Either they are like draws
from a population, or they are a fixed benchmark of N items in random order (`population=N`): then
the mean of x_t given the past is m_t = (N m - sum of the earlier x) / (N - t + 1), which takes m's
place in the bets (their section 5), and the interval, which is about these N items alone, closes on
the truth as t reaches N. The e-value holds there too, where the benchmark has as many discordant
pairs on either side: with n of D drawn, n / 2 + k of them on one side, the next falls there with
probability 1/2 - k / (D - n), so its factor has mean 1 - 4 k^2 / ((2 a + n)(D - n)), at most 1. A
benchmark file's own order is often by topic or difficulty: shuffle it, with a seed.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
from scipy.special import betaln

from driftbook.stats.confidence import ALPHA
from driftbook.stats.words import word_of

SCALE, BET_LIMIT = 100.0, 0.5  # percentage points; c of Waudby-Smith and Ramdas
GRID = np.linspace(0, 1, 2001)  # candidate means of x: steps of 0.1 points of difference
_EPS = 1e-9  # rounding, where a mean is at the end of what is possible
_BLOCK = 512  # items whose capital is held at once, for every mean of the grid


# ---- bets on a coin
def e_values(base_only: np.ndarray, candidate_only: np.ndarray, prior: float = 1.0) -> np.ndarray:
    """The e-value of "no difference" after b pairs that only the base got and c that only the
    candidate got: 2^n B(a + b, a + c) / B(a, a), of the shape that b and c have together.

    `prior` is a of the Beta(a, a) mixture: 1 spreads the bet evenly over all shares, more puts it
    near 1/2, where small effects are.

    Raises:
        ValueError: prior is not positive.
    """
    if not prior > 0:
        raise ValueError(f"prior={prior!r}: the Beta mixture takes a number above 0, such as 1.0")
    b, c = np.asarray(base_only, float), np.asarray(candidate_only, float)
    with np.errstate(over="ignore"):  # infinite evidence is what it says
        return np.exp((b + c) * np.log(2) + betaln(prior + b, prior + c) - betaln(prior, prior))


# ---- bets on a mean
def plug_in_bets(x: np.ndarray, alpha: float = ALPHA) -> np.ndarray:
    """The bet on each x [items], from the items before it: Waudby-Smith and Ramdas's predictable
    plug-in sqrt(2 log(2 / alpha) / (v t log(t + 1))), v the variance so far, with 1/4 on one
    made-up item at 1/2.
    """
    t = np.arange(1, len(x) + 1)
    mean = (0.5 + np.cumsum(x)) / (t + 1)
    variance = (0.25 + np.cumsum((x - mean) ** 2)) / (t + 1)
    before = np.append(0.25, variance[:-1])
    return np.sqrt(2 * np.log(2 / alpha) / (before * t * np.log(t + 1)))


def log_capital(
    x: np.ndarray, means: np.ndarray, alpha: float = ALPHA, population: int | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The logarithms of K+ and K- after each item, for x from 0 to 1 [items]: blocks of [items,
    means], one after the other.

    Infinite is the one that bets against a mean which the rest of the population cannot make up any
    more: K+ where it is too low, K- where it is too high.
    """
    bets, seen = plug_in_bets(x, alpha)[:, None], np.append(0.0, np.cumsum(x))[:-1, None]
    up, down = np.zeros(len(means)), np.zeros(len(means))
    for start in range(0, len(x), _BLOCK):
        at = slice(start, start + _BLOCK)
        own, mean = x[at, None], np.broadcast_to(means, (len(x[at]), len(means)))
        if population is not None:
            mean = (population * means - seen[at]) / (population - np.arange(len(x))[at, None])
        low, high = (np.logical_or.accumulate(out) for out in (mean < -_EPS, mean > 1 + _EPS))
        mean = np.clip(mean, 0.0, 1.0)
        with np.errstate(divide="ignore"):
            above = np.minimum(bets[at], BET_LIMIT / mean) * (own - mean)
            below = np.minimum(bets[at], BET_LIMIT / (1 - mean)) * (mean - own)
        up = np.where(low, np.inf, up + np.cumsum(np.log1p(above), axis=0))
        down = np.where(high, np.inf, down + np.cumsum(np.log1p(below), axis=0))
        yield up, down
        up, down = up[-1], down[-1]


def confidence_sequence(
    x: np.ndarray, alpha: float = ALPHA, population: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The lower and upper ends after each item of an interval for the mean of x (from 0 to 1) that
    holds at all looks together; never wider than at an earlier look.

    The ends lie on GRID, rounded outward. Where nothing is left (under what must hold, with
    probability alpha at most) the last interval that was not empty stays.
    """
    x, level, steps = np.asarray(x, float), np.log(2 / alpha), np.arange(len(GRID))
    low, high = [], []
    for up, down in log_capital(x, GRID, alpha, population):
        low.append(np.where(up >= level, steps, 0).max(1))
        high.append(np.where(down >= level, steps, len(GRID) - 1).min(1))
    low = np.maximum.accumulate(np.concatenate(low))
    high = np.minimum.accumulate(np.concatenate(high))
    kept = np.minimum(np.arange(len(x)), np.flatnonzero(low <= high)[-1])
    return GRID[low[kept]], GRID[high[kept]]


# ---- two models, watched
def monitor(
    base: Sequence[float],
    candidate: Sequence[float],
    margin: float = 3.0,
    looks: Sequence[int] | None = None,
    population: int | None = None,
    higher_is_better: bool = True,
    alpha: float = ALPHA,
) -> pd.DataFrame:
    """What is known after each look at two models' scores of the same items (0 to 1, in the order
    in which they came): a row per look, all of which hold together with probability 1 - `alpha`
    (of which each of several outcomes that are watched together gets a share).

    `looks` are numbers of items, in ascending order (None: after every item); fewer looks lose
    nothing. `population` says that the items are a random order of a fixed benchmark of that size.
    A cluster (a template, a subject) is one item: give its mean.

    Columns: n_items; n_base_only and n_candidate_only, the items on which one scored higher;
    difference, ci_low and ci_high in percentage points, candidate less base; e_value and p (1 over
    the largest e-value so far) of "no difference"; word. The word follows from the interval alone:
    better where it lies beyond 0, preserves where a loss of the margin lies outside it, worse where
    it holds losses only, else cannot tell. For scores that are not all 0 or 1 the e-value is the
    mean of K+ and K- at no difference.

    Raises:
        ValueError: lengths that differ, no items, scores that are null or not from 0 to 1, looks or
            a population that do not fit, a margin that is not above 0.
    """
    own, other = _checked(base, candidate, margin, population)
    looks = _checked_looks(looks, len(own))
    change, x = other - own, (1 + other - own) / 2
    ends = [SCALE * (2 * end - 1) for end in confidence_sequence(x, alpha, population)]
    b, c = np.cumsum(change < 0), np.cumsum(change > 0)
    binary = np.isin([own, other], (0, 1)).all()
    e = e_values(b, c) if binary else _capital_at_no_difference(x, alpha, population)
    found = {
        "n_items": looks,
        "n_base_only": b[looks - 1],
        "n_candidate_only": c[looks - 1],
        "difference": SCALE * np.cumsum(change)[looks - 1] / looks,
        "ci_low": ends[0][looks - 1],
        "ci_high": ends[1][looks - 1],
        "e_value": e[looks - 1],
        "p": np.minimum(1.0, 1 / np.maximum.accumulate(e))[looks - 1],
    }
    frame = pd.DataFrame(found)
    toward = np.sort((1 if higher_is_better else -1) * frame[["ci_low", "ci_high"]], axis=1)
    words = [word_of(low > 0, low > -margin, high < 0) for low, high in toward]
    return frame.assign(word=words)


def _capital_at_no_difference(x: np.ndarray, alpha: float, population: int | None) -> np.ndarray:
    """The mean of K+ and K- after each item, for a mean difference of 0."""
    parts = log_capital(x, np.array([0.5]), alpha, population)
    return np.concatenate([np.exp(np.logaddexp(*part)[:, 0]) / 2 for part in parts])


def _checked(base, candidate, margin: float, population: int | None) -> list[np.ndarray]:
    """The scores of both as numbers; see monitor for what is refused."""
    sides = [
        pd.Series(side).astype("Float64").to_numpy(float, na_value=np.nan)
        for side in (base, candidate)
    ]
    sizes = [len(side) for side in sides]
    if sizes[0] != sizes[1] or not sizes[0]:
        raise ValueError(
            f"{sizes[0]} scores of the base and {sizes[1]} of the candidate: give both"
            " for the same items, in the same order"
        )
    if null := int(sum(np.isnan(side) for side in sides).astype(bool).sum()):
        raise ValueError(
            f"{null} of {sizes[0]} items have no score on one side: leave them out on"
            " both, and say how many they are"
        )
    if any(((side < 0) | (side > 1)).any() for side in sides):
        raise ValueError("scores must lie from 0 to 1: divide a bounded score by its largest value")
    if not margin > 0:
        raise ValueError(f"margin={margin!r}: give percentage points above 0, such as 3.0")
    if population is not None and population < sizes[0]:
        raise ValueError(
            f"population={population}, but {sizes[0]} items were scored: each item of"
            " the benchmark can come once only"
        )
    return sides


def _checked_looks(given: Sequence[int] | None, n: int) -> np.ndarray:
    """The numbers of items at which to look."""
    looks = np.arange(1, n + 1) if given is None else np.asarray(list(given))
    whole = looks.ndim == 1 and len(looks) and np.issubdtype(looks.dtype, np.integer)
    if not whole or looks[0] < 1 or looks[-1] > n or (np.diff(looks) <= 0).any():
        raise ValueError(f"looks must be whole numbers of items in ascending order, from 1 to {n}")
    return looks
