"""Contrasts of the original study's runs: means of cells and differences at equal settings, with
the run variance of each method and base model.
"""

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import t as student

from driftbook.stats.confidence import CONFIDENCE

WELCH = (
    "mean over rounds; run variance within settings of each method and base model, t interval"
    " (Welch-Satterthwaite)"
)


def spread(rows: pd.DataFrame, value: str = "change") -> pd.DataFrame:
    """Variance between equal runs (same true settings, other rounds) of each pool, pooled over its
    settings, and its df; NaN where nothing was repeated.
    """
    rest = rows[value] - rows.groupby(["pool", "setting"])[value].transform("mean")
    found = pd.DataFrame(
        {
            "squares": (rest**2).groupby(rows["pool"]).sum(),
            "df": rows.groupby("pool").size() - rows.groupby("pool")["setting"].nunique(),
        }
    )
    return found.assign(variance=found["squares"] / found["df"].where(found["df"] > 0))


def rescored(rows: pd.DataFrame, value: str = "change") -> pd.Series:
    """Variance of one scoring of each base model: that of the round means of its no-ops, which are
    the base model scored again; NaN without two rounds.
    """
    return (
        rows[rows["no_op"]]
        .groupby(["base_model", "round"])[value]
        .mean()
        .groupby("base_model")
        .var()
    )


@dataclass(frozen=True)
class Combined:
    """Sums of weight x value over runs, one per row of weights [n], each with two standard errors:
    base models' one scores taken as known, and uncertain (wide). NaN where nothing was repeated.
    """

    value: np.ndarray
    se: np.ndarray
    df: np.ndarray
    se_wide: np.ndarray
    df_wide: np.ndarray
    n_runs: np.ndarray

    def ends(self, level: float, wide: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """The ends of the t intervals of this level [n], [n]."""
        se, df = (self.se_wide, self.df_wide) if wide else (self.se, self.df)
        half = student.ppf(0.5 + level / 2, df) * se
        return self.value - half, self.value + half

    def above(self, bound: float, wide: bool = False) -> np.ndarray:
        """The p of the one-sided t test that each sum lies above a bound [n]."""
        se, df = (self.se_wide, self.df_wide) if wide else (self.se, self.df)
        return student.sf((self.value - bound) / se, df)


def combined(rows: pd.DataFrame, weights: np.ndarray, value: str = "change") -> Combined:
    """The sums of weight x value over runs for each row of `weights` [n, runs].

    The variance of a sum is that of each pool's own equal runs (Welch 1947), with Satterthwaite's
    degrees of freedom (1946). The wide one adds the variance of scoring each base model once, which
    all its runs share: weight on a base model x the variance of its no-ops' round means.
    """
    weights = np.atleast_2d(np.asarray(weights, float))
    pools, scored = spread(rows, value), rescored(rows, value)
    squared = weights**2 @ _members(rows["pool"], pools.index)
    bases = list(rows["base_model"].unique())
    on_base = weights @ _members(rows["base_model"], bases)
    on_base[np.abs(on_base) <= 1e-9] = 0.0
    df_base = np.full(len(bases), 2.0)
    parts = _times(squared, pools["variance"].to_numpy(float))
    more = _times(on_base**2, scored.reindex(bases).to_numpy(float))
    df = pools["df"].to_numpy(float)
    return Combined(
        weights @ rows[value].to_numpy(float),
        *_satterthwaite(parts, df),
        *_satterthwaite(np.hstack([parts, more]), np.concatenate([df, df_base])),
        (weights != 0).sum(1),
    )


def _members(labels: pd.Series, names) -> np.ndarray:
    """Which run has which label [runs, names], as 0 and 1."""
    return (labels.to_numpy(object)[:, None] == np.array(names, object)).astype(float)


def _times(weight: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """weight x variance, zero where there is no weight, whether or not the variance is known."""
    return np.where(weight > 0, weight * variance, 0.0)


def _satterthwaite(parts: np.ndarray, df: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Standard errors [n] and degrees of freedom [n] of sums of independent variances [n, parts];
    NaN where a part is not known or all are zero.
    """
    total = parts.sum(1)
    total = np.where(total > 0, total, np.nan)
    with np.errstate(invalid="ignore", divide="ignore"):
        each = np.where(parts > 0, parts**2 / df, 0.0).sum(1)
        return np.sqrt(total), total**2 / each


def combination(
    rows: pd.DataFrame,
    weight: pd.Series,
    value: str = "change",
    level: float = CONFIDENCE,
    uncertain_base: bool = False,
) -> dict[str, float | None]:
    """One sum of weight x value over runs with its t interval, as fields of `estimates`; see
    `combined`.

    `weight` is indexed as `rows`. The interval is null where a pool has no repeated setting; then
    only the number can be said.
    """
    one = combined(rows, weight.to_numpy(float), value)
    se, df = (one.se_wide, one.df_wide) if uncertain_base else (one.se, one.df)
    known = {"value": float(one.value[0]), "n_runs": int(one.n_runs[0])}
    if math.isnan(se[0]):
        nothing = dict.fromkeys(("se", "ci_low", "ci_high", "p"))
        return known | nothing | {"how": "nothing was repeated: no interval"}
    low, high = one.ends(level, uncertain_base)
    return known | {
        "se": float(se[0]),
        "ci_low": float(low[0]),
        "ci_high": float(high[0]),
        "p": 2 * student.sf(abs(known["value"]) / se[0], df[0]),
        "how": WELCH,
    }


# ---- weights
def mean_weight(rows: pd.DataFrame, chosen: pd.Series) -> pd.Series:
    """Weights of the mean over the chosen runs of each base model, averaged over base models."""
    bases = rows.loc[chosen, "base_model"]
    return (1 / bases.map(bases.value_counts()) / bases.nunique()).reindex(rows.index).fillna(0.0)


def cell_weight(rows: pd.DataFrame, chosen: pd.Series) -> pd.Series:
    """Weights of the mean over cells: base models count alike, in each of them its cells (method
    and true setting), and in each cell its runs.
    """
    own = rows.loc[chosen, ["base_model", "method", "setting"]]
    cells = own.drop_duplicates().groupby("base_model").size()
    runs = own.groupby(["base_model", "method", "setting"])["setting"].transform("size")
    weight = 1 / runs / own["base_model"].map(cells) / own["base_model"].nunique()
    return weight.reindex(rows.index).fillna(0.0)


def matched_weight(
    rows: pd.DataFrame, one: pd.Series, other: pd.Series, equal: list[str]
) -> pd.Series:
    """Weights of the mean difference `one` less `other` over the cells (equal values in `equal`)
    that both have; all zero where there is none.
    """
    cells = matched_cells(rows, one, other, equal)
    mean = np.mean([part.to_numpy() for part in cells], axis=0) if cells else 0.0
    return pd.Series(mean, rows.index)


def matched_cells(
    rows: pd.DataFrame, one: pd.Series, other: pd.Series, equal: list[str]
) -> list[pd.Series]:
    """Weights of the difference `one` less `other` in each cell (equal values in `equal`) that both
    have.
    """
    cell = rows.groupby(equal, dropna=False).ngroup().to_numpy()
    a, b = one.to_numpy(bool), other.to_numpy(bool)
    found = []
    for number in np.intersect1d(cell[a], cell[b]):
        here = cell == number
        weight = (a & here) / (a & here).sum() - (b & here) / (b & here).sum()
        found.append(pd.Series(weight, rows.index))
    return found
