"""Intervals over runs and over families of prompts, and how p-values are adjusted."""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.special import betaincinv, chdtri, ndtr, ndtri, stdtr, stdtridf, stdtrit

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


# ---- units
def over_units(
    scores: Scores, runs: np.ndarray, weight: np.ndarray, variance: float
) -> tuple[float, float]:
    """How far below and above the estimate the truth over other units may lie; `variance` is the
    estimate's over units, not below that of its influences.

    A score that is no share has t's half-length. A share near 0 or 1 has no symmetric error, and no
    visible one where nothing moved: the units that rise in the mean of the runs and those that fall
    are two shares of all units, each with share_ends at t's degrees of freedom (as Korn and
    Graubard 1998, Survey Methodology 24, 193), and their difference has MOVER's interval with their
    correlation (Zou and Donner 2008).
    """
    clusters = scores.clusters
    t = stdtrit(clusters.df, UPPER)
    if scores.counted is None:
        return (float(t * np.sqrt(variance)),) * 2
    moved, asked = np.tensordot(weight, scores.counted[:, runs], (0, 1))
    asked = np.abs(weight) @ scores.counted[1, runs] / np.abs(weight).sum()
    parts = np.stack([np.maximum(moved, 0.0), np.maximum(-moved, 0.0)])
    total, w = parts.sum(1), clusters.largest(asked)
    lines = parts - total[:, None] * asked
    *each, both = clusters.variance(np.vstack([lines, lines[0] - lines[1]]))
    together = np.sqrt(each[0] * each[1])
    r = np.clip((each[0] + each[1] - both) / (2 * together), -1, 1) if together > 0 else 0.0
    more = max(variance / 1e4 - both, 0.0) / 2
    inflate = (t / ndtri(UPPER)) ** 2
    ends = [share_ends(y, (v + more) * inflate, w) for y, v in zip(total, each, strict=True)]
    (down, up), (fell, fewer) = (
        (y - low, high - y) for y, (low, high) in zip(total, ends, strict=True)
    )
    if scores.limits == (0.0, 100.0):  # a level, of which nothing falls
        fell = fewer = 0.0
    below = np.sqrt(max(down**2 + fewer**2 - 2 * r * down * fewer, 0.0))
    above = np.sqrt(max(up**2 + fell**2 - 2 * r * up * fell, 0.0))
    return 100 * float(below), 100 * float(above)


def share_ends(share: float, variance: float, largest: float) -> tuple[float, float]:
    """The interval of a mean of units' shares, between 0 and 1; `largest` is the part of one unit.

    Of whole units, share = k / n with variance share (1 - share) / n, it is Clopper and Pearson's.
    Its beta quantile has the mean and variance of k + 1 events. As in Fay and Feuer's interval for
    weighted counts (1997, Statistics in Medicine 16, 791) they come from the estimate's variance
    and from one more event, so that the upper end never falls as the count rises from 0. The event
    has the weight `largest` where none was seen, and the more were seen, the more it has the mean
    weight of those, variance / share.
    """
    return 1 - _share_end(1 - share, variance, largest), _share_end(share, variance, largest)


def _share_end(share: float, variance: float, largest: float) -> float:
    if share >= 1:
        return 1.0
    share = max(share, 0.0)
    w = min(largest, (variance / (1 - share) + largest**2) / (share + largest))
    mean = (share + w) / (1 + w)
    spread = (variance + w**2 * (1 - share)) / ((1 + w) ** 2 * (1 + 2 * w))
    n = max(mean * (1 - mean) / spread - 1, 1e-3)
    return float(max(betaincinv(mean * n, (1 - mean) * n, UPPER), share))


# ---- runs
class Repetitions(NamedTuple):
    """How runs with equal settings differ, by setting; NaN where a pool has no repetition."""

    setting: np.ndarray  # [runs] number of the setting
    pool: np.ndarray  # [runs] number of the pool
    variance: np.ndarray  # [settings] of the weighted sum, from the spread of repetitions
    noise: np.ndarray  # [settings] the part of it that is noise of run x unit
    run_noise: np.ndarray  # [settings] the noise of a single run
    shared: float  # the variance of the sum over settings in units of independent settings'
    shared_noise: float  # the same of its noise
    df: float  # of the sum over settings


