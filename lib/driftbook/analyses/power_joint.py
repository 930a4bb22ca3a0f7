"""Power of the declared joint test: a method preserves every outcome at once, with Holm's step over
all the cells of its family.

The test of notebook 19 takes the largest p of a cell's outcomes and adjusts it over the cells, so
its power is below that of any single outcome. Studies are drawn in which nothing is harmed: each
estimate is normal about zero with its standard error, and that error is known with the degrees of
freedom of its interval. Errors are drawn with the correlation that this study has as a pilot: cells
share prompts and their base models' answers, outcomes share runs.
"""

from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.special import stdtr

from driftbook.analyses import primary, tradeoffs
from driftbook.stats import intervals, terms
from driftbook.stats.confidence import ALPHA
from driftbook.stats.estimation import complete
from driftbook.stats.influence import Scores
from driftbook.stats.noninferiority import JOINTLY
from driftbook.stats.picking import picked
from driftbook.study.study_file import Study
from driftbook.study.tables import ESTIMATES

JOINT_POWER = "power to show that all is preserved, where nothing is harmed (percent)"
DRAWS = 4_000
_CELL = ["base_model", "method"]


class _Parts(NamedTuple):
    """How the error of one number is made."""

    change: Scores
    by_unit: np.ndarray  # [families of units] its influences
    by_cluster: pd.Series  # of the runs' deviations, by cluster
    noise: float  # variance, of run x unit


@dataclass(frozen=True)
class Pilot:
    """What the runs of a study know of how errors go together."""

    measured: dict[str, tuple[Scores, Scores]]  # tradeoffs.measured
    cells: pd.DataFrame  # influence.cells

    def correlation(self, rows: pd.DataFrame, group: str) -> np.ndarray:
        """The correlation of the errors of these rows of `estimates` [rows, rows].

        Rows on the same prompts share them, and the base models' answers to them (the dot product
        of their influences); rows of runs that share their random numbers share what those add (the
        sums of deviations by cluster, influence.seed_clusters). The noise of run x prompt is in
        both, and counts once in a row's own variance. A row that was not measured is alone.
        """
        parts = [self._parts(row, group) for row in rows.to_dict("records")]
        covariance = np.eye(len(parts))
        for i, j in combinations_with_replacement(range(len(parts)), 2):
            if parts[i] is None or parts[j] is None:
                continue
            one, other = parts[i], parts[j]
            shared = one.by_cluster.mul(other.by_cluster, fill_value=0.0).sum()
            if tradeoffs.same_units(one.change, other.change):
                shared += one.by_unit @ other.by_unit
            if i == j:
                shared = max(shared - one.noise, one.by_unit @ one.by_unit, 1e-12)
            covariance[i, j] = covariance[j, i] = shared
        scale = np.sqrt(np.diag(covariance))
        whole = tradeoffs.root(covariance / np.outer(scale, scale))  # the nearest that can be
        whole /= np.sqrt((whole**2).sum(1))[:, None]
        return whole @ whole.T

    def _parts(self, row: dict, group: str) -> _Parts | None:
        own = picked(self.cells, group=group, **{name: row[name] for name in _CELL})
        asked = row["benchmark"] == tradeoffs.ASKED.get(row["outcome"], "bbq")
        if own.empty or not asked or row["outcome"] not in self.measured:
            return None
        change = self.measured[row["outcome"]][1]
        if not tradeoffs.has_score(change, own["run_id"]).all():
            return None
        at, weight = change.at(own["run_id"]), own["weight"].to_numpy()
        setting = pd.factorize(own["pool"] + own["method"] + own["setting"])[0]
        units = tradeoffs.scaled(change, change.influence[at])
        rest = tradeoffs.scaled_rest(change.value[at][:, None], setting)[:, 0]
        by_cluster = pd.Series(weight * rest).groupby(own["cluster"].to_numpy()).sum()
        noise = weight**2 @ (tradeoffs.scaled_rest(units, setting) ** 2).sum(1)
        return _Parts(change, weight @ units, by_cluster, float(noise))


