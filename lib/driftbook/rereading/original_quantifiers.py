"""Three readings of a claim about many cells, and the rule that makes verdicts of them.

A claim says that a number lies in a region: "preserves" says that a change lies above the margin,
"reduces" that it lies below zero. It can be meant of the mean over cells, of every cell, or of most
cells. Each reading has a verdict of its own:

- the mean stands where its interval lies inside the region, falls where it lies outside;
- every cell stands where surely all cells lie inside, falls where surely at least one lies outside;
- the share stands where surely more than half of the cells lie inside, falls where surely fewer do.

"Surely" is a bound on the number of cells, at half of 5 % on either side, by tests of partial
conjunctions (Benjamini and Heller 2008, Biometrics 64, 1215): that at least u of n cells lie inside
is shown by Simes's p (1986, Biometrika 73, 751) of the n - u + 1 largest one-sided p values. For
u = n that is an intersection-union test, which needs no adjustment. Which cells they are is not
said by such a bound.

Whatever is neither cannot be told. Where a base model's one score matters, a reading needs the same
verdict with that score taken as known and as uncertain. A claim has a verdict only where its three
readings agree; else it depends on the reading.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from driftbook.rereading.original_contrasts import combined
from driftbook.rereading.original_spreads import Ratio
from driftbook.stats.confidence import ALPHA

CLAIM_VERDICTS = STANDS, FALLS, DEPENDS, OPEN = (
    "stands",
    "falls",
    "depends on the reading",
    "cannot be told",
)
MEAN, EVERY, SHARE = "mean over cells", "every cell", "share of cells"
TOTAL, REPEATS = "spread over all runs", "spread between equal runs"
HALF = 50.0  # percent of cells: "most"
CELLS_OUTSIDE, SHARE_INSIDE = "cells outside the claim (of {})", "cells as claimed (percent)"
UNCERTAIN = "with base scores uncertain"
Region = tuple[float, float]


@dataclass(frozen=True)
class Family:
    """Numbers that are judged together [n]: names and values; the ends of their intervals by level,
    and the p values that they lie above a bound, each by whether base models' one scores are
    uncertain.
    """

    names: Sequence[str]
    value: np.ndarray
    ends: Callable[[float, bool], tuple[np.ndarray, np.ndarray]]
    above: Callable[[float, bool], np.ndarray]
    n_runs: int

    @property
    def joint(self) -> float:
        """The level at which all intervals hold at once (Bonferroni)."""
        return 1 - ALPHA / max(len(self.names), 1)


@dataclass(frozen=True)
class Quantified:
    """One reading of a claim: its verdict, the one with base models' scores taken as known, the
    number with its interval (base scores known), and what lies behind.
    """

    quantifier: str
    verdict: str
    known: str
    value: float
    ci_low: float
    ci_high: float
    outcome: str
    n_runs: int
    words: str = ""


# ---- families
def of_weights(
    rows: pd.DataFrame, weights: dict[str, pd.Series], value: str = "change"
) -> Family | None:
    """The sums of weight x value over runs, by name; none where no run has weight."""
    weights = {name: one for name, one in weights.items() if one.any()}
    if not weights:
        return None
    stacked = np.array([one.to_numpy(float) for one in weights.values()])
    found = combined(rows, stacked, value)
    n_runs = int((stacked != 0).any(0).sum())
    return Family(list(weights), found.value, found.ends, found.above, n_runs)


def of_ratios(ratios: dict[str, Ratio]) -> Family:
    """Ratios of standard deviations by name; no base model's score matters to them."""

    def ends(level: float, wide: bool) -> tuple[np.ndarray, np.ndarray]:
        low, high = zip(*(one.ends(level) for one in ratios.values()), strict=True)
        return np.array(low), np.array(high)

    def above(bound: float, wide: bool) -> np.ndarray:
        return np.array([one.above(bound) for one in ratios.values()])

    values = np.array([one.value for one in ratios.values()])
    return Family(list(ratios), values, ends, above, sum(one.n_runs for one in ratios.values()))


def joined(families: dict[str, Family]) -> Family:
    """Families of one number each as one family, by new names; all are of the same runs."""

    def ends(level: float, wide: bool) -> tuple[np.ndarray, np.ndarray]:
        low, high = zip(*(one.ends(level, wide) for one in families.values()), strict=True)
        return np.concatenate(low), np.concatenate(high)

    def above(bound: float, wide: bool) -> np.ndarray:
        return np.concatenate([one.above(bound, wide) for one in families.values()])

    values = np.concatenate([one.value for one in families.values()])
    n_runs = max(one.n_runs for one in families.values())
    return Family(list(families), values, ends, above, n_runs)


# ---- the rule
def placed(low: np.ndarray, high: np.ndarray, region: Region) -> np.ndarray:
    """Of each interval: `stands` where it lies inside the region, `falls` where it lies outside,
    else, and where there is none, `cannot be told`.
    """
    low, high = np.asarray(low, float), np.asarray(high, float)
    inside = (low > region[0]) & (high < region[1])
    outside = (high < region[0]) | (low > region[1])
    return np.select([inside, outside], [STANDS, FALLS], OPEN)