def repetitions(
    scores: Scores,
    runs: np.ndarray,
    weight: np.ndarray,
    setting: np.ndarray,
    pool: np.ndarray,
    cluster: np.ndarray | None = None,
) -> Repetitions:
    """The spread of repetitions, and how much of it comes from units that a run answers differently
    by chance.

    Settings of one method differ in spread as much as methods do, so each has its own; the degrees
    of freedom pay for that. A setting with one run has the spread of its pool, whose squares then
    count as often as they are used, so that borrowing gains no degrees of freedom. Runs of one
    `cluster` share a seed and err together (each alone where not given): the variance is that of
    the clusters' sums (Liang and Zeger 1986, Biometrika 73, 13), with Bell and McCaffrey's degrees
    of freedom tr(M)^2 / tr(M^2), M the covariance of those sums if runs were independent. With each
    run alone this is Welch and Satterthwaite's. In a contrast the df are at most those of the side
    that has fewer.
    """
    pools, settings = (np.unique(names, return_inverse=True)[1] for names in (pool, setting))
    clusters = (
        np.arange(len(runs)) if cluster is None else np.unique(cluster, return_inverse=True)[1]
    )
    influence = scores.influence[runs]
    means = np.stack([influence[settings == one].mean(0) for one in range(settings.max() + 1)])
    square, _ = _within(scores.value[runs], settings, pools)
    noise, _ = _spread(scores.clusters.variance(influence - means[settings]), settings, pools)
    total = np.bincount(settings, weight**2)
    unknown = np.isnan(square).any()
    joint = _Joint(weight, settings, pools, clusters)
    parts = (scores.value[runs][:, None], influence)
    value, moved = (joint.sums(part) for part in parts)
    shared = _over((value**2).sum(), (total * square).sum())
    shared_noise = _over(scores.clusters.variance(moved).sum(), (total * noise).sum())
    df = np.nan if unknown else joint.df(square)
    return Repetitions(
        settings, pools, total * square, total * noise, noise, shared, shared_noise, df
    )


def _over(joint: float, alone: float) -> float:
    """The variance of sums over that of independent parts; 1 where nothing varies."""
    return float(joint / alone) if alone > 0 else 1.0


class _Joint:
    """The sums of runs' deviations from their settings' means, by cluster of runs that err
    together, scaled so that their sum of squares estimates the variance of the weighted sum of
    runs; what a setting with one run borrows from its pool is in the pool's own squares.
    """

    def __init__(self, weight, settings, pools, clusters):
        n = np.bincount(settings)
        alone, of = n - 1, pools[np.unique(settings, return_index=True)[1]]
        total = np.bincount(settings, weight**2)
        borrowed = np.bincount(of, np.where(alone == 0, total, 0.0))
        in_pool = np.maximum(np.bincount(of, alone), 1)
        each = (borrowed / in_pool)[of] * alone / n  # of the borrowed variance, to every run
        scale = np.sqrt(n / np.maximum(alone, 1)) * (alone > 0)
        sign = np.where(weight < 0, -1.0, 1.0)
        size = scale[settings] * sign * np.sqrt(weight**2 + each[settings])
        self.settings, self.pools, self.clusters = settings, pools, clusters
        self.weight, self.repeated = weight, alone[settings] > 0
        self.by_cluster = np.zeros((clusters.max() + 1, len(weight)))
        self.by_cluster[clusters, np.arange(len(weight))] = size
        one = settings[:, None] == settings[None, :]
        self.centre = np.eye(len(weight)) - one / n[settings]

    def sums(self, values: np.ndarray) -> np.ndarray:
        """[clusters, k] of values [runs, k]."""
        return self.by_cluster @ (self.centre @ values)

    def df(self, square: np.ndarray) -> float:
        """The degrees of freedom of the sum of squares, at these variances [settings] of runs."""
        spread = self.by_cluster @ (self.centre * np.sqrt(square[self.settings]))
        covariance = spread @ spread.T
        trace = np.trace(covariance)
        most = trace**2 / (covariance**2).sum() if trace > 0 else np.inf
        sides = [side for side in (self.weight > 0, self.weight < 0) if side.any()]
        return float(min(most, *map(self._free, sides)))

    def _free(self, side: np.ndarray) -> int:
        """How many deviations of a side are free: its clusters less its groups of settings that
        clusters join; of its pools where it repeats no setting itself.
        """
        if not (side & self.repeated).any():
            side = np.isin(self.pools, self.pools[side])
        at = side & self.repeated
        n, pairs = self.settings.max() + 1, (self.settings[at], self.clusters[at])
        size = n + self.clusters.max() + 1
        joined = coo_array((np.ones(at.sum()), (pairs[0], n + pairs[1])), (size, size))
        group = connected_components(joined, directed=False)[1]
        return len(np.unique(pairs[1])) - len(np.unique(group[pairs[0]]))


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


