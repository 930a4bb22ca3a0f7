"""Intervals over runs and over families of prompts, and how p-values are adjusted."""

from typing import NamedTuple

import numpy as np
from scipy.special import chdtri, ndtr, ndtri, stdtr, stdtridf, stdtrit

from driftbook.stats.confidence import CONFIDENCE, UPPER
from driftbook.stats.influence import Scores

NO_INTERVAL = {"se": None, "ci_low": None, "ci_high": None, "p": None}


# ---- one number
def wilson(k, n, level: float = CONFIDENCE) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper end of Wilson's interval of k in n, as shares; NaN where n is 0."""
    k, n = np.asarray(k, float), np.where(np.asarray(n, float) > 0, n, np.nan).astype(float)
    z = ndtri(0.5 + level / 2)
    centre, half = (k + z**2 / 2) / (n + z**2), z / (n + z**2) * np.sqrt(k * (n - k) / n + z**2 / 4)
    return np.where(k == 0, 0.0 * n, centre - half), np.where(k == n, n / n, centre + half)


def t_interval(value: float, variance: float, df: float) -> dict[str, float | None]:
    """se, interval and p value of a number; all null where nothing varies or df is not positive."""
    if not (variance > 0 and df > 0):
        return dict(NO_INTERVAL)
    se = np.sqrt(variance)
    half, p = stdtrit(df, UPPER) * se, 2 * stdtr(df, -abs(value) / se)
    return {"se": se, "ci_low": value - half, "ci_high": value + half, "p": p}


def interval(value: float, variance: float, below: float, above: float) -> dict[str, float | None]:
    """se, interval and p value of a number whose truth may lie `below` and `above` it; all null
    where there is no spread to estimate them from.

    The degrees of freedom are those that the interval's mean half and the standard error imply
    (see implied_df); p is that of the t test whose interval ends at zero when this one does.
    """
    if not variance > 0 or np.isnan(below):
        return dict(NO_INTERVAL)
    se = np.sqrt(variance)
    df, distance = implied_df((below + above) / 2 / se), below if value > 0 else above
    p = 2 * stdtr(df, -stdtrit(df, UPPER) * abs(value) / distance) if distance > 0 else None
    return {"se": se, "ci_low": value - below, "ci_high": value + above, "p": p}


def implied_df(ratio: float | np.ndarray) -> np.ndarray:
    """The degrees of freedom whose upper quantile of t is this half-length of an interval over its
    standard error; a billion (normal) below the normal quantile.
    """
    ratio, normal = np.asarray(ratio, float), ndtri(UPPER) + 1e-7
    return np.where(ratio > normal, stdtridf(UPPER, np.maximum(ratio, normal)), 1e9)


def inside(found: dict[str, float | None], limits: tuple[float, float]) -> dict[str, float | None]:
    """The interval without what the score cannot be."""
    if found["ci_low"] is None:
        return found
    low, high = max(found["ci_low"], limits[0]), min(found["ci_high"], limits[1])
    return found | {"ci_low": low, "ci_high": high}


def holm(p: np.ndarray) -> np.ndarray:
    """P values adjusted by Holm's method (1979, Scand. J. Stat. 6:65)."""
    order, n = np.argsort(p), len(p)
    stepped = np.minimum(1, np.maximum.accumulate((n - np.arange(n)) * np.asarray(p, float)[order]))
    return stepped[np.argsort(order)]


# ---- runs
class Repetitions(NamedTuple):
    """How runs with equal settings differ, by setting; NaN where a pool has no repetition."""

    setting: np.ndarray  # [runs] number of the setting
    pool: np.ndarray  # [runs] number of the pool
    variance: np.ndarray  # [settings] of the weighted sum, from the spread of repetitions
    noise: np.ndarray  # [settings] the part of it that is noise of run x unit
    run_noise: np.ndarray  # [settings] the noise of a single run
    df: float  # of the sum over settings


def repetitions(
    scores: Scores, runs: np.ndarray, weight: np.ndarray, setting: np.ndarray, pool: np.ndarray
) -> Repetitions:
    """The spread of repetitions, and how much of it comes from units that a run answers differently
    by chance.

    Settings of one method differ in spread as much as methods do, so each has its own; the degrees
    of freedom (Welch, Satterthwaite) pay for that. A setting with one run has the spread of its
    pool. In a contrast the df are at most those of the side that has fewer.
    """
    pools, settings = (np.unique(names, return_inverse=True)[1] for names in (pool, setting))
    influence = scores.influence[runs]
    means = np.stack([influence[settings == one].mean(0) for one in range(settings.max() + 1)])
    square, df = _within(scores.value[runs], settings, pools)
    noise, _ = _spread(scores.clusters.variance(influence - means[settings]), settings, pools)
    total, alone = np.bincount(settings, weight**2), np.bincount(settings) - 1
    variance = total * square
    with np.errstate(invalid="ignore", divide="ignore"):
        welch = variance.sum() ** 2 / (variance**2 / df).sum() if variance.sum() > 0 else np.inf
    sides = [side for side in (weight > 0, weight < 0) if side.any()]
    most = min(welch, *(alone[np.unique(settings[side])].sum() for side in sides))
    df = np.nan if np.isnan(variance).any() else most
    return Repetitions(settings, pools, variance, total * noise, noise, df)