def joint_power(
    study: Study,
    estimates: pd.DataFrame,
    seed: int,
    harm: float = 0.0,
    pilot: Pilot | None = None,
    **labels: str,
) -> pd.DataFrame:
    """A row of `estimates` per family that tests `preserves`, method and base model, at the
    family's margin; with Wilson's interval over the studies drawn.

    `harm` is the true harm of every outcome, in points; `pilot` gives the correlation of errors,
    without it they are independent. Null where an outcome has no standard error. Empty where no
    such family is declared or none of its outcomes was estimated.
    """
    tested, _ = primary.tests(study, estimates)
    rng, parts = np.random.default_rng(seed), []
    for name, family in study.primary.items():
        own = tested[tested["member"].eq(name) & tested["margin"].eq(family.margin).fillna(False)]
        own = own[own["outcome"].ne(JOINTLY)]
        if family.test == "preserves" and len(own):
            related = None if pilot is None else pilot.correlation(own, family.group)
            parts.append(_of_family(rng, name, own, len(family.outcomes), harm, related))
    if not parts:
        return ESTIMATES.empty()
    usual = {"outcome": JOINTLY, "benchmark": "all", "contrast": JOINT_POWER, "group": "declared"}
    usual |= {"population": terms.BOTH, "study": study.name}
    return complete(pd.concat(parts, ignore_index=True).assign(**usual, **labels))


def _of_family(
    rng: np.random.Generator,
    name: str,
    rows: pd.DataFrame,
    n_outcomes: int,
    harm: float,
    related: np.ndarray | None,
) -> pd.DataFrame:
    numbers = rows.astype(dict.fromkeys(("se", "ci_low", "ci_high", "margin"), float))
    half = (numbers["ci_high"] - numbers["ci_low"]) / 2
    df = [
        intervals.implied_df(h / se) if se > 0 else np.nan
        for h, se in zip(half, numbers["se"], strict=True)
    ]
    cells = pd.factorize(pd.MultiIndex.from_frame(rows[_CELL]))
    measured = np.bincount(cells[0]) == n_outcomes
    margin = numbers["margin"].iloc[0]
    se = numbers["se"].to_numpy()
    shown = drawn(rng, se, np.array(df), cells[0], margin - harm, related=related)
    k = np.where(measured & ~np.isnan(shown), np.nan_to_num(shown) * DRAWS, np.nan)
    low, high = intervals.wilson(k, np.full(len(k), float(DRAWS)))
    found = pd.DataFrame(list(cells[1]), columns=_CELL)
    how = f"{n_outcomes} outcomes, Holm over {len(found)} cells, {DRAWS:,} studies drawn"
    how += ", errors independent" if related is None else ", errors related as in these runs"
    ends = {"value": 100 * k / DRAWS, "ci_low": 100 * low, "ci_high": 100 * high}
    return found.assign(member=name, margin=margin, judge="none", how=how, **ends)


def drawn(
    rng: np.random.Generator,
    se: np.ndarray,
    df: np.ndarray,
    cell: np.ndarray,
    distance: float,
    holm: bool = True,
    related: np.ndarray | None = None,
) -> np.ndarray:
    """The share of drawn studies in which each cell preserves all its outcomes [cells]; `se`, `df`
    and `cell` are [outcomes of cells], `distance` the true distance to the margin, `related` the
    correlation of the errors (none: they are independent).

    NaN for a cell with an unknown error, which counts in Holm's method as one with p = 1.
    """
    n_cells, known = cell.max() + 1, ~np.isnan(se) & ~np.isnan(df)
    value = rng.normal(size=(DRAWS, len(se)))
    value = value if related is None else value @ tradeoffs.root(related).T
    spread = np.sqrt(rng.chisquare(np.where(known, df, 1), size=value.shape) / df)
    p = np.where(known, stdtr(df, (value - distance / se) / spread), 1.0)
    joint = np.stack([p[:, cell == one].max(1) for one in range(n_cells)], 1)
    if holm:
        order = joint.argsort(1)
        stepped = np.take_along_axis(joint, order, 1) * (n_cells - np.arange(n_cells))
        adjusted = np.empty_like(joint)
        np.put_along_axis(adjusted, order, np.maximum.accumulate(stepped, 1), 1)
        joint = adjusted
    unknown = np.bincount(cell, ~known) > 0
    return np.where(unknown, np.nan, (joint < ALPHA / 2).mean(0))