def rate_of(scores: Scores, runs: np.ndarray, setting: np.ndarray) -> np.ndarray | None:
    """The share in percent behind the score of each of these runs; None where the score is no
    share, or the change from a run of its own (a parent, a control): its spread is that of the
    differences and not of one side's shares.
    """
    if scores.rate is None:
        return scores.value[runs] if scores.limits == (0.0, 100.0) else None
    if scores.reference is not None:
        pairs = {*zip(setting, scores.reference[runs], strict=True)}
        if len(pairs) > len({*setting}):
            return None
    return scores.rate[runs]


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
    the t interval, of all settings' variances together. Settings of shares are joined by MOVER, all
    at the degrees of freedom of their sum.
    """
    if np.isnan(spread.df):
        return np.nan, np.nan
    rate = rate_of(scores, runs, spread.setting)
    if rate is None:
        own, noise = spread.variance.sum(), spread.noise.sum()
        half = _pivot_distance(own * spread.shared, noise * spread.shared_noise, spread.df)
        return float(half), float(half)
    n = np.maximum(scores.n_items[runs] - scores.n_unscored[runs], 1)
    scaled = _probits(rate / 100, n, spread)
    size = np.bincount(spread.setting)
    share = np.bincount(spread.setting, rate) / size / 100
    amount = 100 * np.bincount(spread.setting, weight)
    ends = np.abs(amount) * _share_distances(*scaled, size, share, spread)
    low, high = np.where(amount > 0, ends, ends[::-1])
    return float(np.hypot.reduce(low)), float(np.hypot.reduce(high))


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
    middle: np.ndarray,
    variance: np.ndarray,
    noise: np.ndarray,
    n: np.ndarray,
    share: np.ndarray,
    runs: Repetitions,
) -> np.ndarray:
    """How far below and above [2, settings] the mean share of a setting's n runs the truth may lie,
    from the mean and variance of their probits; longer where settings share seeds. Settings that
    err together add their distances and not their squares, so the ends of a setting alone are
    scaled: of a bent scale, the ends of a larger error would be too near on the steep side.
    """
    chi, weights = _pivots(runs.df)
    spread = np.maximum(variance[:, None] * chi - noise[:, None], 0.0)
    less = noise * (runs.shared_noise / runs.shared if runs.shared > 0 else 1.0)
    error = np.sqrt(np.maximum(variance[:, None] * chi - less[:, None], 0.0) / n[:, None])
    steep = np.sqrt(1 + spread)
    low, high = ndtr(_mixed_quantiles(middle[:, None] / steep, error / steep, weights))
    away = np.maximum(np.stack([share - low, high - share]), 0.0)
    return away * np.sqrt(runs.shared)


@lru_cache(maxsize=1024)
def _pivots(df: float) -> tuple[np.ndarray, np.ndarray]:
    """A grid over the pivot df / chi-square [81] and its weights."""
    log = np.linspace(*np.log(chdtri(df, [1 - 1e-4, 1e-4])), 81)
    likely = np.exp(df / 2 * (log - log.max()) - (np.exp(log) - np.exp(log.max())) / 2)
    return df / np.exp(log), likely / likely.sum()


def _mixed_quantiles(
    middle: np.ndarray, error: np.ndarray, weights: np.ndarray, steps: int = 30
) -> np.ndarray:
    """The lower and upper quantiles [2, k] of mixtures of normals with these means and standard
    deviations [k, parts], by bisection.
    """
    error = np.maximum(error, 1e-9)
    low = np.repeat((middle - 8 * error).min(1)[None], 2, axis=0)
    high = np.repeat((middle + 8 * error).max(1)[None], 2, axis=0)
    at = np.array([[1 - UPPER], [UPPER]])
    for _ in range(steps):
        half = (low + high) / 2
        below = ndtr((half[..., None] - middle) / error) @ weights < at
        low, high = np.where(below, half, low), np.where(below, high, half)
    return (low + high) / 2


def _pivot_distance(variance: float, noise: float, df: float) -> float:
    """Half the pivotal interval of a normal mean with this estimated variance less the noise."""
    if noise == 0 or variance == 0:
        return stdtrit(df, UPPER) * np.sqrt(variance)
    chi, weights = _pivots(df)
    spread = np.sqrt(np.maximum(variance * chi - noise, 0.0))[None]
    return float(_mixed_quantiles(np.zeros_like(spread), spread, weights)[1, 0])