def _within(
    values: np.ndarray, settings: np.ndarray, pools: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """By setting: the variance of its runs, or of the runs within settings of its pool where it has
    one run; and the df.
    """
    means = np.bincount(settings, values) / np.bincount(settings)
    return _spread((values - means[settings]) ** 2, settings, pools)


def _spread(
    squares: np.ndarray, settings: np.ndarray, pools: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The variance of each setting from its runs' squares, or from its pool's where it has one run,
    and its degrees of freedom; NaN where neither has any.
    """
    of = pools[np.unique(settings, return_index=True)[1]]  # the pool of each setting
    own, df = np.bincount(settings, squares), np.bincount(settings) - 1.0
    shared, shared_df = np.bincount(of, own)[of], np.bincount(of, df)[of]
    square = np.where(df > 0, own, shared)
    df = np.where(df > 0, df, np.where(shared_df > 0, shared_df, np.nan))
    return square / df, df


def rate_of(scores: Scores) -> np.ndarray | None:
    """The share in percent behind each run's score; None where the score is no share."""
    return scores.rate if scores.rate is not None or scores.limits != (0.0, 100.0) else scores.value


def over_runs(
    scores: Scores, runs: np.ndarray, weight: np.ndarray, spread: Repetitions
) -> tuple[float, float]:
    """How far below and above the estimate the truth over other runs may lie, leaving the noise of
    run x unit out.

    A share has no symmetric error with few runs near 0 or 100 %. So the runs of a setting are taken
    as normal on the probit scale, where the mean of their shares is pnorm(mu / sqrt(1 + s^2)), and
    the interval is the generalised pivotal one (Weerahandi 1993, JASA 88, 899): mu and s^2 are
    replaced by what normal runs leave possible for them, s^2 less the noise. Shares are (k + 1/2) /
    (n + 1). For scores that are no shares it is the same without the scale, which without noise is
    the t interval. Settings are joined by MOVER, all at the degrees of freedom of their sum.
    """
    if np.isnan(spread.df):
        return np.nan, np.nan
    rate, below, above = rate_of(scores), 0.0, 0.0
    if rate is not None:
        n = np.maximum(scores.n_items[runs] - scores.n_unscored[runs], 1)
        scaled = _probits(rate[runs] / 100, n, spread)
    for one, (variance, noise) in enumerate(zip(spread.variance, spread.noise, strict=True)):
        own = spread.setting == one
        if rate is None:
            low = high = _pivot_distance(variance, noise, spread.df)
        else:
            amount, share = abs(weight[own].sum()), rate[runs][own].mean() / 100
            ends = _share_distances(*(part[one] for part in scaled), own.sum(), share, spread.df)
            low, high = (100 * amount * end for end in ends)
        low, high = (low, high) if weight[own].sum() > 0 else (high, low)
        below, above = np.hypot(below, low), np.hypot(above, high)
    return float(below), float(above)


def _probits(
    share: np.ndarray, n: np.ndarray, spread: Repetitions
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """By setting, on the probit scale: the runs' mean, the variance between them, and the part of
    it that is noise.
    """
    share, setting = (share * n + 0.5) / (n + 1), spread.setting
    y, binomial = ndtri(share), share * (1 - share)
    steeper = np.bincount(setting, binomial * 2 * np.pi * np.exp(y**2))
    steeper = steeper / np.bincount(setting, binomial)
    variance, _ = _within(y, setting, spread.pool)
    mean = np.bincount(setting, y) / np.bincount(setting)
    return mean, variance, spread.run_noise / 1e4 * steeper


def _share_distances(
    middle: float, variance: float, noise: float, n: int, share: float, df: float
) -> tuple[float, float]:
    """How far below and above the mean share of n runs the truth may lie, from the mean and
    variance of their probits.
    """
    chi, z, weights = _pivots(df)
    spread = np.maximum(variance * chi - noise, 0.0)
    shares = ndtr((middle + np.sqrt(spread / n) * z) / np.sqrt(1 + spread))
    low, high = _quantiles(shares, weights, (1 - UPPER, UPPER))
    return max(share - low, 0.0), max(high - share, 0.0)


def _pivots(df: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A grid over df / chi-square [81, 1] and normal [61] pivots, and their joint weights."""
    log, z = np.linspace(*np.log(chdtri(df, [1 - 1e-4, 1e-4])), 81), np.linspace(-4, 4, 61)
    likely = np.exp(df / 2 * (log - log.max()) - (np.exp(log) - np.exp(log.max())) / 2)
    weights = likely[:, None] * np.exp(-(z**2) / 2)
    return (df / np.exp(log))[:, None], z, weights / weights.sum()


def _quantiles(values: np.ndarray, weights: np.ndarray, at: tuple[float, ...]) -> np.ndarray:
    """Quantiles of weighted values."""
    order = np.argsort(values, axis=None)
    steps = weights.ravel()[order]
    return np.interp(at, np.cumsum(steps) - steps / 2, values.ravel()[order])


def _pivot_distance(variance: float, noise: float, df: float) -> float:
    """Half the pivotal interval of a normal mean with this estimated variance less the noise."""
    if noise == 0 or variance == 0:
        return stdtrit(df, UPPER) * np.sqrt(variance)
    chi, z, weights = _pivots(df)
    distances = np.sqrt(np.maximum(variance * chi - noise, 0.0)) * z
    return float(_quantiles(distances, weights, (UPPER,))[0])
