"""How the spreads of two groups of the original study's runs compare: over all their runs, and
between equal runs.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import f as fisher

SPREAD_RATIO = "ratio of standard deviations of the change in safety"
FEWEST = 3  # common configurations below which no ratio over all runs is given


@dataclass(frozen=True)
class Ratio:
    """A ratio of standard deviations and its interval by level; by an F test the two-sided p of no
    difference, and the p that the ratio lies above a bound. NaN where there is none.
    """

    value: float
    ends: Callable[[float], tuple[float, float]]
    n_runs: int
    how: str
    p: float = math.nan
    above: Callable[[float], float] = lambda bound: math.nan


def _common(rows: pd.DataFrame, one: pd.Series, other: pd.Series, equal: list[str]) -> tuple:
    """The changes of both sides in each cell (equal values in `equal`) that both have: two lists of
    arrays.
    """
    cell, change = rows.groupby(equal, dropna=False).ngroup().to_numpy(), rows["change"].to_numpy()
    sides = one.to_numpy(bool), other.to_numpy(bool)
    common = np.intersect1d(*(cell[side] for side in sides))
    return tuple([change[side & (cell == number)] for number in common] for side in sides)


def _none(a: list, b: list, why: str) -> Ratio:
    how = f"{why}: no ratio"
    nothing = math.nan, math.nan
    return Ratio(math.nan, lambda level: nothing, sum(map(len, a + b)), how)


def total_ratio(
    rows: pd.DataFrame, one: pd.Series, other: pd.Series, equal: list[str], n_boot: int, seed: int
) -> Ratio:
    """Standard deviation of the change over all runs of `one`, over that of `other`, on the
    configurations (equal values in `equal`) that both have.

    The interval is a percentile bootstrap of configurations with all their runs, since runs of one
    configuration are alike. It holds what configurations do and what repetition does.
    """
    a, b = _common(rows, one, other, equal)
    if len(a) < FEWEST:
        return _none(a, b, f"{len(a)} common configurations")
    drawn = np.random.default_rng(seed).integers(len(a), size=(n_boot, len(a)))
    with warnings.catch_warnings(
        action="ignore", category=RuntimeWarning
    ):  # a draw of one configuration only may have no spread
        ratios = _sds(a, drawn) / _sds(b, drawn)
    ratios = ratios[np.isfinite(ratios)]

    def ends(level: float) -> tuple[float, float]:
        low, high = np.quantile(ratios, [0.5 - level / 2, 0.5 + level / 2])
        return float(low), float(high)

    value = float(np.std(np.concatenate(a), ddof=1) / np.std(np.concatenate(b), ddof=1))
    how = (
        f"standard deviation over all runs of {len(a)} common configurations; bootstrap of"
        f" configurations, {n_boot} draws"
    )
    return Ratio(value, ends, sum(map(len, a + b)), how)


def _sds(cells: list[np.ndarray], drawn: np.ndarray) -> np.ndarray:
    """The standard deviation of all runs of each draw of cells, from the cells' sums."""
    n, total, squares = (
        np.array([f(cell) for cell in cells], float)[drawn].sum(1)
        for f in (len, np.sum, lambda cell: (cell**2).sum())
    )
    return np.sqrt((squares - total**2 / n) / (n - 1))


def repeat_ratio(rows: pd.DataFrame, one: pd.Series, other: pd.Series, equal: list[str]) -> Ratio:
    """Standard deviation between equal runs of `one` over that of `other`, pooled over the
    configurations (equal values in `equal`) that both have; interval and p by Fisher's F.

    The ratio of variances over its true value is F with the two sides' degrees of freedom (runs
    less configurations) where runs of a configuration vary normally with one variance a side.
    """
    a, b = _common(rows, one, other, equal)
    squares = [sum(((cell - cell.mean()) ** 2).sum() for cell in side) for side in (a, b)]
    df = [sum(len(cell) - 1 for cell in side) for side in (a, b)]
    if not (min(df, default=0) > 0 and min(squares) > 0):
        return _none(a, b, "nothing was repeated, or repeated without a difference")
    variances = squares[0] / df[0] / (squares[1] / df[1])

    def ends(level: float) -> tuple[float, float]:
        low, high = (fisher.ppf(0.5 + sign * level / 2, *df) for sign in (1, -1))
        return math.sqrt(variances / low), math.sqrt(variances / high)

    def above(bound: float) -> float:
        return float(fisher.sf(variances / bound**2, *df)) if bound > 0 else 0.0

    p = 2 * min(above(1.0), 1 - above(1.0))
    how = f"between equal runs of {len(a)} common configurations; F of {df[0]} and {df[1]} df"
    return Ratio(math.sqrt(variances), ends, sum(map(len, a + b)), how, p, above)