def at_least(p: np.ndarray, level: float) -> int:
    """How many of the alternatives are surely true: the largest u for which "fewer than u are" is
    rejected at this level, and with it every smaller u. NaN never rejects.
    """
    p, n = np.sort(np.where(np.isnan(p), 1.0, p)), len(p)
    for u in range(1, n + 1):
        largest = p[u - 1 :]
        if np.min(len(largest) * largest / np.arange(1, len(largest) + 1)) > level:
            return u - 1
    return n


def surely(cells: Family, region: Region, wide: bool) -> tuple[int, int]:
    """At least how many cells lie inside the region, and at least how many outside; each holds with
    half of what an interval may err.
    """
    low, high = region
    over_low = cells.above(low, wide) if np.isfinite(low) else np.zeros(len(cells.names))
    over_high = cells.above(high, wide) if np.isfinite(high) else np.ones(len(cells.names))
    inside = np.maximum(over_low, 1 - over_high)
    outside = np.minimum(1 - over_low, over_high)
    if np.isfinite(low) and np.isfinite(high):
        outside = np.minimum(2 * outside, 1.0)  # either side would do
    return at_least(inside, ALPHA / 2), at_least(outside, ALPHA / 2)


def agreed(verdicts: Sequence[str], otherwise: str) -> str:
    """The one verdict of all, or another where they differ."""
    return verdicts[0] if len(set(verdicts)) == 1 else otherwise


def depth(values: np.ndarray, region: Region) -> np.ndarray:
    """How far inside the region each value lies; negative outside."""
    return np.minimum(values - region[0], region[1] - values)


def mean_reading(
    means: Family, region: Region, outcome: str, quantifier: str = MEAN, words: str = ""
) -> Quantified:
    """A mean, or several that all have to lie inside: the least favourable one is shown, with
    intervals that hold for all at once.
    """
    verdicts, ends = [], []
    worst = int(np.argmin(depth(means.value, region)))
    for wide in (False, True):
        low, high = means.ends(means.joint, wide)
        each = placed(low, high, region)
        falls, stands = (each == FALLS).any(), (each == STANDS).all()
        verdicts.append(FALLS if falls else STANDS if stands else OPEN)
        ends.append((float(low[worst]), float(high[worst])))
    said = [f"least favourable of {len(means.names)}: {means.names[worst]}"]
    said = (said if len(means.names) > 1 else []) + ([words] if words else [])
    if verdicts[0] != verdicts[1]:
        said.append(f"{UNCERTAIN} {ends[1][0]:+.1f} to {ends[1][1]:+.1f}: {verdicts[1]}")
    value, verdict = float(means.value[worst]), agreed(verdicts, OPEN)
    words = "; ".join(said)
    return Quantified(
        quantifier, verdict, verdicts[0], value, *ends[0], outcome, means.n_runs, words
    )


def cell_readings(cells: Family, region: Region) -> tuple[Quantified, Quantified]:
    """Every cell (a count of cells outside, and which), and the share of cells inside (percent),
    with the intervals that `surely` gives.
    """
    n, every, most, sure = len(cells.names), [], [], []
    for wide in (False, True):
        inside, outside = surely(cells, region, wide)
        every.append(STANDS if inside == n else FALLS if outside else OPEN)
        low, high = 100 * inside / n, 100 * (n - outside) / n
        most.append(STANDS if low > HALF else FALLS if high < HALF else OPEN)
        sure.append((inside, outside))
    (inside, outside), deep = sure[0], depth(cells.value, region)
    named = [f"{cells.names[i]} {cells.value[i]:+.1f}" for i in np.argsort(deep) if deep[i] <= 0]
    words = ["outside: " + ", ".join(named)] if named else []
    less = f"{UNCERTAIN} at least {sure[1][0]} inside and {sure[1][1]} outside"
    said = [words + ([less] if len(set(one)) > 1 else []) for one in (every, most)]
    return (
        Quantified(
            EVERY,
            agreed(every, OPEN),
            every[0],
            len(named),
            outside,
            n - inside,
            CELLS_OUTSIDE.format(n),
            cells.n_runs,
            "; ".join(said[0]),
        ),
        Quantified(
            SHARE,
            agreed(most, OPEN),
            most[0],
            100 * (n - len(named)) / n,
            100 * inside / n,
            100 * (n - outside) / n,
            SHARE_INSIDE,
            cells.n_runs,
            "; ".join(said[1][len(words) :]),
        ),
    )


def three_readings(
    means: Family, cells: Family, region: Region, outcome: str
) -> tuple[Quantified, ...]:
    """The mean, every cell and the share of cells."""
    return mean_reading(means, region, outcome), *cell_readings(cells, region)


def claim_verdict(readings: Sequence[Quantified]) -> str:
    """The verdict of a claim: that of its readings where all agree."""
    return agreed([one.verdict for one in readings], DEPENDS)
